"""The prompts have the parts of the paper's, in its order: rendered, whole, against literal text.

Source: ZPPO (arXiv 2606.18216), appendix on prompts; the wording is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data.media.opening import Frames
from data.question import MediaRef, Question
from tests.support.zone_builders import rollout
from zppo_mm.bundled import STUDENT_DIR
from zppo_mm.config.schema import ZoneConfig
from zppo_mm.experience import Group, Prompt, PromptInstance, Rollout
from zppo_mm.rewards.boxes import last_boxed
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.teacher.teacher import Trace
from zppo_mm.zone.compress import RuleCompressor, TeacherCompressor
from zppo_mm.zone.hint import RuleHintWriter, TeacherHintWriter
from zppo_mm.zone.prompts import MAX_LISTED_ANSWER_CHARS, load_templates
from zppo_mm.zone.reformulate import Reformulator

CLOSING = (
    "First reason as an inner monologue inside <think> </think>, then answer. "
    "Put the final answer in \\boxed{}."
)
BCQ_INSTRUCTION = (
    "Below are two candidate responses in <candidate> tags: one is correct, the other is wrong. "
    "Use them as references that help to solve the problem."
)
COMPRESSION = (
    "Shorten the response below, which stands in <response> tags, to at most 5 lines, and write "
    "them in <summary> tags. Keep only its essential steps as they are, right or wrong, and its "
    "final answer. Leave out retries and abandoned attempts. Add nothing, correct nothing and "
    "derive nothing new. End with the final answer in \\boxed{}, if the response has one."
)
HINT_WRITING = (
    "The response below, which stands in <response> tags, is a correct solution of a problem. "
    "Write a hint of at most 5 lines for somebody who has to solve the same problem: how to begin "
    "and what to look at. Do not give the final answer away, put nothing in \\boxed{}, and do not "
    "copy the solution."
)

TEXT = Question("text", "What is 6 x 7?", (), "42", "math")
IMAGE = replace(
    TEXT, id="image", text="Which number is shown?", media=(MediaRef("image", "s.tar", "k", "png"),)
)
CHOICE = Question("choice", "Which is even?\n", (), "B", "choice", ("three", "four"))
SHOWN = {
    "text": "What is 6 x 7?",
    "image": "Which number is shown?",
    "choice": "Which is even?\nA. three\nB. four",
}
BY_ID = {question.id: question for question in (TEXT, IMAGE, CHOICE)}

WRONG = (
    rollout("<think>6 x 7 is 36</think>\n\\boxed{36}", "36", 0.0),
    rollout("It is 36.\n\\boxed{36}", "36", 0.0),
    rollout("no idea", None, 0.0),
    rollout("half:\n\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", 0.0),
)
RIGHT = (rollout("<think>6 x 7 = 42</think>\n\\boxed{42}", "42", 1.0),)


def words(text: str) -> int:
    return len(text.split())


def reformulated(
    question: Question, wrong: Sequence[Rollout], zone: ZoneConfig
) -> list[PromptInstance]:
    rule = RuleCompressor(words, 512, 5)
    reformulator = Reformulator(
        load_templates(), zone, 0, rule, hints=RuleHintWriter(rule), student_ids=lambda _: []
    )
    prompt = Prompt(question.text, np.arange(3), np.zeros((3, 3), np.int64), 3)
    hard = Group(PromptInstance(f"0/new/{question.id}", question, "new", ""), prompt, tuple(wrong))
    return list(reformulator.reformulate([hard], {question.id: RIGHT}, 0, 4).instances)


@pytest.mark.parametrize("name", SHOWN)
def test_plain_is_question_and_closing(name: str) -> None:
    assert load_templates().plain_text(BY_ID[name]) == f"{SHOWN[name]}\n{CLOSING}"


@pytest.mark.parametrize("name", SHOWN)
def test_bcq_is_question_instruction_two_blocks_and_closing(name: str) -> None:
    (bcq,) = reformulated(BY_ID[name], WRONG[:1], ZoneConfig(rho_aug=1, ncq=False))
    right = "<candidate>\n6 x 7 = 42\n\\boxed{42}\n</candidate>\n"
    wrong = "<candidate>\n6 x 7 is 36\n\\boxed{36}\n</candidate>\n"
    blocks = right + wrong if bcq.candidates[0].correct else wrong + right
    assert bcq.text == f"{SHOWN[name]}\n\n{BCQ_INSTRUCTION}\n{blocks}{CLOSING}"


@pytest.mark.parametrize("name", SHOWN)
def test_ncq_is_question_distinct_boxed_answers_all_blocks_and_closing(name: str) -> None:
    (ncq,) = reformulated(BY_ID[name], WRONG, ZoneConfig(rho_aug=1, bcq=False))
    assert ncq.text == (
        f"{SHOWN[name]}\n\n"
        "Wrong final answers: \\boxed{36}, \\boxed{\\frac{1}{2}}\n"
        "Below are the incorrect reasonings in <candidate> tags.\n"
        "<candidate>\n6 x 7 is 36\n\\boxed{36}\n</candidate>\n"
        "<candidate>\nIt is 36.\n\\boxed{36}\n</candidate>\n"
        "<candidate>\nno idea\n</candidate>\n"
        "<candidate>\nhalf:\n\\boxed{\\frac{1}{2}}\n</candidate>\n"
        f"{CLOSING}"
    )


def test_ncq_says_so_if_nothing_was_boxed() -> None:
    (ncq,) = reformulated(TEXT, WRONG[2:3], ZoneConfig(rho_aug=1, bcq=False))
    assert ncq.text == (
        "What is 6 x 7?\n\n"
        "Wrong final answers: (none was boxed)\n"
        "Below are the incorrect reasonings in <candidate> tags.\n"
        "<candidate>\nno idea\n</candidate>\n"
        f"{CLOSING}"
    )


@pytest.mark.parametrize("name", SHOWN)
def test_hint_is_question_hint_and_closing(name: str) -> None:
    zone = ZoneConfig(rho_aug=1, bcq=False, ncq=False, hint=True)
    rule = RuleCompressor(words, 512, 5)
    answer = rollout("<think>Count </hint> the rows.\nThen 42.</think>\n\\boxed{42}", "42", 1.0)
    reformulator = Reformulator(load_templates(), zone, 0, rule, hints=RuleHintWriter(rule))
    question = BY_ID[name]
    prompt = Prompt(question.text, np.arange(3), np.zeros((3, 3), np.int64), 3)
    hard = Group(PromptInstance("0/new/q", question, "new", ""), prompt, WRONG[:1])
    (hint,) = reformulator.reformulate([hard], {question.id: (answer,)}, 0, 4).instances
    first = "Count < /hint> the rows."
    shown = f"{first}\nThen 42." if question.choices else first
    assert hint.text == f"{SHOWN[name]}\n\n<hint>\n{shown}\n</hint>\n{CLOSING}"


def test_the_teacher_rewrites_a_response_that_it_sees_alone() -> None:
    asked: list[str] = []

    def generate(prompts: Sequence[str], step: int, attempt: int) -> Sequence[str | None]:
        asked.extend(prompts)
        return [None] * len(prompts)

    rule = RuleCompressor(words, 512, 5)
    templates = load_templates()
    trace = Trace(CHOICE, "<think>No </response> <summary> 3</think>\n\\boxed{three}", "three")
    TeacherCompressor(generate, rule, templates.compress).compress([trace], 0)
    TeacherHintWriter(generate, RuleHintWriter(rule), templates.write_hint).write([trace], 0)
    response = "<response>\nNo < /response> < summary> 3 \n\\boxed{three}\n</response>"
    # Both are asked twice, because no reply came.
    assert asked == [f"{COMPRESSION}\n\n{response}"] * 2 + [f"{HINT_WRITING}\n\n{response}"] * 2


def test_the_medium_comes_before_every_prompt_about_it() -> None:
    pixels = np.zeros((1, 32, 32, 3), np.uint8)
    encoder = PromptEncoder(STUDENT_DIR, lambda _: Frames(pixels, (0.0,)))
    zone = ZoneConfig(rho_aug=1, hint=True, prefix=True)
    texts = [load_templates().plain_text(IMAGE)]
    texts += [each.text for each in reformulated(IMAGE, WRONG, replace(zone, prefix=False))]
    assert len(texts) == 4
    for text in texts:
        prompt, _ = encoder.encode(text, IMAGE)
        assert encoder.decode(prompt.token_ids) == (
            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
            f"{text}<|im_end|>\n<|im_start|>assistant\n"
        )


@given(st.text(alphabet="a{}\\ $<>/", max_size=MAX_LISTED_ANSWER_CHARS + 9))
@example("}")
@example("\\")
@example("{" * 99)
@example("a" * (MAX_LISTED_ANSWER_CHARS - 1) + "\\}")
def test_no_answer_leaves_its_box(answer: str) -> None:
    listed = load_templates().ncq_text(TEXT, [answer, "7"], []).splitlines()[2]
    assert listed.startswith("Wrong final answers: \\boxed{")
    assert listed.endswith(", \\boxed{7}")
    first = listed.removeprefix("Wrong final answers: ").removesuffix(", \\boxed{7}")
    # The grader, which reads braces as LaTeX does, finds all of the answer in the first box.
    content = first.removeprefix("\\boxed{").removesuffix("}")
    assert last_boxed(first) == (content.strip() or None)
    assert len(content) <= 3 * MAX_LISTED_ANSWER_CHARS
