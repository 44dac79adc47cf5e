"""The documents name what exists and are printed from what they repeat; they keep the house's
widths and, like the code, its words.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.result_figure import SHOWN, Accuracy, read_table
from tests.support.floors_table import floors_table
from tools.make_metrics_page import metrics_page
from zppo_mm.config.keys import walk
from zppo_mm.config.schema import RunConfig
from zppo_mm.methods import METHODS
from zppo_mm.observability.metrics import METRICS

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
# Names of the past.
PAST = ROOT / "CHANGELOG.md"
CURRENT = [path for path in DOCUMENTS if path != PAST]
# One line each for what a help text says.
PRINTED = {ROOT / "docs" / "configuration.md", ROOT / "docs" / "metrics.md"}
KEYS = {key for key, _, _ in walk(RunConfig())}
SECTIONS = sorted({key.partition(".")[0] for key in KEYS if "." in key})
PACKAGES = tuple(
    path.stem
    for folder in (ROOT, ROOT / "zppo_mm")
    for path in sorted(folder.iterdir())
    if path.suffix == ".py" or (path / "__init__.py").is_file()
)
MAX_WIDTH = 100
MAX_README_LINES = 120
# Words that this project once used for what the field has a word for.
PRIVATE_WORDS = (
    "heed",
    "befall",
    "mend",
    "to and fro",
    "could not be had",
    "written aside",
    "stands still",
    "stood still",
    "signs? of life",
    "greet(?:s|ed|ing)?",
    "last words?",
    "beginner",
    "lessons?",
    "lump(?:s|ed|ing)?",
    "stretched",
    "key heads",
    "inert",
    "neutralised?",
    "guided",
    "broods?",
    "once more",
    "is descended",
    "embedded (?:models?|preset)",
    "swap tokens",
    "passed once",
    "besides win",
    "worlds?",
    "What a run leaves",
    "What awaits a GPU",
    "Model folders in and out",
    "When it fails",
)
# The field's own uses of such words; DeltaNet layers have key heads of their own.
FIELD_TERMS = ("world size", "linear_num_key_heads")
CODE = [
    path
    for folder in ("data", "encoders", "zppo_mm", "tools", "benchmarks", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != Path(__file__)
]
# Beside the words above, in identifiers too, whose underscores count as spaces.
PRIVATE_WORDS_OF_CODE = (
    *PRIVATE_WORDS,
    "hear(?:s|d|ing)?",
    "told",
    "tells",
    "anew",
    "(?:could|can|cannot) be had",
)
# The last one names a random stream, on which the bundled models depend.
FIELD_TERMS_OF_CODE = ("world size", r"group\.WORLD", "linear key heads", '"lesson"')
# Index or position, fraction or shard, style or check.
PRIVATE_NAMES = {"place", "places", "share", "shares", "look", "looks", "tell"}


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Return number and text of the lines outside code blocks."""
    in_code = False
    for number, line in enumerate(text_of(path).splitlines(), 1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code:
            yield number, line


def private_words(text: str, words: tuple[str, ...]) -> list[str]:
    return re.findall(rf"\b(?:{'|'.join(words)})\b", text, re.IGNORECASE)


def given_names(path: Path) -> Iterator[str]:
    """Yield the names that a module gives: of functions, classes, arguments and variables."""
    for node in ast.walk(ast.parse(text_of(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def headings(path: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    titles = [line.lstrip("# ") for _, line in prose(path) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def defined_names(module: Path) -> set[str]:
    """Return what a module defines or imports, and the members of its classes."""
    found = set()
    for node in ast.parse(text_of(module)).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
            for inner in getattr(node, "body", []):
                if isinstance(inner, ast.FunctionDef):
                    found.add(f"{node.name}.{inner.name}")
                elif isinstance(inner, ast.AnnAssign):
                    found.add(f"{node.name}.{ast.unparse(inner.target)}")
        elif isinstance(node, ast.AnnAssign):
            found.add(ast.unparse(node.target))
        elif isinstance(node, ast.Assign):
            found |= {ast.unparse(target) for target in node.targets}
    return found


def resolves(dotted: str) -> bool:
    """Return whether a dotted name is a module, something in one, or a configuration key."""
    parts = dotted.split(".")
    for root in (ROOT, ROOT / "zppo_mm"):
        for split in range(len(parts), 0, -1):
            module = root.joinpath(*parts[:split])
            rest = ".".join(parts[split:])
            if module.is_dir() and not rest:
                return True
            file = module.with_suffix(".py")
            if file.is_file() and (not rest or rest in defined_names(file)):
                return True
    return dotted in KEYS or dotted in SECTIONS


@pytest.mark.parametrize("path", DOCUMENTS, ids=names)
def test_links_and_tools_exist(path: Path) -> None:
    text = text_of(path)
    links = [target for target in re.findall(r"\]\(([^)]+)", text) if "://" not in target]
    missing = []
    for target in links:
        file, _, anchor = target.partition("#")
        page = path.parent / file if file else path
        if not page.exists() or (anchor and anchor not in headings(page)):
            missing.append(target)
    missing += [
        tool
        for tool in re.findall(r"\b(?:tools|benchmarks)/\w+\.py\b", text)
        if not (ROOT / tool).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("path", CURRENT, ids=names)
def test_names_and_paths_exist(path: Path) -> None:
    spans = re.findall(r"`([^`\n]+)`", "\n".join(line for _, line in prose(path)))
    dotted = [
        re.sub(r"\(.*\)$", "", span)
        for span in spans
        if re.fullmatch(r"[a-z]\w*(\.\w+)+(\(.*\))?", span)
        and span.partition(".")[0] in (*PACKAGES, *SECTIONS)
        and not re.search(r"\.(py|md|txt|json|jsonl|yaml|html|log|csv|safetensors)$", span)
    ]
    assert [name for name in dotted if not resolves(name)] == []
    folders = "zppo_mm|data|encoders|tests|benchmarks|examples|docs|constraints"
    files = [span for span in spans if re.fullmatch(rf"(?:{folders})/[\w./-]+", span)]
    files += [span for span in spans if re.fullmatch(r"\w+/\w+\.py", span)]
    if path.name == "extending.md":
        files = []  # those that a reader writes
    files = [file for file in files if file not in METRICS]
    missing = [
        file
        for file in files
        if not any((root / file).exists() for root in (ROOT, ROOT / "zppo_mm"))
    ]
    assert missing == []
    tests = {file.stem for file in (ROOT / "tests").rglob("test_*.py")}
    named = [re.sub(r"\.py$", "", span) for span in spans if re.fullmatch(r"test_\w+(\.py)?", span)]
    assert [test for test in named if test not in tests] == []


def test_a_name_that_is_not_there_is_seen() -> None:
    assert resolves("zone.hard.pre_cap")
    assert resolves("zone.tau")
    assert not resolves("zone.hard.no_such_function")
    assert not resolves("zone.no_such_key")


@pytest.mark.parametrize("path", CURRENT, ids=names)
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:^|`)make ([a-z][\w-]*)", text_of(path), re.MULTILINE)
    assert set(named) <= targets


@pytest.mark.parametrize("path", CURRENT, ids=names)
def test_configuration_keys_exist(path: Path) -> None:
    # Messages that are quoted may be about keys that do not exist.
    text = "\n".join(line for line in text_of(path).splitlines() if not line.startswith(">"))
    # `data.shards` and the like are modules; a key is followed by a value.
    named = re.findall(rf"[`\s']((?:{'|'.join(SECTIONS)})\.\w+)=", text)
    assert set(named) - KEYS == set()


def test_every_method_is_in_the_table_of_the_algorithm() -> None:
    page = text_of(ROOT / "docs" / "algorithm.md")
    assert [method for method in METHODS if f"`{method}`" not in page] == []


@pytest.mark.parametrize("path", sorted({*DOCUMENTS} - PRINTED), ids=names)
def test_prose_is_narrow(path: Path) -> None:
    # Tables, quoted messages and lines that are one long link or name cannot be broken.
    wide = [
        (number, line)
        for number, line in prose(path)
        if len(line) > MAX_WIDTH and not line.startswith(("|", ">")) and " " in line.strip()
    ]
    assert wide == []


@pytest.mark.parametrize("path", CURRENT, ids=names)
def test_private_words_are_gone(path: Path) -> None:
    text = text_of(path)
    for term in FIELD_TERMS:
        text = text.replace(term, "")
    assert private_words(text, PRIVATE_WORDS) == []


@pytest.mark.parametrize("path", CODE, ids=names)
def test_private_words_are_gone_from_the_code(path: Path) -> None:
    text = re.sub(r"\w*key_heads\b", "", text_of(path)).replace("_", " ")
    for term in FIELD_TERMS_OF_CODE:
        text = re.sub(term, "", text, flags=re.IGNORECASE)
    assert private_words(text, PRIVATE_WORDS_OF_CODE) == []
    assert {name.strip("_").lower() for name in given_names(path)} & PRIVATE_NAMES == set()


def test_a_private_word_in_code_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("def _look(place: int) -> None:\n    share = other(places=place)\n")
    assert set(given_names(path)) == {"_look", "place", "share"}
    assert private_words("The ranks HEARD the last word.", PRIVATE_WORDS_OF_CODE) == [
        "HEARD",
        "last word",
    ]


def test_the_quoted_messages_are_those_of_the_code() -> None:
    page = text_of(ROOT / "docs" / "troubleshooting.md")
    quoted = [line.lstrip("> ") for line in page.splitlines() if line.startswith(">")]
    # The longest part of each that has no value in it.
    faults = [
        max(
            (
                part
                for part in re.split(r"[;,:]? (?:got|expected) |[;,:] ", line)
                if not re.search(r"[\d'/(]", part)
            ),
            key=len,
        )
        for line in quoted
    ]
    code = "".join(
        re.sub(r'"\s*\n\s*f?"', "", text_of(path))
        for package in ("zppo_mm", "data")
        for path in sorted((ROOT / package).rglob("*.py"))
    )
    assert len(quoted) >= 10
    assert [fault for fault in faults if fault not in code] == []


def test_the_readme_is_short() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) <= MAX_README_LINES


def test_the_page_of_metrics_is_printed_from_their_declaration() -> None:
    assert text_of(ROOT / "docs" / "metrics.md") == metrics_page()


def test_the_table_of_packages_is_printed_from_the_import_test() -> None:
    assert floors_table() in text_of(ROOT / "docs" / "architecture.md")


def test_the_result_figure_has_its_table() -> None:
    results = read_table(text_of(ROOT / "docs" / "experiments.md"))
    assert set(SHOWN) <= set(results)
    assert results["zppo"] == Accuracy(78.2, 74.3, 82.0)
