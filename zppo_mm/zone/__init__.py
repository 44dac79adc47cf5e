"""What ZPPO adds: hard questions, reformulated prompts, the replay buffer. No torch."""
