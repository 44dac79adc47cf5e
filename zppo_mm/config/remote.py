"""Section of the configuration: files of other machines."""

from __future__ import annotations

from dataclasses import dataclass

from zppo_mm.config.keys import key


@dataclass(kw_only=True)
class RemoteConfig:
    """Data and models behind addresses (`s3://`, `gs://`, `hf://`, `https://`)."""

    cache_folder: str = key(
        "~/.cache/zppo_mm",
        "Folder on a disk of each machine that keeps what was fetched. A run resumes with the same "
        "one.",
    )
    cache_bytes: int = key(
        100 << 30,
        "Maximum bytes there, of all runs that use the folder. What was read least recently makes "
        "way.",
        at_least=1,
        may_change_on_resume=True,
    )
