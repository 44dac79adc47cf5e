"""The tokenizer of the bundled models: Qwen's format with a vocabulary that fits the digit
questions.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from data.question import Question
from data.toy.digits import LEVELS, MODALITIES, draw_problem
from zppo_mm.zone.prompts import PromptTemplates, load_templates

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# As single tokens these keep sequences short; any other time stamp is spelled out. Those of the
# digit clips are the means of two frames, 0 and 0.5 s after the digit's start.
ADDED_TOKENS = ("<think>", "</think>", *(f"<{second}.2 seconds>" for second in range(LEVELS[-1])))
CORPUS_SEED = 0
CORPUS_QUESTIONS = 3000
# Digits stay single and words keep the space before them.
PIECES = (
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- else %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the byte-level tokenizer on the prompts of the digit questions; always the same
    result.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, min_frequency=2, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(load_templates()), trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token in ADDED_TOKENS]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
    )  # type: ignore[no-untyped-call]
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _corpus(templates: PromptTemplates) -> Iterator[str]:
    """Yield plain, BCQ and NCQ prompts; the answers need no tokens beyond digits, signs and
    `\\boxed`.
    """
    for index in range(CORPUS_QUESTIONS):
        rng = np.random.default_rng([CORPUS_SEED, index])
        problem = draw_problem(rng, "train")
        text = problem.text(MODALITIES[index % len(MODALITIES)])
        question = Question("", text, (), problem.answer, problem.answer_type, problem.choices)
        yield templates.plain_text(question)
        if index % 5 == 0:
            yield templates.bcq_text(question, ["1", "2"])
            yield templates.ncq_text(question, ["1", "2"], ["1", "2"])
            yield "user\n"
            yield "assistant\n"
            yield "system\n"
            yield "\\boxed{1}"
