"""How is something compiled once per process, whichever of its threads asks first?"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def once(kept: int) -> Callable[[F], F]:
    """`lru_cache` for threads: who asks for what another thread is making waits for it, and makes nothing.

    As there, `cache_clear` lets go of all that is held.

    Args:
        kept: results that are held, the most recently used.
    """

    def decorate(function: F) -> F:
        cached = functools.lru_cache(maxsize=kept)(function)
        making: dict[object, threading.Lock] = {}
        guard = threading.Lock()

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            key = (args, tuple(sorted(kwargs.items())))
            with guard:
                mine = making.setdefault(key, threading.Lock())
            with mine:
                return cached(*args, **kwargs)

        call.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate
