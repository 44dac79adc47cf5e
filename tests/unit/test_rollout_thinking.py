"""Variables of chat templates, and what templates put before an answer: a thought that is opened,
closed or absent.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from data.media.opening import Frames
from data.question import MediaRef
from tests.support.pool_asking import served_teacher
from tests.support.raw_server import http, say, serve_raw
from tests.support.tiny_folder import ENDINGS, TEMPLATE, build_folder, template_with
from zppo_mm.config.schema import TeacherConfig
from zppo_mm.conversion.chat import prefix_facts
from zppo_mm.errors import ConfigError
from zppo_mm.experience import Rollout
from zppo_mm.parallel.exchange import SingleProcess
from zppo_mm.rewards.boxes import final_answer
from zppo_mm.rewards.verify import Verifier
from zppo_mm.rollout.chat import ChatFormat
from zppo_mm.rollout.engine import Generation, GenerationRequest, SamplingParams
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.rollout.sampler import GroupSampler
from zppo_mm.run.thinking import contradiction, log_generation_prefixes, prefix_table
from zppo_mm.teacher.served.pool import EndpointPool
from zppo_mm.zone.compress import RuleCompressor, summary
from zppo_mm.zone.prompts import load_templates

CLOSING = load_templates().closing
HEADER = "<|im_start|>assistant\n"
TEXTS = {"opened": "<think>\n", "closed": "<think>\n\n</think>\n\n", "absent": ""}


def no_media(reference: MediaRef) -> Frames:
    raise AssertionError(reference)


def encoder(folder: Path, ending: str, **variables: object) -> PromptEncoder:
    folder.mkdir(exist_ok=True)
    build_folder(folder, vision=False, template=template_with(ending))
    return PromptEncoder(folder, no_media, chat_template_kwargs=variables)


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        ("opened", ["opened"]),
        ("closed", ["closed"]),
        ("absent", ["absent"]),
        ("opened, can close", ["opened", "opened", "closed"]),
        ("closed, can open", ["closed", "opened", "closed"]),
        ("absent, can close", ["absent", "absent", "closed"]),
    ],
)
def test_the_generation_prefix(tmp_path: Path, ending: str, expected: list[str]) -> None:
    assert len(ENDINGS) == 6
    made = [encoder(tmp_path, ending).chat.prefix]
    if "can" in ending:
        made += [
            encoder(tmp_path, ending, enable_thinking=value).chat.prefix for value in (True, False)
        ]
    assert [prefix.thinking for prefix in made] == expected
    assert [prefix.text for prefix in made] == [HEADER + TEXTS[name] for name in expected]
    facts = [text for _, text in prefix_facts(tmp_path)]
    assert facts == [f"{HEADER + TEXTS[name]!r}, <think> {name}" for name in expected]


def test_inspecting_a_folder_without_a_template_says_so(tmp_path: Path) -> None:
    build_folder(tmp_path, vision=False)
    (tmp_path / "chat_template.jinja").unlink()
    ((title, text),) = prefix_facts(tmp_path)
    assert title == "generation prefix"
    assert "no chat template" in text


def test_variables_change_every_prompt(tmp_path: Path) -> None:
    template = template_with("absent").replace(
        "{{- '<|im_start|>' + message.role",
        "{{- effort|default('') }}{{- '<|im_start|>' + message.role",
    )
    build_folder(tmp_path, template=template)
    plain = PromptEncoder(tmp_path, no_media).chat.render("?", ["image"])
    given = PromptEncoder(tmp_path, no_media, chat_template_kwargs={"effort": "high"})
    assert given.chat.render("?", ["image"]).text == f"high{plain.text}"


@pytest.mark.parametrize(
    ("variables", "unread"),
    [
        ({"enable_thinkin": False}, "enable_thinkin"),
        ({"enable_thinking": False, "b": 1, "a": 2}, "a, b"),
        # These reach the renderer, not the template.
        ({"tokenize": True}, "tokenize"),
        ({"chat_template": "x"}, "chat_template"),
        ({"messages": []}, "messages"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
    ],
)
def test_a_variable_that_the_template_does_not_read_is_an_error(
    tmp_path: Path, variables: dict[str, object], unread: str
) -> None:
    build_folder(tmp_path, vision=False, template=template_with("opened, can close"))
    message = rf"chat_template_kwargs: .* does not read {unread}, expected any of enable_thinking;"
    with pytest.raises(ConfigError, match=message):
        ChatFormat(tmp_path, variables)


def test_variables_of_templates_with_other_tags_are_found(tmp_path: Path) -> None:
    template = (
        "{%- set ns = namespace(n=0) -%}{%- set own = depth -%}"
        "{%- for message in messages -%}{%- if loop.index > 9 -%}{%- break -%}{%- endif -%}"
        "{{- '<|im_start|>' + message.role + '\\n' -}}"
        "{%- if message.role == 'assistant' -%}{% generation %}{{- message.content + mood -}}"
        "{% endgeneration %}{%- else -%}{{- message.content -}}{%- endif -%}{{- '<|im_end|>\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    )
    build_folder(tmp_path, vision=False, template=template)
    ChatFormat(tmp_path, {"depth": 1, "mood": ""})
    for name in ("own", "ns", "message", "namespace"):
        with pytest.raises(
            ConfigError, match=rf"does not read {name}, expected any of depth, mood"
        ):
            ChatFormat(tmp_path, {"mood": "", name: 1})


def test_a_closing_instruction_behind_a_closed_thought_is_a_contradiction(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fixed, switched, opened, absent = (
        encoder(tmp_path / ending.replace(" ", "-"), ending)
        for ending in ("closed", "closed, can open", "opened", "absent")
    )
    assert "<think>" in CLOSING
    with caplog.at_level(logging.INFO):
        log_generation_prefixes([switched, fixed, opened, absent], CLOSING)
    shown, *warnings = [record.getMessage() for record in caplog.records]
    assert shown == f"how prompts end:\n{prefix_table([switched, fixed, opened, absent])}"
    assert len(warnings) == 2
    assert (
        r"set model.chat_template_kwargs={enable_thinking: true}, or give a closing" in warnings[0]
    )
    assert warnings[0].startswith(f"model: {switched.folder}: ")
    assert "enable_thinking" not in warnings[1]
    assert "give a closing.txt without <think> in zone.templates" in warnings[1]
    assert contradiction(fixed, "Box the answer.", "model") == ""
    chosen = encoder(tmp_path / "closed,-can-open", "closed, can open", enable_thinking=True)
    assert contradiction(chosen, CLOSING, "model") == ""


def rollout(text: str) -> Rollout:
    return Rollout(np.array([1]), np.zeros(1, np.float32), "length", text, None, 1.0, 0)


def test_a_response_moves_between_models_that_open_the_thought_and_those_that_do_not(
    tmp_path: Path,
) -> None:
    opens, bare = encoder(tmp_path / "a", "opened"), encoder(tmp_path / "b", "absent")
    continued, whole = "2+2\n</think>\n\\boxed{4}", "<think>\n2+2\n</think>\n\\boxed{4}"
    for model, expected in ((opens, continued), (bare, whole)):
        for text in (continued, whole):
            assert model.decode(model.response_ids(rollout(text))) == expected
        assert model.decode(model.response_ids(rollout("\\boxed{4}"))) == "\\boxed{4}"


def test_a_response_without_its_opening_tag_is_read_as_one_with_it(tmp_path: Path) -> None:
    opens = encoder(tmp_path, "opened")
    assert opens.chat.render("?", []).text.endswith("<think>\n")
    continued = "Maybe \\boxed{3}? No.\n</think>\n\nIt is\n\\boxed{4}"
    rule = RuleCompressor(opens.chat.count_tokens, max_tokens=512, max_lines=5)
    for text in (continued, f"<think>\n{continued}"):
        assert final_answer(text) == "4"
        assert rule.cut(text, "4") == "Maybe \\boxed{3}? No.\nIt is\n\\boxed{4}"


def test_the_template_of_these_tests_is_one_of_the_forms() -> None:
    assert template_with("opened") == TEMPLATE


class OneReply:
    """Answers every request with the same text."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = np.array(ids)

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> list[list[Generation]]:
        logprobs = np.zeros(len(self.ids), np.float32)
        return [[Generation(self.ids, logprobs, "length")] for _ in requests]


@pytest.mark.parametrize(("ending", "kept"), [("opened", None), ("absent", "a draft")])
def test_a_reasoning_that_the_prompt_opened_and_the_limit_cut_is_no_rewrite(
    tmp_path: Path, ending: str, kept: str | None
) -> None:
    chosen = encoder(tmp_path, ending)
    engine = OneReply(chosen.chat.tokenize(["So <summary>a draft</summary>, or"]))
    sampler = GroupSampler(engine, chosen, Verifier(), SingleProcess())
    sampling = SamplingParams(temperature=0.0, max_new_tokens=64, stop_token_ids=(0,))
    (reply,) = sampler.respond(["Shorten it."], sampling, "name")
    assert reply is not None
    assert summary(reply) == kept


@pytest.mark.parametrize(
    ("text", "finish_reason", "kept"),
    [
        ("So <summary>a draft</summary>, or", "length", None),
        ("So <summary>a draft</summary>, or\n</think>\n<summary>a</summary>", "length", "a"),
        ("<summary>a</summary>", "stop", "a"),
    ],
)
def test_a_server_that_shows_no_tag_of_a_cut_reasoning_gives_no_rewrite(
    tmp_path: Path, text: str, finish_reason: str, kept: str | None
) -> None:
    made = {"index": 0, "message": {"content": text}, "finish_reason": finish_reason}
    body = json.dumps({"choices": [made]}).encode()
    config = TeacherConfig(model="tiny")
    with serve_raw(lambda number: say(http(body))) as server:
        pool = EndpointPool([server.url], "tiny", config)
        teacher = served_teacher(pool, config, Verifier(), encoder(tmp_path, "absent"))
        (reply,) = teacher.rewrite(["Shorten it."], 1, 0)
        pool.close()
    assert reply is not None
    assert summary(reply) == kept
