"""The learning rate of every update: against transformers' schedules and the formulas, and the same
after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.support.training_example import TRAIN, Case, build_policy, make_batches
from tests.support.training_example import write_tiny_folder as write_folder
from zppo_mm.config.load import load_config
from zppo_mm.config.schema import TrainConfig
from zppo_mm.errors import ConfigError
from zppo_mm.training import checkpoint
from zppo_mm.training.optimizer import build_scheduler

WARMUP, UPDATES, LR = 3, 20, 4e-4
# Both are a few operations in double precision.
ROUNDING = 1e-12


def one_parameter() -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=LR)


def schedule(**settings: Any) -> list[float]:
    """Return the learning rate of every update, and of some after the last."""
    optimizer = one_parameter()
    train = TrainConfig(lr=LR, train_iters=UPDATES // 2, updates_per_step=2, **settings)
    scheduler = build_scheduler(optimizer, train)
    rates = []
    for _ in range(UPDATES + 5):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(increment=1)
    return rates


def of_transformers(make: Callable[[Any], Any], count: int = UPDATES + 5) -> list[float]:
    optimizer = one_parameter()
    scheduler = make(optimizer)
    rates = []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, WARMUP])
def test_it_is_that_of_transformers(warmup: int) -> None:
    constant = schedule(lr_warmup_updates=warmup)
    linear = schedule(lr_warmup_updates=warmup, lr_decay_style="linear")
    cosine = schedule(lr_warmup_updates=warmup, lr_decay_style="cosine")
    assert constant == pytest.approx(
        of_transformers(lambda each: transformers.get_constant_schedule_with_warmup(each, warmup)),
        abs=ROUNDING,
    )
    assert linear == pytest.approx(
        of_transformers(
            lambda each: transformers.get_linear_schedule_with_warmup(each, warmup, UPDATES)
        ),
        abs=ROUNDING,
    )
    # After its end, which a run does not reach, transformers' cosine rises again.
    assert cosine[: UPDATES + 1] == pytest.approx(
        of_transformers(
            lambda each: transformers.get_cosine_schedule_with_warmup(each, warmup, UPDATES),
            UPDATES + 1,
        ),
        abs=ROUNDING,
    )
    assert cosine[UPDATES:] == [0.0] * 5


def test_it_falls_to_its_minimum_over_the_chosen_updates() -> None:
    settings: dict[str, Any] = {"min_lr": 1e-4, "lr_decay_updates": 10, "lr_warmup_updates": 2}
    linear = schedule(lr_decay_style="linear", **settings)
    cosine = schedule(lr_decay_style="cosine", **settings)
    # A rise over 2 updates, half way down after 4 of the 8 that follow: (4e-4 + 1e-4) / 2.
    for rates in (linear, cosine):
        assert rates[:3] == pytest.approx([0.0, 2e-4, 4e-4], abs=ROUNDING)
        assert rates[6] == pytest.approx(2.5e-4, abs=ROUNDING)
        assert rates[10:] == [1e-4] * (UPDATES + 5 - 10)
    # After a quarter: 3e-4 * 3/4 + 1e-4, and 3e-4 * (1 + cos(pi/4)) / 2 + 1e-4.
    assert linear[4] == pytest.approx(3.25e-4, abs=ROUNDING)
    assert cosine[4] == pytest.approx(1e-4 + 3e-4 * (1 + math.cos(math.pi / 4)) / 2, abs=ROUNDING)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.medium
def test_a_resumed_run_goes_on_along_the_same_curve(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "source")
    train = replace(
        TRAIN, lr_decay_style="cosine", min_lr=2e-3, lr_warmup_updates=1, lr_decay_updates=6
    )
    case = Case(train=train)
    policy = build_policy(folder, case)
    batches = make_batches(case)
    whole = [update for _ in range(3) for update in policy.train_step(batches).updates]
    # Two updates a step; the last has 5 behind it, of which 4 are of the 5 that fall.
    last = 2e-3 + (train.lr - 2e-3) * (1 + math.cos(math.pi * 4 / 5)) / 2
    assert whole[-1].learning_rate == pytest.approx(last, abs=ROUNDING)

    begun = build_policy(folder, case)
    begun.train_step(batches)
    checkpoint.save(tmp_path / "checkpoints", 1, begun, {"step": 1}, keep=1)
    resumed = build_policy(folder, case)
    checkpoint.load_latest(tmp_path / "checkpoints", resumed)
    rest = [update for _ in range(2) for update in resumed.train_step(batches).updates]
    assert [each.learning_rate for each in rest] == [each.learning_rate for each in whole[2:]]
    assert [each.loss for each in rest] == [each.loss for each in whole[2:]]

    # With another curve, the updates that are done count on it.
    slower = build_policy(folder, replace(case, train=replace(train, lr_decay_style="linear")))
    checkpoint.load_latest(tmp_path / "checkpoints", slower)
    [first, _] = slower.train_step(batches).updates
    assert first.learning_rate == pytest.approx(
        2e-3 + (train.lr - 2e-3) * (1 - 1 / 5), abs=ROUNDING
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["train.min_lr=1e-7"], "train.min_lr: nothing falls, got 1e-07"),
        (["train.lr_decay_updates=9"], "train.lr_decay_updates: nothing falls, got 9"),
        (
            ["train.lr_decay_style=cosine", "train.min_lr=1", "train.lr=0.5"],
            "train.min_lr: above the learning rate, got 1 with train.lr=0.5",
        ),
        (
            [
                "train.lr_decay_style=linear",
                "train.lr_decay_updates=4",
                "train.lr_warmup_updates=4",
            ],
            "train.lr_warmup_updates: no updates are left for the decay, got 4 of 4",
        ),
        (["train.lr_decay_style=wsd"], "train.lr_decay_style: not a choice, got 'wsd'"),
    ],
)
def test_what_contradicts_itself_is_refused(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, options)
