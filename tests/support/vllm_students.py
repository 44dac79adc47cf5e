"""Tiny random students that vLLM's CPU build can run: transformers' models with the bundled
student's tokenizer and processor.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.support import tiny_qwen
from tests.support.running import CLONE, start
from zppo_mm.bundled import STUDENT_DIR

_SHARED_FILES = (
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
)
# Nothing is compiled, and no medium is invented to measure memory with: both take long.
OPTIONS = ("--enforce-eager", "--skip-mm-profiling")
MEDIA_KEYS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def _bundled() -> dict[str, Any]:
    config: dict[str, Any] = json.loads((STUDENT_DIR / "config.json").read_text())
    return config


def _text(tied: bool, rope: dict[str, Any], **changes: Any) -> dict[str, Any]:
    bundled = _bundled()["text_config"]
    return {
        "vocab_size": bundled["vocab_size"],
        "eos_token_id": bundled["eos_token_id"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "rope_parameters": rope,
        "tie_word_embeddings": tied,
        **changes,
    }


def _vision(**changes: Any) -> dict[str, Any]:
    vision = {**tiny_qwen.vision_config(), "patch_size": 16, "num_position_embeddings": 16}
    return {**vision, **changes}


def _with_media(config: type, tied: bool, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    media = {key: value for key, value in _bundled().items() if key in MEDIA_KEYS}
    return config(text_config=text, vision_config=vision, tie_word_embeddings=tied, **media)


def _qwen3_vl(tied: bool) -> Any:
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    }
    vision = _vision(depth=3, deepstack_visual_indexes=[0, 1])
    config = _with_media(transformers.Qwen3VLConfig, tied, _text(tied, rope), vision)
    return transformers.Qwen3VLForConditionalGeneration(config)


def _qwen3_5(tied: bool) -> Any:
    text = _text(
        tied,
        tiny_qwen.rope_parameters(1e4, 0.5, [3, 3, 2]),
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        full_attention_interval=2,
        partial_rotary_factor=0.5,
    )
    config = _with_media(transformers.Qwen3_5Config, tied, text, _vision())
    return transformers.Qwen3_5ForConditionalGeneration(config)


BUILDERS: dict[str, Callable[[], Any]] = {
    "qwen3_vl": partial(_qwen3_vl, False),
    "qwen3_vl_tied": partial(_qwen3_vl, True),
    "qwen3_5": partial(_qwen3_5, False),
}


def student(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the folder of a student; returns it."""
    torch.manual_seed(0)
    tiny_qwen.randomised(BUILDERS[name]()).to(dtype).save_pretrained(folder)
    for each in _SHARED_FILES:
        shutil.copyfile(STUDENT_DIR / each, folder / each)
    return folder


def vllm_command(dtype: torch.dtype, *options: str) -> list[str]:
    """Return the words that start vLLM on a CPU, from the environment of `make vllm-env`.

    Its engine and its only worker are one process, which starts sooner than two; several workers
    have processes of their own all the same, which are not bound to cores that there may not be.
    """
    program = Path(os.environ.get("VLLM", CLONE / ".venv-vllm" / "bin" / "vllm"))
    assert program.is_file(), f"{program}: no vLLM, expected that of `make vllm-env`; run it"
    variables = [
        "VLLM_CPU_KVCACHE_SPACE=1",
        "VLLM_ENABLE_V1_MULTIPROCESSING=0",
        "VLLM_CPU_OMP_THREADS_BIND=nobind",
    ]
    return ["env", *variables, str(program), "serve", "{model}", "--dtype", type_name(dtype),
            *OPTIONS, *options]  # fmt: skip


def type_name(dtype: torch.dtype) -> str:
    """Return the name of a type in the configuration."""
    return str(dtype).removeprefix("torch.")


def start_run(base: Path, folder: Path, dtype: torch.dtype, *options: str) -> subprocess.Popen[str]:
    """Start a run of two ranks whose student, a folder, vLLM samples for."""
    return start(
        base,
        "run",
        f"model.student={folder}",
        f"model.params_dtype={type_name(dtype)}",
        "rollout.engine=vllm",
        "observability.report=false",
        *options,
        processes=2,
    )
