"""Values of Arrow columns as Python has them, without the bytes that nobody reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.errors import DataError, SampleError
from data.json_text import TEXT_RULE
from data.sources.rows import HELD

if TYPE_CHECKING:
    from pyarrow import DataType, Scalar, Schema


@lru_cache(maxsize=1024)
def holds_bytes(kind: DataType) -> bool:
    """Return whether values of a type are bytes, or have some inside."""
    from pyarrow import types

    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return True
    if types.is_dictionary(kind):
        return holds_bytes(kind.value_type)
    return any(holds_bytes(kind.field(index).type) for index in range(kind.num_fields))


def held_columns(schema: Schema) -> list[str]:
    """Return the columns that hold bytes; of an object that is no picture, what inside it does."""
    return [
        held
        for name, kind in zip(schema.names, schema.types, strict=True)
        if holds_bytes(kind)
        for held in _held(name, kind)
    ]


def column_paths(schema: Schema) -> list[str]:
    """Return the names of the columns, and of what is in objects with dots."""
    return [
        path
        for name, kind in zip(schema.names, schema.types, strict=True)
        for path in (name, *_inside(name, kind))
    ]


def is_picture(kind: DataType) -> bool:
    """Return whether a type is the object that the `datasets` package has for an image."""
    from pyarrow import types

    return types.is_struct(kind) and set(_field_types(kind)) == {"bytes", "path"}


def _held(name: str, kind: DataType) -> list[str]:
    from pyarrow import types

    if not types.is_struct(kind) or is_picture(kind):
        return [name]
    inner = {each: its for each, its in _field_types(kind).items() if holds_bytes(its)}
    return [held for each, its in inner.items() for held in _held(f"{name}.{each}", its)]


def _inside(name: str, kind: DataType) -> list[str]:
    from pyarrow import types

    if not types.is_struct(kind):
        return []
    inner = {f"{name}.{each}": its for each, its in _field_types(kind).items()}
    return [path for each, its in inner.items() for path in (each, *_inside(each, its))]


def _field_types(kind: DataType) -> dict[str, DataType]:
    fields = [kind.field(index) for index in range(kind.num_fields)]
    return {field.name: field.type for field in fields}


def light(value: Scalar) -> Any:
    """Return a value with `HELD` in the place of bytes; `None` for times that Python does not
    have, such as those of nanoseconds.
    """
    from pyarrow import types

    if not value.is_valid:
        return None
    kind = value.type
    if not holds_bytes(kind):
        if types.is_temporal(kind):
            try:
                return value.as_py()
            except (ValueError, OverflowError):
                return None
        if types.is_float32(kind):
            return shortest(value.as_py())
        return value.as_py()
    if types.is_struct(kind):
        return {kind.field(index).name: light(value[index]) for index in range(kind.num_fields)}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [light(entry) for entry in value.values]
    return HELD


def light_row(where: str, values: Mapping[str, Scalar]) -> dict[str, Any]:
    """Return a row of light values.

    Raises:
        SampleError: `bad_text` or `bad_row`.
    """
    try:
        return {name: light(value) for name, value in values.items()}
    except UnicodeDecodeError as error:
        raise SampleError("bad_text", f"{where}: {error}, {TEXT_RULE}; correct it") from error
    except (ValueError, OverflowError) as error:
        raise SampleError(
            "bad_row", f"{where}: a value is not readable ({error}); correct it"
        ) from error


def class_labels(schema: Schema) -> dict[str, Sequence[str]]:
    """Return the names of the classes of those columns that the `datasets` package says to hold
    class numbers.
    """
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = info["info"]["features"]
        return {
            name: feature["names"]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}  # other packages write no such thing


def with_labels(row: dict[str, Any], labels: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return a row with the names of its classes in the place of their numbers."""
    for column, names in labels.items():
        number = row.get(column)
        if isinstance(number, int):  # -1 stands for no class
            row[column] = names[number] if 0 <= number < len(names) else None
    return row


def shortest(value: float) -> float:
    """Return a number of 32 bits with the fewest digits that tell it from others: 0.1 rather than
    0.10000000149011612.
    """
    return float(str(np.float32(value)))


def row_of_key(path: Path, key: str, num_rows: int) -> int:
    """Return the index of a row that is named by its number from 1.

    Raises:
        DataError: There is none.
    """
    index = int(key) - 1
    if 0 <= index < num_rows:
        return index
    raise DataError(
        f"{path}: no such row, got {key} of {num_rows}; the file was changed, restore it"
    )
