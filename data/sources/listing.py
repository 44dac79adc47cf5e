"""Which files a source's path names: one file, those of a pattern, or those of a folder."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError, shown
from data.sources.arrow import ArrowTable
from data.sources.json_lines import JsonLines
from data.sources.parquet import ParquetTable
from data.sources.table import CONVERT, Table
from data.text import is_valid_text

TABLES: Mapping[str, Callable[[Path], Table]] = {
    ".jsonl": JsonLines,
    ".parquet": ParquetTable,
    ".arrow": ArrowTable,
}
EXPECTED = "expected shards (*.tar in a folder), *.jsonl, *.parquet, or a folder of `datasets`"
# Without an index by row: they are turned into shards once.
CONVERTED = (".json", ".csv", ".tsv")
# What `datasets` keeps of computations beside the data.
CACHED = re.compile(r"(?:cache-|tmp).*\.arrow\Z")
SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?=[-_.]|\Z)")
STATE, SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True, slots=True)
class TableListing:
    """The table files of a source, in the order of its samples.

    Attributes:
        root: Folder that names of files start from.
        files: Their paths.
        state: What describes them besides, as text; a part of the fingerprint.
        is_one_file: The user names the file itself.
    """

    root: Path
    files: Sequence[Path]
    state: str = ""
    is_one_file: bool = False


def list_tables(path: str) -> TableListing | None:
    """Return the table files that a path names; `None` for a folder of shards, or of nothing known.

    Raises:
        DataError: The path names nothing, files of several kinds or splits, or a file without
            random access.
    """
    named = Path(path)
    if not is_valid_text(path):
        raise DataError(f"{shown(path)}: the path of the source is not UTF-8; rename it")
    if not named.exists() and glob.has_magic(path):
        names = sorted(glob.glob(path, recursive=True))
        if not names:
            raise DataError(f"{path}: no file fits this pattern, {EXPECTED}; correct data.train")
        root = Path(path[: re.search(r"[*?\[]", path).start()]).parent  # type: ignore[union-attr]
        return TableListing(root, [_checked(Path(name)) for name in names])
    if named.is_dir():
        return _list_folder(named)
    if not named.exists():
        return None
    return TableListing(named.parent, [_checked(named)], is_one_file=True)


def _checked(file: Path) -> Path:
    """Return a file that has rows by index."""
    suffix = file.suffix.lower()
    if suffix in TABLES:
        return file
    if suffix in CONVERTED:
        raise DataError(
            f"{file}: has no rows that could be read one by one, got {suffix}, {EXPECTED}; turn it "
            f"into shards: python tools/make_shards.py benchmark {file} FOLDER"
        )
    if suffix == ".tar":
        raise DataError(
            f"{file}: one shard, got a file, expected the folder that holds it; name {file.parent}"
        )
    hint = (
        "unpack it"
        if suffix in (".gz", ".zst", ".xz", ".bz2", ".zip")
        else f"convert it: {CONVERT.format(file=file)}"
    )
    raise DataError(f"{file}: unknown kind of source, got {suffix!r}, {EXPECTED}; {hint}")


def _list_folder(folder: Path) -> TableListing | None:
    if (folder / SPLITS).is_file():
        splits = ", ".join(sorted(each.parent.name for each in folder.glob(f"*/{STATE}")))
        raise DataError(
            f"{folder}: several splits, got {splits or 'none'}, expected one; name its folder, "
            "such as "
            f"{folder / (splits.split(', ')[0] or 'train')}"
        )
    if (folder / STATE).is_file():
        return _saved_dataset(folder)
    files = sorted(
        file
        for pattern in ("*", "data/*")
        for file in folder.glob(pattern)
        if file.suffix.lower() in TABLES
        and not file.name.startswith(".")
        and not CACHED.match(file.name)
    )
    if not files:
        return None
    kinds = sorted({file.suffix.lower() for file in files} | _shard_kind(folder))
    if len(kinds) > 1:
        raise DataError(
            f"{folder}: files of several kinds, got {', '.join(kinds)}, expected one; name them, "
            f"such as {folder}/*{kinds[0]}"
        )
    splits_found = sorted({match[1] for file in files if (match := SPLIT.match(file.name))})
    if len(splits_found) > 1:
        example = next(file for file in files if file.name.startswith(splits_found[0]))
        pattern = example.parent / f"{splits_found[0]}*{kinds[0]}"
        raise DataError(
            f"{folder}: files of several splits, got {', '.join(splits_found)}, expected one; name "
            f"it, such as {pattern}"
        )
    unnamed = [file for file in files if not SPLIT.match(file.name)]
    if splits_found and unnamed:
        named = next(file for file in files if file not in unnamed)
        raise DataError(
            f"{folder}: files with and without a split in their name, got {named.name} and "
            f"{unnamed[0].name}, expected those of one split; name them, such as {unnamed[0]}"
        )
    return TableListing(folder, files)


def _shard_kind(folder: Path) -> set[str]:
    return {".tar"} if any(folder.glob("*.tar")) else set()


def _saved_dataset(folder: Path) -> TableListing:
    """Read what `Dataset.save_to_disk` wrote about its files."""
    path = folder / STATE
    try:
        state = path.read_text(encoding="utf-8")
        names = [str(entry["filename"]) for entry in json.loads(state)["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not readable ({type(error).__name__}: {error}), expected what "
            "Dataset.save_to_disk wrote; save it again"
        ) from error
    if not names or any(Path(name).name != name for name in names):
        raise DataError(f"{path}: no files of its own, got {names!r:.200}; save it again")
    return TableListing(folder, [_checked(folder / name) for name in names], state)
