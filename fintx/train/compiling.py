"""How is a program compiled, what did that take, and was there anything to compile?"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import jax

from fintx.config.schema import ModelConfig, Shape
from fintx.model import family

_COMPILED = "/jax/core/compile/backend_compile_duration"
"""A program was compiled, or read from the program cache; with how long it took."""
_READ = "/jax/compilation_cache/cache_hits"
"""It was read."""


_LEVEL, _EIGEN, _LIBRARY = (
    "xla_backend_optimization_level", "xla_cpu_multi_thread_eigen", "xla_cpu_experimental_ynn_fusion_type",
)  # fmt: skip
_NARROW = 256
"""Up to this width, Eigen's matrix products of the linear layers are faster than YNNPACK's."""


def compiled(lowered: jax.stages.Lowered, model: ModelConfig, shape: Shape) -> jax.stages.Compiled:
    """The program, by the options that all programs of a model of this shape are compiled with: numbers agree."""
    return lowered.compile(compiler_options=options(model, shape))


def options(model: ModelConfig, shape: Shape) -> dict[str, str | bool]:
    """XLA's options beside its defaults, on a CPU; what each brings is measured (docs/performance.md).

    LLVM's level 2 rather than 3 compiles sooner and runs as fast. Without Eigen's own threads attention's small
    products are several times faster, and the linear layers' as before. In narrow models YNNPACK is left to sums alone.

    They go before the same options in XLA_FLAGS, but not before JAX_DISABLE_MOST_OPTIMIZATIONS.
    """
    if jax.config.read("jax_disable_most_optimizations") or jax.default_backend() != "cpu":
        return {}
    always: dict[str, str | bool] = {_LEVEL: "2", _EIGEN: False}
    return always | ({_LIBRARY: "LIBRARY_FUSION_TYPE_REDUCE"} if family.of(model).width(shape) <= _NARROW else {})


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
