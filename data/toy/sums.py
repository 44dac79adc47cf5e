r"""Easy sums as JSON lines, for language models that are too small to reason: which of two boxed
results is right?

The options are in the question in the form of an answer, so that a model without practice in
`\boxed{}` gets it right now and then.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.toy.question_files import check_counts, write_lines

LARGEST_TERM = 9
LARGEST_MISTAKE = 3
SOURCE = "sums"
# Terms, signs, mistakes and orders make a few thousand different questions; some are left so that
# drawing new ones stays quick.
MAX_QUESTIONS = 1000


def write_sums(
    out_dir: str | Path, num_train: int, num_held_out: int, seed: int = 0
) -> dict[str, int]:
    """Write train.jsonl and held_out.jsonl, which share no question; the same arguments give the
    same bytes.

    Args:
        out_dir: Made if it is missing; older files of these names are replaced.
        num_train: Questions to train on.
        num_held_out: Questions to evaluate on.
        seed: Of all draws.

    Returns:
        Number of questions by file name.

    Raises:
        DataError: Fewer than one question, or more than there are enough different ones for.
    """
    total = num_train + num_held_out
    check_counts(SOURCE, num_train, num_held_out, MAX_QUESTIONS)
    questions = dict(zip(range(total), _distinct_questions(seed), strict=False))
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, numbers in (("train", range(num_train)), ("held_out", range(num_train, total))):
        lines = [{"id": f"sums-{seed}-{number:04d}", **questions[number]} for number in numbers]
        write_lines(folder / f"{name}.jsonl", lines)
        counts[f"{name}.jsonl"] = len(lines)
    return counts


def _distinct_questions(seed: int) -> Iterator[dict[str, str]]:
    """Yield new questions without end."""
    draw = np.random.Generator(np.random.Philox(key=seed))
    seen: set[str] = set()
    while True:
        one, two = (int(term) for term in draw.integers(1, LARGEST_TERM + 1, 2))
        # The larger term comes first under a minus, so no result is negative; nor is a wrong one,
        # which then is too large instead.
        shown, result = (
            (f"{one} + {two}", one + two)
            if draw.random() < 0.5
            else (f"{max(one, two)} - {min(one, two)}", abs(one - two))
        )
        mistake = int(draw.integers(1, LARGEST_MISTAKE + 1))
        wrong = result - mistake if mistake <= result and draw.random() < 0.5 else result + mistake
        options = (result, wrong) if draw.random() < 0.5 else (wrong, result)
        text = (
            f"Which is right, {shown} = \\boxed{{{options[0]}}} or {shown} = "
            f"\\boxed{{{options[1]}}}?"
        )
        if text not in seen:
            seen.add(text)
            yield {"question": text, "answer": str(result), "answer_type": "math", "source": SOURCE}
