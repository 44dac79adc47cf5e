"""Steps of zppo_mm for `grpo_step.py`, which starts this in a process of its own.

python benchmarks/grpo_step_ours.py FOLDER FAMILY DTYPE NUM_STEPS MICRO_BATCH_TOKENS \
    SHARE_PROMPTS RESULT
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.question import Question
from zppo_mm.config.load import load_config
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.exchange import ParallelExchange
from zppo_mm.rewards.verify import Verdict, Verifier
from zppo_mm.rollout.megatron_engine import MegatronEngine
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.rollout.sampler import GroupSampler
from zppo_mm.run.build import build_run
from zppo_mm.run.parts import Run
from zppo_mm.stages.record import StepRecord
from zppo_mm.stages.stages import Stages
from zppo_mm.step import run_step

RESPONSE_TOKENS = 64
NUM_ROLLOUTS = 8


class AlternatingGrader:
    """Grades every response as a run does, then rewards every other one, so that no group is
    trivial and none is left out of the update.
    """

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier

    def verify_all(self, items: Sequence[tuple[Question, str]]) -> list[Verdict]:
        """Return one verdict per item."""
        return [
            replace(verdict, reward=float(index % 2))
            for index, verdict in enumerate(self._verifier.verify_all(items))
        ]


class TimedEngine(MegatronEngine):
    """Adds up the time spent in generating."""

    seconds = 0.0

    def generate(self, *arguments: object, **named: object) -> object:  # type: ignore[override]
        """Generate and add to `seconds`."""
        started = time.perf_counter()
        try:
            return super().generate(*arguments, **named)  # type: ignore[arg-type]
        finally:
            self.seconds += time.perf_counter() - started


def build(
    folder: Path, family: str, dtype: str, micro_batch_tokens: int, share_prompts: str
) -> tuple[Run, Stages, TimedEngine]:
    """Return a GRPO run of one update per step whose responses never end early."""
    student = folder / family
    config = load_config(
        None,
        [
            "method=grpo",
            f"output_dir={folder / 'runs'}",
            f"model.student={student}",
            f"model.params_dtype={dtype}",
            f"data.train=[{{path: {folder / 'shards'}}}]",
            "train.num_new_questions=8",
            "train.updates_per_step=1",
            f"train.micro_batch_tokens={micro_batch_tokens}",
            f"train.share_prompts={share_prompts}",
            "train.lr=1e-6",
            f"rollout.num_rollouts={NUM_ROLLOUTS}",
            f"rollout.max_response_tokens={RESPONSE_TOKENS}",
            "rollout.temperature=1.0",
        ],
    )
    parallel.initialize(config.parallel, config.seed)
    run = build_run(config)
    engine = TimedEngine(run.policy.model, config.seed, config.rollout.max_batch_size)
    encoder = PromptEncoder(student, run.media.open)
    sampler = GroupSampler(engine, encoder, AlternatingGrader(run.verifier), ParallelExchange())
    stages = replace(
        run.stages, sampler=sampler, sampling=replace(run.stages.sampling, stop_token_ids=())
    )
    return run, stages, engine


def check_work(record: StepRecord) -> int:
    """Check that nothing was left out of the step; returns its tokens, the prompt counted with
    every rollout.
    """
    assert len(record.groups) == NUM_ROLLOUTS
    tokens = 0
    for group in record.groups:
        assert record.advantages[group.uid].all(), "every rollout moves the weights"
        for rollout in group.rollouts:
            assert len(rollout.response_ids) == RESPONSE_TOKENS
            tokens += len(group.prompt.token_ids) + RESPONSE_TOKENS
    values = record.metrics.values()
    assert values["policy/updates"] == 1
    return tokens


def main() -> None:
    """Run the steps and write one record per step."""
    folder, family, dtype, share_prompts = Path(sys.argv[1]), *sys.argv[2:4], sys.argv[6]
    num_steps, micro_batch_tokens, result = int(sys.argv[4]), int(sys.argv[5]), Path(sys.argv[7])
    run, stages, engine = build(folder, family, dtype, micro_batch_tokens, share_prompts)
    steps = []
    for step in range(1, num_steps + 1):
        engine.seconds = 0.0
        started, cpu = time.perf_counter(), time.process_time()
        record = run_step(stages, step)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
        steps.append(
            {
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "generation": engine.seconds,
                "tokens": check_work(record),
            }
        )
    run.close()
    parallel.shutdown()
    result.write_text(json.dumps(steps), encoding="utf-8")


if __name__ == "__main__":
    main()
