"""An answer that the grader comes to no end with is neither right nor wrong: not in numbers, not in
prompts.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from data.media.opening import Frames
from data.question import MediaRef, Question
from tests.support.tiny_folder import build_folder, build_tokenizer
from tests.support.zone_builders import CountingCompressor, rollout
from zppo_mm.config.schema import ZoneConfig
from zppo_mm.experience import Group, PromptInstance
from zppo_mm.parallel.exchange import SingleProcess
from zppo_mm.rewards.verify import Verifier
from zppo_mm.rewards.workers import GradingPool
from zppo_mm.rollout.engine import Generation, GenerationRequest, SamplingParams
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.rollout.sampler import GroupSampler
from zppo_mm.zone.prompts import load_templates
from zppo_mm.zone.reformulate import Reformulator

HANGING = "9^{9^{9^9}}+x"
LIMIT_SECONDS = 1.0
# To its end the burst would take minutes; a first try of all its answers takes half a second.
BUDGET_SECONDS, BURST, BURST_LIMIT_SECONDS = 20.0, 6, 60.0
# Killing workers, and the scheduler of a loaded machine.
MARGIN_SECONDS = 30.0
TEXTS = ["so \\boxed{1+x}", f"so \\boxed{{{HANGING}}}", "so \\boxed{2+x}", "so \\boxed{3+x}"]


class WritingEngine:
    """Answers every prompt with the same texts."""

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self._texts = texts

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> list[list[Generation]]:
        return [
            [
                Generation(np.array(ids), np.full(len(ids), -0.5, np.float32), "stop")
                for ids in self._texts
            ]
            for _ in requests
        ]


def no_media(reference: MediaRef) -> Frames:
    raise AssertionError(reference)


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Group:
    folder = tmp_path_factory.mktemp("model")
    build_folder(folder)
    ids = [build_tokenizer(folder)(text)["input_ids"] for text in TEXTS]
    question = Question("q", "What?", (), "x+1", "math")
    with Verifier(LIMIT_SECONDS) as verifier:
        sampler = GroupSampler(
            WritingEngine(ids), PromptEncoder(folder, no_media), verifier, SingleProcess()
        )
        params = SamplingParams(temperature=1.0, max_new_tokens=64, stop_token_ids=(0,))
        (made,) = sampler.sample(
            [PromptInstance("1/new/q", question, "new", "what?")], params, len(TEXTS), 1
        )
        assert (verifier.num_timeouts, verifier.num_errors) == (1, 0)
    return made


@pytest.mark.medium
def test_it_stands_apart_in_its_group(group: Group) -> None:
    assert [each.parsed for each in group.rollouts] == ["1+x", "2+x", "3+x"]
    assert [each.reward for each in group.rollouts] == [1.0, 0.0, 0.0]
    assert group.accuracy == pytest.approx(1 / 3)  # a quarter with the ungraded one as wrong
    assert [each.parsed for each in group.ungraded] == [HANGING]
    assert math.isnan(group.ungraded[0].reward)


def test_no_prompt_calls_it_wrong(group: Group) -> None:
    reformulator = Reformulator(load_templates(), ZoneConfig(rho_aug=1), 0, CountingCompressor())
    answers = {"q": (rollout("so \\boxed{x+1}", "x+1", 1.0),)}
    for step in range(20):  # the wrong candidate of BCQ is drawn
        made = reformulator.reformulate([group], answers, step, 4)
        assert {instance.kind for instance in made.instances} == {"bcq", "ncq"}
        assert not any("9^{9" in instance.text for instance in made.instances)


@pytest.fixture
def pool() -> Iterator[GradingPool]:
    made = GradingPool(LIMIT_SECONDS, 2, budget_seconds=BUDGET_SECONDS)
    yield made
    made.close()


@pytest.mark.medium
def test_a_burst_of_hanging_answers_holds_up_no_call_and_no_other_answer(pool: GradingPool) -> None:
    pool.timeout_seconds = BURST_LIMIT_SECONDS
    pool.compare_all([("1+x", "x+1")])
    hanging = [(f"9^{{9^{{9^9}}}}+{number}x", "x") for number in range(BURST)]
    started = time.monotonic()
    outcomes = pool.compare_all([*hanging, ("2x+x", "3x"), ("x", "y")])
    assert time.monotonic() - started < BUDGET_SECONDS + MARGIN_SECONDS
    assert outcomes == ["timeout"] * BURST + ["equal", "different"]
    assert pool.num_timeouts == BURST
    assert pool.compare_all([("1+x", "x+1")]) == ["equal"]


@pytest.mark.medium
def test_what_the_budget_leaves_open_is_not_graded() -> None:
    pool = GradingPool(60.0, 1, budget_seconds=6.0)
    outcomes = pool.compare_all([("1+x", "x+1"), (HANGING, "x"), ("9^{9^{9^9}}-x", "x")])
    assert outcomes == ["equal", "timeout", "timeout"]
    assert pool.compare_all([("1+x", "x+1")]) == ["equal"]  # another worker has come
    pool.close()


@pytest.mark.medium
def test_a_limit_costs_no_restart() -> None:
    pool = GradingPool(LIMIT_SECONDS, 1, budget_seconds=120.0)
    pool.compare_all([("1+x", "x+1")])
    (process,) = {worker.process.pid for worker in pool._workers}
    assert pool.compare_all([(HANGING, "x")]) == ["timeout"]
    assert {worker.process.pid for worker in pool._workers} == {process}
    pool.close()


def test_time_in_which_the_machine_does_other_things_does_not_count(pool: GradingPool) -> None:
    """A worker that is stopped for longer than the limit grades its answer all the same."""
    pool.num_workers = 1
    assert pool.compare_all([("1+x", "x+1")]) == ["equal"]
    worker = pool._workers[0].process.pid
    os.killpg(worker, signal.SIGSTOP)
    waker = threading.Timer(2 * LIMIT_SECONDS, os.killpg, (worker, signal.SIGCONT))
    waker.start()
    assert pool.compare_all([("2x+x", "3x")]) == ["equal"]
    waker.join()
    assert pool.num_timeouts == 0


@pytest.mark.medium
def test_a_worker_that_dies_grades_nothing_and_is_replaced() -> None:
    with Verifier(60.0, num_workers=1) as verifier:
        right = (Question("q", "?", (), "x+1", "math"), "\\boxed{1+x}")
        assert verifier.verify(*right).reward == 1
        killer = threading.Timer(
            1.0, os.killpg, (verifier._pool._workers[0].process.pid, signal.SIGKILL)
        )
        killer.start()
        verdict = verifier.verify(Question("q", "?", (), "x", "math"), f"\\boxed{{{HANGING}}}")
        assert (verdict.parsed, verdict.reward, verdict.reason) == (HANGING, None, "error")
        killer.join()
        assert verifier.num_errors == 1
        assert verifier.verify(*right).reward == 1
