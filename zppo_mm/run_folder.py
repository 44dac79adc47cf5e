"""The folder of a run: the name of everything in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of what a run writes. Nothing is read or made here.

    Attributes:
        path: The folder.
    """

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def lock(self) -> Path:
        """Held by the process that writes to the folder."""
        return self.path / ".lock"

    @property
    def log(self) -> Path:
        """Log of rank 0."""
        return self.path / "run.log"

    @property
    def stacks(self) -> Path:
        """Where every process was when one was found to hang, a file each."""
        return self.path / "stacks"

    @property
    def servers(self) -> Path:
        """One log per server that the run starts."""
        return self.path / "servers"

    @property
    def metrics(self) -> Path:
        """One line per step."""
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """One line per evaluation on held-out questions."""
        return self.path / "evaluation.jsonl"

    @property
    def changes(self) -> Path:
        """One line per key that was given another value, by consent, when the run was resumed."""
        return self.path / "changes.jsonl"

    @property
    def parity(self) -> Path:
        """One line per parity check."""
        return self.path / "parity.jsonl"

    @property
    def report(self) -> Path:
        """The page about the run."""
        return self.path / "report.html"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def ranks(self) -> Path:
        """One line per step: seconds by rank and phase."""
        return self.path / "ranks.jsonl"

    @property
    def profiles(self) -> Path:
        """Traces of torch's profiler, one folder per step."""
        return self.path / "profiles"

    @property
    def profile_request(self) -> Path:
        """A file that somebody makes here asks for a trace of the next step."""
        return self.path / "profile"

    @property
    def checkpoints(self) -> Path:
        """One folder per saved step."""
        return self.path / "checkpoints"

    @property
    def hf(self) -> Path:
        """The trained student as a Hugging Face folder, adapters merged."""
        return self.path / "hf"

    @property
    def adapter(self) -> Path:
        """The trained adapters alone."""
        return self.path / "adapter"

    @property
    def transcripts(self) -> Path:
        """One file per step."""
        return self.path / "transcripts"

    @property
    def buffers(self) -> Path:
        """One file per step: what it did to the replay buffer."""
        return self.path / "buffer"

    @property
    def answers(self) -> Path:
        """One file per evaluation: the answers to held-out questions."""
        return self.path / "evaluations"

    @property
    def records(self) -> tuple[Path, ...]:
        """Everything that steps append to or rewrite."""
        return (
            self.metrics,
            self.evaluations,
            self.ranks,
            self.transcripts,
            self.buffers,
            self.answers,
        )

    @property
    def mirrored(self) -> tuple[Path, ...]:
        """What a copy of the run elsewhere has besides checkpoints."""
        pages = (self.config, self.log, self.changes, self.parity, self.report)
        return (*self.records, *pages, self.tensorboard, self.stacks, self.hf, self.adapter)

    @property
    def restored(self) -> tuple[Path, ...]:
        """What a run that continues from such a copy needs, besides a checkpoint and its log."""
        return (*self.records, self.changes, self.parity, self.tensorboard)

    def profile_of(self, step: int, rank: int) -> Path:
        """Return the trace of a rank in a step."""
        return self.profiles / f"step_{step:06d}" / f"rank_{rank:04d}.json.gz"

    def transcript_of(self, step: int) -> Path:
        """Return the transcript of a step."""
        return self.transcripts / f"step_{step:06d}.jsonl"

    def buffer_of(self, step: int) -> Path:
        """Return the buffer file of a step."""
        return self.buffers / f"step_{step:06d}.json"

    def answers_of(self, step: int) -> Path:
        """Return the answers of the evaluation after a step."""
        return self.answers / f"step_{step:06d}.jsonl"

    def server_log(self, index: int) -> Path:
        """Return the log of a server, which all its starts append to."""
        return self.servers / f"server_{index}.log"

    def earlier_records(self) -> Iterator[Path]:
        """Yield the folders that take the records of earlier starts, by number."""
        return (self.path / f"earlier_{number}" for number in itertools.count(1))


def files_by_step(folder: Path) -> dict[int, Path]:
    """Return the `step_N.json` and `step_N.jsonl` files of a folder by N, ascending; others are
    left out.
    """
    numbered = ((path.stem.removeprefix("step_"), path) for path in folder.glob("step_*.json*"))
    return dict(sorted((int(number), path) for number, path in numbered if number.isdecimal()))
