"""Processes are killed, frozen and asked to stop at any moment: every trial is trained once, to the same numbers."""

from __future__ import annotations

import contextlib
import os
import pty
import random
import signal
import subprocess
import time

import pytest

from fintx.study import locks
from tests.helpers.machine import ENVIRONMENT, FINTX, LONG, MEDIUM, SHORT, Machine, Running, wait_for

ONE, TWO = "study.n_trials=1", "study.n_trials=2"
N_KILLS = 20


def is_alive(pid: int) -> bool:
    """Whether a process runs or could run; one that is dead and not yet waited for does not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
    return False


def under_way(machine: Machine, *changes: str) -> tuple[Running, int]:
    """A study that trains and has saved, and the process of its worker."""
    running = machine.start(*changes)
    wait_for(machine.steps, running=running)
    (worker,) = running.workers()
    return running, worker


def kill(running: Running) -> None:
    running.process.kill()
    running.process.wait()


def test_a_worker_that_dies_costs_neither_study_nor_numbers(machine, undisturbed):
    """Killed, then by a segmentation fault: two attempts are lost, and no step that was saved."""
    here = machine()
    running, worker = under_way(here, *MEDIUM, TWO)
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: len(here.first_steps()) == 2, running=running)
    os.kill(running.workers()[0], signal.SIGSEGV)
    output = running.end(code=0)
    assert "died: killed by SIGKILL" in output and "died: killed by SIGSEGV" in output and "attempt 3" in output
    assert here.numbers() == undisturbed
    assert here.records()[0].attempt == 3
    first, second, third = here.first_steps()
    assert 0 < first < second <= third


def test_a_worker_killed_in_the_middle_of_a_save_goes_on_from_the_state_before(machine, undisturbed):
    here = machine()
    running, worker = under_way(here, *MEDIUM, ONE)
    deadline = time.monotonic() + 60
    while not (partial := list(here.folder.glob("trials/0000/run/fold_0/.step_*.partial-*"))):
        assert time.monotonic() < deadline and running.process.poll() is None  # no pause: a save is over in a moment
    os.kill(worker, signal.SIGKILL)
    output = running.end(code=0)
    assert "attempt 2" in output and partial
    assert here.numbers() == undisturbed[:1]
    assert not (here.folder / "trials" / "0000" / "run").exists()


def test_a_killed_coordinator_is_started_again_at_once(machine, undisturbed):
    """Its worker, cut off, saves and lets go of the trial: of two processes only one trains it."""
    here = machine()
    running, worker = under_way(here, *MEDIUM, ONE)
    kill(running)
    here.run(*MEDIUM, ONE)
    assert here.numbers() == undisturbed[:1]
    assert here.records()[0].attempt == 2
    first, second = here.first_steps()
    assert first < second
    assert not is_alive(worker)


def test_a_frozen_worker_whose_coordinator_was_killed_is_ended_by_the_next_run(machine, undisturbed):
    here = machine()
    running, worker = under_way(here, *MEDIUM, ONE)
    os.kill(worker, signal.SIGSTOP)
    kill(running)
    here.run(*MEDIUM, ONE)
    assert here.numbers() == undisturbed[:1]
    assert not is_alive(worker)


def test_a_killed_machine_loses_no_step_that_was_saved(machine, undisturbed):
    """As a power cut: coordinator and worker at the same instant."""
    here = machine()
    running, _ = under_way(here, *MEDIUM, ONE)
    running.everyone(signal.SIGKILL)
    running.process.wait()
    newest = int(here.steps()[-1].name.removeprefix("step_"))
    here.run(*MEDIUM, ONE)
    assert here.numbers() == undisturbed[:1]
    assert here.first_steps()[1] > newest - 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_saves_and_says_how_to_go_on(number, machine, undisturbed):
    """SIGINT reaches the coordinator alone; SIGTERM, as a service manager sends it, all its processes."""
    here = machine()
    running, _ = under_way(here, *MEDIUM, ONE)
    if number == signal.SIGTERM:
        running.everyone(number)
    else:
        running.process.send_signal(number)
    assert "give the same command again to continue" in running.end(code=75)
    lease = here.leases()[0]
    assert lease.state == "interrupted" and lease.failures == 0
    assert lease.step == int(here.steps()[-1].name.removeprefix("step_"))
    here.run(*MEDIUM, ONE)
    assert here.numbers() == undisturbed[:1]
    assert here.first_steps()[1] > lease.step


def test_a_request_to_stop_before_the_worker_has_begun_counts_as_no_failure(machine):
    here = machine()
    running = here.start(*LONG, ONE)
    wait_for(here.leases, running=running)  # handed to a worker that still starts
    running.process.send_signal(signal.SIGINT)
    running.end(code=75)
    assert here.leases()[0].state == "interrupted" and here.leases()[0].failures == 0
    assert here.first_steps() == [], "the request came too late for this test"


def test_a_request_to_stop_is_heeded_while_the_baselines_are_fitted(machine):
    here = machine()
    (here.root / "data" / "baselines").mkdir(parents=True)  # fitted nowhere before
    running = here.start(*SHORT, "study.n_trials=1")
    wait_for(lambda: "fitting what must be beaten" in running.output, running=running)
    running.process.send_signal(signal.SIGINT)
    assert "give the same command again" in running.end(code=75)
    assert not (here.folder / "baselines.json").exists() and here.leases() == {}
    assert "1 of 1 trials finished" in here.run(*SHORT, "study.n_trials=1")


def test_asked_twice_it_ends_at_once_and_loses_nothing(machine):
    here = machine()
    running, worker = under_way(here, *LONG, ONE)
    os.kill(worker, signal.SIGSTOP)  # so that it can't obey the first request
    states = here.steps()
    running.process.send_signal(signal.SIGINT)
    wait_for(lambda: "saving what runs" in running.output, running=running)
    running.process.send_signal(signal.SIGINT)
    assert "finished work is kept" in running.end(code=75)
    assert here.steps() == states and not is_alive(worker)


def test_a_terminal_that_is_closed_is_a_request_to_stop(machine):
    """A lost connection: SIGHUP, and whatever is printed from then on fails."""
    here = machine()
    ours, theirs = pty.openpty()
    command = [FINTX, "sweep", here.file, "--outputs", here.root / "outputs", "--data-dir", here.root / "data"]
    changes = [part for change in (*LONG, ONE, "execution.checkpoint_s=100") for part in ("--set", change)]
    here.root.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        ["setsid", "--ctty", *command, *changes], stdin=theirs, stdout=theirs, stderr=theirs, env=ENVIRONMENT
    )  # fmt: skip
    os.close(theirs)
    running = Running(process, here.root / "log-0")
    here.started.append(running)
    running.log.write_text("")
    os.set_blocking(ours, False)

    def trains() -> bool:
        with contextlib.suppress(BlockingIOError), running.log.open("a") as log:
            log.write(os.read(ours, 1 << 16).decode())
        return bool(here.first_steps())

    wait_for(trains, running=running)
    os.close(ours)
    assert process.wait(timeout=60) == 75
    assert here.leases()[0].state == "interrupted" and here.steps()


def test_stop_lets_the_running_trial_finish(machine, undisturbed):
    here = machine()
    running, _ = under_way(here, *MEDIUM, TWO)
    assert "to stop" in here.stop(running)
    assert "continue" in running.end(code=75)
    assert here.numbers() == undisturbed[:1] and list(here.leases()) == [0]
    again = subprocess.run([FINTX, "stop", here.folder], env=ENVIRONMENT, capture_output=True, text=True)
    assert again.returncode == 2 and "nobody is running it" in again.stderr.replace("\n", " ")
    here.run(*MEDIUM, TWO)
    assert here.numbers() == undisturbed


def test_a_request_to_stop_is_heeded_while_the_study_still_begins(machine):
    here = machine()
    running = here.start(*LONG, ONE)
    wait_for(lambda: (here.folder / "study.json").is_file(), running=running)
    running.process.send_signal(signal.SIGSTOP)
    locks.ask_to_stop(str(here.folder), outputs=here.folder.parent)
    assert here.leases() == {}, "the request came too late for this test"
    running.process.send_signal(signal.SIGCONT)
    running.end(code=75, timeout_s=60)
    assert here.leases() == {}


def test_a_hung_worker_is_stopped_and_its_trial_taken_up_again(machine, undisturbed):
    here = machine()
    running, worker = under_way(here, *MEDIUM, ONE, "execution.hang_s=15")
    os.kill(worker, signal.SIGSTOP)
    output = running.end(code=0)
    assert "hung: no step for" in output and "attempt 2" in output
    assert here.numbers() == undisturbed[:1]
    assert not is_alive(worker)


def test_a_machine_that_slept_blames_no_worker(machine, undisturbed):
    """Coordinator and worker are frozen for longer than hang_s, as when a notebook is closed."""
    here = machine()
    running, worker = under_way(here, *MEDIUM, ONE, "execution.hang_s=15")
    running.everyone(signal.SIGSTOP)
    time.sleep(17)  # the fault itself: no condition to wait for
    os.kill(running.process.pid, signal.SIGCONT)
    wait_for(lambda: True)
    os.kill(worker, signal.SIGCONT)
    assert "hung" not in running.end(code=0)
    assert here.records()[0].attempt == 1 and here.numbers() == undisturbed[:1]


def test_a_worker_that_dies_again_and_again_gives_its_trial_up_until_the_next_run(machine):
    here = machine()
    running = here.start(*LONG, ONE, "execution.max_attempts=2")
    for attempt in (1, 2):
        wait_for(lambda attempt=attempt: len(here.first_steps()) == attempt, running=running)
        os.kill(running.workers()[0], signal.SIGKILL)
    assert "given up" in running.end(code=1)
    assert here.leases()[0].state == "failed" and here.leases()[0].failures == 2
    running = here.start(*LONG, ONE, "execution.max_attempts=2")
    wait_for(lambda: len(here.first_steps()) == 3, running=running)
    assert here.leases()[0].attempt == 3


@pytest.mark.long
def test_killed_at_random_until_it_is_finished(machine):
    """Coordinator, worker or both, twenty times at any instant; then it is left alone to come to its end."""
    here, chance = machine(), random.Random(7)
    changes = (*MEDIUM, "study.n_trials=5", "execution.max_attempts=99", "execution.max_failures=99")
    running, steps = here.start(*changes), {}
    for _ in range(N_KILLS):
        end = time.monotonic() + chance.uniform(0, 9)
        while time.monotonic() < end and running.process.poll() is None:
            time.sleep(0.05)  # the random instant
        victim = chance.choice(["coordinator", "worker", "both"])
        if victim == "both":
            running.everyone(signal.SIGKILL)
        elif victim == "worker":
            for worker in running.workers():
                os.kill(worker, signal.SIGKILL)
        if victim != "worker" or running.process.poll() is not None:
            kill(running)
            running = here.start(*changes)
        steps |= {number: here.first_steps(number) for number in range(5)}
    running.end(code=0)
    records = here.records()
    assert [record.trial_number for record in records] == list(range(5))
    assert len({record.config_hash for record in records}) == 5
    leases = here.leases()
    assert sorted(leases) == list(range(5)) and all(lease.finished for lease in leases.values())
    for number in range(5):
        began = here.first_steps(number)
        assert began == sorted(began) and began[: len(steps[number])] == steps[number]
        assert records[number].folds[0].steps >= max(began, default=0)
    calm = machine("calm")
    calm.run(*changes)
    assert here.numbers() == calm.numbers()
