"""Who may write to a study's folder? One process at a time; the second learns who holds it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fintx.study.environment import now
from fintx.types import FintxError


class StudyBusy(FintxError):
    """Another process runs this study."""


@contextlib.contextmanager
def hold(study_folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the kernel lets go of it when the process ends, however it ends.

    Raises:
        StudyBusy: another process holds it.
        FintxError: the folder can't be made or written.
    """
    try:
        study_folder.mkdir(parents=True, exist_ok=True)
        file = (study_folder / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise FintxError(f"{study_folder}: can't be written: {error.strerror}; choose another --outputs") from error
    with file:
        if not _taken(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise StudyBusy(f"{study_folder}: is being run by {holder}; wait for it or stop it first")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now()}")
        file.flush()
        yield
        file.truncate(0)


def _taken(file: IO[str]) -> bool:
    """Take the lock; try again for a moment, since `held` takes it too for an instant."""
    for _ in range(10):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)
        else:
            return True
    return False


def held(study_folder: Path) -> bool:
    """Whether a process is running the study now."""
    try:
        with (study_folder / "lock").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
