"""From a configuration to the judge: its servers, and what ends a run when it gives no verdicts."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from zppo_mm.config.schema import ParallelConfig, RewardConfig, RunConfig, TeacherConfig
from zppo_mm.parallel.exchange import ParallelExchange
from zppo_mm.rewards.judge import Complete, LlmJudge, load_judge_template
from zppo_mm.rewards.malformed import MalformedCheck
from zppo_mm.rewards.verify import Verifier
from zppo_mm.teacher.served.connect import open_pool
from zppo_mm.teacher.served.judge import greedy_replies
from zppo_mm.teacher.served.servers import Servers

# Of the time that the student's ranks wait for each other, what one of them may wait for a judge on
# the teacher's ranks.
QUEUE_FRACTION = 0.8


@dataclass(frozen=True, slots=True)
class Judging:
    """A judge and what belongs to it.

    Attributes:
        pool: Its servers; `None` if there is no judge.
        judge: Of this rank.
        check: Ends the run when the judge does not give verdicts; every rank calls it.
    """

    pool: Servers | None
    judge: LlmJudge | None
    check: MalformedCheck


def build_judging(
    config: RunConfig,
    teachers: Servers | None,
    exchange: ParallelExchange,
    modes: Collection[str],
    should_stop: Callable[[], bool] = bool,
) -> Judging:
    """Return the judge behind servers of its own, those of the teacher, or the teacher's ranks.

    Args:
        config: The run.
        teachers: Servers of the teacher, or of its ranks.
        exchange: The replicas.
        modes: What the judge decides where it is used; there is none if all are `never`.
        should_stop: Whether what is judged will be dropped anyway.
    """
    reward, teacher = config.reward, config.teacher
    pool = None if set(modes) == {"never"} else _judge_pool(reward, teacher, teachers, exchange)
    judge = None
    if pool is not None:
        complete = _complete(reward, teacher, config.parallel, pool, should_stop)
        template = load_judge_template(reward.judge_template, config.zone.templates)
        judge = LlmJudge(complete, template, reward.judge_max_response_chars)
    urls = reward.judge_endpoints or teacher.endpoints
    server = f"the judge at {', '.join(urls)}" if urls else "the judge on the teacher's ranks"
    check = MalformedCheck(judge, server, reward.max_malformed_fraction, exchange.gather)
    return Judging(pool, judge, check)


def build_verifier(reward: RewardConfig, judge: LlmJudge | None, mode: str) -> Verifier:
    """Return the grader; `mode` says what the judge decides."""
    return Verifier(
        reward.timeout_seconds,
        reward.num_workers,
        judge,
        reward.budget_seconds,
        judge_mode=mode,
    )


def is_teacher(reward: RewardConfig) -> bool:
    """Return whether the judge, if there is one, is the teacher's model at the same servers."""
    return not (reward.judge_endpoints or reward.judge_model)


def _judge_pool(
    reward: RewardConfig,
    teacher: TeacherConfig,
    teachers: Servers | None,
    exchange: ParallelExchange,
) -> Servers | None:
    if is_teacher(reward):
        return teachers
    return open_pool(
        # These are variables of the teacher's chat template.
        replace(teacher, chat_template_kwargs={}),
        exchange,
        reward.judge_endpoints,
        reward.judge_model,
        where="reward.judge_endpoints" if reward.judge_endpoints else "reward.judge_model",
    )


def _complete(
    reward: RewardConfig,
    teacher: TeacherConfig,
    parallel: ParallelConfig,
    pool: Servers,
    should_stop: Callable[[], bool],
) -> Complete:
    if teacher.num_ranks and not reward.judge_endpoints:
        # Its requests may come behind a long answer of the teacher, and the other ranks of the
        # student wait for them.
        limit = QUEUE_FRACTION * 60 * parallel.timeout_minutes
        seconds = max(limit, reward.judge_max_wait_seconds)
        reward = replace(reward, judge_max_wait_seconds=seconds)
    variables = teacher.chat_template_kwargs if is_teacher(reward) else {}
    return greedy_replies(pool, reward, teacher.num_retries, should_stop, variables)
