"""What flows through a ZPPO step: one frozen dataclass per thing, shapes first.

Arrays of tokens are NumPy on the sampling side and torch from `Microbatch` on. Importing this
module does not import torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

from data.question import Question
from zppo_mm.accuracy import accuracy_of, is_correct
from zppo_mm.methods import PLAIN_KINDS
from zppo_mm.methods import GroupKind as GroupKind

if TYPE_CHECKING:
    import torch

    from encoders.processor import VisionInput

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
Advantages = Mapping[str, FloatArray]
"""Per group uid `[rollouts]`."""
FinishReason = Literal["stop", "length"]
NO_TOKEN = -1
"""Stands where a token could be and none is; no token has this id."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A compressed response shown inside a BCQ or NCQ prompt.

    Attributes:
        text: The text as shown, special tokens escaped.
        source: Who wrote the response that was compressed.
        correct: Whether the compressed response was correct.
        answer: Its parsed final answer, `None` if it had none.
    """

    text: str
    source: Literal["teacher", "student"]
    correct: bool
    answer: str | None


@dataclass(frozen=True, slots=True)
class PromptInstance:
    """A question together with the text that the student is asked: one future group.

    Attributes:
        uid: Unique over the run: `<step>/<kind>/<question id>`, with the index in the step
            before the id where it is plain; `<step>/inject/<kind>/<index>/<question id>` for a
            plain group into which a rollout was put.
        question: The question whose media, earlier messages and answer count.
        kind: Where the prompt comes from.
        text: The whole text of the last message, closing format instruction included.
        candidates: Shown candidates in the order shown, or the one hint; empty for plain prompts.
        response_prefix: Tokens, in the student's vocabulary, that the response is made to begin
            with; they carry no loss.
    """

    uid: str
    question: Question
    kind: GroupKind
    text: str
    candidates: tuple[Candidate, ...] = ()
    response_prefix: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenised prompt, placeholders of its media expanded.

    Attributes:
        text: The rendered chat text before the placeholders were expanded.
        token_ids: `[prompt]`.
        positions: `[3, prompt]` rotary positions (time, height, width).
        next_position: Position of the first response token, the same on the three axes.
        grids: `(t, h, w)` in patches of every image and video, in prompt order.
    """

    text: str
    token_ids: IntArray
    positions: IntArray
    next_position: int
    grids: tuple[tuple[int, int, int], ...] = ()

    def continued(self, ids: Sequence[int] | IntArray) -> Prompt:
        """Return the prompt with text tokens behind it, which advance all three rotary axes
        together; `text` stays as it is.
        """
        positions = np.broadcast_to(self.next_position + np.arange(len(ids)), (3, len(ids)))
        return replace(
            self,
            token_ids=np.concatenate([self.token_ids, np.asarray(ids, dtype=np.int64)]),
            positions=np.concatenate([self.positions, positions], axis=1),
            next_position=self.next_position + len(ids),
        )


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """The tokens that the teacher found most likely at every token of a text, given the tokens
    before it.

    Attributes:
        ids: `[tokens, k]`, each at most once per token; `NO_TOKEN` where it named fewer.
        logprobs: `[tokens, k]` of the teacher.
    """

    ids: IntArray
    logprobs: FloatArray


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Consecutive tokens of a response that the same weights drew.

    Attributes:
        version: Rollout step that samples with these weights when it is on-policy.
        num_tokens: Tokens drawn with them.
    """

    version: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled and verified response.

    Attributes:
        response_ids: `[response]`, the stop token included when it was sampled, a given prefix left
            out.
        rollout_logprobs: `[response]`, log-probs of the sampling policy at the sampling
            temperature, all finite; `None` if they are not known: the training forward pass gives
            them then.
        finish_reason: `stop` or `length`.
        text: Decoded response, a given prefix included, without special tokens at the end.
        parsed: Final answer (content of the last `\\boxed{}`), `None` if nothing was boxed.
        reward: In [0, 1]; NaN in `Group.ungraded`, so that nothing can be computed with it by
            mistake.
        policy_version: Rollout step whose weights sampled it, or its first tokens.
        author: Who wrote it; a teacher's rollout is in a group only where the method trains on
            teacher text.
        teacher_top: `[response, k]`, if the teacher returned its log-probs with its answer.
        versions: Which weights drew its tokens, in order, if they were not all the same.
        parts: Of the reward, by name; empty unless a reward function names some.
    """

    response_ids: IntArray
    rollout_logprobs: FloatArray | None
    finish_reason: FinishReason
    text: str
    parsed: str | None
    reward: float
    policy_version: int
    author: Literal["teacher", "student"] = "student"
    teacher_top: TopLogprobs | None = None
    versions: tuple[VersionSpan, ...] = ()
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """How right it is, in [0, 1]: what hardness, graduation and candidates go by."""
        return accuracy_of(self.reward, self.parts)

    @property
    def is_correct(self) -> bool:
        """Whether it has the full accuracy of 1."""
        return is_correct(self.accuracy)


@dataclass(frozen=True, slots=True)
class Group:
    """All rollouts of one prompt; advantages are computed inside it.

    Attributes:
        instance: What was asked.
        prompt: How it was asked.
        rollouts: Those with a reward, at least one.
        ungraded: Those that neither judge nor rules could grade: no part of accuracy, advantages,
            candidates or loss, but of the record.
    """

    instance: PromptInstance
    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    ungraded: tuple[Rollout, ...] = ()

    @property
    def uid(self) -> str:
        return self.instance.uid

    @property
    def question(self) -> Question:
        return self.instance.question

    @property
    def kind(self) -> GroupKind:
        return self.instance.kind

    @property
    def is_plain(self) -> bool:
        """Whether the prompt is the unchanged question (new or replayed)."""
        return self.instance.kind in PLAIN_KINDS

    @property
    def accuracy(self) -> float:
        """Mean accuracy over the rollouts, the method's r-bar."""
        return sum(rollout.accuracy for rollout in self.rollouts) / len(self.rollouts)

    @property
    def rewards_differ(self) -> bool:
        """Whether its advantages are not all 0; a group that has none is trivial."""
        return len({rollout.reward for rollout in self.rollouts}) > 1


@dataclass(frozen=True, slots=True)
class BufferUpdate:
    """What one step did to the replay buffer, as question ids.

    Attributes:
        admitted: In the order of admission; an id may be both admitted and evicted.
        graduated: In the order of the groups.
        evicted: Oldest first.
        content: The whole buffer after the step, oldest admission first.
    """

    admitted: tuple[str, ...]
    graduated: tuple[str, ...]
    evicted: tuple[str, ...]
    content: tuple[str, ...]


@dataclass(slots=True)
class BufferFates:
    """What became of the questions of the replay buffer since the run began, by accuracy at
    admission and by number of visits.
    """

    admitted_by_accuracy: Counter[float] = field(default_factory=Counter)
    graduated_by_accuracy: Counter[float] = field(default_factory=Counter)
    evicted_by_accuracy: Counter[float] = field(default_factory=Counter)
    graduated_by_visits: Counter[int] = field(default_factory=Counter)
    evicted_by_visits: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class TrainingSample:
    """One sequence to train on.

    Attributes:
        uid: Group it comes from.
        question: For its media, opened again by reference on the first pipeline stage.
        token_ids: `[tokens]`, prompt then response.
        positions: `[3, tokens]`.
        loss_mask: `[tokens]`, 1 on response tokens. Entry i belongs to token i itself, not to its
            successor.
        old_logprobs: `[tokens]`, of token i given the tokens before it; 0 where the mask is 0.
            `None` if they are not known.
        advantages: `[tokens]`; 0 where the mask is 0.
        grids: `(t, h, w)` in patches of its media.
        teacher_top: `[tokens, k]`, of token i given the tokens before it; no tokens where the mask
            is 0.
        token_weight: Weight of each of its loss tokens in distillation.
        policy_version: Rollout step whose weights sampled it.
        importance: `[tokens]` weights of the loss; `None` if they are all 1.
    """

    uid: str
    question: Question
    token_ids: IntArray
    positions: IntArray
    loss_mask: FloatArray
    old_logprobs: FloatArray | None
    advantages: FloatArray
    grids: tuple[tuple[int, int, int], ...] = ()
    teacher_top: TopLogprobs | None = None
    token_weight: float = 1.0
    policy_version: int = 0
    importance: FloatArray | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def token_weights(self) -> FloatArray:
        """`token_weight` at every token, `[tokens]`."""
        return np.full(self.num_tokens, self.token_weight, dtype=np.float32)

    @property
    def num_patches(self) -> int:
        """Patches of all its media."""
        return sum(math.prod(grid) for grid in self.grids)

    @property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask.sum())

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens before the first that carries loss; all if none does."""
        return int(np.argmax(self.loss_mask != 0)) if self.loss_mask.any() else self.num_tokens


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Packed sequences for one forward pass.

    A sequence may continue another one: where a group's rollouts share their prompt, its responses
    follow it, each a sequence of its own.

    Attributes:
        token_ids: `[tokens]` int64.
        positions: `[3, tokens]` int64, restarting with every sequence that continues none.
        cu_seqlens: `[sequences + 1]` int32.
        loss_mask: `[tokens]` float32; like the next three, entry i belongs to token i.
        old_logprobs: `[tokens]` float32; 0 where they are not known.
        advantages: `[tokens]` float32.
        token_weights: `[tokens]` float32, of the divergence in distillation.
        patches: `[patches, channels * temporal * patch * patch]` float32; `None` without media and
            off the first stage.
        grids: `[media, 3]` int64, `None` without media.
        uids: Groups of the sequences, to name them when something goes wrong; padding has none.
        parents: Per sequence the index of the one that it continues, -1 for none; `None` if none
            does.
        unknown: `[tokens]` bool, tokens whose old log-probs are not known; `None` if all are.
        importance: `[tokens]` float32 weights of the loss; `None` if they are all 1.
        teacher_ids: `[tokens, k]` int64, the teacher's most likely tokens at token i,
            `NO_TOKEN` where there are fewer; `None` if no sample has any.
        teacher_logprobs: `[tokens, k]` float32 of the same.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    loss_mask: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    token_weights: torch.Tensor
    patches: torch.Tensor | None = None
    grids: torch.Tensor | None = None
    uids: tuple[str, ...] = ()
    parents: tuple[int, ...] | None = None
    unknown: torch.Tensor | None = None
    importance: torch.Tensor | None = None
    teacher_ids: torch.Tensor | None = None
    teacher_logprobs: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """One gradient update: this rank's micro-batches and the one global denominator.

    Attributes:
        microbatches: Of this rank; opened one at a time, so that the pixels of a whole mini-batch
            never lie in memory together.
        num_loss_tokens: Loss tokens of all ranks, those of samples that need no forward pass
            included.
        denominator: Sum of the weights of those tokens, by which the summed loss is divided; 1
            without any.
    """

    microbatches: Sequence[Microbatch]
    num_loss_tokens: int
    denominator: float


class MediaSource(Protocol):
    """Opens and patchifies the media of a question, by reference, deterministically."""

    def vision_inputs(self, question: Question) -> Sequence[VisionInput]:
        """Return one input per media reference, in prompt order.

        Raises:
            ReasonedError: A medium cannot be opened; `timeout` and `decoder_died` may go well at
                another try.
        """
        ...
