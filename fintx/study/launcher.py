"""The launcher of this process: whether it is one of several, and which. The one place that reads its environment.

SLURM (`srun`), MPI (`mpirun`), an indexed job of Kubernetes, or anything that sets JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID, starts the same command on every host. What is needed before JAX is imported is
read here; the first host's address JAX finds by itself where it knows how, and then listens on all of its interfaces
unless JAX_COORDINATOR_BIND_ADDRESS names one. A single task is no group, and a batch script's own shell is no task:
nothing is opened to the network then.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from fintx.types import FintxError

_ADDRESS, _BIND = "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS"
_FIRST_PORT, _N_PORTS = 61_440, 4_096
"""Above what Linux gives out by itself; a job's name picks one, so that two jobs on a host seldom meet."""


@dataclass(frozen=True)
class Place:
    """One process's place among those of its launch."""

    launcher: str
    index: int
    n_processes: int
    address: str | None
    """HOST:PORT where the first of them listens; none: JAX finds it."""
    bind: str | None
    """HOST:PORT that it binds: that interface alone where that is known to be one, else all; none: JAX's choice."""
    local_device: int | None
    """The one GPU of its own, where several processes share a host; none: all that it sees."""

    def __str__(self) -> str:
        return f"process {self.index} of {self.n_processes} ({self.launcher})"


@dataclass(frozen=True)
class _Names:
    """Under which names a launcher says who is who; empty where it doesn't."""

    launcher: str
    index: str
    count: str
    local_index: str = ""
    local_count: str = ""
    needs: tuple[str, ...] = ()
    job: tuple[str, ...] = ()
    """What tells one launch from another."""
    found_by_jax: str = ""
    """Where this is set, JAX finds the first process."""


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


def find(environment: Mapping[str, str] | None = None) -> Place | None:
    """This process's place; none: it is alone.

    Args:
        environment: none: this process's.

    Raises:
        FintxError: there are several processes, and nothing says where the first of them is.
    """
    known = os.environ if environment is None else environment
    for names in _LAUNCHERS:
        if all(name in known for name in (names.index, names.count, *names.needs)):
            index, count = _whole(known, names.index), _whole(known, names.count)
            if count > 1:
                n_here = _n_here(names, known, count)
                address = known.get(_ADDRESS) or _address(names, known, one_host=n_here == count)
                return Place(
                    launcher=names.launcher,
                    index=index,
                    n_processes=count,
                    address=address,
                    bind=known.get(_BIND) or (_interface(address, one_host=n_here == count) if address else None),
                    local_device=_whole(known, names.local_index)
                    if n_here > 1 and names.local_index in known
                    else None,
                )
    return None


def _whole(known: Mapping[str, str], name: str) -> int:
    if not known[name].isdigit():
        raise FintxError(f"{name}={known[name]!r} in the environment: wanted a whole number")
    return int(known[name])


def _n_here(names: _Names, known: Mapping[str, str], count: int) -> int:
    """How many processes of the launch share this host."""
    if names.launcher == "SLURM":
        return -(-count // int(known.get("SLURM_STEP_NUM_NODES", count)))
    return int(known.get(names.local_count, 1))


def _address(names: _Names, known: Mapping[str, str], *, one_host: bool) -> str | None:
    """Where the first process is; none: JAX finds it."""
    if one_host:
        port = _FIRST_PORT + zlib.crc32(" ".join(known.get(name, "") for name in names.job).encode()) % _N_PORTS
        return f"127.0.0.1:{port}"
    if names.found_by_jax in known:
        return None
    raise FintxError(
        f"{names.launcher} started {known[names.count]} processes and doesn't say where the first is; set {_ADDRESS}="
        "HOST:PORT, or [mesh] hosts = false to let each of them be a machine of its own"
    )


def _interface(address: str, *, one_host: bool) -> str:
    """What the first process binds: the interface that its address means, unless no other host could reach that."""
    host, _, port = address.rpartition(":")
    try:
        found = ipaddress.ip_address(socket.gethostbyname(host))
    except (OSError, ValueError):  # a name that only others know, such as a service of Kubernetes
        return f"[::]:{port}"
    # Debian lets a host's own name mean its loopback; whoever writes 127.0.0.1 himself means it.
    misleading = found.is_loopback and host != str(found) and not one_host
    return f"[::]:{port}" if misleading else f"{found}:{port}"
