"""Trained weights to all servers, and the proof that they have them."""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from zppo_mm.errors import RolloutServersLostError
from zppo_mm.experience import Prompt
from zppo_mm.interruption import StopRequested
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.exchange import never
from zppo_mm.randomness import generator
from zppo_mm.rollout.engine import GenerationRequest, RolloutEngine, SamplingParams
from zppo_mm.rollout.served.adapter_files import AdapterFiles
from zppo_mm.rollout.served.server_control import Probe, PublishedAdapter, PublishedWeights
from zppo_mm.rollout.served.supervision import RolloutServers
from zppo_mm.rollout.served.weight_files import WeightFile, WeightFiles

logger = logging.getLogger(__name__)

PROBE_PROMPT_TOKENS = 200
"""Longer than a block of any prefix cache: with a stale one, the continuation would be that of the
weights before.
"""
PROBE_TOKENS = 8


class WeightSync:
    """Sends the weights of one version after another; every rank has one and calls it.

    Args:
        model: This rank's stage.
        source_dir: The folder that servers start from.
        folder: Where the weights are written for them; rank 0's counts.
        engine: Samples with the trained network itself, for the probe.
        servers: All servers, on rank 0; `None` on the others.
        should_stop: Whether the run is to end, as far as this rank knows.
        sends_adapters: Whether the frozen weights are sent once, and adapters every time.

    Attributes:
        counts: So far, on rank 0: `bytes` written, `failures` of servers, `restarts`, and `seconds`
            that the ranks waited.
        servers: As given.
        opened: What ends with it.
        run: Names the run in the versions of its weights, the same on every rank.

    Raises:
        ModelError: The source does not fit; raised on every rank.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        source_dir: Path,
        folder: Path,
        engine: RolloutEngine,
        servers: RolloutServers | None,
        should_stop: Callable[[], bool] = never,
        sends_adapters: bool = False,
    ) -> None:
        self.servers = servers
        self.opened = contextlib.ExitStack()
        if servers is not None:
            self.opened.callback(servers.close)
        self._files = WeightFiles(model, source_dir, folder, merges=not sends_adapters)
        self._adapters = (
            AdapterFiles(model, source_dir, folder / "adapters") if sends_adapters else None
        )
        self._has_frozen = False
        self._frozen: WeightFile | None = None
        self._engine = engine
        self._should_stop = should_stop
        self._dtype = str(model.config.params_dtype).removeprefix("torch.")
        architecture = model.architecture
        self._placeholders = (
            frozenset({architecture.image_token_id, architecture.video_token_id})
            if architecture.has_vision
            else frozenset()
        )
        # Special tokens, which might mean a medium, have the highest ids.
        bound = architecture.vocab_size // 2
        ids = generator(0, "weight sync").integers(0, bound, PROBE_PROMPT_TOKENS)
        self._prompt_ids = [int(token) for token in ids]
        self.run: str = parallel.broadcast_object(secrets.token_hex(8))
        self._bytes = 0
        self._seconds = 0.0

    @property
    def counts(self) -> dict[str, float]:
        """What was sent and what went wrong so far, on rank 0."""
        counted: Counter[str] = self.servers.counts if self.servers is not None else Counter()
        return {
            "bytes": self._bytes,
            "seconds": self._seconds,
            "failures": counted["failures"],
            "restarts": counted["restarts"],
        }

    def version_text(self, version: int) -> str:
        """Return what servers put beside the tokens of a version; that of another run differs."""
        return f"{self.run}/{version}"

    def push(self, version: int) -> None:
        """Send the present weights; every rank calls it.

        After it, every server has the version or is being brought to it, and at least one has it.

        Args:
            version: Rollout step that samples with them when it is on-policy.

        Raises:
            RolloutServersLostError: No server is left; raised on every rank.
            StopRequested: The run is to end; raised on every rank.
            ModelError: The weights could not be written; raised on every rank.
        """
        started = time.monotonic()
        before = self._bytes
        file, adapter = self._write(version)
        written = time.monotonic()
        # Only those who write know what to expect; the other replicas have the same weights.
        probe = self._probe() if parallel.replica_rank() == 0 else None
        problem, is_stopping = parallel.on_rank_zero(
            lambda: self._publish(version, file, adapter, probe)
        )
        if is_stopping:
            raise StopRequested
        if problem:
            raise RolloutServersLostError(problem)
        if file is not None:
            self._seconds += time.monotonic() - started
            logger.info(
                "weights of version %d: %d bytes, written in %.2f s, with the servers after %.2f s",
                version,
                self._bytes - before,
                written - started,
                time.monotonic() - started,
            )

    def close(self) -> None:
        """End the servers that the run started, and remove the weights."""
        self.opened.close()

    def _write(self, version: int) -> tuple[WeightFile | None, PublishedAdapter | None]:
        """Write what changes, and the frozen weights the first time."""
        if not self._has_frozen:
            self._frozen = self._files.write(version)
            self._bytes += self._frozen.num_bytes if self._frozen is not None else 0
        if self._adapters is None:
            return self._frozen, None
        self._has_frozen = True
        adapter = self._adapters.write(version)
        self._bytes += adapter.file.num_bytes if adapter is not None else 0
        return self._frozen, adapter

    def _publish(
        self,
        version: int,
        file: WeightFile | None,
        adapter: PublishedAdapter | None,
        probe: Probe | None,
    ) -> tuple[str, bool]:
        """Return why no server has the weights, and whether the run is to end instead."""
        assert self.servers is not None, "rank 0 has the servers"
        assert file is not None, "rank 0 writes"
        assert probe is not None, "rank 0 is of the first replica"
        try:
            self.servers.publish(
                PublishedWeights(file, self.version_text(version), probe, adapter),
                self._should_stop,
            )
        except RolloutServersLostError as error:
            return str(error), False
        except StopRequested:
            return "", True
        return "", False

    def _probe(self) -> Probe:
        """Return the network's greedy continuation; every rank of the replica calls it."""
        ids = self._prompt_ids
        positions = np.tile(np.arange(len(ids), dtype=np.int64), (3, 1))
        prompt = Prompt("", np.array(ids, dtype=np.int64), positions, len(ids))
        [[generation]] = self._engine.generate(
            [GenerationRequest(prompt, (), 1, ("weight sync",))],
            SamplingParams(temperature=0.0, max_new_tokens=PROBE_TOKENS, stop_token_ids=()),
        )
        return Probe(
            tuple(ids),
            tuple(int(token) for token in generation.response_ids),
            tuple(float(value) for value in generation.rollout_logprobs),
            self._placeholders,
            self._dtype,
        )
