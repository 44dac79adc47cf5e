"""The key of servers, from the environment."""

from __future__ import annotations

import os

from zppo_mm.errors import ConfigError


def read_key(variable: str, where: str = "teacher.api_key_env") -> str:
    """Return the key in an environment variable; empty for an empty name.

    Args:
        variable: Its name.
        where: Configuration key that names it.

    Raises:
        ConfigError: The variable is not set, or holds what no header can.
    """
    key = os.environ.get(variable, "") if variable else ""
    if variable and not key:
        raise ConfigError(
            f"{where}: the environment has no {variable}, got none, expected the servers' key "
            "there; set it on every rank"
        )
    if not all("!" <= character <= "~" for character in key):
        raise ConfigError(
            f"{where}: the key in {variable} has a space, a line end or a character beyond ASCII "
            "(not shown), expected printable ASCII; a file read into the variable often leaves a "
            "line end"
        )
    return key
