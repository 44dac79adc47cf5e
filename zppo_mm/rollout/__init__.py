"""Sampling groups of responses from a policy. Knows nothing of training."""
