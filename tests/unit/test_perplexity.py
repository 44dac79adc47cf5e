"""The perplexity benchmark: token by token, which documents count, and the table by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.perplexity import document_losses, first_tokens, read_documents, report
from tests.support import tiny_families
from zppo_mm.bundled import STUDENT_DIR
from zppo_mm.rollout.tokenizer import load_tokenizer

# Nats a token, in float32; a batch and a single prefix are summed in another order.
MAX_DIFFERENCE = 1e-5


def test_losses_are_those_of_one_token_after_another(tmp_path: Path) -> None:
    folder, oracle = tiny_families.folder("llama", tmp_path / "model")
    tokens = torch.randint(0, 100, (3, 9), generator=torch.Generator().manual_seed(0))
    found = document_losses(folder, tokens, batch_size=2)
    for row, loss in zip(tokens, found, strict=True):
        naive = []
        for position in range(1, len(row)):
            with torch.inference_mode():
                logits = oracle(input_ids=row[None, :position]).logits[0, -1]
            naive.append(-float(torch.log_softmax(logits, -1)[row[position]]))
        assert loss == pytest.approx(sum(naive) / 8, abs=MAX_DIFFERENCE)


def test_short_documents_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one two three\nfour\n\n\nx\n\n\nfive six seven eight\n")
    documents = read_documents(path)
    assert documents == ["one two three\nfour", "x", "five six seven eight"]
    tokens = first_tokens(STUDENT_DIR, documents, 5)
    tokenizer = load_tokenizer(STUDENT_DIR)
    expected = [
        tokenizer.encode(text, add_special_tokens=False)[:5]
        for text in (documents[0], documents[2])
    ]
    assert tokens.tolist() == expected
    assert len(read_documents(None)) > 50


def test_the_table_by_hand() -> None:
    # The second model is 0.5 nats worse on every document, so its interval has no width.
    losses = np.array([[1.0, 2.0, 3.0], [1.5, 2.5, 3.5]])
    first, second = report(["before", "after"], losses).splitlines()[2:]
    assert first == f"| before | {math.exp(2):.3f} |  |"
    assert second == f"| after | {math.exp(2.5):.3f} | +0.5000 [+0.5000, +0.5000] |"
    # Documents that differ by 0, 0 and 0.3: draws of three have means from 0 to 0.3.
    line = report(["a", "b"], np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 1.3]])).splitlines()[3]
    assert line == f"| b | {math.exp(1.1):.3f} | +0.1000 [+0.0000, +0.3000] |"
