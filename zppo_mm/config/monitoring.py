"""Sections of the configuration: evaluation, the parity gate, and what a run records."""

from __future__ import annotations

from dataclasses import dataclass

from zppo_mm.config.keys import key
from zppo_mm.config.reward import JUDGE_MODES

TRACKERS = ("tensorboard", "wandb", "swanlab")


@dataclass(kw_only=True)
class EvaluationConfig:
    """Accuracy on held-out questions."""

    interval: int = key(
        20,
        "Steps between evaluations, besides those before and after training. 0: only those two.",
        at_least=0,
    )
    num_questions: int = key(
        64, "Held-out questions per evaluation, always the same ones. 0: all.", at_least=0
    )
    num_rollouts: int = key(1, "Responses per question.", at_least=1)
    judge: str = key("fallback", "As `reward.judge`, in evaluations.", choices=JUDGE_MODES)
    temperature: float = key(0.6, "Sampling temperature. 0: greedy.", at_least=0)
    top_p: float = key(0.95, "Nucleus sampling. 1: off.", above=0, at_most=1)
    top_k: int = key(20, "Top-k sampling. 0: off.", at_least=0)
    min_p: float = key(
        0.0,
        "Minimum probability of a token relative to the most likely one. 0: off.",
        at_least=0,
        at_most=1,
    )
    presence_penalty: float = key(
        1.5, "Penalty on tokens that are already in the response.", at_least=-2, at_most=2
    )


@dataclass(kw_only=True)
class ParityConfig:
    """Comparison of sampling, training and the source checkpoint before the first update, and of
    sampling and training later.
    """

    mode: str = key(
        "stop",
        "On a disagreement, `stop` ends the run and `warn` logs it. `none` compares nothing.",
        choices=("stop", "warn", "none"),  # not `off`, which YAML reads as false
    )
    interval: int = key(
        0,
        "Steps between comparisons of sampling and training, besides that at the start. A later "
        "disagreement ends the run with a checkpoint. 0: only at the start.",
        at_least=0,
    )
    num_questions: int = key(
        3, "Questions of each modality in the data (text, image, video, mixed).", at_least=1
    )
    max_response_tokens: int = key(24, "Maximum length of a compared response.", at_least=1)
    max_gap: float = key(
        1e-3, "In float32: maximum difference of a token's log-probs, in nats.", above=0
    )
    max_kl: float = key(
        0.02,
        "In lower precision: maximum KL divergence of a modality, in nats per token. In bfloat16 "
        "SmolLM2-135M has 0.002, and up to 0.006 when estimated from a few dozen tokens.",
        above=0,
    )
    sampler_dtype: str = key(
        "auto",
        "Precision in which the servers of `rollout.engine=vllm` compute. If it is lower than "
        "float32, `max_kl` limits the difference between sampling and training, also of a network "
        "in float32. `auto`: that of the network.",
        choices=("auto", "float32", "bfloat16", "float16", "fp8"),
    )
    compare_source: bool = key(
        True, "Also compare with the source checkpoint in transformers, if it fits into memory."
    )
    max_source_seconds: float = key(
        120.0, "Time limit of the comparison with the source checkpoint.", at_least=0
    )


@dataclass(kw_only=True)
class ObservabilityConfig:
    """What a run writes besides checkpoints."""

    trackers: list[str] = key(
        ["tensorboard"],
        "What shows metrics and samples, besides `metrics.jsonl`: TensorBoard (files in the run's "
        "folder), Weights & Biases, SwanLab. A tracker that fails never ends a run "
        "(`tracking/failures/*`).",
        choices=TRACKERS,
    )
    tracker_project: str = key("zppo", "Project of W&B and SwanLab.")
    trackers_offline: bool = key(
        False, "W&B and SwanLab write to the run's folder alone; their `sync` command uploads it."
    )
    tracked_samples: int = key(
        4,
        "Questions that trackers show at a time, each with its media, its prompt, and the "
        "responses with the highest and the lowest reward. 0: none.",
        at_least=0,
    )
    tracked_samples_interval: int = key(
        20, "Steps between samples; the first step has some.", at_least=1
    )
    prometheus_port: int = key(
        0,
        "Port on rank 0 where Prometheus reads the newest step's metrics (`/metrics`). 0: none.",
        at_least=0,
        at_most=65535,
    )
    prometheus_host: str = key(
        "127.0.0.1",
        "Address that the port is opened at. `0.0.0.0`: all, for a Prometheus on another machine; "
        "anybody who reaches the port can read the metrics.",
    )
    profile_steps: list[int] = key(
        [],
        "Steps of which every rank writes a torch profiler trace to `profiles/` in the run's "
        "folder. A file `profile` in that folder asks for one of the next step at any time.",
        at_least=1,
    )
    progress_bar: bool = key(True, "Show a progress bar on rank 0.")
    console_samples: int = key(
        0,
        "Groups of each step of which the log shows the question and one response, from new "
        "questions to reformulated prompts. 0: none.",
        at_least=0,
        also_called=("num_samples_to_log", "log_completions", "num_completions_to_print"),
    )
    report: bool = key(True, "Write report.html with every checkpoint.")
    report_examples: int = key(
        4, "Number of questions shown in the report with media, prompts and responses.", at_least=0
    )
