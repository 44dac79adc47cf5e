"""Prompts: equal to the tokenizer's own where text is harmless, safe where it imitates special
tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data.errors import DataError, MediaError
from data.media.opening import Frames
from data.question import MediaRef, Question
from tests.support.tiny_folder import TEMPLATE, build_folder
from zppo_mm.bundled.tokenizer import SPECIAL_TOKENS
from zppo_mm.errors import ConfigError
from zppo_mm.experience import FinishReason, Rollout
from zppo_mm.rollout.prompt import PromptEncoder, PromptError


class Media:
    """Opens invented media and counts how often."""

    def __init__(self) -> None:
        self.opened: list[str] = []

    def __call__(self, reference: MediaRef) -> Frames:
        self.opened.append(reference.key)
        if reference.key == "broken":
            raise MediaError("unreadable", "media: cannot decode")
        if reference.key == "lost":
            raise DataError("shard is gone")
        rng = np.random.default_rng(len(reference.key))
        if reference.kind == "image":
            return Frames(rng.integers(0, 256, (1, 16, 24, 3), dtype=np.uint8), (0.0,))
        return Frames(rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8), (0.0, 0.5, 1.0))


def question(*kinds: str, key: str = "a") -> Question:
    media = tuple(
        MediaRef(kind, "shard.tar", f"{key}{index}", "png") for index, kind in enumerate(kinds)
    )
    return Question(id=f"q{key}", text="?", media=media, answer="1", answer_type="math")


@pytest.fixture(scope="module")
def encoder(prompt_folder: Path) -> PromptEncoder:
    return PromptEncoder(prompt_folder, Media())


@pytest.mark.parametrize("kinds", [(), ("image",), ("video", "image")])
def test_a_system_message_equals_the_tokenizers_own_chat(
    prompt_folder: Path, kinds: tuple[str, ...]
) -> None:
    system = "You are terse. The end."
    plain = PromptEncoder(prompt_folder, Media())
    encoder = PromptEncoder(prompt_folder, Media(), system_prompt=system)
    content = [{"type": kind} for kind in kinds]
    user = [*content, {"type": "text", "text": "What?"}] if kinds else "What?"
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    expected = AutoTokenizer.from_pretrained(prompt_folder).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    (prompt, vision), (without, _) = (
        each.encode("What?", question(*kinds)) for each in (encoder, plain)
    )
    assert prompt.text == expected
    assert prompt.grids == tuple(item.grid for item in vision)
    assert len(vision) == len(kinds)
    # The same prompt behind the message: ids, and positions moved by its length.
    extra = len(prompt.token_ids) - len(without.token_ids)
    assert extra > 0
    tail = without.token_ids[np.flatnonzero(prompt.token_ids != without.token_ids[0])[0] :]
    assert prompt.token_ids[-len(tail) :].tolist() == tail.tolist()
    assert prompt.next_position == without.next_position + extra
    assert encoder.chat.prefix == plain.chat.prefix
    assert encoder.stop_token_ids == plain.stop_token_ids


def test_a_special_token_in_a_system_message_is_text(prompt_folder: Path) -> None:
    literal = SPECIAL_TOKENS[0]
    encoder = PromptEncoder(prompt_folder, Media(), system_prompt=f"Never write {literal}.")
    plain = PromptEncoder(prompt_folder, Media(), system_prompt="Never write.")
    prompts = [each.encode("What?", question())[0] for each in (encoder, plain)]
    special = AutoTokenizer.from_pretrained(prompt_folder).convert_tokens_to_ids(literal)
    counts = [int((prompt.token_ids == special).sum()) for prompt in prompts]
    assert counts[0] == counts[1]
    assert f"Never write {literal}." in prompts[0].text


def test_a_template_without_system_messages_is_an_error(tmp_path: Path) -> None:
    build_folder(tmp_path)
    template = tmp_path / "chat_template.jinja"
    template.write_text("{% set messages = messages[-1:] %}" + template.read_text())
    with pytest.raises(ConfigError, match=r"shows no system message, got .*zone.templates"):
        PromptEncoder(tmp_path, Media(), system_prompt="Be terse.")


@pytest.mark.parametrize(
    "text", ["What is 1 + 1?", "  the\n\n the end  ", "<think>the</think>", "\n\n"]
)
def test_text_equals_the_tokenizers_own_chat(
    prompt_folder: Path, encoder: PromptEncoder, text: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(prompt_folder)
    prompt, vision = encoder.encode(text, question())
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    assert prompt.token_ids.tolist() == expected
    assert vision == ()
    assert prompt.next_position == len(expected)
    assert prompt.text == tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )


def test_media_are_expanded_as_the_family_does(prompt_folder: Path, encoder: PromptEncoder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(prompt_folder)
    prompt, vision = encoder.encode("the sum?", question("image", "video"))
    # image 16 x 24 pixels: 4 x 6 patches, 6 features. Video: times 0, 0.5 | 1, 1 in two temporal
    # patches, 4 features each.
    expected = (
        "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>"
        "<0.2 seconds><|vision_start|>" + "<|video_pad|>" * 4 + "<|vision_end|>"
        "<1.0 seconds><|vision_start|>" + "<|video_pad|>" * 4 + "<|vision_end|>"
        "the sum?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert prompt.token_ids.tolist() == tokenizer.encode(expected)
    assert prompt.grids == ((1, 4, 6), (2, 4, 4)) == tuple(item.grid for item in vision)
    assert prompt.text.count("<|image_pad|>") == prompt.text.count("<|video_pad|>") == 1
    assert prompt.positions.shape == (3, len(prompt.token_ids))
    assert prompt.next_position < len(prompt.token_ids)


def test_another_models_response_in_this_models_tokens(encoder: PromptEncoder) -> None:
    def rollout(text: str, finish_reason: FinishReason) -> Rollout:
        return Rollout(np.array([1]), np.zeros(1, np.float32), finish_reason, text, None, 1.0, 0)

    plain = encoder.chat.tokenize(["the sum</think>\nis"])
    assert encoder.response_ids(rollout("the sum</think>\nis", "length")) == plain
    # This template's prompt ends with an opened thought: a second opening would be one too many.
    assert encoder.response_ids(rollout("<think>\nthe sum</think>\nis", "stop")) == [
        *plain,
        encoder.stop_token_ids[0],
    ]
    # What imitates a special token is text.
    assert encoder.chat.image_token_id not in encoder.response_ids(
        rollout("<|image_pad|>", "length")
    )


SNIPPETS = [
    *SPECIAL_TOKENS,
    "<think>",
    "\ue200",
    "\ue2010\ue201",
    "\ue2000\ue201",
    "the ",
    "\n",
    "<|",
    "|>",
]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(SNIPPETS), max_size=8).map("".join), st.booleans())
def test_imitated_special_tokens_stay_text(
    encoder: PromptEncoder, text: str, with_image: bool
) -> None:
    asked = question("image") if with_image else question()
    plain, _ = encoder.encode("x", asked)
    prompt, _ = encoder.encode(text, asked)
    special = set(encoder.chat._special_ids.values())
    kept = [token for token in prompt.token_ids.tolist() if token in special]
    assert kept == [token for token in plain.token_ids.tolist() if token in special]
    assert (text if with_image else text.strip()) in encoder.chat._tokenizer.decode(
        prompt.token_ids
    )


def test_placeholders_that_are_no_special_tokens_are_broken_in_text(
    prompt_folder: Path, tmp_path: Path
) -> None:
    for item in prompt_folder.iterdir():
        (tmp_path / item.name).write_bytes(item.read_bytes())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((tmp_path / name).read_text())
        for token in content.get("added_tokens", []) + list(
            content.get("added_tokens_decoder", {}).values()
        ):
            token["special"] = token["special"] and token["content"] != "<|image_pad|>"
        (tmp_path / name).write_text(json.dumps(content))
    encoder = PromptEncoder(tmp_path, Media())
    prompt, _ = encoder.encode("see <|image_pad|>", question("image"))
    assert (prompt.token_ids == encoder.chat.image_token_id).sum() == 6
    assert "<\u200b|image_pad|>" in encoder.chat._tokenizer.decode(prompt.token_ids)


def test_decode_drops_special_tokens_at_the_end_only(encoder: PromptEncoder) -> None:
    tokenizer = encoder.chat._tokenizer
    ids = tokenizer.encode("<think>the<|im_start|> end<|im_end|><|endoftext|>")
    assert encoder.decode(ids) == "<think>the<|im_start|> end"
    assert encoder.decode(np.array(ids[:2])) == "<think>the"
    assert encoder.decode([]) == ""
    assert encoder.stop_token_ids == tuple(
        tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")
    )


def test_counts_and_names_tokens(encoder: PromptEncoder) -> None:
    assert set(encoder.chat.special_tokens) == set(SPECIAL_TOKENS)
    # "the" is one token by two merges, "<|" one, and the literal is plain text here: 3 + 6 bytes
    # and "|>" as two
    assert encoder.chat.count_tokens("the<|im_end|>") == 1 + 1 + 6 + 2


def test_media_are_opened_once_while_cached(prompt_folder: Path) -> None:
    media = Media()
    encoder = PromptEncoder(prompt_folder, media, max_cached_bytes=1)
    encoder.encode("one", question("image", "video"))
    encoder.encode("two", question("image", "video"))
    assert encoder.vision_inputs(question("image", "video"))[0].kind == "image"
    assert media.opened == ["a0", "a1"]
    encoder.vision_inputs(question("image", key="b"))
    encoder.vision_inputs(question("image", "video"))
    assert media.opened == ["a0", "a1", "b0", "a0", "a1"]


def test_bad_media_and_templates_are_refused(prompt_folder: Path, tmp_path: Path) -> None:
    encoder = PromptEncoder(prompt_folder, Media())
    bad = Question("q", "", (MediaRef("image", "s.tar", "broken", "png"),), "1", "math")
    with pytest.raises(
        PromptError, match=r"question q: image s.tar:broken.png: media: cannot decode"
    ) as caught:
        encoder.encode("x", bad)
    assert caught.value.reason == "unreadable"
    lost = Question("q", "", (MediaRef("image", "s.tar", "lost", "png"),), "1", "math")
    with pytest.raises(DataError, match="shard is gone") as stopped:
        encoder.encode("x", lost)
    assert not isinstance(stopped.value, PromptError)
    build_folder(tmp_path, template=TEMPLATE.replace("_pad|><|vision_end|>", "|>"))
    with pytest.raises(
        PromptError, match=r"placeholders do not fit its media, got \[\], expected \['image'\]"
    ):
        PromptEncoder(tmp_path, Media()).encode("x", question("image"))


def test_text_models_and_incomplete_folders(tmp_path: Path) -> None:
    build_folder(tmp_path, vision=False)
    encoder = PromptEncoder(tmp_path, Media())
    assert len(encoder.encode("the", question())[0].token_ids)
    with pytest.raises(PromptError, match="takes no media"):
        encoder.encode("the", question("image"))
    (tmp_path / "config.json").write_text('{"vision_config": {}, "image_token_id": 9999}')
    with pytest.raises(ConfigError, match="unusable image_token_id, got 9999"):
        PromptEncoder(tmp_path, Media())
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        PromptEncoder(tmp_path, Media())
