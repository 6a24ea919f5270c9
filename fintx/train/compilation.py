"""How is something compiled once per process, whichever of its threads asks first?"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax

from fintx.config.schema import ModelConfig, Shape
from fintx.errors import FintxError
from fintx.model import family

F = TypeVar("F", bound=Callable[..., Any])


def locked_cache(kept: int) -> Callable[[F], F]:
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


_COMPILED = "/jax/core/compile/backend_compile_duration"
"""A program was compiled, or read from the program cache; with how long it took."""
_READ = "/jax/compilation_cache/cache_hits"
"""It was read."""


_LEVEL, _EIGEN, _LIBRARY = (
    "xla_backend_optimization_level", "xla_cpu_multi_thread_eigen", "xla_cpu_experimental_ynn_fusion_type",
)  # fmt: skip
_NARROW = 256
"""Up to this width, Eigen's matrix products of the linear layers are faster than YNNPACK's."""


def compile_lowered(lowered: jax.stages.Lowered, model: ModelConfig, shape: Shape) -> jax.stages.Compiled:
    """The program, by the options that all programs of a model of this shape are compiled with: numbers agree."""
    return lowered.compile(compiler_options=compiler_options(model, shape))


def compiler_options(model: ModelConfig, shape: Shape) -> dict[str, str | bool]:
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
class CompileTiming:
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
def timed_compilation() -> Iterator[CompileTiming]:
    """Watch this thread until the end of the `with`; what is yielded is whole then."""
    here, found, began = threading.get_ident(), CompileTiming(), time.perf_counter()

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


OFF = "off"
_MEND = f'set execution.program_cache to a folder of your own, or to "{OFF}"'
FOLDER = ".programs"
"""In outputs/, unless `execution.program_cache` or JAX's own JAX_COMPILATION_CACHE_DIR names another place."""


def keep_programs(setting: str | None, *, outputs: Path) -> None:
    """From now on this process keeps what it compiles, and compiles nothing that lies there.

    Args:
        setting: `execution.program_cache`.

    Raises:
        FintxError: the folder can't be made, or somebody else could write in it.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    given = _of_jax()
    if setting is None and given is not None:
        return
    where = None if setting == OFF else str(_private(outputs / FOLDER if setting is None else Path(setting)))
    if jax.config.jax_compilation_cache_dir == where:  # type: ignore[attr-defined]
        return
    compilation_cache.reset_cache()  # it is opened once, with the folder that is set then
    jax.config.update("jax_compilation_cache_dir", where)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@functools.cache
def _of_jax() -> str | None:
    """The folder that JAX was given before `keep` gave it one."""
    import jax

    folder: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    return folder


def _private(folder: Path) -> Path:
    """Where in a folder this processor's programs lie; what is missing is made for its owner alone.

    A folder that stands already keeps its mode: it may be anybody's.
    """
    folder = folder.expanduser().absolute()
    own = folder / processor()
    try:
        for each in (folder, own):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
        others = [each for each in (folder, own) if _others_may_change(each)]
        foreign = own.stat().st_uid != os.getuid()
    except OSError as error:
        raise FintxError(f"{folder}: can't keep compiled programs here ({error.strerror}); {_MEND}") from error
    if others or foreign:
        why = f"{others[0]} may be written to by others" if others else f"{own} is another user's"
        raise FintxError(f"{folder}: can't keep compiled programs here: {why}; {_MEND}")
    return own


def _others_may_change(folder: Path) -> bool:
    mode = folder.stat().st_mode
    return bool(mode & (stat.S_IWGRP | stat.S_IWOTH)) and not mode & stat.S_ISVTX


@functools.cache
def processor() -> str:
    """A name for all machines that run the same code: architecture, and what the processor can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor(), platform.version()]
    told = sorted(
        {line for line in lines if line.partition("\t")[0] in ("flags", "Features", "model name")} or set(lines)
    )
    return f"{platform.machine()}-{hashlib.sha256(chr(10).join(told).encode()).hexdigest()[:12]}"
