"""Benchmark files as users have them, once into shards, so that everything else knows shards
alone.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from data.atomic_files import write_atomically
from data.errors import DataError, MediaError, SampleError
from data.health import SampleHealth
from data.imports.benchmark_formats import FORMATS, PARTS, BenchmarkFormat
from data.imports.convert import keep_good
from data.imports.directives import without_directives
from data.imports.row_view import RowView, split_columns
from data.imports.tables import Row, read_rows
from data.media.opening import MediaLimits, MediaOpener
from data.media.signatures import file_ending
from data.media_folder import MediaFolder
from data.question import ANSWER_TYPES, MediaKind
from data.sample import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, ShardSample
from data.shard_writer import write_shards
from data.sources.rows import row_paths

CONVERSION_FILE = "conversion.json"
CONVERSION_VERSION = 3
"""Another one whenever the same file becomes other questions."""
ROWS_LOOKED_AT = 20
"""Rows whose columns decide on the format; rows of a JSON file need not have the same."""
MEDIA_FOLDERS: Mapping[MediaKind, tuple[str, ...]] = {
    "image": ("", "images"),
    "video": ("", "video", "videos", "data"),
}

MIN_BASE64 = 64
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,")


@dataclass(frozen=True, slots=True)
class Conversion:
    """What became of a benchmark file; lies beside its shards.

    Attributes:
        file: The benchmark file.
        format: How it was read.
        columns: By part of a question.
        num_good: Rows that are questions now.
        skipped: Rows that are not, by reason.
        listed: The first of them: where, reason, what is wrong.
        num_without_directives: Rows whose question lost a format directive of its own, skipped
            ones included.
    """

    file: str
    format: str
    columns: dict[str, str]
    num_good: int
    skipped: dict[str, int]
    listed: list[list[str]]
    num_without_directives: int = 0


def convert_benchmark(
    source: str | Path,
    out_dir: str | Path,
    *,
    format_name: str = "",
    fields: Mapping[str, str] | None = None,
    media_root: str | Path | None = None,
    follow_links: bool = False,
    max_media_bytes: int | None = None,
    opener: MediaOpener | None = None,
    health: SampleHealth | None = None,
    answer_types: Collection[str] = ANSWER_TYPES,
    overwrite: bool = False,
) -> Conversion:
    """Write one sample per row; rows that cannot be used are named, counted by reason and left out.

    Args:
        source: JSON, JSON lines, CSV, TSV or Parquet.
        out_dir: Folder for the shards and `conversion.json`, which is written last.
        format_name: One of `FORMATS`; empty means the one whose columns the file has.
        fields: Columns by part of a question, in place of the format's.
        media_root: What relative media paths start from, and no path leaves; by default the folder
            of the file.
        follow_links: Links may lead out of it.
        max_media_bytes: Largest medium that is read; by default that of `MediaLimits`.
        opener: Opens every media file to see whether it can be opened; `None` skips that.
        health: Counts, and stops when too many are bad.
        answer_types: Those that can be graded.
        overwrite: Remove shards that lie in `out_dir`.

    Raises:
        DataError: The file cannot be read, its columns are not known, or no row or too few can be
            used.
    """
    source, target = Path(source), Path(out_dir)
    limit = MediaLimits().max_bytes if max_media_bytes is None else max_media_bytes
    folder = MediaFolder(
        source.parent if media_root is None else media_root, limit, follow_links=follow_links
    )
    counted = health if health is not None else SampleHealth(at_end=True)
    rows = read_rows(source)
    first = list(islice(rows, ROWS_LOOKED_AT))
    present = _present(first)
    name, columns = choose_format(source, present, format_name, fields or {})
    stripped: Counter[str] = Counter()
    makers = _makers(source, folder, FORMATS[name], columns, chain(first, rows), stripped)
    if overwrite:
        (target / CONVERSION_FILE).unlink(missing_ok=True)
    samples = keep_good(source, makers, opener, counted, answer_types)
    written = write_shards(target, samples, overwrite=overwrite)
    if not written:
        listed = counted.examples() if counted.num_bad else "the file has no rows"
        raise DataError(
            f"{source}: no row can be used as {name}, got {counted.counts}, expected at least one; "
            f"correct them: {listed}"
        )
    conversion = Conversion(
        str(source),
        name,
        columns,
        counted.num_good,
        dict(counted.counts),
        [list(map(str, entry)) for entry in counted.listed],
        stripped.total(),
    )
    content = json.dumps(asdict(conversion), ensure_ascii=False, indent=1)
    write_atomically(target / CONVERSION_FILE, content)
    return conversion


def read_conversion(folder: str | Path) -> Conversion | None:
    """Return what became of the file that a folder of shards was made from; `None` if it was made
    in another way.
    """
    path = Path(folder) / CONVERSION_FILE
    if not path.is_file():
        return None
    try:
        return Conversion(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{path}: not readable ({error}), expected what make_shards.py wrote; convert the file "
            "again"
        ) from error


def choose_format(
    source: Path, present: set[str], format_name: str, fields: Mapping[str, str]
) -> tuple[str, dict[str, str]]:
    """Return the name of the format and the columns by part of a question.

    Raises:
        DataError: The format or a part of a question is unknown, or columns that it cannot do
            without are missing.
    """
    if format_name and format_name not in FORMATS:
        raise DataError(
            f"{source}: unknown format, got {format_name!r}, expected one of {', '.join(FORMATS)}; "
            "correct --format"
        )
    wrong = [part for part in fields if part not in PARTS]
    if wrong:
        raise DataError(
            f"{source}: unknown part of a question, got {wrong[0]!r}, expected one of "
            f"{', '.join(PARTS)}; correct --fields"
        )
    name = format_name or next(name for name, known in FORMATS.items() if known.marks <= present)
    columns = dict(FORMATS[name].columns)
    if name == "mathvista" and "decoded_image" in present:
        columns |= {
            "image": "decoded_image",
            "ignore": "image",
        }  # the picture itself; `image` beside it is only its path
    _check_parts(source, name, fields)
    columns |= fields
    _check_columns(source, present, fields)
    missing = [
        part
        for part in ("question", "answer")
        if columns[part].split(".")[0] not in present and columns[part] not in present
    ]
    if missing and present:
        listed = ", ".join(f"{part}=COLUMN" for part in missing)
        raise DataError(
            f"{source}: no column for {' and '.join(missing)}, got columns "
            f"{', '.join(sorted(present))}; name them: --fields {listed}"
        )
    return name, columns


def _check_parts(source: Path, name: str, fields: Mapping[str, str]) -> None:
    """Refuse a part that rows of this format are not asked for."""
    unread = [part for part in fields if part not in FORMATS[name].columns]
    if unread:
        expected = ", ".join(FORMATS[name].columns)
        raise DataError(
            f"{source}: {name} has no such part, got {unread[0]!r}, expected one of {expected}; "
            "use --format fields"
        )


def _check_columns(source: Path, present: set[str], fields: Mapping[str, str]) -> None:
    """Refuse a column that the user names and no row has: its questions
    would silently lack it.
    """
    wanted = {
        column
        for part, columns in fields.items()
        if part != "ignore"
        for column in split_columns(columns)
    }
    missing = sorted(wanted - present)
    if fields.get("answer_type") in ANSWER_TYPES:
        missing = [column for column in missing if column != fields["answer_type"]]
    if missing:  # lines need not have the same fields, and objects may be there only later
        later = _present(read_rows(source))
        missing = [column for column in missing if column not in later]
    if missing and present:
        raise DataError(
            f"{source}: no such column, got {missing[0]!r} in --fields, expected one of "
            f"{', '.join(sorted(present))}; correct it"
        )


def _present(rows: Iterable[tuple[int, Row | SampleError]]) -> set[str]:
    """Return the columns of rows, and what is in objects with dots."""
    return {path for _, row in rows if isinstance(row, Mapping) for path in row_paths(row)}


def _makers(
    source: Path,
    folder: MediaFolder,
    known: BenchmarkFormat,
    columns: Mapping[str, str],
    rows: Iterator[tuple[int, Row | SampleError]],
    stripped: Counter[str],
) -> Iterator[tuple[int, Callable[[], ShardSample]]]:
    for number, row in rows:
        yield number, partial(_sample, source, folder, known, columns, number, row, stripped)


def _sample(
    source: Path,
    folder: MediaFolder,
    known: BenchmarkFormat,
    columns: Mapping[str, str],
    number: int,
    row: Row | SampleError,
    stripped: Counter[str],
) -> ShardSample:
    """Return one row with its media read and without format directives of its own, which are
    counted.
    """
    if isinstance(row, SampleError):
        raise row
    view = RowView(f"{source}:{number}", number, source.stem, row, columns)
    draft = known.read(view)
    view.check_all_read(has_media=bool(draft.media))
    media = load_media(view.where, folder, draft.media)
    text = without_directives(draft.question["question"])
    stripped["question"] += text != draft.question["question"]
    fields = {**draft.question, "question": text, "media": [extension for extension, _ in media]}
    return ShardSample(f"{number:09d}", fields, media)


def load_media(
    where: str, folder: MediaFolder, values: Sequence[tuple[MediaKind, Any]]
) -> list[tuple[str, bytes]]:
    """Return extension and content of the media of a row, in order.

    Args:
        where: The row, for messages.
        folder: Where named files are.
        values: Of each medium its bytes, or the name of its file.

    Raises:
        SampleError: A value is no medium, or names a file that is not there.
        MediaError: The bytes are of no known format, or too many.
    """
    media: list[tuple[str, bytes]] = []
    for index, (kind, value) in enumerate(values):
        suffix, content = _load(where, folder, kind, value)
        media.append((suffix if len(values) == 1 else f"{index}.{suffix}", content))
        folder.check_total(where, media)
    return media


def _load(where: str, folder: MediaFolder, kind: MediaKind, value: Any) -> tuple[str, bytes]:
    """Return ending and content of one medium; the ending of bytes comes from the bytes."""
    path = value.get("path") if isinstance(value, Mapping) else value
    content = value.get("bytes") if isinstance(value, Mapping) else value
    if isinstance(content, str):
        content = _inline(where, kind, content)
    if isinstance(content, bytes):
        folder.check_size(f"{where}: the {kind} in the table", len(content))
        return file_ending(kind, content), content
    if not isinstance(path, str) or not path:
        expected = "expected a path, bytes, or an object with bytes or path"
        raise SampleError(
            "bad_field",
            f"{where}: no {kind}, got {type(value).__name__}, {expected}; name its column in "
            "--fields",
        )
    known = IMAGE_EXTENSIONS if kind == "image" else VIDEO_EXTENSIONS
    suffix = Path(path).suffix[1:].lower()
    names = [path] if suffix in known else [f"{path}.{ending}" for ending in sorted(known)]
    candidates = [os.path.join(below, name) for below in MEDIA_FOLDERS[kind] for name in names]
    try:
        found = next((name for name in candidates if folder.holds(name)), None)
    except (OSError, ValueError) as error:
        raise SampleError(
            "missing_media",
            f"{where}: the {kind} {path!r:.200} cannot be read ({error}); correct the path",
        ) from error
    if found is None:
        raise SampleError(
            "missing_media",
            f"{where}: no file for the {kind} {path!r:.200} in {folder.root}; add it or set "
            "--media-root",
        )
    return Path(found).suffix[1:].lower(), folder.read(where, found)


def _inline(where: str, kind: MediaKind, text: str) -> bytes | None:
    """Return the medium that a text spells in base64, with or without `data:` before it; `None` if
    it is a path.
    """
    url = _DATA_URL.match(text)
    if url is None and (len(text) < MIN_BASE64 or not _BASE64.fullmatch(text)):
        return None
    try:
        content = base64.b64decode(
            re.sub(r"\s", "", text[url.end() :] if url else text), validate=True
        )
        file_ending(kind, content)
    except (ValueError, MediaError) as error:
        if url is None:
            return None  # a path may look so too
        raise SampleError(
            "bad_field",
            f"{where}: {kind} in base64 is wrong ({error}), expected a whole file; write it again",
        ) from error
    return content
