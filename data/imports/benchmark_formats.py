"""Known benchmarks, each declared in a YAML file: where its table lies, what its columns mean as a
question, and how answers are scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from data.errors import DataError

DECLARED = Path(__file__).parent / "declared"
PARTS = (
    "id",
    "question",
    "answer",
    "answer_type",
    "choices",
    "source",
    "metadata",
    "image",
    "video",
    "media",
    "unit",
    "decimals",
    "ignore",
)
"""What columns can be given for; `ignore` are those whose pictures and videos are left out on
purpose.
"""
FAMILIES = ("text", "image", "video")
READINGS = ("either", "letter", "text", "index")
SCORINGS = ("rules", "rules_and_judge", "judge", "anls", "relaxed")
ANY_TABLE = "fields"
"""Any table whose columns the user has named; not a benchmark."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkFormat:
    """How the rows of a benchmark are read and its answers scored.

    Attributes:
        title: Its name in tables.
        family: One of `FAMILIES`, over which scores are averaged.
        in_paper: Whether the paper is known to have it in its suite.
        dataset: Where it is published, on the Hugging Face Hub.
        files: Patterns of its table files in its folder; the first that fits anything counts.
        folders: Where its media lie besides, from the same folder.
        columns_from: The public code that reads the same columns; empty if they are not confirmed.
        note: What is scored otherwise than by the benchmark's own script.
        columns: By part of a question, several with commas between them; of `a|b` the first that
            the table has.
        marks: Columns by which a table of this kind is recognised; none if it is only named.
        reading: What an answer to options is: a `letter`, a `text`, `either`, or an `index` from 0.
        options_in: Column whose text has the options, with their letters before them.
        shuffled: Options are put in an order that the question's text decides.
        answers: What answers of the table mean.
        answer_after: What the answer comes after in its column.
        spellings: An answer may spell a list of right ones.
        answer_types: By what the column of the answer type says, of questions without options;
            `math` for all others.
        rounded: Answer type of the column whose answers are rounded to `decimals` places.
        source_pattern: What is the source in an id.
        without_question: Text of a row that has none.
        scoring: One of `SCORINGS`.
        judge: File of the judge's prompt beside the declaration; empty means the run's.
    """

    title: str = ""
    family: str = ""
    in_paper: bool = False
    dataset: str = ""
    files: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    columns_from: str = ""
    note: str = ""
    columns: Mapping[str, str]
    marks: frozenset[str] = frozenset()
    reading: str = "either"
    options_in: str = ""
    shuffled: bool = False
    answers: Mapping[str, str] = field(default_factory=dict)
    answer_after: str = ""
    spellings: bool = False
    answer_types: Mapping[str, str] = field(default_factory=dict)
    rounded: str = ""
    source_pattern: str = ""
    without_question: str = ""
    scoring: str = "rules"
    judge: str = ""


@cache
def known_formats() -> Mapping[str, BenchmarkFormat]:
    """Return the declared benchmarks by name, and `fields` last."""
    any_table = BenchmarkFormat(
        columns={part: part for part in PARTS if part not in ("unit", "decimals")}
    )
    return {**load_formats(DECLARED), ANY_TABLE: any_table}


def load_formats(folder: Path) -> dict[str, BenchmarkFormat]:
    """Read the declarations of a folder, by the names of their files.

    Raises:
        DataError: There is none, or one is not as above.
    """
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise DataError(
            f"{folder}: no benchmarks, got no *.yaml in it, expected one for each; see those in "
            f"{DECLARED}"
        )
    return {file.stem: _load(file) for file in files}


def _load(file: Path) -> BenchmarkFormat:
    try:
        found = yaml.safe_load(file.read_bytes())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{file}: not readable as YAML ({error}); correct it") from error
    keys = {each.name: each.type for each in fields(BenchmarkFormat)}
    _expect(file, "declaration", isinstance(found, dict), found, "keys with values")
    for key, value in found.items():
        _expect(file, "key", key in keys, key, f"one of {', '.join(keys)}")
        _expect(file, key, _fits(value, str(keys[key])), value, str(keys[key]))
    allowed = {"family": FAMILIES, "reading": READINGS, "scoring": SCORINGS}
    for key, values in allowed.items():
        _expect(file, key, found.get(key, values[0]) in values, found.get(key), f"one of {values}")
    columns = found.get("columns", {})
    for part in columns:
        _expect(file, "columns", part in PARTS, part, f"one of {', '.join(PARTS)}")
    for part in ("question", "answer"):
        _expect(file, "columns", part in columns, sorted(columns), f"a column for {part}")
    judge = found.get("judge", "")
    _expect(file, "judge", not judge or (file.parent / judge).is_file(), judge, "a file beside it")
    made = {key: _frozen(value, str(keys[key])) for key, value in found.items()}
    made["columns"] = {"ignore": "", **columns}
    if judge:
        made["judge"] = str(file.parent / judge)
    return BenchmarkFormat(**made)


def _fits(value: Any, kind: str) -> bool:
    """Return whether a value of YAML can be one of a field's type."""
    if kind.startswith("Mapping"):
        return isinstance(value, dict) and all(
            isinstance(each, str) for pair in value.items() for each in pair
        )
    if kind.startswith(("tuple", "frozenset")):
        return isinstance(value, list) and all(isinstance(each, str) for each in value)
    return isinstance(value, bool if kind == "bool" else str)


def _frozen(value: Any, kind: str) -> Any:
    if kind.startswith("frozenset"):
        return frozenset(value)
    return tuple(value) if isinstance(value, list) else value


def _expect(file: Path, key: str, is_right: bool, got: object, expected: str) -> None:
    if not is_right:
        raise DataError(f"{file}: {key}, got {got!r:.200}, expected {expected}; correct it")
