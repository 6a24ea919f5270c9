"""Compilation: compiler options, timing, results cached in a process, and compiled programs kept for later ones."""

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
from jax.experimental.compilation_cache import compilation_cache

from fintx.config.schema import ModelConfig, Shape
from fintx.errors import FintxError
from fintx.model import family

F = TypeVar("F", bound=Callable[..., Any])


def locked_cache(kept: int) -> Callable[[F], F]:
    """`lru_cache` for threads: a second thread that asks for the same result waits for the first one's.

    Args:
        kept: most recently used results to hold; `cache_clear` drops them.
    """

    def decorate(function: F) -> F:
        cached = functools.lru_cache(maxsize=kept)(function)
        locks: dict[object, threading.Lock] = {}
        guard = threading.Lock()

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            key = (args, tuple(sorted(kwargs.items())))
            with guard:
                lock = locks.setdefault(key, threading.Lock())
            with lock:
                return cached(*args, **kwargs)

        call.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


_LEVEL, _EIGEN, _LIBRARY = (
    "xla_backend_optimization_level", "xla_cpu_multi_thread_eigen", "xla_cpu_experimental_ynn_fusion_type",
)  # fmt: skip
_NARROW = 256
"""Up to this width, Eigen's matrix products of the linear layers are faster than YNNPACK's."""


def compile_lowered(lowered: jax.stages.Lowered, model: ModelConfig, shape: Shape) -> jax.stages.Compiled:
    """The program, with the options that all programs of this shape share, so that their numbers agree."""
    return lowered.compile(compiler_options=compiler_options(model, shape))


def compiler_options(model: ModelConfig, shape: Shape) -> dict[str, str | bool]:
    """XLA's options beside its defaults, on a CPU; docs/performance.md has what each brings.

    LLVM's level 2 instead of 3 compiles sooner and runs as fast. Without Eigen's own threads attention's small
    products are several times faster. In narrow models YNNPACK keeps sums alone.

    They override the same options in XLA_FLAGS, but not JAX_DISABLE_MOST_OPTIMIZATIONS.
    """
    if jax.config.read("jax_disable_most_optimizations") or jax.default_backend() != "cpu":
        return {}
    always: dict[str, str | bool] = {_LEVEL: "2", _EIGEN: False}
    return always | ({_LIBRARY: "LIBRARY_FUSION_TYPE_REDUCE"} if family.of(model).width(shape) <= _NARROW else {})


_COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's event of a program that was compiled, or read from the program cache; with its seconds."""
_READ = "/jax/compilation_cache/cache_hits"
"""JAX's event of a program that was read."""


@dataclass
class CompileTiming:
    """What compiling took."""

    trace_s: float = 0.0
    """Python's part: tracing, lowering, and all else."""
    compile_s: float = 0.0
    """XLA's part, or reading a program from the cache."""
    n_compiled: int = 0
    """Programs that XLA compiled."""
    n_read: int = 0
    """Programs that the cache held."""


@contextlib.contextmanager
def timed_compilation() -> Iterator[CompileTiming]:
    """Measure what this thread compiles within the `with`; the value is complete after it."""
    thread, timing, began = threading.get_ident(), CompileTiming(), time.perf_counter()

    def on_duration(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILED and threading.get_ident() == thread:
            timing.compile_s += duration_secs
            timing.n_compiled += 1

    def on_event(event: str, **_: str | int) -> None:
        if event == _READ and threading.get_ident() == thread:
            timing.n_read += 1

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    jax.monitoring.register_event_listener(on_event)
    try:
        yield timing
    finally:
        jax.monitoring.unregister_event_duration_listener(on_duration)
        jax.monitoring.unregister_event_listener(on_event)
        timing.n_compiled -= timing.n_read
        timing.trace_s = time.perf_counter() - began - timing.compile_s


OFF = "off"
PROGRAMS_FOLDER = ".programs"
"""In the outputs folder, unless `execution.program_cache` or JAX_COMPILATION_CACHE_DIR names another place."""


def keep_programs(setting: str | None, *, outputs: Path) -> None:
    """From now on, keep what this process compiles on disk, and read what is there instead of compiling it.

    Args:
        setting: `execution.program_cache`.

    Raises:
        FintxError: the folder can't be made, or somebody else could write in it.
    """
    if setting is None and _folder_of_jax() is not None:
        return
    folder = None if setting == OFF else str(_private(outputs / PROGRAMS_FOLDER if setting is None else Path(setting)))
    if jax.config.jax_compilation_cache_dir == folder:  # type: ignore[attr-defined]
        return
    compilation_cache.reset_cache()  # it is opened once, with the folder that is set then
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@functools.cache
def _folder_of_jax() -> str | None:
    """The folder that JAX was given before `keep_programs` gave it one."""
    return jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined, no-any-return]


def _private(folder: Path) -> Path:
    """The part of a folder for this processor's programs; what is missing is made for its owner alone.

    Programs are code: a folder that others can write to would let them run theirs. An existing one keeps its mode.
    """
    folder = folder.expanduser().absolute()
    own = folder / processor()
    fix = f'set execution.program_cache to a folder of your own, or to "{OFF}"'
    try:
        for path in (folder, own):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        open_to_others = [path for path in (folder, own) if _others_may_write(path)]
        foreign = own.stat().st_uid != os.getuid()
    except OSError as error:
        raise FintxError(f"{folder}: can't keep compiled programs here ({error.strerror}); {fix}") from error
    if open_to_others or foreign:
        why = f"{open_to_others[0]} may be written to by others" if open_to_others else f"{own} is another user's"
        raise FintxError(f"{folder}: can't keep compiled programs here: {why}; {fix}")
    return own


def _others_may_write(folder: Path) -> bool:
    mode = folder.stat().st_mode
    return bool(mode & (stat.S_IWGRP | stat.S_IWOTH)) and not mode & stat.S_ISVTX


@functools.cache
def processor() -> str:
    """A name for all machines that run the same code: architecture, and a hash of the processor's features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor(), platform.version()]
    features = {line for line in lines if line.partition("\t")[0] in ("flags", "Features", "model name")}
    text = "\n".join(sorted(features or set(lines)))
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
