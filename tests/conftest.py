"""Settings of the whole test suite, and the fixtures that many of its modules use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

# First, because it makes `import megatron.core` possible everywhere, and test modules import that
# before the project.
import zppo_mm.models  # noqa: F401
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.parallel import groups as parallel

if TYPE_CHECKING:
    from tests.support.loopback_server import LoopbackServer, TinyModel

# The same examples every time, so that a test that passes on a commit passes on it everywhere. New
# ones are searched for with `pytest --hypothesis-profile=search`; what it finds becomes an
# @example. No time limits: a busy machine is no fault.
NO_CLOCK = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeatable", NO_CLOCK, derandomize=True)
settings.register_profile("search", NO_CLOCK, derandomize=False)
# `make fuzz`: as many new examples as a test under tests/fuzz takes in minutes.
settings.register_profile("fuzz", NO_CLOCK, derandomize=False, max_examples=20_000)
settings.load_profile("repeatable")


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """Process groups of one rank: `pytestmark = pytest.mark.usefixtures("one_rank")`."""
    parallel.initialize(ParallelConfig(), seed=0)
    yield
    parallel.shutdown()


@pytest.fixture(scope="module")
def tiny_model() -> TinyModel:
    """The bundled teacher, for servers on this machine."""
    from tests.support.loopback_server import TinyModel
    from zppo_mm.bundled import TEACHER_DIR

    return TinyModel(TEACHER_DIR)


@pytest.fixture
def server(tiny_model: TinyModel) -> Iterator[LoopbackServer]:
    """A chat server with the bundled teacher."""
    from tests.support.loopback_server import serve

    with serve(tiny_model) as made:
        yield made


@pytest.fixture(scope="session")
def raws(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The config.json of every family's tiny model; tests change copies."""
    # Here, because transformers takes seconds to import and few modules need it.
    from tests.support.config_oracle import written_configs

    return written_configs(tmp_path_factory.mktemp("configs"))


@pytest.fixture(scope="session")
def prompt_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder without weights: tokenizer, chat template, processor."""
    from tests.support.tiny_folder import build_folder

    folder = tmp_path_factory.mktemp("prompts")
    build_folder(folder)
    return folder


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random student with a vision tower, and without a tokenizer."""
    from tests.support.training_example import write_tiny_folder

    return write_tiny_folder(tmp_path_factory.mktemp("student"))


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that is there afterwards if code has run."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "code of a file has run"
