"""The teacher on its own ranks against the teacher in the student's: same answers and rewrites; and
ranks that fail or die.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.media.store import MediaStore
from data.question import Question
from data.shards import ShardFolder
from data.stream import QuestionStream
from data.toy.digits_shards import build_digit_shards
from tests.support.launch import run_ranks
from zppo_mm.config.load import load_config
from zppo_mm.config.schema import RunConfig
from zppo_mm.experience import Rollout
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.exchange import ParallelExchange
from zppo_mm.parallel.partition import JobPartition, PartitionLink, divide_job
from zppo_mm.rewards.verify import Verifier
from zppo_mm.run.build import student_folder
from zppo_mm.run.shared import Shared, longest_teacher_prompt, media_limits
from zppo_mm.run.teacher_job import link_to_teacher, serve_teacher
from zppo_mm.run.teachers import load_teacher
from zppo_mm.run_folder import RunFolder
from zppo_mm.teacher.megatron_teacher import MegatronTeacher
from zppo_mm.teacher.served.judge import greedy_replies
from zppo_mm.teacher.served.servers import Servers
from zppo_mm.teacher.served.teacher import ServedTeacher
from zppo_mm.teacher.served.teacher_ranks import TeacherRanks
from zppo_mm.teacher.teacher import TeacherLostError
from zppo_mm.zone.prompts import load_templates

pytestmark = pytest.mark.timeout(700)  # a start of four ranks takes a minute on a busy machine
LOGPROB_TOLERANCE = 1e-4  # tensor ranks sum the same float32 products in another order


def configuration(num_ranks: int, *options: str) -> RunConfig:
    given = [
        "teacher.max_response_tokens=40",
        "teacher.num_rollouts=3",
        "rollout.max_batch_size=6",
        "reward.judge_max_tokens=40",
    ]
    return load_config(None, [f"teacher.num_ranks={num_ranks}", *given, *options])


def questions(shards: Path) -> list[Question]:
    return QuestionStream(
        [(ShardFolder(shards / modality), 1.0) for modality in ("text", "image")], 0
    ).take(10)


def plain(answers: Mapping[str, Sequence[Rollout]]) -> dict[str, Any]:
    return {
        name: [
            (each.response_ids.tolist(), each.text, each.parsed, each.reward, each.finish_reason)
            for each in rollouts
        ]
        for name, rollouts in answers.items()
    }


def logprobs(answers: Mapping[str, Sequence[Rollout]]) -> list[float]:
    return [
        value
        for rollouts in answers.values()
        for each in rollouts
        for value in each.rollout_logprobs.tolist()
    ]


def ask_both(num_ranks: int, sizes: Sequence[str], shards: Path) -> dict[str, Any] | None:
    """Ask the teacher on its own ranks and one in the student's ranks the same."""
    config = configuration(num_ranks, *sizes)
    partition = divide_job(config.parallel, config.teacher)
    assert partition is not None
    if partition.name == "teacher":
        serve_teacher(config, RunFolder(shards / "run"), partition)
        return None
    with link_to_teacher(config.parallel, partition) as link:
        assert link is not None
        parallel.initialize(config.parallel, config.seed, partition)
        media = MediaStore(media_limits(config.data, student_folder(config.model)))
        exchange = ParallelExchange()
        with Verifier() as verifier:
            shared = Shared(config, media, verifier, exchange)
            model, encoder, sampling = load_teacher(shared, config.teacher, config.parallel)
            limits = longest_teacher_prompt(config), sampling.max_new_tokens
            sampler = shared.sampler(model, encoder, *limits)
            plain_text = load_templates().plain_text
            inside = MegatronTeacher(
                model, sampler, sampling, config.teacher.num_rollouts, plain_text
            )
            apart, pool = teacher_apart(config, link, exchange, verifier, plain_text)
            asked, texts = questions(shards), [f"Say {number} in a box." for number in range(5)]
            pending = apart.submit(asked, 7)
            expected = inside.submit(asked, 7).wait()
            greedy = replace(sampling, temperature=0.0, max_new_tokens=40)
            judge = greedy_replies(pool, config.reward, num_retries=0)
            results = {
                "expected": plain(expected),
                "rewrites": (inside.rewrite(texts, 7, 1), apart.rewrite(texts, 7, 1)),
                # Every replica's leader asks for itself, at a time of its own.
                "judge": (
                    [
                        text.rpartition("</think>")[2].partition("<think>")[0].strip()
                        for text in sampler.respond(texts, greedy, "judge")
                        if text
                    ],
                    judge(texts) if exchange.is_leader else None,
                ),
            }
            answers = pending.wait()
            results |= {
                "answers": plain(answers),
                "logprobs": (logprobs(expected), logprobs(answers)),
                "rank": (parallel.rank(), parallel.world_size(), pending.seconds),
            }
            pool.close()
        media.close()
        parallel.shutdown()
    return results


def teacher_apart(
    config: RunConfig,
    link: PartitionLink,
    exchange: ParallelExchange,
    verifier: Verifier,
    plain_text: Callable[[Question], str],
) -> tuple[ServedTeacher, Servers]:
    """Return the teacher on its own ranks, loaded, and the way to it."""
    ranks = TeacherRanks(link, exchange)
    pool = ranks.open_pool(config.teacher, config.rollout.max_batch_size)
    ranks.wait_until_ready()
    teacher = ServedTeacher(
        pool,
        config.teacher,
        exchange,
        verifier,
        plain_text=plain_text,
        tokenize=lambda text: [],
        seed=config.seed,
        ranks=ranks,
    )
    return teacher, pool


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for modality in ("text", "image"):
        build_digit_shards(folder / modality, modality, "train", 8, 0)
    return folder


@pytest.mark.parametrize(
    ("num_ranks", "sizes"),
    [
        (1, ()),
        (2, ("teacher.tensor_model_parallel_size=2",)),
        (2, ("teacher.pipeline_model_parallel_size=2",)),
        (
            2,
            ("parallel.tensor_model_parallel_size=2",),
        ),  # two replicas of the teacher, one student on two ranks
    ],
)
def test_the_same_is_answered_wherever_the_teacher_is(
    shards: Path, num_ranks: int, sizes: Sequence[str]
) -> None:
    results = run_ranks(ask_both, 2 + num_ranks, num_ranks, sizes, shards)
    assert results[2:] == [None] * num_ranks
    for rank, result in enumerate(results[:2]):
        assert result["rank"][:2] == (rank, 2)
        assert result["rank"][2] > 0
        assert result["answers"] == result["expected"]
        assert result["logprobs"][1] == pytest.approx(result["logprobs"][0], abs=LOGPROB_TOLERANCE)
        assert result["rewrites"][1] == result["rewrites"][0]
        if result["judge"][1] is not None:
            assert result["judge"][1] == result["judge"][0]
    assert results[0]["answers"] == results[1]["answers"]
    assert any(result["judge"][1] is not None for result in results[:2])
    rewards = [rollout[3] for rollouts in results[0]["answers"].values() for rollout in rollouts]
    assert len(rewards) == 30
    assert 0 < sum(rewards) < 30


def meet_trouble(trouble: str, shards: Path) -> None:
    """Load a teacher that is not there, or have one killed while it is asked, or fail as a
    student.
    """
    options = [f"teacher.model={shards}"] if trouble == "no model" else []
    config = configuration(
        1,
        "parallel.timeout_minutes=1",
        "reward.judge_max_wait_seconds=10",
        "teacher.on_failure=stop",
        "teacher.num_retries=1",
        *options,
    )
    partition = divide_job(config.parallel, config.teacher)
    assert partition is not None
    if partition.name == "teacher":
        if trouble == "killed":
            threading.Thread(target=end_when_asked, args=(partition,), daemon=True).start()
        serve_teacher(config, RunFolder(shards / "run"), partition)
        return
    with link_to_teacher(config.parallel, partition) as link:
        assert link is not None
        parallel.initialize(config.parallel, config.seed, partition)
        plain_text = load_templates().plain_text
        try:
            teacher, _ = teacher_apart(config, link, ParallelExchange(), Verifier(), plain_text)
            if trouble == "student":
                # The first rank holds the store, where the teacher reads of the second.
                time.sleep(5.0 * (1 - partition.rank))
                raise RuntimeError(f"trouble on student rank {partition.rank}")
            partition.store.set("asked", "")
            teacher.submit(questions(shards), 1).wait()
        except TeacherLostError:
            parallel.barrier()  # what a run does now, such as saving, needs all its ranks
            raise


def end_when_asked(partition: JobPartition) -> None:
    while not partition.store.check(["asked"]):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_teacher_that_fails_is_named_on_every_student_rank(shards: Path) -> None:
    *students, (code, output) = run_ranks(
        meet_trouble, 3, "no model", shards, check=False, timeout_seconds=200.0
    )
    assert code == 1, output
    for code, output in students:
        assert code == 1, output
        assert "TeacherLostError: teacher: its ranks have ended, got " in output
        assert "rank 2: ConfigError: " in output


def test_a_teacher_that_is_killed_counts_as_lost(shards: Path) -> None:
    *students, (code, _) = run_ranks(
        meet_trouble, 3, "killed", shards, check=False, timeout_seconds=200.0
    )
    assert code == -signal.SIGKILL
    for code, output in students:
        assert code == 1, output
        assert "TeacherLostError: teacher: " in output
        assert "got 'connection: " in output or "got 'no heartbeat within " in output


def test_a_student_that_fails_lets_the_teacher_go(shards: Path) -> None:
    *students, (code, output) = run_ranks(
        meet_trouble, 3, "student", shards, check=False, timeout_seconds=200.0
    )
    assert [code for code, _ in students] == [1, 1]
    assert code == 0, output
    assert (
        "the teacher ends because the student does: rank 1: RuntimeError: trouble on student rank 1"
        in output
    )
