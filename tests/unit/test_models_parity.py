"""The network in one process against transformers: logits, gradients, packing, decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import network_checks, tiny_qwen
from tests.support.network_checks import MAX_LOGIT_DIFFERENCE, check_training
from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.errors import ConfigError, ModelError
from zppo_mm.models.decoding.decode import decode, prefill
from zppo_mm.models.layers import delta_rule
from zppo_mm.models.layers.cache import Admission, DecodeCache
from zppo_mm.models.layers.gated_delta_net import GatedDeltaNet
from zppo_mm.models.layers.packing import MAX_PADDING_RATIO, build_layout
from zppo_mm.models.provider import freeze_parts
from zppo_mm.models.vision_language import VisionLanguageModel

pytestmark = pytest.mark.usefixtures("one_rank")

KINDS = tuple(tiny_qwen.SEQUENCES)
# The same float32 sums in another grouping.
MAX_PACKING_DIFFERENCE = 2e-5
# Against a loop over tokens in float64; a forty-token product of float32 factors.
MAX_RULE_DIFFERENCE = 1e-5
NUM_NEW_TOKENS = 12


@pytest.fixture(scope="module")
def oracle() -> Any:
    return tiny_qwen.vision_language_model()


@pytest.fixture(scope="module")
def folder(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen.save(oracle, tmp_path_factory.mktemp("untied"))


@pytest.fixture
def network(folder: Path) -> VisionLanguageModel:
    return network_checks.build(folder, ParallelConfig())


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_equal_transformers(
    network: VisionLanguageModel, oracle: Any, kind: str
) -> None:
    check_training(network, oracle, (kind, "mixed") if kind == "text" else (kind,))


def test_a_tied_network_equals_transformers(tmp_path: Path) -> None:
    oracle = tiny_qwen.vision_language_model(tied=True)
    check_training(
        network_checks.build(tiny_qwen.save(oracle, tmp_path), ParallelConfig()), oracle, ("mixed",)
    )


def test_a_text_only_network_equals_transformers(tmp_path: Path) -> None:
    oracle = tiny_qwen.text_model(tied=True)
    network = network_checks.build(tiny_qwen.save(oracle, tmp_path), ParallelConfig())
    check_training(network, oracle, ("text",))
    with pytest.raises(ModelError, match="media without a vision tower, got 16 patches"):
        network(**tiny_qwen.pack([tiny_qwen.make_sequence(0, [("image", (1, 4, 4))])]))


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_give_the_same_gradients(
    folder: Path, oracle: Any, recompute: str
) -> None:
    network = network_checks.build(folder, ParallelConfig(), ModelConfig(recompute=recompute))
    check_training(network, oracle, ("mixed",))


def test_packed_sequences_equal_separate_ones(network: VisionLanguageModel) -> None:
    parts = [part for kind in KINDS for part in tiny_qwen.sequences(kind)]
    with torch.no_grad():
        packed = network(**tiny_qwen.pack(parts))
        separate = torch.cat([network(**tiny_qwen.pack([part])) for part in parts])
    assert (packed - separate).abs().max() <= MAX_PACKING_DIFFERENCE


def test_a_text_batch_gives_the_vision_tower_a_gradient_of_zero(
    network: VisionLanguageModel,
) -> None:
    network(**tiny_qwen.pack(tiny_qwen.sequences("text"))).sum().backward()
    gradients = [parameter.grad for parameter in network.vision.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_placeholders_without_features_are_refused(network: VisionLanguageModel) -> None:
    pack = tiny_qwen.pack(tiny_qwen.sequences("image"))
    with pytest.raises(
        ValueError, match=r"features do not fit the placeholders, got 0 features, expected 13"
    ):
        network(**{**pack, "patches": None, "grids": None})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.medium
def test_greedy_tokens_equal_transformers(
    network: VisionLanguageModel, oracle: Any, kind: str
) -> None:
    parts = tiny_qwen.sequences(kind)
    tokens, _logits = network_checks.greedy(network, parts, NUM_NEW_TOKENS)
    assert tokens.tolist() == [
        network_checks.oracle_greedy(oracle, part, NUM_NEW_TOKENS) for part in parts
    ]


def test_decoding_gives_the_logprobs_of_the_training_forward(network: VisionLanguageModel) -> None:
    parts = [tiny_qwen.sequences(kind)[0] for kind in KINDS]
    tokens, logits = network_checks.greedy(network, parts, NUM_NEW_TOKENS, repeats=2)
    longer = [
        extended(part, row)
        for part, row in zip([part for part in parts for _ in range(2)], tokens, strict=True)
    ]
    with torch.no_grad():
        trained = network(**tiny_qwen.pack(longer)).log_softmax(-1)
    end = 0
    for part, decoded in zip(longer, logits.log_softmax(-1), strict=True):
        end += len(part.token_ids)
        assert (
            trained[end - NUM_NEW_TOKENS - 1 : end - 1] - decoded
        ).abs().max() <= MAX_LOGIT_DIFFERENCE


def test_rows_leave_and_come_while_others_are_decoded(network: VisionLanguageModel) -> None:
    """Against each sequence alone; the convolution's ring stands at another slot for latecomers."""
    parts = [tiny_qwen.make_sequence(seed, [length]) for seed, length in enumerate((7, 30, 12, 9))]
    alone = [network_checks.greedy(network, [part], NUM_NEW_TOKENS)[0][0] for part in parts]
    cache = DecodeCache(num_blocks=40, max_rows=5, slots_per_block=4)
    rows: list[list[int]] = []  # which part, and its tokens so far

    def fill(index: int, resumed: int, num_rows: int) -> None:
        part = extended(parts[index], alone[index][:resumed])
        admission = Admission(index, len(parts[index].token_ids), num_rows)
        logits = prefill(network, **tiny_qwen.pack([part]), cache=cache, admissions=[admission])
        assert logits[0, : tiny_qwen.IMAGE].argmax() == alone[index][resumed]
        rows.extend([index, resumed + 1] for _ in range(num_rows))

    fill(0, 0, 2)
    for step in range(9):
        if step == 1:
            fill(1, 0, 2)
        if step in (3, 5):
            gone = np.array([0, 1] if step == 3 else [1])
            moves = cache.release(gone)
            for target, source in zip(moves.targets, moves.sources, strict=True):
                rows[target] = rows[source]
            del rows[len(rows) - len(gone) :]
            fill(2, 0, 2) if step == 3 else fill(3, 5, 1)
        if step == 6:
            fill(1, 2, 1)  # beside a row of the same prompt
        token_ids = torch.stack([alone[index][count - 1] for index, count in rows])
        positions = torch.tensor([len(parts[index].token_ids) + count - 1 for index, count in rows])
        logits = decode(network, token_ids, positions.expand(3, -1), cache)
        assert logits[:, : tiny_qwen.IMAGE].argmax(-1).tolist() == [
            int(alone[index][count]) for index, count in rows
        ]
        for row in rows:
            row[1] += 1


def test_padding_stays_below_the_bound_and_undoes_itself() -> None:
    lengths = [9, 70, 3, 64, 0, 5, 40]
    layout = build_layout(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32))
    packed = torch.randn(sum(lengths), 2, 3)
    padded = [bucket.pad(packed) for bucket in layout.buckets]
    assert layout.join(
        [bucket.unpad(batch) for bucket, batch in zip(layout.buckets, padded, strict=True)]
    ).equal(packed)
    # 70 takes in 64 and 40, but not 9; 9 takes in 5, but not 3; the empty sequence is nowhere.
    assert [bucket.sequences for bucket in layout.buckets] == [(1, 3, 6), (0, 5), (2,)]
    assert all(
        bucket.longest <= MAX_PADDING_RATIO * min(bucket.lengths) for bucket in layout.buckets
    )


def test_the_chunked_rule_equals_a_loop_over_tokens() -> None:
    torch.manual_seed(0)
    length = 2 * delta_rule.MAX_CHUNK_TOKENS_CPU + 5
    query, key = torch.randn(2, length, 2, 8), torch.randn(2, length, 2, 8)
    value = torch.randn(2, length, 4, 6)
    log_decay, beta = -torch.rand(2, length, 4), torch.rand(2, length, 4)
    output, state = delta_rule.chunk_gated_delta_rule(
        query, key, value, log_decay, beta, final_state=True
    )
    unit = [F.double() / F.double().norm(dim=-1, keepdim=True) for F in (query, key)]
    q, k = (vectors.repeat_interleave(2, 2) for vectors in unit)
    wanted = torch.zeros(2, 4, 8, 6, dtype=torch.float64)
    for token in range(length):
        wanted = wanted * log_decay[:, token].double().exp()[..., None, None]
        known = torch.einsum("bhkv,bhk->bhv", wanted, k[:, token])
        write = (value[:, token] - known) * beta[:, token, :, None]
        wanted = wanted + torch.einsum("bhk,bhv->bhkv", k[:, token], write)
        read = torch.einsum("bhkv,bhk->bhv", wanted, q[:, token]) * 8**-0.5
        assert (output[:, token] - read).abs().max() <= MAX_RULE_DIFFERENCE
    assert (state - wanted).abs().max() <= MAX_RULE_DIFFERENCE


def test_bfloat16_keeps_decay_rates_and_their_norm_in_float32(
    folder: Path, network: VisionLanguageModel
) -> None:
    cast = network_checks.build(folder, ParallelConfig(), ModelConfig(params_dtype="bfloat16"))
    exact = {
        name for name, parameter in cast.named_parameters() if parameter.dtype == torch.float32
    }
    assert exact == {
        name for name, _ in cast.named_parameters() if name.endswith(("A_log", "out_norm.weight"))
    }
    later = network.bfloat16()
    assert {
        name for name, parameter in later.named_parameters() if parameter.dtype == torch.float32
    } == exact
    pack = tiny_qwen.pack(tiny_qwen.sequences("mixed"))
    logits = cast(**pack)
    logits.sum().backward()
    assert logits.dtype == torch.float32
    assert (
        prefill(cast, **pack, cache=DecodeCache(num_blocks=16, max_rows=8))
        - logits[pack["cu_seqlens"][1:].long() - 1]
    ).abs().max() < 0.1


def test_parts_can_be_frozen(network: VisionLanguageModel) -> None:
    freeze_parts(network, ["vision", "language"])
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {
        name for name, _ in network.named_parameters() if name.startswith("vision.model.merger.")
    }
    with pytest.raises(
        ConfigError, match=r"unknown part, got 'tower', expected any of vision, projector, language"
    ):
        freeze_parts(network, ["tower"])
    with pytest.raises(ConfigError, match="nothing is left to train"):
        freeze_parts(network, ["vision", "projector", "language"])


def extended(part: tiny_qwen.Sequence, tokens: torch.Tensor) -> tiny_qwen.Sequence:
    """Return a sequence followed by text tokens."""
    positions = (part.next_position + torch.arange(len(tokens))).expand(3, -1)
    return tiny_qwen.Sequence(
        torch.cat([part.token_ids, tokens]),
        torch.cat([part.positions, positions], 1),
        part.next_position + len(tokens),
        part.patches,
        part.grids,
        part.kinds,
    )


def test_small_projections_computed_apart_are_the_same(
    network: VisionLanguageModel, oracle: Any
) -> None:
    layers = [module for module in network.modules() if isinstance(module, GatedDeltaNet)]
    assert layers
    assert not any(layer.small_projections_apart for layer in layers)
    for layer in layers:
        # What FP8 switches on; the projections' own rows then get their gradient from here alone.
        layer.small_projections_apart = True
    check_training(network, oracle, ("mixed",))
