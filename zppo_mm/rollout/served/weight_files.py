"""The trained network's weights as a safetensors file that servers load, in the types of the
network: what a server computes in is its own affair.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from zppo_mm.errors import ModelError
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel
from zppo_mm.rollout.served.vllm_worker.zppo_vllm_worker import checksum
from zppo_mm.weights.hf_export import agree, in_rounds, is_writer, open_source, stream_weights
from zppo_mm.weights.hf_writer import FolderWriter
from zppo_mm.weights.mapping import parameter_mappings
from zppo_mm.weights.merge import merged_rounds
from zppo_mm.weights.safetensors_file import build_header
from zppo_mm.weights.safetensors_folder import SINGLE_NAME, SafetensorsFolder

_WHAT = "update"
_NUM_KEPT = 2
"""Versions with a file: while one is written, a server that starts can load the one before."""


@dataclass(frozen=True, slots=True)
class WeightFile:
    """Weights that were written.

    Attributes:
        version: Theirs.
        path: The file.
        num_bytes: Of the file.
        checksums: Of every tensor, by its key in the file.
    """

    version: int
    path: Path
    num_bytes: int
    checksums: Mapping[str, str]


class WeightFiles:
    """Writes the weights of one version after another; every rank has one and calls it.

    Args:
        model: This rank's stage.
        source_dir: The folder that servers start from; its keys are used as it spells them.
        folder: Where the files go; the writing rank's counts.
        merges: Whether adapters are merged into the weights; else they are left out.

    Raises:
        ModelError: The source does not fit the network, or is quantised, so that a server of it
            could not take plain weights; raised on every rank.
    """

    def __init__(
        self, model: VisionLanguageModel, source_dir: Path, folder: Path, merges: bool = True
    ) -> None:
        self._model = model
        self._merges = merges
        self._folder = folder
        dtypes: dict[str, torch.dtype] = {}
        for stage in parallel.gather_from_ranks(_dtypes(model)):
            dtypes.update(stage)
        failure: Exception | None = None
        try:
            self._source = _NetworkTypes(source_dir, dtypes)
            _refuse_quantised(self._source)
            open_source(model, self._source)
        except ModelError as error:
            failure = error
        agree(failure, source_dir, _WHAT)
        self._keys = {self._source.stored_names[key]: key for key in dtypes}
        self._header = build_header(
            {
                name: (self._source.dtype(key), self._source.shape(key))
                for name, key in self._keys.items()
            },
            {"format": "pt"},
        )

    def write(self, version: int) -> WeightFile | None:
        """Write the present weights; every rank calls it.

        The files of all versions but the one before are removed first.

        Returns:
            The file, on the writing rank.

        Raises:
            ModelError: The writing rank could not write; raised on every rank.
        """
        target = self._folder / f"version_{version}"
        writer: FolderWriter | None = None
        failure: Exception | None = None
        if is_writer():
            try:
                remove_before(self._folder, version)
                writer = FolderWriter(target, {SINGLE_NAME: self._header}, {})
            except OSError as error:
                failure = error
        agree(failure, target, _WHAT)
        checksums: dict[str, str] = {}
        sink = functools.partial(self._take, writer, checksums) if writer is not None else None
        try:
            mappings = in_rounds(parameter_mappings(self._model))
            rounds = (
                merged_rounds(self._model, mappings, self._source) if self._merges else mappings
            )
            stream_weights(self._model, rounds, self._source, sink, target)
            if writer is not None:
                try:
                    writer.finish()
                except (OSError, ModelError) as error:
                    failure = error
            agree(failure, target, _WHAT)
        except BaseException:
            if writer is not None:
                writer.discard()
            raise
        if writer is None:
            return None
        return WeightFile(version, target / SINGLE_NAME, self._header.file_bytes, checksums)

    def _take(
        self, writer: FolderWriter, checksums: dict[str, str], key: str, tensor: torch.Tensor
    ) -> None:
        """Write one tensor; the copy of a tied embedding, which servers make themselves, is left
        out.
        """
        name = self._source.stored_names[key]
        if name in self._keys:
            writer.write(name, tensor)
            checksums[name] = checksum(tensor)


def remove_before(folder: Path, version: int) -> None:
    """Make a folder of versions, and remove all from it but the one before this one."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {f"version_{version - back}" for back in range(1, _NUM_KEPT)}
    for path in folder.glob("version_*"):
        if path.name not in kept:
            shutil.rmtree(path)


class _NetworkTypes(SafetensorsFolder):
    """A folder's keys and shapes, with the types that the network has."""

    def __init__(self, path: Path, dtypes: Mapping[str, torch.dtype]) -> None:
        super().__init__(path)
        self._dtypes = dtypes

    def dtype(self, key: str) -> torch.dtype:
        """Return the network's type; the folder's for what the network has not."""
        return self._dtypes[key] if key in self._dtypes else super().dtype(key)


def _dtypes(model: VisionLanguageModel) -> dict[str, torch.dtype]:
    """Return the types of this stage's tensors by Hugging Face key."""
    return {
        key: mapping.parameter.dtype
        for mapping in parameter_mappings(model)
        if not mapping.copied_from_embedding
        for key in mapping.keys
    }


def _refuse_quantised(source: SafetensorsFolder) -> None:
    if source.is_quantised:
        raise ModelError(
            f"{source.path}: a server of quantised weights cannot take the trained ones, got FP8, "
            "expected a folder of plain weights; convert it (docs/conversion.md), or use "
            "rollout.engine=megatron"
        )
