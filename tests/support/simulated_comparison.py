"""Folders of a comparison's runs, written by the real writers with numbers that a test chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from data.question import MediaRef, Question
from tests.support.simulated_run import make_group, make_rollout
from zppo_mm.comparison.plan import Plan, PlannedRun, load_plan
from zppo_mm.config.load import save_config
from zppo_mm.experience import Group
from zppo_mm.observability.sinks import append_evaluation, append_line
from zppo_mm.observability.transcripts import write_held_out_answers
from zppo_mm.rollout.held_out import HeldOut, summarise
from zppo_mm.run_folder import RunFolder

STEPS = 2
MEDIA = {"clips": (MediaRef("video", "held_out/000.tar", "k", "mp4"),)}
"""Media by source; others have none."""

Rewards = Mapping[str, Sequence[float]]
"""Rewards of a held-out question's responses, by its id `<source>/<number>`."""


def make_plan(folder: Path, **changes: object) -> Plan:
    """Write and load a small comparison; `changes` replace keys of its file."""
    content = {
        "options": {"modality": "text", "train.train_iters": STEPS},
        "methods": ["grpo_replay", "zppo"],
        "seeds": [0, 1],
        "output_dir": str(folder / "out"),
        **changes,
    }
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return load_plan(path)


def held_out_groups(rewards: Rewards) -> list[Group]:
    groups = []
    for name, values in rewards.items():
        source = name.partition("/")[0]
        question = Question(name, "How many?", MEDIA.get(source, ()), "7", "math", source=source)
        groups.append(
            make_group(
                question, "new", [make_rollout("7" if value else "8", value) for value in values]
            )
        )
    return groups


def write_evaluation(folder: Path, step: int, rewards: Rewards) -> None:
    groups = held_out_groups(rewards)
    held_out = HeldOut(tuple(group.question for group in groups))
    write_held_out_answers(RunFolder(folder), step, groups)
    append_evaluation(RunFolder(folder), summarise(groups, held_out, step, 4096))


def write_run(
    run: PlannedRun,
    evaluations: Mapping[int, Rewards],
    metrics: Sequence[Mapping[str, float]],
    exported: bool = True,
) -> None:
    """Write a run's folder: evaluations by step, metrics of the steps from 1 on, and what a
    finished run has besides.
    """
    run.folder.mkdir(parents=True)
    save_config(run.config, run.folder / "config.yaml")
    for step, rewards in evaluations.items():
        write_evaluation(run.folder, step, rewards)
    for step, values in enumerate(metrics, start=1):
        append_line(run.folder / "metrics.jsonl", {"step": step, "seconds/step": 1.0, **values})
    if exported:
        (run.folder / "hf").mkdir()
