"""Trials that train together, and one that waits behind another: a worker's end costs each no more than alone."""

from __future__ import annotations

import os
import signal

import pytest

from tests.helpers import shared
from tests.helpers.machine import LONG, MEDIUM, SHORT, Machine, Running, wait_for

THREE = ("study.n_trials=3", "execution.population=3")
BEHIND = ("study.n_trials=3", "execution.pipeline=true")


@pytest.fixture(scope="module")
def undisturbed_three(fault_file) -> list[tuple]:
    """The numbers of three trials that trained together where nothing happened."""
    root = shared.once("undisturbed_three", lambda root: Machine(root, fault_file).run(*MEDIUM, *THREE))
    return Machine(root, fault_file).numbers()


def all_saved(machine: Machine) -> bool:
    return len({path.parents[2] for path in machine.steps()}) == 3


def under_way(machine: Machine) -> tuple[Running, int]:
    """A population that trains and has saved every member, and the process of its worker."""
    running = machine.start(*MEDIUM, *THREE)
    wait_for(lambda: all_saved(machine), running=running)
    (worker,) = running.workers()
    return running, worker


def one_waits(machine: Machine, *changes: str) -> Running:
    """A study whose second trial waits behind the first, which trains."""
    running = machine.start(*changes, *BEHIND)
    wait_for(lambda: len(machine.leases()) == 2 and machine.steps(), running=running)
    return running


def test_a_worker_that_dies_in_a_population_costs_no_member_its_numbers(machine, undisturbed_three):
    here = machine()
    running, worker = under_way(here)
    os.kill(worker, signal.SIGKILL)
    output = running.end(code=0)
    assert output.count("died: killed by SIGKILL") == 3
    assert here.numbers() == undisturbed_three
    assert [record.attempt for record in here.records()] == [2, 2, 2]
    for number in range(3):
        first, second = here.first_steps(number)
        assert first < second


def test_an_interrupted_population_goes_on_to_the_same_numbers(machine, undisturbed_three):
    here = machine()
    running, _ = under_way(here)
    running.process.send_signal(signal.SIGINT)
    running.end(code=75)
    leases = here.leases()
    assert [(leases[n].state, leases[n].failures) for n in range(3)] == [("interrupted", 0)] * 3
    assert len({leases[n].step for n in range(3)}) == 1 and leases[0].step > 0
    here.run(*MEDIUM, *THREE)
    assert here.numbers() == undisturbed_three
    assert all(here.first_steps(n)[1] > leases[n].step for n in range(3))


def test_one_member_diverges_and_the_others_come_to_their_end(machine, tmp_path, fault_file):
    rates = (2e-3, 1e30, 4e-3)
    entries = "".join(
        f"\n[[queue]]\nd_model = 8\nn_layers = 2\nn_heads = 1\nd_ff = 16\nvalues = {{'optim.learning_rate' = {rate}}}\n"
        for rate in rates
    )
    file = tmp_path / "queued.toml"
    file.write_text(fault_file.read_text().replace("high = 1e-2", "high = 1e30") + entries)
    here = machine("queued", file=file)
    here.run(*SHORT, *THREE)
    records = here.records()
    assert [record.config.optim.learning_rate for record in records] == list(rates)
    assert [record.outcome for record in records] == ["completed", "diverged", "completed"]
    assert records[1].value is None and records[0].value != records[2].value
    assert [len(here.first_steps(number)) for number in range(3)] == [1, 1, 1]


def test_a_trial_that_waits_is_given_back_by_a_request_to_stop(machine, undisturbed):
    here = machine()
    running = one_waits(here, *MEDIUM)
    running.process.send_signal(signal.SIGINT)
    running.end(code=75)
    leases = here.leases()
    assert [(leases[n].state, leases[n].failures) for n in (0, 1)] == [("interrupted", 0)] * 2
    assert leases[0].step > 0 and leases[1].step == 0 and here.first_steps(1) == []
    here.run(*MEDIUM, *BEHIND)
    assert [record.trial_number for record in here.records()] == [0, 1, 2]
    assert here.numbers()[0] == undisturbed[0]


def test_a_trial_that_waits_is_not_blamed_for_its_workers_death(machine):
    here = machine()
    running = one_waits(here, *LONG)
    os.kill(running.workers()[0], signal.SIGKILL)
    wait_for(lambda: len(here.first_steps()) == 2, running=running)
    leases = here.leases()
    assert [leases[n].failures for n in (0, 1)] == [1, 0]
    assert "its worker died before its turn" in running.output.replace("\n", " ")


def test_stop_lets_the_running_trial_finish_and_not_the_one_behind_it(machine, undisturbed):
    here = machine()
    running = one_waits(here, *MEDIUM)
    here.stop(running)
    running.end(code=75)
    assert here.numbers() == undisturbed[:1]
    assert here.leases()[1].state == "interrupted" and here.first_steps(1) == []
