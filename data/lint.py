"""Check shards by the rules of reading, and list every problem instead of stopping at one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError, MediaError, SampleError
from data.media import MediaOpener
from data.shards import SHARD_PATTERN, ShardReader
from data.tar_index import load_index, scan_tar


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: `shard:key` or the shard, the reason's name, and the message."""

    where: str
    reason: str
    message: str


def lint(folders: Sequence[str | Path], opener: MediaOpener | None = None) -> tuple[int, list[Problem]]:
    """Return the number of samples and all problems of the folders of one run.

    Args:
        folders: Folders whose question ids must not repeat, within one or between them.
        opener: Opens every media file; `None` skips that.
    """
    num_samples = 0
    problems: list[Problem] = []
    first_place: dict[str, str] = {}
    for folder in map(Path, folders):
        shards = sorted(folder.glob(SHARD_PATTERN))
        if not shards:
            problems.append(Problem(str(folder), "no_shards", f"{folder}: no shards, expected *.tar; name the folder that holds them"))
        for shard in shards:
            reader = ShardReader()
            try:
                keys = list(reader.index(str(shard)).samples)
                index_is_right = load_index(shard).samples == scan_tar(shard).samples
            except DataError as error:
                problems.append(Problem(str(shard), "bad_shard", str(error)))
                continue
            if not index_is_right:
                message = f"{shard}: the index does not fit the shard; remove {shard}.idx.json"
                problems.append(Problem(str(shard), "wrong_index", message))
                continue
            num_samples += len(keys)
            for key in keys:
                problems += _sample_problems(reader, str(shard), key, first_place, opener)
            reader.close()
    return num_samples, problems


def _sample_problems(
    reader: ShardReader, shard: str, key: str, first_place: dict[str, str], opener: MediaOpener | None
) -> Iterator[Problem]:
    where = f"{shard}:{key}"
    try:
        question = reader.question(shard, key)
    except SampleError as error:
        yield Problem(where, error.reason, str(error))
        return
    first = first_place.setdefault(question.id, where)
    if first != where:
        yield Problem(where, "duplicate_id", f"{where}: id is used twice, got {question.id!r} as in {first}; give each its own")
    for reference in question.media if opener is not None else ():
        try:
            assert opener is not None
            opener.open_ref(reference, reader)
        except MediaError as error:
            yield Problem(where, error.reason, str(error))
