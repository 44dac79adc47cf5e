"""A run that is asked to end writes a checkpoint, says one line and exits with 75; started again it
ends as if nothing had happened.

The quick tests are samples; the whole table of phases, ranks and signals is marked slow.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.loopback_server import LoopbackServer, TinyModel, serve
from tests.support.running import RUN_TIMEOUT_SECONDS, buffer, lines, run, start, transcript
from zppo_mm.bundled import TEACHER_DIR
from zppo_mm.interruption import EXIT_CODE

STEPS = 4
COMMON = (
    "modality=text",
    f"train.train_iters={STEPS}",
    "train.num_new_questions=16",
    "parity.mode=none",
    "observability.report=false",
    "checkpoint.interval=100",
)
STOPPED = re.compile(r"stopped after step (\d+); the same command continues \((\S+)\)")

pytestmark = pytest.mark.timeout(3 * RUN_TIMEOUT_SECONDS)


def wait_until(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + RUN_TIMEOUT_SECONDS
    while not what():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.002)


def step_written(folder: Path, step: int) -> bool:
    return (folder / "transcripts" / f"step_{step:06d}.jsonl").exists()


def ended(process: subprocess.Popen[str], folder: Path, name: str, *, code: int = EXIT_CODE) -> int:
    """Check how a run ended that was asked to, and return the step that it names."""
    output, _ = process.communicate(timeout=RUN_TIMEOUT_SECONDS)
    assert process.returncode == code, output[-6000:]
    ((step, reason),) = STOPPED.findall(output)
    assert reason == name
    own = [line for line in output.splitlines() if "zppo_mm" in line and "Traceback" in line]
    assert own == []
    if code == EXIT_CODE:
        assert "Traceback" not in output
    done = int(step)
    assert (folder / "checkpoints" / f"step_{done:06d}").is_dir()
    assert not [
        path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")
    ]
    assert (
        [row["step"] for row in lines(folder / "metrics.jsonl")] == list(range(1, done + 1))
        if done
        else True
    )
    assert STOPPED.findall((folder / "run.log").read_text(encoding="utf-8")) == [(step, reason)]
    return done


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "hf" / "model.safetensors").read_bytes()).hexdigest()


def assert_same(left: Path, right: Path, num_steps: int = STEPS) -> None:
    """Compare two finished runs to the byte."""
    assert weights(left) == weights(right)
    for step in range(1, num_steps + 1):
        assert transcript(left, step) == transcript(right, step)
        assert buffer(left, step) == buffer(right, step)
    assert lines(left / "evaluation.jsonl") == lines(right / "evaluation.jsonl")
    assert [row["step"] for row in lines(right / "metrics.jsonl")] == list(range(1, num_steps + 1))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    return run(tmp_path_factory.mktemp("whole"), "whole", *COMMON)


@pytest.fixture(scope="module")
def whole_of_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on four ranks."""
    return run(tmp_path_factory.mktemp("whole_of_four"), "whole", *COMMON, processes=4)


def interrupt(tmp_path: Path, number: signal.Signals, delay: float, *options: str) -> Path:
    """Ask a run to end some time after its first step, and let it go on; returns its folder."""
    process = start(tmp_path, "cut", *COMMON, *options)
    wait_until(lambda: step_written(tmp_path / "cut", 1), process)
    time.sleep(delay)
    process.send_signal(number)
    ended(process, tmp_path / "cut", number.name)
    return run(tmp_path, "cut", *COMMON, *options)


def test_sigterm_between_and_in_steps(whole: Path, tmp_path: Path) -> None:
    assert_same(whole, interrupt(tmp_path, signal.SIGTERM, 0.0))


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name
)
@pytest.mark.parametrize("delay", [0.05, 0.2, 0.4])
def test_any_signal_at_any_moment(
    whole: Path, tmp_path: Path, number: signal.Signals, delay: float
) -> None:
    assert_same(whole, interrupt(tmp_path, number, delay))


def signal_ranks(process: subprocess.Popen[str], number: signal.Signals, num_ranks: int) -> None:
    """Signal the launcher's first ranks themselves, as a scheduler does that knows no launcher."""
    children = (
        Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    )
    assert len(children) >= num_ranks
    for child in children[:num_ranks]:
        os.kill(int(child), number)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.5])
@pytest.mark.parametrize(
    ("number", "num_ranks"),
    [
        (signal.SIGTERM, 0),
        (signal.SIGINT, 0),
        (signal.SIGUSR1, 1),
        (signal.SIGUSR1, 4),
        (signal.SIGTERM, 4),
    ],
    ids=lambda value: str(getattr(value, "name", value)),
)
def test_four_ranks(
    whole_of_four: Path, tmp_path: Path, number: signal.Signals, num_ranks: int, delay: float
) -> None:
    """The launcher passes a signal on, or ranks are signalled themselves: some of them or all."""
    process = start(tmp_path, "cut", *COMMON, processes=4)
    wait_until(lambda: step_written(tmp_path / "cut", 1), process)
    time.sleep(delay)
    if num_ranks:
        signal_ranks(process, number, num_ranks)
    else:
        process.send_signal(number)
    # torchrun makes 1 of whatever its workers end with.
    ended(process, tmp_path / "cut", number.name, code=1)
    assert_same(whole_of_four, run(tmp_path, "cut", *COMMON, processes=4))


def test_two_ranks_one_of_them_signalled(tmp_path: Path) -> None:
    process = start(tmp_path, "cut", *COMMON, "evaluation.num_questions=2", processes=2)
    wait_until(lambda: step_written(tmp_path / "cut", 1), process)
    signal_ranks(process, signal.SIGUSR1, 1)
    output, _ = process.communicate(timeout=RUN_TIMEOUT_SECONDS)
    ((step, reason),) = STOPPED.findall(output)
    assert reason == "SIGUSR1"
    assert (tmp_path / "cut" / "checkpoints" / f"step_{int(step):06d}").is_dir()
    # torchrun itself ends with 1 and names what its worker ended with.
    assert process.returncode == 1
    assert re.search(rf"exitcode\s*: {EXIT_CODE}\b", output)
    assert "RankFailureError" not in output


@pytest.mark.parametrize("phase", ["save", pytest.param("export", marks=pytest.mark.slow)])
def test_while_it_writes(whole: Path, tmp_path: Path, phase: str) -> None:
    folder, options = tmp_path / "cut", ("checkpoint.interval=2",) if phase == "save" else ()
    process = start(tmp_path, "cut", *COMMON, *options)
    signs = {
        "save": lambda: any((folder / "checkpoints").glob(".step_*")),
        "export": (folder / "checkpoints" / f"step_{STEPS:06d}").is_dir,
    }
    wait_until(signs[phase], process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=RUN_TIMEOUT_SECONDS)
    # A tiny model may be exported, and the run at its end, before the signal is handled.
    assert process.returncode == EXIT_CODE or phase == "export", output[-4000:]
    assert "Traceback" not in output
    assert_same(whole, run(tmp_path, "cut", *COMMON, *options))


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.5, 1.5, 2.5])
def test_while_it_evaluates(tmp_path: Path, delay: float) -> None:
    options = (
        *COMMON,
        "evaluation.num_questions=200",
        "evaluation.num_rollouts=8",
        "evaluation.interval=1",
    )
    complete = run(tmp_path, "whole", *options)
    process = start(tmp_path, "cut", *options)
    wait_until(lambda: step_written(tmp_path / "cut", 1), process)
    time.sleep(delay)
    process.send_signal(signal.SIGTERM)
    ended(process, tmp_path / "cut", "SIGTERM")
    assert_same(complete, run(tmp_path, "cut", *options))


def is_blocked(pid: int, number: signal.Signals) -> bool:
    """Return whether a process has installed its own handler of a signal."""
    (mask,) = re.findall(
        r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    )
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_before_there_is_anything_to_lose_it_ends_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, "cut", *COMMON)
    wait_until(
        lambda: (
            bool(process.stdout)
            and Path(f"/proc/{process.pid}/status").read_text().count("SigBlk:\t0000000000000000")
            == 0
        ),
        process,
    )
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=RUN_TIMEOUT_SECONDS)
    assert process.returncode == EXIT_CODE
    assert [line for line in output.splitlines() if "stopped" in line] == output.splitlines()[-1:]
    assert "stopped before the first step; the same command continues (SIGTERM)" in output


def test_a_second_signal_ends_at_once_and_loses_nothing_that_was_complete(tmp_path: Path) -> None:
    # One response to a prompt takes far longer than the test waits.
    options = (
        *COMMON,
        "checkpoint.interval=1",
        "train.num_new_questions=64",
        "rollout.num_rollouts=32",
    )
    folder = tmp_path / "cut"
    process = start(tmp_path, "cut", *options)
    wait_until(lambda: (folder / "checkpoints" / "step_000001").is_dir(), process)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=RUN_TIMEOUT_SECONDS)
    assert process.returncode == EXIT_CODE
    assert "Traceback" not in output
    assert (folder / "checkpoints" / "step_000001").is_dir()
    resumed = run(tmp_path, "cut", *options, "train.train_iters=2")
    assert [row["step"] for row in lines(resumed / "metrics.jsonl")] == [1, 2]


def test_max_hours_ends_a_run_the_same_way_and_it_goes_on(tmp_path: Path) -> None:
    # Over before the loop begins: every start ends before a step, and nothing is lost by it.
    options = (*COMMON, "evaluation.num_questions=2")
    process = start(tmp_path, "cut", *options, "train.max_hours=0.0001")
    assert ended(process, tmp_path / "cut", "train.max_hours") == 0
    resumed = run(tmp_path, "cut", *options, "train.train_iters=1")
    assert [row["step"] for row in lines(resumed / "evaluation.jsonl")] == [0, 1]


@pytest.fixture(scope="module")
def server() -> Iterator[LoopbackServer]:
    with serve(TinyModel(TEACHER_DIR)) as made:
        yield made


@pytest.mark.parametrize("processes", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_while_it_waits_for_a_teacher(
    server: LoopbackServer, tmp_path: Path, processes: int
) -> None:
    server.latency_seconds = 0.0
    options = [
        *COMMON,
        f"teacher.endpoints=[{server.url}]",
        "teacher.model=tiny",
        "teacher.max_response_tokens=64",
    ]
    complete = run(tmp_path, "whole", *options, processes=processes)
    process = start(tmp_path, "cut", *options, processes=processes)
    wait_until(lambda: step_written(tmp_path / "cut", 1), process)
    server.latency_seconds = 1000.0  # no answer comes in time any more
    asked = len(server.requests)
    wait_until(lambda: len(server.requests) > asked, process)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    done = ended(process, tmp_path / "cut", "SIGINT", code=EXIT_CODE if processes == 1 else 1)
    assert done < STEPS
    assert time.monotonic() - began < RUN_TIMEOUT_SECONDS / 2
    server.latency_seconds = 0.0
    assert_same(complete, run(tmp_path, "cut", *options, processes=processes))


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [0, 1, 3])
def test_a_teacher_on_ranks_of_its_own_ends_with_the_student(
    tmp_path: Path, num_ranks: int
) -> None:
    options = [
        *COMMON,
        "teacher.num_ranks=1",
        "teacher.max_response_tokens=64",
        "rollout.max_batch_size=4",
    ]
    complete = run(tmp_path, "whole", *options, processes=3)
    process = start(tmp_path, "cut", *options, processes=3)
    wait_until(lambda: step_written(tmp_path / "cut", 1), process)
    time.sleep(0.3)
    if num_ranks:
        signal_ranks(process, signal.SIGUSR1, num_ranks)
    else:
        process.send_signal(signal.SIGTERM)
    ended(process, tmp_path / "cut", "SIGUSR1" if num_ranks else "SIGTERM", code=1)
    assert_same(complete, run(tmp_path, "cut", *options, processes=3))
