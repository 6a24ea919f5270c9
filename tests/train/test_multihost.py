"""A process's place in its launch, from the variables that each launcher really sets."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from fintx.errors import FintxError
from fintx.train import multihost

# As `srun --nodes 2 --ntasks-per-node 1` sets them (slurm 22.05), on the second node.
SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "127.0.0.1,node2",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-node1-99@1",
}  # fmt: skip
GENERIC = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:5000", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
KUBERNETES = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2", "JAX_NUM_PROCESSES": "3",
    "JAX_COORDINATOR_ADDRESS": "fintx-0.fintx.invalid:1234",
}  # fmt: skip


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"PATH": "/bin", "HOSTNAME": "x"},
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},
        {key: value for key, value in SLURM.items() if "STEP" not in key},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:5000"},
        {**GENERIC, "JAX_NUM_PROCESSES": "1"},
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"},
    ],
    ids=[
        "nothing", "a shell", "one task", "a batch script", "a pod alone", "an address alone", "one process",
        "mpirun -n 1",
    ],
)  # fmt: skip
def test_who_is_alone_opens_nothing(environment: Mapping[str, str]) -> None:
    assert multihost.find_place(environment) is None


def test_slurm() -> None:
    place = multihost.find_place(SLURM)
    assert place is not None
    assert (place.launcher, place.index, place.n_processes, place.local_device) == ("SLURM", 1, 2, None)
    assert place.address is None and place.bind is None, "JAX finds it"
    with pytest.raises(FintxError, match="set JAX_COORDINATOR_ADDRESS"):  # as it does not without this
        multihost.find_place({key: value for key, value in SLURM.items() if key != "SLURM_NTASKS"})


JOIN = """
import jax
from fintx.run import worker
worker.join_hosts()
print(jax.process_index(), jax.process_count(), jax.config.read("jax_cuda_visible_devices"))
"""


@pytest.mark.slow
def test_what_slurm_sets_is_enough_for_jax_and_takes_no_gpu_away() -> None:
    """Two hosts' processes meet at the address that JAX makes of the list of nodes."""
    job = str(os.getpid() + 100_000)  # which makes the port
    environment = {**os.environ, **SLURM, "SLURM_JOB_ID": job, "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN], env={**environment, "SLURM_PROCID": str(index)}, stdout=subprocess.PIPE,
            text=True, cwd=Path(__file__).parents[2],
        )
        for index in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300)[0].split() for process in processes]
    assert outputs == [["0", "2", "all"], ["1", "2", "all"]]


def test_several_tasks_on_a_node_have_a_gpu_each() -> None:
    place = multihost.find_place({**SLURM, "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"})
    assert place is not None and place.local_device == 1
    one_node = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "node7"}
    place = multihost.find_place({**SLURM, **one_node, "SLURM_LOCALID": "1"})
    assert place is not None and place.local_device == 1
    assert place.address and place.address.startswith("127.0.0.1:") and place.bind == place.address
    step = multihost.find_place({**SLURM, **one_node, "SLURM_STEP_ID": "1"})
    assert step is not None and step.address != place.address, "two steps on a host don't meet"


def test_open_mpi_on_one_host_and_on_several() -> None:
    place = multihost.find_place(OPEN_MPI)
    assert place is not None
    assert (place.launcher, place.index, place.n_processes, place.local_device) == ("Open MPI", 3, 4, 3)
    assert place.bind == place.address and place.address and place.address.startswith("127.0.0.1:")
    two = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    with pytest.raises(FintxError, match="set JAX_COORDINATOR_ADDRESS"):
        multihost.find_place(two)
    uri = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
    found = multihost.find_place({**two, **uri})
    assert found is not None and found.address is None and found.local_device == 1
    named = multihost.find_place({**two, "JAX_COORDINATOR_ADDRESS": "10.1.2.3:99"})
    assert named is not None and (named.address, named.local_device) == ("10.1.2.3:99", 1)


def test_kubernetes_names_a_service_that_only_the_cluster_knows() -> None:
    place = multihost.find_place(KUBERNETES)
    assert place is not None
    assert (place.launcher, place.index, place.n_processes) == ("Kubernetes", 2, 3)
    assert (place.address, place.bind) == ("fintx-0.fintx.invalid:1234", "[::]:1234")


def test_the_first_process_binds_one_interface_where_it_can() -> None:
    place = multihost.find_place({**GENERIC, "JAX_COORDINATOR_ADDRESS": "10.1.2.3:99"})
    assert place is not None and place.bind == "10.1.2.3:99"
    own = multihost.find_place(GENERIC)
    assert own is not None and own.bind == own.address == "127.0.0.1:5000"
    # A name that means the loopback, as a host's own does on Debian: no other host could reach that.
    named = multihost.find_place({**GENERIC, "JAX_COORDINATOR_ADDRESS": "localhost:99"})
    assert named is not None and named.bind == "[::]:99"
    chosen = multihost.find_place({**GENERIC, "JAX_COORDINATOR_BIND_ADDRESS": "127.0.0.1:7"})
    assert chosen is not None and chosen.bind == "127.0.0.1:7"


def test_a_process_id_that_is_no_number_is_refused() -> None:
    with pytest.raises(FintxError, match="JAX_PROCESS_ID='first'"):
        multihost.find_place({**GENERIC, "JAX_PROCESS_ID": "first"})
