"""What student and teacher of the second experiment do before it: accuracy by family of questions,
solve rates on the corpus, reformulated prompts with the teacher's candidates, and the student after
supervised training on terse solutions.

`python -m benchmarks.half_formed`
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.tiny_models import MAX_NEW_TOKENS, Model, plain
from data.media.opening import MediaLimits, MediaOpener
from data.question import Question
from data.shards import ShardFolder, ShardReader
from data.toy.digits_families import CORPUS, FAMILIES, LEARNED, SHORT, write_families
from zppo_mm.bundled import HALF_FORMED_DIR, TERSE_TEACHER_DIR
from zppo_mm.bundled.authors import Terse
from zppo_mm.bundled.build import train_part
from zppo_mm.bundled.folder import SAMPLING
from zppo_mm.bundled.recipes import TEMPLATES
from zppo_mm.bundled.sft_examples import Stage
from zppo_mm.config.schema import ParallelConfig, ZoneConfig
from zppo_mm.experience import Group
from zppo_mm.parallel import groups as parallel
from zppo_mm.rewards.verify import Verifier
from zppo_mm.rollout.engine import SamplingParams
from zppo_mm.zone.compress import RuleCompressor, TeacherCompressor
from zppo_mm.zone.hard import select_hard
from zppo_mm.zone.prompts import PromptTemplates, load_templates
from zppo_mm.zone.reformulate import Reformulator

QUESTIONS_SEED = 5
"""Not that of the experiment's questions."""
NUM_ROLLOUTS = 8
NUM_TEACHER_ROLLOUTS = 4


@dataclass(frozen=True, slots=True)
class Asked:
    """Questions by family, and the prompts around them."""

    by_family: dict[str, list[Question]]
    templates: PromptTemplates

    @property
    def questions(self) -> list[Question]:
        return [question for family in self.by_family.values() for question in family]


def report_families(name: str, model: Model, asked: Asked) -> None:
    """Print accuracy by family, greedy and at temperature 1."""
    for temperature in (0.0, 1.0):
        groups = model.answer(plain(asked.questions, asked.templates), 1, temperature)
        accuracies: dict[str, list[float]] = defaultdict(list)
        for group in groups:
            accuracies[group.question.source].append(group.accuracy)
        cells = ", ".join(f"{key} {np.mean(each):.3f}" for key, each in accuracies.items())
        sys.stdout.write(f"{name}, temperature {temperature:g}: {cells}\n")


def report_rates(groups: Sequence[Group]) -> None:
    """Print how many questions of the corpus have how many right rollouts."""
    for kind in (*LEARNED, ""):
        counts = Counter(
            round(group.accuracy * NUM_ROLLOUTS) for group in groups if kind in group.question.id
        )
        rates = [counts[right] / counts.total() for right in range(NUM_ROLLOUTS + 1)]
        sys.stdout.write(
            f"corpus {kind or 'all'}, by right answers of {NUM_ROLLOUTS}: "
            f"{np.round(rates, 2).tolist()}\n"
        )


def report_reformulated(
    student: Model, teacher: Model, groups: Sequence[Group], asked: Asked
) -> None:
    """Print the accuracy of BCQ and NCQ prompts beside the plain one on the hard questions."""
    hard = select_hard(groups, 0.5)
    prompts = plain([group.question for group in hard], asked.templates)
    solved = teacher.answer(prompts, NUM_TEACHER_ROLLOUTS, 1.0)
    accuracies = np.array([group.accuracy for group in solved])
    sys.stdout.write(
        f"teacher on the {len(hard)} hard questions: {accuracies.mean():.3f}, "
        f"at least once of {NUM_TEACHER_ROLLOUTS}: {(accuracies > 0).mean():.3f}\n"
    )
    answers = {group.question.id: group.rollouts for group in solved}
    made = Reformulator(
        asked.templates, ZoneConfig(rho_aug=1.0), 0, _compressor(student, teacher, asked.templates)
    ).reformulate(hard, answers, 0, 2 * len(hard))
    sys.stdout.write(
        f"{made.num_candidates} candidates, {made.num_compression_rejects} rewrites refused, "
        f"{made.num_compression_cuts} candidates cut instead\n"
    )
    before = {group.question.id: group.accuracy for group in hard}
    replies = student.answer(made.instances, NUM_ROLLOUTS, 1.0)
    for kind in ("bcq", "ncq"):
        mine = [group for group in replies if group.kind == kind]
        never = [group.accuracy for group in mine if before[group.question.id] == 0]
        sys.stdout.write(
            f"{kind}: {np.mean([group.accuracy for group in mine]):.3f}, plain "
            f"{np.mean([before[group.question.id] for group in mine]):.3f} on the same "
            f"{len(mine)} questions; {np.mean(never):.3f} on the {len(never)} never solved\n"
        )


def _compressor(student: Model, teacher: Model, templates: PromptTemplates) -> TeacherCompressor:
    params = SamplingParams(
        temperature=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
        stop_token_ids=teacher.encoder.stop_token_ids,
    )
    return TeacherCompressor(
        lambda texts, step, attempt: teacher.sampler.respond(texts, params, f"{step}/{attempt}"),
        RuleCompressor(student.encoder.chat.count_tokens, MAX_NEW_TOKENS, 5),
        templates.compress,
    )


def train_on_terse(start: Path, end: Path, arguments: argparse.Namespace) -> None:
    """Train the student on the corpus as the teacher writes it, in place of any method."""
    stage = Stage(
        num_updates=arguments.terse_updates,
        lr=arguments.terse_lr,
        final_lr=arguments.terse_lr,
        levels=SHORT,
        batch_size=64,
        kinds=LEARNED,
        choice_fraction=0,
        author=Terse(),
        modalities=("image",),
    )
    train_part(start, end, (stage,), load_templates(TEMPLATES), seed=7)


def main() -> None:
    """Measure student and teacher."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", type=Path, default=HALF_FORMED_DIR)
    parser.add_argument("--teacher", type=Path, default=TERSE_TEACHER_DIR)
    parser.add_argument("--questions", type=int, default=300, help="of each family")
    parser.add_argument("--terse-updates", type=int, default=0, help="0: no supervised training")
    parser.add_argument("--terse-lr", type=float, default=1e-4)
    arguments = parser.parse_args()
    parallel.initialize(ParallelConfig(), 0)
    opener = MediaOpener(MediaLimits(sampling=SAMPLING))
    reader, verifier = ShardReader(), Verifier()
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_families(folder, 1, arguments.questions, QUESTIONS_SEED)
            by_family = {}
            for name in FAMILIES:
                source = ShardFolder(Path(folder) / f"{name}-held_out", reader)
                keys = source.keys()
                by_family[name] = [source.question(*key) for key in keys]
            start = arguments.student
            if arguments.terse_updates:
                start = Path(folder) / "student"
                train_on_terse(arguments.student, start, arguments)
            student = Model(start, opener, reader, verifier)
            asked = Asked(by_family, load_templates(TEMPLATES, student.encoder.chat.special_tokens))
            report_families("student", student, asked)
            groups = student.answer(plain(by_family[CORPUS], asked.templates), NUM_ROLLOUTS, 1.0)
            report_rates(groups)
            if not arguments.terse_updates:
                teacher = Model(arguments.teacher, opener, reader, verifier)
                report_families("teacher", teacher, asked)
                report_reformulated(student, teacher, groups, asked)
    finally:
        opener.close()
        verifier.close()


if __name__ == "__main__":
    main()
