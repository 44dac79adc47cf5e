"""Servers as processes of a run: started, watched, started again with the newest weights, ended."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file

from tests.support.drawing_students import TableStudent
from tests.support.fake_vllm_server import naive_checksum
from tests.support.running import CLONE
from tests.support.vllm_server import serve_vllm
from zppo_mm.errors import RolloutServersLostError
from zppo_mm.interruption import StopRequested
from zppo_mm.parallel.exchange import never
from zppo_mm.rollout.served.server_control import (
    Probe,
    PublishedWeights,
    ServerControl,
    ServerFaultError,
)
from zppo_mm.rollout.served.server_process import (
    ServerProcess,
    ServerSettings,
    free_ports,
    server_environment,
)
from zppo_mm.rollout.served.supervision import RolloutServers, SupervisionLimits
from zppo_mm.rollout.served.vllm_worker.zppo_vllm_worker import checksum
from zppo_mm.rollout.served.weight_files import WeightFile

HOST = "127.0.0.1"
FAKE = CLONE / "tests" / "support" / "fake_vllm_server.py"
WAIT_SECONDS = 60.0
LOAD_SECONDS = 3.0
"""The fake one loads at once; one that hangs is found out after this."""
TOKENS, LOGPROBS = (3, 1, 4, 1), (-0.5, -1.0, -2.0, -0.25)


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def weights(folder: Path, version: int) -> PublishedWeights:
    """Return weights whose greedy text the fake server reads from their file."""
    logprobs = [*LOGPROBS[:-1], LOGPROBS[-1] - version]
    tensors = {
        "probe.tokens": torch.tensor(TOKENS),
        "probe.logprobs": torch.tensor(logprobs),
        "weight": torch.randn(33, 77, generator=torch.Generator().manual_seed(version)),
    }
    path = folder / f"version_{version}.safetensors"
    save_file(tensors, path)
    sums = {key: naive_checksum(tensor.numpy()) for key, tensor in tensors.items()}
    file = WeightFile(version, path, path.stat().st_size, sums)
    probe = Probe((1, 2, 3), TOKENS, tuple(logprobs), frozenset(), "float32")
    return PublishedWeights(file, f"run/{version}", probe)


class Servers:
    """Fake servers with a file of faults for each."""

    def __init__(self, folder: Path, number: int, max_faults: int) -> None:
        self.faults = [folder / f"faults_{index}" for index in range(number)]
        self.logs = [folder / f"log_{index}" for index in range(number)]
        controls, starts = [], []
        for index, port in enumerate(free_ports(HOST, number)):
            command = (sys.executable, str(FAKE), str(self.faults[index]))
            settings = ServerSettings(command, folder, 100, 8, HOST)
            controls.append(ServerControl(f"http://{HOST}:{port}", LOAD_SECONDS))
            environment = server_environment(os.environ, "")
            words = settings.words(port, index)
            starts.append(functools.partial(ServerProcess, words, environment, self.logs[index]))
        limits = SupervisionLimits(WAIT_SECONDS, WAIT_SECONDS, max_faults, poll_seconds=0.05)
        self.all = RolloutServers(controls, limits, starts)

    def engines(self) -> list[int]:
        """Return the children that the servers started, of all their starts."""
        text = "".join(log.read_text() for log in self.logs if log.is_file())
        return [int(line.split()[1]) for line in text.splitlines() if line.startswith("engine")]


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Callable[..., Servers]]:
    """Start fake servers, and see that nothing of them is left."""
    opened: list[Servers] = []

    def start(number: int = 1, max_faults: int = 3) -> Servers:
        opened.append(Servers(tmp_path, number, max_faults))
        return opened[-1]

    yield start
    for each in opened:
        pids = each.all.pids
        each.all.close()
        assert not any(map(psutil.pid_exists, pids))
        wait_for(lambda each=each: not any(map(is_alive, each.engines())))  # type: ignore[misc]


def is_alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_servers_get_every_version(servers: Any, tmp_path: Path) -> None:
    two = servers(2)
    for version in (1, 2):
        published = weights(tmp_path, version)
        two.all.publish(published, never)
        assert all(server.has(published) for server in two.all._servers)
    assert not +two.all.counts


@pytest.mark.parametrize("fault", ["die", "hang", "refuse", "corrupt", "odd"])
def test_a_server_that_fails_comes_back_with_the_weights(
    servers: Any, tmp_path: Path, fault: str
) -> None:
    two = servers(2)
    two.faults[0].write_text(fault)
    published = weights(tmp_path, 1)
    two.all.publish(published, never)
    # The run goes on with the other one.
    assert two.all._servers[1].has(published)
    wait_for(lambda: two.all._servers[0].has(published))
    assert two.all.counts == {"failures": 1, "restarts": 1}


def test_a_killed_server_is_started_again_at_the_same_address(servers: Any, tmp_path: Path) -> None:
    one = servers()
    published = weights(tmp_path, 1)
    one.all.publish(published, never)
    urls, [pid] = one.all.urls, one.all.pids
    [engine] = one.engines()
    # vLLM's engine is not the process that answers, and does not end with it.
    [answering] = [each for each in psutil.Process(pid).children() if each.pid != engine]
    answering.kill()
    wait_for(lambda: one.all.counts["restarts"] == 1 and one.all._servers[0].has(published))
    assert one.all.urls == urls
    assert not is_alive(engine)


def test_weights_that_come_while_a_server_is_down_are_loaded_when_it_is_back(
    servers: Any, tmp_path: Path
) -> None:
    two = servers(2)
    two.all.publish(weights(tmp_path, 1), never)
    os.killpg(two.all.pids[0], signal.SIGKILL)
    wait_for(lambda: two.all.counts["failures"] == 1)
    newer = weights(tmp_path, 2)
    (tmp_path / "version_1.safetensors").unlink()
    two.all.publish(newer, never)
    wait_for(lambda: two.all._servers[0].has(newer))


def test_other_weights_behind_the_right_checksums_are_found_out(
    servers: Any, tmp_path: Path
) -> None:
    one = servers(max_faults=0)
    right = weights(tmp_path, 1)
    wrong = PublishedWeights(right.file, right.version, weights(tmp_path, 2).probe)
    with pytest.raises(RolloutServersLostError, match="greedy text is not the trained network's"):
        one.all.publish(wrong, never)


def test_a_run_without_servers_ends(servers: Any, tmp_path: Path) -> None:
    two = servers(2, max_faults=1)
    for faults in two.faults:
        faults.write_text("refuse\n" * 10)
    with pytest.raises(RolloutServersLostError, match=r"no server is left.*refused.*refused"):
        two.all.publish(weights(tmp_path, 1), never)
    assert two.all.counts == {"failures": 4, "restarts": 2}


def test_a_server_that_cannot_be_started_again_is_given_another_chance(
    servers: Any, tmp_path: Path
) -> None:
    one = servers()
    [server] = one.all._servers
    start, errors = server._start, [OSError("no memory")]

    def start_later() -> ServerProcess:
        if errors:
            raise errors.pop()
        process: ServerProcess = start()
        return process

    server._start = start_later
    one.faults[0].write_text("die")
    one.all.publish(weights(tmp_path, 1), lambda: False)
    assert one.all.counts == {"failures": 2, "restarts": 1}


def test_servers_end_with_the_one_that_cannot_be_started(tmp_path: Path) -> None:
    started: list[ServerProcess] = []

    def start() -> ServerProcess:
        if started:
            raise OSError("no memory")
        command = [sys.executable, "-c", "import time; time.sleep(3600)"]
        started.append(ServerProcess(command, {}, tmp_path / "log"))
        return started[0]

    controls = [ServerControl(f"http://{HOST}:{port}", 1.0) for port in free_ports(HOST, 2)]
    with pytest.raises(OSError, match="no memory"):
        RolloutServers(controls, SupervisionLimits(WAIT_SECONDS), [start, start])
    assert not started[0].is_running()


def test_a_wrong_address_is_found_out_soon(tmp_path: Path) -> None:
    """It is no server that is being started, which may take an hour."""
    [port] = free_ports(HOST, 1)
    limits = SupervisionLimits(3600.0, silent_seconds=0.1, max_faults=0, poll_seconds=0.05)
    nobody = RolloutServers([ServerControl(f"http://{HOST}:{port}", 1.0)], limits, [None])
    deadline = time.monotonic() + WAIT_SECONDS
    with pytest.raises(RolloutServersLostError, match=r"no answer for 0\.1 s"):
        nobody.publish(weights(tmp_path, 1), lambda: time.monotonic() > deadline)
    nobody.close()


class Unable(TableStudent):
    """Finds no file."""

    def load(self, path: Path) -> dict[str, str]:
        raise FileNotFoundError(2, "No such file or directory", str(path))


def test_a_failed_load_leaves_no_weights_that_pass_for_others(tmp_path: Path) -> None:
    """And no server that waits for ever, when the run is over."""
    with serve_vllm(Unable()) as server:
        control = ServerControl(server.url, LOAD_SECONDS)
        with pytest.raises(ServerFaultError, match=r"No such file.*set rollout.sync_folder"):
            control.load(weights(tmp_path, 1))
        assert server.version == "loading"
        assert not server.is_open.is_set()
        control.close()
        assert server.is_open.is_set()


def test_a_host_of_another_machine_has_no_free_port() -> None:
    with pytest.raises(OSError, match=r"assign requested address"):
        free_ports("192.0.2.1", 1)


SHARING = """
import sys, time
from multiprocessing.shared_memory import SharedMemory
block = SharedMemory(create=True, size=4096)
print("block", block.name, flush=True)
time.sleep(3600)
"""


def test_shared_memory_of_a_killed_server_is_removed(tmp_path: Path) -> None:
    """A run takes signals itself and blocks them, and so does all that it starts."""
    log = tmp_path / "log"
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        process = ServerProcess([sys.executable, "-c", SHARING], {}, log)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    wait_for(lambda: log.is_file() and log.read_text().endswith("\n"))
    block = Path("/dev/shm") / log.read_text().split()[1]
    assert block.exists()
    process.end()
    assert not block.exists()


def test_a_run_that_is_to_end_does_not_wait(servers: Any, tmp_path: Path) -> None:
    one = servers()
    one.faults[0].write_text("hang")
    with pytest.raises(StopRequested):
        one.all.publish(weights(tmp_path, 1), lambda: True)


OWNER = """
import sys, time
from pathlib import Path
from zppo_mm.rollout.served.server_process import ServerProcess
server = ServerProcess(sys.argv[2:], {}, Path(sys.argv[1]))
print(server.pid, flush=True)
time.sleep(3600)
"""


def test_nothing_of_a_server_outlives_a_killed_run(tmp_path: Path) -> None:
    log = tmp_path / "log"
    [port] = free_ports(HOST, 1)
    command = [sys.executable, str(FAKE), str(tmp_path / "faults"), f"--port={port}"]
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(log), *command, f"--host={HOST}"],
        stdout=subprocess.PIPE,
        cwd=CLONE,
    ) as owner:
        assert owner.stdout is not None
        keeper = int(owner.stdout.readline())
        wait_for(lambda: log.is_file() and "engine" in log.read_text())
        family = [keeper, *(each.pid for each in psutil.Process(keeper).children(recursive=True))]
        assert len(family) == 3, "a keeper, a server and its engine"
        owner.kill()
    wait_for(lambda: not any(map(is_alive, family)))


def test_the_command_line_has_what_the_run_needs(tmp_path: Path) -> None:
    command = ("vllm", "serve", "{model}", "--seed", "{index}", "--max-model-len=50")
    words = ServerSettings(command, tmp_path, 100, 8, HOST).words(8001, 3)
    assert words[:6] == ["vllm", "serve", str(tmp_path), "--seed", "3", "--max-model-len=50"]
    assert words[6:10] == ["--host", HOST, "--port", "8001"]
    assert "--max-model-len" not in words
    assert "--enable-scale-out" in words


def test_a_server_does_not_take_itself_for_a_rank() -> None:
    launched = {"RANK": "1", "LOCAL_RANK": "1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x"}
    environment = server_environment({**launched, "PATH": "p", "PYTHONPATH": "mine"}, "6,7")
    assert environment.keys() - {"PATH", "PYTHONPATH"} == {
        "CUDA_VISIBLE_DEVICES",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
        "VLLM_SERVER_DEV_MODE",
    }
    folder, _, rest = environment["PYTHONPATH"].partition(os.pathsep)
    assert (Path(folder) / "zppo_vllm_worker.py").is_file()
    assert rest == "mine"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("size", [0, 3, 1024, 5000])
def test_the_checksum_is_the_naive_one(dtype: torch.dtype, size: int) -> None:
    tensor = (torch.randn(size, generator=torch.Generator().manual_seed(size)) * 50).to(dtype)
    array = tensor.view(torch.uint8).numpy()
    assert checksum(tensor) == naive_checksum(array)


def test_the_checksum_sees_blocks_in_another_order() -> None:
    words = np.arange(4096)
    moved = np.concatenate([words[2048:], words[:2048]])
    assert checksum(torch.from_numpy(words)) != checksum(torch.from_numpy(moved))


PROBE = Probe((1,), (5, 6, 7), (-1.0, -2.0, -3.0), frozenset({9}), "float32")


@pytest.mark.parametrize(
    ("tokens", "logprobs", "dtype", "is_same"),
    [
        ([5, 6, 7], [-1.0, -2.0, -3.0], "float32", True),
        ([5, 6, 7], [-1.0, -2.0003, -3.0], "float32", False),
        ([5, 6, 7], [-1.0, -2.01, -3.0], "bfloat16", True),
        ([5, 6, 7], [-1.0, -2.25, -3.0], "bfloat16", False),
        # One by one they may differ so much, but not all of them.
        ([5, 6, 7], [-1.1, -2.1, -3.0], "bfloat16", False),
        ([5, 6, 7], [-1.0001, -2.0001, -3.0], "float32", False),
        # About as likely: what follows cannot be compared.
        ([5, 8, 1], [-1.0, -2.0001, -9.0], "float32", True),
        ([5, 8, 1], [-1.0, -1.5, -9.0], "float32", False),
        # More likely than any token that the trainer may take.
        ([5, 9, 1], [-1.0, -0.5, -9.0], "float32", True),
        ([5, 9, 1], [-1.0, -2.5, -9.0], "float32", False),
        ([5, 6, 7], [-1.0, float("nan"), -3.0], "float32", False),
        ([5, 6], [-1.0, -2.0], "float32", False),
    ],
)
def test_what_counts_as_the_same_greedy_text(
    tokens: list[int], logprobs: list[float], dtype: str, is_same: bool
) -> None:
    assert (PROBE.difference(tokens, logprobs, dtype) == "") == is_same
