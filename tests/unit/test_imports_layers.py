"""Import directions: the table here is the one of docs/architecture.md, and every import statement is held against it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("data", "encoders", "zppo_mm")

BASE = {
    "data",
    "encoders",
    "zppo_mm.errors",
    "zppo_mm.experience",
    "zppo_mm.config",
    "zppo_mm.randomness",
    "zppo_mm.interpreters",
    "zppo_mm.interruption",
    "zppo_mm.neutralise",
}
MODELS = BASE | {"zppo_mm.models"}
STAGES = MODELS | {
    "zppo_mm.algorithms",
    "zppo_mm.observability",
    "zppo_mm.rewards",
    "zppo_mm.rollout",
    "zppo_mm.teacher",
    "zppo_mm.training",
    "zppo_mm.zone",
}
ALLOWED: dict[str, set[str]] = {
    "data": set(),
    "encoders": set(),
    "zppo_mm.errors": set(),
    "zppo_mm.randomness": set(),
    "zppo_mm.interpreters": set(),
    "zppo_mm.interruption": set(),
    "zppo_mm.neutralise": set(),
    "zppo_mm.config": {"zppo_mm.config_models", "zppo_mm.config_teacher"},
    "zppo_mm.config_models": set(),
    "zppo_mm.config_teacher": set(),
    "zppo_mm.config_relations": {"zppo_mm.config", "zppo_mm.errors"},
    "zppo_mm.config_checks": {"zppo_mm.config", "zppo_mm.config_relations", "zppo_mm.errors"},
    "zppo_mm.config_help": {"zppo_mm.config", "zppo_mm.config_models", "zppo_mm.config_teacher"},
    "zppo_mm.config_io": {"zppo_mm.config", "zppo_mm.config_checks", "zppo_mm.errors"},
    "zppo_mm.experience": {"data", "encoders"},
    "zppo_mm.algorithms": set(),
    "zppo_mm.rewards": BASE,
    "zppo_mm.observability": BASE,
    "zppo_mm.models": BASE,
    "zppo_mm.training": MODELS | {"zppo_mm.algorithms", "zppo_mm.observability.metrics"},
    "zppo_mm.rollout": MODELS | {"zppo_mm.rewards"},
    "zppo_mm.teacher": MODELS | {"zppo_mm.rewards", "zppo_mm.rollout"},
    "zppo_mm.zone": BASE | {"zppo_mm.teacher.teacher"},
    "zppo_mm.evaluate": MODELS | {"zppo_mm.rollout"},
    "zppo_mm.step": STAGES,
    "zppo_mm.supervised": STAGES | {"zppo_mm.embedded.lessons"},
    "zppo_mm.embedded": STAGES | {"zppo_mm.supervised"},
    "zppo_mm.build_shared": STAGES,
    "zppo_mm.build_teacher": STAGES | {"zppo_mm.build_shared", "zppo_mm.embedded"},
    "zppo_mm.comparison": BASE | {"zppo_mm.config_io", "zppo_mm.observability", "zppo_mm.rewards"},
    "zppo_mm.build": STAGES | {"zppo_mm.build_shared", "zppo_mm.build_teacher", "zppo_mm.embedded", "zppo_mm.evaluate", "zppo_mm.step"},
    "zppo_mm.parity": STAGES | {"zppo_mm.build"},
    "zppo_mm.teacher_ranks": STAGES | {"zppo_mm.build_shared", "zppo_mm.build_teacher"},
    "zppo_mm.model_paths": MODELS,
    "zppo_mm.learning_warnings": BASE,
    "zppo_mm.run_folder": MODELS | {"zppo_mm.observability", "zppo_mm.config_io"},
    "zppo_mm.resume": STAGES | {"zppo_mm.build", "zppo_mm.config_io"},
    "zppo_mm.train": STAGES
    | {f"zppo_mm.{name}" for name in ("build", "teacher_ranks", "parity", "evaluate", "step")}
    | {f"zppo_mm.{name}" for name in ("model_paths", "resume", "run_folder", "learning_warnings")},
    "zppo_mm.evaluation": STAGES
    | {f"zppo_mm.{name}" for name in ("build", "build_shared", "build_teacher", "config_io", "embedded.questions", "evaluate", "train")}
    | {"zppo_mm.model_paths"},
    "zppo_mm.conversion": STAGES | {"zppo_mm.build", "zppo_mm.parity", "zppo_mm.train", "zppo_mm.config_io"},
}
"""What each part may import besides itself and third parties."""

TORCH_FREE = (
    "zppo_mm.config",
    "zppo_mm.config_checks",
    "zppo_mm.config_relations",
    "zppo_mm.config_help",
    "zppo_mm.config_io",
    "zppo_mm.zone",
    "zppo_mm.rewards",
)
TORCH_FREE += (
    "zppo_mm.interpreters",
    "zppo_mm.interruption",
    "zppo_mm.neutralise",
    "zppo_mm.errors",
    "zppo_mm.experience",
    "zppo_mm.comparison",
    "zppo_mm.randomness",
    "data",
)
HEAVY = {"torch", "transformers", "megatron"}
# The vision tower shares its work over a group that it is handed; it makes none.
PROCESS_GROUP_PARTS = ("zppo_mm.models", "zppo_mm.training", "encoders")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk the tree without the blocks that only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        yield node
        yield from runtime_nodes(node)


def imports(path: Path, runtime_only: bool = False) -> list[tuple[int, str]]:
    """Return line and absolute dotted name of everything a file imports."""
    tree = ast.parse(path.read_text())
    found = []
    for node in runtime_nodes(tree) if runtime_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write it absolutely"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def is_within(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


def part_of(name: str) -> str | None:
    return next((part for part in sorted(ALLOWED, key=len, reverse=True) if is_within(name, part)), None)


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def violations(path: Path) -> list[str]:
    part = part_of(module_name(path))
    if part is None:
        return []
    wrong = []
    for line, name in imports(path):
        ours = name.split(".")[0] in PACKAGES
        if ours and not is_within(name, part) and not any(is_within(name, allowed) for allowed in ALLOWED[part]):
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return wrong


def test_imports_go_down_only() -> None:
    assert [violation for path in sources() for violation in violations(path)] == []


def test_every_module_is_in_the_table() -> None:
    assert [module_name(path) for path in sources() if part_of(module_name(path)) is None] == ["zppo_mm"]


def test_torch_free_parts_stay_so() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources()
        if any(is_within(module_name(path), part) for part in TORCH_FREE)
        for line, name in imports(path, runtime_only=True)
        if name.split(".")[0] in HEAVY
    ]
    assert wrong == []


def test_algorithms_import_torch_only() -> None:
    allowed = {"torch", "__future__", "dataclasses", "typing", "collections", "math", "enum", "zppo_mm"}
    wrong = [name for path in (ROOT / "zppo_mm/algorithms").rglob("*.py") for _, name in imports(path) if name.split(".")[0] not in allowed]
    assert wrong == []


def test_only_the_parallel_parts_touch_process_groups() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources()
        if part_of(module_name(path)) is not None and not any(is_within(module_name(path), part) for part in PROCESS_GROUP_PARTS)
        for line, name in imports(path)
        if is_within(name, "torch.distributed") or is_within(name, "megatron.core.parallel_state")
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("zppo_mm/rollout/probe.py", "from zppo_mm.training import policy\n"),
        ("zppo_mm/zone/probe.py", "from zppo_mm.teacher.rule import X\n"),
        ("data/probe.py", "import zppo_mm.errors\n"),
    ],
)
def test_a_wrong_import_is_seen(path: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: source)
    assert violations(ROOT / path) != []
