"""The files of a distributed checkpoint in megatron-core's format: pieces of tensors, and
`.metadata`, which says where each lies.

Written and read here through torch's own planner and reader, each rank its part, so that nothing
has to be gathered.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from zppo_mm.errors import CheckpointError, ZppoError
from zppo_mm.parallel import groups as parallel
from zppo_mm.weights.boxes import Box, Piece
from zppo_mm.weights.checkpoint_metadata import METADATA_FILE, check_files, one_line, read_metadata

T = TypeVar("T")

COMMON_FILE = "common.pt"
_FITTING = "expected a complete checkpoint of this network; use another one"


@dataclasses.dataclass(frozen=True, slots=True)
class WrittenFile:
    """A file that is complete and synced to disk.

    Attributes:
        name: In the folder.
        size: Bytes.
        checksum: CRC-32.
        results: Where each piece lies in it.
    """

    name: str
    size: int
    checksum: int
    results: list[WriteResult]

    def to_json(self) -> str:
        """Return it as text for another rank."""
        places = [
            (each.index.fqn, each.index.offset, each.storage_data.offset, each.size_in_bytes)
            for each in self.results
        ]
        return json.dumps([self.name, self.size, self.checksum, places])

    @staticmethod
    def from_json(text: str) -> WrittenFile:
        """Return what `to_json` gave."""
        name, size, checksum, places = json.loads(text)
        results = [
            WriteResult(
                MetadataIndex(key, None if offset is None else torch.Size(offset)),
                length,
                _StorageInfo(name, start, length),
            )
            for key, offset, start, length in places
        ]
        return WrittenFile(name, size, checksum, results)


def on_every_rank(path: Path, action: Callable[[], T]) -> T:
    """Do something with files on every rank; returns this rank's result.

    Args:
        path: What is read or written, for the message.
        action: Calls no collective.

    Raises:
        CheckpointError: It failed on at least one rank; raised on all, so that none waits for
            another.
    """

    result: list[T] = []

    def attempt() -> ZppoError | None:
        try:
            result.append(action())
        except ZppoError as error:
            return error
        except OSError as error:
            return CheckpointError(
                f"{path}: the checkpoint's files cannot be used, got {error}, expected room and "
                "permission; check the disk"
            )
        return None

    problems = [problem for problem in parallel.on_all_ranks(attempt) if problem is not None]
    if problems:
        # One file that cannot be read now makes the damage of another uncertain.
        first = min(problems, key=lambda problem: type(problem) is not CheckpointError)
        raise first if isinstance(first, CheckpointError) else CheckpointError(str(first))
    return result[0]


def on_rank_0(path: Path, action: Callable[[], object]) -> None:
    """Do something with files on rank 0 alone, with the errors of `on_every_rank`."""
    on_every_rank(path, action if parallel.rank() == 0 else lambda: None)


def share_out(pieces: Sequence[Piece]) -> tuple[list[Piece], Metadata | None]:
    """Decide which rank writes which piece; every rank calls it. Of a piece that several have, the
    one with least to write so far.

    Args:
        pieces: What this rank has, those that all ranks have first, which is what evens the ranks
            out.

    Returns:
        What this rank writes, and on rank 0 what `.metadata` will say.

    Raises:
        CheckpointError: The pieces do not make up whole tensors; raised on every rank.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    plans: list[Any] | None = [None] * parallel.world_size() if parallel.rank() == 0 else None
    dist.gather_object(SavePlan([piece.item for piece in pieces]), plans)
    metadata, problem = None, None
    if plans is not None:
        try:
            plans, metadata = planner.create_global_plan(plans)
        except ValueError as error:
            problem = str(error)
    problem = parallel.broadcast_object(problem)
    if problem is not None:
        raise CheckpointError(
            f"checkpoint: the shares of the ranks do not make up whole tensors, got {problem}; "
            "report this layout"
        )
    box: list[Any] = [None]
    dist.scatter_object_list(box, plans)
    wanted = {item.index for item in box[0].items}
    return [piece for piece in pieces if piece.item.index in wanted], metadata


def write_pieces(pieces: list[Piece], folder: Path) -> WrittenFile:
    """Write this rank's file and sync it; each piece is let go of when it is written. No other rank
    is waited for.

    Args:
        pieces: From `share_out`; empty afterwards.
        folder: Exists.

    Raises:
        OSError: There is no room or no permission.
    """
    name = f"__{parallel.rank()}_0.distcp"
    results, size, checksum = [], 0, 0
    pieces.reverse()
    with open(folder / name, "wb") as stream:
        while pieces:
            piece = pieces.pop()
            content = _serialised(piece.content())
            stream.write(content)
            place = _StorageInfo(name, size, len(content))
            results.append(
                WriteResult(index=piece.item.index, size_in_bytes=len(content), storage_data=place)
            )
            size, checksum = size + len(content), zlib.crc32(content, checksum)
        stream.flush()
        os.fsync(stream.fileno())
    return WrittenFile(name, size, checksum, results)


def _serialised(content: torch.Tensor | bytes) -> memoryview | bytes:
    """Return what is written of a content. Saved straight to a file, a full disk would be an error
    without a name.
    """
    if isinstance(content, bytes):
        return content
    tensor = content.contiguous()
    # What is saved of a view is all that it looks at.
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone()
    return _torch_saved(tensor)


def _torch_saved(content: object) -> memoryview:
    box = io.BytesIO()
    torch.save(content, box)
    return box.getbuffer()


def write_description(
    folder: Path, metadata: Metadata | None, files: Iterable[WrittenFile]
) -> None:
    """Write what makes the ranks' files a checkpoint, for megatron-core's own reader too; rank 0
    calls it.

    Args:
        folder: With all files.
        metadata: From `share_out`.
        files: Of all ranks.

    Raises:
        OSError: There is no room or no permission.
    """
    assert metadata is not None
    # Values that all ranks have in common, of which we have none there, and the format.
    (folder / COMMON_FILE).write_bytes(_torch_saved({}))
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    FileSystemWriter(folder).finish(metadata, [file.results for file in files])


class DistributedFolder:
    """A distributed checkpoint to read from, saved at any layout and by any of the known versions
    of megatron-core.

    Args:
        folder: The checkpoint.

    Raises:
        CheckpointError: `.metadata` is damaged, is none, or would run code.
        OSError: It cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._metadata = read_metadata(folder / METADATA_FILE)
        check_files(folder, self._metadata)
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=False)

    @property
    def tensor_keys(self) -> set[str]:
        """Names of the tensors."""
        return {
            key
            for key, stored in self._metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def read(self, boxes: Sequence[Box]) -> None:
        """Fill boxes with what was saved, in the types that they have; no other rank is waited for.

        Raises:
            CheckpointError: A tensor is missing or another one, or a file cannot be read; named.
        """
        try:
            items = [item for number, box in enumerate(boxes) for item in self._items(number, box)]
            self._reader.read_data(LoadPlan(items), _FillBoxes(boxes))
        except CheckpointError:
            raise
        except Exception as error:
            # torch's planner, reader and unpickler raise what they please on a forged description
            # and on bytes that are no tensor.
            raise CheckpointError(
                f"{self._folder}: the checkpoint cannot be read, got {one_line(error)}, {_FITTING}"
            ) from error

    def _items(self, number: int, box: Box) -> list[ReadItem]:
        """Return what to read for a box, under its number: two boxes may be the same part."""
        stored = self._metadata.state_dict_metadata.get(box.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(
                f"{self._folder}: the tensor {box.key} is missing, got {len(self.tensor_keys)} "
                f"others, {_FITTING}"
            )
        if stored.size != box.whole:
            raise CheckpointError(
                f"{self._folder}: shape mismatch of the tensor {box.key}, got {list(stored.size)}, "
                f"expected {list(box.whole)}; use a checkpoint of this network"
            )
        items = create_read_items_for_chunk_list(
            box.key, stored, [ChunkStorageMetadata(box.offsets, box.tensor.size())]
        )
        covered = sum(math.prod(item.lengths) for item in items)
        if covered != box.tensor.numel():
            raise CheckpointError(
                f"{self._folder}: the tensor {box.key} has holes or pieces twice, got {covered} "
                f"elements for a part, expected {box.tensor.numel()}; use another checkpoint"
            )
        return [dataclasses.replace(item, dest_index=MetadataIndex(str(number))) for item in items]


class _FillBoxes(LoadPlanner):
    """Tells torch's reader where in the boxes a piece goes."""

    def __init__(self, boxes: Sequence[Box]) -> None:
        self._boxes = boxes

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        tensor = self._boxes[int(read_item.dest_index.fqn)].tensor
        for axis, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            tensor = tensor.narrow(axis, start, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """The reader has filled the box itself."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("objects are not asked for: reading them could run code")

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        raise AssertionError("the plan is made by hand")

    create_local_plan = create_global_plan = finish_plan = set_up_planner  # type: ignore[assignment]
