"""From the configuration to the servers: key, number of connections, and a probe of each."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from urllib.parse import urlsplit

from data.files import LOCAL, LocalFiles
from data.media.opening import MediaLimits
from zppo_mm.config.schema import TeacherConfig
from zppo_mm.errors import ConfigError
from zppo_mm.parallel.exchange import Exchange
from zppo_mm.serving.api_key import read_key
from zppo_mm.serving.client_process import PoolProcess
from zppo_mm.teacher.served.pool_settings import PoolSettings
from zppo_mm.teacher.served.servers import Servers

logger = logging.getLogger(__name__)

# The address, the key, the certificate or the model's name is wrong: waiting does not help.
# A question may be refused with 400, a probe not.
MISCONFIGURED = (
    *(f"http_{status}" for status in (301, 302, 303, 307, 308, 400, 401, 403, 404, 405)),
    "certificate",
)
# An answer, though none to train with.
ANSWERED = ("empty_choice", "content_filter")
UNKNOWN_TO_SOME = "chat_template_kwargs if the server does not know that field"
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def open_pool(
    config: TeacherConfig,
    exchange: Exchange,
    urls: Sequence[str] = (),
    model: str = "",
    *,
    limits: MediaLimits | None = None,
    files: LocalFiles = LOCAL,
    where: str = "teacher",
) -> Servers | None:
    """Return this process's way to the servers; `None` if there are none. Every rank calls this.

    Every server is probed once. One that does not answer yet is named in the log: the first
    question will wait for it.

    Args:
        config: The teacher's addresses, model and limits.
        exchange: The replicas, which divide the connections.
        urls: Other servers than the teacher's.
        model: Their model.
        limits: What is opened of media; `None` if no message has any.
        files: Open what holds the media; by default those of this machine.
        where: The keys' section, for messages.

    Raises:
        ConfigError: On every rank, if the key's variable is not set, or a server refuses the key,
            the address or the model.
    """
    urls = urls or config.endpoints
    if not urls:
        return None
    key = read_key(config.api_key_env)
    if key and any(
        urlsplit(url).scheme == "http" and urlsplit(url).hostname not in LOOPBACK for url in urls
    ):
        logger.warning(
            "%s: the key goes over plain http to another machine; use https unless the network is "
            "yours alone",
            where,
        )
    pool = PoolProcess(
        PoolSettings(
            urls=tuple(urls),
            model=model or config.model,
            config=config,
            api_key=key,
            max_concurrency=max(1, config.max_concurrency // exchange.num_replicas),
            first=exchange.replica,
            limits=limits,
            files=files,
        )
    )
    probes = exchange.is_leader and exchange.replica == 0
    problems = _probe(pool) if probes else []
    for url, kind, problem in (each for replica in exchange.gather(problems) for each in replica):
        if not url:
            pool.close()
            raise ConfigError(problem) if kind == "client" else RuntimeError(problem)
        if kind in MISCONFIGURED or (kind == "http_422" and config.chat_template_kwargs):
            pool.close()
            field = f", or remove {where}.{UNKNOWN_TO_SOME}" if config.chat_template_kwargs else ""
            raise ConfigError(
                f"{where}: {url} refuses the model {model or config.model!r}, got {problem!r}, "
                "expected an answer to a probe; correct the address (the base URL ends before "
                "/chat/completions and redirects nowhere), the model, the key or the server's "
                f"certificate{field}"
            )
        if kind not in ANSWERED:
            logger.warning("%s: %s does not answer yet: %s", where, url, problem)
    return pool


def _probe(pool: Servers) -> list[tuple[str, str, str]]:
    """Return address, kind and description of what kept servers from answering; without an
    address, why none could be asked.
    """
    try:
        return [
            (url, fault.kind, str(fault))
            for url, fault in pool.probe().result().items()
            if fault is not None
        ]
    except (ConfigError, RuntimeError, OSError) as error:
        # Sent to the other ranks, which wait for the probe.
        return [("", "client" if isinstance(error, ConfigError) else "client_process", str(error))]
