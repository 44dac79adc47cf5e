"""Escapes tags and special tokens in text that models and questions hold, still readable."""

from __future__ import annotations

import re
from collections.abc import Iterable

# A "<" that could open a tag or a special token of any tokenizer; "x <5", "<=", "<-" and "<<" stay
# as they are.
_TAG_START = re.compile(r"<(?=[^\s0-9=<\-.(\\$])")
_BREAKABLE = re.compile(r"\S(?=\S)")

# Special tokens of the common model families. A tag is one by its form (anything but a plain word,
# so that families not thought of are met too), or by its name; plain words such as <think> and
# <answer> stay: instructions name them.
_TAGS = (
    "s|unk|pad|bos|eos|eoa|eod|eoh|eop|eot|sop|sep|cls|mask|endoftext|"
    "image|img|video|audio|speech|patch|box|ref|quad|role|system|user|assistant"
)
_BRACKETS = (
    "INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS|TOOL_CONTENT|ARGS|CALL_ID|THINK|MODEL_SETTINGS|"
    "IMG|IMG_BREAK|IMG_END|AUDIO|BEGIN_AUDIO|TRANSCRIBE|STREAMING_PAD|REFERENCE_FILE|REFERENCE_DOC_[0-9]+|CONTROL_[0-9]+|"
    "control_[0-9]+|UNUSED_TOKEN_[0-9]+|unused[0-9]+|PREFIX|SUFFIX|MIDDLE|BOS|EOS|EOT|EOD|PAD|UNK|CLS|SEP|MASK|[gs]MASK"
)
_SPECIAL_TOKEN = re.compile(
    # <|im_end|>, <end_of_turn>, <<SYS>>, <unused5>, <BOS_TOKEN>, <seed:bos>, ]<]image[>[; </s>,
    # <image>
    rf"<(?=[a-z/]{{0,256}}[^\s<>a-z/][^\s<>]{{0,256}}>|/?(?:{_TAGS})>)"
    # [INST], [/INST], [gMASK], and [|endofturn|]
    rf"|\[(?=/?(?:{_BRACKETS})\]|\|[^\s\[\]|]+\|\])"
    # ]~b], ]~!b[, [e~[, ]!p~[
    r"|[\]\[](?=~!?[a-z]+[\]\[]|e~\[|![a-z]+~\[)"
    # >>TITLE<<
    r"|>(?=>[A-Z]+<<)"
)


def is_breakable(marker: str) -> bool:
    """Return whether `escape_special_tokens` can break a marker: it needs two characters side by
    side without a space.
    """
    return _BREAKABLE.search(marker) is not None


def break_special_tokens(text: str) -> str:
    """Return a prompt for a model whose tokenizer cannot be asked, with what any common family
    reads as a special token broken.

    `<|im_end|>` becomes `< |im_end|>`, `[/INST]` becomes `[ /INST]`; a second pass changes nothing.
    """
    return _SPECIAL_TOKEN.sub(r"\g<0> ", text)


def escape_special_tokens(text: str, markers: Iterable[str] = ()) -> str:
    """Return the text with every tag and special token broken by a space: `<|im_end|>` becomes `<
    |im_end|>`.

    Spaces are only put in, nothing is taken out. So pieces around a broken tag cannot join to a new
    one (as `<|im_<|im_end|>end|>` would after a removal), and a second pass changes nothing.

    Args:
        text: Whatever a model wrote.
        markers: Further strings that must not appear, such as the lines around a candidate or a
            tokenizer's special tokens. Those that cannot be broken (see `is_breakable`) are left
            alone.
    """
    text = _TAG_START.sub("< ", text)
    breakable = [
        (marker, _BREAKABLE.sub(r"\g<0> ", marker, count=1))
        for marker in markers
        if is_breakable(marker)
    ]
    # Every replacement takes away one pair of neighbours without a space between them: the loop
    # ends.
    while any(marker in text for marker, _ in breakable):
        for marker, broken in breakable:
            text = text.replace(marker, broken)
    return text
