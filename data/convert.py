"""JSON lines and media files into shards, checked on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data.errors import DataError, MediaError, SampleError
from data.health import SampleHealth
from data.media import MediaOpener
from data.sample import ShardSample, media_kind, parse_question
from data.shards import write_shards


def convert_jsonl(
    lines: str | Path,
    out_dir: str | Path,
    *,
    media_root: str | Path | None = None,
    opener: MediaOpener | None = None,
    health: SampleHealth | None = None,
    samples_per_shard: int = 1000,
    overwrite: bool = False,
) -> list[Path]:
    """Write one sample per line of a JSON lines file; bad ones are skipped and counted.

    A line has the fields of KEY.json, but `media` lists paths of files. A missing `id` becomes `<file name>/<line number>`.

    Args:
        lines: The JSON lines file, UTF-8.
        out_dir: Folder for the shards.
        media_root: What relative media paths start from; by default the folder of `lines`.
        opener: Opens every media file to see whether it can be opened; `None` skips that.
        health: Counts, and stops when too many are bad.
        samples_per_shard: Most samples of one shard.
        overwrite: Remove shards that lie in `out_dir`.

    Returns:
        Paths of the shards.

    Raises:
        DataError: The file is missing, no sample or too few are good, or the folder has shards already.
    """
    source = Path(lines)
    if not source.is_file():
        raise DataError(f"{source}: no such file, expected JSON lines; give its path as seen from here")
    root = source.parent if media_root is None else Path(media_root)
    counted = health if health is not None else SampleHealth()
    samples = keep_good(source, _lines(source, root), opener, counted)
    written = write_shards(out_dir, samples, samples_per_shard, overwrite=overwrite)
    if not written:
        listed = "; ".join(detail for _, _, detail in counted.listed) or "the file is empty"
        raise DataError(f"{source}: no good sample, expected at least one; correct them: {listed}")
    return written


def _lines(source: Path, root: Path) -> Iterator[tuple[int, Callable[[], ShardSample]]]:
    with source.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, partial(_sample, f"{source}:{number}", source.stem, number, line, root)


def keep_good(
    source: Path, samples: Iterable[tuple[int, Callable[[], ShardSample]]], opener: MediaOpener | None, health: SampleHealth
) -> Iterator[ShardSample]:
    """Yield the samples that can be made and read again; the others, and those whose id was met before, are counted.

    Args:
        source: File that they come from.
        samples: Number of a row, and what makes its sample or raises.
        opener: Opens every media file; `None` skips that.
        health: Counts, and stops when too many are bad.
    """
    first_row: dict[str, int] = {}
    for number, make in samples:
        where = f"{source}:{number}"
        try:
            sample = make()
            _check(str(source), number, sample, opener)
            question_id = sample.question["id"]
            if first_row.setdefault(question_id, number) != number:
                raise SampleError("duplicate_id", f"{where}: id is used twice, got {question_id!r} as in line {first_row[question_id]}")
        except (SampleError, MediaError) as error:
            health.bad(where, error.reason, str(error))
            continue
        health.good()
        yield sample


def _sample(where: str, stem: str, number: int, line: bytes, root: Path) -> ShardSample:
    """Return one line with its media files read."""
    try:
        fields: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_json", f"{where}: no JSON ({error}); write the line anew") from error
    if not isinstance(fields, dict):
        raise SampleError("bad_json", f"{where}: no object, got {type(fields).__name__}, expected the fields of a question; correct it")
    paths = fields.get("media") or []
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise SampleError("bad_field", f"{where}: field media is wrong, got {paths!r}, expected a list of paths; correct it")
    media = []
    for index, path in enumerate(paths):
        suffix = Path(path).suffix[1:].lower()
        if media_kind(suffix) is None:
            raise SampleError(
                "unknown_media", f"{where}: unknown kind of media, got {path}, expected e.g. .jpg, .png, .mp4; convert the file"
            )
        try:
            content = (root / path).read_bytes()
        except OSError as error:
            raise SampleError(
                "missing_media", f"{where}: {root / path} cannot be read ({error.strerror}); add it or set --media-root"
            ) from error
        media.append((suffix if len(paths) == 1 else f"{index}.{suffix}", content))
    fields = {"id": f"{stem}/{number}", **fields, "media": [extension for extension, _ in media]}
    return ShardSample(key=f"{number:09d}", question=fields, media=media)


def _check(source: str, number: int, sample: ShardSample, opener: MediaOpener | None) -> None:
    """Raise what reading the sample from its shard would raise."""
    content = json.dumps(dict(sample.question)).encode()
    question = parse_question(source, str(number), content, (extension for extension, _ in sample.media))
    if opener is not None:
        for reference, (_, media) in zip(question.media, sample.media, strict=True):
            opener.open(media, reference.kind)
