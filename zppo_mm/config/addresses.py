"""Addresses of servers and of stores."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from zppo_mm.errors import ConfigError

_READ_ONLY = ("http", "https", "hf")


def check_addresses(key: str, urls: Sequence[str], section: str = "teacher") -> None:
    """Check a list of base URLs. Messages never repeat a URL, because it may contain a key."""
    for index, url in enumerate(urls):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"{key}[{index}]: not an address, got {parts.scheme or 'no scheme'!r} and host "
                f"{parts.hostname or 'none'!r}, expected a base URL such as http://host:8000/v1; "
                "correct it"
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ConfigError(
                f"{key}[{index}]: holds more than an address, got a name, a password or a query "
                f"for host {parts.hostname!r}, expected scheme, host and path alone; give the key "
                f"by the environment variable that {section}.api_key_env names"
            )
    if len(set(urls)) < len(urls):
        raise ConfigError(
            f"{key}: an address is listed twice, expected each once; raise "
            f"{section}.max_concurrency instead"
        )


def check_store(key: str, address: str) -> None:
    """Check the address of a store that files are uploaded to; empty is none."""
    scheme, separator, rest = address.partition("://")
    if address and (not separator or not rest.strip("/") or scheme in _READ_ONLY):
        raise ConfigError(
            f"{key}: not a store that takes files, got {address!r}, expected an address such as "
            "s3://bucket/runs or file:///mnt/store/runs; correct it"
        )
