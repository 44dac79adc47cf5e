"""One optimizer step on megatron-core, and its checkpoints."""

# First, because it makes `import megatron.core` possible everywhere.
import zppo_mm.parallel  # noqa: F401
