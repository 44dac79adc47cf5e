"""Checks of a folder's token ids before the first prompt: embedding, tokenizer and stop tokens
agree.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from zppo_mm.errors import ConfigError

logger = logging.getLogger(__name__)

GENERATION_FILE = "generation_config.json"
_NUM_NAMED = 3


def num_embedding_rows(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens the network of a config.json knows; `None` if the file describes
    none.
    """
    inner = config.get("text_config")
    rows = inner.get("vocab_size") if isinstance(inner, dict) else config.get("vocab_size")
    return rows if isinstance(rows, int) else None


def check_ids(folder: Path, tokenizer: Any, needed: Collection[int], num_rows: int) -> None:
    """Check that the embedding has a row for every token that a prompt or a response can contain.

    A special token that neither the chat template nor a response uses is never made from text; one
    that the embedding does not know, such as a padding token that was added later, is only warned
    of.

    Args:
        folder: Of the model.
        tokenizer: transformers'.
        needed: Ids that the chat template, media and stop tokens bring.
        num_rows: Of the embedding.

    Raises:
        ConfigError: A token that can occur is beyond the embedding.
    """
    beyond = {
        token_id: token for token, token_id in tokenizer.get_vocab().items() if token_id >= num_rows
    }
    beyond |= {
        token_id: "?" for token_id in needed if token_id >= num_rows and token_id not in beyond
    }
    added = tokenizer.added_tokens_decoder
    unused = {
        token_id
        for token_id in beyond
        if token_id in added and added[token_id].special and token_id not in needed
    }
    wrong = sorted(beyond.keys() - unused)
    if wrong:
        raise ConfigError(
            f"{folder}: the tokenizer has tokens beyond the embedding, got "
            f"{_named(wrong, beyond)}, expected ids below {num_rows}, the vocab_size of "
            "config.json; use the tokenizer that belongs to the model, or a model whose embedding "
            "was enlarged for it"
        )
    if unused:
        logger.warning(
            "%s: special tokens beyond the embedding's %d rows are never used here: %s",
            folder,
            num_rows,
            _named(sorted(unused), beyond),
        )


def configured_stops(
    folder: Path, generation: Mapping[str, Any], config: Mapping[str, Any], tokenizer: Any
) -> tuple[int, ...]:
    """Return the stop tokens that a folder names: of generation_config.json, else of config.json,
    else the tokenizer's.

    Args:
        folder: Of the model.
        generation: The parsed generation_config.json; empty if there is none.
        config: The parsed config.json.
        tokenizer: transformers'.

    Raises:
        ConfigError: There is none, or what is named is no token.
    """
    inner = config.get("text_config")
    named = (
        generation.get("eos_token_id"),
        config.get("eos_token_id"),
        inner.get("eos_token_id") if isinstance(inner, dict) else None,
    )
    stop = next(
        (one for one in (*named, tokenizer.eos_token_id) if one is not None and one != []), None
    )
    if stop is None:
        raise ConfigError(
            f"{folder}: no stop token, got none, expected eos_token_id in {GENERATION_FILE} or the "
            "tokenizer; add it"
        )
    stops = stop if isinstance(stop, list) else [stop]
    if not all(type(token) is int and token >= 0 for token in stops):
        raise ConfigError(
            f"{folder}: eos_token_id is no token, got {stop!r}, expected an id or a list of ids; "
            "correct the file"
        )
    return tuple(dict.fromkeys(stops))


def stops_with_turn_end(
    folder: Path, stops: tuple[int, ...], turn_end: int | None, num_rows: int | None
) -> tuple[int, ...]:
    """Return the stop tokens, that first with which the chat template ends an answer.

    It is the one that is written after an answer, and the one that a trained model gives. A folder
    that does not name it would have every answer run to its limit.

    Args:
        folder: Of the model.
        stops: As the folder names them.
        turn_end: What the chat template puts after an answer; `None` if that is no special token.
        num_rows: Of the embedding, if the folder describes one.

    Raises:
        ConfigError: No stop token is left that the model can give.
    """
    beyond = [token for token in stops if num_rows is not None and token >= num_rows]
    if beyond:
        logger.warning(
            "%s: stop tokens beyond the embedding's %d rows never come: %s",
            folder,
            num_rows,
            beyond,
        )
        stops = tuple(token for token in stops if token not in beyond)
    if turn_end is None and not stops:
        raise ConfigError(
            f"{folder}: no answer could end, got the stop tokens {beyond}, expected ids below "
            f"{num_rows}, the vocab_size of config.json; correct eos_token_id in {GENERATION_FILE}"
        )
    if turn_end is None:
        logger.warning(
            "%s: the chat template shows no special token that ends an answer; %s alone end one",
            folder,
            list(stops),
        )
        return stops
    if turn_end not in stops:
        logger.warning(
            "%s: eos_token_id lacks %d, with which the chat template ends an answer, got %s; it "
            "ends answers too; add it to %s",
            folder,
            turn_end,
            list(stops),
            GENERATION_FILE,
        )
    return (turn_end, *(token for token in stops if token != turn_end))


def _named(ids: Collection[int], names: Mapping[int, str]) -> str:
    """Return the first few tokens and how many more there are."""
    first = ", ".join(f"{names[token_id]!r} ({token_id})" for token_id in list(ids)[:_NUM_NAMED])
    return first + (f" and {len(ids) - _NUM_NAMED} more" if len(ids) > _NUM_NAMED else "")
