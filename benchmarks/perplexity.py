"""Perplexity of language models on plain text, and by how much each differs from the first: a
measure of what training has made a model forget.

python benchmarks/perplexity.py MODEL [RUN/hf ...]

The text is Python's own reference manual, which every Python has (`pydoc_data.topics`; 79 pages in
3.11), or a file whose documents are divided by two blank lines. Of each document the first tokens
are scored, and those that have fewer are left out. All models are scored on the same tokens. The
interval is that of the choice of documents, by the bootstrap.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from zppo_mm.comparison.intervals import bootstrap_means, interval

FloatArray = npt.NDArray[np.float64]


def read_documents(text_file: Path | None) -> list[str]:
    """Return the documents of a file, or the pages of Python's manual."""
    if text_file is None:
        return [topics[name] for name in sorted(topics)]
    return [each.strip() for each in text_file.read_text(encoding="utf-8").split("\n\n\n")]


def first_tokens(folder: Path, documents: Sequence[str], num_tokens: int) -> torch.Tensor:
    """Return `[documents, num_tokens]`: the first tokens of those that have as many."""
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    tokenizer.model_max_length = 1 << 62
    tokens = [tokenizer.encode(text, add_special_tokens=False) for text in documents]
    return torch.tensor([ids[:num_tokens] for ids in tokens if len(ids) >= num_tokens])


def document_losses(folder: Path, tokens: torch.Tensor, batch_size: int = 4) -> FloatArray:
    """Return `[documents]`: the mean of -log p of every token but the first, in nats.

    Args:
        folder: Hugging Face folder.
        tokens: `[documents, tokens]`.
        batch_size: Documents at once.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, trust_remote_code=False
    ).eval()
    losses = []
    with torch.inference_mode():
        for batch in tokens.split(batch_size):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
            nats = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
            )
            losses.append(nats.view(len(batch), -1).mean(1).double().numpy())
    return np.concatenate(losses)


def report(names: Sequence[str], losses: FloatArray) -> str:
    """Return a table: perplexity, and the difference to the first model in nats a token with its
    95 % interval.

    Args:
        names: Of the models.
        losses: `[models, documents]`.
    """
    means, draws = losses.mean(axis=1), bootstrap_means([losses])
    lines = ["| model | perplexity | nats a token above the first [95 %] |", "|---|---|---|"]
    for row, name in enumerate(names):
        change = interval(means[row] - means[0], draws[:, row] - draws[:, 0])
        shown = f"{change.value:+.4f} [{change.low:+.4f}, {change.high:+.4f}]" if row else ""
        lines.append(f"| {name} | {math.exp(means[row]):.3f} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    """Score every model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models", type=Path, nargs="+", help="Hugging Face folders of one tokenizer"
    )
    parser.add_argument("--text", type=Path, help="UTF-8 file (default: Python's manual)")
    parser.add_argument(
        "--tokens", type=int, default=256, help="of each document (default: %(default)s)"
    )
    arguments = parser.parse_args()
    documents = read_documents(arguments.text)
    tokens = first_tokens(arguments.models[0], documents, arguments.tokens)
    if not len(tokens):
        parser.error(f"no document has {arguments.tokens} tokens, expected one; lower --tokens")
    digest = hashlib.sha256("\n".join(documents).encode()).hexdigest()[:12]
    print(f"{tokens.numel():,} tokens of {len(tokens)} documents, sha256 of the text {digest}")
    losses = np.stack([document_losses(folder, tokens) for folder in arguments.models])
    print(report([str(folder) for folder in arguments.models], losses))


if __name__ == "__main__":
    main()
