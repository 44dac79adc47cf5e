"""What a server is told to load, and what it has to answer to that."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.drawing_students import TableStudent
from tests.support.vllm_server import serve_vllm
from zppo_mm.rollout.served.server_control import (
    Probe,
    PublishedWeights,
    ServerControl,
    ServerFaultError,
)
from zppo_mm.rollout.served.weight_files import WeightFile

LOAD_SECONDS = 3.0
CHECKSUMS = {"weight": "0" * 16}
WEIGHTS = PublishedWeights(
    WeightFile(1, Path("version_1"), 0, CHECKSUMS),
    "run/1",
    Probe((1, 2, 3), (3, 1), (-0.5, -1.0), frozenset(), "float32"),
)


class Loading(TableStudent):
    """Has read every file."""

    def load(self, path: Path) -> dict[str, str]:
        return dict(CHECKSUMS)


def test_workers_that_do_not_answer_are_missed() -> None:
    """Of several data-parallel engines, the server passes on the answers of one."""
    with serve_vllm(Loading()) as server:
        server.num_workers = 2
        control = ServerControl(server.url, LOAD_SECONDS)
        with pytest.raises(ServerFaultError, match=r"got 1 answers, expected 2; start one server"):
            control.load(WEIGHTS)
        assert server.version == "loading"
        control.close()


def test_a_server_of_another_kind_or_age_is_named() -> None:
    with serve_vllm(Loading()) as server:
        server.missing = {"/pause"}
        control = ServerControl(server.url, LOAD_SECONDS)
        with pytest.raises(ServerFaultError, match=r"HTTP 404.*expected vLLM of at least 0\.32"):
            control.load(WEIGHTS)
        control.close()
