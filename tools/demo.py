"""The demo: a ZPPO run on video questions with two processes, then where everything lies. Started again, it continues."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

RUN = Path("runs/demo")
PROCESSES = 2


def main(options: list[str]) -> int:
    """Train, then print the accuracy before and after and the paths."""
    tool = str(Path(__file__).with_name("train_zppo.py"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    trained = subprocess.run(
        [*launcher, tool, "--modality", "video", "--name", RUN.name, f"output_dir={RUN.parent}", *options], check=False
    )
    if trained.returncode:
        print("demo: the run stopped; start it again to continue from its last checkpoint", file=sys.stderr)
        return trained.returncode
    evaluations = [json.loads(line) for line in (RUN / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()]
    first, last = evaluations[0], evaluations[-1]
    print(f"\nheld-out accuracy: {first['accuracy']:.3f} before, {last['accuracy']:.3f} after {last['step']} steps")
    print(f"  ({last['num_questions']} questions that were never trained on)")
    for what, path in (("report", "report.html"), ("trained student", "hf"), ("transcripts", "transcripts"), ("metrics", "metrics.jsonl")):
        print(f"{what}: {RUN / path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
