"""A folder of safetensors files, read tensor by tensor, quantised weights as if they were not."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import torch

from zppo_mm.errors import ModelError
from zppo_mm.models.families.key_names import usual_name
from zppo_mm.models.families.settings import read_config_file
from zppo_mm.models.families.table import read_key_names
from zppo_mm.weights.fp8 import SCALE_SUFFIX, dequantise, read_block_size, scale_shape
from zppo_mm.weights.safetensors_file import (
    DTYPES,
    Header,
    build_header,
    read_header,
    read_pieces,
    read_tensor,
    unsupported_type,
)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_NAME = 255
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class SafetensorsFolder:
    """The weights of a Hugging Face folder: one file, or several with an index. Only headers are
    read until a tensor is asked for.

    Weights in FP8 with one factor per block look like plain weights: they have the type asked for,
    are dequantised when they are read, and their factors are no keys. Keys have the names of
    transformers' model, however the files spell them.

    Args:
        path: The folder.
        dtype: Type of dequantised weights.

    Attributes:
        path: The folder.
        weight_map: File name of every key.
        stored_names: Every key as its file spells it.
        dequantised_dtype: Type of dequantised weights.

    Raises:
        ModelError: There are no weights, the index names a missing file, a file is no complete
            safetensors file, lacks a key that the index says it has, a key is in two files or in
            two spellings, or an FP8 weight has no factors or factors of another shape.
    """

    def __init__(self, path: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        self.path = Path(path)
        self.dequantised_dtype = dtype
        self._headers = self._read_headers()
        self._stored = self._find_keys()
        self._block: tuple[int, int] = (0, 0)
        self._scales = self._find_scales()
        self.stored_names = self._find_names()
        self.weight_map = {key: self._stored[name] for key, name in self.stored_names.items()}

    def _read_headers(self) -> dict[str, Header]:
        """Read every file that has weights."""
        weight_map = self._weight_map()
        headers = {}
        for name in sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_NAME]:
            file = self.path / name
            # Unlike pathlib, it takes a name that is too long for one of no file.
            if not os.path.isfile(file):
                raise ModelError(
                    f"{file}: the file is missing, expected it because {INDEX_NAME} names it; "
                    "download the folder again"
                )
            headers[name] = read_header(file)
        for key, name in (weight_map or {}).items():
            if key not in headers[name].entries:
                raise ModelError(
                    f"{self.path / name}: the key {key} is missing, got "
                    f"{len(headers[name].entries)} keys, expected it because {INDEX_NAME} names it "
                    "there; download the folder again"
                )
        return headers

    def _weight_map(self) -> dict[str, str] | None:
        """Return the file of every key as the index has it, `None` for a folder with a single
        file.
        """
        index, single = self.path / INDEX_NAME, self.path / SINGLE_NAME
        if index.is_file():
            weight_map = _parse_index(index)
            if single.is_file() and SINGLE_NAME not in weight_map.values():
                raise ModelError(
                    f"{self.path}: there are two sets of weights, got {SINGLE_NAME}, which "
                    f"transformers would load, and {INDEX_NAME}, which names other files, expected "
                    "one; remove the other"
                )
            return weight_map
        if single.is_file():
            return None
        raise ModelError(
            f"{self.path}: no weights found, expected {SINGLE_NAME} or {INDEX_NAME}; check the path"
        )

    def _find_keys(self) -> dict[str, str]:
        """Return the file of every key as it is stored."""
        stored: dict[str, str] = {}
        for name, header in self._headers.items():
            for key in header.entries:
                if key in stored:
                    raise ModelError(
                        f"{self.path / name}: the key {key} is there twice, got it in "
                        f"{stored[key]} too, expected it in one file; download the folder again"
                    )
                stored[key] = name
        return stored

    def _find_names(self) -> dict[str, str]:
        """Return the stored name of every key."""
        renames = read_key_names(self.path)
        hidden = set(self._scales.values())
        found: dict[str, str] = {}
        for name in self._stored:
            if name in hidden:
                continue
            key = usual_name(name, renames)
            if key in found:
                raise ModelError(
                    f"{self.path / self._stored[name]}: the key {key} is there in two spellings, "
                    f"got {found[key]} and {name}, expected one; download the folder again"
                )
            found[key] = name
        return found

    def _find_scales(self) -> dict[str, str]:
        """Return the key of the factors of every quantised weight, both as they are stored."""
        found: dict[str, str] = {}
        for key in self._stored:
            if DTYPES.get(self._entry_type(key)) not in FLOAT8:
                continue
            if not found:
                self._block = read_block_size(self.path)
            scale = key + SCALE_SUFFIX
            if scale not in self._stored:
                raise ModelError(
                    f"{self.path / self._stored[key]}: the FP8 weight {key} has no factors, got no "
                    f"key {scale}, expected one factor per block; download the folder again, or "
                    "use one that is not quantised"
                )
            wanted = scale_shape(self._stored_shape(key), self._block)
            if wanted is None or self._stored_shape(scale) != wanted:
                expected = (
                    "a weight of two axes"
                    if wanted is None
                    else f"{list(wanted)} for blocks of {self._block[0]} x {self._block[1]}"
                )
                raise ModelError(
                    f"{self.path / self._stored[scale]}: the factors {scale} do not fit, got "
                    f"{list(self._stored_shape(scale))} for a weight of "
                    f"{list(self._stored_shape(key))}, expected {expected}; check "
                    "quantization_config.weight_block_size in config.json"
                )
            found[key] = scale
        return found

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the weight files."""
        return tuple(self._headers)

    @property
    def is_quantised(self) -> bool:
        """Whether any weight is kept in FP8."""
        return bool(self._scales)

    def stored_headers(self) -> Mapping[str, Header]:
        """Return the headers of the files as they are, by file name."""
        return dict(self._headers)

    def plain_headers(self) -> dict[str, Header]:
        """Return the headers that the files have when nothing is quantised: the very same ones
        unless something is.
        """
        if not self._scales:
            return dict(self._headers)
        keys: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {
            name: {} for name in self._headers
        }
        for key, name in self.weight_map.items():
            keys[name][self.stored_names[key]] = (self.dtype(key), self.shape(key))
        return {
            name: build_header(found, self._headers[name].metadata)
            for name, found in keys.items()
            if found
        }

    def where(self, key: str) -> Path:
        """Return the file that has the key, or the folder if none has."""
        return self.path / self.weight_map[key] if key in self.weight_map else self.path

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a tensor's shape from the header."""
        return self._stored_shape(self.stored_names[key])

    def dtype(self, key: str) -> torch.dtype:
        """Return the type that a tensor has when it is read.

        Raises:
            ModelError: The type is not supported.
        """
        stored = self.stored_names[key]
        if stored in self._scales:
            return self.dequantised_dtype
        name = self._entry_type(stored)
        if name not in DTYPES:
            raise unsupported_type(self.where(key), key, name)
        return DTYPES[name]

    def read(self, key: str) -> torch.Tensor:
        """Return one tensor, dequantised if it is in FP8.

        Raises:
            ModelError: The file ends before the tensor does, or its type is not supported.
        """
        stored = self.stored_names[key]
        tensor = self._read_stored(stored)
        if stored not in self._scales:
            return tensor
        return dequantise(
            tensor, self._read_stored(self._scales[stored]), self._block, self.dequantised_dtype
        )

    def have_equal_values(self, key: str, other: str) -> bool:
        """Return whether two tensors have the same values; piece by piece where they have the same
        type.

        Raises:
            ModelError: A file ends before the tensor does, or a type is not supported.
        """
        if self.shape(key) != self.shape(other):
            return False
        names = [self.stored_names[name] for name in (key, other)]
        if self.dtype(key) != self.dtype(other) or not self._scales.keys().isdisjoint(names):
            return self.read(key).double().equal(self.read(other).double())
        pieces = [
            read_pieces(self.path / self._stored[name], self._headers[self._stored[name]], name)
            for name in names
        ]
        return all(one.equal(another) for one, another in zip(*pieces, strict=True))

    def _read_stored(self, name: str) -> torch.Tensor:
        return read_tensor(self.path / self._stored[name], self._headers[self._stored[name]], name)

    def _entry_type(self, key: str) -> str:
        return self._headers[self._stored[key]].entries[key].dtype

    def _stored_shape(self, key: str) -> tuple[int, ...]:
        return self._headers[self._stored[key]].entries[key].shape


def _parse_index(path: Path) -> dict[str, str]:
    """Return the file of every key.

    Raises:
        ModelError: It is no index, or names a file outside its folder.
    """
    weight_map = read_config_file(path).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise ModelError(
            f"{path}: is no index of weights, got no file names by key in weight_map; download the "
            "folder again"
        )
    for key, name in weight_map.items():
        parts = PurePosixPath(name).parts
        if (
            not parts
            or parts[0] == "/"
            or ".." in parts
            or "\\" in name
            or not name.isprintable()
            or len(name) > _MAX_NAME
        ):
            raise ModelError(
                f"{path}: the file of {key} is none of this folder, got {name[:_MAX_NAME]!a}, "
                "expected a name inside it; download the folder again"
            )
    return weight_map
