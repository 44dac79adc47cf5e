"""Small sets with the columns of Vero-600k and of MMFineReason, and corpora drawn from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.question import Question
from data.shards import ShardFolder
from tests.support.benchmark_tables import write_table
from tests.support.shard_samples import png
from tests.support.tiny_folder import build_folder
from zppo_mm.config.load import load_config
from zppo_mm.config.schema import RunConfig
from zppo_mm.corpus.build import build_corpus
from zppo_mm.corpus.recipe import CorpusRecipe, Tier, load_recipe
from zppo_mm.corpus.report import CorpusReport

RECIPE = Path(__file__).parents[2] / "examples" / "paper" / "zppo_77k.yaml"
AI2D, TALLYQA = "stem-ai2d_merged", "counting_grounding_search-tallyqa"
AI2D_FILE = f"{AI2D}/train-0.parquet"
SUBSETS = {"ai2d": 1, "bmmr": 1, "tallyqa": 2}
"""Tier by canonical name; ai2d is in both sets."""

Rows = Sequence[dict[str, Any]]


def vero_row(number: int, **changes: Any) -> dict[str, Any]:
    """Return a row with the columns that Vero's own script reads."""
    question = f"<image>\nHow many dots has picture {number}?"
    row = {
        "id": f"v{number}",
        "data_source": "made-up",
        "image": {"bytes": png(112, 104, number % 250), "path": f"{number}.png"},
        "prompt": {"role": ["user"], "content": [question]},
        "ability": "vision",
        "question": question,
        "answer": str(number),
        "kind": "numeric",
        **changes,
    }
    question, answer, kind = (row.pop(name) for name in ("question", "answer", "kind"))
    return {
        **row,
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {
            "index": number,
            "question": question,
            "answer": answer,
            "reward_type": kind,
            "tolerance": None,
        },
    }


def mmfinereason_row(number: int, **changes: Any) -> dict[str, Any]:
    """Return a row with the columns of MMFineReason as published."""
    return {
        "source": "BMMR",
        "id": number,
        "question": f"<image>What is the area of figure {number}?",
        "answer": str(number),
        "ori_question": "",
        "original_answer": f"<think>long</think><answer>{number}</answer>",
        "image": {"bytes": png(120, 110, number % 250), "path": None},
        "caption": "a figure",
        "qwen3vl_235b_thinking_response": "<think>very long</think>",
        "pass_rate": 0.25,
        "is_consistent": True,
        "consistency_analysis": "",
        **changes,
    }


def small_recipe(caps: tuple[int, int] = (100, 100), **changes: Any) -> CorpusRecipe:
    """Return the shipped recipe with three of its subsets."""
    shipped = load_recipe(RECIPE)
    tiers = [
        Tier(cap=cap, subsets=[name for name, tier in SUBSETS.items() if tier == number])
        for number, cap in enumerate(caps, start=1)
    ]
    sets = [
        replace(
            source,
            subsets={own: name for own, name in source.subsets.items() if name in SUBSETS},
        )
        for source in shipped.sets
    ]
    return replace(shipped, tiers=tiers, sets=sets, **changes)


def write_sets(
    folder: Path, vero: Mapping[str, Rows], mmfinereason: Mapping[str, Rows]
) -> dict[str, Path]:
    """Write the files of both sets: rows by path below the set's folder; subsets of the small
    recipe that have none get one row each.
    """
    roots = {"vero": folder / "vero", "mmfinereason": folder / "mmfinereason"}
    given = {f"{name.partition('/')[0]}" for name in vero}
    vero = {
        **vero,
        **{f"{own}/train-0.parquet": [vero_row(1)] for own in (AI2D, TALLYQA) if own not in given},
    }
    sources = {row["source"] for rows in mmfinereason.values() for row in rows}
    fill = [
        mmfinereason_row(1, source=own)
        for own in ("BMMR", "FineVision-ai2d_merged")
        if own not in sources
    ]
    if fill:
        mmfinereason = {**mmfinereason, "data/train-fill.parquet": fill}
    for name, files in (("vero", vero), ("mmfinereason", mmfinereason)):
        for path, rows in files.items():
            (roots[name] / path).parent.mkdir(parents=True, exist_ok=True)
            write_table(roots[name] / path, rows)
    return roots


def student_config(folder: Path, max_prompt_tokens: int = 1000) -> RunConfig:
    """Return a run of a student that has no weights, only what prompts need."""
    student = folder / "student"
    if not student.exists():
        build_folder(student)
    return load_config(
        None, [f"model.student={student}", f"data.max_prompt_tokens={max_prompt_tokens}"]
    )


def draw(
    folder: Path,
    vero: Mapping[str, Rows] | None = None,
    mmfinereason: Mapping[str, Rows] | None = None,
    recipe: CorpusRecipe | None = None,
    out: str = "out",
    max_prompt_tokens: int = 1000,
) -> tuple[CorpusReport, list[Question]]:
    """Write both sets, draw a corpus, and return its report and its questions."""
    roots = write_sets(folder / f"{out}.sets", vero or {}, mmfinereason or {})
    config = student_config(folder, max_prompt_tokens)
    report = build_corpus(recipe or small_recipe(), roots, folder / out, config)
    shards = ShardFolder(folder / out)
    return report, [shards.question(shard, key) for shard, key in list(shards.keys())]


def fates(report: CorpusReport, subset: str) -> dict[str, int]:
    """Return what became of the rows of a subset, by the set's own name."""
    (found,) = (each for each in report.subsets if each.subset == subset)
    return {**found.dropped, "kept": found.kept}
