"""What a configuration's values must be beyond their types: methods, choices and ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from zppo_mm.config.relations import check_relations
from zppo_mm.config.schema import RunConfig
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
_NOTHING: Mapping[str, Any] = {
    **{f"zone.{name}": False for name in ("bcq", "ncq", "hint", "prefix", "inject")},
    "distill.source": "none",
}

METHODS: Mapping[str, Mapping[str, Any]] = {
    "zppo" if name + suffix == "bcq_ncq_replay" else name + suffix: {
        **_NOTHING,
        **part,
        "zone.replay": bool(suffix),
    }
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
    "reward.budget_seconds": _ABOVE_ZERO,
    "reward.num_workers": _FROM_ONE,
    "reward.judge_max_tokens": _FROM_ONE,
    "reward.judge_max_wait_seconds": _ABOVE_ZERO,
    "algorithm.clip_ratio_low": _BELOW_ONE,
    "algorithm.clip_ratio_high": _ABOVE_ZERO,
    "algorithm.clip_ratio_c": (math.nextafter(1.0, 2.0), math.inf),
    "algorithm.importance_cap": _FROM_ZERO,
    "distill.top_k": _FROM_ZERO,
    "train.train_iters": _FROM_ONE,
    "train.max_hours": _FROM_ZERO,
    "train.stop_within_seconds": _ABOVE_ZERO,
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
        ConfigError: A string that is no choice, a number out of its range, or keys that contradict
            one another.
    """
    _check_values(config)
    check_relations(config)


def _check_values(config: RunConfig) -> None:
    """Check every value by itself; what holds for the teacher holds for each of the others."""
    for key, choices in _of_all_teachers(config, CHOICES):
        value = _value(config, key)
        if value not in choices:
            raise ConfigError(
                f"{key}: not a choice, got {value!r}, expected one of "
                f"{', '.join(repr(choice) for choice in choices)}; correct it"
            )
    for key, (low, high) in _of_all_teachers(config, RANGES):
        value = _value(config, key)
        if not low <= value <= high or not math.isfinite(value):
            raise ConfigError(
                f"{key}: out of range, got {value}, expected {_range_text(low, high)}; correct it"
            )


def _of_all_teachers(config: RunConfig, rules: Mapping[str, Rule]) -> list[tuple[str, Rule]]:
    """Return the rules by key, those of the teacher also for each fallback teacher."""
    own = [(key, rule) for key, rule in rules.items() if key.startswith("teacher.")]
    others = [
        (f"fallback_teachers.{i}.{key[8:]}", rule)
        for i in range(len(config.fallback_teachers))
        for key, rule in own
    ]
    return [*rules.items(), *others]


def _value(config: RunConfig, key: str) -> Any:
    """Return the value at a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = value[int(name)] if isinstance(value, list) else getattr(value, name)
    return value


def _range_text(low: float, high: float) -> str:
    """Say a range in words; the neighbours of 0 and 1 stand for open ends."""
    lower = {math.ulp(0.0): "more than 0", math.nextafter(1.0, 2.0): "more than 1"}.get(
        low, f"at least {low:g}"
    )
    upper = {math.inf: "", math.nextafter(1.0, 0.0): " and less than 1"}.get(
        high, f" and at most {high:g}"
    )
    return lower + upper
