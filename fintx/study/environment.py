"""Environment of a run: versions, device, commit and time for its records, and the variables that workers start with.

Records keep it; no result depends on it by design.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
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
            result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    return f"{commit}+dirty" if git("status", "--porcelain", "--untracked-files=no") else commit


def now() -> str:
    """The time, UTC, ISO 8601 to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


WORKER_SETTINGS = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Settings of the allocator under a worker; docs/performance.md has their effect."""
_SETTINGS_RECORDED = (
    "GLIBC_TUNABLES", "LD_PRELOAD", "XLA_FLAGS", "LIBTPU_INIT_ARGS", "OMP_NUM_THREADS", "NVIDIA_TF32_OVERRIDE",
    "JAX_DEFAULT_MATMUL_PRECISION",
)  # fmt: skip


def worker_environment() -> dict[str, str]:
    """A worker's environment: this process's, which goes before `WORKER_SETTINGS`."""
    return {**WORKER_SETTINGS, **os.environ}


def visible_gpus() -> list[str] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES names, by index or by name; none: it is not set, so all of them."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if names is None else [name.strip() for name in names.split(",") if name.strip()]


def process_settings() -> dict[str, str]:
    """Variables of this process that can change a trial's speed or the last digits of its numbers."""
    return {name: os.environ[name] for name in _SETTINGS_RECORDED if os.environ.get(name)}
