"""Sampling with the policy's own Megatron network: one prefill per prompt, then all its rollouts
token by token, in a batch that others join as rows become free.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, count

import numpy as np
import torch

from encoders.processor import VisionInput
from zppo_mm.interruption import StopRequested
from zppo_mm.models.decoding.cache_size import GIB, CacheSize
from zppo_mm.models.decoding.decode import decode, prefill
from zppo_mm.models.layers.cache import SLOTS_PER_BLOCK, Admission, DecodeCache
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel import replica
from zppo_mm.randomness import generator
from zppo_mm.rollout.admission import AdmissionQueue, Candidate
from zppo_mm.rollout.batch import RolloutBatch
from zppo_mm.rollout.engine import Generation, GenerationRequest, SamplingParams
from zppo_mm.rollout.token_choice import choose_tokens

DEFAULT_PREFILL_TOKENS = 65_536
DEFAULT_CACHE_BYTES = 16 * GIB
STOP_CHECK_STEPS = 16
"""Steps between two checks whether to stop."""


class MegatronEngine:
    """Implements `RolloutEngine` on prefill and decode of the network, with continuous batching.

    Every rank of a replica calls `generate` with the same requests; the leader's tokens count on
    all of them. Media placeholders are never sampled.

    Args:
        model: This rank's stage; its weights are read again at every call.
        seed: The run's seed.
        max_batch_size: Most sequences decoded at once; the others wait.
        max_prefill_tokens: Most prompt tokens of one prefill.
        should_stop: Called on the replica's leader while it decodes; `None` on every rank never
            stops.
        cache_bytes: Most memory of the decoding cache on each GPU. What finds no room waits; if
            running sequences find none, the youngest are computed again later.
        slots_per_block: Tokens of a block of the cache.
        max_prefill_patches: Most patches of media of one prefill.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        seed: int,
        max_batch_size: int = 128,
        max_prefill_tokens: int = DEFAULT_PREFILL_TOKENS,
        should_stop: Callable[[], bool] | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        slots_per_block: int = SLOTS_PER_BLOCK,
        max_prefill_patches: int = sys.maxsize,
    ) -> None:
        assert max_batch_size > 0, "at least one sequence at a time"
        self._model = model
        self._seed = seed
        self._max_batch_size = max_batch_size
        self._max_prefill_tokens = max_prefill_tokens
        self._max_prefill_patches = max_prefill_patches
        self._should_stop = should_stop
        self._cache_bytes = cache_bytes
        # A response that holds a media placeholder has no features for it: training on it would
        # have to invent them.
        architecture = model.architecture
        placeholders = (
            [architecture.image_token_id, architecture.video_token_id]
            if architecture.has_vision
            else []
        )
        self._device = next(model.parameters()).device
        self._placeholders = (
            torch.tensor(placeholders, dtype=torch.int64, device=self._device)
            if placeholders
            else None
        )
        self._cache_size = CacheSize.of(
            architecture,
            model.config.tensor_model_parallel_size,
            model.config.pipeline_model_parallel_size,
            model.config.params_dtype.itemsize,
            slots_per_block,
        )

    def check_longest(self, prompt_tokens: int, new_tokens: int) -> None:
        """Check that the cache has room for a prompt and a response of these lengths.

        Raises:
            ConfigError: It has not.
        """
        self._cache_size.check(self._cache_bytes, self._max_batch_size, prompt_tokens, new_tokens)

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> list[list[Generation]]:
        """Return `num_rollouts` continuations per request, in the order of the requests; none of
        one that does not fit the cache.

        Raises:
            StopRequested: On every rank of the replica, if its leader is to stop.
        """
        requests = [
            each if self._fits(each, sampling) else replace(each, num_rollouts=0)
            for each in requests
        ]
        results: list[dict[int, Generation]] = [{} for _ in requests]
        queue = AdmissionQueue(
            requests, self._max_batch_size, self._max_prefill_tokens, self._max_prefill_patches
        )
        if queue:
            training = self._model.training
            self._model.eval()
            try:
                self._decode_all(requests, sampling, queue, results)
            finally:
                self._model.train(training)
        return [[group[rollout] for rollout in sorted(group)] for group in results]

    def _decode_all(
        self,
        requests: Sequence[GenerationRequest],
        sampling: SamplingParams,
        queue: AdmissionQueue,
        results: list[dict[int, Generation]],
    ) -> None:
        """Decode until every rollout has ended; rows that become free go to those that wait."""
        cache = self._open_cache(requests, sampling)
        batch = RolloutBatch(
            cache.max_rows, sampling, self._model.architecture.vocab_size, self._device
        )

        preempted: Counter[tuple[int, int]] = Counter()

        def step(logits: torch.Tensor | None, first: int) -> None:
            """Draw a token of the rows from `first` on; those that end leave the batch."""
            ended = batch.append(*self._choose(logits, batch, first, sampling), first)
            for row in ended:
                request, rollout = batch.names[row]
                results[request][rollout] = replace(
                    batch.generation(row, sampling.stop_token_ids),
                    num_preemptions=preempted[request, rollout],
                )
            batch.release(ended, cache)

        for number in count():
            if number % STOP_CHECK_STEPS == 0:
                self._check_stop()
            taken = queue.take(cache)
            if taken:
                first = len(batch)
                step(self._admit(requests, taken, batch, cache), first)
            if not batch:
                if not queue:
                    return
                continue
            while cache.num_missing_blocks > 0:
                preempted[_preempt(batch, cache, queue)] += 1
            tokens, positions = batch.last_tokens(), batch.positions()
            step(decode(self._model, tokens, positions, cache), 0)

    def _fits(self, request: GenerationRequest, sampling: SamplingParams) -> bool:
        """Return whether the cache has room for a request whatever else is in the batch."""
        needed = self._cache_size.needed_bytes(
            self._max_batch_size, len(request.prompt.token_ids), _kept_tokens(sampling)
        )
        return needed <= self._cache_bytes

    def _open_cache(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> DecodeCache:
        """Return a cache within the budget, no larger than what these requests can fill."""
        prompts = [len(each.prompt.token_ids) for each in requests if each.num_rollouts]
        rows = min(self._max_batch_size, sum(each.num_rollouts for each in requests))
        new_tokens, size = _kept_tokens(sampling), self._cache_size
        most = rows * size.blocks_of(new_tokens) + min(
            sum(map(size.blocks_of, prompts)), rows * size.blocks_of(max(prompts))
        )
        fitting = size.num_blocks(self._cache_bytes, rows)
        num_blocks = most if fitting is None else min(most, fitting)
        return DecodeCache(num_blocks, rows, size.slots_per_block)

    def _admit(
        self,
        requests: Sequence[GenerationRequest],
        taken: Sequence[Candidate],
        batch: RolloutBatch,
        cache: DecodeCache,
    ) -> torch.Tensor | None:
        """Prefill prompts, and what preempted rollouts had sampled; returns the next-token logits
        of the new rows, this rank's part of the vocabulary, on the last stage.
        """
        logits = self._prefill(requests, taken, cache)
        for each in taken:
            request = requests[each.request]
            for rollout in each.rollouts:
                batch.add(
                    (each.request, rollout),
                    request.prompt.next_position,
                    generator(self._seed, *request.seed_path, rollout),
                    each.response_ids,
                    each.rollout_logprobs,
                )
        if logits is None:
            return None
        sizes = torch.tensor([len(each.rollouts) for each in taken], device=self._device)
        return logits.repeat_interleave(sizes, 0)

    def _check_stop(self) -> None:
        if self._should_stop is None:
            return
        if replica.broadcast_from_leader(
            torch.tensor([self._should_stop()], dtype=torch.uint8, device=self._device)
        ).item():
            raise StopRequested

    def _prefill(
        self,
        requests: Sequence[GenerationRequest],
        taken: Sequence[Candidate],
        cache: DecodeCache,
    ) -> torch.Tensor | None:
        """Return the next-token logits of each candidate, this rank's part of the vocabulary, on
        the last stage.
        """
        chosen = [requests[each.request] for each in taken]
        ids, positions = [], []
        for request, each in zip(chosen, taken, strict=True):
            # Text after the prompt: the same position on all axes.
            after = request.prompt.next_position + np.arange(len(each.response_ids))
            ids += [request.prompt.token_ids, each.response_ids]
            positions += [request.prompt.positions, np.tile(after, (3, 1))]
        lengths = [
            len(request.prompt.token_ids) + len(each.response_ids)
            for request, each in zip(chosen, taken, strict=True)
        ]
        patches = grids = None
        vision: list[VisionInput] = [item for request in chosen for item in request.vision]
        if vision and parallel.is_first_stage():
            patches = torch.from_numpy(np.concatenate([item.patches for item in vision])).to(
                self._device
            )
            grids = torch.tensor([item.grid for item in vision], device=self._device)
        return prefill(
            self._model,
            torch.from_numpy(np.concatenate(ids)).to(self._device),
            torch.from_numpy(np.concatenate(positions, axis=1)).to(self._device),
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=self._device),
            patches,
            grids,
            cache,
            [
                Admission(each.request, len(request.prompt.token_ids), len(each.rollouts))
                for request, each in zip(chosen, taken, strict=True)
            ],
        )

    def _choose(
        self, logits: torch.Tensor | None, batch: RolloutBatch, first: int, sampling: SamplingParams
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw for the rows from `first` on, on the last stage, and broadcast in the replica; int64
        tokens and float32 log-probs, each `[rows]`.
        """
        uniforms = batch.uniforms(first)
        if logits is not None:
            whole = replica.gather_vocabulary(logits)
            tokens, logprobs = choose_tokens(
                whole, uniforms.to(whole.device), sampling, batch.seen(first), self._placeholders
            )
        else:
            tokens = torch.empty(len(uniforms), dtype=torch.int64, device=self._device)
            logprobs = torch.empty(len(uniforms), dtype=torch.float32, device=self._device)
        if parallel.model_group().size() == 1:
            return tokens, logprobs
        # Both are exact in float64, so that one message carries them.
        message = replica.broadcast_from_leader(torch.stack([tokens.double(), logprobs.double()]))
        return message[0].long(), message[1].float()


def _kept_tokens(sampling: SamplingParams) -> int:
    """Return the tokens of the longest response that the cache keeps: not the one decoded last, but
    rows join only where one finds room.
    """
    return max(sampling.max_new_tokens - 1, 1)


def _preempt(batch: RolloutBatch, cache: DecodeCache, queue: AdmissionQueue) -> tuple[int, int]:
    """Let the youngest row wait until there is room for it again, and return its name; the draws of
    its tokens are kept, its cache is not.
    """
    row = batch.youngest()
    name = batch.names[row]
    queue.put_back(Candidate(name[0], name[1:], *batch.response(row)))
    batch.release(np.array([row]), cache)
    return name
