"""One optimizer step on megatron-core, and its checkpoints."""
