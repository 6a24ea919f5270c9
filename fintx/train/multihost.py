"""Several hosts, one trial: this process's place among those of a launch, and numbers that all of them agree on.

All run the same compiled programs in step, each on its own devices. Whatever depends on a clock, a disk or free memory
is therefore asked of the first process and sent to all. With a single process every function is the identity.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils

from fintx.errors import FintxError

_LEAST, _MOST = np.iinfo(np.int64).min, np.iinfo(np.int64).max


def is_first() -> bool:
    """Whether this process decides, and writes what is to be kept."""
    return jax.process_index() == 0


def agree(*values: int) -> tuple[int, ...]:
    """The first process's numbers, on every process; all must call, with as many."""
    if jax.process_count() == 1:
        return values
    # As halves: without x64 JAX has no 64-bit integers.
    halves = multihost_utils.broadcast_one_to_all(np.array(values, np.int64).view(np.uint32))
    return tuple(int(value) for value in np.asarray(halves, np.uint32).view(np.int64))


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
    return [int(number) for number in np.ascontiguousarray(gathered).reshape(-1, 2).view(np.int64)[:, 0]]


def broadcast(text: str | None) -> str:
    """The first process's text, on every process; the others pass none. All must call."""
    if jax.process_count() == 1:
        assert text is not None
        return text
    characters = np.frombuffer((text or "").encode(), np.uint8)
    (length,) = agree(len(characters))
    buffer = characters if is_first() else np.zeros(length, np.uint8)
    received = multihost_utils.broadcast_one_to_all(buffer) if length else buffer
    return np.asarray(received, np.uint8).tobytes().decode()


def initialize(
    *, address: str | None, bind: str | None, n_processes: int, index: int, local_device: int | None
) -> None:  # fmt: skip
    """Become one of several processes; before anything else is asked of JAX, which waits here until all have come.

    Args:
        address: HOST:PORT where the first listens; none: JAX asks the launcher's environment.
        bind: what it binds there; none: all interfaces.
        local_device: the one GPU to use, of those that this process sees; none: all.
    """
    # It would handle SIGTERM, which asks a worker to save.
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


# --- who is who in a launch -------------------------------------------------------------------------------------------

_ADDRESS, _BIND = "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS"
_FIRST_PORT, _N_PORTS = 61_440, 4_096
"""Above the ports that Linux assigns; a hash of the job's name picks one, so that two jobs on a host seldom collide."""


@dataclass(frozen=True)
class ProcessPlace:
    """One process's place among those of its launch."""

    launcher: str
    index: int
    n_processes: int
    address: str | None
    """HOST:PORT where the first of them listens; none: JAX finds it."""
    bind: str | None
    """HOST:PORT that it binds: one interface where the address is known to be one's, else all; none: JAX's choice."""
    local_device: int | None
    """The one GPU of its own, where several processes share a host; none: all that it sees."""

    def __str__(self) -> str:
        return f"process {self.index} of {self.n_processes} ({self.launcher})"


@dataclass(frozen=True)
class _Names:
    """The environment variables in which a launcher says who is who; empty where it doesn't."""

    launcher: str
    index: str
    count: str
    local_index: str = ""
    local_count: str = ""
    needs: tuple[str, ...] = ()
    job: tuple[str, ...] = ()
    """Variables that differ between launches."""
    found_by_jax: str = ""
    """Where this is set, JAX finds the first process itself."""


_LAUNCHERS = (
    _Names("JAX", "JAX_PROCESS_ID", "JAX_NUM_PROCESSES", needs=(_ADDRESS,)),
    _Names("Kubernetes", "JOB_COMPLETION_INDEX", "JAX_NUM_PROCESSES", needs=(_ADDRESS, "KUBERNETES_SERVICE_HOST")),
    _Names(
        "SLURM", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID",
        needs=("SLURM_JOB_ID", "SLURM_STEP_NODELIST"), job=("SLURM_JOB_ID", "SLURM_STEP_ID"),
        found_by_jax="SLURM_NTASKS",
    ),
    _Names(
        "Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE", job=("PMIX_NAMESPACE", "OMPI_MCA_orte_hnp_uri"),
        found_by_jax="OMPI_MCA_orte_hnp_uri",
    ),
    _Names("MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", job=("PMI_PORT", "PMI_ID")),
)  # fmt: skip


def find_place(environment: Mapping[str, str] | None = None) -> ProcessPlace | None:
    """This process's place; none: it is alone.

    Args:
        environment: none: this process's.

    Raises:
        FintxError: there are several processes, and nothing says where the first of them is.
    """
    variables = os.environ if environment is None else environment
    for names in _LAUNCHERS:
        if all(name in variables for name in (names.index, names.count, *names.needs)):
            index, count = _number(variables, names.index), _number(variables, names.count)
            if count > 1:
                n_here = _n_on_this_host(names, variables, count)
                address = variables.get(_ADDRESS) or _address(names, variables, one_host=n_here == count)
                own_device = n_here > 1 and names.local_index in variables
                return ProcessPlace(
                    launcher=names.launcher,
                    index=index,
                    n_processes=count,
                    address=address,
                    bind=variables.get(_BIND) or (_interface(address, one_host=n_here == count) if address else None),
                    local_device=_number(variables, names.local_index) if own_device else None,
                )
    return None


def _number(variables: Mapping[str, str], name: str) -> int:
    if not variables[name].isdigit():
        raise FintxError(f"{name}={variables[name]!r} in the environment: wanted a whole number")
    return int(variables[name])


def _n_on_this_host(names: _Names, variables: Mapping[str, str], count: int) -> int:
    if names.launcher == "SLURM":
        return -(-count // int(variables.get("SLURM_STEP_NUM_NODES", count)))
    return int(variables.get(names.local_count, 1))


def _address(names: _Names, variables: Mapping[str, str], *, one_host: bool) -> str | None:
    """Where the first process listens; none: JAX finds it."""
    if one_host:
        job = " ".join(variables.get(name, "") for name in names.job)
        return f"127.0.0.1:{_FIRST_PORT + zlib.crc32(job.encode()) % _N_PORTS}"
    if names.found_by_jax in variables:
        return None
    raise FintxError(
        f"{names.launcher} started {variables[names.count]} processes and doesn't say where the first is; set "
        f"{_ADDRESS}=HOST:PORT, or [mesh] hosts = false to let each of them be a machine of its own"
    )


def _interface(address: str, *, one_host: bool) -> str:
    """What the first process binds: the interface of its address, or all where no other host could reach that one."""
    host, _, port = address.rpartition(":")
    try:
        interface = ipaddress.ip_address(socket.gethostbyname(host))
    except (OSError, ValueError):  # a name that only others can resolve, such as a service of Kubernetes
        return f"[::]:{port}"
    # Debian resolves a host's own name to its loopback; 127.0.0.1 written out is meant.
    misleading = interface.is_loopback and host != str(interface) and not one_host
    return f"[::]:{port}" if misleading else f"{interface}:{port}"
