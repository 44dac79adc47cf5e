"""A model folder's tokenizer: loading it, its special tokens, and the bytes of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from zppo_mm.errors import ConfigError
from zppo_mm.experience import NO_TOKEN

_NO_LIMIT = 1 << 62


def load_tokenizer(folder: Path) -> Any:
    """Return a folder's tokenizer; no code of the folder is run.

    Raises:
        ConfigError: It cannot be loaded.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        # The tokenizers library raises bare exceptions.
        raise ConfigError(
            f"{folder}: the tokenizer cannot be loaded, got {type(error).__name__}: "
            f"{' '.join(str(error).split())}, expected files of a Hugging Face tokenizer; copy "
            "them from the original model folder"
        ) from error
    # Folders have any value here; data.max_prompt_tokens bounds a prompt.
    tokenizer.model_max_length = _NO_LIMIT
    return tokenizer


def special_ids(folder: Path, tokenizer: Any, media_tokens: Sequence[int]) -> dict[str, int]:
    """Return the special tokens by text: those the tokenizer flags as special, and the media
    tokens in any case.
    """
    added = tokenizer.added_tokens_decoder.items()
    special = {str(token.content): int(token_id) for token_id, token in added if token.special}
    special |= {
        str(tokenizer.convert_ids_to_tokens(token)): token
        for token in media_tokens
        if token != NO_TOKEN
    }
    if not special:
        raise ConfigError(
            f"{folder}: the tokenizer has no special tokens, got none, expected at least "
            "a stop token; add them"
        )
    return special


def token_bytes(folder: Path, tokenizer: Any) -> dict[bytes, int]:
    """Return the ids of all tokens by their bytes; of equals an added token, which tokenising finds
    first.

    Raises:
        ConfigError: The tokenizer is not of the byte-level kind.
    """
    added = {
        int(token_id): str(token.content)
        for token_id, token in tokenizer.added_tokens_decoder.items()
    }
    plain = {
        token: token_id
        for token, token_id in tokenizer.get_vocab().items()
        if token_id not in added
    }
    alphabet = _byte_alphabet()
    foreign = next((token for token in plain if not alphabet.keys() >= set(token)), None)
    if foreign is not None:
        raise ConfigError(
            f"{folder}: a server's tokens cannot be found in this tokenizer, got the "
            f"entry {foreign!r}, expected a byte-level vocabulary; distil from a teacher in "
            "this process"
        )
    spelled = {
        bytes(alphabet[character] for character in token): token_id
        for token, token_id in plain.items()
    }
    return spelled | {text.encode(): token_id for token_id, text in added.items()}


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character of a byte-level vocabulary: printable bytes are their own
    characters, the others follow from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }
