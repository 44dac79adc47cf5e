"""Sampling by servers of vLLM: the servers, and the trained weights that they are sent."""
