"""From hard questions to reformulated prompts: which there are, in what order, below which cap.

`zppo_mm.zone.recipes` says how the prompts of each kind are made.

Source: ZPPO (arXiv 2606.18216), Algorithm 1, steps 3 to 5.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace

from zppo_mm.config.schema import ZoneConfig
from zppo_mm.experience import Candidate, Group, GroupKind, PromptInstance, Rollout
from zppo_mm.methods import REFORMULATED, Kind
from zppo_mm.randomness import generator
from zppo_mm.teacher.teacher import CompressedTrace, Compressor, Hint, HintWriter, Trace
from zppo_mm.zone.hard import count_of_fraction, pre_cap, select_hard
from zppo_mm.zone.prompts import PromptTemplates
from zppo_mm.zone.recipes import RECIPES, Recipe

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
        instances: Reformulated prompts, ascending by the accuracy of their question; those of one
            question in the order of `KINDS`.
        num_kept: Hard questions left by the pre-cap.
        awaited: Ids of questions whose pending answers can add prompts, in the order of the caps:
            that of the first one can whatever the other answers are. If empty, no prompt is
            missing.
        num_candidates: Candidates shown.
        num_compression_rejects: Rewrites refused because they changed the answer or had no
            complete summary.
        num_compression_cuts: Candidates that were cut because there was no faithful rewrite.
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
class _Plan:
    """A prompt before any rollout is rewritten: the rollouts that it is made of."""

    uid: str
    kind: GroupKind
    group: Group
    picks: tuple[Rollout, ...]

    @property
    def recipe(self) -> Recipe:
        return RECIPES[self.kind]

    @property
    def traces(self) -> list[Trace]:
        return [Trace(self.group.question, pick.text, pick.parsed) for pick in self.picks]


def composition(groups: Iterable[Group], answers: TeacherAnswers, tau: float) -> Composition:
    """Count the plain groups of a step by the prompts that they allow, before any cap and whatever
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


@dataclass(frozen=True, slots=True)
class Reformulator:
    """Makes reformulated prompts of hard groups.

    Every choice follows from the seed, the step and the question, so all ranks make the same
    prompts without communication.

    Attributes:
        templates: The texts around question and candidates.
        zone: Which kinds are made, rho_aug, and the length of a prefix.
        seed: The run's seed.
        compressor: Compresses every candidate, correct and wrong alike.
        hints: Writes hints; needed by kinds of the form `hint`.
        student_ids: Returns a rollout's text as the student's tokens; needed by kinds of the form
            `prefix`.
    """

    templates: PromptTemplates
    zone: ZoneConfig
    seed: int
    compressor: Compressor
    _: KW_ONLY
    hints: HintWriter | None = None
    student_ids: Callable[[Rollout], Sequence[int]] | None = None

    def __post_init__(self) -> None:
        forms = {RECIPES[kind.name].form for kind in self.kinds}
        assert self.hints is not None or "hint" not in forms, "hint prompts need a writer of hints"
        assert self.student_ids is not None or "prefix" not in forms, "prefixes need a tokenizer"

    @property
    def kinds(self) -> list[Kind]:
        """What is made, in the order of the cap within a question."""
        return [kind for kind in REFORMULATED if kind in self.zone.kinds]

    def kept(
        self, hard: Sequence[Group], step: int, num_new: int, to_come: Iterable[str] = ()
    ) -> list[Group]:
        """Return the groups that the pre-cap keeps, as `pre_cap` does; of a question that is in
        `hard` twice, the less accurate one.
        """
        limit = count_of_fraction(self.zone.rho_aug, num_new)
        return pre_cap(_one_group_per_question(hard), limit, self.seed, step, to_come)

    def reformulate(
        self,
        hard: Sequence[Group],
        answers: TeacherAnswers,
        step: int,
        num_new: int,
        early: Reformulation | None = None,
        awaited: Collection[str] = (),
    ) -> Reformulation:
        """Return at most `rho_aug * num_new` prompts; while answers are pending, those that will be
        in the step whatever the answers are.

        Which prompts there are follows from the rewards alone, so only the candidates of prompts
        below the cap are compressed, in one call. A question that is in `hard` twice is
        reformulated once, from its less accurate group.

        Args:
            hard: Hard plain groups of the step.
            answers: Fresh teacher rollouts per question id, verified.
            step: Rollout step.
            num_new: New questions of the step.
            early: What an earlier call of this step returned; its prompts are kept.
            awaited: Ids of questions whose answers are pending.

        Source: ZPPO, Algorithm 1, steps 3 to 5.
        """
        limit = count_of_fraction(self.zone.rho_aug, num_new)
        # The pre-cap sorts by accuracy, so what follows can walk through the questions in order.
        kept = self.kept(hard, step, num_new)
        plans, open_questions = self._certain(kept, answers, awaited, limit, step)
        return replace(
            self._made(plans, len(kept), step, early or Reformulation()), awaited=open_questions
        )

    def _certain(
        self,
        kept: Sequence[Group],
        answers: TeacherAnswers,
        awaited: Collection[str],
        limit: int,
        step: int,
    ) -> tuple[list[_Plan], tuple[str, ...]]:
        """Return the prompts that are below the cap in every case, and the awaited questions that
        have one below the cap in some case.

        The cap takes prompts question by question. A pending answer can only add prompts to its own
        question, so the number of prompts before a question has two bounds: `fewest`, the prompts
        that the earlier questions have now, and `most`, as if every awaited one had all kinds.
        """
        # Prompts without the teacher, such as NCQ, depend on no answer.
        can_add = any(kind.uses_teacher for kind in self.kinds)
        order = {kind.name: index for index, kind in enumerate(self.kinds)}
        plans: list[_Plan] = []
        open_questions: list[str] = []
        fewest = most = 0
        for group in kept:
            # From here on the cap is reached in every case.
            if fewest >= limit:
                break
            own = self._plans(group, answers, step)
            is_open = can_add and group.question.id in awaited
            if is_open:
                open_questions.append(group.question.id)
            for index, plan in enumerate(own):
                # An answer can add prompts of earlier kinds, which move this one towards the cap.
                num_before = order[plan.kind] if is_open else index
                if most + num_before < limit:
                    plans.append(plan)
            # Both count prompts before the next question; equal if nothing is awaited.
            fewest += len(own)
            most += len(self.kinds) if is_open else len(own)
        return plans, tuple(open_questions)

    def _plans(self, group: Group, answers: TeacherAnswers, step: int) -> list[_Plan]:
        """Return the prompts of one question that its rollouts allow."""
        question = group.question
        correct = correct_rollouts(answers.get(question.id, ()))
        wrong = _wrong(group.rollouts)
        plans = []
        for kind in self.kinds:
            recipe = RECIPES[kind.name]
            # A stream per kind and question: what one prompt draws changes no other one.
            rng = generator(self.seed, recipe.stream, step, question.id)
            picks = tuple(recipe.pick(correct, wrong, rng))
            if picks:
                uid = f"{step}/{kind.name}/{question.id}"
                plans.append(_Plan(uid, kind.name, group, picks))
        return plans

    def _made(
        self, plans: Sequence[_Plan], num_kept: int, step: int, early: Reformulation
    ) -> Reformulation:
        """Turn plans into prompts; those that an earlier call made, or failed to make, are not
        made again.
        """
        instances = {instance.uid: instance for instance in early.instances}
        # An early prompt is already being answered, so it must stay as it is.
        new = [plan for plan in plans if plan.uid not in instances.keys() | early.failed]
        compressed = self._compressed(new, step)
        hints = self._hints(new, step)
        for plan in new:
            if plan.recipe.form == "prefix":
                instances[plan.uid] = self._prefix_prompt(plan)
            elif plan.recipe.form == "candidates":
                texts = [trace.text for trace in compressed[plan.uid]]
                instances[plan.uid] = self._prompt(plan, texts)
            elif (hint := hints[plan.uid].text) is not None:
                instances[plan.uid] = self._prompt(plan, [hint])
        traces = [trace for each in compressed.values() for trace in each]
        failed = {uid for uid, hint in hints.items() if hint.text is None}
        return Reformulation(
            # In the order of the plans, not in that of the calls that made them.
            instances=tuple(instances[plan.uid] for plan in plans if plan.uid in instances),
            num_kept=num_kept,
            num_candidates=early.num_candidates + len(traces),
            num_compression_rejects=early.num_compression_rejects
            + sum(trace.rejects for trace in traces),
            num_compression_cuts=early.num_compression_cuts
            + sum(trace.method == "cut" for trace in traces),
            num_hint_rejects=early.num_hint_rejects + sum(hint.rejects for hint in hints.values()),
            num_hint_failures=early.num_hint_failures + len(failed),
            failed=early.failed | failed,
        )

    def _compressed(self, plans: Sequence[_Plan], step: int) -> dict[str, list[CompressedTrace]]:
        """Compress the candidates of all plans in one call; returns them by uid."""
        showing = [plan for plan in plans if plan.recipe.form == "candidates"]
        traces = [trace for plan in showing for trace in plan.traces]
        # One flat list over all prompts, dealt out again by the number of picks of each.
        remaining = iter(self.compressor.compress(traces, step) if traces else ())
        return {plan.uid: [next(remaining) for _ in plan.picks] for plan in showing}

    def _hints(self, plans: Sequence[_Plan], step: int) -> dict[str, Hint]:
        """Write the hints of all plans in one call; returns them by uid."""
        hinted = [plan for plan in plans if plan.recipe.form == "hint"]
        if self.hints is None or not hinted:
            return {}
        written = self.hints.write([plan.traces[0] for plan in hinted], step)
        return {plan.uid: hint for plan, hint in zip(hinted, written, strict=True)}

    def _prompt(self, plan: _Plan, texts: Sequence[str]) -> PromptInstance:
        """Return a prompt that shows the picks, rewritten to `texts`."""
        candidates = tuple(
            Candidate(
                text=self.templates.escaped(text),
                # Recipes are given correct rollouts of the teacher and wrong ones of the student.
                source="teacher" if pick.is_correct else "student",
                correct=pick.is_correct,
                answer=pick.parsed,
            )
            for pick, text in zip(plan.picks, texts, strict=True)
        )
        question = plan.group.question
        text = plan.recipe.text(self.templates, question, candidates)
        return PromptInstance(plan.uid, question, plan.kind, text, candidates)

    def _prefix_prompt(self, plan: _Plan) -> PromptInstance:
        """Return a prompt with the first part of the pick as the beginning of the response: at
        least one token, and never all of them.
        """
        assert self.student_ids is not None
        ids = self.student_ids(plan.picks[0])
        # The last token is left for the student, which otherwise would have nothing to sample.
        count = min(max(count_of_fraction(self.zone.prefix_fraction, len(ids)), 1), len(ids) - 1)
        question = plan.group.question
        text = plan.recipe.text(self.templates, question, ())
        prefix = tuple(int(token) for token in ids[:count])
        return PromptInstance(plan.uid, question, plan.kind, text, response_prefix=prefix)


def _one_group_per_question(groups: Sequence[Group]) -> list[Group]:
    hardest: dict[str, Group] = {}
    for group in groups:
        other = hardest.get(group.question.id)
        if other is None or group.accuracy < other.accuracy:
            hardest[group.question.id] = group
    return list(hardest.values())


def _is_bcq_eligible(group: Group, answers: TeacherAnswers) -> bool:
    correct = correct_rollouts(answers.get(group.question.id, ()))
    return bool(correct) and bool(_wrong(group.rollouts))


def correct_rollouts(rollouts: Iterable[Rollout]) -> list[Rollout]:
    """Return the correct rollouts."""
    return [rollout for rollout in rollouts if rollout.is_correct]


def _wrong(rollouts: Iterable[Rollout]) -> list[Rollout]:
    return [rollout for rollout in rollouts if not rollout.is_correct]
