"""The worker process that calls the reward functions of a run.

Answers every request by `{"reward", "parts"}`, or by `{"error", "kind"}`. What a user's module does
when it is imported stays in this process.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import math
import numbers
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import cache, partial
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil

from data.question import question_of
from data.worker_process import MAX_MESSAGE, READY, Channel, drop_output, limit_memory, message
from zppo_mm.rewards.forked import serve_forked
from zppo_mm.rewards.function_source import source_digest

MEMORY_BYTES = 4 << 30
"""Address space of a call beyond what the imports take."""
ARGUMENTS = ("question", "response", "parsed", "metadata")
ROUNDING = 1e-6
"""So close to 0 and to 1 a number is that."""

RewardFunction = Callable[..., Any]


class BadReturn(Exception):
    """A function returned what is no reward; `kind` is the same for all of the same fault."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def main() -> None:
    """Import the functions and serve requests until the owner is gone."""
    channel = Channel()
    functions = {}
    # At the end, so that no file there takes the place of an installed module.
    sys.path.append(os.getcwd())
    for answer_type, (name, digest) in json.loads(sys.argv[2]).items():
        try:
            check_source(name, digest)
            functions[answer_type] = load_function(name)
        # Whatever a user's module raises, an exit included, is the answer to the start.
        except BaseException as error:
            problem = f"reward.functions.{answer_type}: {_described(error)}, got {name!r}"
            channel.send({"number": READY, "not_started": problem[: 2 * MAX_MESSAGE]})
            return
    limit_memory(psutil.Process().memory_info().vms + MEMORY_BYTES)
    drop_output()
    serve_forked(channel, partial(answer, functions))


class SourceChanged(Exception):
    """The file of a function is not the one that the run started with."""


def check_source(name: str, digest: str) -> None:
    """Refuse a function whose file was edited during the run: its other responses have the rewards
    of the earlier one.

    Raises:
        SourceChanged: It was.
    """
    if (found := source_digest(name)) != digest:
        raise SourceChanged(
            f"the file was changed during the run, got digest {found or 'of no file'}, expected "
            f"{digest or 'of no file'}; restore it, or resume the run to go on with the new one"
        )


def load_function(name: str) -> RewardFunction:
    """Return the function that `module:function` or `file.py:function` names.

    Raises:
        TypeError: It cannot be called with the arguments of a reward function.
        Exception: Whatever the module raises.
    """
    source, _, attribute = name.rpartition(":")
    module = _load_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    function = attrgetter(attribute)(module)
    try:
        inspect.signature(function).bind(**dict.fromkeys(ARGUMENTS))
    except ValueError:
        return function  # type: ignore[no-any-return]  # a builtin without a signature
    except TypeError as error:
        raise TypeError(f"{error}: it is called with {', '.join(ARGUMENTS)} by name") from error
    return function  # type: ignore[no-any-return]


@cache
def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"no such file {path}")
    sys.path.append(str(path.resolve().parent))  # for what lies beside it
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def answer(
    functions: Mapping[str, RewardFunction], request: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Call a function and check what it returns."""
    question = question_of(request["question"])
    try:
        returned = functions[question.answer_type](
            question=question,
            response=request["response"],
            parsed=request["parsed"],
            metadata=json.loads(question.metadata) if question.metadata else None,
        )
        reward, parts = read_reward(returned)
    except BadReturn as error:
        return {"error": str(error), "kind": error.kind}
    # Whatever a user's code raises, an exit included, is this response's fault alone.
    except BaseException as error:
        line = _line_of(error)
        return {"error": _described(error), "kind": f"{type(error).__name__} {line}"}
    return {"reward": reward, "parts": parts}


def read_reward(returned: Any) -> tuple[float, dict[str, float]]:
    """Return the reward, and its parts if there are any.

    Args:
        returned: A number from 0 to 1, or parts by name, each a number from 0 to 1 or such a
            number and its weight. The reward is the weighted mean of the parts.

    Raises:
        BadReturn: It is none of these.
    """
    if not isinstance(returned, Mapping):
        return _fraction(returned, "it"), {}
    parts: dict[str, float] = {}
    weights: dict[str, float] = {}
    for name, value in returned.items():
        if not (isinstance(name, str) and name.isidentifier()):
            raise BadReturn("name", f"returned a part named {name!r:.80}, expected a plain word")
        pair = value if isinstance(value, tuple | list) and len(value) == 2 else (value, 1.0)
        parts[name] = _fraction(pair[0], name)
        weights[name] = _number(pair[1], f"the weight of {name}")
        if not 0 <= weights[name] < math.inf:
            raise BadReturn(
                "weight",
                f"returned {weights[name]} as the weight of {name}, expected "
                "a number that is not negative",
            )
    largest = max(weights.values(), default=0.0)
    if not largest:
        raise BadReturn("weights", "returned parts without any weight, expected one above 0")
    # By the largest: a sum of weights may be too large for a float.
    scaled = {name: weight / largest for name, weight in weights.items()}
    mean = sum(scaled[name] * value for name, value in parts.items()) / sum(scaled.values())
    return _fraction(mean, "the weighted mean"), parts


def _fraction(value: Any, what: str) -> float:
    number = _number(value, what)
    if not -ROUNDING <= number <= 1 + ROUNDING:  # NaN is not
        raise BadReturn("range", f"returned {number} for {what}, expected a number from 0 to 1")
    # As arithmetic left it: 0.7 + 0.2 + 0.1 is below 1, and only 1 is correct.
    return float(round(number)) if abs(number - round(number)) <= ROUNDING else number


def _number(value: Any, what: str) -> float:
    if isinstance(value, np.bool_):  # NumPy's other numbers are real ones
        return float(value)
    if isinstance(value, numbers.Real):
        return float(value)
    got = f"returned {type(value).__name__} {value!r:.80} for {what}"
    raise BadReturn(
        f"type {type(value).__name__}", f"{got}, expected a number, or named parts as numbers"
    )


def _described(error: BaseException) -> str:
    line = _line_of(error)
    return message(error) + (f" ({line})" if line else "")


def _line_of(error: BaseException) -> str:
    """Return the last line of the user's own file before an error; empty if there is none."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and "importlib" not in frame.filename
    ]
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""


if __name__ == "__main__":
    main()
