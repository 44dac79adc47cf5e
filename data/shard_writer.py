"""Write samples as webdataset shards with an index beside each."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from webdataset.writer import TarWriter

from data.errors import DataError, shown
from data.sample import ShardSample, is_usable_key, media_kind
from data.shard_names import OWN_LEFTOVER, UNFINISHED_SUFFIX, list_shards
from data.tar_index import scan_tar, sidecar_path, split_name, write_sidecar

MAX_SHARD_BYTES = 1 << 30
"""A shard with this much media is closed early: its samples are in memory until it is written."""
KEY = re.compile(r"[^\s./][^\s.]*\Z")
# The same samples give the same bytes: no time, no user. Keys may be long, so the format is GNU's.
TAR_OPTIONS = {
    "user": "",
    "group": "",
    "mode": 0o644,
    "mtime": 0,
    "format": "GNU_FORMAT",
    "compress": False,
    "encoder": False,
    "keep_meta": True,
}


def write_shards(
    folder: str | Path,
    samples: Iterable[ShardSample],
    samples_per_shard: int = 1000,
    *,
    overwrite: bool = False,
) -> list[Path]:
    """Write samples as shard-000000.tar, … with an index beside each; the same samples give the
    same bytes.

    Args:
        folder: Where the shards go; made if it is missing.
        samples: Samples in their order.
        samples_per_shard: Most samples of one shard.
        overwrite: Remove shards that lie in the folder instead of refusing.

    Returns:
        Paths of the shards written.

    Raises:
        DataError: The folder has shards already or cannot be written, a key is not allowed or used
            twice, an extension is not a media file's or used twice, a question is not valid JSON,
            or `samples_per_shard` is below 1.
    """
    if samples_per_shard < 1:
        raise DataError(
            f"{folder}: no samples per shard, got {samples_per_shard}, expected at least 1; "
            "correct it"
        )
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        present, unread = list_shards(target)
        if present and not overwrite:
            got = f"got {present[0].name}, expected none"
            raise DataError(
                f"{target}: the folder has shards already, {got}; name another folder or overwrite"
            )
        for name, problem in unread.items():
            if not OWN_LEFTOVER.fullmatch(name):
                raise DataError(problem)
            (target / name).unlink()  # of a writer that was killed
        written = _write_unfinished(target, samples, samples_per_shard)
        # If this stops halfway, the folder has unfinished shards, and readers refuse it.
        for shard in present:
            sidecar_path(shard).unlink(missing_ok=True)
            shard.unlink()
        for shard in written:
            sidecar_path(_unfinished(shard)).replace(sidecar_path(shard))
            _unfinished(shard).replace(shard)
    except OSError as error:
        advice = "make room there, or name another folder"
        raise DataError(f"{target}: the shards cannot be written ({error}); {advice}") from error
    return written


def _write_unfinished(
    folder: Path, samples: Iterable[ShardSample], samples_per_shard: int
) -> list[Path]:
    """Write all shards with their indexes under unfinished names, or none; return the final
    names.
    """
    written: list[Path] = []
    try:
        for number, batch in enumerate(_batches(folder, samples, samples_per_shard)):
            written.append(folder / f"shard-{number:06d}.tar")
            _write_shard(_unfinished(written[-1]), batch)
    except BaseException:
        for shard in written:
            _unfinished(shard).unlink(missing_ok=True)
            sidecar_path(_unfinished(shard)).unlink(missing_ok=True)
        raise
    return written


def _unfinished(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}{UNFINISHED_SUFFIX}")


def _batches(
    folder: Path, samples: Iterable[ShardSample], samples_per_shard: int
) -> Iterator[list[ShardSample]]:
    """Yield the samples of each shard."""
    seen: set[str] = set()
    batch: list[ShardSample] = []
    num_bytes = 0
    for sample in samples:
        _check_sample(folder, sample, seen)
        batch.append(sample)
        num_bytes += sum(len(content) for _, content in sample.media)
        if len(batch) == samples_per_shard or num_bytes >= MAX_SHARD_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _check_sample(folder: Path, sample: ShardSample, seen: set[str]) -> None:
    where = f"{folder}:{shown(sample.key)}"
    if not KEY.fullmatch(sample.key) or not is_usable_key(sample.key):
        expected = "printable text without dots, spaces and a leading slash"
        got = f"got {shown(sample.key)!r}"
        raise DataError(f"{folder}: key is not allowed, {got}, expected {expected}; rename it")
    if sample.key in seen:
        raise DataError(
            f"{folder}: key is used twice, got {sample.key!r}; give every sample its own"
        )
    seen.add(sample.key)
    extensions: set[str] = set()
    for extension, _ in sample.media:
        named = split_name(f"{sample.key}.{extension}")
        if media_kind(extension) is None or named != (sample.key, extension):
            got = f"got {shown(extension)!r}, expected jpg, 0.png, mp4 or the like, in lower case"
            raise DataError(f"{where}: extension is not a media file's, {got}; convert it")
        if extension in extensions:
            raise DataError(
                f"{where}: two files have the same extension, got {extension} twice; number them"
            )
        extensions.add(extension)


def _write_shard(path: Path, samples: Sequence[ShardSample]) -> None:
    """Write one shard and its index."""
    checksums = {}
    with path.open("wb") as file, TarWriter(file, **TAR_OPTIONS) as writer:
        for sample in samples:
            files = {"json": _question_json(path, sample), **dict(sample.media)}
            writer.write({"__key__": sample.key, **files})
            for extension, content in files.items():
                checksums[sample.key, extension] = zlib.crc32(content)
    index = scan_tar(path)
    with_checksums = {
        key: tuple(replace(each, crc32=checksums[key, each.extension]) for each in members)
        for key, members in index.samples.items()
    }
    write_sidecar(path, replace(index, samples=with_checksums))


def _question_json(shard: Path, sample: ShardSample) -> bytes:
    try:
        fields = dict(sample.question)
        return json.dumps(fields, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        where, detail = f"{shard.parent}:{shown(sample.key)}", shown(str(error))
        raise DataError(
            f"{where}: the question cannot be written as JSON ({detail}); correct it"
        ) from error
