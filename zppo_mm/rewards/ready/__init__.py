"""Reward functions to be named in `reward.functions`, and to read before writing one."""
