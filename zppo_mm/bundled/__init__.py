"""The tiny models that come with the program, student and teacher of a run that names none among
them, and what builds their folders.
"""

from __future__ import annotations

from pathlib import Path

STUDENT_DIR = Path(__file__).parent / "student"
"""Hugging Face folder of the bundled student."""
WEAK_STUDENT_DIR = Path(__file__).parent / "weak_student"
"""Hugging Face folder of the student for comparing methods, which is hardly ever right unaided;
chosen by `model.student`.
"""
TEACHER_DIR = Path(__file__).parent / "teacher"
"""Hugging Face folder of the bundled teacher."""
