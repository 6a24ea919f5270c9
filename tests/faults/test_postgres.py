"""A study in a database: what can't be opened is said without its password, and a lost lock is noticed."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from fintx.study import storage
from tests.faults import postgres


@pytest.fixture
def url(server: postgres.Server, request: pytest.FixtureRequest) -> str:
    """An empty database."""
    return server.create(request.node.name[:60].lower())


def sharing(url: str) -> tuple[str, ...]:
    return ("--storage", url)


def leaks(folder: Path) -> list[str]:
    """Files that hold the password: logs, records, journals, tracebacks, whatever lies there."""
    secret = postgres.PASSWORD.encode()
    return [str(path) for path in folder.rglob("*") if path.is_file() and secret in path.read_bytes()]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"password": "wrong-pass"}, "the password is wrong"),
        ({"database": "nowhere"}, "there is no such database"),
        ({"port": 1}, "does not answer; is the database running"),
    ],
    ids=["password", "database", "server"],
)
def test_a_storage_that_cannot_be_opened_is_one_line_without_the_password(change, words, machine, server, tmp_path):
    address = server.url(change.get("database", "postgres"), password=change.get("password", postgres.PASSWORD))
    if "port" in change:
        address = address.replace(f":{server.port}/", f":{change['port']}/")
    said = machine().run(code=2, options=sharing(address))
    assert words in said.replace("\n", " ") and "wrong-pass" not in said
    assert not list(machine().folder.glob("trials/*"))
    assert leaks(tmp_path) == []


def test_a_lock_that_was_lost_is_noticed_before_anything_is_written(server, url, tmp_path):
    """The server ends a silent holder's transaction; what he would write then must not be written."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with storage.open_study(url, tmp_path, "x", minimize=True, warn=lambda words: None) as opened:
        with pytest.raises(storage.StorageAway), opened.exclusive() as check:
            check()
            server.query("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'", "postgres")
            check()
        with opened.exclusive() as check:
            check()
