"""One server: a POST with time-outs, its faults by kind, and how busy it is."""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx2

from zppo_mm.config import TeacherConfig
from zppo_mm.teacher.chat_api import Fault, Reply, parse_reply

logger = logging.getLogger(__name__)

# The message does not fit the model or breaks its rules: asking again, or elsewhere, brings the same.
REFUSALS = (400, 413, 415, 422)
# The server, not the message, cannot serve now: others are asked meanwhile.
BUSY_STATUSES = (429, 502, 503, 504)
COMPLETIONS_PATH = "/chat/completions"


class Endpoint:
    """One server and what this process has outstanding there. Used from one event loop only.

    Attributes:
        url: Base URL, without a slash at the end.
        outstanding: Requests in flight.
        paused_until: Not asked before this time, in seconds of the monotonic clock.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.outstanding = 0
        self.paused_until = 0.0

    async def complete(self, client: httpx2.AsyncClient, body: bytes, num_choices: int, timeout_seconds: float) -> Reply:
        """Post one request and read the whole reply.

        Raises:
            Fault: Anything that keeps a usable reply from coming.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                response = await client.post(self.url + COMPLETIONS_PATH, content=body, headers={"Content-Type": "application/json"})
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise Fault("timeout", f"{self.url}: {type(error).__name__} {error}".strip()) from error
        except (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.DecodingError) as error:
            raise Fault("cut_off", f"{self.url}: {type(error).__name__}: {error}") from error
        except httpx2.RequestError as error:
            raise Fault("connection", f"{self.url}: {type(error).__name__}: {error}") from error
        if response.status_code != httpx2.codes.OK:
            status = response.status_code
            detail = f"{self.url}: HTTP {status}: {' '.join(response.text.split())}"
            raise Fault(f"http_{status}", detail, retry_after(response.headers.get("retry-after")), status in REFUSALS)
        return parse_reply(response.content, num_choices)

    def failed(self, fault: Fault, backoff_seconds: float) -> None:
        """Note a fault; a server that is busy, gone or asks for time is left alone for a while."""
        pause = fault.retry_after_seconds
        if pause is None and (fault.kind == "connection" or fault.kind in {f"http_{status}" for status in BUSY_STATUSES}):
            pause = backoff_seconds
        if pause is not None:
            self.paused_until = max(self.paused_until, time.monotonic() + pause)


def retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, given as seconds or as a date; `None` without a readable one."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        logger.debug("Retry-After cannot be read: %r", value)
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


def open_client(config: TeacherConfig, api_key: str) -> httpx2.AsyncClient:
    """Return the connections to all servers; the key is in their headers, which never show it."""
    timeout = httpx2.Timeout(
        connect=config.connect_timeout_seconds, read=config.read_timeout_seconds, write=config.read_timeout_seconds, pool=None
    )
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx2.AsyncClient(headers=headers, timeout=timeout, limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None))
