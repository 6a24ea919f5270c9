"""Where are compiled programs kept from one process to the next? In a folder per kind of processor, its owner's alone.

JAX names each by a hash of the program, its options and the versions of all that compiled it: a trial of a shape that
was seen before, in this study or another, and a study that goes on, compile nothing. What is kept is machine code, so
nobody else may write there; and code for one processor can crash another, so machines that share outputs/ don't share
these. An entry that was torn by a kill is compiled again. The folder may be removed at any time.
"""

from __future__ import annotations

import functools
import hashlib
import platform
from pathlib import Path

from fintx.types import FintxError

OFF = "off"
FOLDER = ".programs"
"""In outputs/, unless `execution.program_cache` or JAX's own JAX_COMPILATION_CACHE_DIR names another place."""


def keep(setting: str | None, *, outputs: Path) -> None:
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
    where = (
        None if setting == OFF else str(_owned(outputs / FOLDER if setting is None else Path(setting)) / processor())
    )
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


def _owned(folder: Path) -> Path:
    """The folder, absolute; made if need be, for its owner alone."""
    folder = folder.expanduser().absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise FintxError(
            f"{folder}: can't keep compiled programs here ({error.strerror}); set execution.program_cache to a folder "
            f'of your own, or to "{OFF}"'
        ) from error
    return folder


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
