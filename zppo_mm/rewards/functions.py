"""Reward functions of the user's own, called in worker processes that can be killed."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from data.question import Question
from data.worker import WorkerNotStarted
from zppo_mm.accuracy import ACCURACY
from zppo_mm.errors import ConfigError
from zppo_mm.rewards.boxes import final_answer
from zppo_mm.rewards.function_source import source_digest
from zppo_mm.rewards.verdict import Verdict
from zppo_mm.rewards.workers import Answer, GradingPool

logger = logging.getLogger(__name__)

_PROCESS = "zppo_mm.rewards.function_process"
_SHOWN_CHARS = 80
_NO_ACCURACY: Answer = {
    "error": f"returned no part {ACCURACY}, expected one as it returns for other responses",
    "kind": ACCURACY,
}


class FunctionGrader:
    """Grades responses by functions, one for each of some answer types.

    A call that fails, takes too long or returns no reward leaves its response ungraded. Its kind of
    failure is logged once.

    Args:
        functions: `module:function` or `file.py:function` by answer type.
        timeout_seconds: Processor time of one call.
        num_workers: Most worker processes; each imports the functions once.
        budget_seconds: Wall-clock time of all calls of one `grade_all`.

    Attributes:
        functions: As given.
        digests: Of the functions' files at the start, by answer type; a worker that starts later
            refuses another one.
        num_calls: Responses that a function was called for so far.
        failure: The last failure in words; empty without one.
    """

    def __init__(
        self,
        functions: Mapping[str, str],
        timeout_seconds: float,
        num_workers: int,
        budget_seconds: float,
    ) -> None:
        self.functions = dict(functions)
        self.num_calls = 0
        self.failure = ""
        self.digests = {each: source_digest(name) for each, name in self.functions.items()}
        named = {each: (name, self.digests[each]) for each, name in self.functions.items()}
        self._pool = GradingPool(
            timeout_seconds, num_workers, budget_seconds, _PROCESS, [json.dumps(named)]
        )
        self._known_failures: set[tuple[str, str]] = set()
        self._names_accuracy: set[str] = set()
        self._num_without_accuracy = 0

    @property
    def num_timeouts(self) -> int:
        """Calls ended by a limit so far."""
        return self._pool.num_timeouts

    @property
    def num_errors(self) -> int:
        """Calls so far that raised, returned no reward, or ended their process."""
        return self._pool.num_errors + self._num_without_accuracy

    def start(self) -> None:
        """Import all functions in a first worker.

        Raises:
            ConfigError: One cannot be imported or called.
        """
        if not self.functions:
            return
        try:
            self._pool.start()
        except WorkerNotStarted as error:
            raise ConfigError(
                f"{error}, expected module:function or file.py:function, a function of question, "
                "response, parsed and metadata; correct it"
            ) from error

    def grade_all(self, items: Sequence[tuple[Question, str]]) -> list[Verdict]:
        """Return one verdict per question and response text, in order.

        Raises:
            ConfigError: A worker cannot be started; a function's file may have been changed.
        """
        asked = list(dict.fromkeys(items))
        requests = [_request(*item) for item in asked]
        self.num_calls += len(requests)
        try:
            answers = self._pool.ask_all(requests)
        except WorkerNotStarted as error:
            raise ConfigError(
                f"reward.functions: a worker that starts during the run cannot work: {error}, "
                "expected it as at the start of the run; correct it"
            ) from error
        answers = self._with_accuracy(requests, answers)
        verdicts = {
            item: self._verdict(*each) for item, *each in zip(asked, requests, answers, strict=True)
        }
        return [verdicts[item] for item in items]

    def _with_accuracy(
        self, requests: Sequence[Mapping[str, Any]], answers: Sequence[Answer]
    ) -> list[Answer]:
        """Return the answers, an error for each without an accuracy part whose function names one
        for other responses: its whole reward would count as accuracy.
        """
        types = [request["question"]["answer_type"] for request in requests]
        self._names_accuracy |= {
            answer_type
            for answer_type, answer in zip(types, answers, strict=True)
            if ACCURACY in answer.get("parts", ())
        }
        checked = [
            _NO_ACCURACY
            if answer_type in self._names_accuracy
            and "parts" in answer
            and ACCURACY not in answer["parts"]
            else answer
            for answer_type, answer in zip(types, answers, strict=True)
        ]
        self._num_without_accuracy += sum(answer is _NO_ACCURACY for answer in checked)
        return checked

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()

    def _verdict(self, request: Mapping[str, Any], answer: Answer) -> Verdict:
        if "reward" in answer:
            return Verdict(request["parsed"], answer["reward"], "function", answer["parts"])
        what = answer.get("error") or answer["timeout"]
        kind = request["question"]["answer_type"], answer.get("kind", what)
        self.failure = f"{kind[0]}: {what}"
        if kind not in self._known_failures:
            self._known_failures.add(kind)
            logger.warning(
                "reward.functions.%s: %s; the rollout is left out, and so are others for which it "
                "fails in this way; they are counted, and not named again; question %r, response "
                "…%r",
                kind[0],
                what,
                request["question"]["id"],
                request["response"][-_SHOWN_CHARS:],
            )
        return Verdict(request["parsed"], None, "error" if "error" in answer else "timeout")


def _request(question: Question, text: str) -> dict[str, Any]:
    # Media are named by shards, which a function has no use for.
    asked = asdict(replace(question, media=()))
    return {"question": asked, "response": text, "parsed": final_answer(text)}
