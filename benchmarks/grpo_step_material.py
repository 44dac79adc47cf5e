"""What both sides of `grpo_step.py` train: two random networks of about ten million parameters, one
tokenizer, eight sums.

    python benchmarks/grpo_step_material.py FOLDER

Makes `FOLDER/qwen3_5` and `FOLDER/qwen3` (Hugging Face folders with the same tokenizer and chat
template), `FOLDER/shards` (the questions for zppo_mm) and `FOLDER/prompts.json` (the same user
texts for TRL).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from data.question import Question
from data.sample import ShardSample
from data.shard_writer import write_shards
from zppo_mm.bundled.tokenizer import CHAT_TEMPLATE
from zppo_mm.zone.prompts import load_templates

VOCABULARY = 4096
NUM_PROMPTS = 8
NUM_TERMS = 6
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def questions() -> list[Question]:
    """Return sums of six numbers."""
    rng = np.random.default_rng(0)
    result = []
    for index in range(NUM_PROMPTS):
        terms = [int(number) for number in rng.integers(10, 1000, NUM_TERMS)]
        text = f"What is {' + '.join(map(str, terms))}?"
        result.append(Question(f"sum-{index}", text, (), str(sum(terms)), "math", source="sums"))
    return result


def user_texts() -> list[str]:
    """Return what the student is asked, with the closing instruction."""
    templates = load_templates()
    return [templates.plain_text(question) for question in questions()]


def corpus() -> Iterator[str]:
    """Yield the prompts, and all numbers below 10,000 so that the vocabulary fills up."""
    yield from user_texts() * 4
    yield from ("user\nassistant\n",) * 4
    yield from (str(number) for number in range(10_000) for _ in range(2))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer of `VOCABULARY` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = VOCABULARY - len(SPECIAL_TOKENS)
    tokenizer.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.padding_side = "left"
    return wrapped


def network_settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    """Return what the two configurations share."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }


def write_question_shards(folder: Path) -> None:
    """Write the questions as shards."""
    fields = ("id", "answer", "answer_type", "source")
    samples = [
        ShardSample(
            question.id,
            {"question": question.text, **{name: getattr(question, name) for name in fields}},
        )
        for question in questions()
    ]
    write_shards(folder, samples)


def main() -> None:
    """Write everything."""
    folder = Path(sys.argv[1])
    tokenizer = build_tokenizer()
    assert len(tokenizer) == VOCABULARY, f"the corpus gives {len(tokenizer)} tokens"
    shared = network_settings(tokenizer)
    torch.manual_seed(0)
    linear = {
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    }
    hybrid = Qwen3_5ForCausalLM(Qwen3_5TextConfig(num_hidden_layers=8, **linear, **shared))
    attention = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=9, **shared))
    for name, model in (("qwen3_5", hybrid), ("qwen3", attention)):
        model.float().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        print(f"{name}: {model.num_parameters():,} parameters")
    write_question_shards(folder / "shards")
    (folder / "prompts.json").write_text(json.dumps(user_texts()), encoding="utf-8")


if __name__ == "__main__":
    main()
