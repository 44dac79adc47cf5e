"""Media items as vLLM's servers read them: msgpack of its `MultiModalKwargsItem`, without vLLM.

Source: vLLM 0.32, `v1/serial_utils.py` (`MsgpackEncoder`) and `multimodal/inputs.py`; the format is
that of https://github.com/msgpack/msgpack/blob/master/spec.md.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

RAW_TENSOR = 3
"""Extension type of a tensor's bytes."""

Array = npt.NDArray[np.float32] | npt.NDArray[np.int64] | npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Extension:
    """Bytes of an extension type."""

    code: int
    content: bytes


@dataclass(frozen=True, slots=True)
class Field:
    """One argument of the network's forward pass for one medium.

    Attributes:
        data: Its value.
        is_per_item: Of values of this kind for several media, the network gets one per medium;
            otherwise their rows one after another.
    """

    data: Array
    is_per_item: bool = False


def pack_item(fields: Mapping[str, Field]) -> bytes:
    """Return the encoding of one medium's arguments."""
    return pack({name: _element(field) for name, field in fields.items()})


def _element(field: Field) -> Mapping[str, Any]:
    data = np.asarray(field.data, order="C")
    tensor = [data.dtype.name, list(data.shape), Extension(RAW_TENSOR, data.tobytes())]
    if field.is_per_item:
        return {"data": tensor, "field": ["batched", {"keep_on_cpu": True}]}
    rows = [0, len(data), None]
    layout = {"keep_on_cpu": False, "slices": [rows], "dim": 0}
    return {"data": tensor, "field": ["flat", layout]}


def pack(value: Any) -> bytes:
    """Return the msgpack encoding of `None`, booleans, integers, texts, extensions, lists and
    mappings.
    """
    parts: list[bytes] = []
    _write(value, parts)
    return b"".join(parts)


def _write(value: Any, parts: list[bytes]) -> None:
    # The longest form of each type: a few bytes more, and one case instead of five.
    if value is None:
        parts.append(b"\xc0")
    elif isinstance(value, bool):
        parts.append(b"\xc3" if value else b"\xc2")
    elif isinstance(value, int):
        parts.append(b"\xd3" + struct.pack(">q", value))
    elif isinstance(value, str):
        content = value.encode()
        parts.append(b"\xdb" + struct.pack(">I", len(content)) + content)
    elif isinstance(value, Extension):
        header = struct.pack(">Ib", len(value.content), value.code)
        parts.extend((b"\xc9" + header, value.content))
    elif isinstance(value, Mapping):
        parts.append(b"\xdf" + struct.pack(">I", len(value)))
        for name, each in value.items():
            _write(name, parts)
            _write(each, parts)
    else:
        assert isinstance(value, Sequence), f"nothing that is packed: {type(value).__name__}"
        parts.append(b"\xdd" + struct.pack(">I", len(value)))
        for each in value:
            _write(each, parts)
