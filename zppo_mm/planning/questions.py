"""The questions of simulated steps: which are hard, replayed, reformulated, and trained on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from zppo_mm.config.schema import RunConfig
from zppo_mm.planning.workload import Lengths, Workload
from zppo_mm.zone.hard import count_of_fraction

Rates = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Groups:
    """Groups of rollouts.

    Attributes:
        prompts: `[groups]` tokens.
        responses: `[groups, rollouts]` tokens.
        num_right: `[groups]` rollouts that are right.
    """

    prompts: Lengths
    responses: Lengths
    num_right: Lengths

    def __len__(self) -> int:
        return len(self.prompts)

    def with_signal(self) -> Groups:
        """Return those that are neither all right nor all wrong."""
        return self.part((self.num_right > 0) & (self.num_right < self.responses.shape[1]))

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
class SimulatedStep:
    """What a step samples.

    Attributes:
        plain: In the order in which they are sampled, that of the pre-cap's draw.
        reformulated: BCQ and NCQ prompts, or a hint or prefix in their place.
        hard: `[hard]` indices of plain groups that the teacher is asked about, ascending.
        is_awaited: `[hard]` whether the pre-cap keeps the group, so that its answer is waited for.
        teacher_tokens: `[hard, teacher rollouts]` tokens of the teacher's answers.
        num_bcq: Of the reformulated.
        num_ncq: Of the reformulated.
        num_rewrites: Candidates that the teacher compresses.
    """

    plain: Groups
    reformulated: Groups
    hard: Lengths
    is_awaited: npt.NDArray[np.bool_]
    teacher_tokens: Lengths
    num_bcq: int
    num_ncq: int
    num_rewrites: int


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
        """Return what a step samples, numbered from 0."""
        random = np.random.default_rng((self.workload.seed, number))
        zone, num_new = self.config.zone, self.config.train.num_new_questions
        mean, spread = self.workload.pass_rate, self.workload.pass_rate_spread
        rates = random.beta(mean * spread, (1 - mean) * spread, num_new)
        replayed = np.zeros(0, dtype=np.int64)
        if zone.replay:
            count = min(count_of_fraction(zone.rho_replay, num_new), len(self.buffer))
            replayed = random.choice(len(self.buffer), count, replace=False)
        rates = np.concatenate([rates, self.buffer[replayed]])
        plain = self._groups(random, rates, 0)
        is_hard = plain.num_right < zone.tau * self.config.rollout.num_rollouts
        self._refresh(rates, is_hard, replayed, num_new)
        # Sampled in the order of the draw that decides among those of one accuracy.
        order = random.permutation(len(plain))
        plain, rates = plain.part(order), rates[order]
        hard = np.flatnonzero(is_hard[order])
        kept = hard[np.argsort(plain.num_right[hard], kind="stable")]
        kept = kept[: count_of_fraction(zone.rho_aug, num_new)]
        shown, num_bcq = self._reformulated(random, plain, kept)
        reformulated = self._groups(random, rates[[index for index, _ in shown]], shown)
        teacher = self.config.teacher
        asked = np.sort(kept) if zone.asks_pre_capped else hard[: len(hard) * zone.uses_teacher]
        answers = self.workload.teacher.lengths.draw(
            random,
            len(asked) * teacher.num_rollouts,
            teacher.max_response_tokens,
        ).reshape(-1, teacher.num_rollouts)
        return SimulatedStep(
            plain=plain,
            reformulated=reformulated,
            hard=asked,
            is_awaited=np.isin(asked, kept),
            teacher_tokens=answers,
            num_bcq=num_bcq,
            num_ncq=len(shown) - num_bcq,
            num_rewrites=sum(count for _, count in shown) * (teacher.compressor == "teacher"),
        )

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
        self, random: np.random.Generator, rates: Rates, shown: list[tuple[int, int]] | int
    ) -> Groups:
        """Draw groups; `shown` are the candidates in the prompts, 0 for none."""
        rollout = self.config.rollout
        prompts = self.workload.prompt.draw(random, len(rates), self.config.data.max_prompt_tokens)
        if isinstance(shown, list):
            counts = np.array([count for _, count in shown], dtype=np.int64)
            prompts = prompts + counts * self.workload.rewrite_tokens
        responses = self.workload.response.draw(
            random, len(rates) * rollout.num_rollouts, rollout.max_response_tokens
        ).reshape(-1, rollout.num_rollouts)
        return Groups(prompts, responses, random.binomial(rollout.num_rollouts, rates))
