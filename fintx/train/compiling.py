"""How is a program compiled, what did that take, and was there anything to compile?"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"
"""A program was compiled, or read from the program cache; with how long it took."""
_READ = "/jax/compilation_cache/cache_hits"
"""It was read."""


_LEVEL = "xla_backend_optimization_level"


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """The program, by the one set of options that all of a trial's are compiled with: numbers stay comparable."""
    return lowered.compile(compiler_options=options())


def options() -> dict[str, str | bool]:
    """XLA's options beside its defaults: on a CPU, LLVM's level 2 rather than 3.

    A trial's programs compile an eighth to a third sooner, and run as fast (docs/performance.md). It goes before a
    level in XLA_FLAGS, but not before JAX_DISABLE_MOST_OPTIMIZATIONS.
    """
    hurried = jax.config.read("jax_disable_most_optimizations")
    return {} if hurried or jax.default_backend() != "cpu" else {_LEVEL: "2"}


@dataclass
class Compiling:
    """What happened meanwhile."""

    trace_s: float = 0.0
    """Python's part: tracing and lowering, and whatever else was done."""
    compile_s: float = 0.0
    """XLA's part; a program that is read from the cache takes its reading."""
    n_compiled: int = 0
    """Programs that XLA compiled."""
    n_read: int = 0
    """Programs that the cache held."""


@contextlib.contextmanager
def watched() -> Iterator[Compiling]:
    """Watch this thread until the end of the `with`; what is yielded is whole then."""
    here, found, began = threading.get_ident(), Compiling(), time.perf_counter()

    def on_duration(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILED and threading.get_ident() == here:
            found.compile_s += duration_secs
            found.n_compiled += 1

    def on_event(event: str, **_: str | int) -> None:
        if event == _READ and threading.get_ident() == here:
            found.n_read += 1

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    jax.monitoring.register_event_listener(on_event)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(on_duration)
        jax.monitoring.unregister_event_listener(on_event)
        found.n_compiled -= found.n_read
        found.trace_s = time.perf_counter() - began - found.compile_s
