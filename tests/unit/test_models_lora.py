"""Adapters in one process: PEFT on the transformers model is the oracle for logits and gradients;
merging, decoding, refusals.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.support import network_checks, tiny_families, tiny_qwen
from tests.support.network_checks import MAX_GRADIENT_DIFFERENCE, MAX_LOGIT_DIFFERENCE
from zppo_mm.config.load import load_config, save_config
from zppo_mm.config.schema import LORA_TARGETS, LoraConfig, ModelConfig, ParallelConfig, RunConfig
from zppo_mm.conversion.exporting import export_folder
from zppo_mm.errors import CheckpointError, ConfigError, ModelError
from zppo_mm.lora.adapters import LoraAdapters, adapters_of, add_lora
from zppo_mm.lora.export import export_adapter
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel
from zppo_mm.run_folder import RunFolder
from zppo_mm.training import checkpoint
from zppo_mm.training.objective import PolicyObjective
from zppo_mm.training.policy import Policy
from zppo_mm.weights.hf_export import export_hf_weights

pytestmark = pytest.mark.usefixtures("one_rank")

ALL = LoraConfig(rank=4, alpha=8)
SEED = 7
# What the adapters of these tests move logits by at least; a thousand times the tolerance.
MIN_EFFECT = 0.1
NUM_NEW_TOKENS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen.save(tiny_qwen.vision_language_model(), tmp_path_factory.mktemp("source"))


def adapted(
    folder: Path, config: LoraConfig = ALL, model: ModelConfig | None = None
) -> VisionLanguageModel:
    """Return the network with adapters that have an effect."""
    network = network_checks.build(folder, ParallelConfig(), model)
    add_lora(network, config, SEED)
    for number, target in enumerate(adapters(network).targets()):
        torch.nn.init.normal_(
            target.lora_B, std=0.1, generator=torch.Generator().manual_seed(number)
        )
    return network


def adapters(network: VisionLanguageModel) -> LoraAdapters:
    found = adapters_of(network)
    assert found is not None
    return found


def largest_difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).detach().abs().max())


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("qwen3_5", ["all"]),
        ("qwen3", ["all"]),
        ("qwen3_vl", ["all"]),
        ("qwen2_5_vl", ["all"]),
        ("qwen3_5", ["k_proj", "q_proj", "in_proj_z", "in_proj_a", "up_proj", "out_proj"]),
    ],
)
def test_peft_on_the_transformers_model_gives_the_same_logits_and_gradients(
    tmp_path: Path, family: str, targets: list[str]
) -> None:
    kinds = ("text", "mixed") if "mixed" in tiny_families.KINDS[family] else ("text",)
    folder, oracle = tiny_families.folder(family, tmp_path / "source")
    network = adapted(folder, LoraConfig(rank=4, alpha=8, targets=targets))
    export_adapter(network, folder, tmp_path / "adapter")
    parts = [part for kind in kinds for part in tiny_families.sequences(family, kind)]
    pack = tiny_qwen.pack(parts)
    base = tiny_families.oracle_logits(oracle, parts).detach()
    loaded = peft.PeftModel.from_pretrained(oracle, tmp_path / "adapter", is_trainable=True)

    wanted = tiny_families.oracle_logits(loaded, parts)
    logits = network(**pack)

    assert largest_difference(wanted, base) > MIN_EFFECT
    assert largest_difference(logits, wanted) <= MAX_LOGIT_DIFFERENCE
    for output in (wanted, logits):
        network_checks.loss_of(output, pack["token_ids"]).backward()
    gradients = {
        name: parameter.grad
        for name, parameter in loaded.named_parameters()
        if parameter.requires_grad
    }
    names = {
        id(target): key.removesuffix(".weight").split("layers.")[1]
        for target, key in keys_of(network).items()
    }
    assert len(gradients) == 2 * len(names)
    for target in adapters(network).targets():
        for half in ("lora_A", "lora_B"):
            (expected,) = (
                gradients[name]
                for name in gradients
                if f"layers.{names[id(target)]}.{half}." in name
            )
            actual = target.get_parameter(half).grad
            assert largest_difference(actual, expected) <= MAX_GRADIENT_DIFFERENCE * float(
                expected.abs().max()
            ), (target.key, half)


def keys_of(network: VisionLanguageModel) -> dict[Any, str]:
    return {target: target.key for target in adapters(network).targets()}


def test_only_adapters_train_and_new_ones_change_nothing(folder: Path) -> None:
    network = network_checks.build(folder, ParallelConfig())
    pack = tiny_qwen.pack(tiny_qwen.sequences("mixed"))
    with torch.no_grad():
        before = network(**pack)
        add_lora(network, ALL, SEED)
        assert torch.equal(network(**pack), before)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    # Two DeltaNet layers with 5 + 3 linears each, two of attention with 4 + 3.
    assert len(trained) == 2 * 2 * (8 + 7)
    assert all(name.startswith("lora.layers.") for name in trained)
    assert {target.key.split(".")[-2] for target in adapters(network).targets()} == set(
        LORA_TARGETS
    )


def test_rank_zero_leaves_the_network_alone(folder: Path) -> None:
    network = network_checks.build(folder, ParallelConfig())
    add_lora(network, LoraConfig(), SEED)
    assert adapters_of(network) is None
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_parts_may_train_beside_the_adapters(folder: Path, tmp_path: Path) -> None:
    network = network_checks.build(folder, ParallelConfig())
    add_lora(network, LoraConfig(rank=4, also_train=["projector"]), SEED)
    projector = {id(parameter) for parameter in network.parameters_of("projector")}
    own = {id(parameter) for parameter in adapters(network).parameters()}
    assert {
        id(parameter) for parameter in network.parameters() if parameter.requires_grad
    } == projector | own
    message = r"not what was trained, got lora.also_train=\['projector'\], .*; use the merged"
    with pytest.raises(ModelError, match=message):
        export_adapter(network, folder, tmp_path / "adapter")


def test_initial_a_is_kaiming_uniform_by_seed_and_name(folder: Path) -> None:
    networks = [network_checks.build(folder, ParallelConfig()) for _ in range(3)]
    for network, seed in zip(networks, (SEED, SEED, SEED + 1), strict=True):
        add_lora(network, LoraConfig(rank=64), seed)
    first, again, other = (
        [target.lora_A.detach() for target in adapters(network).targets()] for network in networks
    )
    for one, same, different in zip(first, again, other, strict=True):
        assert torch.equal(one, same)
        assert not torch.equal(one, different)
        bound = 1 / math.sqrt(one.shape[1])
        assert 0.98 * bound < float(one.abs().max()) <= bound
        # A uniform variable's standard deviation is bound / sqrt(3); 64 x 64 values and more settle
        # it to a few per cent.
        assert float(one.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not torch.equal(first[0], first[1])


def test_merged_weights_are_exported_and_come_back_bit_for_bit(
    folder: Path, tmp_path: Path
) -> None:
    network = adapted(folder)
    parts = tiny_qwen.sequences("mixed")
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    export_hf_weights(network, folder, tmp_path / "hf")
    assert all(
        torch.equal(parameter, before[name]) for name, parameter in network.named_parameters()
    )
    exported = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(
        tmp_path / "hf", dtype=torch.float32
    )
    source = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    )
    with torch.no_grad():
        wanted, logits = tiny_qwen.oracle_logits(exported, parts), network(**tiny_qwen.pack(parts))
        base = tiny_qwen.oracle_logits(source, parts)
    assert largest_difference(wanted, base) > MIN_EFFECT
    assert largest_difference(wanted, logits) <= MAX_LOGIT_DIFFERENCE


def test_a_runs_checkpoint_is_exported_with_its_adapters(folder: Path, tmp_path: Path) -> None:
    config = RunConfig(model=ModelConfig(student=str(folder)), lora=ALL)
    network = adapted(folder)
    policy = Policy(
        network,
        config.train,
        config.parallel,
        PolicyObjective(config.algorithm, 1.0, parallel.tensor_group()),
    )
    (tmp_path / "run").mkdir()
    save_config(config, tmp_path / "run" / "config.yaml")
    checkpoint.save(RunFolder(tmp_path / "run").checkpoints, 1, policy, {"step": 1}, keep=1)
    export_hf_weights(network, folder, tmp_path / "hf")
    export_folder(tmp_path / "run", tmp_path / "back", config.parallel)
    direct, back, source = (
        load_file(path / "model.safetensors")
        for path in (tmp_path / "hf", tmp_path / "back", folder)
    )
    assert all(torch.equal(back[key], tensor) for key, tensor in direct.items())
    # Two layers of each kind, with 8 and 7 adapted linears.
    assert sum(not torch.equal(source[key], tensor) for key, tensor in direct.items()) == 2 * (
        8 + 7
    )
    other = dataclasses.replace(config, lora=LoraConfig(rank=2))
    save_config(other, tmp_path / "run" / "config.yaml")
    with pytest.raises(
        CheckpointError,
        match=r"the adapters cannot be loaded, got .*shape mismatch.*; expected those that",
    ):
        export_folder(tmp_path / "run", tmp_path / "again", config.parallel)


def test_decoding_gives_the_logits_of_the_training_forward(folder: Path) -> None:
    network = adapted(folder)
    parts = tiny_qwen.sequences("mixed")
    tokens, chosen = network_checks.greedy(network, parts, NUM_NEW_TOKENS)
    for index, part in enumerate(parts):
        positions = part.next_position + torch.arange(NUM_NEW_TOKENS).expand(3, -1)
        pack = tiny_qwen.pack([part])
        pack["token_ids"] = torch.cat([part.token_ids, tokens[index]])
        pack["positions"] = torch.cat([part.positions, positions], 1)
        pack["cu_seqlens"] = torch.tensor(
            [0, len(part.token_ids) + NUM_NEW_TOKENS], dtype=torch.int32
        )
        with torch.no_grad():
            whole = network(**pack)[len(part.token_ids) - 1 : -1]
        assert (
            largest_difference(torch.log_softmax(chosen[index], -1), torch.log_softmax(whole, -1))
            <= MAX_LOGIT_DIFFERENCE
        )


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_give_the_same_gradients(folder: Path, recompute: str) -> None:
    pack = tiny_qwen.pack(tiny_qwen.sequences("mixed"))
    gradients = []
    for model in (ModelConfig(), ModelConfig(recompute=recompute)):
        network = adapted(folder, model=model)
        network.train()
        network_checks.loss_of(network(**pack), pack["token_ids"]).backward()
        gradients.append([parameter.grad for parameter in adapters(network).parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(
            recomputed, plain, atol=1e-6 * float(plain.abs().max()), rtol=1e-5
        )


def test_dropout_acts_in_training_alone(folder: Path) -> None:
    pack = tiny_qwen.pack(tiny_qwen.sequences("text"))
    plain, dropping = adapted(folder), adapted(folder, LoraConfig(rank=4, alpha=8, dropout=0.5))
    with torch.no_grad():
        wanted = plain.eval()(**pack)
        assert torch.equal(dropping.eval()(**pack), wanted)
        dropping.train()
        first, second = dropping(**pack), dropping(**pack)
    assert largest_difference(first, second) > MIN_EFFECT
    assert largest_difference(first, wanted) > MIN_EFFECT


def test_the_adapter_folder_names_targets_as_peft_wants_them(folder: Path, tmp_path: Path) -> None:
    export_adapter(adapted(folder), folder, tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["target_modules"]) == (
        4,
        8,
        sorted(LORA_TARGETS),
    )
    assert written["base_model_name_or_path"] == str(folder)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        ModelError, match=r"file/adapter: the export failed, got .*, expected room and permission"
    ):
        export_adapter(adapted(folder), folder, tmp_path / "file" / "adapter")


def test_targets_that_the_network_lacks_are_refused(tmp_path: Path) -> None:
    folder, _ = tiny_families.folder("qwen3", tmp_path)
    network = network_checks.build(folder, ParallelConfig())
    with pytest.raises(
        ConfigError,
        match=(
            r"lora.targets: not in this network, got 'in_proj_z', expected any of q_proj, "
            r".*down_proj, or"
        ),
    ):
        add_lora(network, LoraConfig(rank=4, targets=["q_proj", "in_proj_z"]), SEED)
    with pytest.raises(
        ConfigError, match=r"lora.also_train: the network has no vision tower, got \['projector'\]"
    ):
        add_lora(network, LoraConfig(rank=4, also_train=["projector"]), SEED)


def test_projections_that_fp8_leaves_out_cannot_be_adapted_under_it(tmp_path: Path) -> None:
    folder, _ = tiny_families.folder("qwen3_5_text", tmp_path)
    network = network_checks.build(folder, ParallelConfig())
    network.config.fp8 = "hybrid"
    with pytest.raises(
        ConfigError, match=r"lora.targets: not under FP8, got in_proj_a, in_proj_b, expected others"
    ):
        add_lora(network, LoraConfig(rank=4), SEED)
    add_lora(network, LoraConfig(rank=4, targets=["in_proj_qkv"]), SEED)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["lora.rank=4", "lora.targets=[q_proj,qproj]"],
            "lora.targets: not a choice, got 'qproj', expected one of 'all', 'q_proj'",
        ),
        (
            ["lora.rank=4", "lora.targets=[]"],
            r"lora.targets: ambiguous, got \[\], expected \[all\] or names",
        ),
        (["lora.rank=4", "lora.targets=[all,q_proj]"], "lora.targets: ambiguous"),
        (
            ["lora.rank=4", "lora.also_train=[language]"],
            "lora.also_train: not a choice, got 'language', expected one of 'vision', 'projector'",
        ),
        (
            ["lora.also_train=[vision]"],
            "lora.also_train: needs adapters, .* with lora.rank=0",
        ),
        (
            ["lora.rank=4", "lora.also_train=[vision]", "train.freeze=[vision]"],
            "lora.also_train: vision is in train.freeze too",
        ),
        (["lora.rank=-1"], "lora.rank: out of range, got -1"),
        (["lora.dropout=1"], "lora.dropout: out of range, got 1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


def test_everything_may_be_frozen_under_adapters() -> None:
    parts = "train.freeze=[vision,projector,language]"
    assert load_config(None, ["lora.rank=4", parts]).train.freeze == [
        "vision",
        "projector",
        "language",
    ]
    with pytest.raises(ConfigError, match=r"train.freeze: nothing is left to train"):
        load_config(None, [parts])
