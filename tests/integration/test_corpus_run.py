"""A run trains on a corpus that was drawn from made-up sets."""

from __future__ import annotations

from pathlib import Path

from tests.support.corpus_sets import AI2D, mmfinereason_row, small_recipe, vero_row, write_sets
from tests.support.running import lines, run
from zppo_mm.config.load import load_config
from zppo_mm.corpus.build import build_corpus
from zppo_mm.run_folder import RunFolder


def test_a_step_on_a_drawn_corpus(tmp_path: Path) -> None:
    vero = {f"{AI2D}/train-0.parquet": [vero_row(number) for number in range(1, 6)]}
    fine = {"data/train-0.parquet": [mmfinereason_row(number) for number in range(1, 5)]}
    roots = write_sets(tmp_path, vero, fine)
    shards = tmp_path / "shards"
    report = build_corpus(small_recipe(), roots, shards, load_config(None))
    assert report.num_samples == 5 + 4 + 1
    folder = run(
        tmp_path,
        "run",
        "method=grpo_replay",
        f"data.train=[{{path: {shards}}}]",
        "train.train_iters=1",
        "rollout.max_response_tokens=16",
    )
    (step,) = lines(RunFolder(folder).metrics)
    assert step["batch/questions"] == 8
    assert step["rollout/tokens"] > 0
    assert not [name for name in step if name.startswith("data/skipped/")]
