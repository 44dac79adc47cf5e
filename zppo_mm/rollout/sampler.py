"""From prompts to verified groups: every replica samples some, all ranks end with all groups."""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import compress
from typing import Protocol

from data.question import Question
from encoders.processor import VisionInput
from zppo_mm.experience import Group, Prompt, PromptInstance, Rollout
from zppo_mm.interruption import StopRequested
from zppo_mm.methods import PLAIN_KINDS
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.exchange import Exchange
from zppo_mm.rewards.verdict import Verdict
from zppo_mm.rollout.engine import Generation, GenerationRequest, RolloutEngine, SamplingParams
from zppo_mm.rollout.prompt import PromptEncoder, PromptError
from zppo_mm.rollout.soundness import NOT_FINITE, Sampled, Soundness, check_rewards, first_break

logger = logging.getLogger(__name__)

UNGRADED = "ungraded"


class Grader(Protocol):
    """Grades responses; `zppo_mm.rewards.verify.Verifier` is one."""

    def verify_all(self, items: Sequence[tuple[Question, str]]) -> Sequence[Verdict]:
        """Return one verdict per question and response text, in order."""
        ...


@dataclass(frozen=True, slots=True)
class _Encoded:
    """An instance of this replica, by its index in the whole list."""

    index: int
    prompt: Prompt
    vision: tuple[VisionInput, ...]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """A replica's result for one instance: its group's parts, or why there is none."""

    index: int
    prompt: Prompt | None = None
    rollouts: tuple[Rollout, ...] = ()
    ungraded: tuple[Rollout, ...] = ()
    reason: str = ""
    detail: str = ""
    num_preemptions: int = 0


class Sampler(Protocol):
    """Samples and verifies groups; `GroupSampler` is one."""

    @property
    def failed(self) -> Mapping[str, str]:
        """Instances of the last call without a group: reasons by uid."""
        ...

    @property
    def num_preemptions(self) -> int:
        """How often a rollout of the last call had to be computed again."""
        ...

    def sample(
        self,
        instances: Sequence[PromptInstance],
        params: SamplingParams,
        num_rollouts: int,
        step: int,
    ) -> list[Group]:
        """Return the groups of the instances in their order, the same on every rank."""
        ...


class GroupSampler:
    """Samples and verifies groups with one engine.

    Args:
        engine: Continues prompts with the current weights.
        encoder: Of the same model.
        verifier: Grades, on one rank per replica.
        exchange: The replicas.

    Attributes:
        failures: Prompts without a group so far, by reason.
        failed: Those of the last call: reasons by uid.
        num_preemptions: How often a rollout of the last call had to be computed again.
    """

    def __init__(
        self, engine: RolloutEngine, encoder: PromptEncoder, verifier: Grader, exchange: Exchange
    ) -> None:
        self._engine = engine
        self._encoder = encoder
        self._verifier = verifier
        self._exchange = exchange
        self.failures: Counter[str] = Counter()
        self.failed: dict[str, str] = {}
        self.num_preemptions = 0
        self._soundness = Soundness()

    def with_grader(self, verifier: Grader) -> GroupSampler:
        """Return a sampler that differs in who grades alone."""
        other = copy.copy(self)
        other._verifier = verifier
        return other

    def sample(
        self,
        instances: Sequence[PromptInstance],
        params: SamplingParams,
        num_rollouts: int,
        step: int,
    ) -> list[Group]:
        """Return the groups of all instances, in order and the same on every rank.

        An instance whose prompt cannot be made, for one of whose rollouts the network computes
        logits that are not finite, or none of whose rollouts can be graded, has no group; it is
        logged and counted in `failures`. Of the others, rollouts that cannot be graded are set
        apart in `Group.ungraded`.

        Args:
            instances: The same list on every rank.
            params: How tokens are drawn.
            num_rollouts: Rollouts per instance.
            step: Rollout step whose weights sample; recorded in the rollouts.

        Raises:
            NotFiniteError: On every rank: the network is broken, or a reward is not finite.
        """
        mine = split_instances(instances, self._exchange.num_replicas)[self._exchange.replica]
        encoded, failed = self._encode(instances, mine)
        requests = [
            GenerationRequest(
                item.prompt, item.vision, num_rollouts, ("rollout", instances[item.index].uid)
            )
            for item in encoded
        ]
        # An engine is called even with nothing to do: its ranks may have collectives in it.
        with self._stopping_together():
            generations = self._engine.generate(requests, params)
        outcomes = failed
        if self._exchange.is_leader:
            pairs = list(zip(encoded, generations, strict=True))
            broken = [
                _Outcome(item.index, reason=NOT_FINITE, detail=where)
                for item, group in pairs
                if (where := self._break(group))
            ]
            unsound = {outcome.index for outcome in broken}
            sound = [(item, group) for item, group in pairs if item.index not in unsound]
            preemptions = {
                item.index: sum(each.num_preemptions for each in group) for item, group in pairs
            }
            outcomes = [
                replace(each, num_preemptions=preemptions.get(each.index, 0))
                for each in (*failed, *broken, *self._grade(instances, sound, step))
            ]
        collected = self._collect(outcomes)
        self.num_preemptions = sum(each.num_preemptions for each in collected.values())
        # All ranks know all that broke, and so come to the same end.
        self._soundness.note(
            [
                Sampled(
                    instances[index].question.id,
                    outcome.detail if outcome.reason == NOT_FINITE else "",
                )
                for index, outcome in sorted(collected.items())
                if outcome.prompt is not None or outcome.reason in (NOT_FINITE, UNGRADED)
            ]
        )
        return self._groups(instances, collected)

    def adopt(
        self, instances: Sequence[PromptInstance], rollouts: Sequence[tuple[Rollout, ...]]
    ) -> list[Group]:
        """Return groups of rollouts that are there already, in order and the same on every rank.

        An instance whose prompt cannot be made is treated as by `sample`.

        Args:
            instances: The same list on every rank.
            rollouts: Per instance at least one, in this model's tokens.
        """
        mine = split_instances(instances, self._exchange.num_replicas)[self._exchange.replica]
        encoded, failed = self._encode(instances, mine)
        outcomes = [
            *failed,
            *(_Outcome(item.index, item.prompt, rollouts[item.index]) for item in encoded),
        ]
        collected = self._collect(outcomes)
        return self._groups(instances, collected)

    def _collect(self, outcomes: Sequence[_Outcome]) -> dict[int, _Outcome]:
        """Return the outcomes of all replicas by index."""
        replicas = self._exchange.gather(outcomes)
        return {outcome.index: outcome for replica in replicas for outcome in replica}

    def respond(self, texts: Sequence[str], params: SamplingParams, name: str) -> list[str | None]:
        """Return one response per user text, without media and without a grade, from the `<think>`
        on that its prompt may have opened; the same on every rank.

        A response is `None` if the network computes logits that are not finite.

        Args:
            texts: The same list on every rank.
            params: How tokens are drawn.
            name: Names the random streams, together with the text.

        Raises:
            NotFiniteError: On every rank: the network is broken.
        """
        replica, size = self._exchange.replica, self._exchange.num_replicas
        nothing = Question(id=name, text="", media=(), answer="", answer_type="open")
        requests = [
            # Named by the text, not by its index: with a teacher that answers meanwhile, the same
            # rewrites come in other batches.
            GenerationRequest(
                *self._encoder.encode(texts[index], nothing), 1, ("respond", name, texts[index])
            )
            for index in range(replica, len(texts), size)
        ]
        with self._stopping_together():
            generations = self._engine.generate(requests, params)
        replies = self._exchange.gather(
            [
                (self._encoder.decode_whole(group[0].response_ids), self._break(group))
                for group in generations
            ]
        )
        ordered = [replies[index % size][index // size] for index in range(len(texts))]
        self._soundness.note(
            [Sampled(f"{name}/{index}", where) for index, (_, where) in enumerate(ordered)]
        )
        return [None if where else text for text, where in ordered]

    def _break(self, generations: Sequence[Generation]) -> str:
        """Return where a prompt's first broken rollout broke; empty if none did."""
        return first_break(generations, parallel.rank())

    @contextmanager
    def _stopping_together(self) -> Iterator[None]:
        """A replica that stops in the middle of sampling joins the others in their exchange, where
        they stop too.
        """
        try:
            yield
        except StopRequested:
            self._exchange.gather([])
            raise

    def _encode(
        self, instances: Sequence[PromptInstance], mine: Sequence[int]
    ) -> tuple[list[_Encoded], list[_Outcome]]:
        """Encode this replica's instances; what fails on one of its ranks is left out on all,
        or they would sample different lists.
        """
        encoded: list[_Encoded] = []
        failed: list[_Outcome] = []
        for index in mine:
            try:
                prompt, vision = self._encoder.encode(
                    instances[index].text, instances[index].question
                )
            except PromptError as error:
                failed.append(_Outcome(index, reason=error.reason, detail=str(error)))
            else:
                encoded.append(
                    _Encoded(index, prompt.continued(instances[index].response_prefix), vision)
                )
        known = {
            outcome.index: outcome
            for rank in self._exchange.gather_in_replica(failed)
            for outcome in rank
        }
        return [item for item in encoded if item.index not in known], [
            known[index] for index in sorted(known)
        ]

    def _grade(
        self,
        instances: Sequence[PromptInstance],
        pairs: Sequence[tuple[_Encoded, Sequence[Generation]]],
        step: int,
    ) -> list[_Outcome]:
        """Decode and verify all responses in one batch."""
        texts = [
            [
                self._encoder.decode(
                    [*instances[item.index].response_prefix, *generation.response_ids]
                )
                for generation in group
            ]
            for item, group in pairs
        ]
        items = [
            (instances[item.index].question, text)
            for (item, _), group in zip(pairs, texts, strict=True)
            for text in group
        ]
        verdicts = iter(self._verifier.verify_all(items))
        outcomes = []
        for (item, group), group_texts in zip(pairs, texts, strict=True):
            verdicts_of_group = [next(verdicts) for _ in group]
            rollouts = [
                _rollout(generation, text, verdict, step)
                for generation, text, verdict in zip(
                    group, group_texts, verdicts_of_group, strict=True
                )
            ]
            has_reward = [verdict.reward is not None for verdict in verdicts_of_group]
            graded = tuple(compress(rollouts, has_reward))
            ungraded = tuple(
                rollout
                for rollout, is_graded in zip(rollouts, has_reward, strict=True)
                if not is_graded
            )
            if graded:
                outcomes.append(_Outcome(item.index, item.prompt, graded, ungraded))
            else:
                outcomes.append(
                    _Outcome(
                        item.index, reason=UNGRADED, detail="none of its rollouts could be graded"
                    )
                )
        return outcomes

    def _groups(
        self, instances: Sequence[PromptInstance], outcomes: dict[int, _Outcome]
    ) -> list[Group]:
        """Make groups of the results of all replicas."""
        groups = []
        self.failed = {}
        for index, instance in enumerate(instances):
            outcome = outcomes[index]
            if outcome.prompt is None:
                self.failures[outcome.reason] += 1
                self.failed[instance.uid] = outcome.reason
                logger.warning(
                    "no group for %s: %s: %s", instance.uid, outcome.reason, outcome.detail
                )
            else:
                check_rewards(instance.uid, [rollout.reward for rollout in outcome.rollouts])
                groups.append(Group(instance, outcome.prompt, outcome.rollouts, outcome.ungraded))
        return groups


def split_instances(instances: Sequence[PromptInstance], num_replicas: int) -> list[list[int]]:
    """Deal instances to replicas, as even in number as possible.

    Plain ones go in order, as the question feed dealt them, so that a replica finds their media
    open already. The others go from the longest text to the shortest: in their own order BCQ and
    NCQ alternate, and one replica would get all the long ones.

    Returns:
        Ascending indices per replica.
    """
    plain = [index for index, instance in enumerate(instances) if instance.kind in PLAIN_KINDS]
    reformulated = [
        index for index, instance in enumerate(instances) if instance.kind not in PLAIN_KINDS
    ]
    reformulated.sort(key=lambda index: (-len(instances[index].text), index))
    order = [*plain, *reformulated]
    return [sorted(order[replica::num_replicas]) for replica in range(num_replicas)]


def _rollout(generation: Generation, text: str, verdict: Verdict, step: int) -> Rollout:
    return Rollout(
        response_ids=generation.response_ids,
        rollout_logprobs=generation.rollout_logprobs,
        finish_reason=generation.finish_reason,
        text=text,
        parsed=verdict.parsed,
        reward=math.nan if verdict.reward is None else float(verdict.reward),
        policy_version=step,
        parts=verdict.parts,
    )
