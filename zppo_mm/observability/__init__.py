"""Metrics, transcripts and the report."""
