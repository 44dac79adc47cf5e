"""Benchmark files as users have them, once into shards, so that everything else knows shards alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from data.benchmark_formats import FORMATS, PARTS, BenchmarkFormat, RowView
from data.convert import keep_good
from data.errors import DataError, SampleError
from data.health import SampleHealth
from data.media import MediaOpener
from data.question import MediaKind
from data.sample import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, ShardSample
from data.shards import write_shards
from data.signatures import file_ending
from data.tables import Row, read_rows

CONVERSION_FILE = "conversion.json"
ROWS_LOOKED_AT = 20
"""Rows whose columns decide on the format; rows of a JSON file need not have the same."""
MEDIA_FOLDERS: Mapping[MediaKind, tuple[str, ...]] = {"image": ("", "images"), "video": ("", "video", "videos", "data")}


@dataclass(frozen=True, slots=True)
class Conversion:
    """What became of a benchmark file; lies beside its shards.

    Attributes:
        file: The benchmark file.
        format: How it was read.
        columns: By part of a question.
        num_good: Rows that are questions now.
        skipped: Rows that are not, by reason.
        listed: The first of them: place, reason, what is wrong.
    """

    file: str
    format: str
    columns: dict[str, str]
    num_good: int
    skipped: dict[str, int]
    listed: list[list[str]]


def convert_benchmark(
    file: str | Path,
    out_dir: str | Path,
    *,
    format_name: str = "",
    fields: Mapping[str, str] | None = None,
    media_root: str | Path | None = None,
    opener: MediaOpener | None = None,
    health: SampleHealth | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Write one sample per row; rows that cannot be used are named, counted by reason and left out.

    Args:
        file: JSON, JSON lines, CSV, TSV or Parquet.
        out_dir: Folder for the shards and `conversion.json`, which is written last.
        format_name: One of `FORMATS`; empty means the one whose columns the file has.
        fields: Columns by part of a question, in place of the format's.
        media_root: What relative media paths start from; by default the folder of the file.
        opener: Opens every media file to see whether it can be opened; `None` skips that.
        health: Counts, and stops when too many are bad.
        overwrite: Remove shards that lie in `out_dir`.

    Raises:
        DataError: The file cannot be read, its columns are not known, or no row or too few can be used.
    """
    source, target = Path(file), Path(out_dir)
    root = source.parent if media_root is None else Path(media_root)
    counted = health if health is not None else SampleHealth()
    rows = read_rows(source)
    first = list(islice(rows, ROWS_LOOKED_AT))
    name, columns = choose_format(
        source, {column for _, row in first if isinstance(row, Mapping) for column in row}, format_name, fields or {}
    )
    makers = _makers(source, root, FORMATS[name], columns, chain(first, rows))
    if overwrite:
        (target / CONVERSION_FILE).unlink(missing_ok=True)
    written = write_shards(target, keep_good(source, makers, opener, counted), overwrite=overwrite)
    if not written:
        listed = "; ".join(detail for _, _, detail in counted.listed[:5]) or "the file has no rows"
        raise DataError(f"{source}: no row can be used as {name}, got {counted.counts}, expected at least one; correct them: {listed}")
    conversion = Conversion(
        str(source), name, columns, counted.num_good, dict(counted.counts), [list(map(str, entry)) for entry in counted.listed]
    )
    aside = target / f".{CONVERSION_FILE}.tmp"
    aside.write_text(json.dumps(asdict(conversion), ensure_ascii=False, indent=1), encoding="utf-8")
    os.replace(aside, target / CONVERSION_FILE)
    return conversion


def read_conversion(folder: str | Path) -> Conversion | None:
    """Return what became of the file that a folder of shards was made from; `None` if it was made in another way."""
    path = Path(folder) / CONVERSION_FILE
    if not path.is_file():
        return None
    try:
        return Conversion(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not readable ({error}), expected what make_shards.py wrote; convert the file again") from error


def choose_format(source: Path, present: set[str], format_name: str, fields: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Return the name of the format and the columns by part of a question.

    Raises:
        DataError: The format or a part of a question is unknown, or columns that it cannot do without are missing.
    """
    if format_name and format_name not in FORMATS:
        raise DataError(f"{source}: unknown format, got {format_name!r}, expected one of {', '.join(FORMATS)}; correct --format")
    wrong = [part for part in fields if part not in PARTS]
    if wrong:
        raise DataError(f"{source}: unknown part of a question, got {wrong[0]!r}, expected one of {', '.join(PARTS)}; correct --fields")
    name = format_name or next(name for name, known in FORMATS.items() if known.marks <= present)
    columns = dict(FORMATS[name].columns)
    if name == "mathvista" and "decoded_image" in present:
        columns["image"] = "decoded_image"  # the picture itself; `image` beside it is only its path
    columns |= fields
    missing = [part for part in ("question", "answer") if columns[part].split(".")[0] not in present and columns[part] not in present]
    if missing and present:
        listed = ", ".join(f"{part}=COLUMN" for part in missing)
        raise DataError(
            f"{source}: no column for {' and '.join(missing)}, got columns {', '.join(sorted(present))}; name them: --fields {listed}"
        )
    return name, columns


def _makers(
    source: Path, root: Path, known: BenchmarkFormat, columns: Mapping[str, str], rows: Iterator[tuple[int, Row | SampleError]]
) -> Iterator[tuple[int, Callable[[], ShardSample]]]:
    for number, row in rows:
        yield number, partial(_sample, source, root, known, columns, number, row)


def _sample(
    source: Path, root: Path, known: BenchmarkFormat, columns: Mapping[str, str], number: int, row: Row | SampleError
) -> ShardSample:
    """Return one row with its media read."""
    if isinstance(row, SampleError):
        raise row
    where = f"{source}:{number}"
    draft = known.read(RowView(where, number, source.stem, row, columns))
    media = []
    for index, (kind, value) in enumerate(draft.media):
        suffix, content = _load(where, root, kind, value)
        media.append((suffix if len(draft.media) == 1 else f"{index}.{suffix}", content))
    return ShardSample(f"{number:09d}", {**draft.question, "media": [extension for extension, _ in media]}, media)


def _load(where: str, root: Path, kind: MediaKind, value: Any) -> tuple[str, bytes]:
    """Return ending and content of one medium; the ending of bytes comes from the bytes."""
    path = value.get("path") if isinstance(value, Mapping) else value
    content = value.get("bytes") if isinstance(value, Mapping) else value
    if isinstance(content, bytes):
        return file_ending(kind, content), content
    if not isinstance(path, str) or not path:
        expected = "expected a path, bytes, or an object with bytes or path"
        raise SampleError("bad_field", f"{where}: no {kind}, got {type(value).__name__}, {expected}; name its column in --fields")
    known = IMAGE_EXTENSIONS if kind == "image" else VIDEO_EXTENSIONS
    suffix = Path(path).suffix[1:].lower()
    names = [path] if suffix in known else [f"{path}.{ending}" for ending in sorted(known)]
    try:
        for found in (root / folder / name for folder in MEDIA_FOLDERS[kind] for name in names):
            if found.is_file():
                return found.suffix[1:].lower(), found.read_bytes()
    except OSError as error:
        raise SampleError(
            "missing_media", f"{where}: the {kind} {path!r:.200} cannot be read ({error.strerror}); correct the path"
        ) from error
    raise SampleError("missing_media", f"{where}: no file for the {kind} {path!r} in {root}; add it or set --media-root")
