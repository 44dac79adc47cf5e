"""The description of a distributed checkpoint, `.metadata`: the file and offset of each chunk of
each tensor.

It is a pickle and may come from anywhere: it is read by an unpickler that knows the classes of the
format and nothing else, so that no code in it runs.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan

from zppo_mm.errors import CheckpointError

METADATA_FILE = ".metadata"
_FORMAT, _PLANS = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"


# megatron-core 0.15 gave the same things other names.
_RENAMED = {"MCoreMetadata": Metadata, "MCoreSavePlan": SavePlan}


# What `.metadata` is made of; types of numbers and `torch.Size` are known beside them.
_CLASSES = frozenset(
    {
        *(
            (_FORMAT, name)
            for name in (
                "Metadata",
                "TensorStorageMetadata",
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
            )
        ),
        *(
            (_FORMAT, name)
            for name in ("TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")
        ),
        *(
            (_PLANS, name)
            for name in (
                "SavePlan",
                "WriteItem",
                "WriteItemType",
                "TensorWriteData",
                "BytesIOWriteData",
            )
        ),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        *(("pathlib", name) for name in ("PosixPath", "PurePosixPath")),
        *(("pathlib._local", name) for name in ("PosixPath", "PurePosixPath")),
    }
)


class _MetadataUnpickler(pickle._Unpickler):
    """Reads the format's own classes and refuses every other name, which is where a pickle would
    begin to run code.

    In Python, because the one in C allocates as many objects as a number in the file says.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        if module == "megatron.core.dist_checkpointing.strategies.torch" and name in _RENAMED:
            return _RENAMED[name]
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint's description")


def read_metadata(path: Path) -> Metadata:
    """Read a `.metadata` file without running code in it.

    Raises:
        CheckpointError: It is damaged, names anything but the format's classes, or points outside
            its folder.
        OSError: It cannot be opened.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(
            f"{path}: is no plain file, expected the description of a checkpoint; use another one"
        )
    content = path.read_bytes()
    try:
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
        problem = _problem(metadata)
    except Exception as error:
        # A damaged or hostile pickle raises whatever its last instruction came to.
        problem = one_line(error)
    if problem is not None:
        raise CheckpointError(
            f"{path}: the description of the checkpoint cannot be used, got {problem}, expected "
            "what megatron-core writes; use another checkpoint, and do not load this one with "
            "other programs unless you trust its origin: they may run code in it"
        )
    assert isinstance(metadata, Metadata)
    return metadata


def _problem(metadata: Any) -> str | None:
    """Return what is wrong with an unpickled description."""
    if not isinstance(metadata, Metadata):
        return f"a {type(metadata).__name__}"
    if not isinstance(metadata.state_dict_metadata, dict) or not isinstance(
        metadata.storage_data, dict
    ):
        return "no tables of tensors and locations"
    for index, location in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(location, _StorageInfo):
            return "no location"
        if (
            type(location.relative_path) is not str
            or location.relative_path != PurePosixPath(location.relative_path).name
        ):
            return f"a file outside the folder, {location.relative_path!r}"
        if not all(
            type(number) is int and number >= 0 for number in (location.offset, location.length)
        ):
            return f"a location at {location.offset!r} of length {location.length!r}"
    return None


def check_files(folder: Path, metadata: Metadata) -> None:
    """Compare the files with the locations that are described in them."""
    ends: dict[str, int] = {}
    for location in metadata.storage_data.values():
        ends[location.relative_path] = max(
            ends.get(location.relative_path, 0), location.offset + location.length
        )
    for name, end in sorted(ends.items()):
        # Anything but a plain file could keep a reader waiting forever.
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size is None or size < end:
            got = "no plain file" if size is None else f"{size} bytes"
            raise CheckpointError(
                f"{folder / name}: the checkpoint is incomplete, got {got}, expected {end} bytes; "
                "use another one"
            )


def one_line(error: BaseException) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
