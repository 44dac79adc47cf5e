"""The bundled tiny models, the defaults of a run without `model.student` or `teacher.model`."""

from __future__ import annotations

from pathlib import Path

STUDENT_DIR = Path(__file__).parent / "student"
"""Hugging Face folder of the bundled student."""
WEAK_STUDENT_DIR = Path(__file__).parent / "weak_student"
"""Hugging Face folder of the student for comparing methods; it rarely solves a plain prompt."""
HALF_FORMED_DIR = Path(__file__).parent / "half_formed"
"""Hugging Face folder of the second experiment's student; it knows a part of the facts."""
TERSE_TEACHER_DIR = Path(__file__).parent / "terse_teacher"
"""Hugging Face folder of its teacher."""
TEACHER_DIR = Path(__file__).parent / "teacher"
"""Hugging Face folder of the bundled teacher."""
