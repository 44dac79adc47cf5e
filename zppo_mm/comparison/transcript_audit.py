"""What a run's transcripts say of its reformulated prompts: do the candidates give themselves away,
and are they what they stand for?
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from zppo_mm.accuracy import accuracy_of, is_correct
from zppo_mm.comparison.cells import Table
from zppo_mm.comparison.intervals import Estimate, fraction_interval
from zppo_mm.errors import ConfigError
from zppo_mm.methods import PLAIN_KINDS
from zppo_mm.observability.audit import comparable_answer, num_matches
from zppo_mm.report.run_record import read_lines
from zppo_mm.rewards.boxes import final_answer
from zppo_mm.rewards.mathematics import compare
from zppo_mm.run_folder import RunFolder, files_by_step

Record = Mapping[str, Any]
"""One group of a transcript."""


@dataclass(frozen=True, slots=True)
class Proportion:
    """How many of how many."""

    count: int
    total: int

    @property
    def estimate(self) -> Estimate | None:
        """The fraction with its binomial 95 % interval; rollouts of one prompt are taken for
        independent, which they are not quite.
        """
        return fraction_interval(self.count, self.total)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Characters of candidates."""

    mean: float
    median: float


@dataclass(frozen=True, slots=True)
class TranscriptAudit:
    """Counts over some steps of a run. Rollouts that were not graded are no part of it.

    Attributes:
        num_steps: Transcripts read.
        groups: By kind, whatever kinds there are.
        bcq_accuracy: BCQ rollouts that are right.
        bcq_plain_accuracy: Plain rollouts of the same questions in the same steps that are right.
        bcq_right: BCQ rollouts whose answer equals the right candidate's.
        bcq_wrong: The wrong candidate's.
        bcq_neither: Another answer than both.
        bcq_none: No boxed answer.
        first: BCQ answers equal to the first candidate's, of those that equal one of two different
            ones.
        right_first: BCQ rollouts that are right where the right candidate is the first.
        right_second: The same where it is the second.
        right_longer: BCQ prompts whose right candidate has more characters, of those with
            candidates of different length.
        right_length: Characters of the right candidates of BCQ prompts.
        wrong_length: Of the wrong ones.
        ncq_accuracy: NCQ rollouts that are right.
        ncq_plain_accuracy: Plain rollouts of the same questions in the same steps that are right.
        ncq_listed: NCQ rollouts whose answer equals one listed as wrong.
        ncq_other: Another answer.
        ncq_none: No boxed answer.
        kept: Candidates of BCQ and NCQ prompts whose text ends in the recorded answer, or boxes
            none where none is recorded.
        changed: In another one.
        lost: Boxes none, but one is recorded.
    """

    num_steps: int
    groups: Mapping[str, int]
    bcq_accuracy: Proportion
    bcq_plain_accuracy: Proportion
    bcq_right: Proportion
    bcq_wrong: Proportion
    bcq_neither: Proportion
    bcq_none: Proportion
    first: Proportion
    right_first: Proportion
    right_second: Proportion
    right_longer: Proportion
    right_length: Lengths | None
    wrong_length: Lengths | None
    ncq_accuracy: Proportion
    ncq_plain_accuracy: Proportion
    ncq_listed: Proportion
    ncq_other: Proportion
    ncq_none: Proportion
    kept: Proportion
    changed: Proportion
    lost: Proportion


def audit_run(folder: Path, first_step: int = 0, last_step: int | None = None) -> TranscriptAudit:
    """Audit the transcripts of a run.

    Args:
        folder: A run's folder.
        first_step: First step that counts.
        last_step: Last one; `None` is the last there is.

    Raises:
        ConfigError: There is no transcript of such a step.
    """
    paths = files_by_step(RunFolder(folder).transcripts)
    chosen = [
        path
        for step, path in paths.items()
        if first_step <= step and (last_step is None or step <= last_step)
    ]
    if not chosen:
        there = f"steps {min(paths)} to {max(paths)}" if paths else "no transcripts"
        raise ConfigError(
            f"{folder}: nothing to audit, got {there}, expected transcripts of the steps asked "
            "for; check folder and --steps"
        )
    return _audit(len(chosen), [record for path in chosen for record in read_lines(path)])


def _audit(num_steps: int, records: Sequence[Record]) -> TranscriptAudit:
    bcq, ncq = ([record for record in records if record["kind"] == kind] for kind in ("bcq", "ncq"))
    pairs = [
        record
        for record in bcq
        if sorted(candidate["correct"] for candidate in record["candidates"]) == [False, True]
    ]
    right, wrong = (
        [len(_candidate(record, correct)["text"]) for record in pairs] for correct in (True, False)
    )
    candidates = [candidate for record in (*bcq, *ncq) for candidate in record["candidates"]]
    fidelity = Counter(map(faithfulness, candidates))
    return TranscriptAudit(
        num_steps=num_steps,
        groups=dict(sorted(Counter(str(record["kind"]) for record in records).items())),
        bcq_accuracy=_accuracy(bcq),
        bcq_plain_accuracy=_accuracy(_plain_of(bcq, records)),
        bcq_right=_matches(bcq, [True]),
        bcq_wrong=_matches(bcq, [False]),
        bcq_neither=_others(bcq),
        bcq_none=_unparsed(bcq),
        first=_first(pairs),
        right_first=_accuracy(record for record in pairs if record["candidates"][0]["correct"]),
        right_second=_accuracy(record for record in pairs if record["candidates"][1]["correct"]),
        right_longer=Proportion(
            sum(r > w for r, w in zip(right, wrong, strict=True)),
            sum(r != w for r, w in zip(right, wrong, strict=True)),
        ),
        right_length=_lengths(right),
        wrong_length=_lengths(wrong),
        ncq_accuracy=_accuracy(ncq),
        ncq_plain_accuracy=_accuracy(_plain_of(ncq, records)),
        ncq_listed=_matches(ncq, [False]),
        ncq_other=_others(ncq),
        ncq_none=_unparsed(ncq),
        kept=Proportion(fidelity["kept"], len(candidates)),
        changed=Proportion(fidelity["changed"], len(candidates)),
        lost=Proportion(fidelity["lost"], len(candidates)),
    )


def faithfulness(candidate: Record) -> Literal["kept", "changed", "lost"]:
    """Compare the answer that a candidate's text boxes last with the recorded answer of the
    response it stands for, as the grader would.
    """
    boxed, answer = final_answer(candidate["text"]), candidate["answer"]
    if boxed is None:
        return "kept" if answer is None else "lost"
    same = answer is not None and (
        comparable_answer(boxed) == comparable_answer(answer) or compare(boxed, answer) is True
    )
    return "kept" if same else "changed"


def _graded(record: Record) -> list[Record]:
    return [rollout for rollout in record["rollouts"] if rollout["reward"] is not None]


def _answers(record: Record) -> list[str | None]:
    return [rollout["parsed"] for rollout in _graded(record)]


def _num_rollouts(records: Iterable[Record]) -> int:
    return sum(len(_graded(record)) for record in records)


def _accuracy(records: Iterable[Record]) -> Proportion:
    accuracies = [
        accuracy_of(rollout["reward"], rollout.get("parts", {}))  # older records have no parts
        for record in records
        for rollout in _graded(record)
    ]
    return Proportion(sum(map(is_correct, accuracies)), len(accuracies))


def _plain_of(reformulated: Iterable[Record], records: Iterable[Record]) -> Iterator[Record]:
    """Yield the plain groups of the same questions in the same steps."""
    asked = {(record["step"], record["question_id"]) for record in reformulated}
    return (
        record
        for record in records
        if record["kind"] in PLAIN_KINDS and (record["step"], record["question_id"]) in asked
    )


def _matches(records: Sequence[Record], correct: Sequence[bool]) -> Proportion:
    """Count the rollouts whose answer equals that of a candidate of the given correctness."""
    count = sum(num_matches(_answers(record), _shown(record, correct)) for record in records)
    return Proportion(count, _num_rollouts(records))


def _others(records: Sequence[Record]) -> Proportion:
    """Count the rollouts with an answer that equals no candidate's."""
    matched, unparsed = _matches(records, [True, False]), _unparsed(records)
    return Proportion(matched.total - matched.count - unparsed.count, matched.total)


def _unparsed(records: Sequence[Record]) -> Proportion:
    return Proportion(
        sum(answer is None for record in records for answer in _answers(record)),
        _num_rollouts(records),
    )


def _first(pairs: Iterable[Record]) -> Proportion:
    first = total = 0
    for record in pairs:
        shown = [candidate["answer"] for candidate in record["candidates"]]
        if None in shown or comparable_answer(shown[0]) == comparable_answer(shown[1]):
            continue
        first += num_matches(_answers(record), shown[:1])
        total += num_matches(_answers(record), shown)
    return Proportion(first, total)


def _shown(record: Record, correct: Sequence[bool]) -> list[str | None]:
    return [
        candidate["answer"] for candidate in record["candidates"] if candidate["correct"] in correct
    ]


def _candidate(record: Record, correct: bool) -> Record:
    return next(candidate for candidate in record["candidates"] if candidate["correct"] == correct)


def _lengths(lengths: Sequence[int]) -> Lengths | None:
    return Lengths(statistics.fmean(lengths), statistics.median(lengths)) if lengths else None


ROWS: Mapping[str, str] = {
    "bcq_accuracy": "BCQ: right",
    "bcq_plain_accuracy": "the same questions, plain: right",
    "bcq_right": "BCQ: equals the right candidate's answer",
    "bcq_wrong": "BCQ: equals the wrong candidate's answer",
    "bcq_neither": "BCQ: another answer",
    "bcq_none": "BCQ: no answer",
    "first": "BCQ: of answers equal to a candidate's, the first one's",
    "right_first": "BCQ: right where the right candidate is first",
    "right_second": "BCQ: right where it is second",
    "right_longer": "BCQ: right candidate longer than the wrong one",
    "ncq_accuracy": "NCQ: right",
    "ncq_plain_accuracy": "the same questions, plain: right",
    "ncq_listed": "NCQ: repeats an answer listed as wrong",
    "ncq_other": "NCQ: another answer",
    "ncq_none": "NCQ: no answer",
    "kept": "candidates that end in the recorded answer",
    "changed": "candidates that end in another answer",
    "lost": "candidates that lost their answer",
}
"""What the table calls each fraction."""


def audit_table(audits: Mapping[str, TranscriptAudit]) -> Table:
    """Return the audits of runs side by side: percent with intervals and counts, and characters."""
    rows = [("steps", *(str(audit.num_steps) for audit in audits.values()))]
    kinds = sorted({kind for audit in audits.values() for kind in audit.groups})
    rows += [
        (f"groups: {kind}", *(str(audit.groups.get(kind, 0)) for audit in audits.values()))
        for kind in kinds
    ]
    rows += [
        (text, *(_cell(getattr(audit, name)) for audit in audits.values()))
        for name, text in ROWS.items()
    ]
    for name in ("right", "wrong"):
        lengths = [getattr(audit, f"{name}_length") for audit in audits.values()]
        cells = [f"{length.mean:.0f} ({length.median:.0f})" if length else "" for length in lengths]
        rows.append((f"BCQ: characters of the {name} candidate, mean (median)", *cells))
    note = (
        "Fractions in percent with 95 % intervals and counts; rollouts of one prompt are taken for "
        "independent."
    )
    return Table("Audit", note, ("", *audits), tuple(rows))


def as_json(audit: TranscriptAudit) -> dict[str, Any]:
    """Return an audit as JSON types, every fraction with its interval."""
    record = asdict(audit)
    for name in ROWS:
        fraction: Proportion = getattr(audit, name)
        record[name] |= (
            asdict(fraction.estimate)
            if fraction.estimate
            else {"value": None, "low": None, "high": None}
        )
    return record


def _cell(fraction: Proportion) -> str:
    estimate = fraction.estimate
    if estimate is None:
        return ""
    return (
        f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}] "
        f"{fraction.count}/{fraction.total}"
    )
