"""What the processes of a test run make once for all of them: fitted baselines, finished studies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path


def folder(name: str) -> Path:
    """A folder of the run, which ends with it."""
    path = Path(os.environ["FINTX_TEST_RUN"]) / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def data_root(path: Path) -> Path:
    """Make a data folder that holds the run's baselines: a third of a short study's time, and always the same."""
    path.mkdir(parents=True, exist_ok=True)
    if not (path / "baselines").exists():
        (path / "baselines").symlink_to(folder("baselines"))
    return path


def once(name: str, make: Callable[[Path], object]) -> Path:
    """The folder that `make` has filled. The process that comes first does it, others wait; nobody changes it then."""
    root = folder(name)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "made").exists():
            make(root / "whole")
            (root / "made").touch()
    return root / "whole"
