"""The served teacher: any OpenAI-compatible server, or that of a teacher on ranks of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import KW_ONLY, dataclass, replace

import numpy as np

from data.question import Question
from zppo_mm.config.schema import TeacherConfig
from zppo_mm.experience import Rollout
from zppo_mm.parallel.exchange import Exchange
from zppo_mm.randomness import generator
from zppo_mm.reasoning import THINK_CLOSE
from zppo_mm.rewards.verdict import Verdict
from zppo_mm.rollout.grading import Grader
from zppo_mm.serving.servers import RetryPolicy
from zppo_mm.teacher.served.chat_api import ChatRequest, Choice
from zppo_mm.teacher.served.servers import Outcome, Servers
from zppo_mm.teacher.served.teacher_ranks import TeacherRanks
from zppo_mm.teacher.served.tokens import TokenReader
from zppo_mm.teacher.teacher import TeacherLostError

logger = logging.getLogger(__name__)

# Ranks that wait for another replica's answers exchange this often: a collective that lasts would
# reach its time limit.
EXCHANGE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Result:
    """What a replica sends the others about one of its questions or texts."""

    index: int
    rollouts: tuple[Rollout, ...] = ()
    text: str | None = None
    num_answers: int = 0
    problem: str = ""
    is_refused: bool = False
    seconds: float = 0.0


@dataclass(slots=True)
class ServedAnswers:
    """Answers on their way. Implements `Answers`."""

    teacher: ServedTeacher
    questions: Sequence[Question]
    step: int
    future: Future[list[Outcome]]
    seconds: float = 0.0

    def is_ready(self) -> bool:
        """Return whether every replica has its answers."""
        return self.teacher.have_all_answers(self.future)

    def wait(self) -> Mapping[str, tuple[Rollout, ...]]:
        """Wait for this replica's answers, verify and exchange them; see `Answers.wait`."""
        results = self.teacher.collect(self.future, len(self.questions), self._graded, self.step)
        self.seconds = max((result.seconds for result in results), default=0.0)
        return {
            question.id: result.rollouts
            for question, result in zip(self.questions, results, strict=True)
        }

    def _graded(self, indices: Sequence[int], outcomes: Sequence[Outcome]) -> list[_Result]:
        answers = [
            (self.questions[index], outcome.answers())
            for index, outcome in zip(indices, outcomes, strict=True)
        ]
        rollouts = self.teacher.verified(answers, self.step)
        return [
            _Result(
                index,
                rollouts=graded,
                num_answers=len(outcome.choices),
                problem=outcome.problem,
                is_refused=outcome.is_refused,
                seconds=outcome.seconds,
            )
            for index, outcome, graded in zip(indices, outcomes, rollouts, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class ServedTeacher:
    """Answers hard questions and rewrites responses through servers. Implements `Teacher`.

    Attributes:
        pool: The servers.
        config: Rollouts, lengths, and what a failure means.
        exchange: The replicas; the leader of each asks a part of the questions.
        verifier: Grades the answers, on one rank per replica.
        plain_text: Renders the original question with the closing format instruction.
        tokenize: The student's tokenizer: the lengths of answers are counted in its tokens.
        seed: The run's seed.
        tokens: Reads the log-probs of answers; `None` if none are wanted.
        ranks: The teacher's ranks, if the server is theirs.
    """

    pool: Servers
    config: TeacherConfig
    exchange: Exchange
    verifier: Grader
    _: KW_ONLY
    plain_text: Callable[[Question], str]
    tokenize: Callable[[str], Sequence[int]]
    seed: int
    tokens: TokenReader | None = None
    ranks: TeacherRanks | None = None

    def submit(self, questions: Sequence[Question], step: int) -> ServedAnswers:
        """Send this replica's part of the questions and return at once."""

        def request(question: Question) -> ChatRequest:
            made = self._request(
                self.plain_text(question), self.config.num_rollouts, "teacher", step, question.id
            )
            return replace(
                made,
                media=question.media,
                earlier=question.earlier,
                stream=("rollout", f"{step}/teacher/{question.id}"),
                top_logprobs=self.tokens.num_top if self.tokens is not None else 0,
            )

        own = [request(questions[index]) for index in self._own_indices(len(questions))]
        return ServedAnswers(self, questions, step, self._submit(own))

    def rewrite(self, texts: Sequence[str], step: int, attempt: int) -> Sequence[str | None]:
        """Return one response per user text; another attempt samples again."""

        def request(text: str) -> ChatRequest:
            # Named by the text, not by its index: which texts are rewritten together depends on
            # which answers were there.
            made = self._request(text, 1, "rewrite", step, attempt, text)
            return replace(made, stream=("respond", f"{step}/rewrite/{attempt}"))

        def read(indices: Sequence[int], outcomes: Sequence[Outcome]) -> list[_Result]:
            return [
                _Result(
                    index,
                    text=next(map(_rewritten, outcome.answers()), None),
                    num_answers=len(outcome.choices),
                    problem=outcome.problem,
                    is_refused=outcome.is_refused,
                )
                for index, outcome in zip(indices, outcomes, strict=True)
            ]

        own = [request(texts[index]) for index in self._own_indices(len(texts))]
        future = self._submit(own, is_urgent=True)
        return [result.text for result in self.collect(future, len(texts), read, step)]

    def collect(
        self,
        future: Future[list[Outcome]],
        count: int,
        read: Callable[[Sequence[int], Sequence[Outcome]], list[_Result]],
        step: int,
    ) -> list[_Result]:
        """Wait for every replica's requests and exchange the results; one per question or text, in
        order and the same on every rank.

        Raises:
            TeacherLostError: Some were not answered, and the run is not to go on without.
        """
        is_done = False
        while not is_done:
            wait([future], timeout=EXCHANGE_SECONDS)
            is_done = self.have_all_answers(future)
            if self.ranks is not None:
                self.ranks.check()
        local = read(self._own_indices(count), future.result()) if self.exchange.is_leader else []
        results = {each.index: each for replica in self.exchange.gather(local) for each in replica}
        self._check_losses(list(results.values()), step)
        return [results[index] for index in range(count)]

    def have_all_answers(self, future: Future[list[Outcome]]) -> bool:
        """Return whether every replica has its answers."""
        return all(done for replica in self.exchange.gather([future.done()]) for done in replica)

    def verified(
        self, answers: Sequence[tuple[Question, Sequence[Choice]]], step: int
    ) -> list[tuple[Rollout, ...]]:
        """Grade all answers in one batch; one that cannot be graded is left out.

        Only a teacher on ranks of its own gives `rollout_logprobs`.
        """
        lost = sum(self.config.num_rollouts - len(choices) for _, choices in answers)
        self.pool.counts["lost_rollouts"] += lost
        verdicts = iter(
            self.verifier.verify_all(
                [(question, choice.text) for question, choices in answers for choice in choices]
            )
        )
        rollouts = []
        for _, choices in answers:
            graded = [(choice, next(verdicts)) for choice in choices]
            rollouts.append(
                tuple(
                    self._rollout(choice, verdict, step)
                    for choice, verdict in graded
                    if verdict.reward is not None
                )
            )
        if self.tokens is not None:
            self.pool.counts["out_of_vocabulary_tokens"] = self.tokens.num_out_of_vocabulary
        return rollouts

    def _rollout(self, choice: Choice, verdict: Verdict, step: int) -> Rollout:
        assert verdict.reward is not None
        read = self.tokens.read(choice) if self.tokens is not None else None
        logprobs, top = None, None
        if choice.token_ids is not None:
            ids, logprobs = choice.token_ids
        elif read is not None:
            ids, top = read
        else:
            ids = np.array(self.tokenize(choice.text), dtype=np.int64)
        return Rollout(
            response_ids=ids,
            rollout_logprobs=logprobs,
            finish_reason=choice.finish_reason,
            text=choice.text,
            parsed=verdict.parsed,
            reward=float(verdict.reward),
            policy_version=step,
            teacher_top=top,
            parts=verdict.parts,
        )

    def _own_indices(self, count: int) -> range:
        """Return what this rank asks for: the part of its replica, if it is the leader."""
        return (
            range(self.exchange.replica, count, self.exchange.num_replicas)
            if self.exchange.is_leader
            else range(0)
        )

    def _request(self, text: str, num_choices: int, *path: str | int) -> ChatRequest:
        seed = int(generator(self.seed, *path).integers(2**31))
        return ChatRequest(
            text,
            num_choices,
            self.config.temperature,
            self.config.max_response_tokens,
            seed,
            chat_template_kwargs=self.config.chat_template_kwargs,
        )

    def _submit(
        self, requests: Sequence[ChatRequest], is_urgent: bool = False
    ) -> Future[list[Outcome]]:
        if not requests:
            nothing: Future[list[Outcome]] = Future()
            nothing.set_result([])
            return nothing
        retries = None if self.config.on_failure == "wait" else self.config.num_retries
        policy = RetryPolicy(
            max_seconds=self.config.max_wait_seconds, num_retries=retries, is_urgent=is_urgent
        )
        return self.pool.submit(requests, policy)

    def _check_losses(self, results: Sequence[_Result], step: int) -> None:
        """Log what was not answered, and stop on every rank alike if the run is not to go on
        without it.
        """
        refused = [each for each in results if each.is_refused and not each.num_answers]
        lost = [each for each in results if not each.is_refused and not each.num_answers]
        if refused:
            logger.warning(
                "step %d: the teacher has no answer %d of %d times: %s",
                step,
                len(refused),
                len(results),
                refused[0].problem,
            )
        if not lost:
            return
        what = (
            f"teacher: no answer to {len(lost)} of {len(results)} requests of step {step}, got "
            f"{lost[0].problem!r}"
        )
        if self.config.on_failure != "ncq_only":
            raise TeacherLostError(
                f"{what}, expected one within teacher.max_wait_seconds and teacher.num_retries; "
                "fix the server and start the run again to resume, or set "
                "teacher.on_failure=ncq_only to go on without it"
            )
        logger.warning("%s; the run goes on without", what)


def _rewritten(choice: Choice) -> str:
    """Return what a rewrite says. One that was cut may be a reasoning that the prompt opened, with
    drafts in it, of which a server shows no tag: it says nothing.
    """
    is_whole = choice.finish_reason == "stop" or THINK_CLOSE in choice.text
    return choice.content if is_whole else ""
