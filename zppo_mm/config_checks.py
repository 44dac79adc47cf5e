"""What a configuration's values must be beyond their types: choices, ranges, and keys that must fit one another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from zppo_mm.config import LORA_TARGETS, RunConfig, TeacherConfig
from zppo_mm.errors import ConfigError

Rule = TypeVar("Rule")

_PARTS: Mapping[str, Mapping[str, Any]] = {
    "grpo": {},
    "bcq": {"zone.bcq": True},
    "ncq": {"zone.ncq": True},
    "bcq_ncq": {"zone.bcq": True, "zone.ncq": True},
    "hint": {"zone.hint": True},
    "prefix": {"zone.prefix": True},
    "inject": {"zone.inject": True},
    "off_distill": {"distill.source": "teacher", "train.updates_per_step": 1},
    "on_distill": {"distill.source": "student"},
}
_NOTHING: Mapping[str, Any] = {**{f"zone.{name}": False for name in ("bcq", "ncq", "hint", "prefix", "inject")}, "distill.source": "none"}

METHODS: Mapping[str, Mapping[str, Any]] = {
    "zppo" if name + suffix == "bcq_ncq_replay" else name + suffix: {**_NOTHING, **part, "zone.replay": bool(suffix)}
    for name, part in _PARTS.items()
    for suffix in ("", "_replay")
}
"""Keys that every method sets."""

CHOICES: Mapping[str, tuple[str, ...]] = {
    "modality": ("text", "image", "video", "mixed"),
    "model.transformer_impl": ("auto", "local", "transformer_engine"),
    "model.params_dtype": ("auto", "float32", "bfloat16"),
    "model.fp8": ("", "e4m3", "hybrid"),
    "model.fp8_recipe": ("delayed", "tensorwise", "blockwise", "mxfp8"),
    "model.recompute": ("none", "selective", "full"),
    "teacher.transformer_impl": ("", "auto", "local", "transformer_engine"),
    "teacher.params_dtype": ("", "auto", "float32", "bfloat16"),
    "teacher.fp8": ("", "e4m3", "hybrid"),
    "teacher.compressor": ("rule", "teacher"),
    "teacher.on_failure": ("wait", "ncq_only", "stop"),
    "teacher.video": ("frames", "file"),
    "teacher.media_format": ("png", "jpeg"),
    "algorithm.advantage_normalization": ("none", "nonzero", "all"),
    "distill.source": ("none", "teacher", "student"),
    "parity.mode": ("stop", "warn", "none"),  # not `off`, which YAML reads as false
    "train.share_prompts": ("auto", "always", "never"),
}
"""Strings that a key may have."""

TRAINABLE_PARTS = ("vision", "projector", "language")

_ABOVE_ZERO = (math.ulp(0.0), math.inf)
_FROM_ZERO = (0.0, math.inf)
_FROM_ONE = (1.0, math.inf)
_SHARE = (0.0, 1.0)
_BELOW_ONE = (0.0, math.nextafter(1.0, 0.0))

RANGES: Mapping[str, tuple[float, float]] = {
    "data.max_prompt_tokens": _FROM_ONE,
    "data.video_frames_per_second": _ABOVE_ZERO,
    "data.video_max_frames": _FROM_ONE,
    "data.max_media_bytes": _FROM_ONE,
    "data.max_media_pixels": _FROM_ONE,
    "data.decode_timeout_seconds": _ABOVE_ZERO,
    "data.num_decode_workers": _FROM_ONE,
    "data.max_bad_share": _SHARE,
    "parallel.tensor_model_parallel_size": _FROM_ONE,
    "parallel.pipeline_model_parallel_size": _FROM_ONE,
    "parallel.context_parallel_size": _FROM_ONE,
    "parallel.timeout_minutes": _ABOVE_ZERO,
    "rollout.num_rollouts": (2.0, math.inf),
    "rollout.max_response_tokens": _FROM_ONE,
    "rollout.temperature": _ABOVE_ZERO,
    "rollout.top_p": (math.ulp(0.0), 1.0),
    "rollout.top_k": _FROM_ZERO,
    "rollout.max_batch_size": _FROM_ONE,
    "teacher.num_ranks": _FROM_ZERO,
    "teacher.tensor_model_parallel_size": _FROM_ONE,
    "teacher.pipeline_model_parallel_size": _FROM_ONE,
    "teacher.num_rollouts": _FROM_ONE,
    "teacher.temperature": _FROM_ZERO,
    "teacher.max_response_tokens": _FROM_ONE,
    "teacher.max_concurrency": _FROM_ONE,
    "teacher.connect_timeout_seconds": _ABOVE_ZERO,
    "teacher.read_timeout_seconds": _ABOVE_ZERO,
    "teacher.request_timeout_seconds": _ABOVE_ZERO,
    "teacher.num_retries": _FROM_ZERO,
    "teacher.backoff_seconds": _FROM_ZERO,
    "teacher.max_wait_seconds": _ABOVE_ZERO,
    "teacher.compression_max_tokens": _FROM_ONE,
    "teacher.compression_max_lines": _FROM_ONE,
    "zone.tau": _SHARE,
    "zone.rho_replay": _FROM_ZERO,
    "zone.rho_aug": _FROM_ZERO,
    "zone.prefix_share": (math.ulp(0.0), math.nextafter(1.0, 0.0)),
    "zone.max_sampling_rounds": _FROM_ONE,
    "zone.buffer_capacity": _FROM_ONE,
    "reward.timeout_seconds": _ABOVE_ZERO,
    "reward.num_workers": _FROM_ONE,
    "reward.judge_max_tokens": _FROM_ONE,
    "reward.judge_max_wait_seconds": _ABOVE_ZERO,
    "algorithm.clip_ratio_low": _BELOW_ONE,
    "algorithm.clip_ratio_high": _ABOVE_ZERO,
    "algorithm.clip_ratio_c": (math.nextafter(1.0, 2.0), math.inf),
    "algorithm.importance_cap": _FROM_ZERO,
    "distill.top_k": _FROM_ZERO,
    "train.train_iters": _FROM_ONE,
    "train.num_new_questions": _FROM_ONE,
    "train.updates_per_step": _FROM_ONE,
    "train.micro_batch_tokens": _FROM_ONE,
    "train.lr": _FROM_ZERO,
    "train.lr_warmup_updates": _FROM_ZERO,
    "train.adam_beta1": _BELOW_ONE,
    "train.adam_beta2": _BELOW_ONE,
    "train.adam_eps": _ABOVE_ZERO,
    "train.weight_decay": _FROM_ZERO,
    "train.clip_grad": _ABOVE_ZERO,
    "lora.rank": _FROM_ZERO,
    "lora.alpha": _FROM_ONE,
    "lora.dropout": _BELOW_ONE,
    "checkpoint.interval": _FROM_ONE,
    "checkpoint.keep": _FROM_ONE,
    "evaluation.interval": _FROM_ZERO,
    "evaluation.num_questions": _FROM_ZERO,
    "evaluation.num_rollouts": _FROM_ONE,
    "evaluation.temperature": _FROM_ZERO,
    "evaluation.top_p": (math.ulp(0.0), 1.0),
    "evaluation.top_k": _FROM_ZERO,
    "evaluation.min_p": _SHARE,
    "evaluation.presence_penalty": (-2.0, 2.0),
    "parity.num_questions": _FROM_ONE,
    "parity.max_response_tokens": _FROM_ONE,
    "parity.max_gap": _ABOVE_ZERO,
    "parity.max_kl": _ABOVE_ZERO,
    "parity.max_source_seconds": _FROM_ZERO,
    "observability.report_examples": _FROM_ZERO,
}
"""Smallest and largest value of a key, both allowed."""


def check_config(config: RunConfig) -> None:
    """Raise on the first value that cannot be meant.

    Raises:
        ConfigError: A string that is no choice, a number out of its range, or keys that contradict one another.
    """
    _check_values(config)
    _check_sources(config)
    _check_relations(config)
    _check_methods(config)
    _check_lora(config)
    _check_endpoints(config)
    _check_teacher_ranks(config)


def _check_values(config: RunConfig) -> None:
    """Check every value by itself; what holds for the teacher holds for each of the others."""
    for key, choices in _of_all_teachers(config, CHOICES):
        value = _value(config, key)
        if value not in choices:
            raise ConfigError(
                f"{key}: not a choice, got {value!r}, expected one of {', '.join(repr(choice) for choice in choices)}; correct it"
            )
    for key, (low, high) in _of_all_teachers(config, RANGES):
        value = _value(config, key)
        if not low <= value <= high or not math.isfinite(value):
            raise ConfigError(f"{key}: out of range, got {value}, expected {_range_text(low, high)}; correct it")


def _of_all_teachers(config: RunConfig, rules: Mapping[str, Rule]) -> list[tuple[str, Rule]]:
    """Return the rules by key, those of the teacher also for each fallback teacher."""
    own = [(key, rule) for key, rule in rules.items() if key.startswith("teacher.")]
    others = [(f"fallback_teachers.{i}.{key[8:]}", rule) for i in range(len(config.fallback_teachers)) for key, rule in own]
    return [*rules.items(), *others]


def _value(config: RunConfig, key: str) -> Any:
    """Return the value at a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = value[int(name)] if isinstance(value, list) else getattr(value, name)
    return value


def _range_text(low: float, high: float) -> str:
    """Say a range in words; the neighbours of 0 and 1 stand for open ends."""
    lower = {math.ulp(0.0): "more than 0", math.nextafter(1.0, 2.0): "more than 1"}.get(low, f"at least {low:g}")
    upper = {math.inf: "", math.nextafter(1.0, 0.0): " and less than 1"}.get(high, f" and at most {high:g}")
    return lower + upper


def _check_sources(config: RunConfig) -> None:
    """Check every data source."""
    for name, sources in (("data.train", config.data.train), ("data.held_out", config.data.held_out)):
        for index, source in enumerate(sources):
            where = f"{name}[{index}]"
            if not source.path:
                raise ConfigError(f"{where}.path: missing, got an empty path, expected a folder with shards; give it or remove the source")
            if not (source.weight > 0 and math.isfinite(source.weight)):
                raise ConfigError(f"{where}.weight: out of range, got {source.weight}, expected more than 0; remove an unused source")


def _check_relations(config: RunConfig) -> None:
    """Check keys against one another."""
    train, parallel, model = config.train, config.parallel, config.model
    if train.num_new_questions % train.updates_per_step:
        raise ConfigError(
            f"train.num_new_questions: does not split into equal updates, got {train.num_new_questions} questions for "
            f"{train.updates_per_step} updates, expected a multiple of train.updates_per_step; change one of them"
        )
    unknown = [part for part in train.freeze if part not in TRAINABLE_PARTS]
    if unknown or (set(train.freeze) == set(TRAINABLE_PARTS) and not config.lora.rank):
        raise ConfigError(
            f"train.freeze: cannot freeze this, got {train.freeze}, expected at most two of {', '.join(TRAINABLE_PARTS)}; correct the list"
        )
    if train.share_prompts == "always" and model.transformer_impl == "transformer_engine":
        raise ConfigError(
            "train.share_prompts: Transformer Engine's layers cannot share prompts, got 'always' with "
            "model.transformer_impl='transformer_engine', expected 'auto' or 'never' with that; change one of them"
        )
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        raise ConfigError(
            "parallel.sequence_parallel: needs tensor parallelism, got true with parallel.tensor_model_parallel_size=1, "
            "expected a size of 2 or more; turn it off or raise the size"
        )
    if parallel.context_parallel_size > 1 and (model.transformer_impl == "transformer_engine" or model.fp8):
        raise ConfigError(
            f"parallel.context_parallel_size: not with Transformer Engine's layers, got {parallel.context_parallel_size} with "
            f"model.transformer_impl={model.transformer_impl!r} and model.fp8={model.fp8!r}, expected 1 with those; "
            "set model.transformer_impl=local without FP8, or the size to 1"
        )
    if model.fp8 and model.transformer_impl == "local":
        raise ConfigError(
            f"model.fp8: needs Transformer Engine, got {model.fp8!r} with model.transformer_impl='local', "
            "expected 'transformer_engine' or 'auto'; without it megatron-core would ignore FP8 silently"
        )
    if any(separator in config.name for separator in "/\\") or config.name in (".", ".."):
        raise ConfigError(f"name: not a folder name, got {config.name!r}, expected a name without slashes; use output_dir for the place")


def _check_methods(config: RunConfig) -> None:
    """Check that what is done about hard questions and what is descended fit together."""
    zone = config.zone
    asks = [name for name in ("bcq", "ncq", "hint", "prefix", "inject") if getattr(zone, name)]
    if config.distill.source == "none":
        return
    if asks:
        raise ConfigError(
            f"distill.source: distillation trains on no reformulated prompt, got {config.distill.source!r} with zone.{asks[0]}=true, "
            "expected one of the two; set the zone's key to false, or distill.source=none"
        )
    if zone.max_sampling_rounds > 1 or config.algorithm.importance_cap:
        raise ConfigError(
            f"distill.source: distillation looks at no reward and no old log-probs, got {config.distill.source!r} with "
            f"zone.max_sampling_rounds={zone.max_sampling_rounds} and algorithm.importance_cap={config.algorithm.importance_cap:g}, "
            "expected 1 and 0; remove those keys"
        )
    _check_distillation(config)
    if config.fallback_teachers:
        raise ConfigError(
            f"fallback_teachers: distillation has one teacher, got {len(config.fallback_teachers)} more with "
            f"distill.source={config.distill.source!r}, expected none; remove them"
        )


def _check_distillation(config: RunConfig) -> None:
    """Check that the teacher can say what is asked of it."""
    teacher, distill = config.teacher, config.distill
    if teacher.num_ranks:
        raise ConfigError(
            f"teacher.num_ranks: distillation needs the teacher on the student's ranks, got {teacher.num_ranks}, expected 0 with "
            f"distill.source={distill.source!r}; set it to 0, or serve the teacher for distill.source=teacher"
        )
    if not teacher.endpoints:
        if config.parallel.pipeline_model_parallel_size > 1:
            raise ConfigError(
                "parallel.pipeline_model_parallel_size: distillation passes the teacher on the stage of the loss, got "
                f"{config.parallel.pipeline_model_parallel_size}, expected 1; use tensor or context parallelism, or serve the teacher"
            )
        return
    if distill.source == "student":
        raise ConfigError(
            "distill.source: a server of chat completions says nothing about another's text, got 'student' with teacher.endpoints, "
            "expected 'teacher' with those; remove the endpoints and have the teacher in this process (teacher.model names its folder)"
        )
    if not distill.top_k:
        raise ConfigError(
            "distill.top_k: a server does not send whole distributions, got 0 with teacher.endpoints, expected the number of log-probs per "
            "token to ask for (OpenAI and vLLM give at most 20 unless told otherwise); set it"
        )
    if config.rollout.temperature != 1.0:
        raise ConfigError(
            f"rollout.temperature: a server's log-probs are those of temperature 1, got {config.rollout.temperature:g} with "
            "teacher.endpoints and distillation, expected 1; set it, or have the teacher in this process"
        )


def _check_lora(config: RunConfig) -> None:
    """Check what has adapters and what trains beside them."""
    lora = config.lora
    unknown = [name for name in lora.targets if name not in LORA_TARGETS]
    if not lora.targets or (unknown and lora.targets != ["all"]):
        raise ConfigError(
            f"lora.targets: cannot adapt this, got {lora.targets}, expected [all] or any of {', '.join(LORA_TARGETS)}; correct the list"
        )
    parts = ("vision", "projector")
    if any(part not in parts for part in lora.also_train) or (lora.also_train and not lora.rank):
        raise ConfigError(
            f"lora.also_train: cannot train this beside adapters, got {lora.also_train} with lora.rank={lora.rank}, expected any of "
            f"{', '.join(parts)} and a rank above 0; correct the list, or use train.freeze without adapters"
        )
    both = [part for part in lora.also_train if part in config.train.freeze]
    if both:
        raise ConfigError(f"lora.also_train: {both[0]} is in train.freeze too, expected it in one of them; remove it from the other")


def _check_endpoints(config: RunConfig) -> None:
    """Check the servers' addresses; what they hold is never repeated, because it may be a key."""
    teacher, reward = config.teacher, config.reward
    _check_teacher("teacher", teacher)
    for index, other in enumerate(config.fallback_teachers):
        _check_teacher(f"fallback_teachers[{index}]", other)
        if other.num_ranks:
            raise ConfigError(
                f"fallback_teachers[{index}].num_ranks: only the first teacher can have ranks of its own, got {other.num_ranks}, "
                "expected 0; serve this one and give its endpoints, or let the student's ranks run it"
            )
    _check_addresses("reward.judge_endpoints", reward.judge_endpoints)
    if reward.judge_endpoints and not (reward.judge_model or teacher.model):
        raise ConfigError("reward.judge_model: missing, got judge_endpoints without a model, expected its served name; give it")
    limit = 60 * config.parallel.timeout_minutes
    has_judge = reward.judge and (teacher.endpoints or reward.judge_endpoints or teacher.num_ranks)
    if has_judge and reward.judge_max_wait_seconds >= limit:
        raise ConfigError(
            f"reward.judge_max_wait_seconds: too long, got {reward.judge_max_wait_seconds:g}, expected less than the {limit:g} s of "
            "parallel.timeout_minutes, in which the other ranks wait for a rank that grades; change one of them"
        )


def _check_teacher(where: str, teacher: TeacherConfig) -> None:
    """Check where one teacher runs."""
    _check_addresses(f"{where}.endpoints", teacher.endpoints)
    if teacher.endpoints and not teacher.model:
        raise ConfigError(
            f"{where}.model: missing, got endpoints without a model, expected the name under which they serve it (GET /v1/models); give it"
        )
    if teacher.api_key_env and not teacher.api_key_env.isidentifier():
        raise ConfigError(
            f"{where}.api_key_env: not a name, expected the name of an environment variable, never the key itself; put the key there"
        )


def _check_teacher_ranks(config: RunConfig) -> None:
    """Check a teacher on ranks of its own; how many ranks there are is known later."""
    teacher = config.teacher
    sizes = (teacher.tensor_model_parallel_size, teacher.pipeline_model_parallel_size)
    if not teacher.num_ranks:
        if max(sizes) > 1:
            raise ConfigError(
                f"teacher.tensor_model_parallel_size: for a teacher on its own ranks, got tensor {sizes[0]} x pipeline {sizes[1]} with "
                "teacher.num_ranks=0, expected 1 x 1, because it is laid out as the student there; give it ranks or leave the sizes out"
            )
        return
    if teacher.endpoints:
        raise ConfigError(
            f"teacher.num_ranks: a served teacher needs no ranks, got {teacher.num_ranks} with {len(teacher.endpoints)} endpoints, "
            "expected one of them; take the other out"
        )
    if teacher.num_ranks % math.prod(sizes):
        raise ConfigError(
            f"teacher.num_ranks: cannot be split into tensor {sizes[0]} x pipeline {sizes[1]}, got {teacher.num_ranks}, "
            f"expected a multiple of {math.prod(sizes)}; change it or the teacher's sizes"
        )


def _check_addresses(key: str, urls: Sequence[str]) -> None:
    """Check a list of base URLs."""
    for index, url in enumerate(urls):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"{key}[{index}]: not an address, got {parts.scheme or 'no scheme'!r} and host {parts.hostname or 'none'!r}, "
                "expected a base URL such as http://host:8000/v1; correct it"
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ConfigError(
                f"{key}[{index}]: holds more than an address, got a name, a password or a query for host {parts.hostname!r}, "
                "expected scheme, host and path alone; give the key by the environment variable that teacher.api_key_env names"
            )
    if len(set(urls)) < len(urls):
        raise ConfigError(f"{key}: an address stands there twice, expected each once; raise teacher.max_concurrency instead")
