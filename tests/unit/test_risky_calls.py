"""No module of the packages opens files in a way that could run code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


# What may use them: a restricted unpickler, templates of our own, and pipes to our own processes.
ALLOWED = {
    ("zppo_mm/serving/client_main.py", "pickle.loads"),
    ("zppo_mm/serving/client_process.py", "pickle.loads"),
    ("zppo_mm/weights/checkpoint_metadata.py", "pickle._Unpickler"),
    ("zppo_mm/report/page.py", "jinja2.Environment"),
}


RISKY = {
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "pickle._Unpickler",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "eval",
    "exec",
    "compile",
}


RISKY |= {
    "__import__",
    "marshal.loads",
    "shelve.open",
    "jinja2.Environment",
    "os.system",
    "os.popen",
    "dist_checkpointing.load",
}
NEEDED = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "from_pretrained": ("trust_remote_code", False),
}


def risky_names() -> Iterator[tuple[str, str]]:
    """Yield file and name of everything in the packages that could run code of a file, calls
    without the needed argument included.
    """
    for path in (
        path
        for package in ("data", "encoders", "zppo_mm", "tools")
        for path in sorted((ROOT / package).rglob("*.py"))
    ):
        module = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute | ast.Name) and (name := ast.unparse(node)) in RISKY:
                yield module, name
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                for ending, (argument, value) in NEEDED.items():
                    given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                    if (name == ending or name.endswith(f".{ending}")) and given.get(
                        argument
                    ) != str(value):
                        yield module, name


def test_nothing_in_the_packages_opens_files_in_a_way_that_could_run_code() -> None:
    assert set(risky_names()) <= ALLOWED
