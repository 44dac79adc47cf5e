"""LoRA adapters: beside Megatron's linears, in checkpoints, and as PEFT folders."""

# First, because it makes `import megatron.core` possible everywhere.
import zppo_mm.parallel  # noqa: F401
