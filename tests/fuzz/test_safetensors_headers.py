"""Forged weight files and indexes: what the format's own library refuses is refused by name, and
what is read is read as it reads it.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from zppo_mm.errors import ModelError
from zppo_mm.weights.safetensors_file import DTYPES, read_header, read_tensor
from zppo_mm.weights.safetensors_folder import INDEX_NAME, SafetensorsFolder

SIZES = {
    "F32": 4,
    "BF16": 2,
    "F8_E4M3": 1,
    "I64": 8,
    "BOOL": 1,
    "U8": 1,
    "F64": 8,
    "U16": 2,
    "C64": 8,
}
NAMES = st.sampled_from(["a", "b", "model.layers.0.weight", "ключ", "", "__metadata_", "\n"])
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**63)]),
    st.floats(),
    st.sampled_from(
        ["", "F32", "f32", "4", "[0, 4]", "F4", "F6_E2M3", "F8_E8M0", "I4", "F128", "\ud800", "C64"]
    ),
    st.lists(st.integers(-1, 9), max_size=3),
    st.lists(st.one_of(st.text(max_size=2), st.floats(0, 8), st.booleans()), max_size=3),
    st.dictionaries(st.sampled_from(["a", "dtype", "shape"]), st.integers(0, 3), max_size=2),
)
Tensors = list[tuple[str, str, list[int]]]


@st.composite
def laid_out(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """Return a header's content and the bytes that belong to it."""
    content: dict[str, Any] = {}
    if draw(st.booleans()):
        content["__metadata__"] = draw(
            st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2)
        )
    position = 0
    for name in draw(st.lists(NAMES, unique=True, max_size=4)):
        dtype = draw(st.sampled_from(list(SIZES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = SIZES[dtype] * math.prod(shape)
        content[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [position, position + size],
        }
        position += size
    return content, bytes(index * 37 % 251 % 2 for index in range(position))


@st.composite
def forged(draw: st.DrawFn) -> bytes:
    """Return a weight file, whole or changed in a few parts."""
    content, data = draw(laid_out())
    for _ in range(draw(st.integers(0, 2))):
        change_content(draw, content)
    text = json.dumps(
        content, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1]))
    )
    kind = draw(st.sampled_from(["as it is", "as it is", "text", "length", "data", "encoding"]))
    if kind == "text":
        text = change_text(draw, text)
    header = text.encode(
        "utf-16" if kind == "encoding" and draw(st.booleans()) else "utf-8", "surrogatepass"
    )
    length = len(header)
    if kind == "length":
        length = draw(
            st.one_of(
                st.integers(0, len(header) + 20),
                st.sampled_from([2**63, 2**64 - 1, 100_000_001, 10**9]),
            )
        )
    if kind == "data":
        data = draw(st.sampled_from([data[:-1], data + b"\0", data[:0], data * 2]))
    whole = struct.pack("<Q", length) + header + data
    return (
        whole[: draw(st.integers(0, 12))]
        if kind == "data" and draw(st.integers(0, 9)) == 0
        else whole
    )


def change_content(draw: st.DrawFn, content: dict[str, Any]) -> None:
    """Put something odd into one field."""
    name = draw(st.sampled_from([*content, "__metadata__", "new"]))
    entry = content.get(name)
    if not isinstance(entry, dict) or draw(st.integers(0, 4)) == 0:
        content[name] = draw(ODD)
        return
    key = draw(st.sampled_from([*entry, "dtype", "shape", "data_offsets", "extra"]))
    value = entry.get(key)
    if isinstance(value, list) and value and draw(st.booleans()):
        value[draw(st.integers(0, len(value) - 1))] = draw(ODD)
    elif draw(st.integers(0, 4)) == 0:
        entry.pop(key, None)
    else:
        entry[key] = draw(ODD)


def change_text(draw: st.DrawFn, text: str) -> str:
    """Change what JSON itself allows or forbids."""
    offset = draw(st.integers(0, len(text)))
    kind = draw(st.sampled_from(["insert", "delete", "twice", "deep", "around", "escape"]))
    if kind == "insert":
        return (
            text[:offset]
            + draw(
                st.sampled_from(
                    [
                        " ",
                        "\n",
                        "\0",
                        "-",
                        "0",
                        "1e3",
                        "NaN",
                        ",",
                        '"',
                        "}",
                        "\\u0061",
                        "\ufeff",
                        "٣",
                    ]
                )
            )
            + text[offset:]
        )
    if kind == "delete":
        return text[:offset] + text[offset + 1 :]
    if kind == "twice":
        return text[:-1] + ("," if len(text) > 2 else "") + text[1:]
    if kind == "deep":
        return text[:offset] + "[" * draw(st.sampled_from([3, 200, 5000])) + text[offset:]
    if kind == "around":
        return (
            draw(st.sampled_from([" ", "\n", "\ufeff", "[", ""]))
            + text
            + draw(st.sampled_from([" ", "   ", "\n", "\0", "]", "x"]))
        )
    return text.replace("F32", "F\\u00332").replace("a", "\\u0061")


def library_reads(content: bytes) -> dict[str, Any] | None:
    """Return what the format's library finds in a file; `None` if it refuses it."""
    try:
        return dict(safetensors.deserialize(content))
    except safetensors.SafetensorError:
        return None


def one(content: str, data: bytes = b"") -> bytes:
    """Return a file with this header."""
    return struct.pack("<Q", len(content.encode())) + content.encode() + data


@settings(deadline=None)
@example(one('{"a":{"dtype":"F32","shape":["1"],"data_offsets":[0,4]}}', b"1234"))
@example(one('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0.0,4.0]}}', b"1234"))
@example(one('{"a":{"dtype":"F32","shape":[1],"data_offsets":["0","4"]}}', b"1234"))
@example(one('{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'))
@example(one('{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', b"1234"))
@example(one('{"__metadata__":{"a":{"b":"c"}}}'))
@example(one('{"__metadata__":["a"]}'))
@example(
    one(
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"1234",
    )
)
@example(
    one(
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}',
        b"123456",
    )
)
@example(
    one(
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[6,10]}}',
        b"1234567890",
    )
)
@example(one('{"a":{"dtype":"F32","shape":[4294967296,4294967296,0],"data_offsets":[0,0]}}'))
@example(one('{"a":{"dtype":"F32","shape":[0,9223372036854775808],"data_offsets":[0,0]}}'))
@example(one('{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}', b"1"))
@example(one('{"a":{"dtype":"Q4","shape":[2],"data_offsets":[0,1]}}', b"1"))
@example(one('{"a":["F32",[1],[0,4]]}', b"1234"))
@example(one("{}" + " " * 6))
@example(one(" {}"))
@example(one("[" * 100_000))
@example(struct.pack("<Q", 2**64 - 1) + b"{}")
@example(b"")
@given(forged())
def test_what_is_read_is_what_the_library_reads(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "forged.safetensors"
    file.write_bytes(content)
    theirs = library_reads(content)
    try:
        header = read_header(file)
    except ModelError as error:
        header, refusal = None, str(error)
    if header is None:
        event("refused by both" if theirs is None else "refused here alone")
        assert refusal.startswith(f"{file}: cannot be read as safetensors, got ")
        return
    event("read")
    assert theirs is not None, "the library refuses it"
    assert header.entries.keys() == theirs.keys()
    for key, found in theirs.items():
        entry = header.entries[key]
        assert (entry.dtype, list(entry.shape), entry.size_bytes) == (
            found["dtype"],
            found["shape"],
            len(found["data"]),
        )
        if entry.dtype in DTYPES:
            tensor = read_tensor(file, header, key)
            assert list(tensor.shape) == found["shape"]
            assert tensor.flatten().view(torch.uint8).numpy().tobytes() == bytes(found["data"])


@settings(deadline=None)
@given(laid_out())
def test_what_is_well_formed_is_read(
    tmp_path_factory: pytest.TempPathFactory, parts: tuple[dict[str, Any], bytes]
) -> None:
    content, data = parts
    file = tmp_path_factory.getbasetemp() / "formed.safetensors"
    file.write_bytes(one(json.dumps(content), data))
    assert library_reads(file.read_bytes()) is not None
    assert read_header(file).entries.keys() == content.keys() - {"__metadata__"}


INDEX_VALUES = st.one_of(
    ODD,
    st.sampled_from(
        [
            "part.safetensors",
            "./part.safetensors",
            "sub/part.safetensors",
            "../part.safetensors",
            "/etc/passwd",
            "sub/../part.safetensors",
        ]
    ),
    st.sampled_from(
        [
            "",
            ".",
            "..",
            "a\0b",
            "\ud800",
            "..\\part",
            "missing.safetensors",
            "config.json",
            "x" * 5000,
            INDEX_NAME,
        ]
    ),
)


@settings(deadline=None)
@given(
    st.one_of(
        ODD,
        st.fixed_dictionaries(
            {
                "weight_map": st.one_of(
                    ODD, st.dictionaries(st.sampled_from(["a", "b", "c"]), INDEX_VALUES, max_size=3)
                )
            }
        ),
    )
)
@example({"weight_map": {"a": "part.safetensors"}})
@example({"weight_map": {"a": "x" * 5000}})
def test_an_index_opens_files_of_its_folder_alone(
    tmp_path_factory: pytest.TempPathFactory, index: Any
) -> None:
    folder = tmp_path_factory.getbasetemp() / "indexed" / "folder"
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    for parent in (folder, folder / "sub", folder.parent):
        (parent / "part.safetensors").write_bytes(
            one('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234")
        )
    (folder / INDEX_NAME).write_text(json.dumps(index))
    try:
        opened = SafetensorsFolder(folder)
    except ModelError as error:
        opened, refusal = None, str(error)
    if opened is None:
        event("refused")
        assert str(folder) in refusal
        return
    event("opened")
    assert set(opened.weight_map) == {"a"}
    assert set(index["weight_map"]) == {"a"}
    assert folder in (folder / opened.weight_map["a"]).resolve().parents
