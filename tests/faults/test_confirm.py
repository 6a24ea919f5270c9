"""A confirmation is killed, stopped and run by several workers: every rerun is trained once, to the same numbers."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from fintx.analysis import confirmation
from fintx.study import records
from tests.helpers import shared
from tests.helpers.machine import Machine, wait_for

SAVES = "execution.checkpoint_s=0.3"
MEDIUM = ("train.max_epochs=50", "train.patience=50", SAVES, "study.n_trials=2")
PATIENCE_S = 900
"""A deadline for what hangs, not a measure: these tests start dozens of processes on whatever machine there is."""
WANTED = ("--top-k", "2", "--n-seeds", "2")


def reruns(machine: Machine) -> dict[tuple[str, str], tuple]:
    """What of a confirmation must not depend on what happened to its processes."""
    return {
        (path.parent.parent.name, path.parent.name): (record.value, record.config_hash, record.folds[0].curve)
        for path in sorted(machine.folder.glob("confirm/*/*/record.json"))
        for record in [records.read(path)]
    }


def verdict(machine: Machine) -> dict:
    """confirmation.json without the time."""
    tree = json.loads((machine.folder / confirmation.FILE).read_text())
    return {key: value for key, value in tree.items() if key != "created"}


def steps(machine: Machine) -> list[Path]:
    """Training states of unfinished reruns."""
    states = machine.folder.glob("confirm/*/*/run/fold_*/step_*[0-9]")
    return sorted(path for path in states if not (path.parents[2] / "record.json").exists())


def starts(machine: Machine) -> dict[str, list[int]]:
    """Rerun → the step that each of its attempts went on from."""
    return {
        f"{path.parent.parent.name}/{path.parent.name}": [
            json.loads(line)["from_step"] for line in path.read_text().splitlines()
        ]
        for path in machine.folder.glob("confirm/*/*/attempts.jsonl")
    }


@pytest.fixture(scope="module")
def searched(fault_file):
    """The folder of a machine whose study is searched; tests work on copies."""
    return shared.once("searched", lambda root: Machine(root, fault_file).run(*MEDIUM, timeout_s=PATIENCE_S))


@pytest.fixture
def confirming(machine, searched):
    """A machine with that study, and what confirms it there."""
    here = machine()
    shutil.copytree(searched, here.root)
    return dataclasses.replace(here, file=Path("tiny"))


@pytest.fixture(scope="module")
def undisturbed(searched):
    """The same where nothing happened: reruns, and confirmation.json."""

    def confirm(root: Path) -> None:
        shutil.copytree(searched, root)
        there = Machine(root, Path("tiny"))
        there.start(command="confirm", options=WANTED).end(code=0, timeout_s=PATIENCE_S)

    there = Machine(shared.once("confirmed", confirm), Path("tiny"))
    return reruns(there), verdict(there)


def test_a_killed_confirmation_continues_to_the_same_numbers(confirming, undisturbed):
    running = confirming.start(command="confirm", options=WANTED)
    wait_for(lambda: len(reruns(confirming)) == 1 and steps(confirming), running=running, timeout_s=PATIENCE_S)
    done = {path: path.stat().st_mtime_ns for path in confirming.folder.glob("confirm/*/*/record.json")}
    running.everyone(signal.SIGKILL)
    running.process.wait()
    assert not (confirming.folder / confirmation.FILE).exists()
    output = confirming.start(command="confirm", options=WANTED).end(code=0, timeout_s=PATIENCE_S)
    assert "1 of 4 done before" in output
    assert (reruns(confirming), verdict(confirming)) == undisturbed
    assert all(path.stat().st_mtime_ns == time for path, time in done.items()), "trained twice"
    resumed = [steps for steps in starts(confirming).values() if len(steps) == 2]
    assert len(resumed) == 1 and resumed[0][1] > 1, "the unfinished rerun went on from its last save"


def test_a_dead_worker_costs_neither_reruns_nor_numbers(confirming, undisturbed):
    running = confirming.start(command="confirm", options=WANTED)
    wait_for(lambda: steps(confirming), running=running, timeout_s=PATIENCE_S)
    os.kill(running.workers()[0], signal.SIGKILL)
    output = running.end(code=0, timeout_s=PATIENCE_S)
    assert "died: killed by SIGKILL" in output and "again, seed 1 of 2, attempt 2" in output
    assert (reruns(confirming), verdict(confirming)) == undisturbed


def test_a_request_to_stop_saves_reports_how_far_it_is_and_exits_with_75(confirming, undisturbed):
    running = confirming.start(command="confirm", options=WANTED)
    wait_for(lambda: len(reruns(confirming)) == 2 and steps(confirming), running=running, timeout_s=PATIENCE_S)
    running.process.send_signal(signal.SIGINT)
    output = running.end(code=75, timeout_s=PATIENCE_S)
    assert "give the same command again to continue" in output and "2 of 4 trainings are done" in output
    half = confirmation.read(confirming.folder)
    assert not half.complete and len(half.seeds) == 1 and half.best is not None
    confirming.start(command="confirm", options=(*WANTED, "--workers", "2")).end(code=0, timeout_s=PATIENCE_S)
    assert (reruns(confirming), verdict(confirming)) == undisturbed
