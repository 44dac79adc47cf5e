"""Shared-prefix training beside updates that repeat the prompt for every rollout, in one process.

    python benchmarks/prompt_sharing.py [--cases sums video long] [--threads 1] [--rounds 5]

A random Qwen3.5 of about ten million parameters with a small vision tower, FP32, groups of eight
rollouts, one AdamW update per round. All cases pass the same samples both ways, in turns after a
warm-up, so that a busy machine slows both alike; wall-clock seconds are medians over the rounds,
and the ratio of CPU seconds does not depend on what else the machine does. Before the rounds, loss
and gradient norm of the first update are held against each other: both sides start from the same
weights.

Micro-batches hold at most 4,096 tokens on either side, which are more rollouts where prompts are
shared.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from sampling import random_model

from data.question import MediaRef, Question
from encoders.positions import mrope_positions
from encoders.processor import VisionInput
from zppo_mm.config.schema import AlgorithmConfig, ModelConfig, ParallelConfig, TrainConfig
from zppo_mm.experience import Batch, TrainingSample
from zppo_mm.parallel import groups as parallel
from zppo_mm.run.shared import load_model
from zppo_mm.training.batching import build_batches, plan_batches
from zppo_mm.training.objective import PolicyObjective
from zppo_mm.training.policy import Policy

NUM_ROLLOUTS = 8
MICRO_BATCH_TOKENS = 4096
VIDEO, VISION_START, VISION_END = 4091, 4092, 4093
PATCH_ELEMENTS = 3 * 2 * 16 * 16
MAX_DIFFERENCE = 1e-4


@dataclass(frozen=True)
class Case:
    """Groups to train on.

    Attributes:
        prompt_tokens: Of every prompt, a video's included.
        response_tokens: Of every response.
        frames: Of the prompt's video, two to a grid step, each of 8 x 12 patches, which are 24
            tokens of features and 2 around them.
    """

    num_groups: int
    prompt_tokens: int
    response_tokens: int
    frames: int = 0


CASES = {
    "sums": Case(num_groups=8, prompt_tokens=50, response_tokens=64),
    "video": Case(num_groups=2, prompt_tokens=400, response_tokens=60, frames=28),
    "long": Case(num_groups=1, prompt_tokens=2000, response_tokens=60, frames=140),
}


class RandomVideos:
    """Pixels that follow from the question's id, made once: decoding is not what is measured."""

    def __init__(self) -> None:
        self._made: dict[str, list[VisionInput]] = {}

    def add(self, uid: str, grid: tuple[int, int, int]) -> None:
        """Make a question's pixels."""
        patches = np.random.default_rng(len(self._made)).standard_normal(
            (grid[0] * grid[1] * grid[2], PATCH_ELEMENTS)
        )
        self._made[uid] = [VisionInput("video", patches.astype(np.float32), grid)]

    def vision_inputs(self, question: Question) -> list[VisionInput]:
        """Return the one video."""
        return self._made[question.id]


def make_samples(case: Case, videos: RandomVideos) -> list[TrainingSample]:
    """Return groups of random tokens."""
    rng = np.random.default_rng(0)
    samples = []
    for group in range(case.num_groups):
        uid = f"group-{group}"
        steps = case.frames // 2
        grid = (steps, 8, 12)
        if steps:
            videos.add(uid, grid)
        video = [token for _ in range(steps) for token in (VISION_START, *[VIDEO] * 24, VISION_END)]
        prompt = np.array([*video, *rng.integers(0, 3000, case.prompt_tokens - len(video))])
        positions, following = mrope_positions(prompt, [grid] if steps else [], -1, VIDEO, 2)
        media = (MediaRef("video", "none.tar", uid, "mp4"),) if steps else ()
        mask = np.repeat(
            np.array([0, 1], dtype=np.float32), [case.prompt_tokens, case.response_tokens]
        )
        after = np.broadcast_to(
            following + np.arange(case.response_tokens), (3, case.response_tokens)
        )
        for rollout in range(NUM_ROLLOUTS):
            samples.append(
                TrainingSample(
                    uid=uid,
                    question=Question(uid, "", media, "", "math"),
                    token_ids=np.concatenate([prompt, rng.integers(0, 3000, case.response_tokens)]),
                    positions=np.concatenate([positions, after], axis=1),
                    loss_mask=mask,
                    # A uniform guess over the vocabulary.
                    old_logprobs=-mask * np.float32(np.log(4096)),
                    advantages=mask * np.float32(1 - 2 * (rollout % 2)),
                    grids=(grid,) if steps else (),
                )
            )
    return samples


@dataclass
class Side:
    """One way to make the updates, and what was measured."""

    policy: Policy
    batches: list[Batch]
    wall_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that pass through the network in an update."""
        return sum(
            len(microbatch.token_ids) for batch in self.batches for microbatch in batch.microbatches
        )

    def update(self) -> tuple[float, float]:
        """Make one update and keep the times; returns loss and gradient norm."""
        wall, cpu = time.perf_counter(), time.process_time()
        (made,) = self.policy.train_step(self.batches).updates
        self.wall_seconds.append(time.perf_counter() - wall)
        self.cpu_seconds.append(time.process_time() - cpu)
        return made.loss, made.grad_norm


def build_side(folder: Path, case: Case, share_prompts: bool) -> Side:
    """Return a policy of its own and its update."""
    layout = ParallelConfig()
    options = ModelConfig(params_dtype="float32", transformer_impl="local")
    model = load_model(options, layout, folder, trainable=True)
    train = TrainConfig(share_prompts="always" if share_prompts else "never")
    policy = Policy(model, train, layout, PolicyObjective(AlgorithmConfig(), temperature=1.0))
    videos = RandomVideos()
    samples = make_samples(case, videos)
    plan = plan_batches(
        samples,
        num_minibatches=1,
        num_replicas=1,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        random=np.random.default_rng(0),
        share_prompts=policy.shares_prompts,
    )
    return Side(
        policy, build_batches(plan, samples, replica=0, media=videos, device=parallel.device())
    )


def measure(folder: Path, name: str, rounds: int) -> None:
    """Measure both sides of a case in turns and print the ratio."""
    case = CASES[name]
    shared, apart = (build_side(folder, case, share_prompts) for share_prompts in (True, False))
    (loss, norm), (wanted_loss, wanted_norm) = shared.update(), apart.update()
    assert abs(loss - wanted_loss) < MAX_DIFFERENCE, (
        f"loss {loss} with shared prompts, {wanted_loss} without"
    )
    assert abs(norm - wanted_norm) < MAX_DIFFERENCE * wanted_norm, (
        f"gradient norm {norm} with shared prompts, {wanted_norm} without"
    )
    for _ in range(rounds):
        for side in (shared, apart):
            side.update()
    print(f"\n{name}: {case}")
    for label, side in (("shared", shared), ("with every rollout", apart)):
        wall, cpu = (
            statistics.median(seconds[1:]) for seconds in (side.wall_seconds, side.cpu_seconds)
        )
        print(f"{label:20}{side.num_tokens:8} tokens{wall:8.2f} s{cpu:8.2f} CPU s")
    ratios = (
        statistics.median(getattr(apart, kind)[1:]) / statistics.median(getattr(shared, kind)[1:])
        for kind in ("wall_seconds", "cpu_seconds")
    )
    print(
        "ratio {:.2f} by the clock, {:.2f} by CPU time; {:.2f} by tokens".format(
            *ratios, apart.num_tokens / shared.num_tokens
        )
    )


def main() -> None:
    """Measure the cases asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=tuple(CASES),
        default=list(CASES),
        help="what to measure (default: all)",
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of the process (default %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="measured updates per side (default %(default)s)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        random_model().save_pretrained(folder)
        parallel.initialize(ParallelConfig(), seed=0)
        for name in arguments.cases:
            measure(folder, name, arguments.rounds)
    parallel.shutdown()


if __name__ == "__main__":
    main()
