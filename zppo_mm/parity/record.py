"""What the gate found, as a table for the log and as one line of `parity.jsonl`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from zppo_mm.observability.record_writer import Write, append_bytes
from zppo_mm.observability.sinks import append_line
from zppo_mm.parity.compare import Gap, Limit
from zppo_mm.parity.media import MediaCount
from zppo_mm.run_folder import RunFolder
from zppo_mm.text_table import text_table


@dataclass(frozen=True, slots=True)
class ModalityParity:
    """One modality.

    Attributes:
        modality: text, image, video or mixed.
        num_questions: Questions asked.
        media: Images and videos of their samples.
        media_in_prompt: Images and videos that their prompts show.
        placeholders: Placeholder tokens of their prompts.
        features: Rows of the vision tower.
        rollout: Training forward pass against the engine; `None` if nothing was compared, as in the
            next.
        source: Training forward pass against the source checkpoint.
    """

    modality: str
    num_questions: int
    media: int
    media_in_prompt: int
    placeholders: int
    features: int
    rollout: Gap | None
    source: Gap | None


@dataclass(frozen=True, slots=True)
class ParityRecord:
    """One comparison.

    Attributes:
        step: Steps trained before it; 0 before the first.
        dtype: Of the run's network.
        limit: How far the log-probs of the source checkpoint may be from the training forward
            pass's.
        rollout_limit: The same of the engine's.
        seconds: How long it took.
        modalities: Results.
        not_compared: Why the source checkpoint was not compared, or not with all responses; empty
            if it was.
        findings: What disagrees, in words.
    """

    step: int
    dtype: str
    limit: Limit
    rollout_limit: Limit
    seconds: float
    modalities: tuple[ModalityParity, ...]
    not_compared: str
    findings: tuple[str, ...]


def count_modality(
    modality: str,
    num_questions: int,
    counts: Sequence[MediaCount],
    rollout: Gap | None,
    source: Gap | None,
) -> ModalityParity:
    """Add up the media counts of a modality's questions."""
    return ModalityParity(
        modality=modality,
        num_questions=num_questions,
        media=sum(count.in_sample for count in counts),
        media_in_prompt=sum(count.in_prompt for count in counts),
        placeholders=sum(count.placeholders for count in counts),
        features=sum(count.features for count in counts),
        rollout=rollout,
        source=source,
    )


def write_record(folder: RunFolder, record: ParityRecord, append: Write = append_bytes) -> None:
    """Append the record to the run's `parity.jsonl`; numbers that are not finite become null."""
    append_line(folder.parity, _finite(asdict(record)), append)


def parity_table(record: ParityRecord) -> str:
    """Return the record as lines of text."""
    head = [
        "modality",
        "questions",
        "media",
        "in prompt",
        "placeholders",
        "features",
        "sampling max/mean/kl",
        "source max/mean/kl",
        "tokens",
    ]
    rows = []
    for row in record.modalities:
        counts = (row.num_questions, row.media, row.media_in_prompt, row.placeholders, row.features)
        num_tokens = row.rollout.num_tokens if row.rollout else 0
        gaps = (_cell(row.rollout), _cell(row.source))
        rows.append([row.modality, *map(str, counts), *gaps, str(num_tokens)])
    lines = [
        f"parity at step {record.step}, {record.dtype}, limit {_limits(record)}, "
        f"{record.seconds:.1f} s",
        text_table(head, rows),
    ]
    if record.not_compared:
        lines.append(f"source checkpoint not compared: {record.not_compared}")
    return "\n".join(lines)


def _limits(record: ParityRecord) -> str:
    if record.limit == record.rollout_limit:
        return _limit(record.limit)
    return f"{_limit(record.rollout_limit)} (sampling) and {_limit(record.limit)} (source)"


def _limit(limit: Limit) -> str:
    what = "a divergence" if limit.of_divergence else "a gap of any token"
    return f"{limit.value:g} nats for {what}"


def _cell(gap: Gap | None) -> str:
    return f"{gap.max:.1e} {gap.mean:.1e} {gap.kl:.1e}" if gap else "-"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
