"""Evaluation of a model by itself: any questions, several responses each, resumable, with
intervals.
"""
