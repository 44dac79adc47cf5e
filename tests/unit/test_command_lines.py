"""Every training command that the documents show is read as the tool would read it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.tools import load_tool

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("README.md")),
]
TOOL = "tools/train_zppo.py"
USERS_OWN = ("run.yaml", "mine.yaml")
"""Files that the documents write out, each in a block that begins with its name."""


def commands() -> list[tuple[str, list[str]]]:
    """Return document and arguments of every command line that starts the tool, launcher and
    comment off.
    """
    found = []
    for document in DOCUMENTS:
        for block in re.findall(
            r"^```\w*\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        ):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True) if TOOL in line else []
                if TOOL in words:
                    found.append((str(document.relative_to(ROOT)), words[words.index(TOOL) + 1 :]))
    return found


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("train_zppo")


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
    named = [document for document, _ in commands()]
    assert named.count("README.md") >= 4
    others = {"docs/tutorial.md", "examples/digits_video/README.md", "examples/easy_vqa/README.md"}
    assert others <= set(named)


@pytest.mark.parametrize(
    ("document", "arguments"),
    commands(),
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_every_command_line_is_accepted(
    document: str,
    arguments: list[str],
    tool: ModuleType,
    users_own: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    tool.parse([str(users_own / word) if word in USERS_OWN else word for word in arguments])


def test_the_first_commands_of_the_readme_need_nothing_of_the_users() -> None:
    first = [arguments for document, arguments in commands() if document == "README.md"][:2]
    files = [
        arguments[arguments.index("--config") + 1] for arguments in first if "--config" in arguments
    ]
    assert files
    assert [file for file in files if not (ROOT / file).is_file()] == []
