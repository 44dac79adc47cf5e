"""Checks of keys that must fit one another, and of addresses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from zppo_mm.config.addresses import check_addresses, check_store
from zppo_mm.config.network import TRAINABLE_PARTS
from zppo_mm.config.rollout_relations import check_rollout
from zppo_mm.config.schema import (
    AlgorithmConfig,
    DataConfig,
    DistillConfig,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TeacherConfig,
    TrainConfig,
    ZoneConfig,
)
from zppo_mm.errors import ConfigError
from zppo_mm.methods import SWITCHED, Kind


def check_relations(config: RunConfig) -> None:
    """Raise on the first keys that contradict one another.

    Raises:
        ConfigError: Keys that do not fit together, or that nothing would use.
    """
    _check_name(config.name)
    check_store("checkpoint.mirror", config.checkpoint.mirror)
    _check_sources(config.data)
    _check_training(config.train, config.lora)
    _check_mismatch(config.algorithm)
    _check_layout(config.parallel, config.model)
    distill, teacher, others = config.distill, config.teacher, config.fallback_teachers
    if distill.source == "none":
        _check_policy_gradient(config.zone, distill, others)
    else:
        _check_distillation(distill, config.zone, config.algorithm)
        _check_distilled_teacher(teacher, others, distill, config.parallel)
        _check_distilled_server(teacher, distill, config.rollout)
    _check_lora(config.lora, config.train)
    _check_teachers(config.teacher, config.fallback_teachers)
    _check_functions(config.reward)
    _check_judge(config.reward, config.evaluation, config.teacher, config.parallel)
    _check_teacher_ranks(config.teacher)
    check_rollout(config.rollout, config.algorithm, distill, config.lora)


def _check_name(name: str) -> None:
    if any(separator in name for separator in "/\\") or name in (".", ".."):
        raise ConfigError(
            f"name: not a folder name, got {name!r}, expected a name without slashes; use "
            "output_dir for the parent folder"
        )


def _check_sources(data: DataConfig) -> None:
    """Check that every data source has a path."""
    for name, sources in (("data.train", data.train), ("data.held_out", data.held_out)):
        for index, source in enumerate(sources):
            if not source.path:
                raise ConfigError(
                    f"{name}[{index}].path: missing, got an empty path, expected a folder or "
                    "file of questions; give it or remove the source"
                )


def _check_training(train: TrainConfig, lora: LoraConfig) -> None:
    """Check the size of the updates and what is trained."""
    if train.num_new_questions % train.updates_per_step:
        raise ConfigError(
            "train.num_new_questions: does not split into equal updates, got "
            f"{train.num_new_questions} questions for {train.updates_per_step} updates, expected a "
            "multiple of train.updates_per_step; change one of them"
        )
    _check_schedule(train)
    if set(train.freeze) == set(TRAINABLE_PARTS) and not lora.rank:
        raise ConfigError(
            f"train.freeze: nothing is left to train, got {train.freeze}, expected at most two of "
            f"{', '.join(TRAINABLE_PARTS)}; shorten the list"
        )


def _check_schedule(train: TrainConfig) -> None:
    """Check the rise and the fall of the learning rate."""
    if train.lr_decay_style == "constant":
        for name in ("min_lr", "lr_decay_updates"):
            if getattr(train, name):
                raise ConfigError(
                    f"train.{name}: nothing falls, got {getattr(train, name)} with "
                    "train.lr_decay_style='constant', expected 0; choose linear or cosine, or "
                    "remove it"
                )
        return
    if train.min_lr > train.lr:
        raise ConfigError(
            f"train.min_lr: above the learning rate, got {train.min_lr:g} with train.lr="
            f"{train.lr:g}, expected at most that; correct one of them"
        )
    if train.lr_warmup_updates >= train.decay_updates:
        raise ConfigError(
            f"train.lr_warmup_updates: no updates are left for the decay, got "
            f"{train.lr_warmup_updates} of {train.decay_updates}, expected fewer; change it or "
            "train.lr_decay_updates"
        )


def _check_mismatch(algorithm: AlgorithmConfig) -> None:
    """Check the correction of a sampler that computes other log-probs than the trained network."""
    if algorithm.importance_level == "none" and algorithm.importance_cap:
        raise ConfigError(
            "algorithm.importance_cap: nothing is weighted, got "
            f"{algorithm.importance_cap:g} with algorithm.importance_level='none', expected 0; "
            "choose a level (token, sequence or geometric) or remove it"
        )
    for name in ("rejection_bound", "rejection_token_bound"):
        bound = getattr(algorithm, name)
        if 0 < bound <= 1:
            raise ConfigError(
                f"algorithm.{name}: would reject every response, got {bound:g}, expected 0 or "
                "more than 1, such as 1.01 for a geometric mean and 10000 for a token; correct it"
            )


def _check_layout(parallel: ParallelConfig, model: ModelConfig) -> None:
    """Check the parallel layout and what the implementation of the layers supports."""
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        raise ConfigError(
            "parallel.sequence_parallel: needs tensor parallelism, got true with "
            "parallel.tensor_model_parallel_size=1, expected a size of 2 or more; turn it off or "
            "raise the size"
        )
    if parallel.context_parallel_size > 1 and (
        model.transformer_impl == "transformer_engine" or model.fp8
    ):
        raise ConfigError(
            "parallel.context_parallel_size: not with Transformer Engine's layers, got "
            f"{parallel.context_parallel_size} with "
            f"model.transformer_impl={model.transformer_impl!r} and model.fp8={model.fp8!r}, "
            "expected 1 with those; set model.transformer_impl=local without FP8, or the size to 1"
        )
    if model.fp8 and model.transformer_impl == "local":
        raise ConfigError(
            f"model.fp8: needs Transformer Engine, got {model.fp8!r} with "
            "model.transformer_impl='local', expected 'transformer_engine' or 'auto'; without it "
            "megatron-core would ignore FP8 silently"
        )


def _check_policy_gradient(
    zone: ZoneConfig, distill: DistillConfig, fallback_teachers: Sequence[TeacherConfig]
) -> None:
    """Check that without distillation no key of it is set and every teacher is asked."""
    if distill.top_k:
        raise ConfigError(
            f"distill.top_k: nothing is distilled, got {distill.top_k} with "
            "distill.source='none', expected 0; choose a source (method=off_distill or "
            "on_distill) or remove it"
        )
    if fallback_teachers and not zone.uses_teacher:
        raise ConfigError(
            f"fallback_teachers: none would be asked, got {len(fallback_teachers)} with "
            "a method that uses no teacher rollouts, expected one of "
            f"{_switches(kind for kind in SWITCHED if kind.uses_teacher)}; remove them or "
            "change the method"
        )


def _check_distillation(
    distill: DistillConfig, zone: ZoneConfig, algorithm: AlgorithmConfig
) -> None:
    """Check that distillation is not combined with what needs rewards."""
    if zone.kinds:
        raise ConfigError(
            "distill.source: distillation trains on no reformulated prompt, got "
            f"{distill.source!r} with {_switches(zone.kinds[:1])}=true, expected one of the "
            "two; set the zone's key to false, or distill.source=none"
        )
    corrections = ("importance_cap", "rejection_bound", "rejection_token_bound")
    corrected = [name for name in corrections if getattr(algorithm, name)]
    if zone.max_sampling_rounds > 1 or corrected:
        raise ConfigError(
            "distill.source: distillation uses no rewards and no old log-probs, got "
            f"{distill.source!r} with zone.max_sampling_rounds={zone.max_sampling_rounds} and "
            f"{', '.join(f'algorithm.{name}' for name in corrected) or 'no correction'}, expected "
            "1 and none; remove those keys"
        )


def _switches(kinds: Iterable[Kind]) -> str:
    return ", ".join(f"zone.{kind.name}" for kind in kinds)


def _check_distilled_teacher(
    teacher: TeacherConfig,
    fallback_teachers: Sequence[TeacherConfig],
    distill: DistillConfig,
    parallel: ParallelConfig,
) -> None:
    """Check that there is one teacher, where it can be distilled from."""
    if teacher.num_ranks:
        raise ConfigError(
            "teacher.num_ranks: distillation needs the teacher on the student's ranks, got "
            f"{teacher.num_ranks}, expected 0 with distill.source={distill.source!r}; set it to 0, "
            "or serve the teacher for distill.source=teacher"
        )
    if not teacher.endpoints and parallel.pipeline_model_parallel_size > 1:
        raise ConfigError(
            "parallel.pipeline_model_parallel_size: distillation computes the teacher on the "
            f"stage of the loss, got {parallel.pipeline_model_parallel_size}, expected "
            "1; use tensor or context parallelism, or serve the teacher"
        )
    if fallback_teachers:
        raise ConfigError(
            f"fallback_teachers: distillation has one teacher, got {len(fallback_teachers)} "
            f"more with distill.source={distill.source!r}, expected none; remove them"
        )


def _check_distilled_server(
    teacher: TeacherConfig, distill: DistillConfig, rollout: RolloutConfig
) -> None:
    """Check that a server, if the teacher is one, can send the log-probs that are distilled."""
    if not teacher.endpoints:
        return
    if distill.source == "student":
        raise ConfigError(
            "distill.source: a server of chat completions cannot score the student's text, got "
            "'student' with teacher.endpoints, expected 'teacher' with those; remove the endpoints "
            "and run the teacher in this process (teacher.model names its folder)"
        )
    if not distill.top_k:
        raise ConfigError(
            "distill.top_k: a server does not send whole distributions, got 0 with "
            "teacher.endpoints, expected the number of log-probs per token to ask for (OpenAI and "
            "vLLM give at most 20 by default); set it"
        )
    if rollout.temperature != 1.0:
        raise ConfigError(
            "rollout.temperature: a server's log-probs are those of temperature 1, got "
            f"{rollout.temperature:g} with teacher.endpoints and distillation, expected 1; "
            "set it, or run the teacher in this process"
        )


def _check_lora(lora: LoraConfig, train: TrainConfig) -> None:
    """Check what has adapters and what trains beside them."""
    if not lora.targets or ("all" in lora.targets and len(lora.targets) > 1):
        raise ConfigError(
            f"lora.targets: ambiguous, got {lora.targets}, expected [all] or names of linear "
            "layers; correct the list"
        )
    if lora.also_train and not lora.rank:
        raise ConfigError(
            f"lora.also_train: needs adapters, got {lora.also_train} with lora.rank=0, expected a "
            "rank above 0; set it, or use train.freeze without adapters"
        )
    both = [part for part in lora.also_train if part in train.freeze]
    if both:
        raise ConfigError(
            f"lora.also_train: {both[0]} is in train.freeze too, expected it in one of them; "
            "remove it from the other"
        )


def _check_teachers(first: TeacherConfig, others: Sequence[TeacherConfig]) -> None:
    """Check where every teacher runs."""
    _check_teacher("teacher", first)
    for index, other in enumerate(others):
        _check_teacher(f"fallback_teachers[{index}]", other)
        if other.num_ranks:
            raise ConfigError(
                f"fallback_teachers[{index}].num_ranks: only the first teacher can have ranks of "
                f"its own, got {other.num_ranks}, expected 0; serve this one and give its "
                "endpoints, or let the student's ranks run it"
            )


def _check_functions(reward: RewardConfig) -> None:
    """Check how reward functions are named."""
    for answer_type, name in reward.functions.items():
        if not answer_type.isidentifier():
            raise ConfigError(
                f"reward.functions: no name of an answer type, got {answer_type!r}, expected a "
                "word such as box; correct it"
            )
        source, _, function = name.rpartition(":")
        if not source or not all(part.isidentifier() for part in function.split(".")):
            raise ConfigError(
                f"reward.functions.{answer_type}: names no function, got {name!r}, expected "
                "module:function or file.py:function; correct it"
            )


def _check_judge(
    reward: RewardConfig,
    evaluation: EvaluationConfig,
    teacher: TeacherConfig,
    parallel: ParallelConfig,
) -> None:
    """Check where the judge runs and how long its replies may take."""
    check_addresses("reward.judge_endpoints", reward.judge_endpoints)
    if reward.judge_endpoints and not (reward.judge_model or teacher.model):
        raise ConfigError(
            "reward.judge_model: missing, got judge_endpoints without a model, expected its served "
            "name; give it"
        )
    if reward.judge_model and not (reward.judge_endpoints or teacher.endpoints):
        raise ConfigError(
            "reward.judge_model: a served model's name without servers, got "
            f"{reward.judge_model!r}, expected reward.judge_endpoints or teacher.endpoints with "
            "it; give them or leave it out"
        )
    limit = 60 * parallel.timeout_minutes
    is_used = {reward.judge, evaluation.judge} != {"never"}
    has_judge = teacher.endpoints or reward.judge_endpoints or teacher.num_ranks
    if is_used and has_judge and reward.judge_max_wait_seconds >= limit:
        raise ConfigError(
            f"reward.judge_max_wait_seconds: too long, got {reward.judge_max_wait_seconds:g}, "
            f"expected less than the {limit:g} s of parallel.timeout_minutes, in which the other "
            "ranks wait for a rank that grades; change one of them"
        )


def _check_teacher(where: str, teacher: TeacherConfig) -> None:
    """Check where one teacher runs."""
    check_addresses(f"{where}.endpoints", teacher.endpoints)
    if teacher.endpoints and not teacher.model:
        raise ConfigError(
            f"{where}.model: missing, got endpoints without a model, expected the name under which "
            "they serve it (GET /v1/models); give it"
        )
    if teacher.api_key_env and not teacher.api_key_env.isidentifier():
        raise ConfigError(
            f"{where}.api_key_env: not a name, expected the name of an environment variable, never "
            "the key itself; put the key there"
        )


def _check_teacher_ranks(teacher: TeacherConfig) -> None:
    """Check a teacher on ranks of its own; how many ranks the job has is known later."""
    sizes = (teacher.tensor_model_parallel_size, teacher.pipeline_model_parallel_size)
    if not teacher.num_ranks:
        if max(sizes) > 1:
            raise ConfigError(
                "teacher.tensor_model_parallel_size: for a teacher on its own ranks, got tensor "
                f"{sizes[0]} x pipeline {sizes[1]} with teacher.num_ranks=0, expected 1 x 1, "
                "because it is laid out as the student there; give it ranks or leave the sizes out"
            )
        return
    if teacher.endpoints:
        raise ConfigError(
            f"teacher.num_ranks: a served teacher needs no ranks, got {teacher.num_ranks} with "
            f"{len(teacher.endpoints)} endpoints, expected one of them; take the other out"
        )
    if teacher.num_ranks % math.prod(sizes):
        raise ConfigError(
            f"teacher.num_ranks: cannot be split into tensor {sizes[0]} x pipeline {sizes[1]}, got "
            f"{teacher.num_ranks}, expected a multiple of {math.prod(sizes)}; change it or the "
            "teacher's sizes"
        )
