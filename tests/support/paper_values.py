"""The paper's hyperparameters, by our keys.

Source: tables of symbols and hyperparameters, arXiv 2606.18216.
"""

from __future__ import annotations

from typing import Any

HYPERPARAMETERS: dict[str, Any] = {
    "method": "zppo",
    "rollout.num_rollouts": 8,  # G_S
    "teacher.num_rollouts": 4,  # G_T
    "zone.tau": 0.5,
    "zone.rho_replay": 0.25,
    "zone.rho_aug": 0.25,
    "zone.buffer_capacity": 10_000,  # B_max
    "train.updates_per_step": 4,  # I
    "train.num_new_questions": 4 * 96,  # 96 prompts per gradient update
    "train.train_iters": 200,
    "algorithm.clip_ratio_low": 0.20,
    "algorithm.clip_ratio_high": 0.28,
    "algorithm.clip_ratio_c": 10.0,
    "algorithm.advantage_normalization": "nonzero",
    "train.lr": 1e-6,
    "train.lr_warmup_updates": 0,
    "train.adam_beta1": 0.9,
    "train.adam_beta2": 0.999,
    "train.adam_eps": 1e-8,
    "train.weight_decay": 0.1,
    "train.clip_grad": 1.0,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "rollout.top_k": 0,
    "rollout.max_response_tokens": 12_288,  # in evaluations too
    "teacher.temperature": 1.0,
    "teacher.max_response_tokens": 12_288,
    "teacher.compressor": "teacher",
    "teacher.compression_max_tokens": 512,
    "teacher.compression_max_lines": 5,
    "data.max_prompt_tokens": 4096,
    "reward.judge_max_tokens": 512,
    "evaluation.temperature": 0.6,
    "evaluation.top_p": 0.95,
    "evaluation.top_k": 20,
    "evaluation.min_p": 0.0,
    "evaluation.presence_penalty": 1.5,
}
