"""Questions with their responses as they are written down, and the folder in which an interrupted
evaluation goes on.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.atomic_files import write_atomically
from data.json_text import load_json
from data.question import MediaRef, Question
from zppo_mm.accuracy import accuracy_of, is_correct
from zppo_mm.errors import ConfigError
from zppo_mm.experience import Group, PromptInstance, Rollout
from zppo_mm.rollout.grading import UNGRADED
from zppo_mm.rollout.soundness import NO_ROOM

ANSWERS_FILE = "answers.jsonl"
RESULTS_FILE = "results.json"
SETTINGS_FILE = "settings.json"
PARTS_FOLDER = "answers"


@dataclass(frozen=True, slots=True)
class Response:
    """One response.

    Attributes:
        text: As decoded.
        parsed: Content of the last `\\boxed{}`, `None` if nothing was boxed.
        reward: In [0, 1], `None` if it could not be graded.
        finish_reason: `stop` or `length`.
        num_tokens: Its length, the stop token included.
        parts: Of the reward, by name.
    """

    text: str
    parsed: str | None
    reward: float | None
    finish_reason: str
    num_tokens: int
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_correct(self) -> bool:
        """Whether it has the full accuracy."""
        return self.reward is not None and is_correct(accuracy_of(self.reward, self.parts))


@dataclass(frozen=True, slots=True)
class AnsweredQuestion:
    """A question and what the model made of it: one line of answers.jsonl.

    Attributes:
        index: Among the questions of the evaluation.
        id: The question's.
        source: Its data source.
        modality: `text`, `image`, `video`, or `mixed` with both kinds of media.
        answer_type: `math`, `choice`, `open`, or one with a reward function.
        prompt: The whole text of the last message, before the chat template and the placeholders of
            the media.
        media: `{kind, shard, key, extension}` in prompt order.
        answer: The reference answer.
        responses: In the order sampled, those that could not be graded last; none if the question
            could not be asked.
        skipped: Why it could not; empty otherwise.
        num_prompt_tokens: Length of its prompt, media included; 0 if it could not be asked.
        earlier: `{role, text}` of the messages before the last.
    """

    index: int
    id: str
    source: str
    modality: str
    answer_type: str
    prompt: str
    media: list[dict[str, str]]
    answer: str
    responses: tuple[Response, ...] = ()
    skipped: str = ""
    num_prompt_tokens: int = 0
    earlier: list[dict[str, str]] = field(default_factory=list)

    @property
    def graded(self) -> list[Response]:
        """Responses with a reward."""
        return [response for response in self.responses if response.reward is not None]

    @property
    def num_correct(self) -> int:
        """Correct responses."""
        return sum(response.is_correct for response in self.responses)

    @classmethod
    def of(
        cls, index: int, instance: PromptInstance, group: Group | None, skipped: str
    ) -> AnsweredQuestion:
        """Return the record of a question, of which there is a group or a reason for none."""
        question = instance.question
        rollouts = [*group.rollouts, *group.ungraded] if group is not None else []
        return cls(
            index=index,
            id=question.id,
            source=question.source,
            modality=modality(question),
            answer_type=question.answer_type,
            prompt=instance.text,
            media=[_media_record(ref) for ref in question.media],
            answer=question.answer,
            responses=tuple(_response(rollout) for rollout in rollouts),
            skipped=skipped,
            num_prompt_tokens=len(group.prompt.token_ids) if group is not None else 0,
            earlier=[asdict(turn) for turn in question.earlier],
        )


def modality(question: Question) -> str:
    """Return `text`, `image`, `video` or `mixed`."""
    kinds = {ref.kind for ref in question.media}
    return "mixed" if len(kinds) > 1 else kinds.pop() if kinds else "text"


class AnswerFolder:
    """The folder of one evaluation; one process uses it.

    `settings.json` says what the answers belong to. Each finished chunk is a file under `answers/`;
    at the end they become `answers.jsonl`. Chunks are numbered in the order of writing, and a later
    one takes precedence. Every file is written atomically, so one that is there is complete.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, settings: Mapping[str, Any]) -> list[int]:
        """Return the indices of the questions that need no asking any more; those left ungraded,
        or without room, are asked again.

        Args:
            settings: All that the answers depend on, as JSON values.

        Raises:
            ConfigError: The folder has answers that belong to other settings, or files that cannot
                be read.
        """
        path = self.folder / SETTINGS_FILE
        if path.is_file():
            self._check_same(_read_json(path), settings)
        elif self._parts() or (self.folder / ANSWERS_FILE).exists():
            raise ConfigError(
                f"{self.folder}: answers without settings, got no {SETTINGS_FILE} beside them, "
                "expected both or neither; give another --output or remove the folder"
            )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(settings, ensure_ascii=False, indent=1))
        return [
            each.index
            for each in self.read()
            if each.skipped not in (UNGRADED, NO_ROOM) and len(each.graded) == len(each.responses)
        ]

    def add(self, answers: Sequence[AnsweredQuestion]) -> None:
        """Write a finished chunk, which takes precedence over all others."""
        parts = self._parts()
        number = int(parts[-1].stem.removeprefix("part_")) + 1 if parts else 1
        write_atomically(self.folder / PARTS_FOLDER / f"part_{number:08d}.jsonl", _lines(answers))

    def read(self) -> list[AnsweredQuestion]:
        """Return all answers so far, in the order of the questions; a chunk takes precedence
        over what an earlier end of the evaluation left.
        """
        answers: dict[int, AnsweredQuestion] = {}
        finished = self.folder / ANSWERS_FILE
        for path in [*([finished] if finished.is_file() else []), *self._parts()]:
            for line in path.read_bytes().split(b"\n"):
                if line:
                    answered = _parse(path, line)
                    answers[answered.index] = answered
        return [answers[index] for index in sorted(answers)]

    def read_complete(self, num_questions: int) -> list[AnsweredQuestion]:
        """Return all answers, one per question.

        Raises:
            ConfigError: A question has none, or there is one to a question that is not asked.
        """
        answers = self.read()
        differing = sorted({each.index for each in answers} ^ set(range(num_questions)))
        if differing:
            raise ConfigError(
                f"{self.folder}: answers and questions do not belong together, got {len(answers)} "
                f"answers, expected one to each of {num_questions} questions; the first that "
                f"differs has the index {differing[0]}; start the evaluation again, or give "
                "another --output"
            )
        return answers

    def finish(self, answers: Sequence[AnsweredQuestion], results: Mapping[str, Any]) -> None:
        """Write `answers.jsonl` and `results.json`, which replace the chunks."""
        write_atomically(self.folder / ANSWERS_FILE, _lines(answers))
        write_atomically(
            self.folder / RESULTS_FILE, json.dumps(results, ensure_ascii=False, indent=1)
        )
        for path in self._parts():  # the latest last: cut short, no older chunk takes precedence
            path.unlink()
        if (self.folder / PARTS_FOLDER).is_dir():
            shutil.rmtree(self.folder / PARTS_FOLDER)

    def _parts(self) -> list[Path]:
        return sorted((self.folder / PARTS_FOLDER).glob("part_*.jsonl"))

    def _check_same(self, before: Any, now: Mapping[str, Any]) -> None:
        old, new = _flat(before), _flat(now)
        different = [
            f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
        if different:
            raise ConfigError(
                f"{self.folder}: the answers there belong to another evaluation: "
                f"{'; '.join(different)}; go on with the old settings, give another --output, or "
                "remove the folder"
            )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return values by dotted key; a list's entries by their index."""
    if isinstance(values, Mapping):
        items: Iterable[tuple[Any, Any]] = values.items()
    elif isinstance(values, list):
        items = enumerate(values)
    else:
        return {prefix.removesuffix("."): values}
    return {
        key: value
        for name, entry in items
        for key, value in _flat(entry, f"{prefix}{name}.").items()
    }


def _media_record(ref: MediaRef) -> dict[str, str]:
    return {"kind": ref.kind, "shard": ref.shard, "key": ref.key, "extension": ref.extension}


def _response(rollout: Rollout) -> Response:
    reward = None if math.isnan(rollout.reward) else float(rollout.reward)
    return Response(
        rollout.text,
        rollout.parsed,
        reward,
        rollout.finish_reason,
        len(rollout.response_ids),
        dict(rollout.parts),
    )


def _lines(answers: Iterable[AnsweredQuestion]) -> str:
    return "".join(json.dumps(asdict(answered), ensure_ascii=False) + "\n" for answered in answers)


def _parse(path: Path, line: bytes) -> AnsweredQuestion:
    try:
        fields = load_json(line)
        answered = AnsweredQuestion(
            **{
                **fields,
                "responses": tuple(Response(**response) for response in fields["responses"]),
            }
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path}: a line is not readable ({error}), expected one question's answers; remove "
            "the file"
        ) from error
    if type(answered.index) is not int:
        raise ConfigError(
            f"{path}: a line has no index, got {answered.index!r}, expected a whole number; "
            "remove the file"
        )
    return answered


def _read_json(path: Path) -> Any:
    try:
        return load_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: not readable ({error}), expected JSON; give another --output or remove the "
            "folder"
        ) from error
