"""Every method for two steps on two ranks: what it trains on, what carries loss, and that the ranks
agree.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.sample import ShardSample
from data.shard_writer import write_shards
from tests.support.launch import run_ranks
from zppo_mm.algorithms.row_loss import OutputRows
from zppo_mm.config.load import load_config
from zppo_mm.experience import Microbatch
from zppo_mm.methods import METHODS
from zppo_mm.parallel import groups as parallel
from zppo_mm.training.objective import ObjectiveTerms, predicting_rows

SMALL = (
    "modality=text",
    "train.num_new_questions=8",
    "rollout.num_rollouts=4",
    "rollout.max_response_tokens=48",
    "teacher.num_rollouts=2",
    "evaluation.num_questions=2",
    "zone.rho_aug=0.5",
    "train.lr=1e-3",
)
# The bundled student has learned most of its format by heart.
LEAST_PROBED = 0.3
REFORMULATED = {
    "bcq": {"bcq"},
    "ncq": {"ncq"},
    "bcq_ncq": {"bcq", "ncq"},
    "zppo": {"bcq", "ncq"},
    "hint": {"hint"},
    "prefix": {"prefix"},
}


@dataclass(frozen=True)
class Seen:
    """What one rank saw of a method's run.

    Attributes:
        sampled: Kinds of the groups of both steps, with their number.
        trained: Kinds of the groups that were trained on.
        uids: Of all groups, in order.
        rewards: Of all rollouts.
        targets: Tokens that this rank's micro-batches put loss on.
        probed: Those of them whose prediction got a gradient.
        responses: Tokens of the responses that should carry loss, of all ranks.
        skipped: Updates that were skipped.
        change: Largest change of a weight.
        buffer: Questions in the buffer at the end.
    """

    sampled: Counter[str]
    trained: Counter[str]
    uids: list[str]
    rewards: list[float]
    targets: list[int]
    probed: list[int]
    responses: list[int]
    skipped: float
    change: float
    buffer: int


class Probe:
    """Records which tokens carry loss and which predictions get a gradient, of any objective."""

    def __init__(self, objective: Any) -> None:
        self._objective = objective
        self.targets: list[int] = []
        self.probed: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def __call__(self, rows: OutputRows, microbatch: Microbatch) -> ObjectiveTerms:
        if predicting_rows(microbatch) is not None:
            targets = microbatch.token_ids[microbatch.loss_mask.nonzero().squeeze(-1)]
            self.targets += targets.tolist()
            rows.hidden.register_hook(lambda gradient: self._note(gradient, targets))
        terms: ObjectiveTerms = self._objective(rows, microbatch)
        return terms

    def _note(self, gradient: torch.Tensor, targets: torch.Tensor) -> None:
        assert len(gradient) == len(targets), "more positions than the loss tokens'"
        self.probed += targets[gradient.abs().sum(-1) > 0].tolist()


VARIANTS = {
    "dynamic": ("method=zppo", "zone.max_sampling_rounds=3", "data.train=[{path: few}]"),
    "dynamic, injected": ("method=inject", "zone.max_sampling_rounds=2"),
    "weighted": ("method=grpo", "algorithm.importance_cap=2"),
    "two teachers": (
        "method=bcq",
        "fallback_teachers=[{num_rollouts: 1, max_response_tokens: 48}]",
    ),
}
"""Runs of what goes beyond the paper."""


def run_methods(runs: dict[str, tuple[str, ...]], scratch: str) -> dict[str, Seen]:
    from zppo_mm.run.build import build_run
    from zppo_mm.step import run_step

    result = {}
    for name, options in runs.items():
        given = [option.replace("path: few", f"path: {scratch}/few") for option in options]
        config = load_config(None, [*SMALL, *given, f"output_dir={scratch}"])
        parallel.initialize(config.parallel, config.seed)
        run = build_run(config)
        probe = Probe(run.policy.objective)
        run.policy.objective = probe
        before = [parameter.detach().clone() for parameter in run.policy.model.parameters()]
        try:
            records = [run_step(run.stages, step) for step in (1, 2)]
        finally:
            run.close()
        trained = [
            group for record in records for group in record.groups if group.uid in record.advantages
        ]
        distilled = config.distill.source != "none"
        carried = [group for group in trained if distilled or group.rewards_differ]
        result[name] = Seen(
            sampled=Counter(group.kind for record in records for group in record.groups),
            trained=Counter(group.kind for group in trained),
            uids=[group.uid for record in records for group in record.groups],
            rewards=[
                rollout.reward
                for record in records
                for group in record.groups
                for rollout in group.rollouts
            ],
            targets=probe.targets,
            probed=probe.probed,
            responses=[
                int(token)
                for group in carried
                for rollout in group.rollouts
                for token in rollout.response_ids
            ],
            skipped=sum(record.metrics.values()["policy/skipped_updates"] for record in records),
            change=max(
                float((a - b).abs().max())
                for a, b in zip(run.policy.model.parameters(), before, strict=True)
            ),
            buffer=len(run.stages.replay),
        )
        assert np.isfinite([record.metrics.values()["policy/loss"] for record in records]).all()
    return result


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Seen]]:
    scratch: Path = tmp_path_factory.mktemp("runs")
    questions = [
        {
            "id": f"q{index}",
            "question": f"What is the sum of the digits {words}?",
            "answer": answer,
            "answer_type": "math",
            "source": "few",
        }
        for index, (words, answer) in enumerate(
            (("three four", "7"), ("nine eight", "17"), ("two two seven", "11"))
        )
    ]
    write_shards(
        scratch / "few", [ShardSample(question["id"], question, []) for question in questions]
    )
    runs = {method: (f"method={method}",) for method in METHODS} | VARIANTS
    return run_ranks(run_methods, 2, runs, str(scratch))


@pytest.mark.parametrize("method", [*METHODS, *VARIANTS])
def test_ranks_agree_and_the_weights_move(seen: list[dict[str, Seen]], method: str) -> None:
    one, two = (rank[method] for rank in seen)
    assert one.uids == two.uids
    assert one.rewards == two.rewards
    assert one.skipped == 0
    assert one.change > 0


@pytest.mark.parametrize("method", METHODS)
def test_kinds_and_buffer(seen: list[dict[str, Seen]], method: str) -> None:
    one = seen[0][method]
    base, replay = method.removesuffix("_replay"), METHODS[method].settings["zone.replay"]
    assert set(one.sampled) - {"new", "replayed", "inject", "teacher"} == REFORMULATED.get(
        base, set()
    )
    assert ("replayed" in one.sampled) == (one.buffer > 0) == replay
    if base == "off_distill":
        assert set(one.trained) == {"teacher"}
        assert (
            "new" in one.sampled
        ) == replay  # without a buffer nobody needs the student's rollouts
    elif base == "inject":
        assert one.trained["inject"] > 0
        assert (
            one.trained["new"] + one.trained["replayed"] + one.trained["inject"]
            == one.sampled["new"] + one.sampled["replayed"]
        )
    else:
        assert one.trained == one.sampled


def test_dynamic_sampling_goes_on_until_there_is_enough_to_learn_from(
    seen: list[dict[str, Seen]],
) -> None:
    """Three questions serve steps of eight: they come again and again, within a round and in the
    next one.
    """
    dynamic = seen[0]["dynamic"]
    assert len(set(dynamic.uids)) == len(dynamic.uids)
    assert dynamic.sampled["new"] in range(16, 16 * 3 + 1, 8)
    assert dynamic.trained <= dynamic.sampled
    # What is asked about a question twice in a step is asked of the teacher once, and reformulated
    # once.
    assert dynamic.sampled["bcq"] <= 2 * 3
    injected = seen[0]["dynamic, injected"]
    assert injected.trained["new"] + injected.trained["inject"] < injected.sampled["new"]


@pytest.mark.parametrize("method", [*METHODS, *VARIANTS])
def test_exactly_the_tokens_of_trained_responses_carry_loss(
    seen: list[dict[str, Seen]], method: str
) -> None:
    """A probe on the gradient of the logits: no prompt, candidate, hint or prefix token is ever a
    target.
    """
    ranks = [rank[method] for rank in seen]
    targets = Counter(ranks[0].targets) + Counter(ranks[1].targets)
    assert targets == Counter(ranks[0].responses)
    # The gradient reaches the logits of those tokens' predictions alone; where one is certain
    # already, none is left in float32.
    probed = Counter(ranks[0].probed) + Counter(ranks[1].probed)
    assert probed <= targets
    assert probed.total() > LEAST_PROBED * targets.total()
