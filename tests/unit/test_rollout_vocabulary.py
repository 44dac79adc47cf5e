"""Token ids of a folder's files held against one another: embedding, added tokens, stop tokens,
chat template.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from tests.support.tiny_folder import TEMPLATE, build_folder
from zppo_mm.bundled.tokenizer import SPECIAL_TOKENS
from zppo_mm.errors import ConfigError
from zppo_mm.rollout.chat import ChatFormat

NUM_IDS = 256 + 5 + 7 + 2
"""Bytes, merges, special and other added tokens of the small tokenizer."""


def folder_of(
    path: Path,
    *,
    rows: int | None = NUM_IDS,
    vision: bool = True,
    template: str = TEMPLATE,
    eos: Any = "keep",
) -> Path:
    """Write a folder whose config.json describes an embedding, with other stop tokens if asked."""
    build_folder(path, vision=vision, template=template)
    change(
        path / "config.json", **({"text_config": {"vocab_size": rows}} if rows is not None else {})
    )
    if eos != "keep":
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return path


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def add_token(path: Path, text: str, *, special: bool) -> int:
    """Add a token behind the others and return its id."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(
        [AddedToken(text, special=special, normalized=False)], special_tokens=special
    )
    tokenizer.save_pretrained(path)
    token_id: int = tokenizer.convert_tokens_to_ids(text)
    return token_id


def token(path: Path, text: str) -> int:
    from transformers import AutoTokenizer

    token_id: int = AutoTokenizer.from_pretrained(path).convert_tokens_to_ids(text)
    return token_id


def test_as_many_rows_as_ids_are_enough_and_one_less_is_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    assert len(ChatFormat(folder)._tokenizer) == NUM_IDS
    change(folder / "config.json", text_config={"vocab_size": NUM_IDS + 50})
    ChatFormat(folder)
    change(folder / "config.json", text_config={"vocab_size": NUM_IDS - 1})
    last = NUM_IDS - 1
    message = rf"beyond the embedding, got '</think>' \({last}\), expected ids below {last}"
    with pytest.raises(ConfigError, match=message):
        ChatFormat(folder)
    change(folder / "config.json", text_config={"vocab_size": 100})
    message = r"\(100\), .* and 16\d more, expected ids below 100, the vocab_size of config\.json"
    with pytest.raises(ConfigError, match=message):
        ChatFormat(folder)


def test_a_flat_config_says_the_rows_too(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, rows=None, vision=False)
    ChatFormat(folder)
    change(folder / "config.json", vocab_size=NUM_IDS - 1)
    with pytest.raises(ConfigError, match="beyond the embedding"):
        ChatFormat(folder)


def test_an_added_token_that_text_can_contain_needs_a_row(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    added = add_token(folder, "<tool>", special=False)
    assert added == NUM_IDS
    with pytest.raises(ConfigError, match=rf"got '<tool>' \({NUM_IDS}\)"):
        ChatFormat(folder)


def test_a_special_token_that_nothing_uses_needs_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tmp_path)
    added = add_token(folder, "[PAD]", special=True)
    with caplog.at_level(logging.WARNING):
        chat = ChatFormat(folder)
    assert f"never used here: '[PAD]' ({added})" in caplog.text
    ids = chat.tokenize(chat.render("what [PAD] says", []).pieces)
    assert max(ids) < NUM_IDS
    # In the template, as the end of a turn, it is used.
    folder_of(tmp_path / "used", template=TEMPLATE.replace("'<|im_end|>\\n'", "'[PAD]'"))
    add_token(tmp_path / "used", "[PAD]", special=True)
    with pytest.raises(ConfigError, match=r"got '\[PAD\]'"):
        ChatFormat(tmp_path / "used")


def test_the_end_of_a_turn_is_a_stop_token_and_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tmp_path)
    end, text_end = token(folder, "<|im_end|>"), token(folder, "<|endoftext|>")
    for eos, expected, warned in (
        ([end, text_end], (end, text_end), False),
        ([text_end, end], (end, text_end), False),
        (end, (end,), False),
        (text_end, (end, text_end), True),
        ([text_end], (end, text_end), True),
        ([], (end,), False),
        (None, (end,), False),
        ([text_end, text_end, 7], (end, text_end, 7), True),
    ):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert ChatFormat(folder).stop_token_ids == expected, eos
        assert (
            f"eos_token_id lacks {end}, with which the chat template ends an answer" in caplog.text
        ) is warned, eos


def test_stop_tokens_of_config_json_hold_where_generation_has_none(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    end, text_end = token(folder, "<|im_end|>"), token(folder, "<|endoftext|>")
    (folder / "generation_config.json").unlink()
    change(folder / "config.json", text_config={"vocab_size": NUM_IDS, "eos_token_id": text_end})
    assert ChatFormat(folder).stop_token_ids == (end, text_end)
    change(folder / "config.json", eos_token_id=[9, text_end])
    assert ChatFormat(folder).stop_token_ids == (end, 9, text_end)


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        # Llama 3, Llama 2, Gemma, Phi and templates that think before an answer, with the small
        # tokenizer's tokens instead of theirs.
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}<|vision_end|>\n\n{{ m.content "
            "}}<|endoftext|>{% endfor %}",
            "<|endoftext|>",
        ),
        (
            "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>[INST] {{ m.content }} "
            "[/INST]{% else %} {{ m.content }} <|im_end|>{% endif %}{% endfor %}",
            "<|im_end|>",
        ),
        (
            "<|endoftext|>{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content "
            "}}<|im_end|>\n{% endfor %}",
            "<|im_end|>",
        ),
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' "
            "%}<think>\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}",
            "<|im_end|>",
        ),
        # No token of its own ends an answer: the next turn's beginning is none.
        ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}", ""),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", ""),
        # Cannot render an answer.
        (
            "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('one turn only') "
            "}}{% endif %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
            "",
        ),
    ],
)
def test_the_end_of_a_turn_is_found_in_templates_of_every_kind(
    template: str, ends: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tmp_path, vision=False, template=template, eos=7)
    with caplog.at_level(logging.WARNING):
        stops = ChatFormat(folder).stop_token_ids
    assert stops == ((token(folder, ends), 7) if ends else (7,))
    assert (
        "with which the chat template ends an answer"
        if ends
        else "shows no special token that ends an answer"
    ) in caplog.text


def test_stop_tokens_beyond_the_embedding_never_come(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tmp_path, eos=[151645, 7])
    with caplog.at_level(logging.WARNING):
        assert ChatFormat(folder).stop_token_ids == (token(folder, "<|im_end|>"), 7)
    assert "stop tokens beyond the embedding's" in caplog.text
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    folder_of(tmp_path / "plain", vision=False, template=plain, eos=151645)
    change(tmp_path / "plain" / "config.json", vocab_size=NUM_IDS)
    with pytest.raises(
        ConfigError,
        match=rf"no answer could end, got the stop tokens \[151645\], expected ids below {NUM_IDS}",
    ):
        ChatFormat(tmp_path / "plain")


@pytest.mark.parametrize("eos", ["<|im_end|>", 1.5, True, [1, None], -1, [[1]], {"a": 1}])
def test_a_stop_token_that_is_no_id_is_refused(eos: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, eos=eos)
    with pytest.raises(
        ConfigError, match=r"eos_token_id is no token, got .*, expected an id or a list of ids"
    ):
        ChatFormat(folder)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}",
            r"the chat template cannot render \['user'\], got TemplateSyntaxError",
        ),
        ("{{ messages[0].words.text }}", r"cannot render \['user'\], got UndefinedError"),
        ("{{ messages[0].content[0].text }}", "got the text of a question with no media 0 times"),
        (
            "<|im_start|>user\nHello<|im_end|>",
            "does not show what it is given, got the text of a question with no media 0 times",
        ),
        (
            "{{ messages[0].content }}{{ messages[0].content }}",
            "with no media 2 times, expected once",
        ),
    ],
)
def test_a_template_that_loses_the_question_is_refused(
    template: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        ChatFormat(folder_of(tmp_path, vision=False, template=template))


def test_a_template_that_shows_no_media_is_refused_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = TEMPLATE.replace("'<|vision_start|><|' + part.type + '_pad|><|vision_end|>'", "''")
    with caplog.at_level(logging.WARNING):
        ChatFormat(folder_of(tmp_path, template=template))
    assert "does not show one image once" in caplog.text
    assert "does not show one video once" in caplog.text


def test_of_several_templates_the_default_is_used(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "chat_template.jinja").unlink()
    tool = "<|im_start|>tools{{ messages[0].content }}<|im_end|>"
    change(
        folder / "tokenizer_config.json",
        chat_template=[
            {"name": "default", "template": TEMPLATE},
            {"name": "tool_use", "template": tool},
        ],
    )
    assert ChatFormat(folder).render("x", []).text.startswith("<|im_start|>user\nx")
    change(
        folder / "tokenizer_config.json",
        chat_template=[{"name": "a", "template": TEMPLATE}, {"name": "b", "template": tool}],
    )
    with pytest.raises(
        ConfigError, match=r"no chat template, got \['a', 'b'\], expected one that is named default"
    ):
        ChatFormat(folder)
    change(folder / "tokenizer_config.json", chat_template=None)
    with pytest.raises(ConfigError, match="no chat template, got none"):
        ChatFormat(folder)


def test_a_template_for_media_may_stand_in_another_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tmp_path)
    older, oldest = (TEMPLATE.replace("'\\n'", text) for text in ("'older '", "'oldest '"))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": oldest}))
    with caplog.at_level(logging.WARNING):
        assert ChatFormat(folder).render("x", []).text.startswith("<|im_start|>user\nx")
    assert (
        "that of chat_template.jinja is used and not that of ['chat_template.json']" in caplog.text
    )
    (folder / "processor_config.json").write_text(json.dumps({"chat_template": older}))
    (folder / "chat_template.jinja").unlink()
    assert ChatFormat(folder).render("x", []).text.startswith("<|im_start|>user")
    assert "older x" in ChatFormat(folder).render("x", []).text
    (folder / "processor_config.json").unlink()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert "oldest x" in ChatFormat(folder).render("x", []).text
    assert "differ" not in caplog.text


def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    for content in ("{}", "{", json.dumps({"version": "1.0", "model": {"type": "Nothing"}})):
        (folder / "tokenizer.json").write_text(content)
        message = (
            r"the tokenizer cannot be loaded, got .*, expected files of a Hugging Face tokenizer"
        )
        with pytest.raises(ConfigError, match=message):
            ChatFormat(folder)


def test_no_code_of_a_folder_is_run(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "evil.py").write_text("open('ran', 'w')\nclass Evil: ...\n")
    change(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "evil.Evil"]},
        tokenizer_class="Evil",
    )
    change(
        folder / "config.json",
        auto_map={"AutoConfig": "evil.Evil", "AutoTokenizer": [None, "evil.Evil"]},
    )
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages[0].content }}"
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ConfigError, match=r"SecurityError|cannot be loaded|trust_remote_code"):
        ChatFormat(folder)
    assert not Path("ran").exists()
    assert not (folder / "ran").exists()


def test_special_tokens_are_those_of_the_small_tokenizer(tmp_path: Path) -> None:
    assert set(ChatFormat(folder_of(tmp_path)).special_tokens) == set(SPECIAL_TOKENS)


def test_a_tokenizer_that_loses_text_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, vision=False)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"] |= {
        "vocab": {
            token: number for token, number in content["model"]["vocab"].items() if token != "q"
        }
    }
    file.write_text(json.dumps(content))
    with pytest.raises(
        ConfigError,
        match="the tokenizer loses text, got 'zppouestion' back, expected 'zppoquestion'",
    ):
        ChatFormat(folder)


def test_a_tokenizer_sets_no_limit_of_its_own(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, vision=False)
    for value in ("many", 1, None):
        change(folder / "tokenizer_config.json", model_max_length=value)
        assert ChatFormat(folder).count_tokens("the question") > 1
