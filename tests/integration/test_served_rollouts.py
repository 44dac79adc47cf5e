"""ZPPO runs whose student samples in servers: they are sent every step's weights, one is killed in
the middle of a step, all of them are lost.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from data.toy.digits_shards import build_digit_shards
from tests.support.drawing_students import TransformersStudent
from tests.support.running import CLONE, RUN_TIMEOUT_SECONDS, lines, run_python, start, transcript
from tests.support.vllm_replies import PASS
from tests.support.vllm_server import FakeVllm, serve_vllm
from zppo_mm.bundled import STUDENT_DIR

pytestmark = [pytest.mark.medium, pytest.mark.timeout(3 * RUN_TIMEOUT_SECONDS)]
# The parity gate and the first evaluation come before the first step.
BEFORE_STEPS = 13


def options(*servers: FakeVllm, **changes: Any) -> list[str]:
    given = {
        "rollout.engine": "vllm",
        "rollout.endpoints": f"[{','.join(server.url for server in servers)}]",
        "rollout.max_response_tokens": 24,
        "train.train_iters": 2,
        "evaluation.num_questions": 4,
        "observability.report": "false",
        **changes,
    }
    return [f"{name}={value}" for name, value in given.items()]


def student() -> TransformersStudent:
    return TransformersStudent(STUDENT_DIR)


def test_a_server_is_killed_in_the_middle_of_a_step(tmp_path: Path) -> None:
    """Two tensor ranks, of which one asks. The other server continues what the killed one had, and
    no rollout is missing.
    """
    killed: list[FakeVllm] = []

    def die(number: int) -> str:
        if number < BEFORE_STEPS // 2 + 2:
            return PASS
        if not killed:
            killed.append(second)
            threading.Thread(target=close, args=(second,), daemon=True).start()
        return "reset"

    with serve_vllm(student()) as first, serve_vllm(student(), die) as second:
        layout = {"parallel.tensor_model_parallel_size": 2, "rollout.max_server_restarts": 1}
        process = start(tmp_path, "run", *options(first, second, **layout), processes=2)
        output, _ = process.communicate(timeout=RUN_TIMEOUT_SECONDS)
        assert process.returncode == 0, output[-6000:]
    folder = tmp_path / "run"
    assert killed, "the second server was asked in the first step"
    rows = lines(folder / "metrics.jsonl")
    faults = [name for row in rows for name, count in row.items()
              if name.startswith("rollout/faults/") and count]  # fmt: skip
    assert set(faults) & {"rollout/faults/connection", "rollout/faults/cut_off"}
    for step, row in enumerate(rows, start=1):
        assert row["rollout/failed_groups"] == row["rollout/stale_groups"] == 0
        assert row["weight_sync/bytes"] > 0
        groups = [each for each in transcript(folder, step) if each["kind"] != "teacher"]
        assert all(len(group["rollouts"]) == 4 for group in groups)
    assert rows[1]["weight_sync/failures"] > 0
    (record,) = lines(folder / "parity.jsonl")
    assert record["findings"] == []
    assert {each["modality"] for each in record["modalities"]} == {"text", "image", "video"}
    # Every step, and the evaluation after the last one, has weights of its own.
    versions = [version.rpartition("/")[2] for _, version, _ in first.delivered]
    assert sorted(set(versions)) == ["1", "2", "3"]
    assert versions == sorted(versions)


def close(server: FakeVllm) -> None:
    server.shutdown()
    server.server_close()


def test_without_servers_the_run_ends_with_a_checkpoint_and_goes_on_with_others(
    tmp_path: Path,
) -> None:
    """In the second step every answer is cut off; the same command with a server that lives ends
    as any run.
    """
    few = {
        "modality": "text",
        "parity.mode": "none",
        "checkpoint.interval": 10,
    }

    def fail(number: int) -> str:
        return "half_body" if server.version.endswith("/2") else PASS

    with serve_vllm(student(), fail) as server:
        # The probe of the weights is such a request, too.
        hasty = few | {"rollout.max_server_restarts": 0}
        process = start(tmp_path, "run", *options(server, **hasty))
        output, _ = process.communicate(timeout=RUN_TIMEOUT_SECONDS)
    assert process.returncode == 1, output[-6000:]
    assert "rollout: no server is left" in output
    assert "Traceback" not in output
    folder = tmp_path / "run"
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step_000001"]
    with serve_vllm(student()) as server:
        process = start(tmp_path, "run", *options(server, **few))
        output, _ = process.communicate(timeout=RUN_TIMEOUT_SECONDS)
    assert process.returncode == 0, output[-6000:]
    assert [row["step"] for row in lines(folder / "metrics.jsonl")] == [1, 2]
    assert {version.rpartition("/")[2] for _, version, _ in server.delivered} == {"2", "3"}


def test_an_evaluation_by_a_server_gives_the_same_greedy_answers(tmp_path: Path) -> None:
    """tools/evaluate.py --engine vllm, of a folder that a server has loaded."""
    for modality in ("text", "image"):
        build_digit_shards(tmp_path / modality, modality, "held_out", 3, 0)
    asked = [
        str(CLONE / "tools" / "evaluate.py"),
        str(STUDENT_DIR),
        *("--data", str(tmp_path / "text"), str(tmp_path / "image")),
        *("--sampling", "greedy", "rollout.max_response_tokens=32"),
    ]
    with serve_vllm(student()) as server:
        for engine, more in (
            ("megatron", []),
            ("vllm", ["--engine", "vllm", f"rollout.endpoints=[{server.url}]"]),
        ):
            done = run_python(*asked, "--output", str(tmp_path / engine), *more)
            assert done.returncode == 0, done.stdout + done.stderr
        assert len(server.requests) == 6
    answers = [lines(tmp_path / engine / "answers.jsonl") for engine in ("megatron", "vllm")]
    assert answers[0] == answers[1]
