"""Sampling with the policy's own Megatron network: one prefill per prompt, then all its rollouts
token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch

from encoders.processor import VisionInput
from zppo_mm.interruption import StopRequested
from zppo_mm.models.decoding.decode import decode, prefill
from zppo_mm.models.layers.cache import DecodeCache
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel import replica
from zppo_mm.randomness import generator
from zppo_mm.rollout.batch import RolloutBatch, UniformStreams
from zppo_mm.rollout.engine import Generation, GenerationRequest, SamplingParams
from zppo_mm.rollout.token_choice import choose_tokens
from zppo_mm.rollout.waves import RequestPart, plan_waves

DEFAULT_PREFILL_TOKENS = 65_536
COMPACTION_FRACTION = 0.25
"""Finished sequences leave the batch when they are this fraction of it. Moving the caches costs up
to about a decoding step.
"""
STOP_CHECK_TOKENS = 16
"""Tokens decoded between two checks whether to stop."""


class MegatronEngine:
    """Implements `RolloutEngine` on prefill and decode of the network.

    Every rank of a replica calls `generate` with the same requests; the leader's tokens count on
    all of them. Media placeholders are never sampled.

    Args:
        model: This rank's stage; its weights are read again at every wave.
        seed: The run's seed.
        max_batch_size: Most sequences decoded at once; what does not fit waits for the next wave.
        max_prefill_tokens: Most prompt tokens of one prefill.
        should_stop: Called on the replica's leader while it decodes; `None` on every rank never
            stops.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        seed: int,
        max_batch_size: int = 128,
        max_prefill_tokens: int = DEFAULT_PREFILL_TOKENS,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        assert max_batch_size > 0, "at least one sequence at a time"
        self._model = model
        self._seed = seed
        self._max_batch_size = max_batch_size
        self._max_prefill_tokens = max_prefill_tokens
        self._should_stop = should_stop
        # A response that holds a media placeholder has no features for it: training on it would
        # have to invent them.
        architecture = model.architecture
        placeholders = (
            [architecture.image_token_id, architecture.video_token_id]
            if architecture.has_vision
            else []
        )
        device = next(model.parameters()).device
        self._placeholders = (
            torch.tensor(placeholders, dtype=torch.int64, device=device) if placeholders else None
        )

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> list[list[Generation]]:
        """Return `num_rollouts` continuations per request, in the order of the requests.

        Raises:
            StopRequested: On every rank of the replica, if its leader is to stop.
        """
        results: list[dict[int, Generation]] = [{} for _ in requests]
        training = self._model.training
        self._model.eval()
        try:
            for wave in plan_waves(requests, self._max_batch_size, self._max_prefill_tokens):
                generations = iter(self._run_wave(requests, wave, sampling))
                for part in wave:
                    for rollout in range(part.first, part.first + part.count):
                        results[part.request][rollout] = next(generations)
        finally:
            self._model.train(training)
        return [[group[rollout] for rollout in sorted(group)] for group in results]

    def _run_wave(
        self,
        requests: Sequence[GenerationRequest],
        wave: Sequence[RequestPart],
        sampling: SamplingParams,
    ) -> list[Generation]:
        """Prefill the wave's prompts and decode until every rollout has ended."""
        device = next(self._model.parameters()).device
        cache = DecodeCache(max_new_tokens=max(sampling.max_new_tokens - 1, 0))
        logits = self._prefill([requests[part.request] for part in wave], cache, device)
        counts = torch.tensor([part.count for part in wave])
        rows = torch.repeat_interleave(torch.arange(len(wave)), counts).to(device)
        cache.select(rows)
        logits = logits.index_select(0, rows) if logits is not None else None
        starts = [
            requests[part.request].prompt.next_position for part in wave for _ in range(part.count)
        ]
        streams = UniformStreams(
            [
                generator(self._seed, *requests[part.request].seed_path, rollout)
                for part in wave
                for rollout in range(part.first, part.first + part.count)
            ]
        )
        batch = RolloutBatch(starts, sampling, self._model.architecture.vocab_size, device)
        for step in range(sampling.max_new_tokens):
            if step % STOP_CHECK_TOKENS == 0:
                self._check_stop()
            tokens, logprobs = self._choose(
                logits, streams.column(step, batch.rows), batch, sampling
            )
            batch.append(tokens, logprobs)
            if batch.num_active == 0 or step + 1 == sampling.max_new_tokens:
                break
            if batch.num_active <= (1 - COMPACTION_FRACTION) * batch.size:
                kept = batch.drop_finished()
                cache.select(kept)
                tokens = tokens.index_select(0, kept)
            # A sequence that nothing could be drawn for goes along until it is dropped, with any
            # token.
            logits = decode(self._model, tokens.clamp(min=0), batch.positions(), cache)
        return batch.generations()

    def _check_stop(self) -> None:
        if self._should_stop is None:
            return
        device = next(self._model.parameters()).device
        if replica.broadcast_from_leader(
            torch.tensor([self._should_stop()], dtype=torch.uint8, device=device)
        ).item():
            raise StopRequested

    def _prefill(
        self, requests: Sequence[GenerationRequest], cache: DecodeCache, device: torch.device
    ) -> torch.Tensor | None:
        """Return the prompts' next-token logits, this rank's part of the vocabulary, on the last
        stage.
        """
        prompts = [request.prompt for request in requests]
        token_ids = torch.from_numpy(np.concatenate([prompt.token_ids for prompt in prompts])).to(
            device
        )
        positions = torch.from_numpy(
            np.concatenate([prompt.positions for prompt in prompts], axis=1)
        ).to(device)
        bounds = torch.tensor(
            [0, *accumulate(len(prompt.token_ids) for prompt in prompts)],
            dtype=torch.int32,
            device=device,
        )
        patches = grids = None
        vision: list[VisionInput] = [item for request in requests for item in request.vision]
        if vision and parallel.is_first_stage():
            patches = torch.from_numpy(np.concatenate([item.patches for item in vision])).to(device)
            grids = torch.tensor([item.grid for item in vision], device=device)
        return prefill(self._model, token_ids, positions, bounds, patches, grids, cache)

    def _choose(
        self,
        logits: torch.Tensor | None,
        uniforms: torch.Tensor,
        batch: RolloutBatch,
        sampling: SamplingParams,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw on the last stage and broadcast in the replica; int64 tokens and float32 log-probs,
        each `[batch]`.
        """
        if logits is not None:
            whole = replica.gather_vocabulary(logits)
            tokens, logprobs = choose_tokens(
                whole, uniforms.to(whole.device), sampling, batch.seen, self._placeholders
            )
        else:
            tokens = torch.empty(batch.size, dtype=torch.int64, device=batch.device)
            logprobs = torch.empty(batch.size, dtype=torch.float32, device=batch.device)
        if parallel.model_group().size() == 1:
            return tokens, logprobs
        # Both are exact in float64, so that one message carries them.
        message = replica.broadcast_from_leader(torch.stack([tokens.double(), logprobs.double()]))
        return message[0].long(), message[1].float()
