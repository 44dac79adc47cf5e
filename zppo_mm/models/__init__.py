"""The network on megatron-core; without reinforcement learning."""

# First, because it makes `import megatron.core` possible everywhere.
import zppo_mm.parallel  # noqa: F401
