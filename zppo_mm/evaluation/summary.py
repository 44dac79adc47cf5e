"""Answers to numbers: overall, per source, per modality, per answer type; as a table too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zppo_mm.evaluation.answers import AnsweredQuestion
from zppo_mm.evaluation.estimators import Estimate, estimate, ks_up_to, pass_at_k
from zppo_mm.text_table import text_table


@dataclass(frozen=True, slots=True)
class Part:
    """Numbers of some of the questions.

    Attributes:
        num_questions: Questions with a graded response.
        num_responses: Graded responses.
        num_ungraded: Responses that could not be graded; the numbers below leave them out.
        pass_at: By k. A question with fewer than k graded responses is in no pass@k.
        truncated: Fraction of responses that met the length limit.
        unparsed: Fraction of responses without a boxed answer.
        response_tokens: Mean length of a response.
        reward: Mean reward.
        parts: Mean of every part that a reward function names, over the responses that have it.
    """

    num_questions: int
    num_responses: int
    num_ungraded: int
    pass_at: dict[int, Estimate]
    truncated: float
    unparsed: float
    response_tokens: float
    reward: float
    parts: dict[str, float]


@dataclass(frozen=True, slots=True)
class Summary:
    """The numbers of an evaluation.

    Attributes:
        num_questions: Questions that were answered.
        num_skipped: Rows and questions that were not, for whatever reason.
        skipped_fraction: Of all of both.
        skipped: They by reason.
        num_too_long: Answered questions whose prompt is longer than those that are trained on.
        overall: Over all answered questions.
        by_source: By data source; so the next two.
    """

    num_questions: int
    num_skipped: int
    skipped_fraction: float
    skipped: dict[str, int]
    num_too_long: int
    overall: Part
    by_source: dict[str, Part]
    by_modality: dict[str, Part]
    by_answer_type: dict[str, Part]


def summarise_answers(
    answers: Sequence[AnsweredQuestion],
    skipped_before: Mapping[str, int],
    seed: int,
    max_prompt_tokens: int,
) -> Summary:
    """Return the numbers.

    Args:
        answers: Of all questions of the evaluation, those that could not be asked among them.
        skipped_before: What never became a question that can be asked, by reason.
        seed: Of the resampling.
        max_prompt_tokens: Of training. Longer questions are asked all the same.
    """
    answered = [each for each in answers if not each.skipped]
    skipped = Counter(skipped_before) + Counter(each.skipped for each in answers if each.skipped)
    num_skipped = sum(skipped.values())
    return Summary(
        num_questions=len(answered),
        num_skipped=num_skipped,
        skipped_fraction=num_skipped / max(1, num_skipped + len(answered)),
        skipped=dict(sorted(skipped.items())),
        num_too_long=sum(each.num_prompt_tokens > max_prompt_tokens for each in answered),
        overall=_part(answered, seed, "overall"),
        by_source=_parts(answered, [each.source for each in answered], seed, "source"),
        by_modality=_parts(answered, [each.modality for each in answered], seed, "modality"),
        by_answer_type=_parts(
            answered, [each.answer_type for each in answered], seed, "answer_type"
        ),
    )


def _parts(
    answers: Sequence[AnsweredQuestion], names: Sequence[str], seed: int, kind: str
) -> dict[str, Part]:
    return {
        name: _part(
            [each for each, its in zip(answers, names, strict=True) if its == name],
            seed,
            kind,
            name,
        )
        for name in sorted(set(names))
    }


def _part(answers: Sequence[AnsweredQuestion], seed: int, *path: str) -> Part:
    graded = [each.graded for each in answers]
    responses = [response for group in graded for response in group]
    pass_at = {}
    for k in ks_up_to(max(map(len, graded), default=0)) if responses else []:
        values = [
            pass_at_k(len(group), each.num_correct, k)
            for each, group in zip(answers, graded, strict=True)
            if len(group) >= k
        ]
        pass_at[k] = estimate(values, seed, *path, k)
    return Part(
        num_questions=len(answers),
        num_responses=len(responses),
        num_ungraded=sum(len(each.responses) for each in answers) - len(responses),
        pass_at=pass_at,
        truncated=_mean([response.finish_reason == "length" for response in responses]),
        unparsed=_mean([response.parsed is None for response in responses]),
        response_tokens=_mean([response.num_tokens for response in responses]),
        reward=_mean([response.reward for response in responses if response.reward is not None]),
        parts={
            name: _mean([response.parts[name] for response in responses if name in response.parts])
            for name in sorted({name for response in responses for name in response.parts})
        },
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def summary_table(summary: Summary) -> str:
    """Return the numbers as aligned text, one line per part of the questions."""
    parts = {"all": summary.overall}
    for title, some in (
        ("source", summary.by_source),
        ("modality", summary.by_modality),
        ("answer type", summary.by_answer_type),
    ):
        parts |= {f"{title} {name or '(none)'}": part for name, part in some.items()}
    ks = list(summary.overall.pass_at)
    head = ["", "questions", *(f"pass@{k} [95 %]" for k in ks), "truncated", "unparsed", "tokens"]
    rows = []
    for name, part in parts.items():
        shown = [_shown(part.pass_at.get(k)) for k in ks]
        others = [f"{part.truncated:.1%}", f"{part.unparsed:.1%}", f"{part.response_tokens:.0f}"]
        rows.append([name, str(part.num_questions), *shown, *others])
    lines = [text_table(head, rows)]
    reasons = ", ".join(f"{reason} {count}" for reason, count in summary.skipped.items())
    lines.append(
        f"skipped {summary.num_skipped} "
        f"({summary.skipped_fraction:.1%}){': ' + reasons if reasons else ''}"
    )
    if summary.num_too_long:
        lines.append(
            f"answered questions longer than data.max_prompt_tokens: {summary.num_too_long}"
        )
    if summary.overall.num_ungraded:
        lines.append(
            f"responses that could not be graded, left out: {summary.overall.num_ungraded}"
        )
    return "\n".join(lines)


def _shown(value: Estimate | None) -> str:
    return "-" if value is None else f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"
