"""What the documents name is there: linked files, tools, make targets, configuration keys."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from zppo_mm.config.help import describe_options

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
GROUPS = (
    "data",
    "model",
    "parallel",
    "rollout",
    "teacher",
    "zone",
    "reward",
    "algorithm",
    "train",
    "lora",
    "checkpoint",
    "evaluation",
    "parity",
    "observability",
)


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
    keys = set(re.findall(r"^  (\S+)  ", describe_options(), re.MULTILINE))
    # `data.shards` and the like are modules; a key is followed by a value, or names a field of its
    # group.
    named = re.findall(rf"[`\s']((?:{'|'.join(GROUPS)})\.\w+)=", path.read_text(encoding="utf-8"))
    assert [key for key in named if key not in keys] == []
