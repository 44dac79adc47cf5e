"""One server as a process of the run: its command, its environment and its end."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from zppo_mm.rollout.served import server_keeper
from zppo_mm.rollout.served.vllm_worker import zppo_vllm_worker

CLOSING_SECONDS = server_keeper.GRACE_SECONDS + 5.0
MIN_BATCHED_TOKENS = 8192
_PORTS = range(20_000, 32_000)
_MAX_PORT_FAILURES = 100
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for."""
_LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHER_PREFIXES = ("LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")
"""What a launcher sets for the ranks of the run, and a server would take for its own."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How a server is started.

    Attributes:
        command: The words before the run's own options, with placeholders.
        model: The folder that it serves, as far as files other than weights go.
        max_tokens: Longest prompt and response together.
        max_batch_size: Most sequences that it samples at once.
        host: The address that it listens at.
        lora_rank: Of adapters that it is to take; 0 for none.
    """

    command: tuple[str, ...]
    model: Path
    max_tokens: int
    max_batch_size: int
    host: str
    lora_rank: int = 0

    def words(self, port: int, index: int) -> list[str]:
        """Return the whole command line: the configured words, then what the run needs unless they
        say it themselves.
        """
        values = {"{model}": str(self.model), "{port}": str(port), "{index}": str(index)}
        words = list(self.command)
        for name, meant in values.items():
            words = [word.replace(name, meant) for word in words]
        options: dict[str, str | None] = {
            "--host": self.host,
            "--port": str(port),
            "--generation-config": "vllm",
            "--enable-scale-out": None,
            "--logprobs-mode": "processed_logprobs",
            # The proof of new weights comes before all requests.
            "--scheduling-policy": "priority",
            "--worker-extension-cls": "zppo_vllm_worker.WeightLoader",
            "--max-model-len": str(self.max_tokens),
            "--max-num-seqs": str(self.max_batch_size),
            # Room for the longest prompt in one piece.
            "--max-num-batched-tokens": str(max(self.max_tokens, MIN_BATCHED_TOKENS)),
        }
        if self.lora_rank:
            fitting = [rank for rank in _LORA_RANKS if rank >= self.lora_rank]
            options["--enable-lora"] = None
            options["--max-lora-rank"] = str(min(fitting, default=self.lora_rank))
        said = {word.partition("=")[0] for word in words}
        for option, value in options.items():
            if option not in said:
                words += [option] if value is None else [option, value]
        return words


def server_environment(base: Mapping[str, str], device: str) -> dict[str, str]:
    """Return the environment of a server.

    Args:
        base: The run's.
        device: For CUDA_VISIBLE_DEVICES; empty leaves it as it is.
    """
    environment = {
        name: value
        for name, value in base.items()
        if name not in _LAUNCHER_NAMES and not name.startswith(_LAUNCHER_PREFIXES)
    }
    paths = [str(zppo_vllm_worker.FOLDER), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    # Opens the routes by which weights are loaded.
    environment["VLLM_SERVER_DEV_MODE"] = "1"
    environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if device:
        environment["CUDA_VISIBLE_DEVICES"] = device
    return environment


class ServerProcess:
    """A server under a keeper, which ends it when this process is gone.

    Args:
        words: The command line.
        environment: The server's.
        log: What it writes is appended here.
    """

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", server_keeper.__file__, *words],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process group of the server and its keeper."""
        return self._keeper.pid

    def is_running(self) -> bool:
        """Return whether it has not ended."""
        return self._keeper.poll() is None

    def end(self, seconds: float = CLOSING_SECONDS) -> None:
        """End it with all that it started, however it takes it.

        Args:
            seconds: For ending by itself.
        """
        assert self._keeper.stdin is not None
        with contextlib.suppress(OSError):
            self._keeper.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._keeper.wait(seconds)
        with contextlib.suppress(OSError):
            os.killpg(self._keeper.pid, signal.SIGKILL)
        self._keeper.wait()


def free_ports(host: str, number: int) -> list[int]:
    """Return ports that nothing listens at now, from below those that the system gives to outgoing
    connections: one of these could take a port while its server is started again.

    Raises:
        OSError: There are none, or the host is not this machine.
    """
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        num_failures = 0
        while len(ports) < number:
            candidate = held.enter_context(socket.socket())
            try:
                candidate.bind((host, secrets.choice(_PORTS)))
            except OSError:
                num_failures += 1
                if num_failures > _MAX_PORT_FAILURES:
                    raise
            else:
                ports.append(int(candidate.getsockname()[1]))
        return ports
