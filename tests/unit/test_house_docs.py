"""What the documents name is there: linked files, tools, make targets, configuration keys."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from zppo_mm.config.keys import walk
from zppo_mm.config.schema import RunConfig

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DOCUMENTS, ids=names)
def test_links_and_tools_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = [target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target]
    missing = [target for target in links if not (path.parent / target).exists()]
    missing += [
        tool
        for tool in re.findall(r"\b(?:tools|benchmarks)/\w+\.py\b", text)
        if not (ROOT / tool).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=names)
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:^|`)make ([a-z][\w-]*)", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(named) <= targets


@pytest.mark.parametrize("path", DOCUMENTS, ids=names)
def test_configuration_keys_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    keys = {key for key, _, _ in walk(RunConfig())}
    sections = {key.split(".")[0] for key in keys if "." in key}
    # `data.shards` and the like are modules; a key is followed by a value.
    named = re.findall(rf"[`\s']((?:{'|'.join(sections)})\.\w+)=", text)
    # A quoted error message may show a misspelt key.
    misspelt = set(re.findall(r"unknown key, got ([\w.]+)", text))
    assert set(named) - keys - misspelt == set()
