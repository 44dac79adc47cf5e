"""The gate on a real run of the bundled student: green as it is, red when something is really
wrong, and without a trace.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import random
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from data.errors import MediaError
from data.health import SampleHealth
from data.media.node_cache import NodeCache
from data.media.opening import Frames
from data.question import MediaRef, Question
from zppo_mm.config.load import load_config
from zppo_mm.config.schema import ParityConfig
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.exchange import ParallelExchange
from zppo_mm.parity.compare import Limit, ParityError
from zppo_mm.parity.gate import check_parity, limit_for
from zppo_mm.parity.oracle import choose_device, source_logprobs, weight_bytes
from zppo_mm.parity.questions import Chosen, UncountedHealth, choose_questions
from zppo_mm.rewards.verify import Verifier
from zppo_mm.rollout.engine import Generation, GenerationRequest, SamplingParams
from zppo_mm.rollout.feed import QuestionFeed
from zppo_mm.rollout.megatron_engine import MegatronEngine
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.rollout.sampler import GroupSampler
from zppo_mm.run.build import build_run, student_folder
from zppo_mm.run.parts import Run
from zppo_mm.run.questions import build_stream
from zppo_mm.run_folder import RunFolder

# Float32 sums in another order; the largest seen is 5e-6.
LARGEST_GAP = 1e-4
SHIFT = 0.5


def start(output_dir: Path, *options: str) -> Run:
    config = load_config(
        None, [f"output_dir={output_dir}", "method=grpo", "parity.max_response_tokens=12", *options]
    )
    parallel.initialize(config.parallel, config.seed)
    return build_run(config)


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(output_dir: Path) -> Iterator[Run]:
    run = start(output_dir)
    yield run
    run.close()
    parallel.shutdown()


def with_options(run: Run, **changes: Any) -> Run:
    config = dataclasses.replace(
        run.config, parity=dataclasses.replace(run.config.parity, **changes)
    )
    return dataclasses.replace(run, config=config)


def with_sampler(run: Run, sampler: GroupSampler) -> Run:
    return dataclasses.replace(run, stages=dataclasses.replace(run.stages, sampler=sampler))


def record(folder: Path) -> dict[str, Any]:
    [line] = (folder / "parity.jsonl").read_text().splitlines()
    return json.loads(line)


@pytest.mark.medium
def test_a_sound_run_passes_and_is_recorded(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        check_parity(run, RunFolder(tmp_path), 0)
    written = record(tmp_path)
    assert [row["modality"] for row in written["modalities"]] == ["text", "image", "video"]
    assert (written["step"], written["dtype"], written["findings"], written["not_compared"]) == (
        0,
        "float32",
        [],
        "",
    )
    for row in written["modalities"]:
        assert row["num_questions"] == 3
        assert row["rollout"]["num_tokens"] > row["source"]["num_tokens"] > 0
        assert 0 <= row["rollout"]["mean"] <= row["rollout"]["max"] <= LARGEST_GAP
        assert 0 <= row["source"]["mean"] <= row["source"]["max"] <= LARGEST_GAP
        assert row["media"] == row["media_in_prompt"] == (0 if row["modality"] == "text" else 3)
        assert row["placeholders"] == row["features"]
    assert "parity at step 0, float32, limit 0.001 nats for a gap of any token" in caplog.text


def random_states() -> list[Any]:
    numpy = np.random.get_state()
    return [random.getstate(), numpy[1].tolist(), numpy[2], torch.get_rng_state().tolist()]


class SlowVerifier(Verifier):
    """Counts one response of every call as one that took too long."""

    num_timeouts = 0

    def verify_all(self, items: Sequence[tuple[Question, str]]) -> Any:
        self.num_timeouts += 1
        return super().verify_all(items)


class SteppedCache(NodeCache):
    """Counts the steps that go by."""

    num_steps = 0

    def next_step(self) -> None:
        self.num_steps += 1
        super().next_step()


@pytest.mark.medium
def test_the_run_does_not_notice(run: Run, tmp_path: Path) -> None:
    stream, states = run.stream.state_dict(), random_states()
    slow, engine = SlowVerifier(), MegatronEngine(run.policy.model, run.config.seed)
    sampler = GroupSampler(engine, run.encoder, slow, ParallelExchange())
    cache = SteppedCache(tmp_path.name, 1 << 20)
    slowed = dataclasses.replace(with_sampler(run, sampler), verifier=slow, counted={}, cache=cache)
    check_parity(slowed, RunFolder(tmp_path), 0)
    slow.close()
    cache.close()
    assert cache.num_steps == 0
    assert run.stream.state_dict() == stream
    assert random_states() == states
    assert slow.num_timeouts == 1
    assert slowed.take_losses().values()["reward/timeouts"] == 0
    fresh = build_stream(run.config, SampleHealth())
    wanted = [question.id for question in fresh.take(20)]
    assert [question.id for question in run.feed.take(20)] == wanted
    # From there on too, with questions that lie ahead.
    stream = run.stream.state_dict()
    check_parity(run, RunFolder(tmp_path), 0)
    assert run.stream.state_dict() == stream
    assert [question.id for question in run.feed.take(5)] == [
        question.id for question in fresh.take(5)
    ]


@pytest.mark.medium
def test_a_weight_that_is_not_the_folders_is_found(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weight = run.policy.model.language_model.decoder.layers[2].mlp.linear_fc2.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[5, 7] += 3.0
        said = (
            r"text: the source checkpoint in transformers and the training forward pass disagree, "
            r"got a largest gap .* \(parity.max_gap\)"
        )
        where = (
            r"; first at question '[\w/-]+', token \d+ of the response \(id \d+, '.*'\): log-prob "
            r"-\d+\.\d{5} by the source checkpoint"
        )
        with pytest.raises(ParityError, match=said + where):
            check_parity(run, RunFolder(tmp_path), 0)
        assert len(record(tmp_path)["findings"]) >= 1
        # Engine and training share the wrong weight, so they agree; after a resume nothing is
        # compared with the folder.
        assert all(row["rollout"]["max"] <= LARGEST_GAP for row in record(tmp_path)["modalities"])
        check_parity(run, RunFolder(tmp_path / "later"), 4)
        assert record(tmp_path / "later")["not_compared"].startswith(
            "the weights have been trained"
        )
        check_parity(with_options(run, mode="warn"), RunFolder(tmp_path / "warned"), 0)
        assert "the training forward pass disagree" in caplog.text
        check_parity(with_options(run, mode="none"), RunFolder(tmp_path / "none"), 0)
        assert not (tmp_path / "none").exists()
    finally:
        weight.data.copy_(kept)


class ShiftedEngine:
    """Samples as the run does, but reports one log-prob of one question wrongly."""

    def __init__(self, engine: MegatronEngine, question_id: str, index: int) -> None:
        self._engine, self._question_id, self._index = engine, question_id, index
        self.reported: Generation | None = None

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> list[list[Generation]]:
        results = self._engine.generate(requests, sampling)
        for request, group in zip(requests, results, strict=True):
            if str(request.seed_path[1]).endswith(self._question_id):
                group[1].rollout_logprobs[self._index] -= SHIFT
                self.reported = group[1]
        return results


def test_a_wrong_logprob_of_the_engine_is_named(run: Run, tmp_path: Path) -> None:
    stream = build_stream(run.config, UncountedHealth())
    stream.load_state_dict(run.stream.state_dict())
    question = choose_questions(stream, run.feed, 3).questions["video"][1]
    engine = ShiftedEngine(MegatronEngine(run.policy.model, run.config.seed), question.id, index=2)
    sampler = GroupSampler(engine, run.encoder, run.verifier, ParallelExchange())
    with pytest.raises(ParityError) as caught:
        check_parity(with_sampler(run, sampler), RunFolder(tmp_path), 0)
    assert engine.reported is not None
    token, logprob = engine.reported.response_ids[2], engine.reported.rollout_logprobs[2]
    message = str(caught.value)
    assert message.startswith(
        "parity: video: sampling and the training forward pass disagree, got a largest gap of 0.5 "
        "nats"
    )
    assert (
        f"first at question {question.id!r}, token 2 of the response (id {token}, "
        f"{run.encoder.decode([token])!r})" in message
    )
    assert f"log-prob {logprob:.5f} by sampling" in message
    assert "more in parity.jsonl" not in message


@pytest.mark.medium
def test_a_template_that_forgets_images_stops_the_run(
    run: Run, output_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    shutil.copytree(student_folder(run.config.model), folder)
    template = folder / "chat_template.jinja"
    assert "<|image_pad|>" in template.read_text()
    template.write_text(template.read_text().replace("<|image_pad|>", ""))
    forgetful = start(output_dir, f"model.student={folder}")
    try:
        with pytest.raises(
            ParityError,
            match=(
                r"image: the media of a question do not reach its prompt: .*question .* got \[\], "
                r"expected"
            ),
        ):
            check_parity(forgetful, RunFolder(tmp_path), 0)
    finally:
        forgetful.close()


def open_no_video(run: Run, reference: MediaRef) -> Frames:
    if reference.kind == "video":
        raise MediaError("unreadable", "cannot decode")
    return run.media.open(reference)


def test_questions_that_cannot_be_asked_give_way(run: Run) -> None:
    def choose(encoder: PromptEncoder, max_prompt_tokens: int) -> Chosen:
        stream = build_stream(run.config, UncountedHealth())
        options = {"plain_text": run.templates.plain_text, "max_prompt_tokens": max_prompt_tokens}
        return choose_questions(
            stream, QuestionFeed(stream, encoder, stream.health, ParallelExchange(), **options), 2
        )

    chosen = choose(run.encoder, 4096)
    assert {name: len(questions) for name, questions in chosen.questions.items()} == {
        "text": 2,
        "image": 2,
        "video": 2,
    }
    assert all(
        question.modality == name
        for name, questions in chosen.questions.items()
        for question in questions
    )
    assert (chosen.refused, chosen.lost) == ({}, [])
    # A limit between two prompts of the same modality takes the longer one out and the next
    # candidate in.
    lengths = [
        len(run.encoder.encode(run.templates.plain_text(question), question)[0].token_ids)
        for question in chosen.questions["text"]
    ]
    assert lengths[0] != lengths[1]
    others = choose(run.encoder, max(lengths) - 1).questions["text"]
    assert len(others) == 2
    assert chosen.questions["text"][lengths.index(min(lengths))] in others
    assert chosen.questions["text"][lengths.index(max(lengths))] not in others
    blind = choose(
        PromptEncoder(student_folder(run.config.model), partial(open_no_video, run)), 4096
    )
    assert {name: len(questions) for name, questions in blind.questions.items()} == {
        "text": 2,
        "image": 2,
        "video": 0,
    }
    assert list(blind.refused) == ["video"]
    assert blind.refused["video"].startswith("unreadable: ")


def test_what_does_not_fit_or_load_is_not_compared(run: Run, tmp_path: Path) -> None:
    folder = student_folder(run.config.model)
    size = (folder / "model.safetensors").stat().st_size
    assert 0.9 * size < weight_bytes(folder, torch.float32) < size
    assert weight_bytes(folder, torch.bfloat16) * 2 == weight_bytes(folder, torch.float32)
    cpu = torch.device("cpu")
    assert choose_device(1000, cpu) == (cpu, "")
    free = psutil.virtual_memory().available
    device, why = choose_device(free, cpu)
    assert device is None
    assert "GiB that are free" in why
    options = {"dtype": torch.float32, "temperature": 1.0, "device": cpu}
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    skipped = source_logprobs(broken, [], max_seconds=1.0, **options).skipped
    assert "transformers cannot load" in skipped
    assert "unheard_of" in skipped
    check_parity(with_options(run, max_source_seconds=0.0), RunFolder(tmp_path), 0)
    written = record(tmp_path)
    assert written["not_compared"] == "9 of 9 responses, because parity.max_source_seconds was over"
    assert all(
        row["source"] is None and row["rollout"] is not None for row in written["modalities"]
    )


def test_the_limit_follows_the_precision() -> None:
    config = ParityConfig(max_gap=0.1, max_kl=0.2)
    assert limit_for(config, torch.float32) == Limit("parity.max_gap", 0.1, of_divergence=False)
    coarse = Limit("parity.max_kl", 0.2, of_divergence=True)
    assert limit_for(config, torch.bfloat16) == coarse
    # A sampler of lower precision than the network's, which the source checkpoint has too.
    served = dataclasses.replace(config, sampler_dtype="bfloat16")
    assert limit_for(served, torch.float32, "rollout") == coarse
    assert limit_for(served, torch.float32) == limit_for(config, torch.float32)
