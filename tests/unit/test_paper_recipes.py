"""The recipes and the comparison of examples/paper have the paper's values, fit the published
shapes, and fit into the memory of the GPUs that they name.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.paper_values import HYPERPARAMETERS
from tests.support.published_sizes import PUBLISHED
from tests.support.tools import load_tool
from zppo_mm.comparison.plan import load_plan
from zppo_mm.config.keys import walk
from zppo_mm.config.load import load_config
from zppo_mm.config.schema import ParallelConfig, RunConfig
from zppo_mm.errors import ConfigError
from zppo_mm.methods import METHODS
from zppo_mm.models.families.architecture import Architecture, check_layout, parse_architecture
from zppo_mm.parallel import groups
from zppo_mm.planning.memory import estimate_memory, format_estimate, rank_parameters
from zppo_mm.planning.operations import linear_parameters
from zppo_mm.run.shared import longest_prompt

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "paper"
SIZES = ("0.8B", "2B", "4B", "9B")
STUDENT_RANKS = 48
# More than the bundled prompts have around a question or a response.
INSTRUCTION_TOKENS = 512
# What a run of the comparison changes of the recipe, beside what its method says.
COMPARED: dict[str, dict[str, Any]] = {
    "grpo": {"method": "grpo"},
    "grpo_replay": {"method": "grpo_replay"},
    "bcq": {"method": "bcq"},
    "bcq_replay": {"method": "bcq_replay"},
    "ncq": {"method": "ncq"},
    "ncq_replay": {"method": "ncq_replay"},
    "bcq_ncq": {"method": "bcq_ncq"},
    "zppo": {},
    "hint_replay": {"method": "hint_replay"},
    "prefix_replay": {"method": "prefix_replay"},
    "off_distill_replay": {
        "method": "off_distill_replay",
        "train.updates_per_step": 1,
        "distill.top_k": 20,
    },
    "on_distill_replay": {
        "method": "on_distill_replay",
        "train.updates_per_step": 1,
        "teacher.model": "models/Qwen3.5-27B",
        "teacher.endpoints": [],
        "reward.judge_model": "Qwen3.5-27B",
        "reward.judge_endpoints": ["http://localhost:8000/v1"],
        "parallel.tensor_model_parallel_size": 2,
        "parallel.sequence_parallel": True,
    },
    "zppo_1_update": {"train.updates_per_step": 1},
    "zppo_8_updates": {"train.updates_per_step": 8},
    "zppo_16_updates": {"train.updates_per_step": 16},
    "zppo_none": {"algorithm.advantage_normalization": "none"},
    "zppo_all": {"algorithm.advantage_normalization": "all"},
}
GIB = 1 << 30
# An H100 has 80 GiB; a fifth is for what the estimate leaves out.
USABLE_GIB = 64.0

# Source: the paper's tables of hyperparameters (arXiv 2606.18216), by our keys.
PAPER: dict[str, Any] = HYPERPARAMETERS | {
    "reward.judge": "open",
    "evaluation.judge": "fallback",
    "data.image_min_pixels": 256 * 32 * 32,
    "data.image_max_pixels": 1280 * 32 * 32,
    "model.params_dtype": "bfloat16",
}


def recipe(size: str) -> RunConfig:
    return load_config(FOLDER / f"{size.lower()}.yaml")


def student(size: str) -> Architecture:
    return parse_architecture(PUBLISHED[f"Qwen3.5-{size}"][0])


def value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    groups.initialize(ParallelConfig(), seed=0)
    yield
    groups.shutdown()


@pytest.mark.parametrize("size", SIZES)
def test_the_recipe_has_the_papers_values_and_says_them(size: str) -> None:
    config = recipe(size)
    assert {key: value(config, key) for key in PAPER} == PAPER
    text = (FOLDER / f"{size.lower()}.yaml").read_text(encoding="utf-8")
    assert [key for key in PAPER if f"{key.split('.')[-1]}: " not in text] == []
    assert config.teacher.endpoints
    assert config.model.chat_template_kwargs == {"enable_thinking": True}
    assert config.model.student.endswith(f"Qwen3.5-{size}")


@pytest.mark.parametrize("size", SIZES)
def test_the_layout_fits_the_published_shapes(size: str) -> None:
    config = recipe(size)
    check_layout(student(size), config.parallel)
    replicas = STUDENT_RANKS // config.parallel.tensor_model_parallel_size
    # Equal work: as many new questions for every replica.
    assert config.train.num_new_questions % replicas == 0


@pytest.mark.parametrize("size", SIZES)
def test_the_run_fits_into_memory(size: str) -> None:
    estimate = estimate_memory(student(size), recipe(size), STUDENT_RANKS)
    assert estimate.peak / GIB < USABLE_GIB, format_estimate(estimate)


def test_the_estimate_by_hand() -> None:
    estimate = estimate_memory(student("0.8B"), recipe("0.8B"), STUDENT_RANKS)
    # 853 million parameters; 2, 4 and 12 bytes each, the last shared by 48 ranks.
    parameters = 852_985_920
    assert estimate.weights == 2 * parameters
    assert estimate.gradients == 4 * parameters
    assert estimate.optimizer == 12 * parameters // 48
    # Chunks of 2^27 logits of 16 bytes; 248,320 entries of 1,024 numbers in 4 and in 2 bytes;
    # hidden states of 16,384 tokens and their gradient.
    assert estimate.output == 2**27 * 16 + 248320 * 1024 * 6 + 16384 * 1024 * 2 * 2
    # 4,096 plain tokens and 8 wrong rollouts of 512; then 12,288 of the response. 6 attention
    # layers keep 2 heads of 256 for keys and for values in 2 bytes, 18 DeltaNet layers keep 16
    # heads of 128 x 128 in 4 bytes and 4 inputs of 3 x 2,048 channels in 2; 128 sequences.
    assert longest_prompt(recipe("0.8B")) == 4096 + 8 * 512
    slots = 4096 + 4096 + 12288
    # The rollouts of 16 prompts share these.
    states = 18 * (16 * 128 * 128 * 4 + 4 * 3 * 16 * 128 * 2)
    keys = 6 * 2 * 2 * 256 * 2
    config = load_config(FOLDER / "0.8b.yaml", ["rollout.cache_memory_gib=64"])
    unbounded = estimate_memory(student("0.8B"), config, STUDENT_RANKS)
    assert unbounded.cache == (16 * 8192 + 128 * 12288) * keys + 128 * states
    assert estimate.cache == 16 * GIB < unbounded.cache
    # The delta rule in float32: queries and keys before and after normalisation, 6 x 64 + 3 numbers
    # a head, both sides of the triangular system (values and keys), the writes, keys and queries of
    # the scan, the values again, and a state and a transition of 128 x 128 a head for 64 tokens.
    rule = 4 * 2048 + 16 * 387 + 2 * 4096 + 2048 + 2 * 2048 + 2048 + 2 * 16 * 128 * 128 // 64
    # Around it: the convolution's inputs and outputs, three gates, the output in 2 bytes, and 5
    # tensors of the gated norm in 4.
    delta = 2 * 6144 * 2 + 3 * 16 * 4 + 2048 * 2 + 5 * 2048 * 4 + rule * 4
    # Two norms: two tensors in 4 bytes, one in 2, a factor. The MLP: 5 x 3,584 in 2.
    inside = 2 * (1024 * 10 + 4) + delta + 5 * 3584 * 2
    # Inputs of 24 layers of 1,024; the rotary table; the last norm.
    assert estimate.activations == slots * (24 * 1024 * 2 + 2 * 64 * 4 + 8 * 1024 + inside)
    # 4 patches for each of 4,096 tokens. Inputs of 12 blocks of 768 and the inside of one: 11
    # vectors of 768, 2 of 3,072, denominators of 12 heads; then pixels, 4 vectors, rotary tables.
    per_patch = 12 * 2 * 768 + 2 * (11 * 768 + 2 * 3072) + 4 * 12
    per_patch += 2 * (16 * 16 * 2 * 3 + 4 * 768) + 2 * 4 * 64
    assert estimate.vision == 4 * 4096 * per_patch


def test_the_tower_costs_what_is_trained_of_the_largest_micro_batch_or_prompt() -> None:
    def vision(*options: str) -> int:
        config = load_config(FOLDER / "9b.yaml", list(options))
        return estimate_memory(student("9B"), config, STUDENT_RANKS).vision

    assert vision("train.micro_batch_patches=1") == vision()
    assert vision("train.micro_batch_patches=32768") == 2 * vision()
    assert vision("data.max_prompt_tokens=8192") == 2 * vision()
    assert vision("model.recompute_vision=none") > 9 * vision()
    assert vision("train.freeze=[vision]") == 0


def test_tensor_ranks_divide_what_grows_with_the_layers() -> None:
    config = recipe("9B")
    one = estimate_memory(student("9B"), load_like(config, 1), STUDENT_RANKS)
    two = estimate_memory(student("9B"), load_like(config, 2), STUDENT_RANKS)
    weight_gradient = 248320 * 4096 * 6
    assert one.output - two.output == weight_gradient // 2
    assert two.cache == one.cache // 2
    assert 0.5 < two.weights / one.weights < 0.55  # the vision tower is whole on both


def test_moments_in_bfloat16_are_float32_during_an_update_alone() -> None:
    path = FOLDER / "0.8b.yaml"
    exact = estimate_memory(student("0.8B"), load_config(path), STUDENT_RANKS)
    config = load_config(path, ["train.optimizer_state_dtype=bfloat16"])
    rounded = estimate_memory(student("0.8B"), config, STUDENT_RANKS)
    # Two moments of 2 instead of 4 bytes, divided by 48 ranks.
    saved = 4 * 852_985_920 // 48
    assert (exact.optimizer - rounded.optimizer, exact.update, rounded.update) == (saved, 0, saved)
    assert exact.peak - rounded.peak == saved


def test_an_offloaded_optimizer_makes_room_for_the_cache() -> None:
    path = FOLDER / "9b.yaml"
    kept = estimate_memory(student("9B"), load_config(path), STUDENT_RANKS)
    config = load_config(path, ["parallel.offload_optimizer=true"])
    away = estimate_memory(student("9B"), config, STUDENT_RANKS)
    assert away.offloaded == away.gradients + away.optimizer > kept.offloaded == 0
    # While sampling there are only the weights and the cache; an update needs what it did.
    update = kept.activations + kept.vision + kept.output
    resident = kept.weights + kept.gradients + kept.optimizer
    assert away.peak == max(resident + update, kept.weights + kept.cache)
    assert kept.peak == resident + max(update, kept.cache)


@pytest.mark.parametrize(
    ("tensor", "resident", "offloaded", "host"),
    [(1, 70.6, 18.8, 14.1), (2, 44.4, 9.9, 14.8), (4, 32.3, 5.4, 16.2)],
)
def test_what_the_9b_keeps_on_8_gpus_while_sampling(
    tensor: int, resident: float, offloaded: float, host: float
) -> None:
    """The table of docs/measurements.md, in GB."""
    options = [
        f"parallel.tensor_model_parallel_size={tensor}",
        f"parallel.sequence_parallel={str(tensor > 1).lower()}",
        "parallel.offload_optimizer=true",
    ]
    found = estimate_memory(student("9B"), load_config(FOLDER / "9b.yaml", options), 8)
    kept = found.weights + found.gradients + found.optimizer
    sizes = (kept, kept - found.offloaded, found.optimizer)
    assert tuple(round(size / 1e9, 1) for size in sizes) == (resident, offloaded, host)


def test_the_comparison_changes_only_what_it_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = load_plan(FOLDER / "compare.yaml")
    assert plan.labels == tuple(COMPARED)
    for run in plan.runs:
        changes = COMPARED[run.label]
        method = METHODS[changes.get("method", "zppo")]
        expected = {key: own for key, _, own in walk(recipe("0.8B"))}
        expected |= {**method.settings, **changes}
        made = {key: own for key, _, own in walk(run.config)}
        named = {"name", "output_dir"}
        differing = {
            key: (made.get(key), expected.get(key))
            for key in {*made, *expected} - named
            if made.get(key) != expected.get(key)
        }
        assert differing == {}, run.label


def test_what_the_teacher_takes_in_bfloat16_and_in_fp8() -> None:
    """The row of docs/scaling.md, in GB."""
    teacher = parse_architecture(PUBLISHED["Qwen3.5-27B"][0])
    (whole, *_) = rank_parameters(teacher)
    assert (whole.tensor, whole.pipeline) == (1, 1)
    assert round(2 * whole.num_parameters / 1e9, 1) == 54.7
    # FP8 are the linear layers of the decoder, but for beta and alpha of 48 heads.
    narrow = teacher.layer_types.count("linear_attention") * 2 * 48 * teacher.hidden_size
    in_fp8 = linear_parameters(teacher) - narrow
    rest = whole.num_parameters - in_fp8
    assert (round(in_fp8 / 1e9, 1), round((in_fp8 + 2 * rest) / 1e9, 1)) == (24.3, 30.4)


def test_every_run_of_the_comparison_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for run in load_plan(FOLDER / "compare.yaml").runs:
        check_layout(student("0.8B"), run.config.parallel)
        peak = estimate_memory(student("0.8B"), run.config, STUDENT_RANKS).peak
        if not run.config.teacher.endpoints:
            # The teacher's bfloat16 weights, halved by tensor parallelism.
            peak += 27_357_000_000 * 2 // 2
        assert peak / GIB < USABLE_GIB, run.label


def test_one_node_of_eight_gpus_runs_an_eighth_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8").replace("\\\n", " ")
    command = next(line for line in page.splitlines() if "paper/compare.yaml train." in line)
    _, _, options = command.partition("paper/compare.yaml ")
    for run in load_plan(FOLDER / "compare.yaml", shlex.split(options)).runs:
        train, zone = run.config.train, run.config.zone
        assert train.num_new_questions == 384 // 8
        # As the buffer of 10,000 questions to steps of 384.
        assert zone.buffer_capacity == 10_000 // 8
        assert not any("node" in url for url in run.config.teacher.endpoints)


@pytest.mark.parametrize("size", SIZES)
def test_eight_gpus_have_room_with_the_options_of_the_page(size: str) -> None:
    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith(f"| {size} | `"))
    _, _, options, room, _ = row.split("|")
    config = load_config(FOLDER / f"{size.lower()}.yaml", shlex.split(options.strip(" `")))
    peak = estimate_memory(student(size), config, num_student_ranks=6).peak / GIB
    assert peak < USABLE_GIB
    assert f"{peak:.1f} GiB" == room.strip()
    assert (config.train.num_new_questions, config.zone.buffer_capacity) == (48, 1250)
    tensor = config.parallel.tensor_model_parallel_size
    assert config.train.num_new_questions % (6 // tensor) == 0


def test_the_commands_of_the_comparison_are_those_of_its_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["compare.py", str(FOLDER / "compare.yaml"), "--commands"])
    assert load_tool("compare").main() == 0
    lines = capsys.readouterr().out.splitlines()
    runs = load_plan(FOLDER / "compare.yaml").runs
    for line, run in zip(lines, runs, strict=True):
        tool, *arguments = shlex.split(line)
        assert tool == "tools/train_zppo.py"
        assert load_tool("train_zppo").parse(arguments) == (run.config, False)


def load_like(config: RunConfig, tensor: int) -> RunConfig:
    return load_config(
        FOLDER / f"{config.name.removeprefix('paper-')}.yaml",
        [
            f"parallel.tensor_model_parallel_size={tensor}",
            "parallel.sequence_parallel=false",
            # More than either takes.
            "rollout.cache_memory_gib=200",
        ],
    )


def test_a_layout_that_does_not_divide_the_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"does not divide the student's ranks.*47 ranks"):
        estimate_memory(student("9B"), recipe("9B"), 47)


@pytest.mark.parametrize("page", ["docs/paper.md", "docs/teachers.md", "examples/paper/README.md"])
def test_the_served_context_holds_the_longest_request(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    contexts = re.findall(r"--(?:max-model-len|context-length) (\d+)", text)
    assert contexts
    for size in SIZES:
        config = recipe(size)
        # The teacher rewrites a whole response, and may reason as long as where it answers.
        longest = max(config.data.max_prompt_tokens, config.rollout.max_response_tokens)
        needed = longest + config.teacher.max_response_tokens + INSTRUCTION_TOKENS
        assert min(map(int, contexts)) >= needed
