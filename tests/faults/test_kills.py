"""Processes are killed, frozen and cut off at any moment: every trial is trained once, to the same numbers."""

from __future__ import annotations

import json
import os
import signal

import pytest

from tests.faults.machine import Machine, wait_for

SAVES = "execution.checkpoint_s=0.3"
MEDIUM = ("train.max_epochs=50", "train.patience=50", SAVES)


def numbers(machine: Machine) -> list[tuple]:
    """What of a study must not depend on what happened to its processes."""
    return [
        (r.trial_number, r.value, r.params, r.config_hash, r.folds[0].best, r.folds[0].curve) for r in machine.records()
    ]


def first_steps(machine: Machine) -> dict[int, list[int]]:
    """Trial → the step that each of its attempts went on from."""
    found: dict[int, list[int]] = {}
    for path in sorted(machine.folder.glob("trials/*/attempts.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[int(path.parent.name)] = [line["from_step"] for line in lines]
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_file):
    """The same study where nothing happened."""
    machine = Machine(tmp_path_factory.mktemp("undisturbed"), tiny_file)
    machine.run(*MEDIUM, "study.n_trials=2")
    return numbers(machine)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV], ids=["killed", "segfault"])
def test_a_worker_that_dies_costs_neither_study_nor_numbers(number, machine, undisturbed):
    here = machine()
    running = here.start(*MEDIUM, "study.n_trials=2")
    wait_for(here.steps, running=running)
    os.kill(running.workers()[0], number)
    said = running.end(code=0)
    assert f"died: killed by {number.name}" in said and "trial 0 (sampler, attempt 2)" in said
    assert numbers(here) == undisturbed
    assert here.records()[0].attempt == 2
    assert first_steps(here)[0][1] > 1


def test_a_killed_coordinator_is_started_again_at_once(machine, undisturbed):
    """Its worker, cut off, saves and lets go of the trial."""
    here = machine()
    running = here.start(*MEDIUM, "study.n_trials=2")
    wait_for(here.steps, running=running)
    running.process.kill()
    running.process.wait()
    here.run(*MEDIUM, "study.n_trials=2")
    assert numbers(here) == undisturbed
    assert here.records()[0].attempt == 2


def test_a_frozen_worker_whose_coordinator_was_killed_is_ended_by_the_next_run(machine, undisturbed):
    here = machine()
    running = here.start(*MEDIUM, "study.n_trials=2")
    wait_for(here.steps, running=running)
    (worker,) = running.workers()
    os.kill(worker, signal.SIGSTOP)
    running.process.kill()
    running.process.wait()
    here.run(*MEDIUM, "study.n_trials=2")
    assert numbers(here) == undisturbed
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_request_to_stop_saves_and_says_how_to_go_on(number, machine, undisturbed):
    here = machine()
    running = here.start(*MEDIUM, "study.n_trials=2")
    wait_for(here.steps, running=running)
    running.process.send_signal(number)
    assert "give the same command again to continue" in running.end(code=75)
    claim = here.claims()[0]
    assert claim.state == "interrupted" and claim.step > 0
    here.run(*MEDIUM, "study.n_trials=2")
    assert numbers(here) == undisturbed


def test_a_hung_worker_is_stopped_and_its_trial_taken_up_again(machine, undisturbed):
    here = machine()
    running = here.start(*MEDIUM, "study.n_trials=2", "execution.hang_s=20")
    wait_for(here.steps, running=running)
    (worker,) = running.workers()
    os.kill(worker, signal.SIGSTOP)
    said = running.end(code=0)
    assert "hung: no step for" in said and "attempt 2" in said
    assert numbers(here) == undisturbed
    with pytest.raises(ProcessLookupError):
        os.kill(worker, signal.SIGCONT)


def test_failures_of_one_kind_in_a_row_stop_the_study(machine):
    here = machine()
    said = here.run(
        "study.n_trials=9", "execution.max_failures=3", 'space."optim.learning_rate"={low=1e29, high=1e30, log=true}',
        code=2,
    )  # fmt: skip
    assert "stopped after 3 failures in a row of the same kind, diverged" in said.replace("\n", " ")
    assert [record.outcome for record in here.records()] == ["diverged"] * 3
    assert all(record.value is None for record in here.records())
