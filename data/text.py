"""Which text may enter: the one rule of all borders (data, shards, servers, files).

JSON can spell half a surrogate pair (`"\\ud83d"`), and Python keeps it in a string that no UTF-8 file, tokenizer or terminal takes. A NUL
ends strings in C libraries and can stand in no file name.
"""

from __future__ import annotations

import re

REPLACEMENT = "\ufffd"

_INVALID = re.compile("[\0\ud800-\udfff]")


def is_valid_text(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8 and holds no NUL."""
    return _INVALID.search(text) is None


def clean_text(text: str) -> str:
    """Return valid text: two surrogates that make a pair become their character, an unpaired one and a NUL become U+FFFD.

    A text that is valid comes back unchanged, and a second pass changes nothing.
    """
    if is_valid_text(text):
        return text
    return text.replace("\0", REPLACEMENT).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
