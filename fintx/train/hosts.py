"""The processes of several hosts in step through a trial: the first decides, the others do as it does.

All of them run the same compiled programs, each on its own devices; whatever hangs on a clock, a disk or free memory is
therefore asked of one and told to all. With a single process, as usual, every function is the identity.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils

_LEAST, _MOST = np.iinfo(np.int64).min, np.iinfo(np.int64).max


def is_first() -> bool:
    """Whether this process decides, and writes what is to be kept."""
    return jax.process_index() == 0


def agree(*values: int) -> tuple[int, ...]:
    """The first process's numbers, on every process; all must call, with as many."""
    if jax.process_count() == 1:
        return values
    # As halves: without x64 JAX knows no longer integers.
    told = multihost_utils.broadcast_one_to_all(np.array(values, np.int64).view(np.uint32))
    return tuple(int(value) for value in np.asarray(told, np.uint32).view(np.int64))


def least(value: int) -> int:
    """The smallest of all processes' numbers; all must call."""
    return min(_all(value))


def most(value: int) -> int:
    """The largest of all processes' numbers; all must call."""
    return max(_all(value))


def _all(value: int) -> list[int]:
    if jax.process_count() == 1:
        return [value]
    clipped = np.array([min(max(value, _LEAST), _MOST)], np.int64)
    gathered = np.asarray(multihost_utils.process_allgather(clipped.view(np.uint32)), np.uint32)
    return [int(each) for each in np.ascontiguousarray(gathered).reshape(-1, 2).view(np.int64)[:, 0]]


def tell(text: str | None) -> str:
    """The first process's text, on every process: it gives one, the others none; all must call."""
    if jax.process_count() == 1:
        assert text is not None
        return text
    given = np.frombuffer((text or "").encode(), np.uint8)
    (length,) = agree(len(given))
    buffer = np.zeros(length, np.uint8)
    if is_first():
        buffer[:] = given
    told = multihost_utils.broadcast_one_to_all(buffer) if length else buffer
    return np.asarray(told, np.uint8).tobytes().decode()


def join(
    *, address: str | None, bind: str | None, n_processes: int, index: int, local_device: int | None
) -> None:  # fmt: skip
    """Become one of several processes; before anything else is asked of JAX, which waits here until all have come.

    Args:
        address: HOST:PORT where the first listens; none: JAX asks the launcher's environment.
        bind: what it binds there; none: all interfaces.
        local_device: the one GPU to use, of those that this process sees; none: all.
    """
    # It would take SIGTERM over, which asks a worker to save.
    jax.config.update("jax_enable_preemption_service", False)
    visible = {name: jax.config.read(name) for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices")}
    jax.distributed.initialize(
        coordinator_address=address,
        num_processes=n_processes,
        process_id=index,
        local_device_ids=None if local_device is None else [local_device],
        cluster_detection_method="deactivate" if address else None,
        coordinator_bind_address=bind,
    )
    if local_device is None:  # JAX, where it asks the launcher, takes one GPU a process, though this one has them all
        for name, value in visible.items():
            jax.config.update(name, value)
