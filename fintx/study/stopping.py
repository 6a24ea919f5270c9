"""How is a running study asked to stop from another terminal? By a file in its folder, which its coordinator sees."""

from __future__ import annotations

import os
import time
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


def request(study_folder: Path) -> str:
    """The latest request, whenever it was made; a coordinator heeds one that it didn't find when it began."""
    try:
        return (study_folder / _FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
