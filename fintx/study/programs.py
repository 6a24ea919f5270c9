"""Where are compiled programs kept from one process to the next? In a folder per kind of processor, its owner's alone.

JAX names each by a hash of the program, its options and the versions of all that compiled it: a trial of a shape that
was seen before, in this study or another, and a study that goes on, compile nothing. What is kept is machine code: a
folder that somebody else may write to is refused. Code for one processor can crash another, so machines that share
outputs/ don't share these. An entry that was torn by a kill is compiled again. The folder may be removed at any time.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import stat
from pathlib import Path

from fintx.types import FintxError

OFF = "off"
_MEND = f'set execution.program_cache to a folder of your own, or to "{OFF}"'
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
