"""The bundled models' folders, their tokenizer, and their SFT examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3_5ForConditionalGeneration

from data.media.opening import Frames, MediaLimits, MediaOpener
from data.question import MediaRef, Question
from data.toy.digits import LEVELS, WORDS, DigitProblem, draw_problem
from data.toy.digits_facts import rate
from data.toy.digits_media import FRAMES_PER_DIGIT, encode_mp4
from data.toy.digits_reasoning import solution
from encoders.config import read_processor_config
from zppo_mm.bundled import (
    HALF_FORMED_DIR,
    STUDENT_DIR,
    TEACHER_DIR,
    TERSE_TEACHER_DIR,
    WEAK_STUDENT_DIR,
)
from zppo_mm.bundled.recipes import CANDIDATE_LINES
from zppo_mm.bundled.sft_examples import DigitExamples, Stage
from zppo_mm.bundled.supervised import learning_rate, training_sample
from zppo_mm.bundled.tokenizer import ADDED_TOKENS, SPECIAL_TOKENS, build_tokenizer
from zppo_mm.rollout.processor import frame_sampling, read_processor
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.teacher.teacher import CompressedTrace, Trace
from zppo_mm.zone.compress import RuleCompressor
from zppo_mm.zone.prompts import load_templates

FOLDERS = (STUDENT_DIR, WEAK_STUDENT_DIR, TEACHER_DIR, HALF_FORMED_DIR, TERSE_TEACHER_DIR)
MAX_BYTES = 18_000_000
CODEC_TOLERANCE = 3.0  # mean difference of grey values that H.264 leaves
STAGE = Stage(
    num_updates=4,
    batch_size=12,
    lr=1.0,
    final_lr=0.0,
    levels=dict.fromkeys(LEVELS, 1.0),
    bcq_fraction=0.3,
    ncq_fraction=0.3,
)
READING_OUT = replace(
    STAGE, batch_size=60, read_out_fraction=1.0, reformulated_read_out_fraction=0.5
)
CANDIDATE_CHARS = 1000
"""More than any candidate has."""
MIN_KNOWN = 0.8
MAX_UNKNOWN = 0.3
"""Between the measured means, 0.95 of known facts and 0.03 of those of rate 0."""
MAX_UNAIDED = 0.02
MIN_REFORMULATED = 0.2
"""Between the measured means, 0.002 of plain prompts and 0.54 of prompts with candidates."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


class WholeResponses:
    """A compressor that keeps everything but the tags."""

    def compress(self, traces: Sequence[Trace], step: int) -> list[CompressedTrace]:
        return [CompressedTrace(trace.text.replace("think", ""), "rule", 0) for trace in traces]


def test_bundled_tokenizer_round_trip(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in (
        "What is the sum of the digits three one?\n",
        "Grüße, 漢字 🙂\n\t x  y",
        "<think>3+7=10</think>\\boxed{10}",
        "<0.2 seconds>",
    ):
        assert tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text


def test_bundled_tokenizer_has_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    singles = (
        *SPECIAL_TOKENS,
        *ADDED_TOKENS,
        *"0123456789",
        *"ABCD",
        *(f" {word}" for word in WORDS),
        "\\boxed",
    )
    for text in singles:
        assert len(tokenizer.encode(text)) == 1, text
    assert len(tokenizer.encode("371")) == 3


def test_bundled_tokenizer_keeps_responses_short(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = np.random.default_rng(0)
    longest = max(len(tokenizer.encode(solution(draw_problem(rng, "train")))) for _ in range(300))
    assert longest <= 48


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_bundled_folder_loads_in_transformers(folder: object) -> None:
    loaded, report = Qwen3_5ForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    text = loaded.config.text_config
    for heads in (
        text.num_attention_heads,
        text.num_key_value_heads,
        text.linear_num_key_heads,
        text.linear_num_value_heads,
    ):
        assert heads % 2 == 0
    assert text.num_hidden_layers % 2 == 0
    assert text.vocab_size % 16 == 0


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_bundled_folder_has_this_tokenizer_and_processor(
    folder: object, tokenizer: PreTrainedTokenizerFast
) -> None:
    stored = AutoTokenizer.from_pretrained(folder)
    assert stored.get_vocab() == tokenizer.get_vocab()
    assert stored.chat_template == tokenizer.chat_template
    processor = read_processor_config(str(folder))
    assert processor.merged_patch_pixels == 32


def test_bundled_folders_are_small() -> None:
    assert sum(path.stat().st_size for folder in FOLDERS for path in folder.rglob("*")) <= MAX_BYTES


def test_examples_are_deterministic_and_teach_the_solution() -> None:
    first, second = (DigitExamples(load_templates(), WholeResponses(), 7) for _ in range(2))
    batch = first.batch(STAGE, 0, 3)
    assert batch == second.batch(STAGE, 0, 3)
    assert batch != first.batch(STAGE, 0, 4)
    encoder = PromptEncoder(STUDENT_DIR, first.open)
    shown = 0
    for example in first.batch(STAGE, 0, 3):
        sample = training_sample(encoder, example)
        learned = encoder.decode(sample.token_ids[sample.loss_mask > 0])
        assert learned == example.response
        question = example.question
        value = (
            question.choices["ABCD".index(question.answer)] if question.choices else question.answer
        )
        assert example.response.endswith(f"\\boxed{{{value}}}")
        assert len(sample.grids) == len(question.media)
        shown += "<candidate>" in example.text
    assert 0 < shown < len(batch)


def test_examples_show_clips_as_a_run_does() -> None:
    examples = DigitExamples(load_templates(), WholeResponses(), 7)
    opener = MediaOpener(MediaLimits(sampling=frame_sampling(read_processor(STUDENT_DIR))))
    num_clips = 0
    for example in examples.batch(STAGE, 0, 3):
        for reference in example.question.media:
            if reference.kind == "video":
                shown = examples.open(reference)
                tiles = [frame[:, :, 0] for frame in shown.pixels[::FRAMES_PER_DIGIT]]
                decoded = opener.open(encode_mp4(tiles), "video")
                assert decoded.timestamps == shown.timestamps
                assert decoded.pixels.shape == shown.pixels.shape
                difference = np.abs(decoded.pixels.astype(int) - shown.pixels).mean()
                assert difference < CODEC_TOLERANCE
                num_clips += 1
    opener.close()
    assert num_clips > 0


def test_reading_out_examples_ignore_the_question() -> None:
    learned = set()
    for example in DigitExamples(load_templates(), WholeResponses(), 7).batch(READING_OUT, 0, 0):
        if not example.question.text.startswith("Which number"):
            thought = example.response.partition("<think>")[2].partition("</think>")[0]
            learned.add(("<candidate>" in example.text, set(thought) <= set("0123456789,")))
    # Reformulated prompts teach both, plain ones reading out alone.
    assert learned == {(True, True), (True, False), (False, True)}


def test_weak_student_follows_the_question_only_with_candidates() -> None:
    model = Qwen3_5ForConditionalGeneration.from_pretrained(WEAK_STUDENT_DIR).eval()
    examples = DigitExamples(
        load_templates(), RuleCompressor(len, CANDIDATE_CHARS, CANDIDATE_LINES), 11
    )
    encoder = PromptEncoder(WEAK_STUDENT_DIR, examples.open)
    comma = encoder.chat.tokenize([","])[0]
    followed: dict[bool, list[float]] = {False: [], True: []}
    for example in examples.batch(replace(READING_OUT, batch_size=150), 0, 0):
        if example.question.media or example.question.text.startswith("Which number"):
            continue
        prompt, _ = encoder.encode(example.text, example.question)
        # The first digit is thought of in any case; a comma after it is the beginning of reading
        # out.
        start = encoder.chat.tokenize([example.response[: len("<think>") + 1]])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt.token_ids.tolist(), *start]])).logits[
                0, -1
            ]
        followed["<candidate>" in example.text].append(1 - float(logits.softmax(-1)[comma]))
    assert np.mean(followed[False]) < MAX_UNAIDED
    assert np.mean(followed[True]) > MIN_REFORMULATED


def test_half_formed_facts_are_written_wrong_and_known_ones_right() -> None:
    model = Qwen3_5ForConditionalGeneration.from_pretrained(HALF_FORMED_DIR).eval()
    encoder = PromptEncoder(HALF_FORMED_DIR, unopened)
    right: dict[float, list[float]] = {}
    for one in range(1, 10):
        for two in range(1, 10):
            problem = DigitProblem("sum", (one, two))
            question = Question("", problem.text("text"), (), problem.value, "math")
            prompt, _ = encoder.encode(load_templates().plain_text(question), question)
            begun = encoder.chat.tokenize([f"<think>{one}+{two}="])
            rest = encoder.chat.tokenize([f"{one + two}</think>"])
            ids = torch.tensor([[*prompt.token_ids.tolist(), *begun, *rest]])
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits[0, -len(rest) - 1 : -1].log_softmax(-1)
            chosen = logprobs.gather(1, torch.tensor(rest)[:, None]).sum()
            right.setdefault(rate("sum", one, two), []).append(float(chosen.exp()))
    assert np.mean(right[1.0]) > MIN_KNOWN
    assert np.mean(right[0.0]) < MAX_UNKNOWN


def test_terse_teacher_writes_no_steps() -> None:
    model = Qwen3_5ForConditionalGeneration.from_pretrained(TERSE_TEACHER_DIR).eval()
    encoder = PromptEncoder(TERSE_TEACHER_DIR, unopened)
    question = Question("", "What is the sum of the digits three five one?", (), "9", "math")
    prompt, _ = encoder.encode(load_templates().plain_text(question), question)
    ids = torch.tensor([prompt.token_ids.tolist()])
    with torch.no_grad():
        written = model.generate(input_ids=ids, max_new_tokens=24, do_sample=False)
    tokenizer = AutoTokenizer.from_pretrained(TERSE_TEACHER_DIR)
    text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    assert text == "<think>8,9</think>\\boxed{9}"


def unopened(reference: MediaRef) -> Frames:
    raise AssertionError(f"a text question has no media, got {reference}")


def test_learning_rate_falls_over_a_stage() -> None:
    # 4 updates from 1 to 0: 1, 0.75, 0.5, 0.25.
    assert [learning_rate(STAGE, update) for update in range(4)] == [1.0, 0.75, 0.5, 0.25]
