"""Transcripts, buffer files and held-out answers: the public record from which every advantage,
cap, buffer decision and evaluation of a run can be recomputed.

The format is described in docs/data.md. Every file is written atomically, so a file that is there
is complete.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.atomic_files import write_atomically
from zppo_mm.experience import BufferUpdate, Group, Rollout
from zppo_mm.observability.record_writer import Write
from zppo_mm.run_folder import RunFolder, files_by_step

NO_MINIBATCH = -1


def write_transcript(
    folder: RunFolder,
    step: int,
    groups: Iterable[Group],
    advantages: Mapping[str, Sequence[float]],
    minibatches: Mapping[str, Sequence[int]],
    teacher_rewards: Mapping[str, Sequence[float]] | None = None,
    write: Write = write_atomically,
) -> Path:
    """Write all groups of a step, one line each, in their order.

    Args:
        folder: The run's folder.
        step: Rollout step.
        groups: Groups of any kind.
        advantages: One advantage per rollout, by the uid of a group that was trained on.
        minibatches: Index of the gradient update that used each rollout, by the uid of a group that
            was trained on.
        teacher_rewards: Rewards of the teacher's rollouts by question id, recorded with the plain
            groups of the questions it was asked.
        write: Writes the file.
    """
    asked = teacher_rewards or {}
    records = []
    for group in groups:
        record = _group_record(step, group, advantages.get(group.uid), minibatches.get(group.uid))
        if group.is_plain and group.question.id in asked:
            record["teacher_rewards"] = [float(reward) for reward in asked[group.question.id]]
        records.append(record)
    return _write_lines(folder.transcript_of(step), records, write)


def write_buffer(
    folder: RunFolder, step: int, update: BufferUpdate, write: Write = write_atomically
) -> Path:
    """Write what a step admitted, graduated and evicted, and the whole buffer after it, oldest
    admission first.
    """
    record = {
        "step": step,
        "admitted": list(update.admitted),
        "graduated": list(update.graduated),
        "evicted": list(update.evicted),
        "content": list(update.content),
    }
    return _write(folder.buffer_of(step), json.dumps(record, ensure_ascii=False) + "\n", write)


def write_held_out_answers(
    folder: RunFolder, step: int, groups: Iterable[Group], write: Write = write_atomically
) -> Path:
    """Write what the student answered to every held-out question after a step, one line per
    question, in their order.
    """
    records = [
        {
            "step": step,
            "question_id": group.question.id,
            "source": group.question.source,
            "modality": group.question.modality,
            "answer": group.question.answer,
            "accuracy": group.accuracy,
            "rollouts": [
                _response_record(rollout) for rollout in (*group.rollouts, *group.ungraded)
            ],
        }
        for group in groups
    ]
    return _write_lines(folder.answers_of(step), records, write)


def discard_steps_after(folder: RunFolder, step: int) -> None:
    """Remove the files of later steps, which a resumed run will make again."""
    for records in (folder.transcripts, folder.buffers, folder.answers):
        for number, path in files_by_step(records).items():
            if number > step:
                path.unlink()


def _group_record(
    step: int, group: Group, advantages: Sequence[float] | None, minibatches: Sequence[int] | None
) -> dict[str, Any]:
    question = group.question
    candidates = [
        {
            "text": candidate.text,
            "source": candidate.source,
            "correct": candidate.correct,
            "answer": candidate.answer,
        }
        for candidate in group.instance.candidates
    ]
    earlier = {"earlier": [asdict(turn) for turn in question.earlier]} if question.earlier else {}
    return {
        "step": step,
        "uid": group.uid,
        "question_id": question.id,
        "kind": group.kind,
        **earlier,
        "prompt": group.instance.text,
        "media": [
            {"kind": ref.kind, "shard": ref.shard, "key": ref.key, "extension": ref.extension}
            for ref in question.media
        ],
        "answer": question.answer,
        "accuracy": group.accuracy,
        "candidates": candidates,
        "num_prefix_tokens": len(group.instance.response_prefix),
        "rollouts": [
            _rollout_record(rollout, advantage, minibatch)
            for rollout, advantage, minibatch in zip(
                group.rollouts,
                [None] * len(group.rollouts) if advantages is None else advantages,
                [NO_MINIBATCH] * len(group.rollouts) if minibatches is None else minibatches,
                strict=True,
            )
        ]
        + [_rollout_record(rollout, None, NO_MINIBATCH) for rollout in group.ungraded],
    }


def _rollout_record(rollout: Rollout, advantage: float | None, minibatch: int) -> dict[str, Any]:
    """Return one rollout; one without an advantage was not trained on, and one without a reward was
    not graded.
    """
    own: dict[str, Any] = {
        "advantage": None if advantage is None else float(advantage),
        "minibatch": int(minibatch),
        "author": rollout.author,
        "policy_version": rollout.policy_version,
    }
    if rollout.versions:
        own["versions"] = [[span.version, span.num_tokens] for span in rollout.versions]
    return {**_response_record(rollout), **own}


def _response_record(rollout: Rollout) -> dict[str, Any]:
    return {
        "text": rollout.text,
        "parsed": rollout.parsed,
        "reward": None if math.isnan(rollout.reward) else float(rollout.reward),
        "parts": dict(rollout.parts),
        "num_tokens": len(rollout.response_ids),
        "finish_reason": rollout.finish_reason,
    }


def _write_lines(path: Path, records: Iterable[Mapping[str, Any]], write: Write) -> Path:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return _write(path, "".join(lines), write)


def _write(path: Path, text: str, write: Write) -> Path:
    # A lone surrogate becomes its JSON escape instead of stopping the run.
    write(path, text.encode("utf-8", errors="backslashreplace"))
    return path
