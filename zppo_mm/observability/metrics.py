"""What a step measures: values typed by their reduction, under names that are documented here."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

from zppo_mm.methods import KINDS, REFORMULATED
from zppo_mm.observability.media_metrics import MEDIA_METRICS


@dataclass(frozen=True, slots=True)
class Sum:
    """Adds up over calls and ranks."""

    value: float

    def merge(self, other: Sum) -> Sum:
        return Sum(self.value + other.value)

    def reduced(self) -> float | None:
        return float(self.value)


@dataclass(frozen=True, slots=True)
class Mean:
    """Averages over everything that was counted, not over calls or ranks; nothing counted has no
    value.
    """

    sum: float
    count: float = 1.0

    def merge(self, other: Mean) -> Mean:
        return Mean(self.sum + other.sum, self.count + other.count)

    def reduced(self) -> float | None:
        return float(self.sum / self.count) if self.count else None


@dataclass(frozen=True, slots=True)
class Max:
    """Keeps the largest."""

    value: float

    def merge(self, other: Max) -> Max:
        return Max(max(self.value, other.value))

    def reduced(self) -> float | None:
        return float(self.value)


Metric: TypeAlias = Sum | Mean | Max

_REFORMULATED = ", ".join(kind.name for kind in REFORMULATED)

METRICS: Mapping[str, str] = {
    "accuracy/plain": "Mean accuracy of the rollouts of plain prompts, new and replayed.",
    "accuracy/new": "Mean accuracy of the rollouts of new questions.",
    "accuracy/replayed": "Mean accuracy of the rollouts of replayed questions.",
    **{
        f"accuracy/{kind.name}": f"Mean accuracy of the rollouts of {kind.label} prompts."
        for kind in REFORMULATED
    },
    "advantage/positive": "Fraction of rollouts with a positive advantage.",
    "advantage/nontrivial_groups": "Fraction of groups whose rewards differ.",
    "audit/bcq_right": "Fraction of BCQ rollouts whose answer equals the right candidate's.",
    "audit/bcq_wrong": "Fraction of BCQ rollouts whose answer equals the wrong candidate's.",
    "audit/ncq_listed": "Fraction of NCQ rollouts whose answer equals one listed as wrong.",
    "batch/questions": "Plain groups that were sampled.",
    "batch/easy": "Plain groups that are not hard.",
    "batch/hard": "Plain groups whose accuracy is below tau.",
    "batch/bcq_eligible": (
        "Hard groups with a correct teacher rollout and a wrong student rollout, before the cap. "
        "Questions that the teacher was not asked about are not among them."
    ),
    "batch/ncq_eligible": "Hard groups with a wrong student rollout, before the cap.",
    "batch/groups/*": (
        f"Groups of one kind ({', '.join(kind.name for kind in KINDS)}) that the step trained on."
    ),
    "batch/dropped_questions": (
        "Questions left out of the update by dynamic sampling: all their groups are trivial."
    ),
    "batch/injected_rollouts": "Teacher rollouts trained on as if they were the student's.",
    "batch/sampling_rounds": "Rounds of new questions that the step sampled.",
    "batch/loss_tokens": "Response tokens that carried loss, over all updates.",
    "batch/shared_prompt_tokens": (
        "Prompt tokens that were not computed again, because rollouts of a micro-batch shared them."
    ),
    "buffer/size": "Questions in the replay buffer after the step.",
    "buffer/occupancy/*": "Questions in the buffer by accuracy at admission, in percent.",
    "buffer/admitted/*": "Questions admitted since the start, by accuracy at admission in percent.",
    "buffer/graduated/*": (
        "Questions graduated since the start, by accuracy at admission in percent."
    ),
    "buffer/evicted/*": "Questions evicted since the start, by accuracy at admission in percent.",
    "buffer/graduated_visits/*": "Questions graduated since the start, by number of visits.",
    "buffer/evicted_visits/*": "Questions evicted since the start, by number of visits.",
    "checkpoint/broken": "Damaged checkpoints that starts of the run have set aside.",
    "checkpoint/failed": "Saves that could not be written; the next one tries again.",
    "data/samples": "Samples read by the stream.",
    "data/skipped/*": "Samples skipped, by reason; all but `needs_judge` are bad.",
    "data/too_long": "Questions left out because their plain prompt has more than "
    "data.max_prompt_tokens tokens; not bad samples.",
    "distill/agreement": (
        "Fraction of loss tokens at which student and teacher find the same token most likely."
    ),
    "distill/left_out": (
        "Rollouts not distilled from: no log-probs of the teacher in the student's tokens, or "
        "impossible ones."
    ),
    **MEDIA_METRICS,
    "mirror/failures": "Passes that could not upload what is new; the next one tries again.",
    "mirror/newest_step": "Newest complete checkpoint in the copy of the run; -1: none yet.",
    "mirror/uploaded": "Files uploaded to the copy of the run.",
    "mirror/uploaded_bytes": "Their bytes.",
    "mismatch/gap": (
        "Mean absolute difference of a response token's log-probs by the sampler and by the policy "
        "before the step's updates, in nats. Like all of `mismatch/*` where old log-probs are "
        "recomputed (`seconds/old_logprobs`), over the non-trivial groups."
    ),
    "mismatch/gap_max": "Largest such difference.",
    "mismatch/kl": (
        "Estimated divergence of that policy from the sampler per response token, in nats."
    ),
    "mismatch/truncated": (
        "Fraction of response tokens whose importance weight was cut to the cap "
        "(`algorithm.importance_cap`)."
    ),
    "mismatch/rejected": (
        "Responses without a part in the loss, because sampler and policy are too far apart "
        "(`algorithm.rejection_bound`, `algorithm.rejection_token_bound`)."
    ),
    "mismatch/rejected_fraction": "Fraction of responses that were rejected so.",
    **{
        f"mismatch/{name}/*": (
            f"`mismatch/{name}` by modality (text, image, video, mixed); `stale`: of responses "
            "that weights of an earlier step sampled."
        )
        for name in ("gap", "gap_max", "kl", "truncated", "rejected_fraction")
    },
    "policy/loss": (
        "Loss, averaged over the response tokens of each update, then the updates; with "
        "distillation the divergence in nats, averaged as in its loss."
    ),
    "policy/entropy": (
        "Entropy of the policy per response token of the non-trivial groups, in nats."
    ),
    "policy/clip_low": "Fraction of response tokens clipped at the lower bound of the ratio.",
    "policy/clip_high": "Fraction of response tokens clipped at the upper bound of the ratio.",
    "policy/clip_dual": "Fraction of response tokens held by the dual clip.",
    "policy/ratio": (
        "Mean ratio of a response token's probability to the old one (with importance weights the "
        "policy's before the step)."
    ),
    "policy/kl_old": (
        "Estimated divergence of the policy from the one of the old log-probs per response token, "
        "in nats."
    ),
    "policy/importance": (
        "Mean importance weight per response token of the non-trivial groups; 0 of a rejected "
        "response, 1 without a correction."
    ),
    "policy/grad_norm": "Gradient norm before clipping, averaged over the updates.",
    "policy/grad_norm_max": "Largest gradient norm before clipping.",
    "policy/lr": "Learning rate of the last update.",
    "policy/updates": "Gradient updates made.",
    "policy/skipped_updates": (
        "Gradient updates skipped because loss or gradient was not finite; four in a row end the "
        "run."
    ),
    "response/tokens": "Mean length of a response.",
    "response/tokens_max": "Longest response.",
    "response/tokens/*": (
        f"Mean length of a response by kind of prompt (plain, {_REFORMULATED}, teacher)."
    ),
    "response/truncated": "Fraction of responses that reached the length limit.",
    "response/truncated/*": f"The same by kind of prompt (plain, {_REFORMULATED}, teacher).",
    "response/unparsed": "Fraction of responses without a boxed answer.",
    "prompt/tokens/*": f"Mean length of a prompt by kind (plain, {_REFORMULATED}).",
    "ranks/busy_most/*": (
        "Seconds of a phase, without waiting for other replicas, on the rank that took longest; "
        "with several ranks alone, as all `ranks/*`. `ranks.jsonl` has those of every rank."
    ),
    "ranks/busy_least/*": "The same on the rank that took least.",
    "ranks/slowest": "Rank whose phases together took longest so.",
    "ranks/spread": "By what fraction that was longer than on the median rank.",
    "records/failed_writes": "Attempts to write records of steps that storage refused.",
    "records/waiting_bytes": "Their bytes that wait in memory to be tried again.",
    "remote/evicted": "Fetched files that made way for others in the cache, over all ranks.",
    "remote/fetched": "Files fetched from other machines, over all ranks.",
    "remote/fetched_bytes": "Their bytes.",
    "remote/retried": "Requests for such files that failed and were repeated.",
    "reward/mean": (
        "Mean reward of the rollouts of plain prompts; the accuracy, unless a reward function has "
        "an accuracy part beside others."
    ),
    "reward/part/*": (
        "Mean of a part that a reward function names, over the rollouts of plain prompts that "
        "have it."
    ),
    "reward/function_errors": (
        "Responses of the step for which a reward function raised, returned no reward or ended "
        "its process; they are left out (`rollout/ungraded`)."
    ),
    "reward/timeouts": (
        "Answers of the step whose grading came to no end within its limits; they are left out "
        "(`rollout/ungraded`)."
    ),
    "reward/errors": (
        "Answers of the step on which the grading library failed; they are left out "
        "(`rollout/ungraded`)."
    ),
    "reward/judged": "Responses that the judge replied to.",
    "reward/judge_cut": (
        "Responses of which the judge saw the end alone (`reward.judge_max_response_chars`)."
    ),
    "reward/judge_malformed": (
        "Replies of the judge that were not its strict JSON; they count as wrong."
    ),
    "reward/judge_disagreements": (
        "Answers that the judge and the rules for mathematics grade differently, where these "
        "decide."
    ),
    "reward/judge_failures": (
        "Responses that the judge did not reply to; their rollouts are left out of accuracy, "
        "advantages and loss."
    ),
    "rollout/tokens": "Response tokens of the student, plain and reformulated prompts together.",
    "rollout/preempted": (
        "How often a sequence had to leave the batch because the decoding cache was full "
        "(`rollout.cache_memory_gib`), to be computed again later."
    ),
    "rollout/staleness": (
        "Steps by which the weights that sampled were behind those of the step, averaged over the "
        "student's tokens; with `rollout.max_staleness` alone, as the next two."
    ),
    "rollout/wait_seconds": (
        "Seconds that rank 0 waited for plain rollouts which the step before had started."
    ),
    "rollout/overlapped": (
        "Fraction of the time from starting those rollouts to having them in which rank 0 did "
        "other things."
    ),
    "rollout/ungraded": (
        "Rollouts in the groups of the step that were left out because they could not be graded."
    ),
    "rollout/failed_groups": (
        "Instances without a group: prompt or media not readable, no room in the decoding cache, "
        "logits not finite, or no rollout graded."
    ),
    "rollout/no_room_groups": (
        "Groups left out because prompt and longest response do not fit the decoding cache, even "
        "alone (`rollout.cache_memory_gib`)."
    ),
    "rollout/not_finite_groups": (
        "Groups left out because the network computed logits that are not finite for one of their "
        "rollouts."
    ),
    "rollout/requests": (
        "Requests for continuations to servers, further attempts included; with "
        "`rollout.engine: vllm` alone, as the next five."
    ),
    "rollout/retries": "Further attempts at requests that failed.",
    "rollout/faults/*": (
        "Failed attempts by kind: connection, cut_off, timeout, http_<status>, bad_reply (not what "
        "was asked for), unfinished (neither a stop token nor the limit), cut_by_server (by its "
        "--max-model-len), other_weights, client_process."
    ),
    "rollout/stale_groups": (
        "Groups that were dropped and sampled again because other weights than the step's drew "
        "them."
    ),
    "rollout/prompt_tokens": "Prompt tokens of the answered requests.",
    "rollout/completion_tokens": "Tokens of their continuations.",
    "seconds/*": (
        "Seconds of one phase (data, plain_rollout, teacher, reformulated_rollout, old_logprobs, "
        "update, evaluation, weight_sync, …). Rollouts that the step before started count with the "
        "time that they were waited for; `checkpoint` is the time that a save kept training "
        "waiting, and counts in the step after it."
    ),
    "seconds/step": "Seconds of the whole step.",
    "system/rss_bytes": "Resident memory of the largest process of the run, now.",
    "system/rss_peak_bytes": "Largest resident memory of a process of the run since it started.",
    "teacher/accuracy": (
        "Mean accuracy of the teacher's rollouts on what it was asked: hard questions (with hint "
        "and prefix those that the pre-cap keeps), or all in distillation on its text."
    ),
    "teacher/failed_questions": (
        "Questions it was to answer, left without a rollout: prompt or media not readable, no "
        "room in the decoding cache, or no server answered."
    ),
    "teacher/lost_rollouts": (
        "Teacher rollouts that no server returned, or that could not be graded."
    ),
    "teacher/answer_seconds": (
        "Seconds from asking the teacher to its last answer; seconds/teacher has those that the "
        "step was idle."
    ),
    "teacher/requests": "Requests to servers, further attempts included.",
    "teacher/retries": "Further attempts at requests that failed.",
    "teacher/faults/*": (
        "Failed attempts, and single answers that could not be used, by kind; docs/teachers.md "
        "lists the kinds."
    ),
    "teacher/prompt_tokens": "Prompt tokens as the servers counted them.",
    "teacher/out_of_vocabulary_tokens": (
        "Most likely tokens from servers that are not in the student's vocabulary; they count "
        "among all others."
    ),
    "teacher/completion_tokens": "Answer tokens as the servers counted them.",
    "teacher/tokens": "Tokens of the teacher's answers; rewriting and judging are not among them.",
    "teacher/solved": "Fraction of the questions that it was asked with a correct teacher rollout.",
    "teacher/compression_rejects": (
        "Rewrites of candidates refused because they changed the final answer or had no complete "
        "summary."
    ),
    "teacher/compression_cuts": "Candidates cut to the cap because no rewrite kept the answer.",
    "teacher/hint_rejects": "Hints refused because they gave the answer away.",
    "teacher/hint_failures": "Hint prompts that are missing because no hint could be made.",
    "teacher/passed_on": (
        "Questions that a further teacher was asked because those before it did not solve them."
    ),
    "throughput/rollout_tokens_per_second": (
        "Sampled tokens per second of the sampling phases, over all ranks."
    ),
    "throughput/train_tokens_per_second": (
        "Tokens trained on per second of the update phase, a prompt counted with every rollout."
    ),
    "throughput/tokens_per_second": (
        "Response tokens of the step per second of the step, over all ranks."
    ),
    "tracking/failures/*": (
        "Calls of a tracker (tensorboard, wandb, swanlab, prometheus), of the sample maker or of "
        "the profiler that failed since the step before was written."
    ),
    "weight_sync/bytes": (
        "Bytes of weights written for servers; with `rollout.engine: vllm` alone, as the next "
        "three. `seconds/weight_sync` has the time of the step's own."
    ),
    "weight_sync/seconds": "Seconds that the ranks waited until servers had the weights.",
    "weight_sync/failures": "Failures of servers: dead, silent, or without the weights.",
    "weight_sync/restarts": "Servers that the run started again.",
}
"""Every name that `metrics.jsonl` can have; `*` stands for one last part."""


def is_documented(name: str) -> bool:
    """Return whether a name, or a pattern that it matches, is in `METRICS`."""
    return name in METRICS or any(
        "*" in pattern and fnmatch.fnmatchcase(name, pattern) for pattern in METRICS
    )


class StepMetrics:
    """Collects the measurements of one step."""

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}

    def add(self, name: str, metric: Metric) -> None:
        """Merge one measurement into what the step already has under that name."""
        assert is_documented(name), f"metric {name}: not documented; describe it in METRICS"
        before = self._metrics.get(name)
        if before is None:
            self._metrics[name] = metric
            return
        assert type(before) is type(metric), (
            f"metric {name}: reduced as {type(metric).__name__} and as {type(before).__name__}"
        )
        self._metrics[name] = before.merge(metric)  # type: ignore[arg-type]

    def merge(self, other: StepMetrics) -> None:
        """Merge the measurements of another part of the step, or of another rank."""
        for name, metric in other._metrics.items():
            self.add(name, metric)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds that the block takes to `seconds/<name>`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(f"seconds/{name}", Sum(time.perf_counter() - start))

    def values(self) -> dict[str, float]:
        """Return the reduced values by name, sorted; means over nothing are left out."""
        reduced = {name: metric.reduced() for name, metric in sorted(self._metrics.items())}
        return {name: value for name, value in reduced.items() if value is not None}
