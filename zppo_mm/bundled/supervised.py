"""Supervised training on the project's own policy: prompts, the responses to learn, one update per
batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np

from zppo_mm.bundled.sft_examples import DigitExamples, Example, Stage
from zppo_mm.config.schema import TrainConfig
from zppo_mm.experience import TrainingSample
from zppo_mm.parallel import groups as parallel
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.training.batching import build_batches, plan_batches
from zppo_mm.training.policy import Policy
from zppo_mm.training.samples import response_sequence

logger = logging.getLogger(__name__)
LOG_EVERY_UPDATES = 50


def supervised_config(stages: Sequence[Stage]) -> TrainConfig:
    """Return the optimizer's settings; the learning rate is set before every update."""
    return TrainConfig(
        train_iters=sum(stage.num_updates for stage in stages),
        updates_per_step=1,
        lr=max(stage.lr for stage in stages),
        adam_beta2=0.98,
        weight_decay=0.05,
        clip_grad=1.0,
    )


def train_supervised(
    policy: Policy,
    encoder: PromptEncoder,
    examples: DigitExamples,
    stages: Sequence[Stage],
    micro_batch_tokens: int,
    after_update: Callable[[int, float], None] | None = None,
) -> float:
    """Train through all stages; every rank of the run calls this together.

    Args:
        policy: Built with the supervised objective.
        encoder: Tokenises prompts; its media opener is that of the examples.
        examples: Draws the examples.
        stages: In their order.
        micro_batch_tokens: Most tokens of one forward pass.
        after_update: Called with the number of updates made and the loss of the last.

    Returns:
        Mean loss of the last updates, in nats per token.
    """
    done = 0
    recent: list[float] = []
    for stage_index, stage in enumerate(stages):
        for update in range(stage.num_updates):
            samples = [
                training_sample(encoder, example)
                for example in examples.batch(stage, stage_index, update)
            ]
            _set_learning_rate(policy, learning_rate(stage, update))
            loss = _update(policy, encoder, samples, micro_batch_tokens)
            encoder.forget_media()
            done += 1
            recent = [*recent[1 - LOG_EVERY_UPDATES :], loss]
            if done % LOG_EVERY_UPDATES == 0 and parallel.rank() == 0:
                logger.info(
                    "supervised: stage %d, update %d, loss %.4f",
                    stage_index,
                    done,
                    sum(recent) / len(recent),
                )
            if after_update is not None:
                after_update(done, loss)
    return sum(recent) / len(recent)


def learning_rate(stage: Stage, update: int) -> float:
    """Return the learning rate of an update of a stage: a linear rise, then a linear fall over the
    whole stage.
    """
    rise = min(1.0, (update + 1) / max(stage.warmup_updates, 1))
    return rise * (stage.lr + (stage.final_lr - stage.lr) * update / max(stage.num_updates, 1))


def training_sample(encoder: PromptEncoder, example: Example) -> TrainingSample:
    """Return prompt and response as one sequence with loss on the response and its stop token."""
    prompt, _ = encoder.encode(example.text, example.question)
    response = np.array(
        [*encoder.chat.tokenize([example.response]), encoder.stop_token_ids[0]], dtype=np.int64
    )
    token_ids, positions, mask = response_sequence(prompt, response)
    return TrainingSample(
        uid=example.question.id,
        question=example.question,
        token_ids=token_ids,
        positions=positions,
        loss_mask=mask,
        old_logprobs=np.zeros_like(mask),
        advantages=mask,
        grids=prompt.grids,
    )


def _update(
    policy: Policy,
    encoder: PromptEncoder,
    samples: Sequence[TrainingSample],
    micro_batch_tokens: int,
) -> float:
    plan = plan_batches(
        samples,
        num_minibatches=1,
        num_replicas=parallel.data_size(),
        micro_batch_tokens=micro_batch_tokens,
        random=np.random.default_rng(0),
        skip_zero_advantage=False,
    )
    media = encoder if parallel.is_first_stage() else None
    batches = build_batches(
        plan, samples, replica=parallel.data_rank(), media=media, device=parallel.device()
    )
    return policy.train_step(batches).loss


def _set_learning_rate(policy: Policy, lr: float) -> None:
    for group in policy.optimizer.param_groups:
        group["lr"] = lr
