"""Requests to stop a running study from another terminal: a file in its folder, which its coordinator sees."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from fintx.study import lock, records
from fintx.types import FintxError

_FILE = "stop"
HEARD = "asked to stop; what trains now comes to its end first"
"""What a run says when it has seen a request."""


def ask(study: str, *, outputs: Path) -> str:
    """Ask the coordinator to stop once the trials that run now are finished.

    Args:
        study: its name, or its folder.

    Returns:
        What will happen, in a line.

    Raises:
        FintxError: there is no such study, or nobody runs it.
    """
    folder = records.find_study(study, outputs=outputs)
    holder = lock.holder(folder)
    if holder is None:
        raise FintxError(f"{folder}: nobody is running it, so there is nothing to stop")
    records.write_atomically(folder / _FILE, f"asked by process {os.getpid()} at {time.time_ns()}\n")
    return f"{folder}: asked {holder} to stop; the trials that run now come to their end first"


class Stopped(Exception):
    """A stop was asked for while a study began; nothing of it runs."""


class Requests:
    """Those made of a run since it took its study's folder; an older one was another run's."""

    def __init__(self, study_folder: Path) -> None:
        self._file = study_folder / _FILE
        self._before = self._latest()

    def came(self) -> bool:
        """Whether there is one. A folder that can't be read just now tells nothing: it is looked at again soon."""
        try:
            return self._latest() != self._before
        except OSError:
            return False

    def heed(self, should_stop: Callable[[], bool]) -> None:
        """Where nothing runs yet.

        Raises:
            Stopped: there is one, or the whole run is to stop.
        """
        if should_stop() or self.came():
            raise Stopped

    def _latest(self) -> str:
        try:
            return self._file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""
