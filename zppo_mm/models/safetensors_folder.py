"""A folder of safetensors files, read tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from zppo_mm.errors import ModelError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorsFolder:
    """The weights of a Hugging Face folder: one file, or several with an index. Only headers are read until a tensor is asked for.

    Attributes:
        path: The folder.
        places: File name of every key.

    Raises:
        ModelError: There are no weights, the index names a missing file, or a file is no safetensors file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files = self._find_files()
        self.places: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        for name in self._files:
            file = self.path / name
            if not file.is_file():
                raise ModelError(f"{file}: the file is missing, expected it because {INDEX_NAME} names it; download the folder again")
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file}: cannot be read as safetensors, got {error}; download or export the folder again") from error
            self._open[name] = handle
            names: list[str] = handle.keys()  # type: ignore[no-untyped-call]
            self.places.update(dict.fromkeys(names, name))

    def _find_files(self) -> tuple[str, ...]:
        index = self.path / INDEX_NAME
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError) as error:
                raise ModelError(f"{index}: is no index of weights, got {error!r}; download the folder again") from error
            return tuple(sorted(set(weight_map.values())))
        if (self.path / SINGLE_NAME).is_file():
            return (SINGLE_NAME,)
        raise ModelError(f"{self.path}: no weights found, expected {SINGLE_NAME} or {INDEX_NAME}; check the path")

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the weight files."""
        return self._files

    def keys_of(self, file: str) -> list[str]:
        """Return the keys of one file."""
        return list(self._open[file].keys())

    def metadata_of(self, file: str) -> dict[str, str]:
        """Return what the header of one file says besides its tensors."""
        return cast(dict[str, str], self._open[file].metadata() or {})

    def where(self, key: str) -> Path:
        """Return the file that has the key, or the folder if none has."""
        return self.path / self.places[key] if key in self.places else self.path

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a tensor's shape from the header."""
        return tuple(self._slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        """Return a tensor's type from the header.

        Raises:
            ModelError: The type is not supported.
        """
        name = self._slice(key).get_dtype()
        if name not in _DTYPES:
            raise ModelError(
                f"{self.where(key)}: the type of {key} is not supported, got {name}, expected one of {', '.join(_DTYPES)}; "
                "use a folder that is not quantised"
            )
        return _DTYPES[name]

    def read(self, key: str) -> torch.Tensor:
        """Return one tensor."""
        return cast(torch.Tensor, self._open[self.places[key]].get_tensor(key))

    def _slice(self, key: str) -> Any:
        return self._open[self.places[key]].get_slice(key)
