"""Log-probs of responses by the source checkpoint in transformers, where it fits into memory."""

from __future__ import annotations

import gc
import json
import logging
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from encoders.processor import VisionInput
from encoders.torch_kernels import without_kernel_packages
from zppo_mm.errors import ModelError
from zppo_mm.experience import FloatArray, IntArray
from zppo_mm.models.families.table import FAMILIES
from zppo_mm.weights.safetensors_folder import INDEX_NAME, SafetensorsFolder

logger = logging.getLogger(__name__)

WEIGHTS_FACTOR = 1.25
"""Memory of the weights and of what a forward pass over one sequence adds to them."""
FIXED_BYTES = 512 * 2**20
USABLE_FRACTION = 0.8
"""Part of the free memory that may be taken: other processes of the machine grow too."""
CONFIG_NAME = "config.json"
ATTENTION = "sdpa"
"""That of torch, as in our own network."""
CALLING_KEYS = (
    *("attn_implementation", "attn_implementation_internal"),
    *("experts_implementation", "experts_implementation_internal"),
    *("return_dict", "use_return_dict", "output_attentions", "output_hidden_states", "torchscript"),
)
"""Keys of a config.json that say how a network is run and what it returns; not what it computes."""
CGROUP_FILES = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))


@dataclass(frozen=True, slots=True)
class SourceInput:
    """One prompt with its response.

    Attributes:
        token_ids: `[tokens]`, prompt then response.
        positions: `[3, tokens]`.
        num_response_tokens: How many of the tokens are the response.
        vision: Media of the prompt.
    """

    token_ids: IntArray
    positions: IntArray
    num_response_tokens: int
    vision: tuple[VisionInput, ...]


@dataclass(frozen=True, slots=True)
class SourceLogprobs:
    """The source checkpoint's log-probs.

    Attributes:
        logprobs: Per input `[response]`; `None` where it was not compared.
        skipped: Why some or all were not; empty if all were.
    """

    logprobs: tuple[FloatArray | None, ...]
    skipped: str = ""


def source_logprobs(
    folder: Path,
    inputs: Sequence[SourceInput],
    *,
    dtype: torch.dtype,
    temperature: float,
    device: torch.device,
    max_seconds: float,
) -> SourceLogprobs:
    """Run the whole checkpoint in transformers, one sequence at a time, and free it again.

    Nothing that goes wrong here ends a run: what cannot be loaded or run is not compared, and the
    reason is returned.

    Args:
        folder: The Hugging Face folder.
        inputs: Sequences, the ones that matter most first.
        dtype: Of the run's network.
        temperature: Of the log-probs.
        device: Where the run computes; the checkpoint goes there if there is room, else to the
            host.
        max_seconds: No further sequence is begun after this time; it counts from the start of
            loading.
    """
    started = time.perf_counter()
    with _quiet_transformers():
        try:
            chosen, why_not = choose_device(weight_bytes(folder, dtype), device)
            model = _load(folder, dtype, chosen) if chosen is not None else None
        except Exception as error:
            logger.debug("loading the source checkpoint", exc_info=True)
            model, why_not = None, f"transformers cannot load {folder}: {_brief(error)}"
        if model is None:
            return SourceLogprobs((None,) * len(inputs), why_not)
        try:
            return _all_logprobs(model, inputs, temperature, started + max_seconds)
        finally:
            del model
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _all_logprobs(
    model: Any, inputs: Sequence[SourceInput], temperature: float, end: float
) -> SourceLogprobs:
    """Run sequence after sequence until the time is over."""
    found: list[FloatArray | None] = []
    skipped = ""
    for item in inputs:
        if time.perf_counter() > end:
            skipped = (
                f"{len(inputs) - len(found)} of {len(inputs)} responses, because "
                "parity.max_source_seconds was over"
            )
            break
        try:
            found.append(_response_logprobs(model, item, temperature))
        except Exception as error:
            logger.debug("running the source checkpoint", exc_info=True)
            skipped = (
                f"{len(inputs) - len(found)} of {len(inputs)} responses, because transformers "
                f"cannot run them: {_brief(error)}"
            )
            break
    return SourceLogprobs((*found, *[None] * (len(inputs) - len(found))), skipped)


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Return what the folder's weights take in a type, from the headers of its files."""
    weights = SafetensorsFolder(folder)
    return sum(math.prod(weights.shape(key)) for key in weights.weight_map) * dtype.itemsize


def choose_device(
    num_weight_bytes: int, preferred: torch.device
) -> tuple[torch.device | None, str]:
    """Return where weights of this size fit with a margin, or `None` and why not."""
    needed = WEIGHTS_FACTOR * num_weight_bytes + FIXED_BYTES
    if (
        preferred.type == "cuda"
        and needed <= USABLE_FRACTION * torch.cuda.mem_get_info(preferred)[0]
    ):
        return preferred, ""
    free = _free_host_bytes()
    if needed <= USABLE_FRACTION * free:
        return torch.device("cpu"), ""
    return (
        None,
        f"it needs {needed / 2**30:.1f} GiB, more than {USABLE_FRACTION:.0%} of the "
        f"{free / 2**30:.1f} GiB that are free",
    )


def _free_host_bytes() -> int:
    """Return the free memory of the machine, or of the container whose limit it would break."""
    free = psutil.virtual_memory().available
    limit, used = (path.read_text().strip() if path.is_file() else "max" for path in CGROUP_FILES)
    return min(free, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else free


def open_model(folder: Path, dtype: torch.dtype, *, has_vision: bool) -> tuple[Any, dict[str, Any]]:
    """Load a folder's network into transformers; returns it with transformers' report on its
    keys.

    transformers is shown the weights alone, as links, and the configuration. It would also apply
    adapters that lie beside them, and fetch and run the attention kernels that a config.json names,
    whatever its caller asks for.

    Args:
        folder: The Hugging Face folder.
        dtype: Of the network.
        has_vision: Whether it has a tower.

    Raises:
        ModelError: The weights cannot be read.
        Exception: Whatever transformers raises.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind: Any = AutoModelForImageTextToText if has_vision else AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as name:
        config = _without_calling_keys(
            json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        )
        Path(name, CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
        for file in (INDEX_NAME, *SafetensorsFolder(folder).files):
            if (folder / file).is_file():
                link = Path(name, file)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to((folder / file).resolve())
        with without_kernel_packages():
            found: tuple[Any, dict[str, Any]] = kind.from_pretrained(
                name,
                dtype=dtype,
                attn_implementation=ATTENTION,
                output_loading_info=True,
                trust_remote_code=False,
            )
    return found


def _without_calling_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration, objects in it included, without the keys for how it is run."""
    return {
        key: _without_calling_keys(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key.removeprefix("_") not in CALLING_KEYS
    }


def _load(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Return the whole model in evaluation mode.

    Raises:
        ModelError: The folder lacks weights, which transformers would fill with random ones.
    """
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    model, info = open_model(folder, dtype, has_vision="vision_config" in config)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{folder}: transformers misses {len(missing)} weights, got none for {missing[0]}, "
            "expected all; check the folder"
        )
    return model.to(device).eval()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide progress bar and advice on kernels, which belong to the oracle and not to the run."""
    from transformers.utils import logging as untyped

    library: Any = untyped
    verbosity, bar = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(verbosity)
        if bar:
            library.enable_progress_bar()


@torch.no_grad()
def _response_logprobs(model: Any, item: SourceInput, temperature: float) -> FloatArray:
    """Return the log-probs of a response, `[response]`."""
    inputs = {
        name: value.to(model.device) for name, value in model_inputs(model.config, item).items()
    }
    # Without the cache, nothing is carried over to the next sequence.
    output = model(**inputs, use_cache=False, logits_to_keep=item.num_response_tokens + 1)
    logprobs = torch.log_softmax(output.logits[0, :-1].float() / temperature, dim=-1)
    targets = inputs["input_ids"][0, -item.num_response_tokens :]
    values: FloatArray = logprobs.gather(1, targets[:, None]).squeeze(1).cpu().numpy()
    return values


def model_inputs(config: Any, item: SourceInput) -> dict[str, torch.Tensor]:
    """Return the arguments of transformers' model for one sequence.

    transformers computes the positions itself, so that ours are checked too, except where its own
    are known to be others.
    """
    ids = torch.from_numpy(item.token_ids)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if not item.vision:
        return inputs
    # Without these types some families fall back to one-axis positions without a warning.
    inputs["mm_token_type_ids"] = (ids == config.image_token_id).int() + 2 * (
        ids == config.video_token_id
    ).int()
    for kind, patches, grids in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        media = [entry for entry in item.vision if entry.kind == kind]
        if media:
            inputs[patches] = torch.from_numpy(np.concatenate([entry.patches for entry in media]))
            inputs[grids] = torch.tensor([entry.grid for entry in media])
    if (
        not FAMILIES[config.model_type].video_layout(config.to_dict()).timestamped
        and "video_grid_thw" in inputs
    ):
        # Text after such a video has other positions in transformers than in the model's training
        # and in rollout engines.
        inputs["position_ids"] = torch.from_numpy(item.positions)[:, None]
    return inputs


def _brief(error: Exception) -> str:
    """Return the kind of an error and the first line of its message."""
    message = str(error).strip()
    return f"{type(error).__name__}: {message.splitlines()[0] if message else 'no message'}"
