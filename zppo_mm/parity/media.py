"""Where media could be lost: in the sample, in the prompt's placeholders, in the features of the
vision tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from data.question import MediaKind
from encoders.processor import VisionInput
from zppo_mm.experience import IntArray
from zppo_mm.models.vision_language import VisionLanguageModel

Grid = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class MediaCount:
    """The media of one question, counted three times.

    Attributes:
        modality: Of the question.
        question_id: The question.
        in_sample: Images and videos that the sample names.
        in_prompt: Images and videos that the prompt's placeholders show.
        placeholders: Placeholder tokens of the prompt.
        features: Rows that the vision tower gives for the media.
    """

    modality: str
    question_id: str
    in_sample: int
    in_prompt: int
    placeholders: int
    features: int

    @property
    def agrees(self) -> bool:
        """Whether nothing was lost."""
        return self.in_sample == self.in_prompt and self.placeholders == self.features

    def describe(self) -> str:
        """Return what was lost, in words."""
        return (
            f"parity: {self.modality}: media of question {self.question_id!r} do not reach the "
            f"network whole, got {self.in_sample} in the sample, {self.in_prompt} in the prompt, "
            f"{self.placeholders} placeholder tokens and {self.features} features of the vision "
            "tower, expected as many media in the prompt as in the sample and one feature per "
            "placeholder; check the folder's chat template, special tokens and preprocessor "
            "settings; parity.mode=warn goes on all the same"
        )


def media_in_prompt(
    token_ids: IntArray,
    kinds: Sequence[MediaKind],
    grids: Sequence[Grid],
    image_token_id: int,
    video_token_id: int,
    merge_size: int,
) -> int:
    """Return how many media the placeholders of a prompt show.

    An image is one run of placeholders. A video is, by family, one run per temporal patch (with its
    time before it) or one run of all.

    Args:
        token_ids: `[prompt]`.
        kinds: Of the media, in order.
        grids: `(t, h, w)` in patches, in order.
        image_token_id: Placeholder of images.
        video_token_id: Placeholder of videos.
        merge_size: Patches per side of one feature.

    Returns:
        Media up to the first whose runs are not there in order and length; if all are there, runs
        that are left over count as more.
    """
    names: dict[int, MediaKind] = {image_token_id: "image", video_token_id: "video"}
    runs = [
        (names[token], len(list(group)))
        for token, group in groupby(token_ids.tolist())
        if token in names
    ]
    num_shown = 0
    for kind, (t, h, w) in zip(kinds, grids, strict=False):
        frame = h * w // merge_size**2
        blocks = (
            [(kind, frame)] * t
            if kind == "video" and runs[:1] != [(kind, t * frame)]
            else [(kind, t * frame)]
        )
        if runs[: len(blocks)] != blocks:
            return num_shown
        runs = runs[len(blocks) :]
        num_shown += 1
    return num_shown + len(runs)


@torch.no_grad()
def num_features(model: VisionLanguageModel, vision: Sequence[VisionInput]) -> int:
    """Return the rows that the vision tower of this rank gives for some media; 0 without media.

    Args:
        model: The first pipeline stage.
        vision: Media of one question.
    """
    if not vision:
        return 0
    assert model.vision is not None, (
        "media were encoded for a network with a tower, and this is its first stage"
    )
    weight = next(model.vision.parameters())
    patches = torch.from_numpy(np.concatenate([item.patches for item in vision])).to(
        weight.device, weight.dtype
    )
    grids = torch.tensor([item.grid for item in vision], device=weight.device)
    features = model.vision(patches, grids)
    return len(features)
