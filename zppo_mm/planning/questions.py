"""The questions of simulated steps: which are hard, replayed, reformulated, and trained on.

Source: of what each kind of group is made, `zppo_mm.zone`, whose rules are applied here to drawn
lengths and counts of right rollouts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from zppo_mm.config.schema import RunConfig
from zppo_mm.planning.workload import Lengths, Workload
from zppo_mm.zone.hard import count_of_fraction

Rates = npt.NDArray[np.float64]
HELD_OUT = 1 << 20
"""In the place of a step's number, names the draws of an evaluation."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Groups of rollouts.

    Attributes:
        prompts: `[groups]` tokens.
        responses: `[groups, rollouts]` tokens; 0 where there is none.
        num_right: `[groups]` rollouts that are right.
    """

    prompts: Lengths
    responses: Lengths
    num_right: Lengths

    def __len__(self) -> int:
        return len(self.prompts)

    def has_signal(self) -> npt.NDArray[np.bool_]:
        """Return of each whether it is neither all right nor all wrong, `[groups]`."""
        found: npt.NDArray[np.bool_]
        found = (self.num_right > 0) & (self.num_right < self.responses.shape[1])
        return found

    def with_signal(self) -> Groups:
        """Return those that are neither all right nor all wrong."""
        return self.part(self.has_signal())

    def part(self, chosen: slice | npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> Groups:
        """Return some of them."""
        return Groups(self.prompts[chosen], self.responses[chosen], self.num_right[chosen])

    def joined(self, other: Groups) -> Groups:
        """Return both."""
        return Groups(
            np.concatenate([self.prompts, other.prompts]),
            np.concatenate([self.responses, other.responses]),
            np.concatenate([self.num_right, other.num_right]),
        )


@dataclass(frozen=True, slots=True)
class SimulatedRound:
    """What one round of questions samples: one per step, more under dynamic sampling.

    Attributes:
        plain: In the order in which they are sampled, that of the pre-cap's draw.
        reformulated: BCQ and NCQ prompts, or a hint or prefix in their place.
        trained: What is trained on, if the round is the only one.
        asked: `[asked]` indices of plain groups whose question the teacher gets, ascending.
        asks_first: Whether it gets them before anything is sampled.
        is_awaited: `[asked]` whether the step waits for the answer.
        teacher_tokens: `[asked, teacher rollouts]` tokens of the teacher's answers.
        num_bcq: Of the reformulated.
        num_ncq: Of the reformulated.
        num_injected: Of the trained, those with a teacher's rollout among the student's.
        num_rewrites: Candidates that the teacher compresses.
    """

    plain: Groups
    reformulated: Groups
    trained: Groups
    asked: Lengths
    asks_first: bool
    is_awaited: npt.NDArray[np.bool_]
    teacher_tokens: Lengths
    num_bcq: int
    num_ncq: int
    num_injected: int
    num_rewrites: int


@dataclass(frozen=True, slots=True)
class SimulatedStep:
    """What a step samples and trains on.

    Attributes:
        rounds: One after the other.
        trained: Groups of the update.
    """

    rounds: tuple[SimulatedRound, ...]
    trained: Groups

    @property
    def num_injected(self) -> int:
        """Return the groups with a teacher's rollout among the student's."""
        return sum(each.num_injected for each in self.rounds)


@dataclass(slots=True)
class QuestionSource:
    """Draws the questions of one step after the other; the replay buffer is kept in between.

    Attributes:
        config: Counts, caps, thresholds and lengths.
        workload: What is assumed.
        buffer: Pass rates of the questions in the buffer, the oldest first.
    """

    config: RunConfig
    workload: Workload
    buffer: Rates = field(default_factory=lambda: np.zeros(0))

    def step(self, number: int) -> SimulatedStep:
        """Return what a step samples, numbered from 0: rounds until the plain groups that are
        trained on are as many as the new questions, or there may be no more rounds.
        """
        zone, num_new = self.config.zone, self.config.train.num_new_questions
        rounds: list[SimulatedRound] = []
        num_useful = 0
        while len(rounds) < zone.max_sampling_rounds and (not rounds or num_useful < num_new):
            random = np.random.default_rng((self.workload.seed, number, len(rounds)))
            rounds.append(self._round(random, is_first=not rounds))
            num_useful += len(rounds[-1].trained)
            num_useful -= int(rounds[-1].reformulated.has_signal().sum())
        trained = rounds[0].trained
        for each in rounds[1:]:
            trained = trained.joined(each.trained)
        return SimulatedStep(tuple(rounds), trained)

    def held_out(self) -> Groups:
        """Return the groups of an evaluation; none if the run has no held-out questions."""
        config, workload = self.config, self.workload
        count = config.evaluation.num_questions or workload.num_held_out
        if config.data.train and not config.data.held_out:
            count = 0
        random = np.random.default_rng((workload.seed, HELD_OUT))
        rates = self._pass_rates(random, count)
        return self._groups(random, rates, 0, config.evaluation.num_rollouts)

    def _round(self, random: np.random.Generator, is_first: bool) -> SimulatedRound:
        zone, num_new = self.config.zone, self.config.train.num_new_questions
        rates = self._pass_rates(random, num_new)
        replayed = np.zeros(0, dtype=np.int64)
        if zone.replay and is_first:
            count = min(count_of_fraction(zone.rho_replay, num_new), len(self.buffer))
            replayed = random.choice(len(self.buffer), count, replace=False)
        rates = np.concatenate([rates, self.buffer[replayed]])
        plain = self._groups(random, rates, 0)
        is_hard = plain.num_right < zone.tau * self.config.rollout.num_rollouts
        self._refresh(rates, is_hard, replayed, num_new)
        # Sampled in the order of the draw that decides among those of one accuracy.
        order = random.permutation(len(plain))
        plain, rates, is_hard = plain.part(order), rates[order], is_hard[order]
        hard = np.flatnonzero(is_hard)
        kept = hard[np.argsort(plain.num_right[hard], kind="stable")]
        kept = kept[: count_of_fraction(zone.rho_aug, num_new)]
        shown, num_bcq = self._reformulated(random, plain, kept)
        reformulated = self._groups(random, rates[[index for index, _ in shown]], shown)
        asked = self._asked(plain, hard, kept)
        teacher = self.config.teacher
        tokens = self.workload.teacher.lengths.draw(
            random, len(asked) * teacher.num_rollouts, teacher.max_response_tokens
        ).reshape(-1, teacher.num_rollouts)
        distills_teacher = self.config.distill.source == "teacher"
        trained, num_injected = self._trained(
            random, plain.joined(reformulated), asked, is_hard[asked], tokens
        )
        return SimulatedRound(
            # Without a buffer nothing needs them.
            plain=plain.part(slice(0, 0)) if distills_teacher and not zone.replay else plain,
            reformulated=reformulated,
            trained=trained,
            asked=asked,
            asks_first=distills_teacher,
            is_awaited=np.isin(asked, kept) | zone.inject | distills_teacher,
            teacher_tokens=tokens,
            num_bcq=num_bcq,
            num_ncq=len(shown) - num_bcq,
            num_injected=num_injected,
            num_rewrites=sum(count for _, count in shown) * (teacher.compressor == "teacher"),
        )

    def _pass_rates(self, random: np.random.Generator, count: int) -> Rates:
        mean, spread = self.workload.pass_rate, self.workload.pass_rate_spread
        return random.beta(mean * spread, (1 - mean) * spread, count)

    def _asked(self, plain: Groups, hard: Lengths, kept: Lengths) -> Lengths:
        """Return the groups whose questions the teacher gets, ascending."""
        if self.config.distill.source == "teacher":
            return np.arange(len(plain))
        if self.config.zone.asks_pre_capped:
            return np.sort(kept)
        return hard[: len(hard) * self.config.zone.uses_teacher]

    def _trained(
        self,
        random: np.random.Generator,
        sampled: Groups,
        asked: Lengths,
        is_hard: npt.NDArray[np.bool_],
        tokens: Lengths,
    ) -> tuple[Groups, int]:
        """Return what is trained on, and how many of its groups have a teacher's rollout among the
        student's.

        Args:
            random: Decides which of the teacher's answers are right.
            sampled: Plain groups, then reformulated ones.
            asked: Plain groups whose questions the teacher got.
            is_hard: `[asked]`.
            tokens: `[asked, teacher rollouts]` of its answers.
        """
        source = self.config.distill.source
        if source == "student":
            return sampled, 0
        if not (source == "teacher" or self.config.zone.inject):
            return sampled.with_signal(), 0
        rates = np.where(
            is_hard, self.workload.teacher_pass_rate, self.workload.teacher_pass_rate_easy
        )
        is_right = random.random(tokens.shape) < rates[:, None]
        solved = is_right.any(1)
        if source == "teacher":
            right = np.where(is_right, tokens, 0)[solved]
            return Groups(sampled.prompts[asked][solved], right, is_right.sum(1)[solved]), 0
        # In place of a wrong rollout; which one makes no difference to lengths drawn alike.
        changed, responses, num_right = asked[solved], sampled.responses.copy(), sampled.num_right
        responses[changed, 0] = tokens[solved, is_right[solved].argmax(1)]
        num_right = num_right.copy()
        num_right[changed] += 1
        trained = Groups(sampled.prompts, responses, num_right)
        has_teacher = np.isin(np.arange(len(trained)), changed)
        return trained.with_signal(), int((trained.has_signal() & has_teacher).sum())

    def _refresh(
        self, rates: Rates, is_hard: npt.NDArray[np.bool_], replayed: Lengths, num_new: int
    ) -> None:
        """Admit hard questions, let solved ones go, evict the oldest."""
        if not self.config.zone.replay:
            return
        solved = replayed[~is_hard[num_new:]]
        self.buffer = np.concatenate(
            [np.delete(self.buffer, solved), rates[:num_new][is_hard[:num_new]]]
        )[-self.config.zone.buffer_capacity :]

    def _reformulated(
        self, random: np.random.Generator, plain: Groups, kept: Lengths
    ) -> tuple[list[tuple[int, int]], int]:
        """Return plain group and number of candidates of each reformulated prompt up to the cap,
        and how many are BCQ.
        """
        zone, rollouts = self.config.zone, self.config.rollout.num_rollouts
        cap = count_of_fraction(zone.rho_aug, self.config.train.num_new_questions)
        solved = 1 - (1 - self.workload.teacher_pass_rate) ** self.config.teacher.num_rollouts
        has_answer = random.random(len(kept)) < solved
        shown: list[tuple[int, int]] = []
        num_bcq = 0
        for index, answered in zip(kept.tolist(), has_answer.tolist(), strict=True):
            for is_on, needs_answer, count in (
                (zone.bcq, True, 2),
                (zone.ncq, False, rollouts - int(plain.num_right[index])),
                (zone.hint or zone.prefix, True, 1),
            ):
                if is_on and (answered or not needs_answer) and len(shown) < cap:
                    shown.append((index, count))
                    num_bcq += count == 2 and needs_answer
        return shown, num_bcq

    def _groups(
        self,
        random: np.random.Generator,
        rates: Rates,
        shown: list[tuple[int, int]] | int,
        num_rollouts: int = 0,
    ) -> Groups:
        """Draw groups; `shown` are the candidates in the prompts, 0 for none."""
        rollout = self.config.rollout
        num_rollouts = num_rollouts or rollout.num_rollouts
        prompts = self.workload.prompt.draw(random, len(rates), self.config.data.max_prompt_tokens)
        if isinstance(shown, list):
            counts = np.array([count for _, count in shown], dtype=np.int64)
            prompts = prompts + counts * self.workload.rewrite_tokens
        responses = self.workload.response.draw(
            random, len(rates) * num_rollouts, rollout.max_response_tokens
        ).reshape(-1, num_rollouts)
        return Groups(prompts, responses, random.binomial(num_rollouts, rates))
