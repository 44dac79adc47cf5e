"""What became of every row that a corpus was drawn from, as a table and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from data.atomic_files import write_atomically
from data.errors import shown
from zppo_mm.corpus.drawing import KEPT, Counts
from zppo_mm.corpus.recipe import CorpusRecipe
from zppo_mm.text_table import text_table

REPORT_TEXT, REPORT_JSON = "corpus.txt", "corpus.json"


@dataclass(frozen=True, slots=True)
class SubsetReport:
    """One subset of one set.

    Attributes:
        source: The set.
        subset: The set's own name.
        canonical: Its name in the corpus; empty if it is not taken.
        rows: Rows that it has.
        kept: Samples in the corpus.
        dropped: The others, by reason.
    """

    source: str
    subset: str
    canonical: str
    rows: int
    kept: int
    dropped: dict[str, int]


@dataclass(frozen=True, slots=True)
class CorpusReport:
    """A corpus.

    Attributes:
        recipe: Its rules.
        subsets: What became of every row, by set and subset.
        answer_types: Kept samples by set and answer type.
    """

    recipe: CorpusRecipe
    subsets: tuple[SubsetReport, ...]
    answer_types: dict[str, dict[str, int]]

    @classmethod
    def of(cls, recipe: CorpusRecipe, counts: Counts) -> CorpusReport:
        """Return the report of finished counts, every row of which has one fate."""
        canonical = {
            (source.name, subset): name
            for source in recipe.sets
            for subset, name in source.subsets.items()
        }
        order = [source.name for source in recipe.sets]
        subsets = []
        for source, subset in sorted(
            counts.rows, key=lambda key: (order.index(key[0]), canonical.get(key, "~"), key[1])
        ):
            fates = {
                reason: count
                for (name, own, reason), count in sorted(counts.fates.items())
                if (name, own) == (source, subset)
            }
            rows = counts.rows[source, subset]
            assert sum(fates.values()) == rows, f"{source}/{subset}: a row was lost uncounted"
            kept = fates.pop(KEPT, 0)
            subsets.append(
                SubsetReport(source, subset, canonical.get((source, subset), ""), rows, kept, fates)
            )
        types: dict[str, dict[str, int]] = {name: {} for name in order}
        for (name, answer_type), count in sorted(counts.answer_types.items()):
            types[name][answer_type] = count
        return cls(recipe, tuple(subsets), types)

    @property
    def num_samples(self) -> int:
        """Samples of the corpus."""
        return sum(each.kept for each in self.subsets)

    @property
    def empty_subsets(self) -> list[str]:
        """Canonical names of which no sample was kept."""
        kept = Counter[str]()
        for each in self.subsets:
            kept[each.canonical] += each.kept
        return [name for tier in self.recipe.tiers for name in tier.subsets if not kept[name]]

    def text(self) -> str:
        """Return the tables: rows by subset and reason, and the samples by answer type."""
        reasons = sorted({reason for each in self.subsets for reason in each.dropped})
        total = Counter[str]()
        rows = []
        for each in self.subsets:
            numbers = {"rows": each.rows, **each.dropped, KEPT: each.kept}
            total.update(numbers)
            names = (each.source, shown(each.subset), each.canonical or "-")
            rows.append([*names, *_cells(numbers, reasons)])
        rows.append(["all", "", "", *_cells(total, reasons)])
        table = text_table(["set", "subset", "name", "rows", *reasons, KEPT], rows, num_left=3)
        types = "\n".join(
            f"{name}: " + ", ".join(f"{kind} {count}" for kind, count in counts.items())
            for name, counts in self.answer_types.items()
        )
        empty = ", ".join(self.empty_subsets) or "none"
        return (
            f"{table}\n\nkept samples by answer type\n{types}\n\n"
            f"subsets without a sample: {empty}\n"
        )


def write_report(folder: Path, report: CorpusReport) -> None:
    """Write `corpus.txt` and `corpus.json`."""
    write_atomically(folder / REPORT_TEXT, report.text())
    content = json.dumps(asdict(report), ensure_ascii=False, indent=1)
    write_atomically(folder / REPORT_JSON, content)


def remove_report(folder: Path) -> None:
    """Remove the report of shards that are about to be replaced."""
    for name in (REPORT_TEXT, REPORT_JSON):
        (folder / name).unlink(missing_ok=True)


def _cells(numbers: dict[str, int] | Counter[str], reasons: list[str]) -> list[str]:
    return [str(numbers.get(name) or "") for name in ("rows", *reasons, KEPT)]
