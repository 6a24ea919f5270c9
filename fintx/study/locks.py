"""Locks on folders, and requests to stop a study.

A study's folder is held by one coordinator per host, a trial's run folder by one worker. Both are kernel locks, gone
with their process however it ends. A run folder can be seized: its trial has been given to another attempt, and the
worker that still holds it (frozen, or cut off from its coordinator) may no longer write. It finds out by itself: the
lock file at the path is not the one that it holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from fintx.errors import FintxError
from fintx.study import records, study_file
from fintx.study.environment import now

_ORPHAN_S = 10.0
"""How long a worker whose coordinator died may take to save and release its run folder."""


class StudyBusy(FintxError):
    """Another process runs this study."""


class Superseded(Exception):
    """The run folder belongs to another attempt now: nothing may be written to it any more."""


@contextlib.contextmanager
def hold(study_folder: Path, *, alone: bool = False) -> Iterator[None]:
    """Hold a study's folder against other coordinators of this host; those of other hosts join.

    Args:
        alone: against those of other hosts too, as far as they share the folder and its file system has locks.

    Raises:
        StudyBusy: another process holds it.
        FintxError: the folder can't be made or written.
    """
    try:
        study_folder.mkdir(parents=True, exist_ok=True)
        name = "lock" if alone else f"lock-{socket.gethostname()}"
        file = (study_folder / name).open("a+", encoding="utf-8")
    except OSError as error:
        raise FintxError(f"{study_folder}: can't be written: {error.strerror}; choose another --outputs") from error
    with file:
        if not _lock(file, patience_s=0.2):  # `holder_of` takes it too, for an instant
            raise StudyBusy(
                f"{study_folder}: is being run by {_holder(file)}; wait for it, or stop it: fintx stop {study_folder}"
            )
        _sign(file)
        yield
        file.truncate(0)


def holder_of(study_folder: Path) -> str | None:
    """Which process runs a study now, as far as the file system tells; none: nobody does."""
    for path in sorted(study_folder.glob("lock-*")):
        with path.open("r", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "another process"
    return None


@contextlib.contextmanager
def seize(run_folder: Path) -> Iterator[Callable[[], None]]:
    """Hold a trial's run folder, taking it from an earlier attempt that still has it.

    An earlier worker that lost its coordinator is given time to save; then it is killed, if it runs on this host.

    Returns:
        What to call right before anything is committed there; it raises `Superseded` if another attempt has seized
        the folder meanwhile.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    path = run_folder / "lock"
    file = path.open("a+", encoding="utf-8")
    if not _lock(file, patience_s=_ORPHAN_S):
        process = re.match(r"process (\d+) on (\S+)", _holder(file))  # the kernel says that it is alive
        if process and process[2] == socket.gethostname():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process[1]), signal.SIGKILL)
        file.close()
        fresh = path.with_name(f".lock-{os.getpid()}")
        file = fresh.open("w+", encoding="utf-8")
        fcntl.flock(file, fcntl.LOCK_EX)
        fresh.rename(path)
    own = os.fstat(file.fileno()).st_ino

    def check() -> None:
        try:
            current = path.stat().st_ino
        except FileNotFoundError:
            current = None
        if current != own:
            raise Superseded(f"{run_folder} was taken over by another attempt")

    with file:
        _sign(file)
        yield check


def _sign(file: IO[str]) -> None:
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {now()}")
    file.flush()


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip() or "another process"


def _lock(file: IO[str], *, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        else:
            return True


# --- requests to stop -------------------------------------------------------------------------------------------------

_STOP_FILE = "stop"
STOP_HEARD = "asked to stop; the trials that run now are finished first"
"""What a run reports when it has seen a request."""


def ask_to_stop(study: str, *, outputs: Path) -> str:
    """Ask the coordinator to stop once the trials that run now are finished.

    Args:
        study: its name, or its folder.

    Returns:
        What will happen, in a line.

    Raises:
        FintxError: there is no such study, or nobody runs it.
    """
    folder = study_file.find_study(study, outputs=outputs)
    holder = holder_of(folder)
    if holder is None:
        raise FintxError(f"{folder}: nobody is running it, so there is nothing to stop")
    records.write_atomically(folder / _STOP_FILE, f"asked by process {os.getpid()} at {time.time_ns()}\n")
    return f"{folder}: asked to stop once its running trials are finished (run by {holder})"


class Stopped(Exception):
    """A stop was requested before a study was open; nothing of it runs."""


class StopRequests:
    """Requests since a run locked its study's folder; an older one was for another run."""

    def __init__(self, study_folder: Path) -> None:
        self._file = study_folder / _STOP_FILE
        self._before = self._latest()

    def pending(self) -> bool:
        """Whether there is one. A folder that can't be read just now is read again soon."""
        try:
            return self._latest() != self._before
        except OSError:
            return False

    def check(self, should_stop: Callable[[], bool]) -> None:
        """Check for one while nothing runs yet.

        Raises:
            Stopped: there is one, or the whole run is to stop.
        """
        if should_stop() or self.pending():
            raise Stopped

    def _latest(self) -> str:
        try:
            return self._file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""
