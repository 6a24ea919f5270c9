"""What a trial ran on: versions, device, commit and time. Kept in the record, and never an input of a result."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

_LIBRARIES = "fintx jax jaxlib flax optax orbax-checkpoint optuna numpy scikit-learn TA-Lib".split()


@functools.cache
def libraries() -> dict[str, str]:
    """Installed version of Python and of each library that can change a number."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _LIBRARIES}}


@functools.cache
def device() -> str:
    """Kind and count of the devices that JAX uses, such as "cpu × 1 (x86_64)"."""
    import jax

    devices = jax.devices()
    return f"{devices[0].device_kind} × {len(devices)} ({platform.machine()})"


@functools.cache
def git_commit() -> str | None:
    """Commit of the running code, "+dirty" when the checkout differs from it; none outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    return f"{commit}+dirty" if git("status", "--porcelain", "--untracked-files=no") else commit


def now() -> str:
    """The time, UTC, ISO 8601 to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
