"""Samples for people to read: a question with its media, and a right and a wrong response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from data.errors import DataError
from data.question import MediaRef
from zppo_mm.experience import Group, Rollout

MediaOpener = Callable[[MediaRef], npt.NDArray[np.uint8]]
"""Opens a reference to `[frames, height, width, 3]` RGB; raises DataError or OSError for
unavailable media.
"""

MAX_FRAMES = 4
FRAME_PIXELS = 224
MAX_CHARS = 4000


@dataclass(frozen=True, slots=True)
class Sample:
    """One group of a step.

    Attributes:
        title: Kind, accuracy and question id.
        text: Prompt, answer, and the responses with the highest and the lowest reward, as Markdown.
        picture: All media side by side, `[height, width, 3]` RGB; `None` without media.
    """

    title: str
    text: str
    picture: npt.NDArray[np.uint8] | None


def make_samples(
    groups: Sequence[Group], most: int, open_media: MediaOpener | None
) -> list[Sample]:
    """Return samples of a step: one group of every kind first, those with unequal rewards before
    others.

    Args:
        groups: Of the step.
        most: Most samples.
        open_media: Opens a media reference; `None` shows no media.
    """
    ranked = sorted(groups, key=lambda group: len({each.reward for each in group.rollouts}) < 2)
    first = {group.kind: group for group in reversed(ranked)}
    chosen = [group for group in ranked if first[group.kind] is group]
    chosen += [group for group in ranked if first[group.kind] is not group]
    return [_sample(group, open_media) for group in chosen[:most]]


def _sample(group: Group, open_media: MediaOpener | None) -> Sample:
    question = group.question
    by_reward = sorted(group.rollouts, key=lambda rollout: rollout.reward, reverse=True)
    # The best and the worst, which may be the same.
    shown = {id(rollout): rollout for rollout in (by_reward[0], by_reward[-1])}
    parts = [("Prompt", group.instance.text), ("Right answer", question.answer or "")]
    parts += [(_heading(rollout), rollout.text) for rollout in shown.values()]
    picture, problem = None, ""
    if question.media and open_media is not None:
        try:
            picture = side_by_side([open_media(ref) for ref in question.media])
        except (DataError, OSError) as error:
            problem = f"\n\nMedia not shown: {error}"
    return Sample(
        title=f"{group.kind}, accuracy {group.accuracy:.2f}, {question.id}",
        text="\n\n".join(f"**{name}**\n\n{_quoted(text)}" for name, text in parts) + problem,
        picture=picture,
    )


def _heading(rollout: Rollout) -> str:
    return f"Response, reward {rollout.reward:.2f}, {len(rollout.response_ids)} tokens"


def _quoted(text: str) -> str:
    """Indent a text as a block of code, so that no model can write Markdown into the page."""
    cut = text if len(text) <= MAX_CHARS else text[:MAX_CHARS] + " […]"
    return "\n".join("    " + line for line in cut.splitlines())


def side_by_side(media: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
    """Return frames of media, each `[frames, height, width, 3]`, in one row: at most `MAX_FRAMES`
    of each, evenly spread, made smaller where they are large.
    """
    shown = []
    for frames in media:
        count = min(len(frames), MAX_FRAMES)
        for index in np.linspace(0, len(frames) - 1, count).round().astype(int):
            image = Image.fromarray(frames[index])
            image.thumbnail((FRAME_PIXELS, FRAME_PIXELS))
            shown.append(np.asarray(image))
    height = max(len(image) for image in shown)
    row = [np.pad(image, ((0, height - len(image)), (0, 0), (0, 0))) for image in shown]
    return np.concatenate(row, axis=1)
