"""A server's tokens and their log-probs in the student's vocabulary."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from zppo_mm.experience import NO_TOKEN, IntArray, TopLogprobs
from zppo_mm.teacher.served.chat_api import Choice, ServedToken

logger = logging.getLogger(__name__)

# Servers that make text of part of a character write this instead; it may stand for many tokens.
UNREADABLE = "\ufffd".encode()
# Log-probs are sent in a few digits: those of one position may add up to a little more than 1.
MAX_MASS = 1.01
# They are computed with in float32, where a smaller number is infinite; servers write this for a
# probability of 0.
LEAST_LOGPROB = float(np.finfo(np.float32).min)
# A reasoning that the server separates loses its tags and the spaces around it.
_MARKUP = re.compile(r"</?think>|\s+")


class TokenReader:
    """Finds a server's tokens in the student's vocabulary by their bytes.

    Args:
        ids: The student's ids by bytes.
        stop_token_ids: The student's.
        num_top: Most likely tokens to ask the server for.

    Attributes:
        num_out_of_vocabulary: Most likely tokens so far that the student's vocabulary does not
            have, or that the server did not spell out; they count among all other tokens.
    """

    def __init__(
        self, ids: Mapping[bytes, int], stop_token_ids: Sequence[int], num_top: int
    ) -> None:
        self.num_top = num_top
        self.num_out_of_vocabulary = 0
        self._ids = ids
        self._stop_token_ids = stop_token_ids
        self._has_warned = False

    def read(self, choice: Choice) -> tuple[IntArray, TopLogprobs] | None:
        """Return the ids of an answer, `[response]`, and the teacher's log-probs, `[response, k]`.

        The token that was written is among the k, whether or not the server lists it with the most
        likely ones.

        Returns:
            `None` if the server sent no log-probs or impossible ones, wrote a token that the
            student does not have, or its tokens do not spell its text.
        """
        ids = [self._id(token.spelling) for token in choice.tokens]
        if ids and choice.finish_reason == "stop" and not choice.tokens[-1].spelling:
            # llama.cpp does not spell special tokens, so neither the one that ends an answer.
            ids[-1] = self._stop_token_ids[0]
        problem = self._problem(choice, ids)
        if problem:
            if not self._has_warned:
                logger.warning(
                    "teacher: an answer without usable log-probs is not distilled from: %s", problem
                )
            self._has_warned = True
            return None
        known = [token_id for token_id in ids if token_id is not None]
        return np.array(known, dtype=np.int64), self._top(choice.tokens, known)

    def _problem(self, choice: Choice, ids: Sequence[int | None]) -> str:
        """Return why the tokens cannot be used; empty if they can."""
        if not ids:
            return "the server sends no log-probs, or none that can be read"
        wrong = next(
            (problem for token in choice.tokens if (problem := _wrong_logprobs(token))), ""
        )
        if wrong:
            return wrong
        if None in ids:
            return (
                f"its token {choice.tokens[ids.index(None)].spelling!r} is not in the student's "
                "vocabulary"
            )
        written = choice.tokens[:-1] if ids[-1] in self._stop_token_ids else choice.tokens
        text = b"".join(token.spelling for token in written).decode("utf-8", errors="replace")
        return (
            ""
            if _MARKUP.sub("", text) == _MARKUP.sub("", choice.text)
            else "its tokens spell another text than its answer"
        )

    def _top(self, tokens: Sequence[ServedToken], ids: Sequence[int]) -> TopLogprobs:
        rows = [self._row(token, token_id) for token, token_id in zip(tokens, ids, strict=True)]
        shape = (len(rows), max(len(row) for row in rows))
        top = TopLogprobs(
            np.full(shape, NO_TOKEN, dtype=np.int64), np.full(shape, -np.inf, dtype=np.float32)
        )
        for position, row in enumerate(rows):
            top.ids[position, : len(row)] = list(row.keys())
            top.logprobs[position, : len(row)] = list(row.values())
        return top

    def _row(self, token: ServedToken, token_id: int) -> dict[int, float]:
        """Return the log-probs by id at the position of one token."""
        row = {token_id: token.logprob}
        for spelling, logprob in token.top:
            if spelling == token.spelling:
                continue
            other = self._id(spelling)
            if other is None:
                self.num_out_of_vocabulary += 1
            else:
                row.setdefault(other, logprob)
        return row

    def _id(self, spelling: bytes) -> int | None:
        return None if UNREADABLE in spelling else self._ids.get(spelling)


def _wrong_logprobs(token: ServedToken) -> str:
    """Return why the log-probs at the position of a token are impossible; empty if they are not."""
    listed = {token.spelling: token.logprob}
    for spelling, logprob in ((token.spelling, token.logprob), *token.top):
        if not LEAST_LOGPROB <= logprob <= 0:  # NaN neither
            return (
                f"its token {spelling!r} has the log-prob {logprob}, which is not a finite number "
                "of at most 0"
            )
        listed.setdefault(spelling, logprob)
    mass = sum(map(math.exp, listed.values()))
    return (
        ""
        if mass <= MAX_MASS
        else (
            f"the most likely tokens beside {token.spelling!r} have probability {mass:.3g} "
            "together, more than 1"
        )
    )
