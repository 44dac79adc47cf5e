"""What a run has in an object store: every file under its path in the run's folder."""

from __future__ import annotations

import re
from collections.abc import Iterable

from zppo_mm.run_folder import RunFolder
from zppo_mm.training.checkpoint_files import folder_of_step
from zppo_mm.training.manifest import MANIFEST_FILE

NUM_TRANSFERS = 4
"""Files on their way at a time."""
_MANIFEST = re.compile(rf"step_(\d{{6,}})/{re.escape(MANIFEST_FILE)}")


def complete_steps(folder: RunFolder, names: Iterable[str]) -> list[int]:
    """Return the steps of the complete checkpoints among stored files, oldest first: of those the
    manifest is there, which is uploaded last and removed first.
    """
    below = f"{folder.checkpoints.name}/"
    found = (
        _MANIFEST.fullmatch(name.removeprefix(below)) for name in names if name.startswith(below)
    )
    return sorted(int(match[1]) for match in found if match)


def name_of_step(folder: RunFolder, step: int) -> str:
    """Return under which path a checkpoint is stored."""
    return str(folder_of_step(folder.checkpoints, step).relative_to(folder.path))
