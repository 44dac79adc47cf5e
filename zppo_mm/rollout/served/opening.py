"""From the configuration to the servers and the way of the weights to them."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.media.node_folder import NodeFolder, default_root
from zppo_mm.config.rollout import RolloutConfig
from zppo_mm.errors import ConfigError
from zppo_mm.lora.adapters import adapters_of
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.exchange import never
from zppo_mm.rollout.engine import RolloutEngine
from zppo_mm.rollout.served.server_control import ServerControl
from zppo_mm.rollout.served.server_process import (
    ServerProcess,
    ServerSettings,
    free_ports,
    server_environment,
)
from zppo_mm.rollout.served.supervision import RolloutServers, SupervisionLimits
from zppo_mm.rollout.served.weight_sync import WeightSync
from zppo_mm.run_folder import RunFolder

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class ServedStudent:
    """What servers need of the student.

    Attributes:
        folder: Of the model that the run starts from.
        max_tokens: Longest prompt and response together.
        network: This rank's stage of the trained network.
        engine: Samples with it, for the probe.
    """

    folder: Path
    max_tokens: int
    network: VisionLanguageModel
    engine: RolloutEngine

    @property
    def context(self) -> int:
        """Tokens of the longest prompt and response that servers can take."""
        return min(self.max_tokens, self.network.architecture.max_position_embeddings)


def open_weight_sync(
    config: RolloutConfig,
    student: ServedStudent,
    folder: RunFolder,
    should_stop: Callable[[], bool] = never,
    api_key: str = "",
) -> WeightSync:
    """Start the servers on rank 0; every rank calls it. It returns before they answer.

    Args:
        config: Which servers, and how they are started.
        student: What they sample with.
        folder: The run's, for the servers' logs.
        should_stop: Whether the run is to end, as far as this rank knows.
        api_key: The servers'; empty sends none.

    Raises:
        ConfigError: A server's command or the folder of the weights cannot be used; raised on
            every rank.
        ModelError: The student's folder cannot be served; raised on every rank.
    """
    problem, files, servers = "", None, None
    machines = set(parallel.gather_from_ranks(socket.gethostname()))
    if parallel.rank() == 0:
        try:
            files = _weights_folder(config.sync_folder)
            host = server_host(len(machines)) if config.servers else LOOPBACK
            servers = _open_servers(config, student, folder, api_key, host)
        except ConfigError as error:
            problem = str(error)
        except OSError as error:
            problem = (
                f"rollout.servers: cannot be started, got {error}, expected a run's folder that "
                "can be written and an address of this machine; correct it, or use "
                "rollout.endpoints"
            )
    problem = parallel.broadcast_object(problem)
    with contextlib.ExitStack() as opened:
        if files is not None:
            opened.callback(files.close)
        if servers is not None:
            opened.callback(servers.close)
        if problem:
            raise ConfigError(problem)
        sync = WeightSync(
            student.network,
            student.folder,
            Path() if files is None else files.path,
            student.engine,
            servers,
            should_stop,
            config.send_adapters,
        )
        # From here on they end with the synchronisation.
        sync.opened = opened.pop_all()
    return sync


def _weights_folder(configured: str) -> NodeFolder:
    root = Path(configured).absolute() if configured else default_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        return NodeFolder(root, f"weights-{secrets.token_hex(8)}")
    except OSError as error:
        raise ConfigError(
            f"rollout.sync_folder: cannot be used, got {error}, expected a folder with room for "
            "two copies of the weights; name another"
        ) from error


def _open_servers(
    config: RolloutConfig, student: ServedStudent, folder: RunFolder, api_key: str, host: str
) -> RolloutServers:
    limits = SupervisionLimits(
        start_seconds=config.server_start_seconds, max_faults=config.max_server_restarts
    )
    urls = list(config.endpoints)
    starts: list[Callable[[], ServerProcess] | None] = [None] * len(urls)
    if config.servers and shutil.which(config.server_command[0]) is None:
        raise ConfigError(
            f"rollout.server_command: cannot be started, got {config.server_command[0]!r}, which "
            "is no program here, expected that of vLLM, in an environment of its own "
            "(docs/serving.md); give its path"
        )
    if config.servers and student.max_tokens > student.context:
        logger.warning(
            "rollout servers: prompts and responses may have %d tokens, and servers take %d, the "
            "max_position_embeddings of %s; they refuse longer ones",
            student.max_tokens,
            student.context,
            student.folder,
        )
    adapters = adapters_of(student.network)
    settings = ServerSettings(
        tuple(config.server_command),
        student.folder.absolute(),
        student.context,
        config.max_batch_size,
        host,
        adapters.config.rank if adapters is not None and config.send_adapters else 0,
    )
    for index, port in enumerate(free_ports(host, config.servers)):
        device = config.server_devices[index] if config.server_devices else ""
        urls.append(f"http://{host}:{port}")
        starts.append(
            functools.partial(
                ServerProcess,
                settings.words(port, index),
                server_environment(os.environ, device),
                folder.server_log(index),
            )
        )
        logger.info("rollout server %d: %s, log %s", index, urls[-1], folder.server_log(index))
    controls = [ServerControl(url, config.sync_timeout_seconds, api_key) for url in urls]
    return RolloutServers(controls, limits, starts)


def server_host(num_machines: int) -> str:
    """Return the address that servers started here listen at: of this machine alone, unless ranks
    on other machines have to reach them.

    Args:
        num_machines: That the run's ranks are on.

    Raises:
        ConfigError: Ranks on other machines cannot reach it.
        OSError: The name of this machine has no address.
    """
    if num_machines == 1:
        return LOOPBACK
    name = os.environ.get("MASTER_ADDR", socket.gethostname())
    address = socket.gethostbyname(name)
    if address.startswith("127."):
        raise ConfigError(
            f"rollout.servers: ranks on other machines cannot reach them, got {address} for "
            f"{name!r}, expected an address of the network; set MASTER_ADDR to one, or use "
            "rollout.endpoints"
        )
    return address
