"""The ranks of a machine open every medium once, whichever of them needs it, and get the same as
where each opens its own.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.errors import ReasonedError
from data.health import SampleHealth
from data.media.node_cache import NodeCache
from data.media.opening import Frames, MediaLimits
from data.media.store import MediaStore
from data.question import MediaRef, Question
from data.sample import ShardSample
from data.shard_writer import write_shards
from data.shards import ShardFolder
from data.stream import QuestionStream
from tests.support.launch import run_ranks
from tests.support.tiny_folder import build_folder
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.experience import PromptInstance
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.exchange import ParallelExchange
from zppo_mm.rollout.feed import QuestionFeed
from zppo_mm.rollout.prefetch import MediaPrefetch
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.rollout.replica_parts import split_instances

pytestmark = pytest.mark.timeout(700)  # three starts on a machine that may be busy
NUM_QUESTIONS, PER_STEP, STEPS = 16, 5, 2
BROKEN, BROKEN_FILE = "k3", "k3.0.png"


class CountingStore:
    """Opens media and notes each in a file that all ranks append to."""

    def __init__(self, log: Path) -> None:
        self._store = MediaStore(MediaLimits())
        self._log = log

    def open(self, ref: MediaRef) -> Frames:
        with self._log.open("a") as file:
            file.write(f"{ref.key}.{ref.extension}\n")
        return self._store.open(ref)

    def close(self) -> None:
        self._store.close()


def write_questions(folder: Path) -> None:
    samples = []
    random = np.random.default_rng(0)
    for index in range(NUM_QUESTIONS):
        pictures = []
        for number in range(1 + index % 2):
            content = io.BytesIO()
            pixels = random.integers(0, 256, (32, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(content, "PNG")
            pictures.append((f"{number}.png", content.getvalue()))
        if f"k{index}" == BROKEN:
            pictures[0] = ("0.png", b"no picture")
        fields = {"id": f"q{index}", "question": "?", "answer": "1", "answer_type": "math"}
        samples.append(ShardSample(f"k{index}", fields, pictures))
    write_shards(folder, samples)


def take_sample_and_train(
    folder: Path, shards: Path, root: Path, tensor: int, max_bytes: int
) -> dict[str, Any]:
    """Go the way of media through two steps: the feed checks, each replica makes its prompts, plain
    and reformulated, and each trains on the questions of another one, twice.
    """
    parallel.initialize(ParallelConfig(tensor_model_parallel_size=tensor), 0)
    exchange, health = ParallelExchange(), SampleHealth(max_bad_fraction=0.5)
    store = CountingStore(root / "opened.log")
    cache = NodeCache("run", max_bytes, root) if max_bytes else None
    encoder = PromptEncoder(folder, store.open, cache=cache)
    stream = QuestionStream([(ShardFolder(shards), 1.0)], 3, health)
    prefetch = MediaPrefetch(encoder.media.prefetch, 2)
    feed = QuestionFeed(
        stream,
        encoder,
        health,
        exchange,
        plain_text=lambda question: question.text,
        max_prompt_tokens=500,
        prefetch=prefetch if cache is not None else None,
    )
    taken: list[str] = []
    seen: dict[str, list[Any]] = {}
    states = []
    for step in range(STEPS):
        questions = feed.take(PER_STEP)
        states.append((stream.state_dict(), health.state_dict()))
        taken += [question.id for question in questions]
        for kind in ("new", "bcq"):
            instances = [PromptInstance(f"{step}/{q.id}", q, kind, q.text) for q in questions]
            for index in split_instances(instances, exchange.num_replicas)[exchange.replica]:
                prompt, vision = encoder.encode("?", questions[index])
                seen[questions[index].id] = [
                    prompt.token_ids.tolist(),
                    prompt.positions.tolist(),
                    *(item.patches.tobytes() for item in vision),
                ]
        other = (parallel.data_rank() + 1) % parallel.data_size()
        for _ in range(2):
            encoder.forget_media()
            for question in questions[other :: parallel.data_size()]:
                patches = [item.patches.tobytes() for item in encoder.vision_inputs(question)]
                seen.setdefault(question.id, [None, None, *patches])
                assert seen[question.id][2:] == patches
        prefetch.wait()
        parallel.barrier()
        if cache is not None:
            cache.next_step()
    failure = refusal(encoder, Question("bad", "", (_broken(shards),), "1", "math"))
    parallel.barrier()
    counts = dict(cache.counts) if cache is not None else {}
    prefetch.close()
    if cache is not None:
        cache.close()
    store.close()
    parallel.shutdown()
    return {"taken": taken, "seen": seen, "states": states, "failure": failure, "counts": counts}


def _broken(shards: Path) -> MediaRef:
    shard = next(str(path) for path in shards.glob("*.tar"))
    return MediaRef("image", shard, BROKEN, "0.png")


def refusal(encoder: PromptEncoder, question: Question) -> tuple[str, str]:
    with pytest.raises(ReasonedError) as caught:
        encoder.encode("?", question)
    return caught.value.reason, str(caught.value)


@pytest.mark.parametrize("tensor", [2, 1], ids=["tensor ranks", "replicas"])
def test_each_medium_is_opened_once_on_a_machine(tmp_path: Path, tensor: int) -> None:
    build_folder(tmp_path / "model")
    write_questions(tmp_path / "shards")
    roots = {name: tmp_path / name for name in ("alone", "together")}
    for root in roots.values():
        root.mkdir()
    paths = tmp_path / "model", tmp_path / "shards"
    [alone] = run_ranks(take_sample_and_train, 1, *paths, roots["alone"], 1, 0)
    together = run_ranks(take_sample_and_train, 2, *paths, roots["together"], tensor, 1 << 30)
    for result in together:
        for name in ("taken", "states", "failure"):
            assert result[name] == alone[name], name
        for question, (ids, positions, *patches) in result["seen"].items():
            assert patches == alone["seen"][question][2:]
            assert ids is None or [ids, positions] == alone["seen"][question][:2]
    opened = {
        name: Counter((root / "opened.log").read_text().split()) for name, root in roots.items()
    }
    # Without a cache: when it is drawn, and again for each of the updates that forget it.
    drawn = [key for key in opened["alone"] if key != BROKEN_FILE]
    assert {opened["alone"][key] for key in drawn} == {3}
    assert {opened["together"][key] for key in drawn} == {1}
    # The rest was opened ahead for a third step.
    ahead = {key for key in opened["together"] if key not in opened["alone"]}
    assert ahead
    assert {opened["together"][key] for key in ahead} == {1}
    counts = sum((Counter(result["counts"]) for result in together), Counter[str]())
    good = [key for key in opened["together"] if key != BROKEN_FILE]
    assert counts["opened"] == len(good)
    assert counts["not_kept"] == 0
    assert counts["prefetched"] >= len(ahead)
    assert not (roots["together"] / f"zppo_mm-{os.getuid()}" / "run").exists()
