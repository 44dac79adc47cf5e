"""From the configuration to servers: what is refused, and what the weights that are sent prove."""

from __future__ import annotations

import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import network_checks, tiny_families
from tests.support.fake_vllm_server import __file__ as fake
from zppo_mm.config.load import load_config
from zppo_mm.config.rollout import RolloutConfig
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.errors import ConfigError, RolloutServersLostError
from zppo_mm.models.decoding.cache_size import GIB
from zppo_mm.rollout.megatron_engine import MegatronEngine
from zppo_mm.rollout.served import opening
from zppo_mm.rollout.served.opening import ServedStudent, open_weight_sync
from zppo_mm.run.served_engine import probe_engine
from zppo_mm.run.shared import student_limits
from zppo_mm.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def student(one_rank: None, tmp_path_factory: pytest.TempPathFactory) -> ServedStudent:
    folder, _ = tiny_families.folder("qwen3", tmp_path_factory.mktemp("student"))
    network = network_checks.build(folder, ParallelConfig())
    return ServedStudent(folder, 300, network, MegatronEngine(network, seed=0))


def test_a_command_that_is_no_program_is_refused(student: ServedStudent, tmp_path: Path) -> None:
    config = RolloutConfig(servers=1, server_command=["no-such-vllm", "serve"])
    with pytest.raises(ConfigError, match=r"rollout.server_command.*no-such-vllm.*serving.md"):
        open_weight_sync(config, student, RunFolder(tmp_path))


def test_a_folder_that_cannot_be_written_is_refused(student: ServedStudent, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = RolloutConfig(sync_folder=str(tmp_path / "file" / "weights"))
    with pytest.raises(ConfigError, match=r"rollout.sync_folder: cannot be used"):
        open_weight_sync(config, student, RunFolder(tmp_path))


def test_a_server_with_another_network_ends_the_run_and_leaves_nothing(
    student: ServedStudent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake server has no greedy text for these weights. It is reached from this machine alone,
    though some of the machine's ranks are a teacher's.
    """
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    config = RolloutConfig(
        servers=1,
        server_command=[sys.executable, fake, str(tmp_path / "faults")],
        sync_folder=str(tmp_path / "shared"),
        max_server_restarts=0,
    )
    sync = open_weight_sync(config, student, RunFolder(tmp_path / "run"))
    assert sync.servers is not None
    assert [url.rpartition(":")[0] for url in sync.servers.urls] == ["http://127.0.0.1"]
    with pytest.raises(RolloutServersLostError, match="no server is left"):
        sync.push(1)
    assert sync.counts["failures"] == 1
    sync.close()
    assert not list((tmp_path / "shared").rglob("version_*"))
    assert (tmp_path / "run" / "servers" / "server_0.log").is_file()


def test_a_run_folder_that_cannot_be_written_is_refused(
    student: ServedStudent, tmp_path: Path
) -> None:
    (tmp_path / "run").touch()
    config = RolloutConfig(
        servers=1, server_command=[sys.executable], sync_folder=str(tmp_path / "shared")
    )
    with pytest.raises(ConfigError, match=r"rollout.servers: cannot be started, got .*run"):
        open_weight_sync(config, student, RunFolder(tmp_path / "run"))


@pytest.mark.parametrize(("num_machines", "host"), [(1, "127.0.0.1"), (2, "10.1.2.3")])
def test_servers_listen_where_the_ranks_are(
    num_machines: int, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node-1")
    monkeypatch.setattr(socket, "gethostbyname", {"node-1": "10.1.2.3"}.__getitem__)
    assert opening.server_host(num_machines) == host


def test_ranks_on_other_machines_need_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian gives the machine's own name one of its loopback."""
    monkeypatch.setenv("MASTER_ADDR", "node-1")
    monkeypatch.setattr(socket, "gethostbyname", {"node-1": "127.0.1.1"}.__getitem__)
    with pytest.raises(ConfigError, match=r"127\.0\.1\.1 for 'node-1'.*rollout.endpoints"):
        opening.server_host(2)


def test_servers_take_no_more_than_the_network(student: ServedStudent) -> None:
    positions = student.network.architecture.max_position_embeddings
    assert student.context == student.max_tokens < positions
    assert replace(student, max_tokens=positions + 1).context == positions


def test_the_proof_needs_room_for_its_own_prompt_alone(student: ServedStudent) -> None:
    """Servers have caches of their own for the run's."""
    options = ["rollout.engine=vllm", "rollout.servers=1", "rollout.cache_memory_gib=0.001"]
    config = load_config(None, options)
    with pytest.raises(ConfigError, match="cache_memory_gib"):
        MegatronEngine(student.network, seed=0, cache_bytes=GIB // 1000).check_longest(
            *student_limits(config)
        )
    probe_engine(config, student.network)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["rollout.servers=2", "rollout.server_devices=['0']"], r"one entry per server, got 1 for"),
        (["rollout.servers=1", "rollout.server_command=[]"], r"server_command: no command"),
    ],
)
def test_servers_that_do_not_fit_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, ["rollout.engine=vllm", *options])
