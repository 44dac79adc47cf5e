"""Servers of models, asked from a process beside the run: bounded HTTP, retries, counts."""
