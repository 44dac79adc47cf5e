"""Plans of the paper's recipes, refused layouts, and the files of rates and assumptions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from tests.support.published_sizes import PUBLISHED
from zppo_mm.config.load import load_config
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.errors import ConfigError
from zppo_mm.models.families.architecture import Architecture, parse_architecture
from zppo_mm.parallel import groups
from zppo_mm.planning.machine import load_machine
from zppo_mm.planning.plan import Plan, format_plan, make_plan
from zppo_mm.planning.workload import load_workload

RECIPES = Path(__file__).parents[2] / "examples" / "paper"
SIZES = ("0.8B", "2B", "4B", "9B")
GIB = 1 << 30
# One step and few questions: what is compared does not depend on their number.
FEWER = ("train.num_new_questions=96",)


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    groups.initialize(ParallelConfig(), seed=0)
    yield
    groups.shutdown()


def student(size: str) -> Architecture:
    return parse_architecture(PUBLISHED[f"Qwen3.5-{size}"][0])


@cache
def plan(size: str, num_gpus: int, machine: str = "H100-80GB", *options: str) -> Plan:
    config = load_config(RECIPES / f"{size.lower()}.yaml", [*FEWER, *options])
    workload = replace(load_workload(None), num_steps=2)
    return make_plan(student(size), config, num_gpus, load_machine(machine), workload)


@pytest.mark.parametrize("num_gpus", [8, 64])
@pytest.mark.parametrize("size", SIZES)
def test_every_student_of_the_paper_has_a_layout(size: str, num_gpus: int) -> None:
    made = plan(size, num_gpus)
    assert made.layouts
    usable = load_machine("H100-80GB").memory_gib * 0.8 * GIB
    for each in made.layouts:
        memory = each.candidate.memory
        assert memory is not None
        assert memory.peak <= usable
    totals = [each.seconds.total for each in made.layouts]
    assert totals == sorted(totals)
    assert totals[0] > 0


def test_every_refused_layout_has_its_reason() -> None:
    made = plan("9B", 8)
    reasons = " / ".join(each.refusal for each in made.refused)
    assert "num_key_value_heads cannot be split, got 4 over 8 ranks" in reasons
    assert "student ranks do not divide by tensor x pipeline x context" in reasons
    # 9.4 billion parameters on a rank: 18 GiB of weights, 35 of gradients, and the optimizer.
    assert "of 63.3 usable: gradients" in reasons
    shown = format_plan(made, 200, 5)
    assert "parallel.tensor_model_parallel_size=" in shown
    assert "further reasons are not shown" in shown


def test_no_layout_of_a_small_machine_is_planned(tmp_path: Path) -> None:
    text = "name: tiny\nmemory_gib: 1.0\n"
    path = tmp_path / "rates.yaml"
    path.write_text(text, encoding="utf-8")
    made = plan("9B", 8, str(path))
    assert not made.layouts
    assert format_plan(made, 200, 3).startswith("No layout fits.")


def test_more_gpus_are_not_slower_and_larger_students_not_faster() -> None:
    eight, many = (plan("2B", gpus).layouts[0].seconds for gpus in (8, 64))
    assert many.total < eight.total
    assert many.update < eight.update
    assert plan("9B", 64).layouts[0].seconds.update > many.update


def test_a_slower_teacher_is_waited_for() -> None:
    # Without rewrites, which would be further requests.
    config = load_config(
        RECIPES / "2b.yaml", [*FEWER, "teacher.compressor=rule", "reward.judge=never"]
    )
    workload = replace(load_workload(None), num_steps=2)
    slow = replace(workload, teacher=replace(workload.teacher, latency_seconds=1000.0))
    machine = load_machine("H100-80GB")
    # Sampling is too quick to hide the teacher.
    machine.decode.layer_seconds = 1e-4
    quick, late = (
        make_plan(student("2B"), config, 8, machine, each).layouts[0].seconds
        for each in (workload, slow)
    )
    assert late.teacher > quick.teacher + 900
    assert late.update == quick.update


def test_the_same_plan_twice() -> None:
    config = load_config(RECIPES / "0.8b.yaml", [*FEWER])
    machine, workload = load_machine("h200-141gb"), replace(load_workload(None), num_steps=2)
    one, two = (
        format_plan(make_plan(student("0.8B"), config, 8, machine, workload), 200, 4)
        for _ in range(2)
    )
    assert one == two


def test_methods_without_a_teacher_use_all_gpus() -> None:
    made = plan("2B", 8, "H100-80GB", "method=grpo", "reward.judge=never")
    assert {each.candidate.placement.kind for each in made.layouts} == {"none"}
    assert {each.candidate.num_student_ranks for each in made.layouts} == {8}
    assert made.layouts[0].seconds.reformulated == made.layouts[0].seconds.teacher == 0


def test_gpus_are_whole_nodes() -> None:
    with pytest.raises(ConfigError, match="--gpus: no whole nodes, got 12"):
        plan("2B", 12)


def test_an_unknown_machine_is_refused() -> None:
    message = r"--gpu: nothing is known.*got 'A100-80GB'.*H100-80GB.*--calibrate FILE.*collectives"
    with pytest.raises(ConfigError, match=message):
        load_machine("A100-80GB")


VLLM = ("rollout.engine=vllm", "rollout.servers=1")


def test_sampling_by_vllm_is_planned_with_measured_rates_alone() -> None:
    with pytest.raises(ConfigError, match=r"vLLM samples.*got H100-80GB.*vllm bench latency"):
        plan("2B", 8, "H100-80GB", *VLLM)
    config = load_config(RECIPES / "2b.yaml", [*FEWER, *VLLM, "train.micro_batch_tokens=16384"])
    machine = load_machine("H100-80GB")
    machine.vllm.layer_seconds = 1e-4
    workload = replace(load_workload(None), num_steps=2)
    made = make_plan(student("2B"), config, 8, machine, workload, (2,))
    best = made.layouts[0]
    # Two GPUs for the teacher, some for servers, the others train; these hold no cache.
    assert {each.candidate.vllm_gpus_per_node for each in made.layouts} <= {1, 2, 4}
    for each in made.layouts:
        candidate = each.candidate
        assert candidate.num_student_ranks == 8 - 2 - candidate.vllm_gpus_per_node
        assert candidate.memory is not None
        assert candidate.memory.cache == 0
    assert best.seconds.old_logprobs > 0
    assert f"vllm {best.candidate.vllm_gpus_per_node}/node" in format_plan(made, 200, 1)
    assert "cache_memory_gib" not in format_plan(made, 200, 1)


def test_adapters_are_not_planned() -> None:
    with pytest.raises(ConfigError, match=r"lora.rank: .*got 8, expected 0"):
        plan("2B", 8, "H100-80GB", "lora.rank=8")


def test_distillation_has_its_teacher_on_the_students_ranks() -> None:
    made = plan("0.8B", 8, "H200-141GB", *ON_DISTILL)
    assert {each.candidate.placement.kind for each in made.layouts} == {"in turn"}
    assert {
        each.candidate.config.parallel.pipeline_model_parallel_size for each in made.layouts
    } == {1}
    assert "distillation computes the teacher on one pipeline stage" in {
        each.refusal for each in made.refused
    }


ON_DISTILL = (
    "method=on_distill",
    "teacher.model=models/Qwen3.5-27B",
    "teacher.endpoints=[]",
    "reward.judge=never",
    "train.micro_batch_tokens=16384",
)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("matmul_flops: -1.0\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"wrong.yaml: matmul_flops: out of range, got -1"):
        load_machine(str(path))
    path.write_text("pass_rates: 0.5\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="pass_rates"):
        load_workload(path)
