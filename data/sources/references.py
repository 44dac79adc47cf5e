"""References to the media of tables: files that a row names, and cells that hold the content."""

from __future__ import annotations

from data.question import MediaKind, MediaRef
from data.sources.rows import Medium


def file_ref(kind: MediaKind, root: object, path: str) -> MediaRef:
    """Return the reference to a file below a folder, which any process can open without its row."""
    key, dot, extension = path.rpartition(".")
    if not dot or not extension or "/" in extension:
        key, extension = path, ""
    return MediaRef(kind, f"{root}/", key, extension)


def file_path(ref: MediaRef) -> str:
    """Return the path of `file_ref`, from its folder."""
    return f"{ref.key}.{ref.extension}" if ref.extension else ref.key


def cell_ref(medium: Medium, file: str, key: str) -> MediaRef:
    """Return the reference to what a row of a table holds."""
    ending = f".{medium.ending}" if medium.ending else ""
    return MediaRef(medium.kind, file, key, f"{medium.column}/{medium.index}{ending}")


def cell_position(ref: MediaRef) -> tuple[str, int]:
    """Return column and index of `cell_ref`."""
    column, _, position = ref.extension.rpartition("/")
    return column, int(position.partition(".")[0])
