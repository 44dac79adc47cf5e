"""The trained adapters as folders that servers load beside the frozen weights."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from zppo_mm.errors import ModelError
from zppo_mm.lora.adapters import adapters_of
from zppo_mm.lora.export import WEIGHTS_FILE, export_adapter
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel
from zppo_mm.rollout.served.server_control import PublishedAdapter
from zppo_mm.rollout.served.vllm_worker.zppo_vllm_worker import checksum
from zppo_mm.rollout.served.weight_files import WeightFile, remove_before


class AdapterFiles:
    """Writes the adapters of one version after another; every rank has one and calls it.

    Args:
        model: This rank's stage, with adapters.
        source_dir: The folder of the frozen weights.
        folder: Where the folders go; rank 0's counts.
    """

    def __init__(self, model: VisionLanguageModel, source_dir: Path, folder: Path) -> None:
        adapters = adapters_of(model)
        assert adapters is not None, "a run without adapters sends none"
        self._model = model
        self._source_dir = source_dir
        self._folder = folder
        self._scaling = adapters.config.alpha / adapters.config.rank

    def write(self, version: int) -> PublishedAdapter | None:
        """Write the present adapters; every rank calls it.

        The folders of all versions but the one before are removed first.

        Returns:
            The adapters, on rank 0.

        Raises:
            ModelError: Rank 0 could not write; raised on every rank.
        """
        target = self._folder / f"version_{version}"
        problem = parallel.on_rank_zero(lambda: self._make_room(version))
        if problem:
            raise ModelError(
                f"{self._folder}: older adapters cannot be removed, got {problem}, expected a "
                "folder that can be written; look at rollout.sync_folder"
            )
        export_adapter(self._model, self._source_dir, target)
        if parallel.rank():
            return None
        path = target / WEIGHTS_FILE
        with safe_open(path, framework="pt") as file:
            checksums = {key: checksum(file.get_tensor(key)) for key in sorted(file.keys())}
        return PublishedAdapter(
            WeightFile(version, path, path.stat().st_size, checksums), self._scaling
        )

    def _make_room(self, version: int) -> str:
        """Return what went wrong; empty if nothing did."""
        try:
            remove_before(self._folder, version)
        except OSError as error:
            return str(error)
        return ""
