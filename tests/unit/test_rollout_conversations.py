"""Conversations as prompts, plain and reformulated, and as what teacher, judge and reader get:
equal to the tokenizer's own chat, media where the texts have them.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from data.media.opening import Frames
from data.question import MediaRef, Question, Turn
from tests.support.pool_asking import served_teacher
from tests.support.simulated_run import make_group, make_rollout
from tests.support.tiny_folder import TEMPLATE, build_folder
from tests.support.zone_builders import CountingCompressor, group, rollout
from zppo_mm.config.schema import TeacherConfig, ZoneConfig
from zppo_mm.errors import ConfigError
from zppo_mm.evaluation.answers import AnsweredQuestion
from zppo_mm.observability.transcripts import write_transcript
from zppo_mm.report.examples import choose_examples
from zppo_mm.rewards.judge import LlmJudge, load_judge_template
from zppo_mm.rewards.verify import JudgedResponse, Verifier
from zppo_mm.rollout.prompt import PromptEncoder, PromptError
from zppo_mm.run_folder import RunFolder
from zppo_mm.serving.fault import Fault
from zppo_mm.serving.received_text import ReceivedText
from zppo_mm.serving.servers import RetryPolicy
from zppo_mm.teacher.served.chat_api import Batch, ChatRequest
from zppo_mm.teacher.served.chat_server import read_request
from zppo_mm.teacher.served.media import MessageWriter
from zppo_mm.teacher.served.pool import ChatCall
from zppo_mm.teacher.served.rank_server import _instance
from zppo_mm.teacher.served.servers import Outcome
from zppo_mm.teacher.teacher import Hint, Trace
from zppo_mm.zone.hint import reveals
from zppo_mm.zone.prompts import load_templates
from zppo_mm.zone.reformulate import Reformulator
from zppo_mm.zone.replay import ReplayBuffer

SHOWN = MediaRef("image", "s.tar", "a", "0.png"), MediaRef("image", "s.tar", "b", "1.png")
EARLIER = (
    Turn("system", "Be brief."),
    Turn("user", "What is <image>?"),
    Turn("assistant", "<think>\nHm.\n</think>\nThe end."),
)
TALK = Question("q", "Is <image> the same? Say `<image>`.", SHOWN, "42", "math", earlier=EARLIER)
WITHOUT_THOUGHTS = TEMPLATE.replace(
    "{{- message.content | trim -}}", "{{- message.content.split('</think>')[-1] | trim -}}"
)
"""As templates of reasoning models render earlier answers."""
SIZES = {"a": (16, 24), "b": (16, 16)}  # 6 and 4 features


def open_media(ref: MediaRef) -> Frames:
    return Frames(np.full((1, *SIZES[ref.key], 3), 90, np.uint8), (0.0,))


@pytest.fixture(scope="module")
def encoder(prompt_folder: Path) -> PromptEncoder:
    return PromptEncoder(prompt_folder, open_media)


def runs_of(ids: list[int], token: int) -> list[int]:
    """Return the lengths of the runs of a token."""
    text = "".join("x" if each == token else " " for each in ids)
    return [len(run) for run in text.split()]


@pytest.mark.parametrize("template", [TEMPLATE, WITHOUT_THOUGHTS])
@pytest.mark.parametrize("vision", [True, False])
def test_a_text_conversation_equals_the_tokenizers_own_chat(
    tmp_path: Path, template: str, vision: bool
) -> None:
    build_folder(tmp_path, vision=vision, template=template)
    encoder = PromptEncoder(tmp_path, open_media, system_prompt="Not shown: the sample has one.")
    talk = replace(TALK, media=(), earlier=(*EARLIER[:1], Turn("user", "Hi"), *EARLIER[2:]))
    messages = [{"role": turn.role, "content": turn.text} for turn in talk.earlier]
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        [*messages, {"role": "user", "content": "And the\nend?"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    prompt, _ = encoder.encode("And the\nend?", talk)
    assert prompt.token_ids.tolist() == expected
    assert ("Hm." in prompt.text) == (template == TEMPLATE)
    # Without a system message of its own, a sample has the run's.
    other, _ = encoder.encode("And?", replace(talk, earlier=talk.earlier[1:]))
    assert other.text.startswith("<|im_start|>system\nNot shown: the sample has one.")


def test_media_stand_where_the_texts_have_them(prompt_folder: Path, encoder: PromptEncoder) -> None:
    prompt, vision = encoder.encode(TALK.text, TALK)
    first, second = (f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>" for count in (6, 4))
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\nWhat is {first}?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nHm.\n</think>\nThe end.<|im_end|>\n"
        f"<|im_start|>user\nIs {second} the same? Say `<image>`.<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )
    assert prompt.token_ids.tolist() == AutoTokenizer.from_pretrained(prompt_folder).encode(
        expected
    )
    assert prompt.grids == ((1, 4, 6), (1, 4, 4)) == tuple(item.grid for item in vision)


def test_special_tokens_in_every_message_are_text(encoder: PromptEncoder) -> None:
    literal = "<|image_pad|><|im_end|>"
    turns = tuple(replace(turn, text=turn.text + literal) for turn in EARLIER)
    said = TALK.text + literal
    prompt, _ = encoder.encode(said, replace(TALK, text=said, earlier=turns))
    plain, _ = encoder.encode(TALK.text, TALK)
    special = set(encoder.chat._special_ids.values())
    counts = [[each for each in made.token_ids if each in special] for made in (prompt, plain)]
    assert counts[0] == counts[1]
    assert prompt.text.count(literal) == 4


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{%- if messages[0].role == 'system' -%}{{ raise_exception('no system') }}{%- endif -%}"
            + TEMPLATE,
            r"question q: .*cannot render \['system', 'user', 'assistant', 'user'\], .*no system",
        ),
        (
            "{%- set messages = messages[-1:] -%}" + TEMPLATE,
            "question q: .*the chat template leaves out a message, got none with 'Be brief.'",
        ),
    ],
)
def test_a_template_that_cannot_show_the_messages_refuses_the_sample(
    tmp_path: Path, template: str, message: str
) -> None:
    build_folder(tmp_path, template=template)
    encoder = PromptEncoder(tmp_path, open_media)
    with pytest.raises(PromptError, match=message) as caught:
        encoder.encode(TALK.text, TALK)
    assert caught.value.reason == "conversation"


@pytest.mark.parametrize("kind", ["bcq", "ncq", "hint"])
def test_a_reformulated_prompt_keeps_media_and_earlier_messages(
    encoder: PromptEncoder, kind: str
) -> None:
    """The zone rewrites the last message; a candidate that writes a marker places nothing."""
    hard = group("q", [0, 0])
    wrong = tuple(replace(each, text="see <image>") for each in hard.rollouts)
    hard = replace(hard, instance=replace(hard.instance, question=TALK), rollouts=wrong)
    answers = {"q": (rollout("look at <image> and <video>\n\\boxed{42}", "42", 1.0),)}
    templates = load_templates(special_tokens=encoder.chat.special_tokens)
    switches = {name: name == kind for name in ("bcq", "ncq", "hint")}
    zone = ZoneConfig(rho_aug=1, **switches)
    reformulator = Reformulator(templates, zone, 0, CountingCompressor(), hints=RepeatedHints())
    (instance,) = reformulator.reformulate([hard], answers, 1, 4).instances
    assert instance.text.startswith(TALK.text)
    assert "< image>" in instance.text[len(TALK.text) :]
    prompt, vision = encoder.encode(instance.text, instance.question)
    plain, _ = encoder.encode(templates.plain_text(TALK), TALK)
    ids = prompt.token_ids.tolist()
    assert runs_of(ids, encoder.chat.image_token_id) == [6, 4]
    assert [item.grid for item in vision] == [(1, 4, 6), (1, 4, 4)]
    # Equal up to the end of the question.
    same = prompt.text.index(TALK.text[-20:]) + 20
    assert prompt.text[:same] == plain.text[:same]


class RepeatedHints:
    """Hints that are the responses."""

    def write(self, traces: Sequence[Trace], step: int) -> list[Hint]:
        return [Hint(trace.text) for trace in traces]


def test_templates_place_no_media(tmp_path: Path) -> None:
    (tmp_path / "closing.txt").write_text("Look at <image> again.")
    with pytest.raises(ConfigError, match=r"closing\.txt places a medium, got <image>, expected"):
        load_templates(str(tmp_path))


class Opened:
    """Opens the media of this page."""

    def open(self, ref: MediaRef) -> Frames:
        return open_media(ref)

    def read(self, ref: MediaRef) -> bytes:
        return ref.key.encode()


def test_a_served_teacher_gets_the_same_messages() -> None:
    earlier = (*EARLIER[:2], Turn("assistant", "A <|im_end|>."))
    messages = MessageWriter(TeacherConfig(), Opened()).messages(TALK.text, SHOWN, earlier)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[0]["content"] == "Be brief."
    assert messages[2]["content"] == "A < |im_end|>."

    def outline(content: Any) -> list[str]:
        return [part.get("text", part["type"]) for part in content]

    assert outline(messages[1]["content"]) == ["What is ", "image_url", "?"]
    assert outline(messages[3]["content"]) == ["Is ", "image_url", " the same? Say `< image>`."]
    urls = [messages[index]["content"][1]["image_url"]["url"] for index in (1, 3)]
    assert len(set(urls)) == 2


@dataclass
class Kept:
    """Servers that keep what they are asked and answer nothing. Implements `Servers`."""

    counts: Counter[str] = field(default_factory=Counter)
    requests: list[ChatRequest] = field(default_factory=list)

    def submit(self, requests: Sequence[ChatRequest], policy: RetryPolicy) -> Future[list[Outcome]]:
        self.requests += requests
        return Future()

    def probe(self) -> Future[dict[str, Fault | None]]:
        return Future()

    def close(self) -> None:
        pass


def test_a_teacher_on_ranks_of_its_own_gets_the_same_messages(encoder: PromptEncoder) -> None:
    kept = Kept()
    with Verifier() as verifier:
        served_teacher(kept, TeacherConfig(), verifier, encoder).submit([TALK], 1)
    (request,) = kept.requests
    asked = replace(request, batch=Batch("b", 0, 1))
    call = ChatCall(asked, 2, 0, "m", MessageWriter(TeacherConfig()), ReceivedText(""))
    body = asyncio.run(call.body(0))
    question = _instance(read_request(body)).question
    assert (question.media, question.earlier) == (SHOWN, EARLIER)
    assert question.text == load_templates().plain_text(TALK)
    pictured = json.loads(body)
    pictured["messages"][0]["content"] = [{"type": "text", "text": "Hi"}]
    with pytest.raises(ValueError, match="expected messages of plain text"):
        read_request(json.dumps(pictured).encode())


def test_the_judge_reads_the_conversation() -> None:
    asked: list[str] = []

    def complete(prompts: Any) -> list[str]:
        asked.extend(prompts)
        return ['{"verdict": "correct"}'] * len(prompts)

    judge = LlmJudge(complete, load_judge_template(), 1000)
    assert judge.judge([JudgedResponse(TALK, "yes", True)]) == [True]
    assert "system: Be brief.\n\nuser: What is <image>?\n\nassistant: <think>" in asked[0]


def test_a_hint_may_repeat_what_the_conversation_says() -> None:
    plain = replace(TALK, answer="seven", earlier=())
    talked = replace(plain, earlier=(Turn("user", "One to seven."),))
    assert reveals("count to seven", Trace(plain, "", "seven"))
    assert not reveals("count to seven", Trace(talked, "", "seven"))


def test_the_replay_buffer_keeps_the_conversation_over_a_checkpoint() -> None:
    buffer, restored = ReplayBuffer(3), ReplayBuffer(3)
    buffer.update([make_group(TALK, "new", [make_rollout("4", 0.0)])], 0.5, 1)
    restored.load_state_dict(json.loads(json.dumps(buffer.state_dict())))
    assert [entry.question for entry in restored.entries()] == [TALK]
    # Asked again by the stream, it is the same question.
    restored.update([make_group(TALK, "new", [make_rollout("4", 0.0)])], 0.5, 2)
    # Buffers of runs before there were conversations.
    state = json.loads(json.dumps(buffer.state_dict()))
    del state["entries"][0]["question"]["earlier"]
    restored.load_state_dict(state)
    assert [entry.question for entry in restored.entries()] == [replace(TALK, earlier=())]


def test_transcript_and_report_show_the_earlier_messages(tmp_path: Path) -> None:
    made = make_group(TALK, "new", [make_rollout("4", 1.0)], 1, (), "ask")
    path = write_transcript(RunFolder(tmp_path), 1, [made], {}, {})
    record = json.loads(path.read_text())
    answered = AnsweredQuestion.of(0, made.instance, made, "")
    assert record["earlier"] == answered.earlier
    assert record["earlier"] == [{"role": turn.role, "text": turn.text} for turn in EARLIER]
    (example,) = choose_examples(tmp_path, 1, None)
    shown = "".join(segment.text for segment in example.groups[0].segments)
    assert shown.startswith("system: Be brief.\n\nuser: What is <image>?\n\nassistant: <think>")
    assert shown.endswith("\n\nask")
