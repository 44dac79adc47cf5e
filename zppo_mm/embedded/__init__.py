"""The tiny student and teacher that a run uses when no model is named, and what builds their folders."""

from __future__ import annotations

from pathlib import Path

STUDENT_DIR = Path(__file__).parent / "student"
"""Hugging Face folder of the embedded student."""
TEACHER_DIR = Path(__file__).parent / "teacher"
"""Hugging Face folder of the embedded teacher."""
