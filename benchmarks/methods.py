"""ZPPO beside GRPO with replay: held-out accuracy and graduations at equal steps, over seeds.

    python benchmarks/methods.py [--methods zppo grpo_replay] [--seeds 0 1 2] [--modality video] [key.sub=value …]

Every run uses two processes, the embedded models and the embedded preset. A run that is there already is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

CLONE = Path(__file__).resolve().parents[1]
PROCESSES = 2


def train(output_dir: Path, method: str, modality: str, seed: int, options: list[str]) -> Path:
    """Run one method with one seed and return its folder."""
    name = f"{method}-{modality}-seed{seed}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    command = [*launcher, str(CLONE / "tools" / "train_zppo.py"), f"method={method}", f"modality={modality}", f"seed={seed}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CLONE)}
    subprocess.run([*command, f"name={name}", f"output_dir={output_dir}", *options], check=True, env=environment, stderr=subprocess.DEVNULL)
    return output_dir / name


def read(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def fates(last: dict[str, Any], what: str) -> dict[str, float]:
    """Return the counts of one fate by accuracy at admission."""
    return {name.rpartition("/")[2]: value for name, value in last.items() if name.startswith(f"buffer/{what}/")}


def row(folder: Path) -> dict[str, float]:
    """Return what one run is judged by."""
    evaluations, metrics = read(folder / "evaluation.jsonl"), read(folder / "metrics.jsonl")
    admitted, graduated = fates(metrics[-1], "admitted"), fates(metrics[-1], "graduated")
    return {
        "before": evaluations[0]["accuracy"],
        "after": evaluations[-1]["accuracy"],
        "mean of curve": statistics.mean(evaluation["accuracy"] for evaluation in evaluations[1:]),
        "graduated of all": sum(graduated.values()) / max(sum(admitted.values()), 1),
        "graduated of 0 %": graduated.get("0", 0.0) / max(admitted.get("0", 0.0), 1),
        "seconds a step": statistics.median(line["seconds/step"] - line.get("seconds/evaluation", 0.0) for line in metrics),
    }


def main() -> None:
    """Run what is missing and print one line per run, then the means and ranges over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["zppo", "grpo_replay"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--modality", default="video")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/methods"))
    parser.add_argument("options", nargs="*", metavar="key=value")
    known = parser.parse_intermixed_args()
    rows: dict[str, list[dict[str, float]]] = {method: [] for method in known.methods}
    for seed in known.seeds:
        for method in known.methods:
            rows[method].append(row(train(known.output_dir, method, known.modality, seed, known.options)))
    names = list(rows[known.methods[0]][0])
    print(f"| method | seed | {' | '.join(names)} |")
    print("|---" * (len(names) + 2) + "|")
    for method, runs in rows.items():
        for seed, values in zip(known.seeds, runs, strict=True):
            print(f"| {method} | {seed} | {' | '.join(f'{values[name]:.3f}' for name in names)} |")
        means = (statistics.mean(values[name] for values in runs) for name in names)
        print(f"| {method} | mean | {' | '.join(f'{mean:.3f}' for mean in means)} |")


if __name__ == "__main__":
    main()
