"""Makes text that a model wrote inert inside a prompt, still readable."""

from __future__ import annotations

import re
from collections.abc import Iterable

# A "<" that could open a tag or a special token of any tokenizer; "x <5", "<=", "<-" and "<<" stay as they are.
_TAG_START = re.compile(r"<(?=[^\s0-9=<\-.(\\$])")
_BREAKABLE = re.compile(r"\S(?=\S)")


def is_breakable(marker: str) -> bool:
    """Return whether `neutralise` can break a marker: it needs two characters side by side without a space."""
    return _BREAKABLE.search(marker) is not None


def neutralise(text: str, markers: Iterable[str] = ()) -> str:
    """Return the text with every tag and special token broken by a space: `<|im_end|>` becomes `< |im_end|>`.

    Spaces are only put in, nothing is taken out. So pieces around a broken tag cannot join to a new one (as `<|im_<|im_end|>end|>`
    would after a removal), and a second pass changes nothing.

    Args:
        text: Whatever a model wrote.
        markers: Further strings that must not appear, such as the lines around a candidate or a tokenizer's special tokens.
            Those that cannot be broken (see `is_breakable`) are left alone.
    """
    text = _TAG_START.sub("< ", text)
    breakable = [(marker, _BREAKABLE.sub(r"\g<0> ", marker, count=1)) for marker in markers if is_breakable(marker)]
    # Every replacement takes away one pair of neighbours without a space between them: the loop ends.
    while any(marker in text for marker, _ in breakable):
        for marker, broken in breakable:
            text = text.replace(marker, broken)
    return text
