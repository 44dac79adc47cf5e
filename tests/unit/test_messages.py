"""Conversations with media in their texts: one reading whatever form they have, and what is wrong
said with its place.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from data.errors import SampleError
from data.imports.convert import convert_jsonl
from data.lint import lint
from data.messages import kinds_named, placed, whole_text
from data.question import MediaKind, MediaRef, Question, Turn, question_of
from data.sample import parse_question
from data.shards import ShardFolder
from data.sources.opening import open_source
from data.sources.rows import RowRules
from data.sources.tables import TableSource
from tests.support.shard_samples import png
from tests.support.source_files import PICTURE, gif, write_lines

SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "A cat."}
MARKED = [
    SYSTEM,
    {"role": "user", "content": "What runs in <video>?"},
    ANSWER,
    {"role": "user", "content": "Is `<image>` a tag? Is <image>the cat of<image>?"},
]
TEXTS = [message["content"] for message in MARKED]
FILES = {"1.png": png(value=1), "2.png": png(value=2), "c.gif": gif()}
IN_TEXT_ORDER = ["c.gif", "1.png", "2.png"]
FIELDS = {"id": "q", "answer": "yes", "answer_type": "math"}


def typed(part: Callable[[str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the conversation in parts; `part` makes that of a medium from kind and file."""
    texts = [("What runs in ", "video", "c.gif"), ("?",)]
    asked = [("Is `<image>` a tag? Is ", "image", "1.png"), ("the cat of", "image", "2.png"), "?"]

    def parts(pieces: list[Any]) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []
        for text, *medium in pieces:
            made.append({"type": "text", "text": text})
            made += [part(*medium)] if medium else []
        return made

    return [
        SYSTEM,
        {"role": "user", "content": parts(texts)},
        ANSWER,
        {"role": "user", "content": parts(asked)},
    ]


NAMED = {"images": ["1.png", "2.png"], "videos": ["c.gif"]}
FORMS: dict[str, dict[str, Any]] = {
    "markers and columns": {"messages": MARKED, **NAMED},
    "bare parts and columns": {"messages": typed(lambda kind, _: {"type": kind}), **NAMED},
    "parts with paths": {"messages": typed(lambda kind, file: {"type": kind, kind: file})},
    "parts with other names": {"messages": typed(lambda kind, file: {"type": kind, "path": file})},
    "parts of a server": {
        "messages": typed(lambda kind, file: {"type": f"{kind}_url", f"{kind}_url": {"url": file}})
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("messages")
    for name, content in FILES.items():
        (path / name).write_bytes(content)
    return path


def check(source: ShardFolder | TableSource) -> None:
    (key,) = source.keys()
    question = source.question(*key)
    assert [turn.text for turn in question.earlier] == TEXTS[:3]
    assert [turn.role for turn in question.earlier] == ["system", "user", "assistant"]
    assert question.text == TEXTS[3]
    contents = [source.media_bytes(reference) for reference in question.media]
    assert contents == [FILES[name] for name in IN_TEXT_ORDER]
    # What a checkpoint keeps of it.
    assert question_of(json.loads(json.dumps(asdict(question)))) == question


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_conversation(folder: Path, form: str) -> None:
    lines = write_lines(folder / "questions.jsonl", [{**FIELDS, **FORMS[form]}])
    check(open_source(lines))
    convert_jsonl(lines, folder / form)
    check(open_source(folder / form))


def test_messages_of_a_table_may_hold_the_media(folder: Path) -> None:
    part = pyarrow.struct(
        [("type", pyarrow.string()), ("text", pyarrow.string())]
        + [(kind, PICTURE) for kind in ("image", "video")]
    )
    messages = typed(lambda kind, file: {"type": kind, kind: {"bytes": FILES[file], "path": file}})
    for message in messages:
        if isinstance(message["content"], str):  # a column has one type
            message["content"] = [{"type": "text", "text": message["content"]}]
    turn = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.list_(part))])
    schema = pyarrow.schema(
        [(name, pyarrow.string()) for name in FIELDS] + [("prompt", pyarrow.list_(turn))]
    )
    table = pyarrow.Table.from_pylist([{**FIELDS, "prompt": messages}], schema)
    parquet.write_table(table, folder / "held.parquet")
    source = open_source(folder / "held.parquet", columns={"messages": "prompt"})
    check(source)
    assert lint([source]) == (1, [])
    rules = RowRules({"messages": "prompt"})
    convert_jsonl(folder / "held.parquet", folder / "of a table", rules=rules)
    check(open_source(folder / "of a table"))


def test_a_question_places_its_media_too(folder: Path) -> None:
    rows = [
        {**FIELDS, "question": "Is <image> in <video>?", "images": ["1.png"], "videos": ["c.gif"]},
        {**FIELDS, "id": "r", "question": "<video> or <image>?", **NAMED, "images": ["1.png"]},
    ]
    source = open_source(write_lines(folder / "placed.jsonl", rows))
    keys = list(source.keys())
    kinds = [[ref.kind for ref in source.question(*key).media] for key in keys]
    assert kinds == [["image", "video"], ["video", "image"]]


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts]}]


PICTURED = {"type": "image", "image": "1.png"}
WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "no list": ({"messages": "What?"}, "bad_field", r"got 'What\?', expected a list of"),
    "no message": ({"messages": ["What?"]}, "bad_field", r"message 0: .*got 'What\?', expected \{"),
    "other keys": (
        {"messages": [{"from": "human", "value": "What?"}]}, "bad_field",
        r"message 0: .*got \['from', 'value'\], expected role and content alone",
    ),
    "tools": (
        {"messages": [{"role": "user", "content": "What?", "tool_calls": [{"name": "x"}]}]},
        "bad_field", "expected role and content alone",
    ),
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, "bad_field", "got 'tool', expected"),
    "empty": ({"messages": [SYSTEM, {"role": "user", "content": " "}]}, "bad_field", "message 1: "),
    "nothing": ({"messages": [{"role": "user"}]}, "bad_field", "got None, expected a text or a"),
    "answered": (
        {"messages": [{"role": "user", "content": "What?"}, ANSWER]}, "bad_field",
        r"got \['user', 'assistant'\], expected .* the last of the user; the answer belongs into",
    ),
    "late system": (
        {"messages": [{"role": "user", "content": "What?"}, SYSTEM, *MARKED[1:]]}, "bad_field",
        "expected at most one message of the system, the first",
    ),
    "picture for the system": (
        {"messages": [{"role": "system", "content": "<image>"}, *MARKED[3:]], **NAMED},
        "bad_field", "expected media in messages of user and assistant alone",
    ),
    "sound": ({"messages": user({"type": "audio"})}, "bad_field", "'audio'.*expected {\"type\": "),
    "settings": (
        {"messages": user({**PICTURED, "max_pixels": 9})}, "bad_field", "max_pixels.*expected {",
    ),
    "marker in a part": (
        {"messages": user({"type": "text", "text": "<image>"}), "images": ["1.png"]}, "bad_field",
        "expected no marker in a text beside other parts",
    ),
    "twice asked": (
        {"messages": MARKED, **NAMED, "question": "What?"}, "bad_field",
        "two fields say what is asked, got question and messages, expected one",
    ),
    "messages as question": (
        {"question": MARKED, **NAMED}, "bad_field",
        r"field question is a list, .*give a conversation as messages, of a table with columns: \{",
    ),
    "two places": (
        {"messages": user(PICTURED), "images": ["2.png"]}, "bad_field",
        r"media in messages and in another column, got images, .*columns: \{ignore: images\}",
    ),
    "address": (
        {"messages": user({"type": "image", "url": "https://x/a.png"})}, "bad_field",
        "column messages has an address",
    ),
    "markers without media": (
        {"messages": MARKED}, "missing_media", "got 2 times <image> and 0 of kind image",
    ),
    "more markers": (
        {"messages": MARKED, "images": ["1.png"], "videos": ["c.gif"]}, "missing_media",
        "got 2 times <image> and 1 of kind image, expected as many; add or name the media",
    ),
    "a medium that none names": (
        {"question": "What is <image>?", "images": ["1.png"], "videos": ["c.gif"]},
        "missing_media", "got 0 times <video> and 1 of kind video",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_with_its_place(folder: Path, case: str) -> None:
    fields, reason, message = WRONG[case]
    good = {**FIELDS, "id": "good", "question": "1 + 1 = ?"}
    path = write_lines(folder / "wrong.jsonl", [good, {**FIELDS, **fields}])
    source = open_source(path)
    with pytest.raises(SampleError, match=rf"wrong\.jsonl:2: .*{message}") as caught:
        source.question(*source.keys()[1])
    assert caught.value.reason == reason


def test_a_part_of_a_shard_names_no_file() -> None:
    content = json.dumps({**FIELDS, "messages": user(PICTURED)}).encode()
    with pytest.raises(SampleError, match=r"s\.tar:k: a part of messages holds a medium, got '1"):
        parse_question("s.tar", "k", content, ["json", "png"])


def test_a_column_that_is_left_out_leaves_the_other_place(folder: Path) -> None:
    rows = [{**FIELDS, "question": "What?", "messages": user(PICTURED), "images": ["2.png"]}]
    path = write_lines(folder / "twice.jsonl", rows)
    source = open_source(path, columns={"ignore": "question,images"})
    (reference,) = source.question(*source.keys()[0]).media
    assert source.media_bytes(reference) == FILES["1.png"]
    other = open_source(path, columns={"ignore": "messages"})
    question = other.question(*other.keys()[0])
    assert (question.text, other.media_bytes(question.media[0])) == ("What?", FILES["2.png"])


PIECES = st.lists(
    st.sampled_from(["<image>", "<video>", "`<image>`", "<image 1>", "a", " ", "`"]), max_size=6
).map("".join)


@given(st.lists(PIECES, min_size=1, max_size=4))
def test_no_text_and_no_medium_is_lost_or_moved(texts: list[str]) -> None:
    turns = [Turn("user", text) for text in texts]
    kinds = [kind for text in texts for kind in kinds_named(text)]
    messages = placed(turns, kinds)
    spelled = [
        "".join(part if isinstance(part, str) else f"<{kinds[part]}>" for part in parts)
        for _, parts in messages
    ]
    assert spelled == texts
    indices = [part for _, parts in messages for part in parts if isinstance(part, int)]
    assert indices == list(range(len(kinds)))


def test_media_that_no_text_names_are_in_front_of_the_first_message_of_the_user() -> None:
    turns = [Turn("system", "s"), Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")]
    kinds: list[MediaKind] = ["image", "video"]
    expected = [("system", ["s"]), ("user", [0, 1, "a"]), ("assistant", ["b"]), ("user", ["c"])]
    assert placed(turns, kinds) == expected
    with pytest.raises(SampleError, match=r"got \['image'\], expected \['image', 'video'\]"):
        placed([Turn("user", "<image>")], kinds)


def test_all_that_is_asked_as_one_text() -> None:
    question = Question("q", " c ", (MediaRef("image", "s", "k", "png"),), "1", "math")
    assert whole_text(question) == "c"
    talked = replace(question, earlier=(Turn("system", "s"), Turn("user", "a")))
    assert whole_text(talked) == "system: s\n\nuser: a\n\nuser: c"
