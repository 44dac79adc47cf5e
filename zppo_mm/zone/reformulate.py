"""From hard questions to BCQ, NCQ, hint and prefix prompts.

Source: ZPPO (arXiv 2606.18216), Algorithm 1, steps 3 to 5.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from zppo_mm.config.schema import ZoneConfig
from zppo_mm.experience import Candidate, Group, GroupKind, PromptInstance, Rollout
from zppo_mm.randomness import generator
from zppo_mm.teacher.teacher import CompressedTrace, Compressor, HintWriter, Trace
from zppo_mm.zone.hard import count_of_fraction, pre_cap, select_hard
from zppo_mm.zone.prompts import PromptTemplates

REFORMULATED_KINDS: tuple[GroupKind, ...] = ("bcq", "ncq", "hint", "prefix")
"""Kinds of prompts of one question in their order; each has a switch of its name in the zone."""

TeacherAnswers = Mapping[str, tuple[Rollout, ...]]
"""Teacher rollouts by question id."""


@dataclass(frozen=True, slots=True)
class Composition:
    """Plain groups of a step before any cap; a hard question may be eligible for both kinds."""

    num_easy: int
    num_hard: int
    num_bcq_eligible: int
    num_ncq_eligible: int


@dataclass(frozen=True, slots=True)
class Reformulation:
    """The reformulated prompts of a step and what their compression took.

    Attributes:
        instances: Reformulated prompts, ascending by the accuracy of their question; of one
            question BCQ, NCQ, hint, prefix.
        num_kept: Hard questions left by the pre-cap.
        awaited: Ids of questions whose answers, still on their way, can add prompts, in the order
            of the caps: that of the first one can whatever else is answered. With none, no prompt
            is missing.
        num_candidates: Candidates shown.
        num_compression_rejects: Rewrites refused because they changed the answer.
        num_compression_cuts: Candidates that were cut because no faithful rewrite was had.
        num_hint_rejects: Hints refused because they gave the answer away.
        num_hint_failures: Hint prompts that are missing because no hint could be made.
        failed: Their uids.
    """

    instances: tuple[PromptInstance, ...] = ()
    num_kept: int = 0
    awaited: tuple[str, ...] = ()
    num_candidates: int = 0
    num_compression_rejects: int = 0
    num_compression_cuts: int = 0
    num_hint_rejects: int = 0
    num_hint_failures: int = 0
    failed: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class _Pick:
    """A rollout to be shown and who wrote it."""

    group: Group
    rollout: Rollout
    by_teacher: bool


@dataclass(frozen=True, slots=True)
class _Plan:
    """One future instance, before compression: the candidates it shows, or the one response that
    its hint or prefix is made of.
    """

    kind: GroupKind
    group: Group
    picks: tuple[_Pick, ...]

    @property
    def shows_candidates(self) -> bool:
        return self.kind in ("bcq", "ncq")


def composition(groups: Iterable[Group], answers: TeacherAnswers, tau: float) -> Composition:
    """Count the plain groups of a step by what could be made of them, before any cap and whatever
    kinds are switched on.
    """
    plain = [group for group in groups if group.is_plain]
    hard = select_hard(plain, tau)
    return Composition(
        num_easy=len(plain) - len(hard),
        num_hard=len(hard),
        num_bcq_eligible=sum(_is_bcq_eligible(group, answers) for group in hard),
        num_ncq_eligible=sum(bool(_wrong(group.rollouts)) for group in hard),
    )


class Reformulator:
    """Makes BCQ, NCQ, hint and prefix prompts of hard groups.

    Every choice follows from the seed, the step and the question, so all ranks make the same
    prompts without speaking.

    Args:
        templates: The texts around question and candidates.
        zone: Which kinds are made, and rho_aug.
        seed: The run's seed.
        compressor: Shortens every rollout that is shown, right and wrong alike.
        hints: Makes hints; needed with `zone.hint`.
        student_ids: Returns the tokens that the student would have a rollout's text in; needed with
            `zone.prefix`.
    """

    def __init__(
        self,
        templates: PromptTemplates,
        zone: ZoneConfig,
        seed: int,
        compressor: Compressor,
        *,
        hints: HintWriter | None = None,
        student_ids: Callable[[Rollout], Sequence[int]] | None = None,
    ) -> None:
        assert hints is not None or not zone.hint, "hint prompts need a writer of hints"
        assert student_ids is not None or not zone.prefix, "prefixes need the student's tokenizer"
        self.templates = templates
        self.zone = zone
        self.seed = seed
        self.compressor = compressor
        self.hints = hints
        self.student_ids = student_ids

    def reformulate(
        self,
        hard: Sequence[Group],
        answers: TeacherAnswers,
        step: int,
        num_new: int,
        early: Reformulation | None = None,
        awaited: Collection[str] = (),
    ) -> Reformulation:
        """Return at most `rho_aug * num_new` prompts; while answers are awaited, those that stand
        whatever they will be.

        Which prompts there will be follows from the rollouts alone, so only the candidates of
        prompts that the cap leaves are compressed, in one call. A question that stands in `hard`
        twice is reformulated once, from its less accurate group.

        Args:
            hard: Hard plain groups of the step.
            answers: Fresh teacher rollouts per question id, verified.
            step: Rollout step.
            num_new: New questions of the step.
            early: What was returned before in this step; taken over as it is.
            awaited: Ids of questions whose answers are still on their way.

        Source: ZPPO, Algorithm 1, steps 3 to 5.
        """
        limit = count_of_fraction(self.zone.rho_aug, num_new)
        kept = pre_cap(_one_group_per_question(hard), limit, self.seed, step)
        plans, open_questions = self._standing(kept, answers, awaited, limit, step)
        return replace(
            self._made(plans, step, len(kept), early or Reformulation()), awaited=open_questions
        )

    def _standing(
        self,
        kept: Sequence[Group],
        answers: TeacherAnswers,
        awaited: Collection[str],
        limit: int,
        step: int,
    ) -> tuple[list[_Plan], tuple[str, ...]]:
        """Return the prompts below the cap in every case, and the awaited questions that can have
        one in some case.

        An answer only adds prompts to its own question. So before a question stand at least the
        prompts that the earlier ones have now, and at most these with every kind in use for those
        that are awaited.
        """
        kinds = [kind for kind in REFORMULATED_KINDS if getattr(self.zone, kind)]
        can_add = any(kind != "ncq" for kind in kinds)
        plans: list[_Plan] = []
        open_questions: list[str] = []
        fewest = most = 0
        for group in kept:
            if fewest >= limit:
                break
            own = self._plans(group, answers, step)
            is_open = can_add and group.question.id in awaited
            if is_open:
                open_questions.append(group.question.id)
            places = [kinds.index(plan.kind) for plan in own] if is_open else range(len(own))
            plans += [plan for plan, place in zip(own, places, strict=True) if most + place < limit]
            fewest += len(own)
            most += len(kinds) if is_open else len(own)
        return plans, tuple(open_questions)

    def _made(
        self, plans: Sequence[_Plan], step: int, num_kept: int, early: Reformulation
    ) -> Reformulation:
        """Turn plans into prompts; candidates of those that are there already are not compressed
        again.
        """
        instances = {instance.uid: instance for instance in early.instances}
        new = [plan for plan in plans if _uid(plan, step) not in instances.keys() | early.failed]
        shown = [plan for plan in new if plan.shows_candidates]
        traces = [_trace(pick) for plan in shown for pick in plan.picks]
        compressed = self.compressor.compress(traces, step) if traces else []
        remaining = iter(compressed)
        instances |= {
            _uid(plan, step): self._candidate_prompt(
                plan, [next(remaining) for _ in plan.picks], step
            )
            for plan in shown
        }
        hinted = [plan for plan in new if plan.kind == "hint"]
        hints = (
            self.hints.write([_trace(plan.picks[0]) for plan in hinted], step)
            if self.hints is not None and hinted
            else []
        )
        instances |= {
            _uid(plan, step): self._hint_prompt(plan, hint.text, step)
            for plan, hint in zip(hinted, hints, strict=True)
            if hint.text
        }
        instances |= {
            _uid(plan, step): self._prefix_prompt(plan, step)
            for plan in new
            if plan.kind == "prefix"
        }
        return Reformulation(
            instances=tuple(
                instances[uid] for uid in (_uid(plan, step) for plan in plans) if uid in instances
            ),
            num_kept=num_kept,
            num_candidates=early.num_candidates + len(traces),
            num_compression_rejects=early.num_compression_rejects
            + sum(trace.rejects for trace in compressed),
            num_compression_cuts=early.num_compression_cuts
            + sum(trace.method == "cut" for trace in compressed),
            num_hint_rejects=early.num_hint_rejects + sum(hint.rejects for hint in hints),
            num_hint_failures=early.num_hint_failures + sum(hint.text is None for hint in hints),
            failed=early.failed
            | {
                _uid(plan, step)
                for plan, hint in zip(hinted, hints, strict=True)
                if hint.text is None
            },
        )

    def _plans(self, group: Group, answers: TeacherAnswers, step: int) -> list[_Plan]:
        """Return the prompts of one question, as far as its rollouts allow them and the zone has
        them switched on.
        """
        plans: list[_Plan] = []
        wrong = _wrong(group.rollouts)
        right = right_rollouts(answers.get(group.question.id, ()))
        if self.zone.bcq and right and wrong:
            rng = generator(self.seed, "reformulate", step, group.question.id)
            pair = [
                _Pick(group, right[rng.integers(len(right))], by_teacher=True),
                _Pick(group, wrong[rng.integers(len(wrong))], by_teacher=False),
            ]
            plans.append(_Plan("bcq", group, tuple(pair[i] for i in rng.permutation(2))))
        if self.zone.ncq and wrong:
            plans.append(
                _Plan(
                    "ncq",
                    group,
                    tuple(_Pick(group, rollout, by_teacher=False) for rollout in wrong),
                )
            )
        for kind, is_on in (("hint", self.zone.hint), ("prefix", self.zone.prefix)):
            if is_on and right:
                chosen = right[
                    generator(self.seed, kind, step, group.question.id).integers(len(right))
                ]
                plans.append(
                    _Plan(cast(GroupKind, kind), group, (_Pick(group, chosen, by_teacher=True),))
                )
        return plans

    def _hint_prompt(self, plan: _Plan, hint: str, step: int) -> PromptInstance:
        question = plan.group.question
        text = self.templates.escaped(hint)
        shown = Candidate(text, "teacher", correct=True, answer=plan.picks[0].rollout.parsed)
        return PromptInstance(
            _uid(plan, step),
            question,
            plan.kind,
            self.templates.hint_text(question, text),
            (shown,),
        )

    def _prefix_prompt(self, plan: _Plan, step: int) -> PromptInstance:
        """Return the plain prompt with the first part of the response: at least one token, and
        never all of them.
        """
        assert self.student_ids is not None
        ids = self.student_ids(plan.picks[0].rollout)
        count = min(max(count_of_fraction(self.zone.prefix_share, len(ids)), 1), len(ids) - 1)
        question = plan.group.question
        prefix = tuple(int(token) for token in ids[:count])
        return PromptInstance(
            _uid(plan, step),
            question,
            plan.kind,
            self.templates.plain_text(question),
            response_prefix=prefix,
        )

    def _candidate_prompt(
        self, plan: _Plan, compressed: Sequence[CompressedTrace], step: int
    ) -> PromptInstance:
        question = plan.group.question
        candidates = tuple(
            Candidate(
                text=self.templates.escaped(trace.text),
                source="teacher" if pick.by_teacher else "student",
                correct=_is_right(pick.rollout),
                answer=pick.rollout.parsed,
            )
            for pick, trace in zip(plan.picks, compressed, strict=True)
        )
        texts = [candidate.text for candidate in candidates]
        if plan.kind == "bcq":
            text = self.templates.bcq_text(question, texts)
        else:
            text = self.templates.ncq_text(question, distinct_answers(candidates), texts)
        return PromptInstance(_uid(plan, step), question, plan.kind, text, candidates)


def _uid(plan: _Plan, step: int) -> str:
    return f"{step}/{plan.kind}/{plan.group.question.id}"


def _trace(pick: _Pick) -> Trace:
    return Trace(pick.group.question, pick.rollout.text, pick.rollout.parsed)


def distinct_answers(candidates: Iterable[Candidate]) -> list[str]:
    """Return the parsed answers of candidates, each once, in the order of their first
    appearance.
    """
    return list(
        dict.fromkeys(
            c.answer.strip() for c in candidates if c.answer is not None and c.answer.strip()
        )
    )


def _one_group_per_question(groups: Sequence[Group]) -> list[Group]:
    hardest: dict[str, Group] = {}
    for group in groups:
        other = hardest.get(group.question.id)
        if other is None or group.accuracy < other.accuracy:
            hardest[group.question.id] = group
    return list(hardest.values())


def _is_bcq_eligible(group: Group, answers: TeacherAnswers) -> bool:
    return bool(right_rollouts(answers.get(group.question.id, ()))) and bool(_wrong(group.rollouts))


def _is_right(rollout: Rollout) -> bool:
    return rollout.reward >= 1


def right_rollouts(rollouts: Iterable[Rollout]) -> list[Rollout]:
    """Return the rollouts with reward 1."""
    return [rollout for rollout in rollouts if _is_right(rollout)]


def _wrong(rollouts: Iterable[Rollout]) -> list[Rollout]:
    return [rollout for rollout in rollouts if not _is_right(rollout)]
