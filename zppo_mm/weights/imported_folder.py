"""A folder of weights in megatron-core's format together with all else that its Hugging Face source
had.

FOLDER/                        the distributed checkpoint FOLDER/source/                 the
source's other files; config.json names the network FOLDER/headers/                the headers of
its weight files: names, types and order of the tensors FOLDER/passed_through.safetensors   the
weights that the network does not have
"""

from __future__ import annotations

from pathlib import Path

import torch

from zppo_mm.errors import ModelError
from zppo_mm.weights.hf_writer import FolderWriter, other_files
from zppo_mm.weights.safetensors_file import (
    Header,
    build_header,
    parse_header,
    read_header,
    read_tensor,
)
from zppo_mm.weights.safetensors_folder import SafetensorsFolder

SOURCE_FOLDER = "source"
HEADERS_FOLDER = "headers"
PASSED_THROUGH_FILE = "passed_through.safetensors"


class ImportedFolder(SafetensorsFolder):
    """The source of an imported folder, as far as it was kept: all names, types and shapes, and the
    weights outside the network.

    Args:
        folder: The imported folder.

    Raises:
        ModelError: A file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        super().__init__(folder / SOURCE_FOLDER)
        self._passed_file = folder / PASSED_THROUGH_FILE
        self._passed = read_header(self._passed_file)

    def _read_headers(self) -> dict[str, Header]:
        headers = self._folder / HEADERS_FOLDER
        try:
            files = sorted(path for path in headers.rglob("*") if path.is_file())
            found = {
                str(path.relative_to(headers)): parse_header(path.read_bytes(), str(path))
                for path in files
            }
        except OSError as error:
            raise ModelError(
                f"{headers}: cannot be read, got {error}, expected an imported folder; import it "
                "again"
            ) from error
        if not found:
            raise ModelError(
                f"{headers}: no headers found, expected one for every weight file of the source; "
                "import the folder again"
            )
        return found

    def read(self, key: str) -> torch.Tensor:
        """Return a tensor that the network does not have.

        Raises:
            ModelError: It was not kept.
        """
        stored = self.stored_names[key]
        if stored not in self._passed.entries:
            raise ModelError(
                f"{self._passed_file}: the key {key} is missing, got {len(self._passed.entries)} "
                "keys, expected all that the network does not have; import the folder again"
            )
        return read_tensor(self._passed_file, self._passed, stored)

    def have_equal_values(self, key: str, other: str) -> bool:
        """Return true: the values were compared when the folder was imported, and are not kept
        twice.
        """
        return True


def is_imported(folder: Path) -> bool:
    """Return whether a folder is an imported one."""
    return (folder / HEADERS_FOLDER).is_dir() and (folder / SOURCE_FOLDER).is_dir()


def begin_imported(source: SafetensorsFolder, extra_keys: list[str], target: Path) -> FolderWriter:
    """Start an imported folder with everything but the network's weights; the checkpoint goes into
    the writer's folder.

    Args:
        source: The folder to import.
        extra_keys: Keys that the network does not have.
        target: The folder to make.

    Raises:
        OSError: There is no room or no permission.
        ModelError: A tensor cannot be read.
    """
    plain = build_header(
        {source.stored_names[key]: (source.dtype(key), source.shape(key)) for key in extra_keys},
        {"format": "pt"},
    )
    others: dict[str, Path | bytes] = {
        f"{SOURCE_FOLDER}/{name}": content for name, content in other_files(source).items()
    }
    others |= {
        f"{HEADERS_FOLDER}/{name}": header.raw for name, header in source.plain_headers().items()
    }
    writer = FolderWriter(target, {PASSED_THROUGH_FILE: plain}, others)
    try:
        for key in extra_keys:
            writer.write(source.stored_names[key], source.read(key))
    except BaseException:
        writer.discard()
        raise
    return writer
