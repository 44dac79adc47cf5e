"""Does the run sample, train and start from one and the same network, and does it see its media?
Asked before the first update, and later of sampling and training.

The training forward pass is compared with the engine, on the run's own layout and precision, and
with the source checkpoint in transformers. Nothing of the run is moved: the questions come from a
stream of the gate's own, the draws from random streams of their own names, and the global random
states are put back.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from data.question import Question
from zppo_mm.config.schema import ParityConfig
from zppo_mm.experience import FloatArray, Group, PromptInstance
from zppo_mm.parallel import groups as parallel
from zppo_mm.parity.compare import SIDES, Limit, ParityError, Response, Side, describe_gap, measure
from zppo_mm.parity.media import MediaCount, media_in_prompt, num_features
from zppo_mm.parity.oracle import SourceInput, SourceLogprobs, source_logprobs
from zppo_mm.parity.questions import Chosen, UncountedHealth, choose_questions
from zppo_mm.parity.record import ParityRecord, count_modality, parity_table, write_record
from zppo_mm.randomness import generator
from zppo_mm.rollout.soundness import NOT_FINITE
from zppo_mm.run.build import student_folder
from zppo_mm.run.parts import Run
from zppo_mm.run.questions import build_stream
from zppo_mm.run.shared import release_memory
from zppo_mm.run_folder import RunFolder
from zppo_mm.training.batching import build_batches, plan_batches
from zppo_mm.training.old_logprobs import response_logprobs
from zppo_mm.training.samples import response_sequence, to_training_samples

logger = logging.getLogger(__name__)

NUM_ROLLOUTS = 2
"""Responses per question: more than one, so that they share a prompt in the engine's caches as they
do in training.
"""
TRAINED = "the weights have been trained and are no longer the folder's"


def check_parity(run: Run, folder: RunFolder, step: int) -> None:
    """Compare, write `parity.jsonl` and the log, and stop the run if something disagrees; every
    rank calls this.

    After the first step the source checkpoint is left out, because the weights are trained. After a
    resume the layout may be another one than before, so sampling and training are compared again.

    Args:
        run: The run, nothing of which is moved.
        folder: The run's folder.
        step: Steps trained so far; 0 before the first.

    Raises:
        ParityError: Something disagrees, and `parity.mode` is `stop`; the same on every rank.
    """
    config = run.config.parity
    if config.mode == "none":
        return
    started = time.perf_counter()
    with _random_states_kept():
        run.stages.update_weights(step + 1)
        chosen = _choose(run, config.num_questions)
        groups = _sample(run, chosen, config, step + 1)
        broken = _broken_modalities(chosen, run.stages.sampler.failed)
        responses = _responses(groups, _training_logprobs(run, groups))
        counts, source = parallel.on_rank_zero(partial(_measure, run, groups, config, step))
        for group, values in zip(groups, source.logprobs, strict=True):
            first = responses[group.uid][0]
            responses[group.uid][0] = dataclasses.replace(first, source=values)
        # Not the run's: its cache of opened media counts the steps.
        release_memory(run.encoders)
        run.take_losses()  # what grading the gate's responses lost is no part of the next step
    record = _judge(
        run,
        chosen,
        [response for group in groups for response in responses[group.uid]],
        counts,
        source.skipped,
        step,
    )
    record = dataclasses.replace(
        record, findings=(*broken, *record.findings), seconds=time.perf_counter() - started
    )
    if parallel.rank() == 0:
        write_record(folder, record, run.records.append)
        logger.info("%s", parity_table(record))
    _conclude(record, chosen, config.mode)


def is_parity_due(config: ParityConfig, train_iters: int, step: int) -> bool:
    """Return whether sampling and training are compared after a step that is not the last."""
    return step < train_iters and bool(config.interval) and step % config.interval == 0


def limit_for(config: ParityConfig, dtype: torch.dtype, side: Side = "source") -> Limit:
    """Return the limit of a precision: for every token in float32, for a modality's divergence in
    anything coarser.

    Args:
        config: The limits, and the precision of a sampler that has its own.
        dtype: Of the network.
        side: What the training forward pass is compared with.
    """
    samples_exactly = side == "source" or config.sampler_dtype in ("auto", "float32")
    if dtype == torch.float32 and samples_exactly:
        return Limit("parity.max_gap", config.max_gap, of_divergence=False)
    return Limit("parity.max_kl", config.max_kl, of_divergence=True)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Put the global random states back; the run draws from named streams, but libraries may draw
    from these.
    """
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _choose(run: Run, num_questions: int) -> Chosen:
    stream = build_stream(run.config, UncountedHealth(), run.media.files)
    stream.load_state_dict(run.stream.state_dict())
    return choose_questions(stream, run.feed, num_questions)


def _sample(run: Run, chosen: Chosen, config: ParityConfig, version: int) -> list[Group]:
    """Sample short responses as in training, with the weights of a step; a first question of every
    modality comes before any second one.
    """
    asked = [
        (index, question)
        for questions in chosen.questions.values()
        for index, question in enumerate(questions)
    ]
    instances = [
        PromptInstance(_uid(index, question), question, "new", run.templates.plain_text(question))
        for index, question in sorted(asked, key=lambda item: item[0])
    ]
    longest = min(config.max_response_tokens, run.stages.sampling.max_new_tokens)
    sampling = dataclasses.replace(run.stages.sampling, max_new_tokens=longest)
    return run.stages.sampler.sample(instances, sampling, NUM_ROLLOUTS, version)


def _broken_modalities(chosen: Chosen, failed: Mapping[str, str]) -> list[str]:
    """Name the modalities of which nothing can be compared, because the network's logits are not
    finite for any question.
    """
    return [
        f"parity: {name}: the network is broken, got logits that are not finite for question "
        f"{questions[0].id!r} and every other one, expected finite numbers; check the weights of "
        "the folder; parity.mode=warn goes on all the same"
        for name, questions in chosen.questions.items()
        if questions
        and all(
            failed.get(_uid(index, question)) == NOT_FINITE
            for index, question in enumerate(questions)
        )
    ]


def _uid(index: int, question: Question) -> str:
    return f"parity/{index}/{question.id}"


def _training_logprobs(run: Run, groups: Sequence[Group]) -> list[FloatArray]:
    """Return the training forward pass's log-probs per rollout, group after group, on every rank:
    packed and split as an update is.
    """
    if not groups:
        return []
    config = run.config
    samples = to_training_samples(
        groups, [np.ones(len(group.rollouts), np.float32) for group in groups]
    )
    plan = plan_batches(
        samples,
        num_minibatches=1,
        num_replicas=parallel.data_size(),
        micro_batch_tokens=config.train.micro_batch_tokens,
        random=generator(config.seed, "parity"),
        micro_batch_patches=config.train.micro_batch_patches,
        skip_zero_advantage=False,
        share_prompts=run.policy.shares_prompts,
    )
    media = run.encoder if parallel.is_first_stage() else None
    batches = build_batches(
        plan, samples, replica=parallel.data_rank(), media=media, device=parallel.device()
    )
    mine = response_logprobs(run.policy, plan, samples, batches, config.rollout.temperature)
    replicas = parallel.gather_from_replicas(list(mine.items()))
    everything = dict(item for replica in replicas for item in replica)
    return [everything[index] for index in range(len(samples))]


def _responses(
    groups: Sequence[Group], training: Sequence[FloatArray]
) -> dict[str, list[Response]]:
    """Return the responses by group uid."""
    values = iter(training)
    responses: dict[str, list[Response]] = {}
    for group in groups:
        for rollout in group.rollouts:
            assert rollout.rollout_logprobs is not None, (
                "the run's own engine returns its log-probs"
            )
            compared = rollout.response_ids, next(values), rollout.rollout_logprobs
            responses.setdefault(group.uid, []).append(
                Response(group.question.modality, group.question.id, *compared)
            )
    return responses


def _measure(
    run: Run, groups: Sequence[Group], config: ParityConfig, step: int
) -> tuple[list[MediaCount], SourceLogprobs]:
    """Count media and ask the source checkpoint about the first response of each question; rank 0
    alone, a first pipeline stage.
    """
    architecture, counts, inputs = run.policy.model.architecture, [], []
    for group in groups:
        prompt, question, response_ids = (
            group.prompt,
            group.question,
            group.rollouts[0].response_ids,
        )
        vision = tuple(run.encoder.vision_inputs(question))
        tokens = (architecture.image_token_id, architecture.video_token_id)
        kinds = [reference.kind for reference in question.media]
        shown = media_in_prompt(
            prompt.token_ids, kinds, prompt.grids, *tokens, architecture.spatial_merge_size
        )
        placeholders = int(np.isin(prompt.token_ids, tokens).sum())
        features = num_features(run.policy.model, vision)
        counts.append(
            MediaCount(question.modality, question.id, len(kinds), shown, placeholders, features)
        )
        token_ids, positions, _ = response_sequence(prompt, response_ids)
        inputs.append(SourceInput(token_ids, positions, len(response_ids), vision))
    if step or not config.compare_source:
        why_not = TRAINED if step else "parity.compare_source=false"
        return counts, SourceLogprobs((None,) * len(inputs), why_not)
    source = source_logprobs(
        student_folder(run.config.model),
        inputs,
        dtype=run.policy.model.config.params_dtype,
        temperature=run.config.rollout.temperature,
        device=next(run.policy.model.parameters()).device,
        max_seconds=config.max_source_seconds,
    )
    return counts, source


def _judge(
    run: Run,
    chosen: Chosen,
    responses: Sequence[Response],
    counts: Sequence[MediaCount],
    not_compared: str,
    step: int,
) -> ParityRecord:
    """Hold everything against its limit; what is lost comes first, because it explains gaps."""
    network_dtype = run.policy.model.config.params_dtype
    limits = {side: limit_for(run.config.parity, network_dtype, side) for side in SIDES}
    findings = [*chosen.lost, *(count.describe() for count in counts if not count.agrees)]
    rows = []
    for name, questions in chosen.questions.items():
        mine = [response for response in responses if response.modality == name]
        gaps = {side: measure(mine, side) for side in SIDES}
        for side, gap in gaps.items():
            if gap is not None and gap.exceeds(limits[side]):
                findings.append(describe_gap(mine, side, gap, limits[side], run.encoder.decode))
        own_counts = [count for count in counts if count.modality == name]
        rows.append(
            count_modality(name, len(questions), own_counts, gaps["rollout"], gaps["source"])
        )
    return ParityRecord(
        step=step,
        dtype=str(network_dtype).removeprefix("torch."),
        limit=limits["source"],
        rollout_limit=limits["rollout"],
        seconds=0.0,
        modalities=tuple(rows),
        not_compared=not_compared,
        findings=tuple(findings),
    )


def _conclude(record: ParityRecord, chosen: Chosen, mode: str) -> None:
    """Warn or stop.

    Raises:
        ParityError: There are findings, and the mode is `stop`.
    """
    if parallel.rank() == 0:
        for name, why in chosen.refused.items():
            logger.warning(
                "parity: no %s question can be asked, so none is compared; the last one: %s",
                name,
                why,
            )
        for finding in record.findings if mode == "warn" else ():
            logger.warning("%s", finding)
    if record.findings and mode == "stop":
        more = len(record.findings) - 1
        raise ParityError(
            record.findings[0] + (f" (and {more} more in parity.jsonl)" if more else "")
        )
