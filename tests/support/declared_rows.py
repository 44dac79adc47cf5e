"""A row of every declared benchmark with the columns that public code reads, and its question."""

from __future__ import annotations

from typing import Any

from tests.support.benchmark_tables import MATHVISTA, MMMU, VIDEOMME
from tests.support.shard_samples import png

PICTURE = {"bytes": png(value=9), "path": None}
FILM = "film.mp4"
TWO = ("red", "blue")
LINES = "Which colour?\nA. red\nB. blue\n"

Expected = tuple[str, str, str, tuple[str, ...]]
"""Question, answer, answer type, options."""

ROWS: dict[str, tuple[dict[str, Any], Expected]] = {
    "ai2d": (
        {"question": "Which?", "options": list(TWO), "answer": "1", "image": PICTURE},
        ("Which?", "B", "choice", TWO),
    ),
    "aime_2024": (
        {"ID": "2024-I-1", "Problem": "Find it.", "Solution": "So 204.", "Answer": 204},
        ("Find it.", "204", "math", ()),
    ),
    "aime_2025": (
        {"problem": "Find it.", "answer": "70", "id": "0"},
        ("Find it.", "70", "math", ()),
    ),
    "arc_challenge": (
        {
            "id": "A_1",
            "question": "Which?",
            "choices": {"text": list(TWO), "label": ["1", "2"]},
            "answerKey": "2",
        },
        ("Which?", "B", "choice", TWO),
    ),
    "chartqa": (
        {"type": "human", "question": "How many?", "answer": "14", "image": PICTURE},
        ("How many?", "14", "relaxed", ()),
    ),
    "charxiv": (
        {
            "figure_path": "images/1.jpg",
            "reasoning_q": "Which line is on top?",
            "reasoning_a": "the solid one",
            "reasoning_q_source": 1,
            "image": PICTURE,
        },
        ("Which line is on top?", "the solid one", "open", ()),
    ),
    "dynamath": (
        {"id": "1", "question": "Find x.", "ground_truth": "2.5", "decoded_image": PICTURE},
        ("Find x.", "2.5", "math", ()),
    ),
    "gpqa_diamond": (
        {
            "Question": "Which?",
            "Correct Answer": "w",
            **{f"Incorrect Answer {number}": letter for number, letter in enumerate("xyz", 1)},
        },
        ("Which?", "C", "choice", ("x", "y", "w", "z")),
    ),
    "gsm8k": (
        {"question": "How many?", "answer": "2 + 3 = <<2+3=5>>5.\n#### 1,005"},
        ("How many?", "1,005", "math", ()),
    ),
    "hallusionbench": (
        {
            "question": "Is it red?",
            "gt_answer": "0",
            "subcategory": "chart",
            "image": PICTURE,
            "filename": "./chart/0_1.png",
        },
        ("Is it red?", "No", "math", ()),
    ),
    "infographicvqa": (
        {"questionId": "7", "question": "Who?", "answers": ["Ada", "Ada L."], "image": PICTURE},
        ("Who?", "Ada", "anls", ()),
    ),
    "logicvista": (
        {"question": "Which comes next?", "answer": "C", "image": PICTURE},
        ("Which comes next?", "C", "math", ()),
    ),
    "lvbench": (
        {"video_path": FILM, "question": f"{LINES}", "answer": "B"},
        ("Which colour?", "B", "choice", TWO),
    ),
    "math500": (
        {"problem": "Find it.", "solution": "…", "answer": r"\frac12", "unique_id": "a.json"},
        ("Find it.", r"\frac12", "math", ()),
    ),
    "mathverse": (
        {
            "sample_index": "5",
            "question": "",
            "answer": "A",
            "problem_version": "Vision Only",
            "image": PICTURE,
        },
        ("Answer the question in the picture.", "A", "math", ()),
    ),
    "mathvision": (
        {
            "id": "1",
            "question": "How many?",
            "options": [],
            "answer": "7",
            "image": "images/1.jpg",
            "decoded_image": PICTURE,
        },
        ("How many?", "7", "math", ()),
    ),
    "mathvista": (
        MATHVISTA,
        ("How long is the bar? (Unit: cm) Round the answer to 1 decimal place.", "1.2", "math", ()),
    ),
    "mlvu": (
        {"video_name": FILM, "question": f"{LINES}", "answer": "A", "task_type": "count"},
        ("Which colour?", "A", "choice", TWO),
    ),
    "mmlu_pro": (
        {"question_id": 1, "question": "Which?", "options": list(TWO), "answer": "A"},
        ("Which?", "A", "choice", TWO),
    ),
    "mmlu_redux": (
        {"question": "Which?", "choices": list(TWO), "answer": 0},
        ("Which?", "A", "choice", TWO),
    ),
    "mmmu": (
        MMMU,
        (
            "Compare <image 1> with <image 2>.",
            "C",
            "choice",
            ("older", "same as <image 2>", "it's newer"),
        ),
    ),
    "mmmu_pro": (
        MMMU,
        (
            "Compare <image 1> with <image 2>.",
            "C",
            "choice",
            ("older", "same as <image 2>", "it's newer"),
        ),
    ),
    "mmstar": (
        {
            "index": 0,
            "question": "Which colour?\nOptions: A: red, B: blue",
            "answer": "B",
            "category": "coarse",
            "image": png(value=9),
        },
        ("Which colour?", "B", "choice", TWO),
    ),
    "mvbench": (
        {"video": FILM, "question": "Which?", "candidates": list(TWO), "answer": "blue"},
        ("Which?", "B", "choice", TWO),
    ),
    "ocrbench_v2": (
        {"id": 0, "type": "cognition VQA en", "question": "Which?", "answers": ["Exit"]}
        | {"image": PICTURE},
        ("Which?", "Exit", "anls", ()),
    ),
    "realworldqa": (
        {
            "question": f"{LINES}\nPlease answer directly with only the letter of the correct "
            "option and nothing else.",
            "answer": "A",
            "image": PICTURE,
        },
        ("Which colour?", "A", "choice", TWO),
    ),
    "scibench": (
        {"problem_text": "How fast?", "answer_number": "-1.49", "unit": "m/s", "source": "fund"},
        ("How fast? (Unit: m/s)", "-1.49", "relaxed", ()),
    ),
    "supergpqa": (
        {"question": "Which?", "options": list(TWO), "answer": "blue", "answer_letter": "B"},
        ("Which?", "B", "choice", TWO),
    ),
    "videomme": (
        VIDEOMME | {"videoID": "film"},
        ("What happens?", "B", "choice", ("A goal.", "A foul.", "Nothing.", "Rain.")),
    ),
    "videommmu": (
        {"id": "film", "question": "Which?", "question_type": "mcq", "options": list(TWO)}
        | {"answer": "B"},
        ("Which?", "B", "choice", TWO),
    ),
    "wemath": (
        {
            "ID": "1@1",
            "question": "Which colour?",
            "option": "A. red; B. blue; ",
            "answer": "B",
            "key": "0",
            "image_path": PICTURE,
        },
        ("Which colour?", "B", "choice", TWO),
    ),
}
