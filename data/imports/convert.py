"""JSON lines, Parquet and media files into shards, checked on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path

from data.errors import DataError, MediaError, SampleError
from data.health import SampleHealth
from data.imports.tables import Row, read_rows, table_kind
from data.media.opening import MediaLimits, MediaOpener
from data.media.signatures import file_ending
from data.media_folder import MediaFolder
from data.question import ANSWER_TYPES
from data.sample import ShardSample, media_kind, parse_question
from data.shard_writer import write_shards
from data.sources.rows import Medium, RowRules, content_of, question_fields

BINARY_TABLES = (".parquet", ".arrow")


def convert_jsonl(
    source: str | Path,
    out_dir: str | Path,
    *,
    media_root: str | Path | None = None,
    follow_links: bool = False,
    max_media_bytes: int | None = None,
    opener: MediaOpener | None = None,
    health: SampleHealth | None = None,
    rules: RowRules | None = None,
    answer_types: Collection[str] = ANSWER_TYPES,
    samples_per_shard: int = 1000,
    overwrite: bool = False,
) -> list[Path]:
    """Write one sample per line of a JSON lines file, or row of a Parquet or Arrow file; bad ones
    are skipped and counted.

    A line has the fields of KEY.json, but media are given as in `data.sources.rows`. A missing `id`
    becomes `<file name>/<line number>`.

    Args:
        source: The file.
        out_dir: Folder for the shards.
        media_root: What relative media paths start from, and no path leaves; by default the folder
            of `source`.
        follow_links: Links may lead out of it.
        max_media_bytes: Largest media file that is read; by default that of `MediaLimits`.
        opener: Opens every media file to see whether it can be opened; `None` skips that.
        health: Counts, and stops when too many are bad.
        rules: What the columns are.
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
            f"{path}: no such file, expected JSON lines or Parquet; give its path as seen from here"
        )
    limit = MediaLimits().max_bytes if max_media_bytes is None else max_media_bytes
    folder = MediaFolder(
        path.parent if media_root is None else media_root, limit, follow_links=follow_links
    )
    counted = health if health is not None else SampleHealth(at_end=True)
    makers = _makers(path, rules or RowRules(), folder)
    samples = keep_good(path, makers, opener, counted, answer_types)
    written = write_shards(out_dir, samples, samples_per_shard, overwrite=overwrite)
    if not written:
        found = counted.examples() if counted.num_bad else "the file is empty"
        raise DataError(f"{path}: no good sample, expected at least one; correct them: {found}")
    return written


def _makers(
    source: Path, rules: RowRules, folder: MediaFolder
) -> Iterator[tuple[int, Callable[[], ShardSample]]]:
    kind = table_kind(source)
    if kind in (".json", ".csv", ".tsv"):
        raise DataError(
            f"{source}: no lines of JSON, got {kind}, expected *.jsonl, *.parquet or *.arrow; "
            f"python tools/make_shards.py benchmark {source} FOLDER reads it"
        )
    if kind not in BINARY_TABLES:
        kind = ".jsonl"
    keep = kind == ".jsonl"
    for number, row in read_rows(source, kind):
        yield number, partial(_sample, source, number, row, rules, folder, keep)


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
    health.finish()


def _sample(
    source: Path,
    number: int,
    row: Row | SampleError,
    rules: RowRules,
    folder: MediaFolder,
    keep: bool,
) -> ShardSample:
    """Return one row with its media read; `keep` lets fields that are not read stay in KEY.json."""
    if isinstance(row, SampleError):
        raise row
    where = f"{source}:{number}"
    fields, media = question_fields(where, row, rules, f"{source.stem}/{number}")
    if keep:
        read = rules.read() | {column.split(".")[0] for column in rules.read()}
        fields = {name: row[name] for name in row.keys() - read} | fields
    files: list[tuple[str, bytes]] = []
    for index, medium in enumerate(media):
        ending, content = _load(where, medium, folder)
        files.append((ending if len(media) == 1 else f"{index}.{ending}", content))
        folder.check_total(where, files)
    fields["media"] = [extension for extension, _ in files]
    return ShardSample(key=f"{number:09d}", question=fields, media=files)


def _load(where: str, medium: Medium, folder: MediaFolder) -> tuple[str, bytes]:
    """Return ending and content of a medium; without a name of its own, the ending is that of its
    content.
    """
    if medium.path is not None:
        if medium.ending and media_kind(medium.ending) is None:
            expected = "expected e.g. .jpg, .png, .mp4; convert the file"
            raise SampleError(
                "unknown_media",
                f"{where}: unknown kind of media, got {medium.path!r:.200}, {expected}",
            )
        content = folder.read(where, medium.path)
        return medium.ending or file_ending(medium.kind, content), content
    try:
        held = content_of(medium.value)
    except ValueError as error:
        raise SampleError(
            "bad_field", f"{where}: column {medium.column} is no base64 ({error}); write it again"
        ) from error
    assert held is not None, "a medium without a path has content"
    folder.check_size(f"{where}: column {medium.column}", len(held))
    return file_ending(medium.kind, held), held


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
