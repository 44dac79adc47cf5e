"""What a corpus is drawn from, and by which rules: a YAML file as a dataclass, checked."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path

from zppo_mm.config.load import load_settings
from zppo_mm.errors import ConfigError

FROM_FOLDER = "<folder>"
"""In place of the column of the subset: the name of the folder that a file lies in."""
ANSWER_KINDS = ("rules", "choice", "judge")
"""How an answer is graded: by the grader's rules, as one of the options in the question, or by a
judge.
"""


@dataclass(kw_only=True)
class Columns:
    """Columns of a set by what they hold; a dot leads into an object, empty is none."""

    id: str = ""
    subset: str = ""
    question: str = ""
    answer: str = ""
    reasoned_answer: str = ""
    """Read where `answer` is empty: only what stands in `<answer>` or is boxed last."""
    answer_kind: str = ""
    pass_rate: str = ""
    image: str = ""

    def used(self) -> dict[str, str]:
        """Return the columns that are read, by what they hold."""
        named = {each.name: getattr(self, each.name) for each in fields(self)}
        return {part: column for part, column in named.items() if column not in ("", FROM_FOLDER)}


@dataclass(kw_only=True)
class SourceSet:
    """One public set."""

    name: str = ""
    files: str = ""
    """Its Parquet files: a pattern relative to its folder."""
    columns: Columns = field(default_factory=Columns)
    answer_kinds: dict[str, str] = field(default_factory=dict)
    """How answers are graded, by what the column `answer_kind` says; rows of other kinds are
    dropped.
    """
    max_pass_rate: float = 1.0
    subsets: dict[str, str] = field(default_factory=dict)
    """Canonical names of its subsets; rows of others are dropped."""


@dataclass(kw_only=True)
class Tier:
    """Subsets of equal importance."""

    cap: int = 0
    """Most samples of each subset."""
    subsets: list[str] = field(default_factory=list)
    """Canonical names."""


@dataclass(kw_only=True)
class CorpusRecipe:
    """A corpus as its YAML file says it."""

    seed: int = 0
    """Decides which samples a cap leaves."""
    max_answer_chars: int = 512
    min_image_side: int = 100
    """Pixels."""
    tiers: list[Tier] = field(default_factory=list)
    sets: list[SourceSet] = field(default_factory=list)
    """A subset that several have is taken from the first of them alone."""

    def cap_of(self, subset: str) -> int:
        """Return the most samples of a canonical subset."""
        return next(tier.cap for tier in self.tiers if subset in tier.subsets)

    def set_of(self, subset: str) -> str:
        """Return the name of the set that a canonical subset is taken from."""
        return next(each.name for each in self.sets if subset in each.subsets.values())


def load_recipe(path: Path) -> CorpusRecipe:
    """Return the rules of a corpus.

    Raises:
        ConfigError: The file cannot be read, or anything in it is wrong.
    """
    recipe = load_settings(CorpusRecipe, path)
    for problem in _problems(recipe):
        raise ConfigError(f"{path}: {problem}")
    return recipe


def _problems(recipe: CorpusRecipe) -> list[str]:
    """Return what types alone do not show to be wrong."""
    in_tiers = Counter(name for tier in recipe.tiers for name in tier.subsets)
    in_sets = {name for each in recipe.sets for name in each.subsets.values()}
    names = Counter(each.name for each in recipe.sets)
    problems = [
        f"a subset is in two tiers, got {name!r} twice, expected it once; remove one"
        for name, count in in_tiers.items()
        if count > 1
    ]
    problems += [
        f"a set has a subset without a tier, got {name!r}, expected a name of tiers.subsets; add "
        "it there or remove it"
        for name in sorted(in_sets - in_tiers.keys())
    ]
    problems += [
        f"no set has a subset of a tier, got {name!r}, expected it among sets.subsets; correct it "
        "or remove it"
        for name in sorted(in_tiers.keys() - in_sets)
    ]
    problems += [
        f"tiers: a cap is wrong, got {tier.cap}, expected at least 1; correct it"
        for tier in recipe.tiers
        if tier.cap < 1
    ]
    if not recipe.sets or not all(names) or max(names.values()) > 1:
        problems.append(
            f"sets have no names of their own, got {list(names.elements())}, expected at least one "
            "set and every name once; name them"
        )
    return problems + [problem for each in recipe.sets for problem in _set_problems(each)]


def _set_problems(source: SourceSet) -> list[str]:
    columns = source.columns
    required = ("subset", "question", "answer", "image")
    problems = [
        f"sets: {source.name} has no column for {part}, got none, expected its name; add "
        f"columns.{part}"
        for part in required
        if not getattr(columns, part)
    ]
    if not source.files:
        problems.append(
            f"sets: {source.name} has no files, got none, expected a pattern such as "
            "data/*.parquet; add it"
        )
    wrong = sorted({*source.answer_kinds.values()} - {*ANSWER_KINDS})
    if wrong:
        problems.append(
            f"sets: {source.name} has an unknown kind of grading, got {wrong[0]!r}, expected one "
            f"of {', '.join(ANSWER_KINDS)}; correct answer_kinds"
        )
    if bool(columns.answer_kind) != bool(source.answer_kinds):
        problems.append(
            f"sets: {source.name} has one of columns.answer_kind and answer_kinds, expected both "
            "or neither; add the other"
        )
    if source.max_pass_rate < 1 and not columns.pass_rate:
        problems.append(
            f"sets: {source.name} has max_pass_rate, got no column to hold it against, expected "
            "columns.pass_rate; add it"
        )
    return problems
