"""What pip may install into an image that brings torch: nothing in place of what is there."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

from tests.support.running import CLONE

SCRIPT = runpy.run_path(str(CLONE / "docker" / "constraints.py"), run_name="constraints")
IMAGE = {"torch": "2.10.0a0+b4e4ee81d3.nv25.12", "ruamel-yaml": "0.18.1", "setuptools": "70.0"}


def test_the_image_comes_first() -> None:
    tested = "# tested\ntorch==2.13.0\nruamel_yaml==0.19\nmegatron-core==0.19.2\n\n"
    assert SCRIPT["constraints"](IMAGE, tested) == [
        "ruamel-yaml==0.18.1",
        "torch==2.10.0a0+b4e4ee81d3.nv25.12",
        "megatron-core==0.19.2",
    ]
    # Of the tested versions, those of everything that an image has not are left.
    tested = (CLONE / "constraints-latest.txt").read_text(encoding="utf-8")
    names = [line.split("==")[0] for line in SCRIPT["constraints"](IMAGE, tested)]
    assert names.count("torch") == 1
    assert {"transformers", "megatron-core", "numpy"} <= set(names)


def test_a_package_that_was_replaced_is_found(tmp_path: Path) -> None:
    listed = tmp_path / "image.json"
    packages = [{"name": "ruamel.yaml", "version": "0.18.1"}, {"name": "Torch", "version": "2.10"}]
    listed.write_text(json.dumps(packages), encoding="utf-8")
    image = SCRIPT["installed"](listed)
    assert SCRIPT["changed"](image, {"ruamel-yaml": "0.18.1", "torch": "2.10", "av": "15"}) == []
    assert SCRIPT["changed"](image, {"torch": "2.13"}) == [
        "ruamel-yaml was 0.18.1, is gone",
        "torch was 2.10, is 2.13",
    ]
