"""Shared-prefix training against one pass per response: logits, loss, gradients; layout and states
behind it.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.bias import causal_lower_right

from data.question import MediaRef, Question
from encoders.processor import VisionInput
from tests.support import network_checks, tiny_families, tiny_qwen
from zppo_mm.algorithms.row_loss import OutputRows
from zppo_mm.config.schema import AlgorithmConfig, ModelConfig, ParallelConfig, TrainConfig
from zppo_mm.errors import ConfigError
from zppo_mm.experience import TrainingSample
from zppo_mm.models import vision_language
from zppo_mm.models.layers import delta_rule
from zppo_mm.models.layers.causal_convolution import causal_convolution, last_inputs
from zppo_mm.models.layers.packing import MAX_PADDING_RATIO, build_layout
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.training.objective import PolicyObjective, predicting_rows
from zppo_mm.training.packing import pack
from zppo_mm.training.policy import Policy

pytestmark = pytest.mark.usefixtures("one_rank")

# The same float32 sums in another grouping; the largest differences seen are 9e-6 on logits of
# scale 3, and 6e-7 of the loss.
MAX_LOGIT_DIFFERENCE = 3e-5
MAX_LOSS_DIFFERENCE = 5e-6
# Relative to the largest entry of each gradient; the largest seen is 7e-6.
MAX_GRADIENT_DIFFERENCE = 5e-5
# Float32 against float64, over a hundred tokens.
MAX_RULE_DIFFERENCE = 1e-5
MAX_RULE_GRADIENT_DIFFERENCE = 1e-4

Parts = list[int | tuple[str, tiny_qwen.Grid]]
Groups = list[tuple[Parts, list[int]]]
# Prompts, and the lengths of their responses. The convolution looks back at three tokens.
CASES: dict[str, Groups] = {
    "text": [([9], [4, 30, 7]), ([70], [5, 5])],
    "image": [
        ([4, ("image", (1, 4, 6)), 5], [6, 3]),
        ([2, ("image", (1, 2, 2)), 3, ("image", (1, 6, 4)), 2], [9, 40, 2]),
    ],
    "video": [([3, ("video", (3, 4, 4)), 6], [8, 8, 8]), ([1, ("video", (1, 2, 4)), 4], [3, 1])],
    "mixed": [
        ([5, ("image", (1, 4, 4)), 3, ("video", (2, 4, 2)), 2], [5, 12]),
        ([40], [20]),
        ([2, ("video", (2, 2, 2)), 1, ("image", (1, 2, 6)), 20], [1, 33, 2]),
        ([6, ("image", (1, 2, 2))], [4]),
    ],
    "prompts shorter than the convolution": [([1], [3, 6]), ([2], [1, 1, 9])],
    "responses of one token": [([12], [1, 1, 1]), ([33], [1, 1])],
    "one group alone": [([20], [7, 7, 7, 7, 7, 7, 7, 7])],
    "groups and single samples": [([7], [4]), ([30], [3, 60]), ([3], [8]), ([2], [2, 5])],
    "prompts of several chunks": [([75], [40, 66])],
}
VIDEO_FAMILY_CASES = [
    ("qwen3_vl", "video"),
    ("qwen3_vl", "mixed"),
    ("qwen3", "groups and single samples"),
]


class SequenceMedia:
    """The pixels of prompts, by the name of their question."""

    def __init__(self) -> None:
        self.prompts: dict[str, tiny_qwen.Sequence] = {}
        self.opened: list[str] = []

    def vision_inputs(self, question: Question) -> list[VisionInput]:
        self.opened.append(question.id)
        prompt = self.prompts[question.id]
        pieces = prompt.patches.split([t * h * w for t, h, w in prompt.grids])
        return [
            VisionInput("image", piece.numpy(), grid)
            for piece, grid in zip(pieces, prompt.grids, strict=True)
        ]


def make_samples(groups: Groups) -> tuple[list[TrainingSample], SequenceMedia]:
    """Return every rollout as a sample, and what opens their media."""
    draw = np.random.default_rng(7)
    samples, media = [], SequenceMedia()
    for number, (parts, lengths) in enumerate(groups):
        uid = f"group {number}"
        prompt = media.prompts[uid] = tiny_qwen.make_sequence(number, parts)
        question = Question(
            uid,
            "",
            tuple(MediaRef("image", "none.tar", uid, "png") for _ in prompt.grids),
            "",
            "math",
        )
        for index, length in enumerate(lengths):
            mask = np.repeat(np.array([0, 1], dtype=np.float32), [len(prompt.token_ids), length])
            positions = np.broadcast_to(prompt.next_position + np.arange(length), (3, length))
            samples.append(
                TrainingSample(
                    uid=uid,
                    question=question,
                    token_ids=np.concatenate(
                        [prompt.token_ids.numpy(), draw.integers(1, 110, length)]
                    ),
                    positions=np.concatenate([prompt.positions.numpy(), positions], axis=1),
                    loss_mask=mask,
                    # Around the log-prob of a uniform guess, so that the surrogate is clipped for
                    # some tokens only.
                    old_logprobs=(mask * (-4.8 + 0.4 * draw.standard_normal(len(mask)))).astype(
                        np.float32
                    ),
                    advantages=mask * np.float32(1.5 - index),
                    grids=prompt.grids,
                )
            )
    return samples, media


def forward_backward(
    network: VisionLanguageModel, groups: Groups, share_prompts: bool
) -> tuple[torch.Tensor, float, dict[str, torch.Tensor]]:
    """Return the logits of the loss rows, the loss and the gradient of every parameter."""
    samples, media = make_samples(groups)
    microbatch = pack(samples, media=media, device=torch.device("cpu"), share_prompts=share_prompts)
    shared = any(len(lengths) > 1 for _, lengths in groups)
    assert (microbatch.parents is not None) == (share_prompts and shared)
    network.zero_grad()
    hidden = network(
        microbatch.token_ids,
        microbatch.positions,
        microbatch.cu_seqlens,
        microbatch.patches,
        microbatch.grids,
        rows=predicting_rows(microbatch),
        parents=microbatch.parents,
        output_layer=False,
    )
    rows = OutputRows(hidden, network.output_weight())
    terms = PolicyObjective(AlgorithmConfig(), temperature=1.0)(rows, microbatch)
    terms.loss_sum.backward()  # type: ignore[no-untyped-call]
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in network.named_parameters()
        if parameter.grad is not None
    }
    return rows.logits(slice(None)).detach(), float(terms.loss_sum.detach()), gradients


def check_sharing(network: VisionLanguageModel, groups: Groups) -> None:
    """Hold the pass with shared prompts against the one without."""
    logits, loss, gradients = forward_backward(network, groups, share_prompts=True)
    wanted_logits, wanted_loss, wanted_gradients = forward_backward(
        network, groups, share_prompts=False
    )
    assert (logits - wanted_logits).abs().max() <= MAX_LOGIT_DIFFERENCE
    assert loss == pytest.approx(wanted_loss, rel=MAX_LOSS_DIFFERENCE)
    assert gradients.keys() == wanted_gradients.keys() == dict(network.named_parameters()).keys()
    for name, wanted in wanted_gradients.items():
        assert (
            gradients[name] - wanted
        ).abs().max() <= MAX_GRADIENT_DIFFERENCE * wanted.abs().max(), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen.save(tiny_qwen.vision_language_model(), tmp_path_factory.mktemp("untied"))


@pytest.mark.parametrize("case", CASES)
def test_sharing_changes_neither_logits_nor_loss_nor_gradients(folder: Path, case: str) -> None:
    check_sharing(network_checks.build(folder, ParallelConfig()), CASES[case])


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_sharing_goes_with_recomputed_activations(folder: Path, recompute: str) -> None:
    check_sharing(
        network_checks.build(folder, ParallelConfig(), ModelConfig(recompute=recompute)),
        CASES["mixed"],
    )


@pytest.mark.parametrize(("family", "case"), VIDEO_FAMILY_CASES)
def test_other_families_share_too(tmp_path: Path, family: str, case: str) -> None:
    folder, _oracle = tiny_families.folder(family, tmp_path)
    check_sharing(network_checks.build(folder, ParallelConfig()), CASES[case])


@pytest.mark.parametrize(
    ("asked", "is_shared"), [("auto", True), ("always", True), ("never", False)]
)
def test_the_local_layers_share_by_default(folder: Path, asked: str, is_shared: bool) -> None:
    assert (
        make_policy(network_checks.build(folder, ParallelConfig()), asked).shares_prompts
        is is_shared
    )


def test_the_mask_of_a_gpu_is_that_of_a_cpu() -> None:
    layout = build_layout(torch.tensor([0, 5, 8, 15], dtype=torch.int32), parents=(-1, 0, 0))
    for branch in layout.branches:
        for group in branch.child_groups:
            assert torch.equal(causal_lower_right(*group.mask.shape)._materialize(), group.mask)


@pytest.fixture
def fused_delta_net(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU with flash-linear-attention."""
    monkeypatch.setattr(vision_language, "chosen_kernels", lambda config: (abs, abs))


@pytest.mark.usefixtures("fused_delta_net")
@pytest.mark.parametrize("asked", ["auto", "never"])
def test_layers_that_cannot_share_do_not(folder: Path, asked: str) -> None:
    network = network_checks.build(folder, ParallelConfig())
    assert not make_policy(network, asked).shares_prompts


@pytest.mark.usefixtures("fused_delta_net")
def test_layers_that_cannot_share_refuse_to(folder: Path) -> None:
    network = network_checks.build(folder, ParallelConfig())
    with pytest.raises(
        ConfigError, match=r"train\.share_prompts: this network cannot share prompts, got 'always'"
    ):
        make_policy(network, "always")


def make_policy(network: VisionLanguageModel, share_prompts: str) -> Policy:
    objective = PolicyObjective(AlgorithmConfig(), temperature=1.0)
    return Policy(network, TrainConfig(share_prompts=share_prompts), ParallelConfig(), objective)


@torch.no_grad()
def test_children_do_not_see_one_another(folder: Path) -> None:
    network = network_checks.build(folder, ParallelConfig())
    token_ids = torch.arange(1, 13)
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]).expand(3, -1)
    bounds = torch.tensor([0, 4, 8, 12], dtype=torch.int32)
    before = network(token_ids, positions, bounds, parents=(-1, 0, 0))
    token_ids[5] = 99
    after = network(token_ids, positions, bounds, parents=(-1, 0, 0))
    changed = (before - after).abs().amax(-1) > 0
    assert changed.tolist() == [False] * 5 + [True] * 3 + [False] * 4


@st.composite
def packs(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Return lengths and parents of sequences; a parent lies before its children, as in a pack, but
    they need not follow it at once.
    """
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    parents: list[int] = []
    for index in range(len(lengths)):
        roots = [root for root in range(index) if parents[root] < 0]
        parents.append(draw(st.sampled_from([-1, *roots])))
    return lengths, parents


@settings(max_examples=100)
@given(made=packs())
def test_a_layout_holds_every_token_once_and_every_child_with_its_parent(
    made: tuple[list[int], list[int]],
) -> None:
    lengths, parents = made
    layout = build_layout(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), parents=parents)
    buckets = [*layout.buckets, *(branch.bucket for branch in layout.branches)]
    packed = torch.randn(sum(lengths), 2)
    assert layout.join([bucket.unpad(bucket.pad(packed)) for bucket in buckets]).equal(packed)
    assert all(bucket.longest <= MAX_PADDING_RATIO * min(bucket.lengths) for bucket in buckets)
    assert sorted(index for bucket in layout.buckets for index in bucket.sequences) == [
        i for i, p in enumerate(parents) if p < 0
    ]
    rows = [index for bucket in layout.buckets if bucket.has_children for index in bucket.sequences]
    for branch in layout.branches:
        wanted = [parents[child] for child in branch.bucket.sequences]
        assert [rows[row] for row in branch.parent_rows.tolist()] == wanted
        assert [
            group.parent for group in branch.child_groups for _ in range(group.num_children)
        ] == wanted
        # Each parent's keys and values are copied for all its children at once.
        assert len({group.parent for group in branch.child_groups}) == len(branch.child_groups)
        for group in branch.child_groups:
            size = (branch.bucket.longest, lengths[group.parent] + branch.bucket.longest)
            assert group.mask.equal(torch.ones(size, dtype=torch.bool).tril(lengths[group.parent]))


def naive_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and last state of a loop over tokens, as the paper writes it."""
    q, k = (
        (vectors / vectors.norm(dim=-1, keepdim=True)).repeat_interleave(2, 2)
        for vectors in (query, key)
    )
    outputs = []
    for token in range(query.shape[1]):
        state = state * log_decay[:, token].exp()[..., None, None]
        known = torch.einsum("bhkv,bhk->bhv", state, k[:, token])
        write = (value[:, token] - known) * beta[:, token, :, None]
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, token], write)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, token]) * query.shape[-1] ** -0.5)
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("on_gpu", [False, True], ids=["in turn", "by transitions"])
@pytest.mark.parametrize("length", [1, 20, 2 * delta_rule.MAX_CHUNK_TOKENS_CPU + 5])
def test_the_rule_from_a_given_state_equals_a_loop_over_tokens(
    length: int, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_gpu:
        monkeypatch.setattr(delta_rule, "scan_in_turn", delta_rule.scan_by_transitions)
    torch.manual_seed(0)
    shapes = [
        (2, length, 2, 8),
        (2, length, 2, 8),
        (2, length, 4, 6),
        (2, length, 4),
        (2, length, 4),
        (2, 4, 8, 6),
    ]
    inputs = [torch.randn(shape) for shape in shapes]
    inputs[3], inputs[4] = -torch.rand(shapes[3]) / 4, torch.rand(shapes[4])
    weights = (torch.randn(2, length, 4, 6), torch.randn(2, 4, 8, 6))
    given_inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    *five, state = given_inputs
    found = delta_rule.chunk_gated_delta_rule(*five, final_state=True, initial_state=state)
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    wanted = naive_rule(*exact)
    for mine, reference in zip(found, wanted, strict=True):
        assert mine is not None
        assert (mine - reference).abs().max() <= MAX_RULE_DIFFERENCE
    for results, leaves in ((found, given_inputs), (wanted, exact)):
        total = sum(
            (result * weight).sum() for result, weight in zip(results, weights, strict=True)
        )
        torch.autograd.backward(total, inputs=leaves)
    for mine, reference in zip(given_inputs, exact, strict=True):
        assert (
            mine.grad - reference.grad
        ).abs().max() <= MAX_RULE_GRADIENT_DIFFERENCE * reference.grad.abs().max()


@pytest.mark.parametrize("cut", [1, 2, 3, 7])
def test_a_convolution_goes_on_where_the_parent_ended(cut: int) -> None:
    torch.manual_seed(0)
    inputs, weight = torch.randn(2, 10, 5), torch.randn(5, 1, 4)
    context = last_inputs(inputs[:, :cut], (cut, cut), 3)
    whole = causal_convolution(inputs, weight)
    torch.testing.assert_close(
        causal_convolution(inputs[:, cut:], weight, context), whole[:, cut:], atol=1e-6, rtol=1e-6
    )


def test_the_positions_that_predict_are_those_of_the_separate_sequences() -> None:
    samples, media = make_samples([([3], [2, 1]), ([4], [2])])
    shared = pack(samples, media=media, device=torch.device("cpu"), share_prompts=True)
    # Prompt 0-2, responses 3-4 and 5; then one sequence 6-11 whose response is 10-11.
    assert shared.parents == (-1, 0, 0, -1)
    assert [end - start for start, end in pairwise(shared.cu_seqlens.tolist())] == [3, 2, 1, 6]
    rows = predicting_rows(shared)
    assert rows is not None
    assert rows.tolist() == [2, 3, 2, 9, 10]
