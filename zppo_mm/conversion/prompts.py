"""Small fixed prompts of every kind that a network takes, made of token ids, so that no tokenizer
is needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from encoders.positions import mrope_positions
from zppo_mm.models.families.architecture import Architecture
from zppo_mm.weights.safetensors_folder import SafetensorsFolder

NUM_TEXT_TOKENS = 24
NUM_FRAMES = 2
SEED = 0


@dataclass(frozen=True, slots=True)
class ProbePrompt:
    """One prompt.

    Attributes:
        kind: text, image or video.
        token_ids: `[tokens]`.
        positions: `[3, tokens]`.
        patches: `[patches, patch elements]`; `None` for text.
        grid: `[1, 3]`; `None` for text.
    """

    kind: str
    token_ids: torch.Tensor
    positions: torch.Tensor
    patches: torch.Tensor | None = None
    grid: torch.Tensor | None = None

    def network_inputs(self, device: torch.device) -> dict[str, torch.Tensor | None]:
        """Return the arguments of the Megatron network's forward pass."""
        inputs = {
            "token_ids": self.token_ids,
            "positions": self.positions,
            "cu_seqlens": torch.tensor([0, len(self.token_ids)], dtype=torch.int32),
            "patches": self.patches,
            "grids": self.grid,
        }
        return {name: None if value is None else value.to(device) for name, value in inputs.items()}

    def transformers_inputs(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the arguments of a transformers model's forward pass.

        Positions are given to a network with media, so that the comparison is one of networks:
        versions of transformers place what follows a video differently.
        """
        inputs = {
            "input_ids": self.token_ids[None],
            "attention_mask": torch.ones_like(self.token_ids)[None],
        }
        if self.patches is not None and self.grid is not None:
            values, grid = (
                ("pixel_values", "image_grid_thw")
                if self.kind == "image"
                else ("pixel_values_videos", "video_grid_thw")
            )
            inputs |= {
                values: self.patches,
                grid: self.grid,
                "position_ids": self.positions[:, None],
            }
        return {name: value.to(device) for name, value in inputs.items()}


def probe_prompts(architecture: Architecture, folder: SafetensorsFolder) -> list[ProbePrompt]:
    """Return a prompt of text, and one with an image and one with a video if the network has a
    vision tower.
    """
    draw = np.random.default_rng(SEED)
    special = [
        architecture.image_token_id,
        architecture.video_token_id,
        architecture.vision_start_token_id,
        architecture.vision_end_token_id,
    ]
    ordinary = np.setdiff1d(np.arange(architecture.vocab_size), special)
    prompts = [_text(draw.choice(ordinary, NUM_TEXT_TOKENS))]
    if not architecture.has_vision:
        return prompts
    # The first layer of every tower turns a patch into a feature; its weight says what a patch is.
    elements = math.prod(folder.shape(f"{architecture.vision_prefix}patch_embed.proj.weight")[1:])
    merge = architecture.spatial_merge_size
    for kind, grid in (
        ("image", (1, 2 * merge, 3 * merge)),
        ("video", (NUM_FRAMES, 2 * merge, 2 * merge)),
    ):
        patches = torch.from_numpy(
            draw.standard_normal((math.prod(grid), elements)).astype(np.float32)
        )
        prompts.append(
            _media(architecture, kind, grid, draw.choice(ordinary, NUM_TEXT_TOKENS), patches)
        )
    return prompts


def _text(ids: np.ndarray) -> ProbePrompt:
    return ProbePrompt(
        "text", torch.from_numpy(ids), torch.arange(len(ids)).expand(3, -1).contiguous()
    )


def _media(
    architecture: Architecture,
    kind: str,
    grid: tuple[int, int, int],
    text: np.ndarray,
    patches: torch.Tensor,
) -> ProbePrompt:
    """Put the media in the middle of a text, every frame between its marks."""
    merge = architecture.spatial_merge_size
    frames, height, width = grid
    placeholder = architecture.image_token_id if kind == "image" else architecture.video_token_id
    marks = [
        architecture.vision_start_token_id,
        *[placeholder] * (height * width // merge**2),
        architecture.vision_end_token_id,
    ]
    half = len(text) // 2
    ids = np.array([*text[:half], *(marks * frames), *text[half:]], dtype=np.int64)
    positions, _ = mrope_positions(
        ids, [grid], architecture.image_token_id, architecture.video_token_id, merge
    )
    return ProbePrompt(
        kind, torch.from_numpy(ids), torch.from_numpy(positions), patches, torch.tensor([grid])
    )
