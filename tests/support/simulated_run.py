"""A run folder made by the real writers from a simulated student, for tests of the report and of
the public files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data.question import MediaRef, Question
from zppo_mm.config.load import load_config, save_config
from zppo_mm.experience import Candidate, Group, GroupKind, Prompt, PromptInstance, Rollout
from zppo_mm.observability.metrics import Mean, StepMetrics, Sum
from zppo_mm.observability.process_memory import process_memory
from zppo_mm.observability.rollout_metrics import (
    buffer_metrics,
    group_metrics,
    selection_metrics,
    teacher_metrics,
)
from zppo_mm.observability.sinks import append_evaluation, open_metrics_log
from zppo_mm.observability.transcripts import write_buffer, write_transcript
from zppo_mm.rollout.held_out import Evaluation
from zppo_mm.run_folder import RunFolder
from zppo_mm.zone.prompts import load_templates
from zppo_mm.zone.replay import ReplayBuffer
from zppo_mm.zone.selection import Selected

GROUP_SIZE = 8
TAU = 0.5
TEMPLATES = load_templates()


def make_question(index: int, media: tuple[MediaRef, ...] = ()) -> Question:
    digits = [(index * 7 + 3 * position) % 10 for position in range(2 + index % 4)]
    return Question(
        id=f"digits-video-train-{index:05d}",
        text="The video shows digits one after another. What is their sum?",
        media=media,
        answer=str(sum(digits)),
        answer_type="math",
        source="digits-video",
    )


def make_rollout(answer: str | None, reward: float, step: int = 1, num_tokens: int = 24) -> Rollout:
    text = "<think>\nI read the digits one by one and add them.\n</think>\n" + (
        f"\\boxed{{{answer}}}" if answer is not None else "so it is"
    )
    return Rollout(
        response_ids=np.arange(num_tokens),
        rollout_logprobs=np.zeros(num_tokens, np.float32),
        finish_reason="stop" if answer is not None else "length",
        text=text,
        parsed=answer,
        reward=reward,
        policy_version=step,
    )


def make_group(
    question: Question,
    kind: GroupKind,
    rollouts: Sequence[Rollout],
    step: int = 1,
    candidates: tuple[Candidate, ...] = (),
    text: str = "",
) -> Group:
    instance = PromptInstance(
        f"{step}/{kind}/{question.id}",
        question,
        kind,
        text or TEMPLATES.plain_text(question),
        candidates,
    )
    prompt = Prompt(
        text=instance.text,
        token_ids=np.arange(40),
        positions=np.zeros((3, 40), np.int64),
        next_position=40,
    )
    return Group(instance, prompt, tuple(rollouts))


def make_rollouts(
    rng: np.random.Generator, question: Question, skill: float, step: int
) -> list[Rollout]:
    rollouts = []
    for _ in range(GROUP_SIZE):
        right = rng.random() < skill
        wrong = str(int(question.answer) + int(rng.integers(1, 5))) if rng.random() < 0.9 else None
        rollouts.append(
            make_rollout(
                question.answer if right else wrong, float(right), step, int(rng.integers(14, 60))
            )
        )
    return rollouts


def group_advantages(groups: Sequence[Group]) -> dict[str, list[float]]:
    return {
        group.uid: [rollout.reward - group.accuracy for rollout in group.rollouts]
        for group in groups
    }


def reformulated(
    rng: np.random.Generator, hard: Sequence[Group], step: int, skill: float, limit: int
) -> list[Group]:
    groups: list[Group] = []
    for group in sorted(hard, key=lambda each: each.accuracy):
        question = group.question
        wrong = [rollout for rollout in group.rollouts if not rollout.reward]
        right = Candidate(
            f"The digits add up.\n\\boxed{{{question.answer}}}", "teacher", True, question.answer
        )
        negatives = tuple(
            Candidate(f"I count again.\n\\boxed{{{each.parsed}}}", "student", False, each.parsed)
            for each in wrong
        )
        pair = (right, negatives[0]) if rng.random() < 0.5 else (negatives[0], right)
        text = TEMPLATES.bcq_text(question, [candidate.text for candidate in pair])
        groups.append(
            make_group(
                question,
                "bcq",
                make_rollouts(rng, question, min(0.95, skill + 0.3), step),
                step,
                pair,
                text,
            )
        )
        text = TEMPLATES.ncq_text(
            question,
            sorted({each.parsed for each in wrong if each.parsed}),
            [candidate.text for candidate in negatives],
        )
        groups.append(
            make_group(
                question,
                "ncq",
                make_rollouts(rng, question, min(0.95, skill + 0.1), step),
                step,
                negatives,
                text,
            )
        )
    return groups[:limit]


def policy_metrics(rng: np.random.Generator, progress: float) -> StepMetrics:
    metrics = StepMetrics()
    metrics.add("policy/loss", Mean(-0.02 + 0.02 * rng.normal()))
    metrics.add("policy/entropy", Mean(0.9 - 0.5 * progress + 0.03 * rng.normal()))
    for name, fraction in (("low", 0.004), ("high", 0.009), ("dual", 0.0002)):
        metrics.add(f"policy/clip_{name}", Mean(abs(fraction * (1 + 0.4 * rng.normal()))))
    metrics.add("policy/grad_norm", Mean(0.8 + 0.1 * rng.normal()))
    phases: Mapping[str, float] = {
        "plain_rollout": 3.2,
        "teacher": 1.4,
        "reformulated_rollout": 0.9,
        "old_logprobs": 0.8,
        "update": 2.5,
    }
    for name, seconds in phases.items():
        metrics.add(f"seconds/{name}", Sum(seconds * (1 + 0.1 * rng.random())))
    metrics.add("seconds/step", Sum(sum(phases.values()) * 1.1))
    metrics.add("throughput/tokens_per_second", Mean(800 + 20 * rng.normal()))
    return metrics


def simulate_run(
    path: Path, num_steps: int, media: Sequence[MediaRef] = (), num_new: int = 16
) -> None:
    """Write a whole run folder; the student's skill rises with the steps."""
    rng = np.random.default_rng(0)
    folder = RunFolder(path)
    path.mkdir(parents=True, exist_ok=True)
    config = load_config(
        None,
        ["modality=video", f"train.train_iters={num_steps}", "observability.progress_bar=false"],
    )
    save_config(config, folder.config)
    log = open_metrics_log(config.observability, folder, num_steps, last_step=0)
    buffer = ReplayBuffer(40)
    evaluate(folder, 0, 0.35)
    for step in range(1, num_steps + 1):
        progress = step / num_steps
        new = [
            make_question(step * num_new + i, (media[(step + i) % len(media)],) if media else ())
            for i in range(num_new)
        ]
        asked = [(question, "new") for question in new] + [
            (question, "replayed") for question in buffer.draw(num_new // 4, rng)
        ]
        skills = [min(0.97, float(rng.beta(1.2, 1.8)) + 0.35 * progress) for _ in asked]
        groups = [
            make_group(question, kind, make_rollouts(rng, question, skill, step), step)  # type: ignore[arg-type]
            for (question, kind), skill in zip(asked, skills, strict=True)
        ]
        hard = [group for group in groups if group.accuracy < TAU]
        metrics = teacher_metrics(
            [make_rollouts(rng, group.question, 0.7, step)[:4] for group in hard]
        )
        metrics.add("batch/bcq_eligible", Sum(max(0, len(hard) - 1)))
        metrics.add("batch/ncq_eligible", Sum(len(hard)))
        update = buffer.update(groups, TAU, step)
        groups += reformulated(rng, hard, step, 0.25 + 0.3 * progress, num_new // 4)
        advantages = group_advantages(groups)
        for part in (
            group_metrics(groups, TAU),
            selection_metrics(Selected(tuple(groups)), advantages),
            buffer_metrics(buffer.occupancy(), buffer.fates),
            policy_metrics(rng, progress),
        ):
            metrics.merge(part)
        metrics.merge(process_memory())
        write_transcript(
            folder,
            step,
            groups,
            advantages,
            {group.uid: [i % 2 for i in range(GROUP_SIZE)] for group in groups},
        )
        write_buffer(folder, step, update)
        log.write(step, metrics.values())
        if step % 10 == 0:
            evaluate(folder, step, 0.35 + 0.3 * progress)
    log.close()


def evaluate(folder: RunFolder, step: int, accuracy: float) -> None:
    by_source = {
        "digits-image": accuracy - 0.04,
        "digits-text": accuracy + 0.08,
        "digits-video": accuracy - 0.04,
    }
    append_evaluation(folder, Evaluation(step, accuracy, by_source, 64, 0, 0.02))
