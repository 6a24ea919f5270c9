"""Storage of a study's trials: a journal file in its folder, or a PostgreSQL database.

A coordinator looks, decides and writes inside `exclusive`, one at a time over all machines that share the storage: so a
total is exact, a trial has one holder, and nothing is proposed twice. A database that is away raises `StorageAway`; the
caller goes on with what it has and tries again. No message here shows a password.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection

from fintx.errors import FintxError, without_passwords

JOURNAL = "journal"
Check = Callable[[], None]
"""Raises if the lock has been lost meanwhile."""
Lock = Callable[[], contextlib.AbstractContextManager[Check]]
Warn = Callable[[str], None]
_CONNECT_S = 5
_FROZEN_S = 30
"""A holder of the database's lock that is silent for so long (a frozen machine) loses it."""
_WAIT_S = 0.05
_PATIENCE_S = 60


class StorageAway(Exception):
    """The database does not answer now; the request may be repeated."""


@dataclass(frozen=True)
class Storage:
    """An open storage with one study in it."""

    name: str
    """For messages."""
    backend: BaseStorage
    study: optuna.Study
    lock: Lock
    shared: bool
    """Whether machines without a common file system may share it, so that records have to travel through it."""

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[Check]:
        """Hold the storage alone, over all machines; call the value right before a write that others rely on.

        Raises:
            StorageAway: the database is away, or was lost inside: look again before deciding anything.
            FintxError: the journal's disk is full or forbidden.
        """
        with _translated(self.name), self.lock() as check:
            yield check


@contextlib.contextmanager
def open_storage(url: str, folder: Path, study: str, *, minimize: bool, warn: Warn) -> Iterator[Storage]:
    """Open the storage with the study in it, creating what isn't there yet; safe for any number at once.

    Args:
        url: "journal", or postgresql://….
        folder: the study's; it holds the journal.
        warn: called with a line about a journal that had to be repaired.

    Raises:
        StorageAway: the database doesn't answer.
        FintxError: wrong credentials or database, a missing driver, or a journal that can't be read or written.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    direction = StudyDirection.MINIMIZE if minimize else StudyDirection.MAXIMIZE
    create = functools.partial(optuna.create_study, study_name=study, direction=direction, load_if_exists=True)
    name = "the journal" if url == JOURNAL else without_passwords(url)
    with contextlib.ExitStack() as stack:
        with _translated(name):
            if url == JOURNAL:
                lock = _journal_lock(folder, warn)
                with lock():
                    _repair(folder / "journal.log", warn)
                    backend: BaseStorage = _open_journal(folder / "journal.log")
                    opened = create(storage=backend)
            else:
                engine, text = _engine(url)
                lock = _advisory_lock(engine, study)
                with _advisory_lock(engine, "fintx")():  # tables are made once: CREATE TYPE has no "if not exists"
                    backend = _open_database(text, stack)
                    opened = create(storage=backend)
        yield Storage(name, backend, opened, lock, shared=url != JOURNAL)


@contextlib.contextmanager
def read_only(url: str, folder: Path, study: str) -> Iterator[optuna.Study | None]:
    """A study to be read; none where there is no storage yet, or no such study in it.

    Raises:
        FintxError: the database does not answer, or its driver is missing.
    """
    path = folder / "journal.log"
    if url == JOURNAL and not path.is_file():
        yield None
        return
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    name = without_passwords(url)
    with contextlib.ExitStack() as stack:
        try:
            with _translated(name):
                backend = _open_journal(path) if url == JOURNAL else _open_database(_engine(url)[1], stack)
                opened = optuna.load_study(study_name=study, storage=backend)
        except StorageAway as error:
            raise FintxError(f"{study}: {error}; is the database running, and is its address right?") from None
        except KeyError:
            opened = None
        except ValueError:
            raise FintxError(
                f"{path if url == JOURNAL else name}: is damaged; the next run of the study says where, and repairs "
                "what it can"
            ) from None
        yield opened


@contextlib.contextmanager
def _translated(name: str) -> Iterator[None]:
    """The libraries' errors as `StorageAway` or `FintxError`."""
    import sqlalchemy.exc

    try:
        yield
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.DBAPIError) as error:
        if reason := _permanent(error):
            raise FintxError(f"{name}: {reason}") from None
        raise StorageAway(f"{name} does not answer") from error
    except OSError as error:
        raise FintxError(
            f"{name}: can't be written: {error.strerror}; fix that, and the same command continues"
        ) from error


# --- a journal in the study's folder ----------------------------------------------------------------------------------


class _FileLock:
    """A kernel lock: gone with its process, whereas Optuna's lock files outlive a kill and stall the next run."""

    def __init__(self, path: Path):
        self._path = path

    def acquire(self) -> bool:
        self._file = self._path.open("a")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        self._file.close()


def _open_journal(path: Path) -> JournalStorage:
    lock: Any = _FileLock(path.with_name("journal.append.lock"))  # Optuna asks for acquire and release, no more
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def _journal_lock(folder: Path, warn: Warn) -> Lock:
    journal = folder / "journal.log"

    @contextlib.contextmanager
    def hold() -> Iterator[Check]:
        with (folder / "journal.lock").open("a") as lock_file:
            fcntl.flock(lock_file, fcntl.LOCK_EX)
            if journal.is_file() and journal.stat().st_size > 0:
                with journal.open("rb") as file:
                    file.seek(-1, os.SEEK_END)
                    is_torn = file.read() != b"\n"
                if is_torn:  # by another machine, killed meanwhile, or by a disk that was full
                    _repair(journal, warn)
            yield lambda: None  # the kernel takes it from no living process

    return hold


def _repair(path: Path, warn: Warn) -> None:
    """Cut a torn last line off: after one more append it could never be read again.

    Raises:
        FintxError: a line before the last is damaged.
    """
    if not path.is_file():
        return
    content = path.read_bytes()
    n_good = 0
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        try:
            is_whole = line.endswith(b"\n") and isinstance(json.loads(line), dict)
        except ValueError:
            is_whole = False
        if not is_whole:
            if n_good + len(line) < len(content):
                raise FintxError(
                    f"{path}:{number}: is damaged, with good lines after it; move {path.name} away: the same command "
                    "rebuilds it from the records"
                )
            break
        n_good += len(line)
    if n_good == len(content):
        return
    aside = path.with_name(f"journal.torn-{time.time_ns()}")
    aside.write_bytes(content[n_good:])
    with path.open("r+b") as file:
        file.truncate(n_good)
        os.fsync(file.fileno())
    warn(f"{path}: its last line was torn (a kill or a full disk); cut off and kept as {aside.name}")


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


def _engine(url: str) -> tuple[Any, str]:
    """An engine for the lock's own connections, and the URL as Optuna expects it."""
    import sqlalchemy

    try:
        parsed = sqlalchemy.engine.make_url(url).set(drivername="postgresql+psycopg")
        text = parsed.render_as_string(hide_password=False)
        engine = sqlalchemy.create_engine(
            parsed, poolclass=sqlalchemy.NullPool, connect_args={"connect_timeout": _CONNECT_S}
        )
    except ModuleNotFoundError:
        raise FintxError(
            "execution.storage: PostgreSQL needs its driver; install the extra: uv run --extra postgres …, or "
            "pip install 'fintx[postgres]'"
        ) from None
    except (ValueError, sqlalchemy.exc.ArgumentError):
        raise FintxError(
            "execution.storage: is no URL; wanted postgresql://USER@HOST:PORT/DATABASE (special characters of a "
            "password as %XX; better, leave it to ~/.pgpass)"
        ) from None
    return engine, text.replace("{", "{{").replace("}", "}}")  # Optuna formats the URL


def _open_database(text: str, stack: contextlib.ExitStack) -> BaseStorage:
    """A database as Optuna's storage; the stack closes its connections."""
    backend = optuna.storages.RDBStorage(
        text, engine_kwargs={"pool_pre_ping": True, "connect_args": {"connect_timeout": _CONNECT_S}}
    )
    stack.callback(backend.engine.dispose)
    stack.callback(backend.remove_session)
    return backend


def _advisory_lock(engine: Any, name: str) -> Lock:
    """A lock in the database, by name; PostgreSQL releases it when its connection is lost, or silent for long."""
    import sqlalchemy

    key = int.from_bytes(hashlib.sha256(f"fintx/{name}".encode()).digest()[:8], signed=True)

    @contextlib.contextmanager
    def hold() -> Iterator[Check]:
        with engine.connect() as connection, connection.begin():
            connection.execute(sqlalchemy.text(f"SET LOCAL idle_in_transaction_session_timeout = '{_FROZEN_S}s'"))
            attempt = sqlalchemy.text("SELECT pg_try_advisory_xact_lock(:key)")
            deadline = time.monotonic() + _PATIENCE_S
            while not connection.execute(attempt, {"key": key}).scalar():
                if time.monotonic() > deadline:
                    raise StorageAway(f"the lock of study {name} has been held for {_PATIENCE_S} s by another machine")
                time.sleep(_WAIT_S)
            yield lambda: connection.execute(sqlalchemy.text("SELECT 1"))

    return hold


_PERMANENT = {
    "28P01": "the password is wrong",
    "28000": "the user may not log in",
    "3D000": "there is no such database; create it with createdb",
    "42501": "the user may not create or change tables there",
    "53100": "the database's disk is full",
}
"""SQLSTATE → what no waiting fixes (PostgreSQL's documentation, appendix A)."""
_REFUSALS = {
    "password authentication failed": "28P01",
    "no password supplied": "28P01",
    "does not exist": "3D000",
    "no pg_hba.conf entry": "28000",
}
"""A refused connection has no SQLSTATE in psycopg, only the server's text."""


def _permanent(error: Any) -> str:
    """What is wrong for good; empty: the database is only away."""
    original = getattr(error if hasattr(error, "orig") else error.__cause__, "orig", None)
    state = getattr(original, "sqlstate", None)
    if state is None:
        message = str(original).lower()
        if "does not exist" in message and "database" not in message:
            return ""
        state = next((code for text, code in _REFUSALS.items() if text in message), None)
    return _PERMANENT.get(state or "", "")
