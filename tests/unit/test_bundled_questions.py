"""Where the bundled questions are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.toy import digits_media
from zppo_mm.bundled import questions


def test_another_generator_has_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = questions.bundled_folder(tmp_path, "video", "train")
    assert questions.bundled_folder(tmp_path, "video", "train") == before
    changed = tmp_path / "digits_media.py"
    changed.write_bytes(Path(digits_media.__file__).read_bytes() + b"# changed\n")
    monkeypatch.setattr(digits_media, "__file__", str(changed))
    questions._generator_version.cache_clear()
    try:
        assert questions.bundled_folder(tmp_path, "video", "train") != before
    finally:
        questions._generator_version.cache_clear()
