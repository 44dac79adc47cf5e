"""Builds a small model folder: byte-level tokenizer with the family's special tokens, chat
template, processor settings, config.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support import tiny_qwen
from tests.support.processor_settings import patch_settings
from zppo_mm.bundled.tokenizer import SPECIAL_TOKENS

ORDINARY = ["<think>", "</think>"]
TEMPLATE = """{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}{{- message.content | trim -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}{{- part.text -}}
{%- else -%}{{- '<|vision_start|><|' + part.type + '_pad|><|vision_end|>' -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}"""
OPENED, CLOSED, BARE = (
    f"{{{{- '<|im_start|>assistant\\n{thought}' -}}}}"
    for thought in ("<think>\\n", "<think>\\n\\n</think>\\n\\n", "")
)
IF_FALSE = "{%- if enable_thinking is defined and enable_thinking is false -%}"
IF_TRUE = "{%- if enable_thinking is defined and enable_thinking is true -%}"
ENDINGS = {
    "opened": OPENED,  # Qwen3 Thinking
    "absent": BARE,  # Qwen2.5-VL, Qwen3 Instruct
    "closed": CLOSED,
    "opened, can close": f"{IF_FALSE}{CLOSED}{{%- else -%}}{OPENED}{{%- endif -%}}",
    "closed, can open": f"{IF_TRUE}{OPENED}{{%- else -%}}{CLOSED}{{%- endif -%}}",
    "absent, can close": f"{IF_FALSE}{CLOSED}{{%- else -%}}{BARE}{{%- endif -%}}",  # Qwen3
}
"""How the families' templates begin an answer."""
ROPE = tiny_qwen.rope_parameters(1e7, 0.25, [2, 1, 1])


def template_with(ending: str) -> str:
    """Return the template with another beginning of the answer, by its name in `ENDINGS`."""
    assert OPENED in TEMPLATE, "the template opens a thought"
    return TEMPLATE.replace(OPENED, ENDINGS[ending])


def build_tokenizer(folder: Path, template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """Write a tokenizer of 256 bytes, some merges and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ċ", "Ċ"), ("Ġ", "the"), ("<", "|")]
    vocabulary = {
        token: index for index, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ORDINARY])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    return fast


def build_folder(
    folder: Path, *, vision: bool = True, template: str = TEMPLATE
) -> PreTrainedTokenizerFast:
    """Write everything that a prompt encoder reads; no weights."""
    tokenizer = build_tokenizer(folder, template)
    config: dict[str, Any] = {"model_type": "qwen3_5"}
    if vision:
        names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
        names |= {
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        }
        config |= {
            "vision_config": tiny_qwen.vision_config(),
            **{key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()},
        }
        for name, low in (
            ("preprocessor_config.json", 64),
            ("video_preprocessor_config.json", 128),
        ):
            settings = patch_settings(4) | {"size": {"shortest_edge": low, "longest_edge": 4096}}
            (folder / name).write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(config))
    stops = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return tokenizer


def build_model(folder: Path, seed: int = 0, **text_changes: Any) -> Path:
    """Write everything with random weights and return the folder: a network of every kind of layer,
    whose logits differ clearly between tokens.
    """
    import torch
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    tokenizer = build_folder(folder)
    ids = json.loads((folder / "config.json").read_text())
    text = tiny_qwen.text_config(
        tied=True,
        **{
            "vocab_size": -(-len(tokenizer) // 8) * 8,
            "max_position_embeddings": 4096,
            "full_attention_interval": 4,
            "initializer_range": 0.1,
            "rope_parameters": ROPE,
        }
        | text_changes,
    )
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = Qwen3_5Config(
        text_config=text,
        vision_config=tiny_qwen.vision_config(text["hidden_size"]) | {"initializer_range": 0.1},
        tie_word_embeddings=text["tie_word_embeddings"],
        **{name: ids[name] for name in names},
    )
    torch.manual_seed(seed)
    model = Qwen3_5ForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = json.loads(
        (folder / "generation_config.json").read_text()
    )["eos_token_id"]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    return folder
