"""The planner's simulation against cases counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from zppo_mm.config.load import load_config
from zppo_mm.planning.decoding import decode_seconds, serve_seconds
from zppo_mm.planning.machine import MachineRates, PassRates
from zppo_mm.planning.operations import DecodeStep, Work
from zppo_mm.planning.questions import QuestionSource, SimulatedRound
from zppo_mm.planning.workload import LengthAssumption, Workload

CLOCK = DecodeStep(fixed=1.0, weights=0.0, per_sequence=0.0, state=0.0, per_token=0.0)
"""Every step takes a second, whatever the batch."""


def test_equal_lengths_take_as_many_steps() -> None:
    assert decode_seconds([100] * 8, [5] * 8, 8, CLOCK) == 100


def test_a_straggler_is_waited_for() -> None:
    assert decode_seconds([10, 10, 10, 1000], [5] * 4, 4, CLOCK) == 1000


def test_a_free_place_is_taken_at_once() -> None:
    # Two places: 30 and 10; at 10 the next 10 begins, at 20 the last; the first ends at 30.
    assert decode_seconds([30, 10, 10, 10], [5] * 4, 2, CLOCK) == 30
    # In waves of two it would be 30 and 10.
    assert decode_seconds([30, 10, 10, 10], [5] * 4, 1, CLOCK) == 60


def test_a_step_takes_what_its_batch_and_cache_ask_for() -> None:
    step = DecodeStep(fixed=1.0, weights=3.0, per_sequence=1.0, state=10.0, per_token=100.0)
    # Three sequences: reading the weights and computing take the same.
    assert step.seconds(3, 7) == 1 + 3 + 30 + 700
    assert step.seconds(5, 0) == 1 + 5 + 50
    cached = DecodeStep(fixed=0.0, weights=0.0, per_sequence=0.0, state=0.0, per_token=1.0)
    # One sequence of 4 tokens after a prompt of 10: 10.5, 11.5, 12.5, 13.5 at the middle of a step.
    assert decode_seconds([4], [10], 1, cached) == 48
    # Beside one of 2 tokens: 2 steps of two sequences with 20 + 2 tokens, then 2 of one with 13.
    assert decode_seconds([4, 2], [10, 10], 2, cached) == 2 * 22 + 2 * 13


def test_requests_wait_for_a_place() -> None:
    # Two places: until 5 and 3; the third begins at 3, the last at 5, as it comes at 4.
    assert serve_seconds([0, 0, 0, 4], [5, 3, 10, 1], 2) == [5, 3, 13, 6]
    # The only one is free from 1 to 9.
    assert serve_seconds([0, 9], [1, 1], 1) == [1, 10]
    assert serve_seconds([], [], 2) == []


def test_work_is_calls_products_and_traffic() -> None:
    machine = MachineRates(matmul_flops=100.0, memory_bandwidth=10.0)
    rates = PassRates(matmul_efficiency=0.5, bandwidth_efficiency=0.5, layer_seconds=2.0)
    work = Work(flops=50.0, traffic=10.0, layers=3.0) + Work(flops=50.0)
    # 3 calls of 2 s; 100 operations at 50 a second; 10 bytes at 5 a second.
    assert work.seconds(machine, rates) == 6 + 2 + 2
    assert (work * 2).seconds(machine, rates) == 20


def test_lengths_are_lognormal_and_cut() -> None:
    random = np.random.default_rng(0)
    lengths = LengthAssumption(median=1000, sigma=1.0).draw(random, 20_000, 4000)
    assert lengths.min() >= 1
    assert lengths.max() == 4000
    # A median of 20,000 lognormal numbers has a standard error of 0.9 %.
    assert np.median(lengths) == pytest.approx(1000, rel=0.04)
    # ln 4 is 1.386 standard deviations: 8.3 % are longer.
    assert (lengths == 4000).mean() == pytest.approx(0.083, abs=0.01)
    assert set(LengthAssumption(median=7, sigma=0).draw(random, 5, 9).tolist()) == {7}


def source(*options: str, **workload: float) -> QuestionSource:
    config = load_config(None, ["method=zppo", "train.num_new_questions=384", *options])
    return QuestionSource(config, Workload(**workload))  # type: ignore[arg-type]


def first_round(*options: str, **workload: float) -> SimulatedRound:
    return source(*options, **workload).step(0).rounds[0]


def test_a_step_has_the_counts_of_the_paper() -> None:
    questions = source()
    (first,), (second,) = (questions.step(number).rounds for number in (0, 1))
    # 384 new questions, and from the second step on a quarter of that replayed and reformulated.
    assert len(first.plain) == 384
    assert len(second.plain) == 384 + 96
    assert len(second.reformulated) == second.num_bcq + second.num_ncq == 96
    # Hard are those with fewer than 4 of 8 right.
    assert (second.plain.num_right[second.asked] < 4).all()
    assert len(second.asked) == (second.plain.num_right < 4).sum()
    assert second.teacher_tokens.shape == (len(second.asked), 4)


def test_the_cap_keeps_both_prompts_of_the_hardest() -> None:
    # The teacher solves every question, so each of 48 has a BCQ with 2 candidates and an NCQ with
    # its wrong rollouts, 8 where none is right.
    step = first_round(teacher_pass_rate=1.0, pass_rate=0.02)
    assert (step.num_bcq, step.num_ncq) == (48, 48)
    assert step.num_rewrites <= 48 * (2 + 8)
    # It solves none: no BCQ.
    step = first_round(teacher_pass_rate=0.0, pass_rate=0.02)
    assert (step.num_bcq, step.num_ncq) == (0, 96)


@pytest.mark.parametrize(
    ("method", "has_teacher", "num_reformulated"),
    [("grpo", False, 0), ("ncq", False, 96), ("bcq", True, 96), ("hint_replay", True, 96)],
)
def test_methods_ask_for_what_they_show(
    method: str, has_teacher: bool, num_reformulated: int
) -> None:
    step = first_round(f"method={method}", teacher_pass_rate=1.0, pass_rate=0.1)
    assert len(step.reformulated) == num_reformulated
    assert (len(step.asked) > 0) == has_teacher == (step.teacher_tokens.size > 0)


def test_a_teachers_right_answer_takes_the_place_of_one_rollout() -> None:
    step = first_round("method=inject", teacher_pass_rate=1.0, pass_rate=0.02)
    assert len(step.reformulated) == 0
    assert step.is_awaited.all()
    # Every hard group has a right rollout now, so all of them can be learned from.
    assert step.num_injected == len(step.asked) > 300
    changed = step.trained.num_right > 0
    assert changed.all()
    # Most groups had none right.
    assert (step.trained.num_right == 1).sum() > 200
    nobody = first_round("method=inject", teacher_pass_rate=0.0, pass_rate=0.02)
    assert nobody.num_injected == 0
    assert len(nobody.trained) == nobody.plain.has_signal().sum()


def test_distillation_asks_about_all_and_trains_on_what_is_right() -> None:
    step = first_round("method=off_distill", teacher_pass_rate=0.0, teacher_pass_rate_easy=1.0)
    assert (len(step.plain), len(step.asked), step.asks_first) == (0, 384, True)
    assert step.is_awaited.all()
    # Of the questions that are not hard, about half, all four answers; of the hard ones none.
    assert 100 < len(step.trained) < 300
    assert (step.trained.num_right == 4).all()
    assert (step.trained.responses > 0).all()
    replayed = source("method=off_distill_replay")
    replayed.step(0)
    (second,) = replayed.step(1).rounds
    assert len(second.plain) == len(second.asked) == 384 + 96
    own = first_round("method=on_distill")
    assert len(own.trained) == len(own.plain) == 384


def test_dynamic_sampling_takes_rounds_until_enough_is_useful() -> None:
    options = ("method=grpo_replay", "zone.max_sampling_rounds=3")
    hopeless = source(*options, pass_rate=1e-9, pass_rate_spread=1e9).step(0)
    assert [len(each.plain) for each in hopeless.rounds] == [384] * 3
    assert len(hopeless.trained) == 0
    questions = source(*options)
    questions.step(0)
    step = questions.step(1)
    # Replayed questions come in the first round.
    assert [len(each.plain) for each in step.rounds][:2] == [384 + 96, 384]
    assert len(step.trained) == sum(len(each.trained) for each in step.rounds)
    # One of the 384 in two hundred and fifty-six has eight equal rollouts; two rounds are plenty.
    even = source(*options, pass_rate_spread=1e9).step(0)
    assert len(even.rounds) in (1, 2)


def test_an_evaluation_asks_what_is_configured() -> None:
    assert source(
        "evaluation.num_questions=7", "evaluation.num_rollouts=3"
    ).held_out().responses.shape == (7, 3)
    assert len(source("evaluation.num_questions=0").held_out()) == Workload().num_held_out
    assert len(source("data.train=[{path: shards}]").held_out()) == 0


def test_the_buffer_keeps_the_newest() -> None:
    questions = source("zone.buffer_capacity=100", pass_rate=0.02)
    for number in range(3):
        questions.step(number)
    assert len(questions.buffer) == 100
    easy = source(pass_rate=0.98, pass_rate_spread=1000.0)
    easy.step(0)
    assert len(easy.buffer) == 0


def test_the_same_seed_draws_the_same() -> None:
    one, two, other = (first_round(seed=seed) for seed in (3, 3, 4))
    assert (one.plain.responses == two.plain.responses).all()
    assert (one.teacher_tokens == two.teacher_tokens).all()
    assert (one.plain.responses != other.plain.responses).any()


def test_only_groups_with_signal_are_trained_on() -> None:
    step = source("method=grpo").step(0)
    groups = step.rounds[0].plain
    assert 0 < len(step.trained) < len(groups)
    assert len(step.trained) == ((groups.num_right > 0) & (groups.num_right < 8)).sum()
