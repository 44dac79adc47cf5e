"""An engine that samples elsewhere, in this process: with a copy of the network that has the
weights it was sent last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from zppo_mm.interruption import StopRequested
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.rollout.engine import Generation, GenerationRequest, SamplingParams, VersionSpan
from zppo_mm.rollout.megatron_engine import MegatronEngine

Weights = dict[str, torch.Tensor]


class CopiedEngine:
    """Implements `ServedEngine`. What is started is sampled when it is waited for, with the weights
    of the start.

    Args:
        trained: The network that is trained.
        copied: Another one of the same shape; its weights are overwritten.
        seed: The run's seed.
        tokens_before_update: Tokens that a response has when other weights come while it is under
            way, with which it goes on; 0 refuses such weights.

    Attributes:
        version: Of the weights that it has.
        num_stops: Waits that are to end with `StopRequested`.
        notify: Called with every event: `start`, `wait`, `update`.
    """

    def __init__(
        self,
        trained: VisionLanguageModel,
        copied: VisionLanguageModel,
        seed: int,
        tokens_before_update: int = 0,
    ) -> None:
        self.version = 0
        self.num_stops = 0
        self.notify: Callable[[str], object] = lambda event: None
        self.tokens_before_update = tokens_before_update
        self.weights: Weights = {}
        self._trained, self._copied = trained, copied
        self._engine = MegatronEngine(copied, seed)
        self._under_way: list[PendingCopies] = []

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> list[list[Generation]]:
        return self.start(requests, sampling).wait()

    def start(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> PendingCopies:
        assert self.weights, "weights come first"
        self.notify("start")
        pending = PendingCopies(self, requests, sampling)
        self._under_way.append(pending)
        return pending

    def update_weights(self, version: int) -> None:
        if version == self.version:
            return
        self.notify("update")
        for pending in self._under_way:
            if not pending.is_over:
                pending.interrupt()
        self._under_way = [pending for pending in self._under_way if not pending.is_over]
        self.version = version
        self.weights = {
            name: parameter.detach().clone() for name, parameter in self._trained.named_parameters()
        }

    def close(self) -> None:
        self._under_way = []

    def sample(
        self,
        weights: Weights,
        version: int,
        requests: Sequence[GenerationRequest],
        sampling: SamplingParams,
    ) -> list[list[Generation]]:
        with torch.no_grad():
            for name, parameter in self._copied.named_parameters():
                parameter.copy_(weights[name])
        return [
            [
                replace(each, versions=(VersionSpan(version, len(each.response_ids)),))
                for each in group
            ]
            for group in self._engine.generate(requests, sampling)
        ]


class PendingCopies:
    """Implements `PendingGenerations`."""

    def __init__(
        self,
        engine: CopiedEngine,
        requests: Sequence[GenerationRequest],
        sampling: SamplingParams,
    ) -> None:
        self.is_over = False
        self._engine, self._requests, self._sampling = engine, requests, sampling
        self._weights, self._version = engine.weights, engine.version
        self._begun: list[list[Generation]] | None = None

    def wait(self) -> list[list[Generation]]:
        self._engine.notify("wait")
        if self._engine.num_stops:
            self._engine.num_stops -= 1
            raise StopRequested
        self.is_over = True
        if self._begun is None:
            return self._sample(self._requests, self._sampling)
        return [
            [self._continued(request, index, each) for index, each in enumerate(group)]
            for request, group in zip(self._requests, self._begun, strict=True)
        ]

    def cancel(self) -> None:
        self.is_over = True

    def interrupt(self) -> None:
        """Sample the first tokens: the weights are about to change."""
        num_tokens = self._engine.tokens_before_update
        assert num_tokens, "other weights came while rollouts were under way"
        self._begun = self._sample(
            self._requests, replace(self._sampling, max_new_tokens=num_tokens)
        )

    def _sample(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> list[list[Generation]]:
        return self._engine.sample(self._weights, self._version, requests, sampling)

    def _continued(self, request: GenerationRequest, index: int, begun: Generation) -> Generation:
        """Return a response whose first tokens are there, the others by the weights of now."""
        if begun.finish_reason == "stop":
            return begun
        rest = replace(
            request,
            prompt=request.prompt.continued(begun.response_ids),
            num_rollouts=1,
            seed_path=(*request.seed_path, index, "rest"),
        )
        left = self._sampling.max_new_tokens - len(begun.response_ids)
        ((added,),) = self._engine.sample(
            self._engine.weights,
            self._engine.version,
            [rest],
            replace(self._sampling, max_new_tokens=left),
        )
        return replace(
            added,
            response_ids=np.concatenate([begun.response_ids, added.response_ids]),
            rollout_logprobs=np.concatenate([begun.rollout_logprobs, added.rollout_logprobs]),
            versions=begun.versions + added.versions,
        )
