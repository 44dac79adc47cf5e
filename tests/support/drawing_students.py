"""Networks that continue prompts for `vllm_server`, and say with which logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from encoders.config import ProcessorConfig

Logits = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Asked:
    """The part of a request that a network needs.

    Attributes:
        token_ids: The prompt.
        media: Of every modality its items: offset in the prompt and arguments by name.
        sampling: The request's `sampling_params`.
    """

    token_ids: list[int]
    media: Mapping[str, list[tuple[int, dict[str, Any]]]]
    sampling: Mapping[str, Any]

    @property
    def bias(self) -> dict[int, float]:
        return {int(token): value for token, value in self.sampling.get("logit_bias", {}).items()}


class Student(Protocol):
    """A network that continues prompts."""

    def draw(self, asked: Asked) -> list[tuple[list[int], Logits]]:
        """Return tokens and unprocessed logits `[response, vocabulary]` of each continuation."""
        ...

    def load(self, path: Path) -> dict[str, str]:
        """Take weights; returns their checksums."""
        ...


class TableStudent:
    """The next token depends on the last one alone."""

    def __init__(self, vocabulary: int = 40, seed: int = 0) -> None:
        self.logits = np.random.default_rng(seed).normal(0, 2, (vocabulary, vocabulary))

    def draw(self, asked: Asked) -> list[tuple[list[int], Logits]]:
        sampling = asked.sampling
        drawn = []
        for index in range(sampling["n"]):
            rng = np.random.default_rng([sampling["seed"] + index, *asked.token_ids])
            ids: list[int] = []
            while len(ids) < sampling["max_tokens"]:
                logits = self.logits[[*asked.token_ids, *ids][-1]].copy()
                for token, bias in asked.bias.items():
                    logits[token] += bias
                logits /= sampling["temperature"] or 1.0
                weights = np.exp(logits - logits.max())
                token = (
                    int(rng.choice(len(weights), p=weights / weights.sum()))
                    if sampling["temperature"]
                    else int(logits.argmax())
                )
                ids.append(token)
                if token in sampling["stop_token_ids"]:
                    break
            before = [asked.token_ids[-1], *ids[:-1]]
            drawn.append((ids, self.logits[before]))
        return drawn

    def load(self, path: Path) -> dict[str, str]:
        raise NotImplementedError("a table has no file")


class TransformersStudent:
    """A Hugging Face folder, run by transformers; one request at a time."""

    def __init__(self, folder: Path) -> None:
        # Here, because few tests need them.
        import torch
        from transformers import AutoModelForImageTextToText

        from zppo_mm.rollout.prompt import PromptEncoder

        self.encoder = PromptEncoder(folder, _no_media)
        self.network: Any = AutoModelForImageTextToText.from_pretrained(
            str(folder), dtype=torch.float32
        ).eval()

    def draw(self, asked: Asked) -> list[tuple[list[int], Logits]]:
        import torch
        from transformers import GenerationConfig

        sampling = asked.sampling
        inputs = self._inputs(asked)
        greedy = not sampling["temperature"]
        config = GenerationConfig(
            max_new_tokens=sampling["max_tokens"],
            num_return_sequences=sampling["n"],
            do_sample=not greedy,
            temperature=None if greedy else sampling["temperature"],
            top_k=None if greedy else sampling["top_k"],
            top_p=None if greedy else sampling["top_p"],
            min_p=None if greedy else sampling["min_p"] or None,
            eos_token_id=list(sampling["stop_token_ids"]) or None,
            pad_token_id=0,
            suppress_tokens=list(asked.bias) or None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        with torch.inference_mode():
            torch.manual_seed(sampling["seed"])
            output = self.network.generate(**inputs, generation_config=config)
        rows = output.sequences[:, len(asked.token_ids) :].tolist()
        logits = torch.stack(output.logits, 1).double().numpy()
        drawn = []
        for row, values in zip(rows, logits, strict=True):
            stops = (
                index + 1 for index, token in enumerate(row) if token in sampling["stop_token_ids"]
            )
            end = next(stops, len(row))
            drawn.append((row[:end], values[:end]))
        return drawn

    def _inputs(self, asked: Asked) -> dict[str, Any]:
        import torch

        config = self.network.config
        ids = torch.tensor([asked.token_ids])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if not asked.media:
            return inputs
        types = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        inputs["mm_token_type_ids"] = types
        assert set(asked.media) == {"image"}, "frames of a video come one by one"
        assert self.encoder.processor is not None
        for token, patches, grids in (
            (config.image_token_id, "pixel_values", "image_grid_thw"),
            (config.video_token_id, "pixel_values_videos", "video_grid_thw"),
        ):
            items = [each for at, each in asked.media["image"] if asked.token_ids[at] == token]
            if items:
                pixels = np.concatenate([each["pixel_values"] for each in items])
                inputs[patches] = torch.from_numpy(_normalised(pixels, self.encoder.processor))
                inputs[grids] = torch.from_numpy(
                    np.stack([each["image_grid_thw"] for each in items])
                )
        return inputs

    def load(self, path: Path) -> dict[str, str]:
        from safetensors.torch import load_file

        from zppo_mm.rollout.served.vllm_worker.zppo_vllm_worker import checksum

        tensors = load_file(path)
        found = self.network.load_state_dict(tensors, strict=False)
        assert set(found.missing_keys) <= {"lm_head.weight"}, found.missing_keys
        assert not found.unexpected_keys
        return {name: checksum(tensor) for name, tensor in tensors.items()}


def _no_media(reference: Any) -> Any:
    raise AssertionError("media come with the requests")


def _normalised(
    pixels: npt.NDArray[np.uint8], processor: ProcessorConfig
) -> npt.NDArray[np.float32]:
    """Return what vLLM's tower makes of whole pixels."""
    by_channel = pixels.reshape(len(pixels), 3, -1).astype(np.float32)
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    values = (by_channel / 255 - mean[:, None]) / std[:, None]
    return values.reshape(pixels.shape).astype(np.float32)
