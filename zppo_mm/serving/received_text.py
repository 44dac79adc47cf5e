"""Text that a server sent: valid, without the key, and on one line where it is shown."""

from __future__ import annotations

import html
import re
from urllib.parse import quote

from data.text import clean_text

HIDDEN = "***"
MAX_SHOWN_CHARS = 300
# What is read for the shown part: a page of an error may begin with much that is not shown,
# such as spaces.
MAX_READ_CHARS = 65_536
# A shorter key is no secret ("EMPTY" is a usual one), and hiding it would change right answers.
MIN_SECRET_CHARS = 8


class ReceivedText:
    """Makes a server's text fit to be kept and shown.

    Args:
        api_key: Hidden wherever the server repeats it; empty hides nothing.
    """

    def __init__(self, api_key: str = "") -> None:
        self._key = api_key if len(api_key) >= MIN_SECRET_CHARS else ""
        self._spelled = (
            re.compile("".join(map(_any_spelling, api_key)), re.IGNORECASE) if api_key else None
        )
        self._longest = len(api_key) * max(map(len, _spellings("&")))

    def kept(self, text: str) -> str:
        """Return a part of an answer: valid text, the key hidden if it is long enough to be one."""
        text = clean_text(text)
        return text.replace(self._key, HIDDEN) if self._key else text

    def kept_bytes(self, spelling: bytes) -> bytes:
        """Return a token's bytes, treated alike."""
        return spelling.replace(self._key.encode(), HIDDEN.encode()) if self._key else spelling

    def shown(self, text: str | bytes) -> str:
        """Return the beginning of a text for a message or a log: one line, nothing that a terminal
        obeys, no key in any spelling.
        """
        text = text[: MAX_READ_CHARS + 1]
        is_cut = len(text) > MAX_READ_CHARS
        line = " ".join(
            clean_text(text if isinstance(text, str) else text.decode("utf-8", "replace")).split()
        )
        if self._spelled is not None:
            line = self._spelled.sub(HIDDEN, line)
            line = line[: -self._longest] if is_cut else line  # the cut may have left a part of it
        return "".join(map(_printable, line[:MAX_SHOWN_CHARS]))[:MAX_SHOWN_CHARS]


def _spellings(character: str) -> set[str]:
    """Return how a character may be written in JSON, a page, an address or a Python literal."""
    number = ord(character)
    codes = {
        f"\\u{number:04x}",
        f"\\x{number:02x}",
        f"%{number:02x}",
        f"&#{number};",
        f"&#x{number:x};",
    }
    return {character, f"\\{character}", quote(character, safe=""), html.escape(character), *codes}


def _any_spelling(character: str) -> str:
    return f"(?:{'|'.join(sorted(map(re.escape, _spellings(character)), key=len, reverse=True))})"


def _printable(character: str) -> str:
    return (
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
    )
