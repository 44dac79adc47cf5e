"""From a configuration to what grades: rules and reward functions, the judge and its servers, and
what ends a run when they fail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from zppo_mm.config.schema import ParallelConfig, RewardConfig, RunConfig, TeacherConfig
from zppo_mm.errors import ConfigError
from zppo_mm.parallel.exchange import Exchange, ParallelExchange
from zppo_mm.rewards.failures import FailureCheck, WatchedFunctions, WatchedJudge
from zppo_mm.rewards.judge import Complete, LlmJudge, load_judge_template
from zppo_mm.rewards.verify import Verifier
from zppo_mm.teacher.served.connect import open_pool
from zppo_mm.teacher.served.judge import greedy_replies
from zppo_mm.teacher.served.servers import Servers

# Of the time that the student's ranks wait for each other, what one of them may wait for a judge on
# the teacher's ranks.
QUEUE_FRACTION = 0.8


@dataclass(frozen=True, slots=True)
class Grading:
    """What grades, and what belongs to it.

    Attributes:
        verifier: Of this rank.
        judge: Of this rank; `None` if there is none.
        pool: The judge's servers.
        check: Ends the run when judge or reward functions fail too often; every rank calls it.
    """

    verifier: Verifier
    judge: LlmJudge | None
    pool: Servers | None
    check: Callable[[], None]


def build_grading(
    config: RunConfig,
    teachers: Servers | None,
    exchange: ParallelExchange,
    modes: Sequence[str],
    should_stop: Callable[[], bool] = bool,
) -> Grading:
    """Return what grades: rules, reward functions, and a judge behind servers of its own, those of
    the teacher, or the teacher's ranks. Every rank calls this.

    Args:
        config: The run.
        teachers: Servers of the teacher, or of its ranks.
        exchange: The replicas, each of which grades on one rank.
        modes: What the judge decides where it is used, first in the verifier that is returned;
            there is none if all are `never`.
        should_stop: Whether what is judged will be dropped anyway.

    Raises:
        ConfigError: On every rank, if one that grades cannot import a reward function.
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
    verifier = Verifier(
        reward.timeout_seconds,
        reward.num_workers,
        judge,
        reward.budget_seconds,
        judge_mode=modes[0],
        functions=reward.functions,
    )
    _start_functions(verifier, exchange)
    checks = [
        FailureCheck(
            WatchedJudge(judge, server) if judge is not None else None,
            reward.max_malformed_fraction,
            exchange.gather,
        ),
        FailureCheck(
            WatchedFunctions(verifier.functions) if reward.functions else None,
            reward.max_failed_fraction,
            exchange.gather,
        ),
    ]

    def check() -> None:
        for each in checks:
            each()

    return Grading(verifier, judge, pool, check)


def _start_functions(verifier: Verifier, exchange: Exchange) -> None:
    """Import the reward functions where they are called.

    Raises:
        ConfigError: On every rank, if that fails on one.
    """
    if not verifier.functions.functions:
        return
    problem = ""
    if exchange.is_leader:
        try:
            verifier.functions.start()
        except ConfigError as error:
            problem = str(error)
    problems = [each for replica in exchange.gather([problem]) for each in replica if each]
    if problems:
        verifier.close()
        raise ConfigError(problems[0])


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
