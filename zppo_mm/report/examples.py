"""Questions shown in the report: media, plain, BCQ and NCQ prompts with their candidates labelled,
and the student's answers.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from data.errors import DataError
from data.question import MediaRef
from zppo_mm.methods import KINDS, PLAIN_KINDS, REFORMULATED
from zppo_mm.report.run_record import read_lines, transcripts_newest_first

MediaOpener = Callable[[MediaRef], npt.NDArray[np.uint8]]
"""Opens a reference to `[frames, height, width, 3]` RGB; raises DataError or OSError for
unavailable media.
"""

MAX_FRAMES_SHOWN = 8
MAX_SIDE_PIXELS = 320
MAX_RESPONSES_SHOWN = 8
MAX_TRANSCRIPTS_READ = 25
MAX_BYTES_READ = 2**28
MAX_CHARS_SHOWN = 6000
MAX_ANSWER_CHARS = 300
NUM_CASES_PER_EXAMPLE = 3
PART_TITLES = {"plain" if kind.role == "plain" else kind.name: kind.title for kind in KINDS}
"""Heading of every part of an example, in the order shown."""


@dataclass(frozen=True, slots=True)
class PromptSegment:
    """A piece of a prompt; `candidate` is its transcript record where the piece is a candidate's
    text.
    """

    text: str
    candidate: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ShownGroup:
    """One group of an example."""

    title: str
    kind: str
    accuracy: float
    segments: tuple[PromptSegment, ...]
    rollouts: tuple[Mapping[str, Any], ...]
    num_rollouts: int


@dataclass(frozen=True, slots=True)
class ShownMedia:
    """One image or video of an example: data URIs of its frames, or why there are none."""

    kind: str
    frames: tuple[str, ...]
    num_frames: int
    problem: str


@dataclass(frozen=True, slots=True)
class Example:
    """One question of the report."""

    question_id: str
    step: int
    answer: str
    media: tuple[ShownMedia, ...]
    groups: tuple[ShownGroup, ...]


@dataclass(frozen=True, slots=True)
class _Case:
    """A question in one transcript: enough to choose by, so that long transcripts are never held in
    memory.

    Attributes:
        path: The transcript.
        question_id: The question.
        media_kinds: Of its media.
        accuracies: By part (`plain`, or another kind of group), as far as there are such groups.
    """

    path: Path
    question_id: str
    media_kinds: tuple[str, ...]
    accuracies: dict[str, float]

    @property
    def interest(self) -> tuple[bool, bool, bool, float]:
        """Rank: both reformulations, then BCQ, then NCQ, then by how much they helped."""
        bcq, ncq = "bcq" in self.accuracies, "ncq" in self.accuracies
        # Groups with the teacher's own responses do not show whether a prompt helped.
        reformulated = max(
            (self.accuracies.get(kind.name, 0.0) for kind in REFORMULATED), default=0.0
        )
        return bcq and ncq, bcq, ncq, reformulated - self.accuracies.get("plain", 1.0)


def choose_examples(
    folder: Path, num_examples: int, open_media: MediaOpener | None
) -> list[Example]:
    """Choose questions from the newest transcripts: those with BCQ and NCQ groups and of every kind
    of media first, none twice.

    Args:
        folder: The run's folder.
        num_examples: Most examples.
        open_media: Opens a media reference; `None` shows no media.
    """
    cases: dict[str, _Case] = {}
    num_bytes = 0
    for path in transcripts_newest_first(folder)[:MAX_TRANSCRIPTS_READ]:
        num_bytes += path.stat().st_size
        if cases and num_bytes > MAX_BYTES_READ:
            break
        for question_id, case in _cases(path).items():
            cases.setdefault(question_id, case)
        if sum(case.interest[0] for case in cases.values()) >= NUM_CASES_PER_EXAMPLE * num_examples:
            break
    ranked = sorted(cases.values(), key=lambda case: case.interest, reverse=True)
    return [_example(case, open_media) for case in _varied(ranked)[:num_examples]]


def _cases(path: Path) -> dict[str, _Case]:
    """Return the questions of one transcript by id."""
    cases: dict[str, _Case] = {}
    for record in read_lines(path):
        kinds = tuple(ref["kind"] for ref in record["media"])
        case = cases.setdefault(
            record["question_id"], _Case(path, record["question_id"], kinds, {})
        )
        case.accuracies[_part(record)] = record["accuracy"]
    return cases


def _varied(ranked: Sequence[_Case]) -> list[_Case]:
    """Move the best case of every kind of media to the front, among those that have the most kinds
    of groups.
    """
    if not ranked:
        return []
    first: dict[tuple[str, ...], _Case] = {}
    for case in ranked:
        if case.interest[:3] == ranked[0].interest[:3]:
            first.setdefault(case.media_kinds, case)
    front = list(first.values())
    return front + [case for case in ranked if case not in front]


def _part(record: Mapping[str, Any]) -> str:
    return "plain" if record["kind"] in PLAIN_KINDS else str(record["kind"])


def _example(case: _Case, open_media: MediaOpener | None) -> Example:
    records = {
        _part(record): record
        for record in read_lines(case.path)
        if record["question_id"] == case.question_id
    }
    record = next(iter(records.values()))
    media = (
        tuple(_shown_media(MediaRef(**ref), open_media) for ref in record["media"])
        if open_media is not None
        else ()
    )
    groups = tuple(
        _shown_group(title, records[part]) for part, title in PART_TITLES.items() if part in records
    )
    return Example(
        question_id=case.question_id,
        step=record["step"],
        answer=record["answer"],
        media=media,
        groups=groups,
    )


def _shown_group(title: str, record: Mapping[str, Any]) -> ShownGroup:
    return ShownGroup(
        title=title,
        kind=record["kind"],
        accuracy=record["accuracy"],
        segments=tuple(
            replace(segment, text=shortened(segment.text))
            for segment in (
                *(
                    PromptSegment(f"{turn['role']}: {turn['text']}\n\n")
                    for turn in record.get("earlier", ())
                ),
                *split_prompt(record["prompt"], record["candidates"]),
            )
        ),
        rollouts=tuple(
            {
                **rollout,
                "text": shortened(rollout["text"]),
                "parsed": rollout["parsed"] and shortened(rollout["parsed"], MAX_ANSWER_CHARS),
            }
            for rollout in record["rollouts"][:MAX_RESPONSES_SHOWN]
        ),
        num_rollouts=len(record["rollouts"]),
    )


def shortened(text: str, most: int = MAX_CHARS_SHOWN) -> str:
    """Leave out the middle of a long text; the transcript has all of it."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters …]\n{text[-half:]}"


def split_prompt(prompt: str, candidates: Sequence[Mapping[str, Any]]) -> tuple[PromptSegment, ...]:
    """Cut a prompt at its candidates' texts, in the order shown; one that is not found verbatim
    follows at the end.
    """
    segments: list[PromptSegment] = []
    missing: list[PromptSegment] = []
    position = 0
    for candidate in candidates:
        start = prompt.find(candidate["text"], position) if candidate["text"] else -1
        if start < 0:
            missing.append(PromptSegment(candidate["text"], candidate))
            continue
        segments += [
            PromptSegment(prompt[position:start]),
            PromptSegment(candidate["text"], candidate),
        ]
        position = start + len(candidate["text"])
    segments.append(PromptSegment(prompt[position:]))
    return tuple(segment for segment in segments if segment.text) + tuple(missing)


def _shown_media(ref: MediaRef, open_media: MediaOpener) -> ShownMedia:
    try:
        frames = open_media(ref)
    except (DataError, OSError) as error:
        return ShownMedia(kind=ref.kind, frames=(), num_frames=0, problem=str(error))
    chosen = np.unique(
        np.linspace(0, len(frames) - 1, min(len(frames), MAX_FRAMES_SHOWN)).round().astype(int)
    )
    return ShownMedia(
        kind=ref.kind,
        frames=tuple(_png_uri(frames[index]) for index in chosen),
        num_frames=len(frames),
        problem="",
    )


def _png_uri(pixels: npt.NDArray[np.uint8]) -> str:
    """Encode `[height, width, 3]` as a PNG data URI, large pictures made smaller."""
    image = Image.fromarray(pixels)
    image.thumbnail((MAX_SIDE_PIXELS, MAX_SIDE_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
