"""Foreign bytes as the description of a distributed checkpoint: refused by name, or read, and
nothing else.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from zppo_mm.errors import CheckpointError
from zppo_mm.weights.checkpoint_metadata import METADATA_FILE
from zppo_mm.weights.distributed_folder import DistributedFolder
from zppo_mm.weights.tensor_shards import TensorShard

KEY, SHAPE = "layer.weight", torch.Size([4, 3])
INSTRUCTIONS = [b"(", b"t", b"R", b"b", b"0", b"N", b"}", b"]", b"\x81", b"s", b"u", b"."]
NAMES = [
    b"os\nsystem",
    b"builtins\neval",
    b"torch\nload",
    b"torch\nfloat32",
    b"torch\nSize",
    b"collections\nOrderedDict",
]


def description(protocol: int) -> bytes:
    """Return the description of one whole tensor in two pieces."""
    halves = [torch.Size([0, 0]), torch.Size([2, 0])]
    chunks = [ChunkStorageMetadata(offsets=half, sizes=torch.Size([2, 3])) for half in halves]
    stored = TensorStorageMetadata(TensorProperties(torch.float32), SHAPE, chunks)
    storage = {
        MetadataIndex(KEY, half): _StorageInfo("__0_0.distcp", 100 * number, 100)
        for number, half in enumerate(halves)
    }
    return pickle.dumps(Metadata(state_dict_metadata={KEY: stored}, storage_data=storage), protocol)


@st.composite
def broken(draw: st.DrawFn) -> bytes:
    """Return a real description with some of its bytes changed, cut off, doubled or replaced by
    instructions of a pickle.
    """
    content = bytearray(description(draw(st.sampled_from([0, 2, 4, 5]))))
    for _ in range(draw(st.integers(1, 6))):
        offset = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, 12))
        call = st.sampled_from(NAMES).map(lambda name: b"c" + name + b"\n")
        instructions = st.lists(
            st.one_of(
                st.sampled_from(
                    [b"(", b"t", b"R", b"b", b"0", b"N", b"}", b"]", b"\x81", b"s", b"u", b"."]
                ),
                call,
            )
        )
        content[offset : offset + length] = draw(
            st.one_of(st.binary(max_size=12), instructions.map(b"".join))
        )
    return bytes(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    (path / "__0_0.distcp").write_bytes(bytes(200))
    return path


@given(content=st.one_of(broken(), st.binary(max_size=200)))
def test_a_foreign_description_is_read_or_refused(folder: Path, content: bytes) -> None:
    (folder / METADATA_FILE).write_bytes(content)
    refusal = error_of(folder)
    assert refusal is None or str(folder) in refusal


def error_of(folder: Path) -> str | None:
    """Return why a checkpoint is refused; none if it is read."""
    try:
        DistributedFolder(folder).read(
            [TensorShard(KEY, SHAPE, torch.Size([0, 0]), torch.zeros(4, 3))]
        )
    except CheckpointError as error:
        return str(error)
    return None
