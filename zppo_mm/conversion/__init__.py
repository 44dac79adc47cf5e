"""Hugging Face folders to Megatron and back, and what can be said about a folder: the commands of
tools/convert_checkpoint.py.
"""
