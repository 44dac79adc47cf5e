"""The network on megatron-core; knows nothing of reinforcement learning."""

from zppo_mm.models.megatron_versions import bridge_missing_triton

# Before any module of this package imports megatron.core.
bridge_missing_triton()
