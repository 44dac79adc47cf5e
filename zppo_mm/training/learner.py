"""One rollout step's worth of learning: groups and advantages to I gradient updates."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial

import numpy as np

from zppo_mm.algorithms.importance import NO_CORRECTION, MismatchCorrection
from zppo_mm.config.schema import TrainConfig
from zppo_mm.experience import Advantages, Group, MediaSource, TrainingSample
from zppo_mm.observability.metrics import Max, Mean, StepMetrics, Sum
from zppo_mm.parallel import groups as parallel
from zppo_mm.randomness import generator
from zppo_mm.training.batching import BatchPlan, build_batches, plan_batches
from zppo_mm.training.old_logprobs import (
    need_old_logprobs,
    response_logprobs,
    with_old_logprobs,
)
from zppo_mm.training.policy import Policy, TrainMetrics
from zppo_mm.training.samples import to_training_samples, with_question_weights


@dataclass(frozen=True, slots=True)
class Learner:
    """Plans mini-batches, packs this rank's micro-batches and updates the policy.

    Attributes:
        policy: What is trained.
        media: Opens the media of training samples on the first pipeline stage.
        config: Updates per step and size of a micro-batch.
        seed: The run's seed; mini-batches are dealt by it.
        temperature: Of the rollouts.
        correction: What is done about a sampler that computes other log-probs than the policy.
        averages_questions: Whether every group counts alike in a distillation loss, however many
            responses and tokens it has.
    """

    policy: Policy
    media: MediaSource
    config: TrainConfig
    seed: int
    _: KW_ONLY
    temperature: float = 1.0
    correction: MismatchCorrection = NO_CORRECTION
    averages_questions: bool = False

    def learn(
        self, groups: Sequence[Group], advantages: Advantages, step: int, metrics: StepMetrics
    ) -> dict[str, tuple[int, ...]]:
        """Make the I updates of a step.

        Args:
            groups: All groups of the step, the same on every rank.
            advantages: Per group uid `[rollouts]`.
            step: Rollout step.
            metrics: Gets loss, entropy, clip fractions, gradient norm and the like.

        Returns:
            Per group uid, the index of the update that used each rollout.
        """
        started = time.perf_counter()
        objective = self.policy.objective
        with metrics.phase("update"):
            samples = to_training_samples(groups, [advantages[group.uid] for group in groups])
            if objective.needs_teacher_top:
                metrics.add(
                    "distill/left_out", Sum(sum(sample.teacher_top is None for sample in samples))
                )
                samples = [
                    sample if sample.teacher_top is not None else _without_loss(sample)
                    for sample in samples
                ]
            if self.averages_questions:
                samples = with_question_weights(samples)
            plan = plan_batches(
                samples,
                num_minibatches=self.config.updates_per_step,
                num_replicas=parallel.data_size(),
                micro_batch_tokens=self.config.micro_batch_tokens,
                random=generator(self.seed, "minibatches", step),
                micro_batch_patches=self.config.micro_batch_patches,
                skip_zero_advantage=objective.needs_advantages,
                share_prompts=self.policy.shares_prompts,
            )
            build = partial(
                build_batches,
                plan,
                replica=parallel.data_rank(),
                media=self.media if parallel.is_first_stage() else None,
                device=parallel.device(),
            )
            batches = build(samples)
        if objective.needs_advantages and need_old_logprobs(samples, self.correction):
            with metrics.phase("old_logprobs"):
                logprobs = response_logprobs(self.policy, plan, samples, batches, self.temperature)
                samples = with_old_logprobs(samples, logprobs, self.correction, step, metrics)
                batches = build(samples)
        with metrics.phase("update"):
            trained = self.policy.train_step(batches)
        _measure(trained, metrics)
        packs = [pack for update in plan.microbatches for replica in update for pack in replica]
        num_tokens = sum(samples[index].num_tokens for pack in packs for index in pack)
        metrics.add(
            "throughput/train_tokens_per_second", Mean(num_tokens, time.perf_counter() - started)
        )
        shared = (
            sum(_num_shared_tokens([samples[index] for index in pack]) for pack in packs)
            if plan.share_prompts
            else 0
        )
        metrics.add("batch/shared_prompt_tokens", Sum(shared))
        metrics.add("batch/loss_tokens", Sum(sum(plan.num_loss_tokens)))
        return _by_group(groups, plan)


def _without_loss(sample: TrainingSample) -> TrainingSample:
    """Return a sample that takes no part in an update."""
    return replace(sample, loss_mask=np.zeros_like(sample.loss_mask))


def _num_shared_tokens(samples: Sequence[TrainingSample]) -> int:
    """Return the prompt tokens that shared-prefix training saves in a micro-batch."""
    prompts = {sample.uid: sample.num_prompt_tokens for sample in samples}
    return sum(sample.num_prompt_tokens for sample in samples) - sum(prompts.values())


def _by_group(groups: Sequence[Group], plan: BatchPlan) -> dict[str, tuple[int, ...]]:
    ends = np.cumsum([len(group.rollouts) for group in groups])
    return {
        group.uid: plan.minibatch_of[end - len(group.rollouts) : end]
        for group, end in zip(groups, ends.tolist(), strict=True)
    }


def _measure(trained: TrainMetrics, metrics: StepMetrics) -> None:
    metrics.add("policy/updates", Sum(len(trained.updates) - trained.num_skipped_updates))
    metrics.add("policy/skipped_updates", Sum(trained.num_skipped_updates))
    if trained.updates:
        metrics.add("policy/lr", Max(trained.learning_rate))
    for update in trained.updates:
        if update.skipped:
            continue
        metrics.add("policy/loss", Mean(update.loss))
        metrics.add("policy/grad_norm", Mean(update.grad_norm))
        metrics.add("policy/grad_norm_max", Max(update.grad_norm))
        for name, mean in update.means.items():
            metrics.add(name, mean)
