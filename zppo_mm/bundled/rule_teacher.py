"""A teacher made of rules behind a server of chat completions: it writes worked solutions of
additions, sometimes wrong ones, and knows the exact probability of every token that it writes.

It stands for a larger model where there is none. No network computes anything here.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from data.toy.additions import read_terms, worked_solutions
from zppo_mm.errors import ConfigError
from zppo_mm.randomness import generator
from zppo_mm.rollout.tokenizer import load_tokenizer, token_bytes
from zppo_mm.teacher.served.chat_server import MAX_BODY_BYTES, PATH

NAME = "rules"
"""The name under which the teacher is served."""
NO_ADDITION = "I can only add two numbers."
"""The answer to everything else."""

Tokens = tuple[int, ...]


class RuleTeacher:
    """Answers chat requests.

    The distribution over the few texts that the rules can write makes a language model: the
    probability of a next token is that of all texts that go on with it, divided by that of all
    texts that begin alike.

    Args:
        folder: Whose tokenizer it writes with: the student's, so that every token is one of the
            student's.
        error_rate: Probability of a wrong solution at temperature 1.

    Raises:
        ConfigError: The tokenizer cannot be used, or the rate is no probability.
    """

    def __init__(self, folder: Path, error_rate: float) -> None:
        if not 0 <= error_rate <= 1:
            raise ConfigError(
                f"error rate: no probability, got {error_rate}, expected 0 to 1; correct it"
            )
        self._error_rate = error_rate
        self._tokenizer = load_tokenizer(folder)
        self._spellings = {
            token: spelling for spelling, token in token_bytes(folder, self._tokenizer).items()
        }
        self._stop: int = self._tokenizer.eos_token_id

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the chat completion for a request.

        Raises:
            ValueError: A value is out of range. LookupError and TypeError come from other JSON than
                a request.
        """
        text = str(request["messages"][-1]["content"])
        temperature, limit = float(request["temperature"]), int(request["max_tokens"])
        num_choices, seed = int(request.get("n", 1)), int(request.get("seed", 0))
        num_top = int(request["top_logprobs"]) if request.get("logprobs") else None
        if not (0 <= temperature < math.inf and min(num_choices, limit) > 0):
            raise ValueError("temperature, n or max_tokens is out of range")
        texts = self.texts(text)
        choices: list[dict[str, Any]] = []
        num_tokens = 0
        for index in range(num_choices):
            rng = generator(seed, "rule teacher", text, index)
            tokens: Tokens = ()
            while not tokens or (tokens[-1] != self._stop and len(tokens) < limit):
                follows = next_tokens(texts, tokens)
                tokens += (_drawn(follows, temperature, rng.random()),)
            num_tokens += len(tokens)
            choices.append(self._choice(index, texts, tokens, num_top))
        num_prompt = len(self._tokenizer.encode(text, add_special_tokens=False))
        return {
            "object": "chat.completion",
            "model": NAME,
            "choices": choices,
            "usage": {"prompt_tokens": num_prompt, "completion_tokens": num_tokens},
        }

    def texts(self, prompt: str) -> dict[Tokens, float]:
        """Return what can be written, with the token that ends it, and its probabilities."""
        terms = read_terms(prompt)
        written = worked_solutions(*terms, self._error_rate) if terms else {NO_ADDITION: 1.0}
        return {
            (*self._tokenizer.encode(text, add_special_tokens=False), self._stop): probability
            for text, probability in written.items()
        }

    def _choice(
        self, index: int, texts: Mapping[Tokens, float], tokens: Tokens, num_top: int | None
    ) -> dict[str, Any]:
        ended = tokens[-1] == self._stop
        spelled = b"".join(self._spellings[token] for token in tokens[: -1 if ended else None])
        choice = {
            "index": index,
            "message": {"role": "assistant", "content": spelled.decode(errors="replace")},
            "finish_reason": "stop" if ended else "length",
        }
        if num_top is None:
            return choice
        content = []
        for position, token in enumerate(tokens):
            follows = next_tokens(texts, tokens[:position])
            top = sorted(follows, key=lambda each: -follows[each])[:num_top]
            content.append(
                self._listed(token, follows)
                | {"top_logprobs": [self._listed(each, follows) for each in top]}
            )
        return choice | {"logprobs": {"content": content}}

    def _listed(self, token: int, follows: Mapping[int, float]) -> dict[str, Any]:
        spelling = self._spellings[token]
        return {
            "token": spelling.decode(errors="replace"),
            "bytes": [*spelling],
            "logprob": math.log(follows[token]),
        }


def next_tokens(texts: Mapping[Tokens, float], written: Tokens) -> dict[int, float]:
    """Return the probabilities of the tokens that can follow what is written, most likely ones
    among equals in the order of their ids.
    """
    follows: Counter[int] = Counter()
    for text, probability in texts.items():
        if text[: len(written)] == written:
            follows[text[len(written)]] += probability  # type: ignore[assignment]
    total = sum(follows.values())
    return {token: follows[token] / total for token in sorted(follows)}


def _drawn(follows: Mapping[int, float], temperature: float, uniform: float) -> int:
    """Return a token, chosen by a number from 0 to 1; the most likely one at temperature 0."""
    best = max(follows, key=lambda token: follows[token])
    if not temperature:
        return best
    weights = {
        token: (probability / follows[best]) ** (1 / temperature)
        for token, probability in follows.items()
    }
    left = uniform * sum(weights.values())
    for token, weight in weights.items():
        left -= weight
        if left < 0:
            return token
    return best  # rounding


class RuleTeacherServer(ThreadingHTTPServer):
    """Serves a teacher on this machine.

    Args:
        teacher: Answers.
        port: 0 chooses a free one.

    Attributes:
        url: Base URL.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, teacher: RuleTeacher, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.teacher = teacher
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    """Reads one request and sends the answer."""

    server: RuleTeacherServer
    timeout = 60.0

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path != PATH:
            self._send(404, {"error": f"nothing at {self.path}, expected {PATH}"})
        elif not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            self._send(413, {"error": f"expected a Content-Length up to {MAX_BODY_BYTES}"})
        else:
            self._send(*self._answer(self.rfile.read(int(length))))

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the run counts what it asks."""

    def _answer(self, body: bytes) -> tuple[int, dict[str, Any]]:
        try:
            request = json.loads(body)
            if request["model"] != NAME:
                return 404, {"error": f"no model {request['model']!r}, expected {NAME!r}"}
            return 200, self.server.teacher.answer(request)
        except (ValueError, LookupError, TypeError) as error:
            return 400, {"error": f"{type(error).__name__}: {error}"}

    def _send(self, status: int, content: Mapping[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
