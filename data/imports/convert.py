"""JSON lines and media files into shards, checked on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path

from data.errors import DataError, MediaError, SampleError
from data.health import SampleHealth
from data.imports.tables import read_lines
from data.json_text import load_object
from data.media.files import MediaFolder
from data.media.opening import MediaLimits, MediaOpener
from data.question import ANSWER_TYPES
from data.sample import ShardSample, check_fields, media_kind, parse_question
from data.shard_writer import write_shards


def convert_jsonl(
    source: str | Path,
    out_dir: str | Path,
    *,
    media_root: str | Path | None = None,
    follow_links: bool = False,
    max_media_bytes: int | None = None,
    opener: MediaOpener | None = None,
    health: SampleHealth | None = None,
    answer_types: Collection[str] = ANSWER_TYPES,
    samples_per_shard: int = 1000,
    overwrite: bool = False,
) -> list[Path]:
    """Write one sample per line of a JSON lines file; bad ones are skipped and counted.

    A line has the fields of KEY.json, but `media` lists paths of files. A missing `id` becomes
    `<file name>/<line number>`.

    Args:
        source: The JSON lines file, UTF-8.
        out_dir: Folder for the shards.
        media_root: What relative media paths start from, and no path leaves; by default the folder
            of `source`.
        follow_links: Links may lead out of it.
        max_media_bytes: Largest media file that is read; by default that of `MediaLimits`.
        opener: Opens every media file to see whether it can be opened; `None` skips that.
        health: Counts, and stops when too many are bad.
        answer_types: Those that the run can grade.
        samples_per_shard: Most samples of one shard.
        overwrite: Remove shards that lie in `out_dir`.

    Returns:
        Paths of the shards.

    Raises:
        DataError: The file is missing, no sample or too few are good, or the folder has shards
            already.
    """
    path = Path(source)
    if not path.is_file():
        raise DataError(
            f"{path}: no such file, expected JSON lines; give its path as seen from here"
        )
    limit = MediaLimits().max_bytes if max_media_bytes is None else max_media_bytes
    folder = MediaFolder(
        path.parent if media_root is None else media_root, limit, follow_links=follow_links
    )
    counted = health if health is not None else SampleHealth()
    samples = keep_good(path, _lines(path, folder), opener, counted, answer_types)
    written = write_shards(out_dir, samples, samples_per_shard, overwrite=overwrite)
    if not written:
        listed = "; ".join(detail for _, _, detail in counted.listed) or "the file is empty"
        raise DataError(f"{path}: no good sample, expected at least one; correct them: {listed}")
    return written


def _lines(source: Path, folder: MediaFolder) -> Iterator[tuple[int, Callable[[], ShardSample]]]:
    for number, line in read_lines(source):
        yield number, partial(_sample, f"{source}:{number}", source.stem, number, line, folder)


def keep_good(
    source: Path,
    samples: Iterable[tuple[int, Callable[[], ShardSample]]],
    opener: MediaOpener | None,
    health: SampleHealth,
    answer_types: Collection[str] = ANSWER_TYPES,
) -> Iterator[ShardSample]:
    """Yield the samples that can be made and read again; the others, and those whose id was met
    before, are counted.

    Args:
        source: File that they come from.
        samples: Number of a row, and what makes its sample or raises.
        opener: Opens every media file; `None` skips that.
        health: Counts, and stops when too many are bad.
        answer_types: Those that the run can grade.
    """
    first_row: dict[str, int] = {}
    for number, make in samples:
        where = f"{source}:{number}"
        try:
            sample = make()
            _check(str(source), number, sample, opener, answer_types)
            question_id = sample.question["id"]
            if first_row.setdefault(question_id, number) != number:
                raise SampleError(
                    "duplicate_id",
                    f"{where}: id is used twice, got {question_id!r} as in line "
                    f"{first_row[question_id]}",
                )
        except (SampleError, MediaError) as error:
            health.bad(where, error.reason, str(error))
            continue
        health.good()
        yield sample


def _sample(
    where: str, stem: str, number: int, line: bytes | SampleError, folder: MediaFolder
) -> ShardSample:
    """Return one line with its media files read."""
    if isinstance(line, SampleError):
        raise line
    fields = load_object(where, line)
    paths = fields.get("media")
    paths = [] if paths is None else paths
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise SampleError(
            "bad_field",
            f"{where}: field media is wrong, got {paths!r:.200}, expected a list of paths; correct "
            "it",
        )
    check_fields(where, fields, has_media=bool(paths))
    media = []
    for index, path in enumerate(paths):
        suffix = Path(path).suffix[1:].lower()
        if media_kind(suffix) is None:
            expected = "expected e.g. .jpg, .png, .mp4; convert the file"
            raise SampleError(
                "unknown_media", f"{where}: unknown kind of media, got {path!r:.200}, {expected}"
            )
        media.append((suffix if len(paths) == 1 else f"{index}.{suffix}", folder.read(where, path)))
        folder.check_total(where, media)
    fields = {"id": f"{stem}/{number}", **fields, "media": [extension for extension, _ in media]}
    return ShardSample(key=f"{number:09d}", question=fields, media=media)


def _check(
    source: str,
    number: int,
    sample: ShardSample,
    opener: MediaOpener | None,
    answer_types: Collection[str],
) -> None:
    """Raise what reading the sample from its shard would raise."""
    try:
        content = json.dumps(dict(sample.question)).encode()
    except (RecursionError, TypeError) as error:  # what was just deep enough to be read
        raise SampleError(
            "bad_json", f"{source}:{number}: its fields cannot be written ({error}); correct them"
        ) from error
    extensions = (extension for extension, _ in sample.media)
    question = parse_question(source, str(number), content, extensions, answer_types)
    if opener is not None:
        for reference, (_, media) in zip(question.media, sample.media, strict=True):
            opener.open(media, reference.kind)
