"""Writes a Hugging Face folder tensor by tensor, under a temporary name, and renames it when it is
complete.

The size of every file is known from its header before the first tensor comes, so its room is taken
at once and a full disk is found at the start. The header is written last: until then a weight file
begins with zeros and no reader takes it for one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from data.atomic_files import replace_folder, sync
from zppo_mm.errors import ModelError
from zppo_mm.weights.fp8 import QUANTIZATION_KEY
from zppo_mm.weights.safetensors_file import DTYPES, Header, read_header
from zppo_mm.weights.safetensors_folder import INDEX_NAME, SafetensorsFolder

_INCOMPLETE = ".incomplete"
_DTYPE_KEYS = ("dtype", "torch_dtype")


class FolderWriter:
    """One folder that is being written.

    Args:
        target: The folder; an older one of that name is replaced at the end.
        headers: The weight files by name.
        others: All other files, by path inside the folder: a file to copy, or the content.

    Attributes:
        aside: Its temporary name until it is complete.

    Raises:
        OSError: There is no room or no permission; nothing is left behind.
    """

    def __init__(
        self, target: Path, headers: Mapping[str, Header], others: Mapping[str, Path | bytes]
    ) -> None:
        self._target = target
        self.aside = aside_of(target)
        self._headers = headers
        self._file_of = {key: name for name, header in headers.items() for key in header.entries}
        self._left = dict(self._file_of)
        self._files: dict[str, int] = {}
        try:
            shutil.rmtree(self.aside, ignore_errors=True)
            self.aside.mkdir(parents=True)
            for name, header in headers.items():
                self._files[name] = _take_room(self.aside / name, header.file_bytes)
            for name, content in others.items():
                _write_other(self.aside / name, content)
        except OSError:
            self.discard()
            raise

    def write(self, key: str, tensor: torch.Tensor) -> None:
        """Write one tensor where it belongs.

        Args:
            key: One of the headers' keys, each once.
            tensor: On the CPU.

        Raises:
            ModelError: Its shape or type is not the header's.
            OSError: The disk failed.
        """
        name = self._left.pop(key)
        header = self._headers[name]
        entry = header.entries[key]
        if tuple(tensor.shape) != entry.shape or tensor.dtype != DTYPES[entry.dtype]:
            raise ModelError(
                f"{self._target / name}: the tensor {key} does not fit, got {list(tensor.shape)} "
                f"of {tensor.dtype}, expected {list(entry.shape)} of {DTYPES[entry.dtype]}; check "
                "that the network and the source folder are of the same model"
            )
        content = memoryview(cast(Any, tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
        self._write_at(name, content, len(header.raw) + entry.start, f"the key {key}")

    def finish(self) -> None:
        """Write the headers, check what is on disk, and rename.

        Raises:
            ModelError: A key was not written, or the folder has other keys than it should.
            OSError: The disk failed.
        """
        if self._left:
            key, name = next(iter(self._left.items()))
            raise ModelError(
                f"{self._target / name}: the key {key} was not written ({len(self._left)} in all), "
                f"got {len(self._file_of) - len(self._left)} keys, expected {len(self._file_of)}; "
                "check that the network and the source folder are of the same model"
            )
        for name, file in self._files.items():
            self._write_at(name, memoryview(self._headers[name].raw), 0, "the header")
            os.fsync(file)
        self._close()
        self._check()
        for path in (*(path for path in self.aside.rglob("*") if path.is_dir()), self.aside):
            sync(path)
        replace_folder(self.aside, self._target)

    def discard(self) -> None:
        """Remove what was written."""
        self._close()
        shutil.rmtree(self.aside, ignore_errors=True)

    def _write_at(self, name: str, content: memoryview, position: int, what: str) -> None:
        while content:
            try:
                count = os.pwrite(self._files[name], content, position)
            except OSError as error:
                raise OSError(
                    error.errno, f"{error.strerror} while writing {what}", str(self.aside / name)
                ) from error
            content, position = content[count:], position + count

    def _check(self) -> None:
        """Read back the headers."""
        for name, header in self._headers.items():
            found = read_header(self.aside / name)
            if found.raw != header.raw:
                raise ModelError(
                    f"{self.aside / name}: the header is not what was written, got another; check "
                    "the disk and export again"
                )
        index = self.aside / INDEX_NAME
        listed = (
            json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            if index.is_file()
            else self._file_of
        )
        # A file may have more keys than an index lists; readers take them from the file.
        wrong = sorted(key for key, name in listed.items() if self._file_of.get(key) != name)
        if wrong:
            raise ModelError(
                f"{self._target / INDEX_NAME}: the key {wrong[0]} is not where the index says, got "
                f"{self._file_of.get(wrong[0])}, expected {listed[wrong[0]]}; download the source "
                "folder again"
            )

    def _close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files = {}


def aside_of(target: Path) -> Path:
    """Return a folder's temporary name until it is complete."""
    return target.with_name(target.name + _INCOMPLETE)


def other_files(source: SafetensorsFolder) -> dict[str, Path | bytes]:
    """Return what a folder has besides its weights, as a folder of plain weights has it.

    Everything is copied byte for byte, unless the source is quantised: then config.json says so no
    longer, and the index lists what there is.

    Raises:
        ModelError: config.json cannot be read.
    """
    paths = sorted(path for path in source.path.rglob("*") if path.is_file())
    others: dict[str, Path | bytes] = {str(path.relative_to(source.path)): path for path in paths}
    for name in source.files:
        others.pop(name, None)
    if source.is_quantised:
        if "config.json" in others:
            others["config.json"] = plain_config(
                source.path / "config.json", source.dequantised_dtype
            )
        if INDEX_NAME in others:
            others[INDEX_NAME] = plain_index(source.path / INDEX_NAME, source.plain_headers())
    return others


def plain_config(path: Path, dtype: torch.dtype) -> bytes:
    """Return a config.json without its quantisation and with the type of the weights; other keys
    stay as and where they are.

    Raises:
        ModelError: It is no JSON.
    """
    content = _read_json(path)
    for part in (content, content.get("text_config")):
        if isinstance(part, dict):
            part.pop(QUANTIZATION_KEY, None)
    named = [key for key in _DTYPE_KEYS if key in content] or [_DTYPE_KEYS[0]]
    for key in named:
        content[key] = str(dtype).removeprefix("torch.")
    return _json_bytes(content)


def plain_index(path: Path, headers: Mapping[str, Header]) -> bytes:
    """Return an index that lists the keys of the headers; what else the source's metadata say
    stays.

    Raises:
        ModelError: It is no JSON.
    """
    content = _read_json(path)
    sizes = [entry.size_bytes for header in headers.values() for entry in header.entries.values()]
    metadata = content.get("metadata")
    content["metadata"] = {
        **(metadata if isinstance(metadata, dict) else {}),
        "total_size": sum(sizes),
    }
    file_of = {key: name for name, header in headers.items() for key in header.entries}
    content["weight_map"] = {key: file_of[key] for key in content["weight_map"] if key in file_of}
    return _json_bytes(content)


def _take_room(path: Path, size: int) -> int:
    """Create a file of that size and return its handle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        os.close(handle)
        raise OSError(
            error.errno, f"{error.strerror} (there must be room for {size} bytes)", str(path)
        ) from error
    return handle


def _write_other(path: Path, content: Path | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        shutil.copyfile(content, path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: cannot be read as JSON, got {error}; download or export the folder again"
        ) from error
    return content


def _json_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
