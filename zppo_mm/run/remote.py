"""What a run reads from other machines: its data through a cache, its models before it starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from data.remote_files import RemoteFiles, is_address
from zppo_mm.config.remote import RemoteConfig
from zppo_mm.config.schema import RunConfig
from zppo_mm.config.teacher import TeacherConfig

MODEL_FILES = (".json", ".jinja", ".model", ".safetensors", ".tiktoken", ".txt")
"""Suffixes of what is read of a model's folder; other formats of its weights are left there."""


def open_files(config: RemoteConfig) -> RemoteFiles:
    """Return the way to files of this machine and, through its cache, of others."""
    return RemoteFiles(config.cache_folder, config.cache_bytes)


@contextmanager
def fetched_models(config: RunConfig) -> Iterator[RunConfig]:
    """Yield a configuration that names folders of this machine in place of addresses of models.

    The first process of each machine fetches them, and keeps them in the cache during the block;
    the others must not read them before they are joined to it.

    Raises:
        DataError: A model cannot be fetched.
    """
    files = open_files(config.remote)
    try:
        yield replace(
            config,
            model=replace(config.model, student=_fetched(config.model.student, files)),
            teacher=_with_fetched(config.teacher, files),
            fallback_teachers=[_with_fetched(each, files) for each in config.fallback_teachers],
        )
    finally:
        files.release()


def _with_fetched(teacher: TeacherConfig, files: RemoteFiles) -> TeacherConfig:
    # Of a served teacher it is a name that its server knows.
    return teacher if teacher.endpoints else replace(teacher, model=_fetched(teacher.model, files))


def _fetched(model: str, files: RemoteFiles) -> str:
    if not is_address(model):
        return model
    folder = files.path_of(model)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for name in files.names(folder):
            if Path(name).suffix in MODEL_FILES:
                files.keep(str(folder / name))
    return str(folder)
