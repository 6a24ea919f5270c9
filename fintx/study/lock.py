"""Who may write to a folder? One process at a time; the second learns who holds it.

A study's folder is held by one coordinator per host, a trial's run folder by one worker. Both are kernel locks, gone
with their process however it ends. A run folder can be seized: its trial has been given to another attempt, and the
worker that still holds it (frozen, or cut off from its coordinator) may no longer write. It finds out by itself: the
lock file at the path is not the one that it holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from fintx.study.environment import now
from fintx.types import FintxError

_ORPHAN_S = 10.0
"""How long a worker whose coordinator died may take to save and let go of its run folder."""


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
        path = study_folder / "lock" if alone else _lock_file(study_folder)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise FintxError(f"{study_folder}: can't be written: {error.strerror}; choose another --outputs") from error
    with file:
        if not _taken(file, patience_s=0.2):  # `holder` takes it too, for an instant
            raise StudyBusy(
                f"{study_folder}: is being run by {_holder(file)}; wait for it, or stop it: fintx stop {study_folder}"
            )
        _sign(file)
        yield
        file.truncate(0)


def holder(study_folder: Path) -> str | None:
    """Who runs a study now, in words, as far as the file system tells; none: nobody."""
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
    if not _taken(file, patience_s=_ORPHAN_S):
        _kill_holder(file)
        file.close()
        fresh = path.with_name(f".lock-{os.getpid()}")
        file = fresh.open("w+", encoding="utf-8")
        fcntl.flock(file, fcntl.LOCK_EX)
        fresh.rename(path)
    mine = os.fstat(file.fileno()).st_ino

    def check() -> None:
        try:
            current = path.stat().st_ino
        except FileNotFoundError:
            current = None
        if current != mine:
            raise Superseded(f"{run_folder} was taken over by another attempt")

    with file:
        _sign(file)
        yield check


def _lock_file(study_folder: Path) -> Path:
    return study_folder / f"lock-{socket.gethostname()}"


def _sign(file: IO[str]) -> None:
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {now()}")
    file.flush()


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip() or "another process"


def _kill_holder(file: IO[str]) -> None:
    """The kernel says that the holder lives, and the holder wrote down who it is."""
    words = _holder(file).split()
    if words[:1] == ["process"] and words[3:4] == [socket.gethostname()] and words[1].isdigit():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(words[1]), signal.SIGKILL)


def _taken(file: IO[str], *, patience_s: float) -> bool:
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
