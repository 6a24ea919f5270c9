"""Studies are extended, edited, forked, queued and run side by side: what is asked for is done exactly once."""

from __future__ import annotations

import shutil
import socket
import subprocess

import pytest

from fintx.study import records
from tests.helpers.machine import MEDIUM, SHORT, Machine, wait_for

QUEUED = "\n[[queue]]\nd_model = 8\nn_layers = 3\nn_heads = 2\nd_ff = 16\nnote = 'deep'\n"


def distinct(machine: Machine) -> int:
    return len({record.config_hash for record in machine.records()})


@pytest.mark.long
def test_ten_and_ten_more_are_twenty_at_once(machine):
    at_once, in_two = machine("at_once"), machine("in_two")
    short = ("train.max_epochs=1", "study.n_startup_trials=5")  # most are then proposed from what was learnt
    at_once.run(*short, "study.n_trials=20")
    in_two.run(*short, "study.n_trials=10")
    output = in_two.run(*short, "study.n_trials=20")
    assert in_two.numbers() == at_once.numbers() and "\ntrial 9 (" not in output
    assert distinct(in_two) == len(in_two.records()) == 20
    assert "\ntrial 0 (" not in in_two.run(*short, "study.n_trials=20") and len(in_two.records()) == 20


def test_an_edited_space_is_shown_and_nothing_runs_until_it_is_forked(finished, machine):
    here = machine()
    shutil.copytree(finished.root, here.root)
    edit = 'space."optim.learning_rate"={low=1e-3, high=2e-2, log=true}'
    before = here.numbers()
    output = here.run(*SHORT, "study.n_trials=4", edit, code=2)
    assert "space.optim.learning_rate.high: 0.01 there, 0.02 here" in output and "--fork NAME" in output
    assert "\ntrial 3 (" not in output and here.numbers() == before
    output = here.run(*SHORT, "study.n_trials=4", edit, options=("--fork", "wider"))
    assert "3 trials taken over from tiny" in output and "4 of 4 trials finished" in output
    taken = records.read_all(here.folder.parent / "wider")
    assert [record.origin for record in taken] == ["tiny/0", "tiny/1", "tiny/2", ""]
    assert [record.value for record in taken[:3]] == [record.value for record in here.records()]
    assert here.numbers() == before


def test_a_fork_that_was_cut_off_is_made_whole_by_the_same_command(machine, finished):
    """As if killed while trial 1 was being copied: nothing is trained before all have come over."""
    here = machine()
    shutil.copytree(finished.root, here.root)
    fork = ("--fork", "other")
    here.run(*SHORT, "study.n_trials=3", options=fork)
    other = here.folder.parent / "other"
    (other / "fork-pending").write_text("cut off\n")
    (other / "journal.log").unlink()
    for number in (1, 2):
        (other / "trials" / f"{number:04d}" / "record.json").unlink()
    output = here.run(*SHORT, "study.n_trials=3", options=fork)
    assert "3 trials taken over from tiny" in output and "\ntrial 1 (" not in output
    assert [record.origin for record in records.read_all(other)] == ["tiny/0", "tiny/1", "tiny/2"]
    assert not (other / "fork-pending").exists()


def test_a_queue_is_run_once_and_can_be_filled_while_the_study_runs(machine, tmp_path, tiny_file):
    file = tmp_path / "queued.toml"
    file.write_text(tiny_file.read_text().replace("1.2K", "1.65K") + QUEUED)
    here = machine("queued", file=file)
    changes = (*MEDIUM, "study.n_trials=4")
    running = here.start(*changes)
    wait_for(here.steps, running=running)
    file.write_text(file.read_text() + QUEUED.replace("n_heads = 2", "n_heads = 1").replace("deep", "later"))
    running.end(code=0)
    records = here.records()
    assert [record.note for record in records] == ["deep", "later", "", ""]
    assert [record.config.shape.n_heads for record in records[:2]] == [2, 1]
    assert "\ntrial 0 (" not in here.run(*changes)
    assert here.records() == records and distinct(here) == 4


def test_several_files_go_side_by_side_and_one_that_fails_stops_no_other(machine, tmp_path, fault_file):
    other, wrong = tmp_path / "other.toml", tmp_path / "wrong.toml"
    other.write_text(fault_file.read_text().replace('"tiny"', '"other"'))
    wrong.write_text(fault_file.read_text().replace('"tiny"', '"wrong"').replace("1.2K", "900M"))
    here = machine()
    output = here.run(*SHORT, "study.n_trials=2", code=2, options=(wrong, other, "--workers", "2"))
    assert "no candidate shape holds" in output and "All studies" in output
    assert len(here.records()) == 2 and len(records.read_all(here.folder.parent / "other")) == 2


def test_eight_workers_on_an_empty_storage(machine):
    here = machine()
    assert "9 of 9" in here.run(*SHORT, "study.n_trials=9", options=("--workers", "8"), timeout_s=400)
    assert [record.trial_number for record in here.records()] == list(range(9)) and distinct(here) == 9


def test_a_second_machine_on_a_shared_folder_joins(machine):
    here = machine()
    alone = ("unshare", "--uts", "sh", "-c", 'hostname other && exec "$@"', "sh")
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let a process have a host name of its own")
    changes = (*MEDIUM, "study.n_trials=5")
    first = here.start(*changes)
    wait_for(here.steps, running=first)
    second = here.start(*changes, before=alone)
    for running in (first, second):
        assert "5 of 5" in running.end(code=0)
    assert {record.host for record in here.records()} == {"other", socket.gethostname()}
    assert [record.trial_number for record in here.records()] == list(range(5)) and distinct(here) == 5
    assert [record.attempt for record in here.records()] == [1] * 5
