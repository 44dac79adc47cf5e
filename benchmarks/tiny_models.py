"""How well the bundled models do: plain accuracy by modality and number of digits, and BCQ and NCQ
beside plain on hard questions.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.media.opening import MediaLimits, MediaOpener
from data.question import Question
from data.shards import ShardFolder, ShardReader
from data.toy.digits import LEVELS, MODALITIES
from data.toy.digits_shards import build_digit_shards
from zppo_mm.bundled import STUDENT_DIR, TEACHER_DIR
from zppo_mm.bundled.folder import SAMPLING
from zppo_mm.config.schema import ModelConfig, ParallelConfig, ZoneConfig
from zppo_mm.experience import Group, PromptInstance
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.exchange import ParallelExchange
from zppo_mm.rewards.verify import Verifier
from zppo_mm.rollout.engine import SamplingParams
from zppo_mm.rollout.megatron_engine import MegatronEngine
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.rollout.sampler import GroupSampler
from zppo_mm.run.shared import load_model
from zppo_mm.zone.compress import RuleCompressor
from zppo_mm.zone.hard import select_hard
from zppo_mm.zone.prompts import PromptTemplates, load_templates
from zppo_mm.zone.reformulate import Reformulator

MAX_NEW_TOKENS = 96
BATCH = 256


class Model:
    """One bundled model that answers prompts.

    Args:
        folder: Its Hugging Face folder.
        opener: Opens media.
        reader: Reads shards.
        verifier: Grades.
    """

    def __init__(
        self, folder: Path, opener: MediaOpener, reader: ShardReader, verifier: Verifier
    ) -> None:
        self.encoder = PromptEncoder(folder, lambda reference: opener.open_ref(reference, reader))
        model = load_model(ModelConfig(), ParallelConfig(), folder, trainable=False)
        self.sampler = GroupSampler(
            MegatronEngine(model, 0, BATCH), self.encoder, verifier, ParallelExchange()
        )

    def answer(
        self, instances: Sequence[PromptInstance], num_rollouts: int, temperature: float
    ) -> list[Group]:
        """Sample and grade."""
        params = SamplingParams(
            temperature=temperature,
            max_new_tokens=MAX_NEW_TOKENS,
            stop_token_ids=self.encoder.stop_token_ids,
        )
        return self.sampler.sample(instances, params, num_rollouts, 0)


def plain(questions: Sequence[Question], templates: PromptTemplates) -> list[PromptInstance]:
    """Return the plain prompts."""
    return [
        PromptInstance(f"0/new/{question.id}", question, "new", templates.plain_text(question))
        for question in questions
    ]


def held_out(
    folder: Path, reader: ShardReader, num_per_cell: int
) -> dict[tuple[str, int], list[Question]]:
    """Build and return held-out questions by modality and level."""
    cells = {}
    for modality in MODALITIES:
        for level in LEVELS:
            target = folder / f"{modality}-{level}"
            build_digit_shards(target, modality, "held_out", num_per_cell, level, {level: 1.0})
            source = ShardFolder(target, reader)
            keys = source.keys()
            cells[modality, level] = [source.question(*key) for key in keys]
    return cells


def report_plain(name: str, groups: Sequence[Group]) -> None:
    """Print accuracy by modality and level, and by kind."""
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    kinds: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        *_, kind, level = group.question.id.split("-")
        cells[group.question.source, level].append(group.accuracy)
        kinds[kind + (" (choice)" if group.question.choices else "")].append(group.accuracy)
    sys.stdout.write(f"{name}: accuracy by number of digits {LEVELS}\n")
    for modality in MODALITIES:
        row = [np.mean(cells[f"digits-{modality}", str(level)]) for level in LEVELS]
        sys.stdout.write(
            f"  {modality:6s}"
            + "".join(f" {value:.2f}" for value in row)
            + f"   mean {np.mean(row):.3f}\n"
        )
    sys.stdout.write(
        "  "
        + ", ".join(f"{kind} {np.mean(values):.2f}" for kind, values in sorted(kinds.items()))
        + "\n"
    )
    accuracies = np.array([group.accuracy for group in groups])
    size = len(groups[0].rollouts)
    counts = np.bincount(np.round(accuracies * size).astype(int), minlength=size + 1) / len(
        accuracies
    )
    sys.stdout.write(
        f"  overall {accuracies.mean():.3f}; questions by right answers of {size}: "
        f"{np.round(counts, 2).tolist()}\n"
    )


def report_reformulated(
    student: Model,
    teacher: Model,
    groups: Sequence[Group],
    templates: PromptTemplates,
    temperature: float,
) -> None:
    """Print BCQ and NCQ accuracy beside the plain one on the hard questions."""
    hard = select_hard(groups, 0.5)
    size = len(groups[0].rollouts)
    solved = teacher.answer(plain([group.question for group in hard], templates), size, temperature)
    answers = {group.question.id: group.rollouts for group in solved}
    sys.stdout.write(
        f"teacher: {np.mean([group.accuracy > 0 for group in solved]):.2f} of the student's hard "
        "questions solved at least once\n"
    )
    compressor = RuleCompressor(student.encoder.chat.count_tokens, MAX_NEW_TOKENS, 5)
    reformulated = Reformulator(templates, ZoneConfig(rho_aug=1.0), 0, compressor).reformulate(
        hard, answers, 0, 2 * len(hard)
    )
    asked = student.answer(reformulated.instances, size, temperature)
    by_id = {group.question.id: group.accuracy for group in hard}
    for kind in ("bcq", "ncq"):
        mine = [group for group in asked if group.kind == kind]
        before = np.mean([by_id[group.question.id] for group in mine])
        sys.stdout.write(
            f"{kind}: {np.mean([group.accuracy for group in mine]):.3f}, plain {before:.3f} on the "
            f"same {len(mine)} hard questions\n"
        )


def main() -> None:
    """Measure both models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", type=Path, default=STUDENT_DIR)
    parser.add_argument("--teacher", type=Path, default=TEACHER_DIR)
    parser.add_argument(
        "--questions", type=int, default=24, help="per modality and number of digits"
    )
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=1.0)
    arguments = parser.parse_args()
    parallel.initialize(ParallelConfig(), 0)
    opener, reader, verifier = (
        MediaOpener(MediaLimits(sampling=SAMPLING)),
        ShardReader(),
        Verifier(),
    )
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            cells = held_out(Path(folder), reader, arguments.questions)
            questions = [question for cell in cells.values() for question in cell]
            student, teacher = (
                Model(path, opener, reader, verifier)
                for path in (arguments.student, arguments.teacher)
            )
            templates = load_templates("", student.encoder.chat.special_tokens)
            groups = student.answer(
                plain(questions, templates), arguments.rollouts, arguments.temperature
            )
            report_plain("student", groups)
            report_plain(
                "teacher", teacher.answer(plain(questions, templates), 1, arguments.temperature)
            )
            report_reformulated(student, teacher, groups, templates, arguments.temperature)
    finally:
        opener.close()
        verifier.close()
    sys.stdout.write(f"{time.perf_counter() - started:.0f} s\n")


if __name__ == "__main__":
    main()
