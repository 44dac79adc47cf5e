"""Calibration: rates are found again from passes that they made, and the file reads back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from zppo_mm.config.schema import ParallelConfig
from zppo_mm.parallel import groups
from zppo_mm.planning.calibration import (
    algebra_per_second,
    answers_per_second,
    fit,
    write_rates,
)
from zppo_mm.planning.machine import MachineRates, PassRates, load_machine
from zppo_mm.planning.measured import (
    Timed,
    reference_architecture,
    timed_decoding,
    timed_update,
)
from zppo_mm.planning.operations import Work

MACHINE = MachineRates(matmul_flops=100e9, memory_bandwidth=20e9)
WORKS = [
    Work(flops, traffic, layers)
    for flops in (1e9, 50e9)
    for traffic in (1e8, 9e9)
    for layers in (10, 200)
]


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    groups.initialize(ParallelConfig(), seed=0)
    yield
    groups.shutdown()


def test_rates_are_found_from_what_they_take() -> None:
    rates = PassRates(matmul_efficiency=0.6, bandwidth_efficiency=0.3, layer_seconds=2e-3)
    found = fit([Timed(work, work.seconds(MACHINE, rates)) for work in WORKS], MACHINE)
    assert found.matmul_efficiency == pytest.approx(0.6)
    assert found.bandwidth_efficiency == pytest.approx(0.3)
    assert found.layer_seconds == pytest.approx(2e-3)


def test_no_rate_is_negative() -> None:
    # Traffic that seems to save time: it costs nothing instead.
    timed = [Timed(work, work.flops / 50e9 - work.traffic / 1e12 + 1e-3) for work in WORKS]
    found = fit(timed, MACHINE)
    assert found.bandwidth_efficiency == pytest.approx(20)
    assert 0.4 < found.matmul_efficiency < 0.8
    assert found.layer_seconds > 0


def test_the_file_reads_back(tmp_path: Path) -> None:
    rates = replace(MACHINE, name="mine", train=PassRates(layer_seconds=0.25))
    write_rates(rates, tmp_path / "rates.yaml")
    assert load_machine(str(tmp_path / "rates.yaml")) == rates


def test_passes_are_timed_beside_their_work() -> None:
    architecture = reference_architecture(64, 4)
    sampled = timed_decoding(architecture, "float32", batch=4, prompt_tokens=8, num_tokens=8)
    # 8 steps of 4 layers and the output layer.
    assert sampled.work.layers == 8 * 5
    trained = timed_update(architecture, "float32", num_samples=4, tokens=16, pack=32)
    # Two packs of two samples; forward pass and two backward products of 4 layers.
    assert trained.work.layers == 2 * 3 * 4
    assert trained.seconds > 0


def test_grading_is_timed() -> None:
    # By rules 58,000 answers a second, by algebra 24 on a quiet machine: three orders apart.
    rules, algebra = answers_per_second(50), algebra_per_second(3)
    assert rules > 10 * algebra > 0
