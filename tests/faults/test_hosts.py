"""Two real processes on one machine, as on two hosts: one mesh over the devices of both, over Gloo."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable

import pytest

from fintx.study import records
from tests.helpers.machine import SHORT, Machine, Running, wait_for

pytestmark = pytest.mark.slow
Machines = Callable[..., Machine]
LAYOUT = {"data": 4, "model": 1, "fsdp": True}
CAUGHT = ("train.max_epochs=20", "train.patience=20", "study.n_trials=1")
"""A trial that something happens to: a save is half a second, and is waited for."""
OFTEN = "execution.checkpoint_s=0.2"


def launch(machine: Machine, *changes: str) -> list[Running]:
    """The same command twice, as a launcher gives it; each process has two devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    return [
        machine.start("mesh.fsdp=true", *changes, environment={**common, "JAX_PROCESS_ID": str(index)})
        for index in range(2)
    ]


def test_two_hosts_train_the_trials_of_one(machine: Machines) -> None:
    alone, together = machine("alone"), machine("together")
    alone.run(*SHORT, "study.n_trials=2")
    first, second = launch(together, *SHORT, "study.n_trials=2")
    first.end(code=0)
    second.end(code=0, timeout_s=60)
    assert len(together.records()) == 2
    for ours, expected in zip(together.records(), alone.records(), strict=True):
        assert (ours.layout, ours.attempt) == (LAYOUT, 1)
        assert (ours.params, ours.config_hash, ours.outcome) == (
            expected.params,
            expected.config_hash,
            expected.outcome,
        )
        for epoch, expected_epoch in zip(ours.folds[0].curve, expected.folds[0].curve, strict=True):
            assert epoch == pytest.approx(expected_epoch, rel=1e-3)
        assert len(together.first_steps(ours.trial_number)) == 1, "one process logs the attempt"
    written = {path.name for path in together.root.rglob("*") if path.is_file()}
    assert not {name for name in written if "partial" in name or name.endswith(".tmp")}
    assert "trials finished" in first.output and "trials finished" not in second.output


@pytest.mark.long
def test_a_request_to_stop_reaches_both_and_the_same_command_continues(machine: Machines) -> None:
    here = machine()
    first, second = launch(here, *CAUGHT, OFTEN)
    wait_for(here.steps, running=first)
    first.process.send_signal(signal.SIGTERM)
    first.end(code=75)
    second.end(code=0, timeout_s=60)
    assert here.records() == [] and here.steps()
    first, second = launch(here, *CAUGHT)
    first.end(code=0)
    second.end(code=0, timeout_s=60)
    (record,) = here.records()
    assert (record.attempt, record.layout, record.folds[0].epochs) == (2, LAYOUT, 20)
    assert here.first_steps()[1] > here.first_steps()[0]


@pytest.mark.long
def test_a_host_whose_worker_dies_is_waited_for(machine: Machines) -> None:
    here = machine()
    first, second = launch(here, *CAUGHT, OFTEN)
    wait_for(here.steps, running=first)
    (worker,) = second.workers()
    os.kill(worker, signal.SIGKILL)
    first.end(code=0)
    second.end(code=0, timeout_s=60)
    (record,) = here.records()
    assert (record.attempt, record.outcome, record.layout) == (2, "completed", LAYOUT)
    assert len(here.first_steps()) == 2
    assert (records.trial_folder(here.folder, 0) / "record.json").is_file()
