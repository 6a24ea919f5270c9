"""How does a worker's memory allocator behave? Set before the process starts, where it was measured to help.

glibc's malloc asks Linux for huge pages: a train step's temporaries are large and are mapped anew in each dispatch. An
older glibc and other C libraries ignore the setting.
"""

from __future__ import annotations

import os

SETTINGS = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""docs/performance.md holds what they bring."""


def environment() -> dict[str, str]:
    """A worker's environment: this process's, and the settings that it doesn't hold yet."""
    return {**SETTINGS, **os.environ}
