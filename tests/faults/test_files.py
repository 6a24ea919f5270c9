"""Files are torn, flipped, deleted and edited, disks fill up: nothing is silently different or trained twice."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import jax
import pytest

from fintx.model import encoder
from fintx.study import records
from fintx.train import checkpoint
from tests.helpers import shared
from tests.helpers.machine import ENVIRONMENT, FINTX, MEDIUM, SHORT, Machine, wait_for

ONE, TWO = "study.n_trials=1", "study.n_trials=2"
TORN = b'{"op_code": 4, "trial'


@pytest.fixture(scope="module")
def torn_off(fault_file):
    """An unfinished study with two training states, whose machine lost its power; tests work on copies."""

    def lose_power(root: Path) -> None:
        here = Machine(root, fault_file)
        running = here.start(*MEDIUM, ONE)
        wait_for(lambda: len(here.steps()) == 2, running=running)
        running.everyone(signal.SIGKILL)
        running.process.wait()

    return Machine(shared.once("torn_off", lose_power), fault_file)


@pytest.mark.parametrize("damage", ["flipped bit", "truncated file", "empty step folder"])
def test_a_damaged_newest_state_is_set_aside_and_the_one_before_used(damage, torn_off, machine, undisturbed):
    here = machine()
    shutil.copytree(torn_off.root, here.root)
    newest = here.steps()[-1]
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if damage == "flipped bit":
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    elif damage == "truncated file":
        largest.write_bytes(largest.read_bytes()[:-1])
    else:
        newest.with_name("step_99999999").mkdir()
    output = here.run(*MEDIUM, ONE)
    assert "set aside" in output
    assert here.numbers() == undisturbed[:1]
    (warning,) = here.records()[0].warnings
    assert "training state can't be used" in warning


def test_a_torn_journal_tail_is_repaired_between_runs_and_while_a_study_runs(machine):
    here = machine()
    here.run(*SHORT, ONE)
    journal = here.folder / "journal.log"
    whole = journal.read_bytes()
    journal.write_bytes(whole + TORN)
    running = here.start(*MEDIUM[2:], *SHORT, TWO)
    wait_for(lambda: here.leases().get(1), running=running)
    with journal.open("ab") as file:  # as another machine that shares the folder, and is killed
        file.write(TORN)
    output = running.end(code=0)
    assert "was torn" in output and len(here.records()) == 2
    assert journal.read_bytes().startswith(whole)
    assert all(isinstance(json.loads(line), dict) for line in journal.read_text().splitlines())
    assert len(list(here.folder.glob("journal.torn-*"))) == 2
    assert [lease.finished for lease in here.leases().values()] == [True, True]


def test_a_journal_damaged_in_the_middle_is_reported_and_made_again_from_the_records(machine, finished):
    """Moved away as the message says, it is rebuilt; nothing is trained twice."""
    here = machine()
    shutil.copytree(finished.root, here.root)
    journal = here.folder / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:2], TORN + b"\n", *lines[3:]]))
    assert "journal.log:3: is damaged" in here.run(*SHORT, "study.n_trials=4", code=2)
    journal.unlink()
    before = here.numbers()
    output = here.run(*SHORT, "study.n_trials=4")
    assert here.numbers()[:3] == before and "\ntrial 0 (" not in output and "\ntrial 3 (" in output
    assert [lease.finished for lease in here.leases().values()] == [True] * 4
    assert len({record.config_hash for record in here.records()}) == 4


def test_a_record_that_was_never_reported_is_reported(machine, finished):
    """As if the coordinator had been killed between a trial's record and the word to the storage."""
    here = machine()
    shutil.copytree(finished.root, here.root)
    journal = here.folder / "journal.log"
    lines = journal.read_text().splitlines(keepends=True)
    results = [index for index, line in enumerate(lines) if json.loads(line).get("values")]
    journal.write_text("".join(lines[: results[-1]]))
    before = here.numbers()
    assert not here.leases()[2].finished
    assert "\ntrial 2 (" not in here.run(*SHORT, "study.n_trials=3")
    assert here.numbers() == before and here.leases()[2].finished


def test_a_full_disk_in_the_middle_of_training_is_one_line_and_costs_nothing(machine, undisturbed):
    """A file-size limit of the worker stands for a full disk: the kernel refuses every write beyond it."""
    here = machine()
    running = here.start(*MEDIUM, ONE)
    wait_for(here.steps, running=running)
    for pid in running.workers():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    output = running.end(code=2)
    assert "could not save" in output and "File too large" in output and "fix that" in output
    assert here.leases()[0].failures == 0
    here.run(*MEDIUM, ONE)
    assert here.numbers() == undisturbed[:1]


THROUGH_A_PIPE = ("bash", "-c", 'exec "$0" "$@" > >(exec cat) 2>&1')
"""What a process prints is written by another one, which no limit of its own keeps from that."""


@pytest.mark.parametrize("before", [THROUGH_A_PIPE, ()], ids=["", "and under its log"])
def test_a_full_disk_under_the_journal_loses_neither_record_nor_journal(machine, undisturbed, before):
    """The coordinator can write no more when the trial ends: its record stands, and is told by the next run."""
    here = machine()
    running = here.start(*MEDIUM, TWO, before=before)
    wait_for(here.steps, running=running)
    size = (here.folder / "journal.log").stat().st_size
    resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (size + 40, resource.RLIM_INFINITY))
    running.end(code=2)
    if before:
        wait_for(lambda: "File too large" in running.output)
        assert len(running.output.split("fintx: ")) == 2
    here.run(*MEDIUM, TWO)
    assert here.numbers() == undisturbed
    assert [lease.finished for lease in here.leases().values()] == [True, True]


def test_a_really_full_disk(machine, undisturbed, tmp_path):
    """A tmpfs of four megabytes, most of which another file takes while a trial runs."""
    here = machine()
    here.root.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", here.root], capture_output=True).returncode:
        pytest.skip("this machine does not let a test mount a tmpfs")
    try:
        running = here.start(*MEDIUM, ONE)
        wait_for(here.steps, running=running)
        big = here.root / "big"
        with big.open("wb", buffering=0) as file:
            while shutil.disk_usage(here.root).free:
                try:
                    file.write(bytes(4096))
                except OSError:
                    break
        running.process.wait(timeout=60)
        big.unlink()
        assert running.process.returncode == 2
        here.run(*MEDIUM, ONE)
        assert here.numbers() == undisturbed[:1]
    finally:
        here.close()
        subprocess.run(["umount", here.root], check=True)


def test_a_second_coordinator_learns_who_runs_the_study(machine):
    here = machine()
    running = here.start(*MEDIUM, ONE)
    wait_for(lambda: list(here.folder.glob("lock-*")), running=running)
    output = here.run(*MEDIUM, ONE, code=2)
    assert f"is being run by process {running.process.pid}" in output.replace("\n", " ")
    running.end(code=0)
    assert here.records()[0].attempt == 1


def test_a_damaged_record_of_one_study_stops_no_other(machine, finished):
    here = machine()
    shutil.copytree(finished.root, here.root)
    other = here.folder.rename(here.folder.with_name("other"))
    damaged = other / "trials" / "0001" / "record.json"
    damaged.write_text(damaged.read_text().replace('"completed"', '"compelted"'))
    output = here.run(*SHORT, ONE)
    assert str(damaged) in output.replace("\n", "") and len(here.records()) == 1


def test_a_damaged_record_of_its_own_stops_a_study(machine, finished):
    here = machine()
    shutil.copytree(finished.root, here.root)
    damaged = here.folder / "trials" / "0001" / "record.json"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    output = here.run(*SHORT, "study.n_trials=4", code=2)
    assert f"{damaged}: is no trial record" in output.replace("\n", " ") and "\ntrial 3 (" not in output


def test_a_finished_trial_whose_record_is_gone_is_reported_and_can_be_trained_again(machine, finished):
    here = machine()
    shutil.copytree(finished.root, here.root)
    shutil.rmtree(here.folder / "trials" / "0001")
    output = here.run(*SHORT, "study.n_trials=3", code=2).replace("\n", " ")
    assert "the records of trials 1 are gone" in output and "move journal.log away" in output
    (here.folder / "journal.log").rename(here.root / "journal.log")
    assert "3 of 3 trials finished" in here.run(*SHORT, "study.n_trials=3")
    assert len({record.config_hash for record in here.records()}) == 3


def test_checkpoint_record_and_model_agree(finished):
    """The config read back from a checkpoint is the record's, and its model has the parameters that are recorded."""
    with_checkpoint = 0
    for record in finished.records():
        config = record.config
        params = encoder.init(config.model, config.shape, len(config.data.features), jax.random.key(0))
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == record.param_count
        folder = records.trial_folder(finished.folder, record.trial_number) / "checkpoint" / "fold_0"
        if folder.is_dir():
            with_checkpoint += 1
            assert checkpoint.load(folder).config == config
    assert with_checkpoint == 2


def test_eval_of_a_study_that_went_through_faults_repeats_its_metrics(machine, torn_off):
    here = machine()
    shutil.copytree(torn_off.root, here.root)
    here.run(*MEDIUM, ONE)
    command = [FINTX, "eval", here.folder, "--data-dir", here.root / "data"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and "equal" in done.stdout and "DIFFERS" not in done.stdout
