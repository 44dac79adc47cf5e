"""Weights between files and the network: Hugging Face folders and Megatron folders."""

# First, because it makes `import megatron.core` possible everywhere.
import zppo_mm.parallel  # noqa: F401
