"""Steps of TRL's GRPOTrainer for `grpo_step.py`, which starts this with the Python that has TRL.
Needs nothing of this project.

python benchmarks/grpo_step_trl.py FOLDER FAMILY DTYPE NUM_STEPS SEQUENCES_PER_FORWARD RESULT
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

RESPONSE_TOKENS = 64
NUM_ROLLOUTS = 8


def alternating_reward(completions: list[Any], **_: Any) -> list[float]:
    """Reward every other response, so that no group is trivial."""
    return [float(index % 2) for index in range(len(completions))]


class Clock(TrainerCallback):
    """Times whole steps: from the end of one to the end of the next, generation included."""

    def __init__(self, model: Any) -> None:
        self.steps: list[dict[str, float]] = []
        self._generation = 0.0
        self._wall = self._cpu = 0.0
        generate = model.generate

        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return generate(*arguments, **named)
            finally:
                self._generation += time.perf_counter() - started

        model.generate = timed

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Take the time of a step."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.steps.append(
            {
                "seconds": wall - self._wall,
                "cpu_seconds": cpu - self._cpu,
                "generation": self._generation,
            }
        )
        self._wall, self._cpu, self._generation = wall, cpu, 0.0


def arguments(folder: str, num_steps: int, sequences: int, num_prompts: int) -> GRPOConfig:
    """Return TRL's defaults but for sizes, lengths and what the CPU needs."""
    return GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=sequences,
        gradient_accumulation_steps=num_prompts * NUM_ROLLOUTS // sequences,
        num_generations=NUM_ROLLOUTS,
        max_completion_length=RESPONSE_TOKENS,
        generation_kwargs={"min_new_tokens": RESPONSE_TOKENS},
        temperature=1.0,
        max_steps=num_steps,
        learning_rate=1e-6,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )


def main() -> None:
    """Run the steps and write one record per step."""
    folder, family, dtype, num_steps, sequences, result = (
        Path(sys.argv[1]),
        *sys.argv[2:4],
        int(sys.argv[4]),
        int(sys.argv[5]),
        Path(sys.argv[6]),
    )
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in prompts] * num_steps
    model = AutoModelForCausalLM.from_pretrained(folder / family, dtype=dtype)
    clock = Clock(model)
    with tempfile.TemporaryDirectory() as temporary:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=alternating_reward,
            args=arguments(temporary, num_steps, sequences, len(prompts)),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(folder / family),
            callbacks=[clock],
        )
        assert next(model.parameters()).dtype == getattr(torch, dtype)
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    before = 0
    for step, entry in zip(clock.steps, logs, strict=True):
        assert entry["completions/min_length"] == entry["completions/max_length"] == RESPONSE_TOKENS
        assert entry["frac_reward_zero_std"] == 0, "every rollout moves the weights"
        step["tokens"] = entry["num_tokens"] - before
        before = entry["num_tokens"]
    result.write_text(json.dumps(clock.steps), encoding="utf-8")


if __name__ == "__main__":
    main()
