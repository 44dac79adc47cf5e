"""Prefill and one-token steps of the training network."""
