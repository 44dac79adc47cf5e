"""New questions that can really be asked: gradable, media open, prompt within the limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass

from data.errors import DataError
from data.health import TOO_LONG, SampleHealth
from data.question import Question
from data.stream import QuestionStream
from zppo_mm.parallel.exchange import Exchange
from zppo_mm.rollout.prefetch import MediaPrefetch
from zppo_mm.rollout.prompt import PromptEncoder, PromptError

NEEDS_JUDGE = "needs_judge"
NEEDS_JUDGE_DETAIL = (
    "responses to answer_type 'open' cannot be graded here; leave such questions out or give the "
    "run a judge"
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a question cannot be asked; `index` is that in the list that was checked."""

    index: int
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class QuestionFeed:
    """Draws from the stream until enough questions are good.

    Each replica checks some of them and all get every verdict, so that all ranks take the same
    questions and count the same bad ones.

    Attributes:
        stream: Where questions come from.
        encoder: Opens media and counts tokens.
        health: Counts good, bad and left out samples; the stream's own.
        exchange: The replicas.
        plain_text: Renders a question with the closing format instruction.
        max_prompt_tokens: Longest plain prompt, media included.
        can_grade: Whether responses to a question can be graded; the same answer on every rank.
        prefetch: Opens the media of the next questions meanwhile; `None` leaves them to the next
            call.
    """

    stream: QuestionStream
    encoder: PromptEncoder
    health: SampleHealth
    exchange: Exchange
    _: KW_ONLY
    plain_text: Callable[[Question], str]
    max_prompt_tokens: int
    can_grade: Callable[[Question], bool] = lambda question: True
    prefetch: MediaPrefetch | None = None

    def take(self, num_questions: int) -> list[Question]:
        """Return the next good questions, the same on every rank.

        One whose prompt is too long, or that needs a judge, is left out without being bad.

        Raises:
            DataError: Too many samples are bad, or any under `strict`, or as many in a row as the
                sources hold cannot be asked.
        """
        good: list[Question] = []
        num_refused = 0  # since the last good one
        while len(good) < num_questions:
            drawn = self.stream.take(num_questions - len(good))
            refused = {refusal.index: refusal for refusal in self.refusals(drawn)}
            for index, question in enumerate(drawn):
                refusal = refused.get(index)
                if refusal is None:
                    good.append(question)
                    num_refused = 0
                    continue
                is_bad = refusal.reason not in (TOO_LONG, NEEDS_JUDGE)
                count = self.health.bad if is_bad else self.health.leave_out
                count(question.id, refusal.reason, refusal.detail, was_good=True)
                num_refused += 1
                self._check_refused(num_refused, refusal)
        self._prefetch(num_questions)
        return good

    def _prefetch(self, num_questions: int) -> None:
        """Open what the next call is likely to take on this replica."""
        if self.prefetch is None:
            return
        look_ahead = self.stream.look_ahead()
        mine = slice(self.exchange.replica, num_questions, self.exchange.num_replicas)
        self.prefetch.start(
            lambda: [
                question for question in look_ahead(num_questions)[mine] if self.can_grade(question)
            ]
        )

    def _check_refused(self, num_refused: int, last: Refusal) -> None:
        """Stop where every question would be refused, for ever."""
        if num_refused >= self.stream.num_samples:
            raise DataError(
                f"QuestionFeed: no question of a whole epoch can be asked, got {num_refused} "
                f"refused in a row, the last as {last.reason} ({last.detail}), expected a good "
                "one; correct the data or the limits under data"
            )

    def refusals(self, questions: Sequence[Question]) -> list[Refusal]:
        """Return which of these questions cannot be asked; each replica checks some, all get every
        refusal, nothing is counted.
        """
        refusals = []
        for index in range(self.exchange.replica, len(questions), self.exchange.num_replicas):
            if not self.can_grade(questions[index]):
                refusals.append(Refusal(index, NEEDS_JUDGE, NEEDS_JUDGE_DETAIL))
                continue
            try:
                prompt, _ = self.encoder.encode(self.plain_text(questions[index]), questions[index])
            except PromptError as error:
                refusals.append(Refusal(index, error.reason, str(error)))
                continue
            if len(prompt.token_ids) > self.max_prompt_tokens:
                detail = (
                    f"{len(prompt.token_ids)} tokens, more than "
                    f"data.max_prompt_tokens={self.max_prompt_tokens}"
                )
                refusals.append(Refusal(index, TOO_LONG, detail))
        return [refusal for replica in self.exchange.gather(refusals) for refusal in replica]
