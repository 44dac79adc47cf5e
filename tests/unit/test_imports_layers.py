"""Import directions: the table here is the one of docs/architecture.md, and every import statement
is held against it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("data", "encoders", "zppo_mm")

FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "data",
        "encoders",
        "zppo_mm.accuracy",
        "zppo_mm.errors",
        "zppo_mm.interruption",
        "zppo_mm.methods",
        "zppo_mm.piped_output",
        "zppo_mm.randomness",
        "zppo_mm.reasoning",
        "zppo_mm.run_folder",
        "zppo_mm.special_tokens",
        "zppo_mm.text_table",
    ),
    ("data.sources", "data.toy", "zppo_mm.config", "zppo_mm.experience", "zppo_mm.rewards"),
    (
        "data.media",
        "zppo_mm.algorithms",
        "zppo_mm.models.families",
        "zppo_mm.observability",
        "zppo_mm.parallel",
        "zppo_mm.serving",
    ),
    ("data.imports", "zppo_mm.models.layers", "zppo_mm.report"),
    ("zppo_mm.comparison", "zppo_mm.models"),
    ("zppo_mm.models.decoding", "zppo_mm.weights"),
    ("zppo_mm.lora", "zppo_mm.rollout"),
    ("zppo_mm.rollout.served", "zppo_mm.teacher", "zppo_mm.training"),
    ("zppo_mm.mirror", "zppo_mm.teacher.served", "zppo_mm.zone"),
    ("zppo_mm.bundled", "zppo_mm.stages"),
    ("zppo_mm.run", "zppo_mm.step"),
    ("zppo_mm.parity",),
    ("zppo_mm.train",),
    ("zppo_mm.conversion", "zppo_mm.corpus", "zppo_mm.evaluation"),
    ("zppo_mm.planning",),
)
"""The rooms, from the ground up: a room may import only rooms of the floors below its own."""

FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

TORCH_FREE = (
    "data",
    "zppo_mm.accuracy",
    "zppo_mm.comparison",
    "zppo_mm.config",
    "zppo_mm.errors",
    "zppo_mm.experience",
    "zppo_mm.interruption",
    "zppo_mm.methods",
    "zppo_mm.piped_output",
    "zppo_mm.randomness",
    "zppo_mm.reasoning",
    "zppo_mm.rewards",
    "zppo_mm.run_folder",
    "zppo_mm.serving",
    "zppo_mm.special_tokens",
    "zppo_mm.text_table",
    "zppo_mm.zone",
)
HEAVY = {"torch", "transformers", "megatron"}
# A third more memory, and processor time to start, for every process of a run: what draws imports
# them when it does.
DRAWING = {"matplotlib", "sklearn", "scipy", "av"}
# The vision tower shares its work over a group that it is handed; it makes none.
PROCESS_GROUP_PARTS = (
    "zppo_mm.algorithms",
    "encoders",
    "zppo_mm.lora",
    "zppo_mm.models",
    "zppo_mm.parallel",
    "zppo_mm.training",
    "zppo_mm.weights",
)


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
    return next(
        (part for part in sorted(FLOOR_OF, key=len, reverse=True) if is_within(name, part)), None
    )


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def violations(path: Path) -> list[str]:
    """Return the imports of a file that do not go down."""
    room = part_of(module_name(path))
    if room is None:
        return []
    wrong = []
    for line, name in imports(path):
        other = part_of(name)
        if other is not None and other != room and FLOOR_OF[other] >= FLOOR_OF[room]:
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return wrong


def test_imports_go_down_only() -> None:
    assert [violation for path in sources() for violation in violations(path)] == []


def test_every_module_is_in_the_table() -> None:
    assert [module_name(path) for path in sources() if part_of(module_name(path)) is None] == [
        "zppo_mm"
    ]


def test_torch_free_parts_stay_so() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources()
        if any(is_within(module_name(path), part) for part in TORCH_FREE)
        for line, name in imports(path, runtime_only=True)
        if name.split(".")[0] in HEAVY
    ]
    assert wrong == []


def imported_at_start(module: str) -> set[str]:
    """Return all modules of ours and the other packages that importing a module brings in."""
    paths = {module_name(path): path for path in sources()}
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for node in runtime_nodes(ast.parse(paths[name].read_text())):
            if isinstance(node, ast.FunctionDef):
                node.body = []  # is imported when it is called
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [f"{getattr(node, 'module', '')}.{each.name}" for each in node.names]
                for whole in (*names, *(each.rpartition(".")[0] for each in names)):
                    inner = [each for each in paths if is_within(whole.lstrip("."), each)]
                    waiting += inner
                    found |= set() if inner else {whole.lstrip(".").split(".")[0]}
    return found


def test_ranks_start_without_what_draws() -> None:
    assert DRAWING & imported_at_start("zppo_mm.report.page") == {"matplotlib"}
    found = imported_at_start("zppo_mm.train")
    assert {"torch", "zppo_mm.run.questions", "data.toy.digits_media"} <= found
    assert DRAWING & found == set()


def test_algorithms_import_torch_only() -> None:
    allowed = {
        "torch",
        "__future__",
        "dataclasses",
        "typing",
        "collections",
        "math",
        "enum",
        "zppo_mm",
    }
    wrong = [
        name
        for path in (ROOT / "zppo_mm/algorithms").rglob("*.py")
        for _, name in imports(path)
        if name.split(".")[0] not in allowed
    ]
    assert wrong == []


def test_only_the_parallel_parts_touch_process_groups() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources()
        if part_of(module_name(path)) is not None
        and not any(is_within(module_name(path), part) for part in PROCESS_GROUP_PARTS)
        for line, name in imports(path)
        if is_within(name, "torch.distributed") or is_within(name, "megatron.core.parallel_state")
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("zppo_mm/rollout/probe.py", "from zppo_mm.training import policy\n"),
        ("zppo_mm/zone/probe.py", "from zppo_mm.bundled.recipes import X\n"),
        ("data/probe.py", "import zppo_mm.errors\n"),
    ],
)
def test_a_wrong_import_is_seen(path: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: source)
    assert violations(ROOT / path) != []
