"""Settings of the whole test suite, and the fixtures that many of its modules use."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

# First, because it makes `import megatron.core` possible everywhere, and test modules import that
# before the project.
import zppo_mm.models  # noqa: F401
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.parallel import groups as parallel

# The same examples every time, so that a test that passes on a commit passes on it everywhere. New
# ones are searched for with `pytest --hypothesis-profile=search`; what it finds becomes an
# @example.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("search", derandomize=False)
# `make fuzz`: as many new examples as a test under tests/fuzz takes in minutes.
settings.register_profile("fuzz", derandomize=False, max_examples=20_000, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """Process groups of one rank: `pytestmark = pytest.mark.usefixtures("one_rank")`."""
    parallel.initialize(ParallelConfig(), seed=0)
    yield
    parallel.shutdown()


@pytest.fixture(scope="session")
def raws(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The config.json of every family's tiny model; tests change copies."""
    # Here, because transformers takes seconds to import and few modules need it.
    from tests.support.config_oracle import written_configs

    return written_configs(tmp_path_factory.mktemp("configs"))
