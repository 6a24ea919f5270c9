"""What the fault tests share: machines to break, and a PostgreSQL server to take away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults import postgres
from tests.faults.machine import Machine, machines


@pytest.fixture
def machine(tmp_path: Path, tiny_file: Path) -> Iterator[Callable[..., Machine]]:
    """Makes machines by name; whatever still runs on them at the end of the test is killed."""
    with machines(tmp_path, tiny_file) as make:
        yield make


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[postgres.Server]:
    """A running PostgreSQL server of this test session's own."""
    programs = postgres.binaries()
    if programs is None:
        assert not request.config.getoption("--require-postgres"), "there is no PostgreSQL server on this machine"
        pytest.skip("no PostgreSQL server on this machine (Debian: apt-get install postgresql)")
    made = postgres.Server.make(programs, tmp_path_factory.mktemp("postgres"))
    made.start()
    yield made
    made.stop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each of these starts several processes that import JAX: CI runs them with the slow ones."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slow)
