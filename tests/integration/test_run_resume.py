"""A run that is killed and started again goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.support.running import RUN_TIMEOUT_SECONDS, buffer, lines, run, start, transcript

STEPS = 5
# On the same layout; sums of a restarted process may be taken in another order.
LOSS_TOLERANCE = 1e-4


def kill_when(path: Path, process: object, pid: int) -> None:
    """Kill the whole process group of `pid` as soon as `path` is there."""
    deadline = time.monotonic() + RUN_TIMEOUT_SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("killed_at", "modality", "dtype"), [(3, "video", "float32"), (3, "text", "bfloat16")]
)
def test_kill_and_resume(tmp_path: Path, killed_at: int, modality: str, dtype: str) -> None:
    options = (
        f"modality={modality}",
        f"model.params_dtype={dtype}",
        f"train.train_iters={STEPS}",
        "checkpoint.interval=2",
    )
    # Where files go on their way changes nothing, and nothing stays there.
    staging = tmp_path / "staging"
    staged = (f"checkpoint.staging_dir={staging}",) if modality == "text" else ()
    # Neither shared nor prefetched media nor kept frames change what a run computes.
    whole = run(tmp_path, "whole", "data.media_cache_bytes=0", *options)
    options = (*options, f"data.video_cache_dir={tmp_path / 'frames'}", *staged)
    process = start(tmp_path, "killed", *options)
    kill_when(
        tmp_path / "killed" / "transcripts" / f"step_{killed_at:06d}.jsonl", process, process.pid
    )
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    resumed = run(tmp_path, "killed", *options)
    assert not staged or list(staging.iterdir()) == []
    for step in range(1, STEPS + 1):
        left, right = transcript(whole, step), transcript(resumed, step)
        assert [group["uid"] for group in left] == [group["uid"] for group in right]
        assert [[r["text"] for r in group["rollouts"]] for group in left] == [
            [r["text"] for r in group["rollouts"]] for group in right
        ]
        assert buffer(whole, step) == buffer(resumed, step)
    left_metrics, right_metrics = lines(whole / "metrics.jsonl"), lines(resumed / "metrics.jsonl")
    assert [line["step"] for line in right_metrics] == list(range(1, STEPS + 1))
    for name in ("policy/loss", "policy/grad_norm", "accuracy/plain"):
        assert [line[name] for line in left_metrics] == pytest.approx(
            [line[name] for line in right_metrics], abs=LOSS_TOLERANCE
        )
    assert [line["step"] for line in lines(resumed / "evaluation.jsonl")] == [0, STEPS]
    kept = Counter[str]()
    for line in right_metrics:
        kept.update({name: line.get(f"video_cache/{name}", 0) for name in ("hits", "misses")})
    # The step that was killed had decoded its clips.
    assert (kept["hits"] > 0) == (kept["misses"] > 0) == (modality == "video")
    # A save counts in the step after it.
    waited = [line["seconds/checkpoint"] > 0 for line in left_metrics]
    assert waited == [False, False, True, False, True]
    assert {line["checkpoint/broken"] for line in right_metrics} == {0}
