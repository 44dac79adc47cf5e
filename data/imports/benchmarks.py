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
from data.imports.benchmark_columns import choose_format, paths_of, rows_of
from data.imports.benchmark_formats import ANY_TABLE, BenchmarkFormat, known_formats
from data.imports.benchmark_rows import read_benchmark, read_fields
from data.imports.convert import keep_good
from data.imports.directives import without_directives
from data.imports.row_view import RowView
from data.imports.tables import Row
from data.media.opening import MediaLimits, MediaOpener
from data.media.signatures import file_ending
from data.media_folder import MediaFolder
from data.question import ANSWER_TYPES, MediaKind
from data.sample import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, ShardSample
from data.shard_writer import write_shards

CONVERSION_FILE = "conversion.json"
CONVERSION_VERSION = 4
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
    files: Sequence[Path] = (),
    format_name: str = "",
    formats: Mapping[str, BenchmarkFormat] | None = None,
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
        source: JSON, JSON lines, CSV, TSV or Parquet; with `files`, the folder that they lie in.
        out_dir: Folder for the shards and `conversion.json`, which is written last.
        files: Tables of one kind that are one benchmark together.
        format_name: One of the formats; empty means the one whose columns the file has.
        formats: By name; by default all that are declared here.
        fields: Columns by part of a question, in place of the format's.
        media_root: What relative media paths start from, and no path leaves; by default the folder
            of the (first) file.
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
    tables = list(files) or [source]
    limit = MediaLimits().max_bytes if max_media_bytes is None else max_media_bytes
    folder = MediaFolder(
        tables[0].parent if media_root is None else media_root, limit, follow_links=follow_links
    )
    counted = health if health is not None else SampleHealth(at_end=True)
    rows = rows_of(tables)
    first = list(islice(rows, ROWS_LOOKED_AT))
    present = {path for _, _, row in first for path in paths_of(row)}
    formats = formats or known_formats()
    name, columns = choose_format(tables, present, format_name, fields or {}, formats)
    stripped: Counter[str] = Counter()
    reader = _Reader(folder, name, formats[name], columns, stripped)
    makers = reader.makers(chain(first, rows), len(tables) == 1)
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


@dataclass(frozen=True, slots=True)
class _Reader:
    """Makes samples of rows, without format directives of their own, which are counted."""

    folder: MediaFolder
    name: str
    known: BenchmarkFormat
    columns: Mapping[str, str]
    stripped: Counter[str]

    def makers(
        self, rows: Iterable[tuple[Path, int, Row | SampleError]], is_one_table: bool
    ) -> Iterator[tuple[int, Callable[[], ShardSample]]]:
        """Yield number and maker of every sample; rows of several tables are numbered on."""
        for running, (table, number, row) in enumerate(rows, start=1):
            key = number if is_one_table else running
            yield key, partial(self._sample, f"{table}:{number}", table.stem, key, row)

    def _sample(self, where: str, stem: str, key: int, row: Row | SampleError) -> ShardSample:
        if isinstance(row, SampleError):
            raise row
        view = RowView(where, key, stem, row, self.columns)
        is_named = self.name != ANY_TABLE
        draft = read_benchmark(self.name, self.known, view) if is_named else read_fields(view)
        view.check_all_read(has_media=bool(draft.media))
        media = load_media(where, self.folder, draft.media, self.known.folders)
        text = view.text("question", default="")
        self.stripped["question"] += without_directives(text) != text
        fields = {**draft.question, "media": [extension for extension, _ in media]}
        return ShardSample(f"{key:09d}", fields, media)


def load_media(
    where: str,
    folder: MediaFolder,
    values: Sequence[tuple[MediaKind, Any]],
    below: Sequence[str] = (),
) -> list[tuple[str, bytes]]:
    """Return extension and content of the media of a row, in order.

    Args:
        where: The row, for messages.
        folder: Where named files are.
        values: Of each medium its bytes, or the name of its file.
        below: Where files may lie below the folder, besides `MEDIA_FOLDERS`.

    Raises:
        SampleError: A value is no medium, or names a file that is not there.
        MediaError: The bytes are of no known format, or too many.
    """
    media: list[tuple[str, bytes]] = []
    for index, (kind, value) in enumerate(values):
        suffix, content = _load(where, folder, kind, value, below)
        media.append((suffix if len(values) == 1 else f"{index}.{suffix}", content))
        folder.check_total(where, media)
    return media


def _load(
    where: str, folder: MediaFolder, kind: MediaKind, value: Any, below: Sequence[str]
) -> tuple[str, bytes]:
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
    candidates = [
        os.path.join(part, name) for part in (*MEDIA_FOLDERS[kind], *below) for name in names
    ]
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
