"""The network on megatron-core. Knows nothing of reinforcement learning."""
