"""Check sources by the rules of reading, and list every problem instead of stopping at one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data.errors import DataError, MediaError, ReasonedError, shown
from data.files import LOCAL, LocalFiles
from data.health import TOO_LONG
from data.question import ANSWER_TYPES, MediaKind, MediaRef, Question
from data.shard_names import EXPECTED_SHARDS, list_shards
from data.shards import ShardReader
from data.source import ReadsMedia, Source
from data.tar_index import read_sidecar, same_entries, scan_tar, sidecar_path

BAD_SHARD = "bad_shard"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: `shard:key` or the file, the reason's name, and the message."""

    where: str
    reason: str
    message: str

    @property
    def is_too_long(self) -> bool:
        """Whether the sample is good, but longer than a run takes."""
        return self.reason == TOO_LONG


class OpensMedia(Protocol):
    """Reads and opens a media file, and raises `MediaError` where it cannot."""

    def read_ref(self, ref: MediaRef, reader: ReadsMedia) -> bytes:
        """Return the file, within the size limit."""
        ...

    def open(self, content: bytes, kind: MediaKind) -> object:
        """Decode it."""
        ...


class ReadsSamples(ReadsMedia, Protocol):
    """Reads questions and their media."""

    def question(self, shard: str, key: str) -> Question:
        """Return the question of one sample; see `data.source.Source`."""
        ...


class ReadableSource(Source, ReadsMedia, Protocol):
    """A source that is no folder of shards, opened."""


class MeasuresPrompts(Protocol):
    """Knows the length of the plain prompt that a run makes of a question."""

    max_tokens: int

    def num_tokens(self, question: Question, media: Mapping[MediaRef, Any]) -> int:
        """Return the tokens of a prompt; `media` are what the opener made of each file."""
        ...


def lint(
    folders: Sequence[str | Path | ReadableSource],
    opener: OpensMedia | None = None,
    prompts: MeasuresPrompts | None = None,
    answer_types: Collection[str] = ANSWER_TYPES,
    files: LocalFiles = LOCAL,
) -> tuple[int, list[Problem]]:
    """Return the number of samples and all problems of the folders of one run.

    Args:
        folders: Folders of shards, and other sources. Their question ids must not repeat, within
            one or between them.
        opener: Opens every media file; `None` skips that.
        prompts: Measures every question whose media are good; `None` skips that.
        answer_types: Those that the run can grade.
        files: Open the shards of folders.
    """
    num_samples = 0
    problems: list[Problem] = []
    first_with_id: dict[str, str] = {}
    for each in folders:
        if not isinstance(each, str | Path):
            samples = each.keys()
            num_samples += len(samples)
            for file, row in samples:
                problems += _sample_problems(each, file, row, first_with_id, opener, prompts)
            continue
        folder = Path(each)
        try:
            shards, unread = list_shards(folder, files)
        except DataError as error:
            problems.append(Problem(str(folder), "no_shards", str(error)))
            continue
        if not shards:
            message = f"{folder}: no shards, got none, {EXPECTED_SHARDS}"
            problems.append(Problem(str(folder), "no_shards", message))
        problems += [
            Problem(f"{folder}/{shown(name)}", "unread_shard", message)
            for name, message in unread.items()
        ]
        for shard in shards:
            reader = ShardReader(answer_types, files)
            problem = _shard_problem(reader, shard)
            if problem is not None:
                problems.append(problem)
                continue
            keys = list(reader.index(str(shard)).samples)
            num_samples += len(keys)
            for key in keys:
                problems += _sample_problems(
                    reader, str(shard), key, first_with_id, opener, prompts
                )
            reader.close()
    return num_samples, problems


def _shard_problem(reader: ShardReader, shard: Path) -> Problem | None:
    """Return why a shard, or its index, cannot be trusted."""
    try:
        found, reason = scan_tar(shard, reader.files), "wrong_index"
    except DataError as error:
        found, reason, message = None, BAD_SHARD, str(error)
    try:
        index = reader.index(str(shard))  # the error of a contradiction names both sides
        if found is not None:
            read_sidecar(shard, found.tar_size, reader.files)
            if same_entries(index, found):
                return None
            message = f"{shard}: the index does not fit the shard; remove {sidecar_path(shard)}"
    except DataError as error:
        message = str(error)
    return Problem(str(shard), reason, message)


def _sample_problems(
    reader: ReadsSamples,
    shard: str,
    key: str,
    first_with_id: dict[str, str],
    opener: OpensMedia | None,
    prompts: MeasuresPrompts | None,
) -> Iterator[Problem]:
    where = f"{shard}:{shown(key)}"
    try:
        question = reader.question(shard, key)
    except DataError as error:
        yield _unreadable(where, error)
        return
    first = first_with_id.setdefault(question.id, where)
    if first != where:
        yield Problem(
            where,
            "duplicate_id",
            f"{where}: id is used twice, got {shown(question.id)!r} as in {first}; give each its "
            "own",
        )
    media: dict[MediaRef, Any] = {}
    for reference in question.media if opener is not None else ():
        assert opener is not None
        yield from _open(reader, reference, where, opener, media)
    if prompts is None or len(media) < len(set(question.media)):
        return
    try:
        num_tokens = prompts.num_tokens(question, media)
    except DataError as error:
        yield _unreadable(where, error)
        return
    if num_tokens > prompts.max_tokens:
        message = f"{where}: the prompt has {num_tokens} tokens, more than {prompts.max_tokens}"
        yield Problem(where, TOO_LONG, message)


def _unreadable(where: str, error: DataError) -> Problem:
    reason = error.reason if isinstance(error, ReasonedError) else BAD_SHARD
    return Problem(where, reason, str(error))


def _open(
    reader: ReadsMedia,
    reference: MediaRef,
    where: str,
    opener: OpensMedia,
    media: dict[MediaRef, Any],
) -> Iterator[Problem]:
    """Add one of a sample's media to the others, or yield why it cannot be used."""
    try:
        content = opener.read_ref(reference, reader)
    except DataError as error:
        yield _unreadable(where, error)
        return
    try:
        media[reference] = opener.open(content, reference.kind)
    except MediaError as error:
        yield Problem(where, error.reason, f"{where}.{reference.extension}: {error}")
