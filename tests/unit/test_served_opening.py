"""From the configuration to servers: what is refused, and what the weights that are sent prove."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from tests.support import network_checks, tiny_families
from tests.support.fake_vllm_server import __file__ as fake
from zppo_mm.config.load import load_config
from zppo_mm.config.rollout import RolloutConfig
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.errors import ConfigError, RolloutServersLostError
from zppo_mm.rollout.megatron_engine import MegatronEngine
from zppo_mm.rollout.served import opening
from zppo_mm.rollout.served.opening import ServedStudent, open_weight_sync
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
    student: ServedStudent, tmp_path: Path
) -> None:
    """The fake server has no greedy text for these weights."""
    config = RolloutConfig(
        servers=1,
        server_command=[sys.executable, fake, str(tmp_path / "faults")],
        sync_folder=str(tmp_path / "shared"),
        max_server_restarts=0,
    )
    sync = open_weight_sync(config, student, RunFolder(tmp_path / "run"))
    with pytest.raises(RolloutServersLostError, match="no server is left"):
        sync.push(1)
    assert sync.counts["failures"] == 1
    sync.close()
    assert not list((tmp_path / "shared").rglob("version_*"))
    assert (tmp_path / "run" / "servers" / "server_0.log").is_file()


@pytest.mark.parametrize(("local", "host"), [("1", "127.0.0.1"), ("0", "10.1.2.3")])
def test_servers_listen_where_the_ranks_are(
    local: str, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    monkeypatch.setenv("MASTER_ADDR", "node-1")
    monkeypatch.setattr(socket, "gethostbyname", {"node-1": "10.1.2.3"}.__getitem__)
    assert opening.server_host() == host


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
