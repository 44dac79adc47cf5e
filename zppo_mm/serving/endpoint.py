"""One server: a request with time-outs, its faults by kind, and how busy it is."""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
import time
from contextlib import aclosing
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx2

from zppo_mm.errors import ConfigError
from zppo_mm.serving.fault import Fault
from zppo_mm.serving.received_text import ReceivedText
from zppo_mm.serving.servers import ConnectionLimits

logger = logging.getLogger(__name__)

# The message does not fit the model or breaks its rules: asking again, or elsewhere, brings the
# same.
REFUSALS = (400, 413, 415, 422)
# The server, not the message, cannot serve now: others are asked meanwhile.
BUSY_STATUSES = (429, 502, 503, 504)
# Longest pause before a further attempt, whether the server asks for one or not.
MAX_PAUSE_SECONDS = 60.0
MAX_ERROR_BYTES = 65_536
# Alone, these come decoded in bounded pieces; one inside another could be unpacked for hours before
# anything comes out.
CONTENT_CODINGS = ("gzip", "deflate")


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

    async def ask(
        self,
        client: httpx2.AsyncClient,
        path: str,
        body: bytes | None,
        *,
        max_bytes: int,
        timeout_seconds: float,
        received: ReceivedText,
    ) -> bytes:
        """Make one request and return the body of the reply, read whole.

        Args:
            client: The connections.
            path: Behind the base URL.
            body: Of a POST, JSON; `None` makes it a GET.
            max_bytes: Longest body of a reply, decoded.
            timeout_seconds: For all of it.
            received: Makes the reply's texts fit to be shown.

        Raises:
            Fault: Anything that keeps a reply from coming.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                status, headers, content = await self._exchange(client, path, body, max_bytes)
        except Fault:
            raise
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise Fault("timeout", f"{self.url}: {type(error).__name__} {error}".strip()) from error
        except Exception as error:
            # The libraries beneath raise what they like at what a server may send.
            raise Fault(_kind(error), f"{self.url}: {type(error).__name__}: {error}") from error
        if status != httpx2.codes.OK:
            is_redirect = 300 <= status < 400 and "location" in headers
            where = f" to {received.shown(headers['location'])}" if is_redirect else ""
            detail = f"{self.url}: HTTP {status}{where}: {received.shown(content)}"
            pause = retry_after(headers.get("retry-after"))
            raise Fault(f"http_{status}", detail, pause, status in REFUSALS)
        return content

    async def _exchange(
        self, client: httpx2.AsyncClient, path: str, body: bytes | None, max_bytes: int
    ) -> tuple[int, httpx2.Headers, bytes]:
        """Return status, headers and body of the reply; of an error's body the beginning."""
        headers = {
            "Content-Type": "application/json",
            "Accept-Encoding": ", ".join(CONTENT_CODINGS),
        }
        method = "GET" if body is None else "POST"
        async with client.stream(
            method, self.url + path, content=body, headers=headers
        ) as response:
            is_answer = response.status_code == httpx2.codes.OK
            codings = response.headers.get_list("content-encoding", split_commas=True)
            if len(codings) > 1 or not {each.strip().lower() for each in codings} <= {
                *CONTENT_CODINGS,
                "identity",
                "",
            }:
                expected = " or ".join(CONTENT_CODINGS)
                raise Fault(
                    "bad_reply",
                    f"{self.url}: Content-Encoding {codings[:3]}, expected none, {expected}",
                )
            content = bytearray()
            async with aclosing(response.aiter_bytes()) as pieces:
                async for piece in pieces:
                    content += piece
                    if is_answer and len(content) > max_bytes:
                        expected = "expected fewer for the tokens asked for"
                        raise Fault(
                            "too_large", f"{self.url}: more than {max_bytes} bytes, {expected}"
                        )
                    if not is_answer and len(content) >= MAX_ERROR_BYTES:
                        break
            return response.status_code, response.headers, bytes(content)

    def failed(self, fault: Fault, backoff_seconds: float) -> None:
        """Note a fault; a server that is busy, gone or asks for time is left alone for a while."""
        pause = fault.retry_after_seconds
        if pause is None and (
            fault.kind == "connection"
            or fault.kind in {f"http_{status}" for status in BUSY_STATUSES}
        ):
            pause = backoff_seconds
        if pause is not None:
            self.paused_until = max(self.paused_until, time.monotonic() + pause)


def _kind(error: Exception) -> str:
    """Return the name to count an error of a request by."""
    if isinstance(error, httpx2.RemoteProtocolError | httpx2.ReadError):
        return "cut_off"
    if not isinstance(error, httpx2.RequestError) or isinstance(error, httpx2.DecodingError):
        return "bad_reply"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    return "connection" if cause is None else "certificate"


def retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, given as seconds or as a date, up to a minute;
    `None` without a readable one.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
            seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, LookupError, ArithmeticError):
            logger.debug("Retry-After cannot be read: %.100r", value)
            return None
    return None if math.isnan(seconds) else min(max(0.0, seconds), MAX_PAUSE_SECONDS)


def open_client(limits: ConnectionLimits, api_key: str, who: str) -> httpx2.AsyncClient:
    """Return the way to all servers; the key is in its headers, which never show it.

    Every request has a connection of its own and no cookies: nothing of a reply can pass for the
    next one or change the next request. Redirects are not followed, they could take the key
    elsewhere. The environment's proxies are used for https alone, where they see neither key nor
    questions.

    Args:
        limits: Time-outs.
        api_key: Sent as a bearer token; empty sends none.
        who: Whose servers they are, for messages.

    Raises:
        ConfigError: The environment names proxies or certificates that cannot be used.
    """
    timeout = httpx2.Timeout(
        connect=limits.connect_timeout_seconds,
        read=limits.read_timeout_seconds,
        write=limits.read_timeout_seconds,
        pool=None,
    )
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        return httpx2.AsyncClient(
            headers=headers,
            timeout=timeout,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
            follow_redirects=False,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            mounts={"http://": None},
        )
    except (httpx2.InvalidURL, ValueError, ImportError, OSError) as error:
        raise ConfigError(
            f"{who}: no client for its servers, got {type(error).__name__}: {error}, expected "
            "usable proxies and certificates; correct HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and "
            "SSL_CERT_DIR"
        ) from error
