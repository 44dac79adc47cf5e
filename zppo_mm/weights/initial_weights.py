"""Random initial weights that depend on the seed and the parameter alone, never on the layout."""

from __future__ import annotations

import hashlib

import torch
from megatron.core import parallel_state

from zppo_mm.models.families.architecture import Architecture
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.weights.mapping import Mapping, cut, parameter_mappings

STANDARD_DEVIATION = 0.02
DECAY_RANGE = (1.0, 16.0)
"""Range of exp(A_log), as the family is initialised."""


@torch.no_grad()
def initialize_weights(model: VisionLanguageModel, seed: int) -> None:
    """Set every parameter of this rank at random.

    Matrices are normal, norms and biases neutral, and each parameter draws from a stream named by
    its first Hugging Face key.

    Args:
        model: This rank's stage.
        seed: The same on every rank.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for mapping in parameter_mappings(model):
        shape = list(mapping.parameter.shape)
        if mapping.rule.axis is not None:
            shape[mapping.rule.axis] *= size
        whole = _draw(mapping, model.architecture, shape, seed)
        mapping.parameter.copy_(cut(whole, mapping, model.architecture, rank, size))


def _draw(
    mapping: Mapping, architecture: Architecture, shape: list[int], seed: int
) -> torch.Tensor:
    digest = hashlib.blake2b(f"{seed}/{mapping.keys[0]}".encode(), digest_size=7).digest()
    stream = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    key = mapping.keys[0]
    if key.endswith("A_log"):
        return torch.empty(shape).uniform_(*DECAY_RANGE, generator=stream).log_()
    if key.endswith(("dt_bias", "linear_attn.norm.weight")):
        return torch.ones(shape)
    if mapping.name.startswith("vision.") and len(shape) == 1:
        return (
            torch.ones(shape) if ".norm" in key and key.endswith("weight") else torch.zeros(shape)
        )
    if len(shape) == 1:
        centered = architecture.zero_centered_norm or key.endswith("bias")
        return torch.zeros(shape) if centered else torch.ones(shape)
    return torch.randn(shape, generator=stream) * STANDARD_DEVIATION
