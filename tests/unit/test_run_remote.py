"""Models behind addresses: fetched once per machine, and named by their folder here."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from data.errors import DataError
from data.remote_files import RemoteFiles
from zppo_mm.bundled import STUDENT_DIR
from zppo_mm.config.load import load_config
from zppo_mm.config.schema import RunConfig
from zppo_mm.run.model_paths import check_model_paths
from zppo_mm.run.remote import fetched_models

ADDRESS = "memory://models/student"


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run with a student and a fallback teacher in a store, and a served teacher."""
    store = fsspec.filesystem("memory")
    store.put(f"{STUDENT_DIR}/", "/models/student/", recursive=True)
    store.pipe("/models/student/pytorch_model.bin", b"the same weights again")
    return load_config(
        None,
        [
            f"model.student={ADDRESS}",
            f"fallback_teachers=[{{model: '{ADDRESS}'}}]",
            "teacher.model=s3://a/name",
            "teacher.endpoints=['http://127.0.0.1:1/v1']",
            f"remote.cache_folder={tmp_path}/cache",
        ],
    )


def test_models_are_fetched_and_stay_during_the_run(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "cache/memory/models/student"
    with fetched_models(config) as fetched:
        assert fetched.model.student == fetched.fallback_teachers[0].model == str(folder)
        assert fetched.teacher.model == "s3://a/name", "the name of a served model"
        check_model_paths(fetched.model, fetched.fallback_teachers)
        assert not (folder / "pytorch_model.bin").exists()
        for path in STUDENT_DIR.iterdir():
            assert (folder / path.name).read_bytes() == path.read_bytes()
        cache = RemoteFiles(tmp_path / "cache", 1 << 30)._cache
        assert not cache.remove(folder / "config.json"), "in use"
    assert config.model.student == ADDRESS
    assert cache.remove(folder / "config.json")


def test_other_processes_of_a_machine_fetch_nothing(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with fetched_models(config) as fetched:
        assert fetched.model.student == str(tmp_path / "cache/memory/models/student")
    assert not (tmp_path / "cache").exists()


def test_a_model_that_is_not_there_or_does_not_fit_is_named(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.model.student = "memory://models/gone"
    with (
        pytest.raises(DataError, match="memory://models/gone: no such object"),
        fetched_models(config),
    ):
        pass
    monkeypatch.setattr("data.file_cache.WAIT_SECONDS", 0.0)
    config.model.student = ADDRESS
    config.remote.cache_bytes = 10_000
    with (
        pytest.raises(
            DataError, match=r"student/.*no room in the cache, .* raise remote\.cache_bytes"
        ),
        fetched_models(config),
    ):
        pass
