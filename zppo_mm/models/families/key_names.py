"""The spellings of keys in weight files that transformers reads, and the one spelling that is used
inside.
"""

from __future__ import annotations

import re

Renames = tuple[tuple[re.Pattern[str], str], ...]
"""Applied one after another, each at the beginning of a key and once."""


def _renames(*pairs: tuple[str, str]) -> Renames:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


# transformers puts the whole model's prefix before keys of a model that was saved without its head,
# and takes it away where it is twice; its versions 5.10 to 5.23 wrote an inner `model.` too
# many.
_HEAD = (r"model\.lm_head\.", "lm_head.")
_INNER_MODEL = (r"(model\.language_model|language_model\.model)\.model\.", "model.language_model.")
_WITHOUT_MODEL = (r"(language_model|visual)\.", r"model.\1.")
TEXT = _renames(
    (r"model\.model\.", "model."), _HEAD, (r"(embed_tokens|layers|norm)\.", r"model.\1.")
)
"""Of a text-only network: `model.*` and `lm_head.*`."""
TEXT_OF_TOWER = _renames((r"model\.language_model\.(model\.)?", "model.")) + TEXT
"""Of a text-only network that may be read from a folder with a tower."""
TOWER = _renames(
    _INNER_MODEL, (r"model\.model\.(language_model|visual)\.", r"model.\1."), _WITHOUT_MODEL, _HEAD
)
"""Of a network with a tower: `model.language_model.*`, `model.visual.*` and `lm_head.*`."""
FLAT_TOWER = _renames(
    _INNER_MODEL,
    (r"model\.model\.", "model.language_model."),
    _WITHOUT_MODEL,
    (r"model\.(?!language_model\.|visual\.)", "model.language_model."),
)
"""The same of a network whose language model was at the top before transformers 5: `model.*`
beside `visual.*`.
"""


def usual_name(key: str, renames: Renames) -> str:
    """Return the name of a key in transformers' model."""
    for pattern, replacement in renames:
        key = re.sub(pattern, replacement, key, count=1) if pattern.match(key) else key
    return key
