"""What a step is assumed to bring: lengths, pass rates, media, and how a teacher is served."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from zppo_mm.config.checks import check_values
from zppo_mm.config.keys import key, section
from zppo_mm.config.load import load_settings
from zppo_mm.models.families.architecture import Architecture

Lengths = npt.NDArray[np.int64]


@dataclass(kw_only=True)
class LengthAssumption:
    """Lognormal lengths. What is longer than the limit is cut there, as a response is."""

    median: float = key(2500.0, "Median length in tokens.", above=0)
    sigma: float = key(0.9, "Standard deviation of the logarithm. 0: all alike.", at_least=0)

    def draw(self, random: np.random.Generator, count: int, longest: int) -> Lengths:
        """Return `count` lengths of 1 to `longest` tokens."""
        drawn = np.exp(np.log(self.median) + self.sigma * random.standard_normal(count))
        lengths: Lengths = np.clip(np.rint(drawn), 1, longest).astype(np.int64)
        return lengths


@dataclass(kw_only=True)
class TeacherAssumption:
    """How a teacher is served. The defaults are those of Qwen3.5-27B in FP8."""

    parameters: float = key(27.4e9, "Weights that a token passes through.", above=0)
    element_bytes: float = key(1.0, "Bytes of a weight.", above=0)
    num_layers: int = key(64, "Layers.", at_least=1)
    layer_seconds: float = key(
        6e-5, "Time that a layer of the server takes however little there is to do.", at_least=0
    )
    latency_seconds: float = key(0.5, "Time of a request before its first token.", at_least=0)
    max_concurrency: int = key(
        32, "Requests that a server answers at once. 0: `teacher.max_concurrency`.", at_least=0
    )
    lengths: LengthAssumption = section(LengthAssumption)


@dataclass(kw_only=True)
class Workload:
    """Assumptions about the questions and about what the models do with them."""

    seed: int = key(0, "Seed of everything that is drawn.")
    num_steps: int = key(4, "Steps that are simulated; the first has no replay.", at_least=2)
    prompt: LengthAssumption = section(LengthAssumption)
    response: LengthAssumption = section(LengthAssumption)
    rewrite_tokens: int = key(300, "Tokens of a compressed candidate.", at_least=1)
    pass_rate: float = key(0.5, "Mean probability that a rollout is right.", above=0, below=1)
    pass_rate_spread: float = key(
        1.0,
        "Sum of the two parameters of the beta distribution over questions. Small: each is either "
        "easy or hard.",
        above=0,
    )
    teacher_pass_rate: float = key(
        0.5,
        "Probability that a teacher's rollout on a hard question is right.",
        at_least=0,
        at_most=1,
    )
    teacher_pass_rate_easy: float = key(
        0.9,
        "The same on the others, which a teacher answers for `distill.source=teacher` alone.",
        at_least=0,
        at_most=1,
    )
    open_fraction: float = key(
        0.1, "Share of the questions that have no rules, but a judge.", at_least=0, at_most=1
    )
    judge_tokens: int = key(100, "Tokens of a judge's reply.", at_least=1)
    judge_gpus: int = key(
        1, "GPUs of a server of `reward.judge_endpoints`; these are not counted.", at_least=1
    )
    algebra_fraction: float = key(
        0.1, "Share of the responses that are compared by algebra.", at_least=0, at_most=1
    )
    num_held_out: int = key(
        500, "Held-out questions, of which `evaluation.num_questions=0` asks all.", at_least=0
    )
    slow_fraction: float = key(
        0.0, "Share of the student's GPUs that are slower than the others.", at_least=0, at_most=1
    )
    slowdown: float = key(1.5, "How many times longer everything takes there.", at_least=1)
    media_per_question: float = key(1.0, "Images of a question, or frames.", at_least=0)
    media_fraction: float = key(
        0.75, "Share of a plain prompt that stands for media.", at_least=0, at_most=1
    )
    teacher: TeacherAssumption = section(TeacherAssumption)

    def num_patches(self, architecture: Architecture, prompt_tokens: float) -> float:
        """Return the patches of the media in some tokens of plain prompts."""
        if architecture.vision is None or not self.media_per_question:
            return 0.0
        return prompt_tokens * self.media_fraction * architecture.spatial_merge_size**2


def load_workload(path: Path | None) -> Workload:
    """Return the assumptions of a file, or those made for the paper's runs.

    Raises:
        ConfigError: The file cannot be read, or anything in it is wrong.
    """
    path = path or Path(__file__).with_name("paper_workload.yaml")
    workload = load_settings(Workload, path)
    check_values(workload, str(path))
    return workload
