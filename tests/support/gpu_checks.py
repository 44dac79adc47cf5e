"""What the tests on a GPU check, on whatever device there is: tests/unit and tests/integration run
the same on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.support import network_checks, running, tiny_families, tiny_qwen
from zppo_mm.bundled import STUDENT_DIR
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel
from zppo_mm.training.optimizer import wrap_model
from zppo_mm.weights.mapping import fuse_tensors, parameter_mappings

# Heads of the size that fused kernels are made for.
SIZES = {
    "hidden_size": 128,
    "head_dim": 64,
    # FP8 wants multiples of 16 rows, and those of beta and alpha are two per value head.
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    },
}
# Float32 sums in another order on another device, without TF32: of logits, and of a gradient
# relative to its norm.
MAX_FLOAT32_DIFFERENCE = 1e-3
MAX_FLOAT32_GRADIENT_ERROR = 1e-3
# Four layers in bfloat16, on logits of scale 3: mean and maximum. A gradient goes through them
# twice; on a CPU the worst of a parameter is 0.07.
MEAN_BFLOAT16_DIFFERENCE = 0.05
MAX_BFLOAT16_DIFFERENCE = 0.5
MAX_BFLOAT16_GRADIENT_ERROR = 0.2
# At the default learning rate a step is below the rounding of most weights.
HALF_RUN = (
    *("modality=text", "model.params_dtype=bfloat16", "checkpoint.interval=1", "train.lr=1e-3"),
    *("train.num_new_questions=4", "rollout.max_response_tokens=16"),
)


@dataclass(frozen=True)
class Differences:
    """How far a network is from transformers in float32 on the CPU.

    Attributes:
        mean: Of the logits.
        largest: Of the logits.
        gradients: Per parameter, the norm of the difference over the norm of what is expected; the
            norm of the gradient itself where none is expected.
    """

    mean: float
    largest: float
    gradients: dict[str, float]

    def worst_gradient(self) -> tuple[str, float]:
        """Return the parameter whose gradient is furthest off."""
        name = max(self.gradients, key=self.gradients.__getitem__)
        return name, self.gradients[name]


def on_device(pack: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    """Return a pack where this rank computes."""
    return {
        name: None if tensor is None else tensor.to(parallel.device())
        for name, tensor in pack.items()
    }


def differences(network: VisionLanguageModel, oracle: Any, kind: str) -> Differences:
    """Run one pack forward and backward into the gradient buffers of training, and the oracle on
    its sequences.
    """
    parts = tiny_families.sequences(network.architecture.family, kind)
    pack = tiny_qwen.pack(parts)
    wrapped = wrap_model(network, ParallelConfig())
    wrapped.zero_grad_buffer()
    oracle.zero_grad()
    logits = wrapped(**on_device(pack)).cpu()
    expected = tiny_families.oracle_logits(oracle, parts)
    for each in (logits, expected):
        network_checks.loss_of(each, pack["token_ids"]).backward()
    difference = (logits - expected).detach().abs()
    wanted = {name: parameter.grad for name, parameter in oracle.named_parameters()}
    errors = {}
    for mapping in parameter_mappings(network):
        found = mapping.parameter.main_grad.cpu()
        parts_wanted = [wanted[key] for key in mapping.keys]
        if any(gradient is None for gradient in parts_wanted):
            # A pack of text leaves the vision tower alone.
            errors[mapping.name] = float(found.norm())
            continue
        whole = fuse_tensors(parts_wanted, mapping.rule, network.architecture)
        errors[mapping.name] = float((found - whole).norm() / whole.norm())
    return Differences(float(difference.mean()), float(difference.max()), errors)


def check(found: Differences, dtype: str, factor: float = 1.0) -> None:
    """Hold differences against what rounding explains; `factor`: of a still coarser type."""
    name, error = found.worst_gradient()
    if dtype == "float32":
        assert found.largest <= MAX_FLOAT32_DIFFERENCE
        assert error <= MAX_FLOAT32_GRADIENT_ERROR, (name, error)
    else:
        assert found.mean <= factor * MEAN_BFLOAT16_DIFFERENCE
        assert found.largest <= factor * MAX_BFLOAT16_DIFFERENCE
        assert error <= factor * MAX_BFLOAT16_GRADIENT_ERROR, (name, error)


def run_in_bfloat16(output_dir: Path) -> None:
    """Train one step in bfloat16, save and export; go on from the checkpoint for another step, and
    export again.
    """
    exported = []
    for steps in (1, 2):
        folder = running.run(output_dir, "half", *HALF_RUN, f"train.train_iters={steps}")
        exported.append(load_file(folder / "hf" / "model.safetensors"))
    rows = running.lines(folder / "metrics.jsonl")
    steps_made = [(row["step"], row["policy/skipped_updates"]) for row in rows]
    assert steps_made == [(1, 0), (2, 0)], steps_made
    # An export has its source's types, whatever was trained in.
    source = load_file(STUDENT_DIR / "model.safetensors")
    for found in exported:
        assert {name: tensor.dtype for name, tensor in found.items()} == {
            name: tensor.dtype for name, tensor in source.items()
        }, "other tensors than the source has"
    broken = [name for name, tensor in exported[1].items() if not tensor.isfinite().all()]
    assert not broken
    assert any(not torch.equal(exported[0][name], exported[1][name]) for name in exported[0]), (
        "the second step changed nothing"
    )
