"""ZPPO reinforcement learning of vision-language students on megatron-core."""
