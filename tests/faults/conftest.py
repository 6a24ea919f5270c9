"""What the fault tests share: machines to break, and a PostgreSQL server to take away."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers import postgres, shared
from tests.helpers.machine import MEDIUM, SHORT, Machine, machines


@pytest.fixture(scope="session")
def fault_file(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny sweep file with a single shape, so that all its trials share one program."""
    text = tiny_file.read_text().replace("n_layers = { low = 1, high = 3 }", "n_layers = { low = 2, high = 2 }")
    path = tmp_path_factory.mktemp("faults") / "tiny.toml"
    path.write_text(text.replace("n_heads = [1, 2]", "n_heads = [1]"))
    return path


@pytest.fixture
def machine(tmp_path: Path, fault_file: Path) -> Iterator[Callable[..., Machine]]:
    """Makes machines by name; whatever still runs on them at the end of the test is killed."""
    with machines(tmp_path, fault_file) as make:
        yield make


@pytest.fixture(scope="session")
def undisturbed(fault_file: Path) -> list[tuple]:
    """The numbers of the first trials of a study where nothing happened."""
    root = shared.once("undisturbed", lambda root: Machine(root, fault_file).run(*MEDIUM, "study.n_trials=2"))
    return Machine(root, fault_file).numbers()


@pytest.fixture(scope="session")
def finished(fault_file: Path) -> Machine:
    """A study of three short trials; tests don't change it."""
    root = shared.once("finished", lambda root: Machine(root, fault_file).run(*SHORT, "study.n_trials=3"))
    return Machine(root, fault_file)


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[postgres.Server]:
    """A running PostgreSQL server of this test session's own."""
    programs = postgres.binaries()
    if programs is None:
        assert not request.config.getoption("--require-postgres"), "there is no PostgreSQL server on this machine"
        pytest.skip("no PostgreSQL server on this machine (Debian: apt-get install postgresql)")
    with tempfile.TemporaryDirectory(prefix="fintx-postgres-") as folder:  # pytest's folders are closed to its user
        server = postgres.Server.make(programs, Path(folder))
        server.start()
        yield server
        server.stop()


_QUICK = ("test_hostile.py", "test_reliability_page.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Most of these start several processes that import JAX: CI runs them with the slow ones."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and item.path.name not in _QUICK:
            item.add_marker(pytest.mark.slow)
