"""Uploads what a run writes, from a thread beside it."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.errors import DataError
from data.remote_objects import RemoteFile, RemoteObjects
from zppo_mm.mirror.stored import NUM_TRANSFERS, complete_steps, name_of_step
from zppo_mm.run_folder import RunFolder
from zppo_mm.training.checkpoint_files import step_folders, step_of
from zppo_mm.training.manifest import MANIFEST_FILE

logger = logging.getLogger(__name__)

NUM_FINAL_ATTEMPTS = 3
Version = tuple[int, int]
"""Bytes and time of change of a local file."""


class Mirror:
    """Keeps a copy of a run's folder at an address.

    A pass uploads the records that have changed, then the newest complete checkpoint, its manifest
    last, and removes older ones. One pass runs at a time: what is asked for meanwhile is one
    further pass, so a slow store gets fewer checkpoints than the disk. A pass that fails is counted
    and warned of; the next one tries again.

    Args:
        folder: Of the run.
        address: Where the copy is.
        keep: Complete checkpoints left there, at least 1.
        objects: Speaks to the store.

    Attributes:
        counts: `uploaded` (files), `uploaded_bytes`, `failures` (passes).
        newest_step: Of the checkpoints there; -1 if there is none.
    """

    def __init__(
        self, folder: RunFolder, address: str, keep: int, objects: RemoteObjects | None = None
    ) -> None:
        self._folder, self._address, self._keep = folder, address.rstrip("/"), keep
        self._objects = objects or RemoteObjects()
        self._known: dict[str, Version] = {}
        self._steps: list[int] = []
        self._in_use: Path | None = None
        self._problem = ""
        self._num_asked = self._num_done = 0
        self._changed = threading.Condition()
        self.counts: Counter[str] = Counter()

    def begin(self, stored: dict[str, RemoteFile], done: int) -> None:
        """Start to upload.

        Args:
            stored: What is there, by path.
            done: Steps of the checkpoint that the run continues from; of later ones nothing that is
                there counts.
        """
        self._steps = [step for step in complete_steps(self._folder, stored) if step <= done]
        for name, path in self._local_files():
            # Files of a step do not change once they are written; the others are few.
            if "/" in name and name in stored and stored[name].size == path.stat().st_size:
                self._known[name] = _version(path)
        threading.Thread(target=self._run, name="mirror", daemon=True).start()

    @property
    def newest_step(self) -> int:
        return max(self._steps, default=-1)

    def in_use(self) -> Path | None:
        """Return the checkpoint that is being uploaded, which must stay for now."""
        return self._in_use

    def request(self) -> None:
        """Ask for a pass; returns at once."""
        with self._changed:
            self._num_asked += 1
            self._changed.notify_all()

    def finish(self) -> str:
        """Upload what is not there yet; returns what is missing in the end, or nothing."""
        for _ in range(NUM_FINAL_ATTEMPTS):
            self.request()
            if not (problem := self._wait()):
                return ""
        missing = [name for name, path in self._local_files() if self._is_new(name, path)]
        newest = self._newest()
        if newest is not None and step_of(newest) not in self._steps:
            missing.insert(0, str(newest.relative_to(self._folder.path)))
        named = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        return f"{self._address}: {len(missing)} files or checkpoints are missing ({named})" + (
            f", got {problem}"
        )

    def _wait(self) -> str:
        """Wait for the passes that were asked for; returns why the last one failed, or nothing."""
        with self._changed:
            wanted = self._num_asked
            self._changed.wait_for(lambda: self._num_done >= wanted)
            return self._problem

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._num_asked > self._num_done)
                asked = self._num_asked
            problem = ""
            try:
                self._pass()
            except (DataError, OSError) as error:
                problem = str(error)
                self.counts["failures"] += 1
                logger.warning("mirror: a pass failed, the next one tries again: %s", problem)
            with self._changed:
                self._problem, self._num_done = problem, asked
                self._changed.notify_all()

    def _pass(self) -> None:
        while True:
            newest = self._in_use = self._newest()
            try:
                self._upload_records()
                if newest is not None and step_of(newest) not in self._steps:
                    self._upload_checkpoint(newest)
            except FileNotFoundError:
                if newest is None or newest.is_dir():
                    raise
                continue  # it made way for a newer one before it was in use
            finally:
                self._in_use = None
            self._prune()
            return

    def _upload_records(self) -> None:
        new = [(name, path) for name, path in self._local_files() if self._is_new(name, path)]
        versions = {name: _version(path) for name, path in new}  # before it is read
        for name in self._upload(new):
            self._known[name] = versions[name]

    def _upload_checkpoint(self, path: Path) -> None:
        name = name_of_step(self._folder, step_of(path))
        files = [(f"{name}/{file.name}", file) for file in sorted(path.iterdir())]
        manifest = [each for each in files if each[1].name == MANIFEST_FILE]
        for part in ([each for each in files if each not in manifest], manifest):
            for _ in self._upload(part):
                pass
        self._steps.append(step_of(path))
        logger.info("mirror: %s is in %s", path.name, self._address)

    def _upload(self, files: Collection[tuple[str, Path]]) -> Iterator[str]:
        """Upload files, and yield the names of those that are there."""
        with ThreadPoolExecutor(NUM_TRANSFERS) as pool:
            found = pool.map(
                lambda file: self._objects.upload(file[1], f"{self._address}/{file[0]}"), files
            )
            try:
                for (name, _), stored in zip(files, found, strict=True):
                    self.counts.update({"uploaded": 1, "uploaded_bytes": stored.size})
                    yield name
            finally:
                pool.shutdown(cancel_futures=True)

    def _prune(self) -> None:
        """Remove the oldest checkpoints beyond `keep`, and what was not uploaded to its end, of
        those that are older than the newest.
        """
        if not self._steps:
            return
        kept = sorted(self._steps)[-self._keep :]
        below = f"{self._address}/{self._folder.checkpoints.name}"
        names = self._objects.tree(below)
        # The manifest first: what is left of a half-removed checkpoint is none.
        for name in sorted(names, key=lambda name: not name.endswith(f"/{MANIFEST_FILE}")):
            step = name.partition("/")[0].removeprefix("step_")
            if step.isdecimal() and int(step) < kept[-1] and int(step) not in kept:
                self._objects.remove(f"{below}/{name}")
        self._steps = kept

    def _newest(self) -> Path | None:
        return max(step_folders(self._folder.checkpoints), key=step_of, default=None)

    def _local_files(self) -> Iterable[tuple[str, Path]]:
        """Yield the files of the run besides its checkpoints, by name; hidden ones are not
        complete.
        """
        for top in self._folder.mirrored:
            for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
                parts = path.relative_to(self._folder.path).parts
                if path.is_file() and not any(part.startswith(".") for part in parts):
                    yield "/".join(parts), path

    def _is_new(self, name: str, path: Path) -> bool:
        return self._known.get(name) != _version(path)


def _version(path: Path) -> Version:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
