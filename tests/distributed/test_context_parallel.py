"""Context parallelism: every family on packs that are cut in the middle of sequences, against
transformers; sampling and log-probs.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from tests.support import network_checks, tiny_families, tiny_qwen
from tests.support.launch import run_ranks
from tests.support.training_example import (
    Case,
    build_policy,
    make_batches,
    make_groups,
    write_tiny_folder,
)
from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.parallel import groups as parallel

NUM_NEW_TOKENS = 4
LOGPROB_TOLERANCE = 1e-5
CONTEXT = ParallelConfig(context_parallel_size=2, timeout_minutes=3)
WITH_TENSOR = ParallelConfig(
    context_parallel_size=2, tensor_model_parallel_size=2, timeout_minutes=3
)
# Enough heads for four ranks.
MORE_HEADS: dict[str, dict[str, Any]] = {
    "qwen3_5": {"num_key_value_heads": 4, "linear_num_key_heads": 4},
    "qwen3": {"num_key_value_heads": 4},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        family: tiny_families.folder(family, tmp_path_factory.mktemp(family))[0]
        for family in tiny_families.KINDS
    }


def test_the_parts_of_the_packs_cut_sequences() -> None:
    for family, kinds in tiny_families.KINDS.items():
        for kind in {kinds[0], kinds[-1]}:
            ends = tiny_qwen.pack(tiny_families.sequences(family, kind))["cu_seqlens"]
            assert ends is not None
            half = (int(ends[-1]) + 1) // 2
            assert half not in ends.tolist(), (family, kind)


def test_every_family_equals_transformers(folders: dict[str, Path]) -> None:
    first, second = run_ranks(check_families, 2, folders)
    for family in folders:
        # Together the two ranks have every token once.
        assert first[family][0] == 0
        assert first[family][1] == second[family][0] > 0
        assert second[family][1] == second[family][2]


def check_families(folders: dict[str, Path]) -> dict[str, tuple[int, int, int]]:
    """Run on both ranks: logits and gradients of text and of what has all media, and greedy text;
    returns the last pack's part.
    """
    parallel.initialize(CONTEXT, seed=0)
    parts = {}
    for family, folder in folders.items():
        kinds = tiny_families.KINDS[family]
        oracle = tiny_families.model(family)
        # Recomputation runs the exchange a second time in the backward pass.
        network = network_checks.build(
            folder,
            CONTEXT,
            ModelConfig(recompute="full" if family in ("qwen3_vl", "qwen3_5") else "none"),
        )
        network_checks.check_training(network, oracle, tuple(dict.fromkeys((kinds[0], kinds[-1]))))
        sequences = tiny_families.sequences(family, kinds[-1])
        tokens, _logits = network_checks.greedy(network, sequences[:1], NUM_NEW_TOKENS)
        assert tokens.tolist() == [
            network_checks.oracle_greedy(oracle, sequences[0], NUM_NEW_TOKENS)
        ]
        count = sum(len(part.token_ids) for part in sequences)
        own = network.own_tokens(count)
        parts[family] = (own.start, own.stop, count)
    parallel.shutdown()
    return parts


def with_more_heads(family: str) -> Any:
    """Return an oracle whose heads four ranks can share."""
    if family == "qwen3_5":
        return tiny_qwen.vision_language_model(**MORE_HEADS[family])
    config = transformers.Qwen3Config(
        **tiny_families.DENSE | MORE_HEADS[family],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    return tiny_qwen.randomised(transformers.Qwen3ForCausalLM(config))


def test_together_with_tensor_and_sequence_parallelism(tmp_path: Path) -> None:
    saved = {}
    for family in MORE_HEADS:
        transformers.set_seed(0)
        saved[family] = tiny_qwen.save(with_more_heads(family), tmp_path / family)
    run_ranks(check_with_tensor, 4, saved)


def check_with_tensor(folders: dict[str, Path]) -> None:
    """Run on every rank."""
    parallel.initialize(WITH_TENSOR, seed=0)
    for sequence_parallel in (False, True):
        for family, folder in folders.items():
            transformers.set_seed(0)
            oracle = with_more_heads(family)
            network = network_checks.build(
                folder, dataclasses.replace(WITH_TENSOR, sequence_parallel=sequence_parallel)
            )
            network_checks.check_training(network, oracle, (tiny_families.KINDS[family][-1],))
    parallel.shutdown()


def logprobs_of(folder: Path, case: Case) -> tuple[list[np.ndarray], tuple[int, int, int, int]]:
    """Return the log-probs of the whole packs, and which share of updates and of rollouts this rank
    has.
    """
    policy = build_policy(folder, case)
    found = [
        values.numpy() for batch in make_batches(case) for values in policy.compute_logprobs(batch)
    ]
    coordinates = (
        parallel.data_rank(),
        parallel.data_size(),
        parallel.replica_rank(),
        parallel.num_replicas(),
    )
    parallel.shutdown()
    return found, coordinates


def test_log_probs_are_whole_on_each_rank_and_each_samples_for_itself(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path)
    case = Case(samples=make_groups, share_prompts=True)
    ((wanted, alone),) = run_ranks(logprobs_of, 1, folder, case)
    ranks = run_ranks(logprobs_of, 2, folder, dataclasses.replace(case, layout=CONTEXT))
    assert alone == (0, 1, 0, 1)
    assert [coordinates for _, coordinates in ranks] == [(0, 1, 0, 2), (0, 1, 1, 2)]
    for found, _coordinates in ranks:
        for values, expected in zip(found, wanted, strict=True):
            assert np.any(expected)
            np.testing.assert_allclose(values, expected, atol=LOGPROB_TOLERANCE, rtol=0)
