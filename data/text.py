"""Which text may enter: the one rule of all borders (data, shards, servers, files).

JSON can spell half a surrogate pair (`"\\ud83d"`), and Python keeps it in a string that no UTF-8
file, tokenizer or terminal takes. A NUL ends strings in C libraries and is allowed in no file name.
"""

from __future__ import annotations

import re
from pathlib import Path

from data.errors import DataError

REPLACEMENT = "\ufffd"

_INVALID = re.compile("[\0\ud800-\udfff]")


def is_valid_text(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8 and holds no NUL."""
    return _INVALID.search(text) is None


def clean_text(text: str) -> str:
    """Return valid text: two surrogates that make a pair become their character, an unpaired one
    and a NUL become U+FFFD.

    A text that is valid comes back unchanged, and a second pass changes nothing.
    """
    if is_valid_text(text):
        return text
    return (
        text.replace("\0", REPLACEMENT)
        .encode("utf-16-le", "surrogatepass")
        .decode("utf-16-le", "replace")
    )


def read_text_file(path: Path, where: str) -> str:
    """Return what a text file holds, without a byte-order mark, its lines ended by "\\n" alone.

    Args:
        path: The file.
        where: What it is, for the error.

    Raises:
        DataError: It cannot be read, or is not valid text.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(
            f"{where}: {path} cannot be read, got {error.strerror}, expected a text file; correct "
            "the path"
        ) from error
    except UnicodeDecodeError as error:
        problem = f"byte {error.object[error.start]:#04x} at {error.start}"
    else:
        if is_valid_text(text):
            return text.replace("\r\n", "\n").replace("\r", "\n")
        problem = "a NUL"
    raise DataError(
        f"{where}: {path} is not UTF-8 text, got {problem}, expected UTF-8; save it as such"
    )
