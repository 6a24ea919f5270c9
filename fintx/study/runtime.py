"""How does the allocator under a worker behave? Set before its process starts, and told to its records.

glibc's malloc asks Linux for huge pages: a train step's temporaries are large and are mapped anew in each dispatch. An
older glibc and other C libraries ignore the setting. What the user sets himself stays as he set it. The compiler's
options are not set here but with each program (`train.compiling`).
"""

from __future__ import annotations

import os

SETTINGS = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""docs/performance.md holds what they bring."""
_TOLD = (
    "GLIBC_TUNABLES", "LD_PRELOAD", "XLA_FLAGS", "LIBTPU_INIT_ARGS", "OMP_NUM_THREADS", "NVIDIA_TF32_OVERRIDE",
    "JAX_DEFAULT_MATMUL_PRECISION",
)  # fmt: skip


def environment() -> dict[str, str]:
    """A worker's environment: this process's, and the settings that it doesn't hold yet."""
    return {**SETTINGS, **os.environ}


def visible_gpus() -> list[str] | None:
    """What CUDA was told to show of the machine's GPUs, by index or by name; none: all of them."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if told is None else [name.strip() for name in told.split(",") if name.strip()]


def told() -> dict[str, str]:
    """What of this process's environment can change a trial's speed or the last digits of its numbers."""
    return {name: os.environ[name] for name in _TOLD if os.environ.get(name)}
