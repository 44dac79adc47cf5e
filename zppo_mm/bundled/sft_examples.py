"""SFT examples of the bundled models: digit questions with written-out solutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.media.opening import Frames
from data.question import MediaRef, Question
from data.toy.digits import MODALITIES, DigitKind, DigitProblem, Modality, draw_problem
from data.toy.digits_media import (
    FRAME_PIXELS,
    FRAMES_PER_DIGIT,
    FRAMES_PER_SECOND,
    load_bank,
    strip,
)
from data.toy.digits_reasoning import flawed_solution, guess, read_out, solution
from zppo_mm.bundled.authors import Author, Form
from zppo_mm.bundled.folder import SAMPLING
from zppo_mm.randomness import generator
from zppo_mm.teacher.teacher import Compressor, Trace
from zppo_mm.zone.prompts import PromptTemplates
from zppo_mm.zone.rewriting import fill_template

MAX_NCQ_CANDIDATES = 4
CANDIDATE_LINES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One part of a curriculum.

    Attributes:
        num_updates: Gradient updates.
        lr: Learning rate at its start; it falls linearly to `final_lr`.
        final_lr: Learning rate at its end.
        warmup_updates: Updates over which the learning rate rises from 0.
        levels: Relative weight per number of digits.
        batch_size: Sequences per update.
        kinds: Relative weight per kind of question; empty means all alike.
        choice_fraction: Fraction of multiple-choice questions.
        bcq_fraction: Fraction of prompts that show a right and a wrong solution.
        ncq_fraction: Fraction of prompts that show wrong solutions.
        guess_fraction: Fraction of plain prompts, per number of digits, whose response guesses
            without reasoning; none by default.
        read_out_fraction: Fraction of plain prompts whose response reads the digits out, whatever
            the question is. Above 0, wrong candidates do so too.
        reformulated_read_out_fraction: The same fraction of BCQ and NCQ prompts.
        author: Writes candidates and responses in place of all habits above.
        rewrite_fraction: Fraction of prompts that ask to rewrite a response; only with an author.
        modalities: They take turns.
    """

    num_updates: int
    lr: float
    final_lr: float
    levels: Mapping[int, float]
    batch_size: int = 32
    warmup_updates: int = 0
    kinds: Mapping[DigitKind, float] | None = None
    choice_fraction: float = 0.2
    bcq_fraction: float = 0.0
    ncq_fraction: float = 0.0
    guess_fraction: Mapping[int, float] | None = None
    read_out_fraction: float = 0.0
    reformulated_read_out_fraction: float = 0.0
    author: Author | None = None
    rewrite_fraction: float = 0.0
    modalities: tuple[Modality, ...] = MODALITIES


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and the response to learn."""

    question: Question
    text: str
    response: str


class DigitExamples:
    """Draws examples and opens their media, which exist only as long as a batch.

    Args:
        templates: The texts that the zone uses, so that the models know its prompts.
        compressor: Shortens candidates as the zone does.
        seed: Of all draws.
    """

    def __init__(self, templates: PromptTemplates, compressor: Compressor, seed: int) -> None:
        self._templates = templates
        self._compressor = compressor
        self._seed = seed
        self._bank = load_bank("train")
        self._problems: dict[str, DigitProblem] = {}

    def batch(self, stage: Stage, stage_index: int, update: int) -> list[Example]:
        """Return the examples of one update; the modalities take turns."""
        self._problems.clear()
        return [
            self._example(
                stage,
                f"{stage_index}-{update}-{index}",
                stage.modalities[index % len(stage.modalities)],
            )
            for index in range(stage.batch_size)
        ]

    def open(self, reference: MediaRef) -> Frames:
        """Return the pixels of an example of the newest batch, as decoding its file would."""
        rng = generator(self._seed, "pixels", reference.key)
        digits = self._problems[reference.key].digits
        if reference.kind == "image":
            return Frames(strip([self._bank.tile(rng, digit) for digit in digits])[None], (0.0,))
        clip = np.stack([strip([self._bank.tile(rng, digit, FRAME_PIXELS)]) for digit in digits])
        chosen = SAMPLING.choose(len(digits) * FRAMES_PER_DIGIT, FRAMES_PER_SECOND)
        pixels = clip[[frame // FRAMES_PER_DIGIT for frame in chosen]]
        return Frames(pixels, tuple(frame / FRAMES_PER_SECOND for frame in chosen))

    def _example(self, stage: Stage, key: str, modality: Modality) -> Example:
        # The name decides what the bundled models were trained on, so it stays.
        rng = generator(self._seed, "lesson", key)
        problem = draw_problem(rng, "train", stage.levels, stage.kinds, stage.choice_fraction)
        self._problems[key] = problem
        media = () if modality == "text" else (MediaRef(modality, "", key, ""),)
        question = Question(
            key, problem.text(modality), media, problem.answer, problem.answer_type, problem.choices
        )
        if stage.author is not None:
            return self._authored(rng, stage, stage.author, problem, question)
        text = self._prompt(rng, stage, problem, question)
        return Example(
            question,
            text,
            self._response(
                rng, stage, problem, is_plain=text == self._templates.plain_text(question)
            ),
        )

    def _authored(
        self,
        rng: np.random.Generator,
        stage: Stage,
        author: Author,
        problem: DigitProblem,
        question: Question,
    ) -> Example:
        form = _form(rng, stage)
        written = author.write(rng, problem, form)
        if form == "rewrite":
            text = fill_template(self._templates.compress, written.shown[0][0], CANDIDATE_LINES)
            return Example(replace(question, media=()), text, written.response)
        if form == "plain":
            return Example(question, self._templates.plain_text(question), written.response)
        candidates = self._candidates(question, written.shown)
        answers = list(dict.fromkeys(answer for _, answer in written.shown))
        text = (
            self._templates.bcq_text(question, candidates)
            if form == "bcq"
            else self._templates.ncq_text(question, answers, candidates)
        )
        return Example(question, text, written.response)

    def _response(
        self, rng: np.random.Generator, stage: Stage, problem: DigitProblem, is_plain: bool
    ) -> str:
        reads_out = stage.read_out_fraction if is_plain else stage.reformulated_read_out_fraction
        if reads_out and rng.random() < reads_out:
            return read_out(problem)[0]
        guesses = (stage.guess_fraction or {}).get(problem.level, 0.0) if is_plain else 0.0
        return guess(rng, problem) if guesses and rng.random() < guesses else solution(problem)

    def _prompt(
        self, rng: np.random.Generator, stage: Stage, problem: DigitProblem, question: Question
    ) -> str:
        draw = rng.random()
        if draw < stage.bcq_fraction:
            shown = [(solution(problem), problem.value), self._wrong(rng, stage, problem)]
            return self._templates.bcq_text(
                question, self._candidates(question, [shown[i] for i in rng.permutation(2)])
            )
        if draw < stage.bcq_fraction + stage.ncq_fraction:
            wrong = [
                self._wrong(rng, stage, problem)
                for _ in range(int(rng.integers(1, MAX_NCQ_CANDIDATES + 1)))
            ]
            answers = list(dict.fromkeys(answer for _, answer in wrong))
            return self._templates.ncq_text(question, answers, self._candidates(question, wrong))
        return self._templates.plain_text(question)

    def _wrong(
        self, rng: np.random.Generator, stage: Stage, problem: DigitProblem
    ) -> tuple[str, str]:
        """Return a wrong response and its answer."""
        return (
            read_out(problem)
            if stage.read_out_fraction and problem.kind != "read"
            else flawed_solution(rng, problem)
        )

    def _candidates(self, question: Question, responses: Sequence[tuple[str, str]]) -> list[str]:
        traces = [Trace(question, text, answer) for text, answer in responses]
        return [
            self._templates.escaped(trace.text) for trace in self._compressor.compress(traces, 0)
        ]


def _form(rng: np.random.Generator, stage: Stage) -> Form:
    draw = rng.random()
    fractions: tuple[tuple[Form, float], ...] = (
        ("bcq", stage.bcq_fraction),
        ("ncq", stage.ncq_fraction),
        ("rewrite", stage.rewrite_fraction),
    )
    for form, fraction in fractions:
        draw -= fraction
        if draw < 0:
            return form
    return "plain"
