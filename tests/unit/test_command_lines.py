"""Every command that the documents show is read as its tool would read it."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest

from tests.support.tools import load_tool

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("README.md")),
]
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
TOOL = re.compile(r"tools/(\w+)\.py")
USERS_OWN = ("run.yaml", "mine.yaml")
"""Files that the documents write out, each in a block that begins with its name."""


class Command(NamedTuple):
    """A command line of a document, without launcher and comment."""

    document: str
    tool: str
    arguments: list[str]


def commands() -> list[Command]:
    """Return every command line that starts a tool."""
    found = []
    for document in DOCUMENTS:
        for block in BLOCK.findall(document.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True) if TOOL.search(line) else []
                for index, word in enumerate(words):
                    if tool := TOOL.fullmatch(word):
                        name = str(document.relative_to(ROOT))
                        found.append(Command(name, tool[1], words[index + 1 :]))
    return found


class ParsedError(Exception):
    """The tool's parser has accepted the command line."""


def stop_when_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """End a tool as soon as its parser is done."""
    for name in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, name)

        def parse_and_stop(*arguments: Any, parse: Callable[..., Any] = parse) -> NoReturn:
            raise ParsedError(parse(*arguments))

        monkeypatch.setattr(argparse.ArgumentParser, name, parse_and_stop)


@pytest.fixture(scope="module")
def users_own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    for document in DOCUMENTS:
        for name, block in re.findall(
            r"^```yaml\n# (\w+\.yaml)\n(.*?)^```",
            document.read_text(encoding="utf-8"),
            re.MULTILINE | re.DOTALL,
        ):
            assert not (folder / name).exists(), f"{name} is written out twice"
            (folder / name).write_text(block, encoding="utf-8")
    return folder


def test_the_documents_show_commands() -> None:
    training = [command.document for command in commands() if command.tool == "train_zppo"]
    assert training.count("README.md") >= 4
    others = {"docs/tutorial.md", "examples/digits_video/README.md", "examples/easy_vqa/README.md"}
    assert others <= set(training)
    tools = {"audit", "compare", "convert_checkpoint", "evaluate", "make_shards", "plan_run"}
    assert tools <= {command.tool for command in commands()}
    conversions = {each.arguments[0] for each in commands() if each.tool == "convert_checkpoint"}
    assert conversions == set(load_tool("convert_checkpoint").COMMANDS)


@pytest.mark.parametrize(
    "command", commands(), ids=lambda command: " ".join((command.tool, *command.arguments))
)
def test_every_command_line_is_accepted(
    command: Command, users_own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = [str(users_own / word) if word in USERS_OWN else word for word in command.arguments]
    tool = load_tool(command.tool)
    if hasattr(tool, "parse"):
        tool.parse(words)
        return
    monkeypatch.setattr(sys, "argv", [command.tool, *words])
    stop_when_parsed(monkeypatch)
    with pytest.raises(ParsedError):
        runpy.run_path(str(tool.__file__), run_name="__main__")


def test_the_first_commands_of_the_readme_need_nothing_of_the_users() -> None:
    first = [command.arguments for command in commands() if command.document == "README.md"][:2]
    files = [
        arguments[arguments.index("--config") + 1] for arguments in first if "--config" in arguments
    ]
    assert files
    assert [file for file in files if not (ROOT / file).is_file()] == []
