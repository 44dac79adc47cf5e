"""From a question to logits with a Qwen2.5-VL folder as Qwen wrote them: flat config, one processor
file, a template of its own.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data.media.opening import Frames
from data.question import MediaRef, Question
from tests.support import network_checks, tiny_qwen
from tests.support.processor_settings import CLIP_MEAN, CLIP_STD, patch_settings
from tests.support.tiny_folder import TEMPLATE, build_tokenizer
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.errors import ConfigError
from zppo_mm.experience import Prompt
from zppo_mm.rollout.prompt import PromptEncoder

pytestmark = pytest.mark.usefixtures("one_rank")

TEXT_TEMPLATE = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.content + '<|im_end|>' -}}{%- "
    "endfor -%}"
)
SECONDS_PER_FRAME = 0.5
PIXELS = {"min_pixels": 3136, "max_pixels": 12845056}
PROCESSOR: dict[str, Any] = PIXELS | patch_settings(14, CLIP_MEAN, CLIP_STD)
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
    "window_size": 56,
    "fullatt_block_indexes": [1],
    "tokens_per_second": 2,
}


@dataclass(frozen=True)
class Made:
    """A folder, the oracle of its weights and its tokenizer."""

    folder: Path
    oracle: Any
    tokenizer: Any


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("qwen2_5_vl")
    tokenizer = build_tokenizer(folder, TEXT_TEMPLATE)
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    text = {
        "vocab_size": -(-len(tokenizer) // 8) * 8,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    }
    tokens = {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}
    flat = {
        "model_type": "qwen2_5_vl",
        **text,
        **tokens,
        "tie_word_embeddings": True,
        "vision_config": VISION | {"in_chans": 3},
    }
    torch.manual_seed(0)
    # transformers moves settings of the dictionary it is given.
    config = transformers.Qwen2_5_VLConfig(**deepcopy(flat))
    oracle = tiny_qwen.randomised(transformers.Qwen2_5_VLForConditionalGeneration(config))
    oracle.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(flat))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    # Older folders keep the template for media here; newer ones have it as the tokenizer's own.
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": TEXT_TEMPLATE})
    )
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return Made(folder, oracle, tokenizer)


def pixels(kind: str) -> np.ndarray:
    shape = (1, 56, 84, 3) if kind == "image" else (7, 84, 56, 3)
    return np.random.default_rng(len(kind)).integers(0, 256, shape, dtype=np.uint8)


def open_media(reference: MediaRef) -> Frames:
    """Return an image of 2 x 3 features, or a video of 7 frames: 4 temporal patches of 3 x 2
    features.
    """
    if reference.kind == "image":
        return Frames(pixels("image"), (0.0,))
    # The timestamps say 0.483 s per frame, the rate 0.5.
    return Frames(pixels("video"), (0.2, 0.7, 1.2, 1.7, 2.2, 2.7, 3.1), SECONDS_PER_FRAME)


def question(*kinds: str) -> Question:
    media = tuple(
        MediaRef(kind, "shard.tar", f"a{index}", "png") for index, kind in enumerate(kinds)
    )
    return Question(id="q", text="?", media=media, answer="1", answer_type="math")


def oracle_media(kind: str) -> dict[str, torch.Tensor]:
    """Return what transformers' own processor makes of the pixels; that of videos needs
    torchvision.
    """
    processed = Qwen2VLImageProcessorPil(**PROCESSOR)(
        [Image.fromarray(frame) for frame in pixels(kind)], return_tensors="np"
    )
    patches = torch.from_numpy(processed["pixel_values"])
    if kind == "image":
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 6]])}
    # Each frame comes as a temporal patch of itself twice: take one half of two frames each, the
    # last frame again for the eighth.
    halves = patches.view(7, 24, 3, 2, 14 * 14)[:, :, :, 0]
    pairs = torch.stack([halves[[0, 2, 4, 6]], halves[[1, 3, 5, 6]]], 3)
    return {
        "pixel_values_videos": pairs.reshape(4 * 24, -1),
        "video_grid_thw": torch.tensor([[4, 6, 4]]),
    }


def oracle_inputs(made: Made, prompt: Prompt, kinds: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Return the arguments of transformers' model, with our positions where there are media; its
    own must agree as far as they go.
    """
    ids = torch.from_numpy(prompt.token_ids)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if not kinds:
        return inputs
    for kind in kinds:
        inputs |= oracle_media(kind)
    config = made.oracle.config
    types = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    grids = {name: value for name, value in inputs.items() if name.endswith("thw")}
    seconds = torch.tensor([2 * SECONDS_PER_FRAME])
    theirs, _ = made.oracle.model.get_rope_index(ids, types, **grids, second_per_grid_ts=seconds)
    # Up to the end of the video; transformers 5.23 goes on elsewhere after it.
    end = int(torch.nonzero(types[0] == 2)[-1]) + 1 if "video" in kinds else len(prompt.token_ids)
    assert np.array_equal(theirs[:, 0, :end].numpy(), prompt.positions[:, :end])
    return inputs | {
        "mm_token_type_ids": types,
        "position_ids": torch.from_numpy(prompt.positions)[:, None],
    }


@pytest.mark.parametrize(
    "kinds", [("image",), ("video",), ("image", "video"), ("video", "image"), ()]
)
def test_logits_of_a_question_equal_transformers(made: Made, kinds: tuple[str, ...]) -> None:
    prompt, vision = PromptEncoder(made.folder, open_media).encode("the sum?", question(*kinds))
    shown = {"image": "<|image_pad|>" * 6, "video": "<|video_pad|>" * 24}
    media = "".join(f"<|vision_start|>{shown[kind]}<|vision_end|>" for kind in kinds)
    expected = f"<|im_start|>user\n{media}the sum?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert prompt.token_ids.tolist() == made.tokenizer.encode(expected)
    # An image of 2 x 3 takes three positions. Seven frames at two per second are patches at 0, 2, 4
    # and 6 steps: seven positions.
    sizes = {"image": (6, 3), "video": (24, 7)}
    assert prompt.next_position == len(prompt.token_ids) - sum(
        sizes[kind][0] - sizes[kind][1] for kind in kinds
    )
    inputs = oracle_inputs(made, prompt, kinds)
    network = network_checks.build(made.folder, ParallelConfig())
    with torch.no_grad():
        wanted = made.oracle(**inputs).logits[0]
        found = network(
            torch.from_numpy(prompt.token_ids),
            torch.from_numpy(prompt.positions),
            torch.tensor([0, len(prompt.token_ids)], dtype=torch.int32),
            torch.from_numpy(np.concatenate([item.patches for item in vision])) if kinds else None,
            torch.tensor(prompt.grids) if kinds else None,
        )
    assert (found - wanted).abs().max() <= network_checks.MAX_LOGIT_DIFFERENCE


def test_prompts_need_to_know_the_family(made: Made, tmp_path: Path) -> None:
    for path in made.folder.iterdir():
        if path.suffix in (".json", ".jinja"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    del config["vision_config"]["tokens_per_second"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigError,
        match=r"the key 'tokens_per_second' is missing, expected a complete Qwen2\.5-VL config",
    ):
        PromptEncoder(tmp_path, open_media)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "qwen9"}))
    with pytest.raises(
        ConfigError, match=r"model_type is not supported, got 'qwen9', expected one of qwen3_5"
    ):
        PromptEncoder(tmp_path, open_media)
