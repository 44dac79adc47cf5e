"""Updates with shared prompts equal those without, on every layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed.test_training_invariance import assert_same
from tests.support.launch import run_ranks
from tests.support.training_example import (
    Case,
    Result,
    build_policy,
    make_batches,
    make_groups,
    make_plan,
    run_cases,
    write_tiny_folder,
)
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.parallel import groups as parallel

# The same float32 sums in another grouping.
LOGPROB_TOLERANCE = 1e-5

APART = Case(samples=make_groups)
SHARED = Case(samples=make_groups, share_prompts=True)
ALONE = {
    "shared": SHARED,
    "shared, groups divided": dataclasses.replace(SHARED, micro_batch_tokens=20),
    "shared, one micro-batch": dataclasses.replace(SHARED, micro_batch_tokens=1000),
}
LAYOUTS = {
    "data 2": ParallelConfig(),
    "tensor 2": ParallelConfig(tensor_model_parallel_size=2),
    "tensor 2, sequence parallel": ParallelConfig(
        tensor_model_parallel_size=2, sequence_parallel=True
    ),
    "pipeline 2": ParallelConfig(pipeline_model_parallel_size=2),
    "context 2": ParallelConfig(context_parallel_size=2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Result:
    """Return the updates of one process without sharing."""
    (results,) = run_ranks(run_cases, 1, folder, [APART])
    return results[0]


def test_the_example_shares_divides_and_has_single_samples() -> None:
    def packed_tokens(case: Case) -> int:
        samples = case.samples()
        packs = [
            pack
            for update in make_plan(case, 1).microbatches
            for replica in update
            for pack in replica
        ]
        prompts = [{samples[i].uid: samples[i].num_prompt_tokens for i in pack} for pack in packs]
        return sum(sum(prompt.values()) for prompt in prompts)

    prompt_tokens = [sample.num_prompt_tokens for sample in make_groups()]
    assert prompt_tokens == [11] * 3 + [11] * 4 + [2] * 2 + [20]
    # Every prompt once; those of the first two groups again where the groups are divided.
    assert packed_tokens(SHARED) == 11 + 11 + 2 + 20
    assert packed_tokens(ALONE["shared, groups divided"]) > 11 + 11 + 2 + 20
    on_two = make_plan(SHARED, 2).microbatches
    assert all(replica for update in on_two for replica in update)


def test_sharing_in_one_process_changes_no_update(folder: Path, reference: Result) -> None:
    (results,) = run_ranks(run_cases, 1, folder, list(ALONE.values()))
    for name, actual in zip(ALONE, results, strict=True):
        assert_same(actual, reference, name)


def test_sharing_on_two_ranks_changes_no_update(folder: Path, reference: Result) -> None:
    cases = {name: dataclasses.replace(SHARED, layout=layout) for name, layout in LAYOUTS.items()}
    for results in run_ranks(run_cases, 2, folder, list(cases.values())):
        for name, actual in zip(cases, results, strict=True):
            assert_same(actual, reference, name)


def logprobs_of(folder: Path, cases: list[Case]) -> list[np.ndarray]:
    """Return the log-probs of all loss tokens, in the order of the samples within each update."""
    found = []
    for case in cases:
        policy = build_policy(folder, case)
        batches = make_batches(case)
        values = [policy.compute_logprobs(batch) for batch in batches]
        masks = [
            [microbatch.loss_mask != 0 for microbatch in batch.microbatches] for batch in batches
        ]
        logits = [
            v[m]
            for update, mask in zip(values, masks, strict=True)
            for v, m in zip(update, mask, strict=True)
        ]
        found.append(torch.cat(logits).numpy())
    parallel.shutdown()
    return found


def test_log_probs_of_the_training_pass_are_those_of_separate_sequences(folder: Path) -> None:
    whole = [dataclasses.replace(case, micro_batch_tokens=1000) for case in (APART, SHARED)]
    (found,) = run_ranks(logprobs_of, 1, folder, whole)
    assert len(found[0]) == sum(sample.num_loss_tokens for sample in make_groups())
    np.testing.assert_allclose(found[1], found[0], atol=LOGPROB_TOLERANCE, rtol=0)
