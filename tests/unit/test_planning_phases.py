"""Phases of a planned step against times counted by hand, on machines of which only one thing takes
time.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from zppo_mm.config.load import load_config
from zppo_mm.config.schema import RunConfig
from zppo_mm.models.families.architecture import Architecture
from zppo_mm.planning.layouts import Candidate, Placement
from zppo_mm.planning.machine import MachineRates, PassRates, ServerRates
from zppo_mm.planning.measured import reference_architecture
from zppo_mm.planning.memory import longest_trained
from zppo_mm.planning.questions import Groups
from zppo_mm.planning.sampling_time import SamplingTime
from zppo_mm.planning.step_time import Simulator, StepSeconds
from zppo_mm.planning.update_time import UpdateTime
from zppo_mm.planning.workload import LengthAssumption, TeacherAssumption, Workload

LAYERS = 4
AT_ONCE = PassRates(layer_seconds=0.0)
ENDLESS: dict[str, Any] = {
    "matmul_flops": 1e30,
    "memory_bandwidth": 1e30,
    "host_bandwidth": 1e30,
    "media_per_second": 1e30,
    "answers_per_second": 1e30,
    "algebra_per_second": 1e30,
    "train": AT_ONCE,
    "decode": AT_ONCE,
}
"""Rates of a machine on which nothing takes time."""
# Every prompt has 100 tokens, every response 10, every answer of the teacher 20.
ALIKE = Workload(
    num_steps=2,
    prompt=LengthAssumption(median=100, sigma=0),
    response=LengthAssumption(median=10, sigma=0),
    # Half of every group is right.
    pass_rate_spread=1e9,
    open_fraction=0.0,
    algebra_fraction=0.0,
    media_per_question=0.0,
    teacher=TeacherAssumption(
        parameters=1,
        num_layers=6,
        layer_seconds=0.5,
        latency_seconds=2.0,
        max_concurrency=0,
        lengths=LengthAssumption(median=20, sigma=0),
    ),
)
GRPO = (
    "method=grpo",
    "train.num_new_questions=8",
    "train.updates_per_step=1",
    "train.train_iters=200",
    "teacher.max_concurrency=32",
    "evaluation.judge=never",
    "reward.judge=never",
)


@cache
def network() -> Architecture:
    return reference_architecture(64, LAYERS)


def machine(**rates: Any) -> MachineRates:
    return MachineRates(**(ENDLESS | rates))


def config_of(*options: str) -> RunConfig:
    return load_config(None, [*GRPO, *options])


def seconds(
    options: tuple[str, ...],
    rates: MachineRates,
    workload: Workload = ALIKE,
    placement: Placement = Placement("none"),  # noqa: B008 frozen
    num_ranks: int = 1,
    vllm_gpus: int = 0,
) -> StepSeconds:
    config = config_of(*options)
    candidate = Candidate(config, placement, num_ranks, 1, vllm_gpus_per_node=vllm_gpus)
    return Simulator.of(network(), config, rates, workload).run(candidate, num_parameters=10)


def groups(num_right: list[int], rollouts: int = 4) -> Groups:
    count = len(num_right)
    return Groups(
        np.full(count, 100), np.full((count, rollouts), 10), np.array(num_right, dtype=np.int64)
    )


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        # 2 of 3 groups on one of two replicas: 8 responses at 2 a second; half of them by algebra,
        # one a second for each of two workers.
        ("never", 4 + 2),
        # Half of 12 responses are open: 6, two at once, in three turns of 2 s and 10 tokens of 3 s.
        ("open", 4 + 2 + 3 * 32),
        # And half of the 7 wrong ones: 9.5, five turns.
        ("fallback", 4 + 2 + 5 * 32),
    ],
)
def test_grading_by_rules_and_by_a_judge(mode: str, wanted: float) -> None:
    workload = replace(ALIKE, open_fraction=0.5, algebra_fraction=0.5, judge_tokens=10)
    rates = machine(answers_per_second=2.0, algebra_per_second=1.0)
    config = config_of("teacher.max_concurrency=1", "reward.num_workers=2")
    # Two nodes, each with a server that takes one request.
    candidate = Candidate(config, Placement("served", 1), 2, 2)
    sampling = SamplingTime(network(), rates, workload)
    assert sampling.grade(candidate, groups([2, 3, 0]), mode) == pytest.approx(wanted)
    assert sampling.grade(candidate, groups([]), mode) == 0


def test_a_judge_of_its_own_and_none() -> None:
    workload = replace(ALIKE, open_fraction=1.0, judge_tokens=10)
    config = config_of(
        "reward.judge_endpoints=[http://a/v1,http://b/v1,http://c/v1]",
        "reward.judge_model=judge",
        "reward.judge=open",
        "teacher.max_concurrency=4",
    )
    sampling = SamplingTime(network(), machine(), workload)
    alone = Candidate(config, Placement("none"), 1, 1)
    # 12 replies at 12 places.
    assert sampling.grade(alone, groups([0, 0, 0]), "open") == pytest.approx(32)
    nobody = replace(alone, config=config_of())
    assert sampling.grade(nobody, groups([0, 0, 0]), "open") == pytest.approx(0)


def test_algebra_ends_with_its_budget() -> None:
    workload = replace(ALIKE, algebra_fraction=1.0)
    candidate = Candidate(config_of("reward.budget_seconds=3"), Placement("none"), 1, 1)
    sampling = SamplingTime(network(), machine(algebra_per_second=1.0), workload)
    assert sampling.grade(candidate, groups([0] * 5), "never") == pytest.approx(3)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        # Before the first step, and after steps 20, 40 ... 200.
        (("evaluation.interval=20",), 11),
        (("evaluation.interval=150",), 3),
        (("evaluation.interval=0",), 2),
    ],
)
def test_evaluations_are_divided_among_the_steps(options: tuple[str, ...], count: int) -> None:
    # 10 tokens through 4 layers and the output layer of a second each; 128 questions at 64 at once.
    found = seconds(
        (*options, "evaluation.num_questions=128", "rollout.max_batch_size=64"),
        machine(decode=PassRates(layer_seconds=1.0)),
    )
    assert found.evaluation == pytest.approx(2 * 10 * (LAYERS + 1) * count / 200)
    # Eight groups of eight rollouts, at once.
    assert found.plain == pytest.approx(10 * (LAYERS + 1))


def test_without_held_out_questions_nothing_is_evaluated() -> None:
    own = ("data.train=[{path: shards}]",)
    rates = machine(decode=PassRates(layer_seconds=1.0))
    assert seconds(own, rates).evaluation == 0
    # Every ten steps by default here.
    with_held_out = (*own, "data.held_out=[{path: shards}]", "evaluation.num_questions=0")
    # 500 questions are assumed, 128 at once.
    assert seconds(with_held_out, rates).evaluation == pytest.approx(4 * 50 * 21 / 200)


# Eight groups of eight samples of 110 tokens: two to a pack of 220.
PACKS, PACKED = 32, ("train.micro_batch_tokens=220", "model.recompute=none")


def test_old_log_probs_are_one_pass_where_an_update_is_three() -> None:
    rates = machine(train=PassRates(layer_seconds=1.0))
    plain = seconds(PACKED, rates)
    assert (plain.old_logprobs, plain.update) == (0, pytest.approx(3 * PACKS * LAYERS))
    for option in ("algorithm.importance_cap=2", "algorithm.rejection_bound=2"):
        corrected = seconds((*PACKED, option), rates)
        assert corrected.old_logprobs == pytest.approx(PACKS * LAYERS)
        assert corrected.update == plain.update
    # What servers sample is corrected unless it is turned off.
    served = (*PACKED, "rollout.engine=vllm", "rollout.servers=1")
    assert seconds(served, rates, vllm_gpus=1).old_logprobs == pytest.approx(PACKS * LAYERS)
    off = (*served, "algorithm.importance_level=none")
    assert seconds(off, rates, vllm_gpus=1).old_logprobs == 0


def test_a_teachers_response_needs_old_log_probs_and_its_own_length() -> None:
    rates = machine(train=PassRates(layer_seconds=1.0))
    hard = replace(ALIKE, pass_rate=1e-9, teacher_pass_rate=1.0)
    # Nothing to learn from: all rollouts are wrong.
    assert seconds(PACKED, rates, hard).update == pytest.approx(0)
    injected = seconds((*PACKED, "method=inject"), rates, hard, Placement("served", 1))
    # Every group has seven samples of 110 tokens and one of 120: 28 packs of two, and as two of 120
    # make no pack of 220, a pack for each of these.
    assert injected.old_logprobs == pytest.approx((28 + 8) * LAYERS)
    assert injected.update == pytest.approx(3 * (28 + 8) * LAYERS)


def test_distillation_trains_on_all_and_computes_the_teacher_in_every_pack() -> None:
    rates = machine(train=PassRates(layer_seconds=1.0))
    hard = replace(ALIKE, pass_rate=1e-9, teacher_pass_rate=1.0)
    on_policy = (*PACKED, "method=on_distill")
    found = seconds(on_policy, rates, hard, Placement("in turn"))
    # Six layers of the teacher, once.
    assert found.update == pytest.approx(PACKS * (3 * LAYERS + 6))
    assert found.old_logprobs == 0
    off_policy = (
        *PACKED,
        "method=off_distill",
        "distill.top_k=20",
        "teacher.endpoints=[http://a/v1]",
        "teacher.model=big",
        "train.micro_batch_tokens=240",
    )
    served = seconds(off_policy, rates, hard, Placement("served", 1))
    # Four answers of each of eight questions, two to a pack; the server sends its log-probs.
    assert served.update == pytest.approx(16 * 3 * LAYERS)
    # 32 requests at once of 2 s and 20 tokens of 3 s, while nothing is sampled.
    assert (served.plain, served.teacher) == (0, pytest.approx(62))


def test_what_a_teacher_got_wrong_is_in_no_pack() -> None:
    candidate = Candidate(
        config_of(*PACKED, "train.micro_batch_tokens=110"), Placement("none"), 1, 1
    )
    rates = machine(train=PassRates(layer_seconds=1.0))
    trained = Groups(np.full(2, 100), np.array([[10, 0], [10, 10]]), np.array([1, 2]))
    update = UpdateTime(network(), rates, ALIKE).update(candidate, trained, num_parameters=10)
    # Three samples of 110 tokens, one to a pack.
    assert update == pytest.approx(3 * 3 * LAYERS)


def test_slow_gpus_are_waited_for() -> None:
    rates = machine(train=PassRates(layer_seconds=1.0), decode=PassRates(layer_seconds=1.0))
    slow = replace(ALIKE, slow_fraction=1.0, slowdown=3.0)
    even, late = (seconds(PACKED, rates, each, num_ranks=2) for each in (ALIKE, slow))
    assert even.plain > 0
    assert even.update > 0
    assert late.plain == pytest.approx(3 * even.plain)
    assert late.update == pytest.approx(3 * even.update)
    # Of many GPUs a part is slow, and a replica is as slow as its slowest.
    some = replace(ALIKE, slow_fraction=0.1)
    for tensor, fraction in ((1, 0.1), (4, 1 - 0.9**4)):
        options = (f"parallel.tensor_model_parallel_size={tensor}",)
        candidate = Candidate(config_of(*options), Placement("none"), 8192, 1024)
        slowdowns = candidate.slowdowns(some)
        # The standard error of a share among 2,048 is at most 1.1 points.
        assert slowdowns.count(1.5) / len(slowdowns) == pytest.approx(fraction, abs=0.035)


SERVED = ("rollout.engine=vllm", "rollout.servers=1", "algorithm.importance_level=none")


def test_servers_sample_by_their_own_rates() -> None:
    rates = machine(
        decode=PassRates(layer_seconds=100.0),
        vllm=ServerRates(layer_seconds=1.0),
        host_bandwidth=10.0,
    )
    found = seconds(SERVED, rates, vllm_gpus=1)
    # A prompt's pass through four layers, then ten tokens through five.
    assert found.plain == pytest.approx(LAYERS + 10 * (LAYERS + 1))
    # Ten parameters of two bytes, written and read.
    assert found.sync == pytest.approx(2 * 20 / 10)
    # Two prompts at once, in four turns.
    few = seconds((*SERVED, "rollout.max_concurrency=2"), rates, vllm_gpus=1)
    assert few.plain == pytest.approx(LAYERS + 4 * 50)
    assert seconds(SERVED, rates, vllm_gpus=4).plain == pytest.approx(found.plain)


def test_rollouts_that_overlap_an_update_wait_for_the_rest_alone() -> None:
    rates = machine(train=PassRates(layer_seconds=0.1), vllm=ServerRates(layer_seconds=1.0))
    # Rollouts of earlier weights are corrected.
    options = (*SERVED[:2], *PACKED)
    one, two = (
        seconds((*options, f"rollout.max_staleness={steps}"), rates, vllm_gpus=1)
        for steps in (0, 1)
    )
    # 54 s of sampling, 38.4 s of an update after 12.8 of old log-probs.
    assert one.plain == pytest.approx(54)
    assert one.update + one.old_logprobs == pytest.approx(0.1 * 4 * PACKS * LAYERS)
    assert two.plain == pytest.approx(54 - 51.2)
    slower = machine(train=PassRates(layer_seconds=1.0), vllm=ServerRates(layer_seconds=1.0))
    hidden = seconds((*options, "rollout.max_staleness=1"), slower, vllm_gpus=1)
    assert hidden.plain == 0


def test_the_longest_sample_may_be_a_teachers() -> None:
    longer = ("data.max_prompt_tokens=100", "rollout.max_response_tokens=50")
    longer += ("teacher.max_response_tokens=70",)
    assert longest_trained(config_of(*longer)) == (150, 50)
    assert longest_trained(config_of(*longer, "method=inject")) == (170, 70)
    shorter = (*longer[:2], "teacher.max_response_tokens=30")
    assert longest_trained(config_of(*shorter, "method=inject")) == (150, 50)
    assert longest_trained(config_of(*shorter, "method=off_distill")) == (130, 30)
    # Two candidates of 96 tokens; the teacher's own text is not trained on.
    shown = config_of(*longer, "method=bcq", "teacher.compression_max_tokens=96")
    assert longest_trained(shown) == (100 + 2 * 96 + 50, 50)
