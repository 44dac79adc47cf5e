"""What a step trains on: the groups as sampled, or what a baseline or dynamic sampling makes of
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace

import numpy as np

from data.question import Question
from zppo_mm.config.schema import DistillConfig, ZoneConfig
from zppo_mm.experience import Group, PromptInstance, Rollout
from zppo_mm.randomness import generator
from zppo_mm.zone.hard import select_hard
from zppo_mm.zone.reformulate import TeacherAnswers, correct_rollouts

Adopt = Callable[[Sequence[PromptInstance], Sequence[tuple[Rollout, ...]]], list[Group]]
"""From instances and finished rollouts to groups under the student's prompts; an instance without a
prompt has no group.
"""


@dataclass(frozen=True, slots=True)
class Selected:
    """What a step trains on.

    Attributes:
        groups: Sampled groups and groups that the selection made.
        num_dropped_questions: Questions left out because nothing can be learned from any of their
            groups.
        num_injected: Teacher rollouts among the student's.
        num_failed: Groups of teacher rollouts that are missing because the student's prompt could
            not be made.
    """

    groups: tuple[Group, ...]
    num_dropped_questions: int = 0
    num_injected: int = 0
    num_failed: int = 0


@dataclass(frozen=True, slots=True)
class Selection:
    """Chooses what is trained on; every rank chooses the same.

    Attributes:
        zone: Whether a correct teacher rollout is injected, and whether sampling is dynamic.
        distill: Whose text is distilled on.
        seed: The run's seed.
        student_ids: Returns a rollout's text as the student's tokens, with its stop token if it
            stopped.
        adopt: Makes groups of finished rollouts.
        plain_text: Renders the original question with the closing format instruction.
    """

    zone: ZoneConfig
    distill: DistillConfig
    seed: int
    _: KW_ONLY
    student_ids: Callable[[Rollout], Sequence[int]]
    adopt: Adopt
    plain_text: Callable[[Question], str]

    @property
    def needs_answers(self) -> bool:
        """Whether `choose` uses the teacher's answers."""
        return self.zone.inject or self.distill.source == "teacher"

    def choose(
        self,
        groups: Sequence[Group],
        questions: Sequence[Question],
        answers: TeacherAnswers,
        step: int,
    ) -> Selected:
        """Return the groups to train on.

        Args:
            groups: All that the student sampled in the step.
            questions: Plain questions of the step, for distillation on the teacher's text.
            answers: Teacher rollouts by question id.
            step: Rollout step.
        """
        if self.distill.source == "teacher":
            return self._teacher_groups(questions, answers, step)
        chosen = list(groups)
        if self.zone.inject:
            chosen = [self._injected(group, answers, step) for group in groups]
        kept = with_signal(chosen) if self.zone.max_sampling_rounds > 1 else chosen
        return Selected(
            groups=tuple(kept),
            num_dropped_questions=len(
                {group.question.id for group in chosen} - {group.question.id for group in kept}
            ),
            num_injected=sum(group.kind == "inject" for group in kept),
        )

    def _teacher_groups(
        self, questions: Sequence[Question], answers: TeacherAnswers, step: int
    ) -> Selected:
        """Return one group of correct teacher rollouts per question that has any."""
        solved = {
            question.id: question
            for question in questions
            if correct_rollouts(answers.get(question.id, ()))
        }
        instances = [
            PromptInstance(
                f"{step}/teacher/{question.id}", question, "teacher", self.plain_text(question)
            )
            for question in solved.values()
        ]
        rollouts = [
            tuple(self._as_student(rollout) for rollout in correct_rollouts(answers[question_id]))
            for question_id in solved
        ]
        groups = self.adopt(instances, rollouts) if instances else []
        return Selected(tuple(groups), num_failed=len(instances) - len(groups))

    def _injected(self, group: Group, answers: TeacherAnswers, step: int) -> Group:
        """Return a hard plain group with one wrong rollout replaced by a correct teacher rollout;
        any other group unchanged.
        """
        correct = correct_rollouts(answers.get(group.question.id, ()))
        wrong = [index for index, rollout in enumerate(group.rollouts) if not rollout.is_correct]
        if not (select_hard([group], self.zone.tau) and correct and wrong):
            return group
        rng = generator(self.seed, "inject", step, group.uid)
        rollouts = list(group.rollouts)
        rollouts[wrong[rng.integers(len(wrong))]] = self._as_student(
            correct[rng.integers(len(correct))]
        )
        uid = f"{step}/inject/{group.uid.partition('/')[2]}"
        return replace(
            group,
            instance=replace(group.instance, uid=uid, kind="inject"),
            rollouts=tuple(rollouts),
        )

    def _as_student(self, rollout: Rollout) -> Rollout:
        """Return a teacher rollout in the student's tokens; their log-probs under the student are
        not known yet.
        """
        if rollout.teacher_top is not None:
            # Its log-probs belong to these very tokens, which are the student's already.
            return replace(rollout, author="teacher")
        ids = np.asarray(self.student_ids(rollout), dtype=np.int64)
        return replace(rollout, response_ids=ids, rollout_logprobs=None, author="teacher")


def with_signal(groups: Sequence[Group]) -> list[Group]:
    """Return the groups of questions that have a group whose rewards differ, whichever of theirs
    it is.
    """
    useful = {group.question.id for group in groups if group.rewards_differ}
    return [group for group in groups if group.question.id in useful]
