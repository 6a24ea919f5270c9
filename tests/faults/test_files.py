"""Files are torn, flipped, deleted and edited, disks fill up: nothing is silently different or trained twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import jax
import pytest

from fintx.model import transformer
from fintx.study import records
from fintx.train import checkpoint
from tests.faults.machine import ENVIRONMENT, FINTX, Machine, wait_for

SHORT = ("train.max_epochs=2",)
MEDIUM = ("train.max_epochs=50", "train.patience=50", "execution.checkpoint_s=0.3", "study.n_trials=1")
QUEUED = "\n[[queue]]\nd_model = 8\nn_layers = 3\nn_heads = 2\nd_ff = 16\nnote = 'deep'\n"


def values(machine: Machine) -> list[tuple]:
    return [(r.trial_number, r.value, r.config_hash, r.folds[0].curve) for r in machine.records()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_file):
    machine = Machine(tmp_path_factory.mktemp("undisturbed"), tiny_file)
    machine.run(*MEDIUM)
    return values(machine)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_file):
    """A study of three short trials; tests only read it."""
    machine = Machine(tmp_path_factory.mktemp("finished"), tiny_file)
    machine.run(*SHORT, "study.n_trials=3")
    return machine


@pytest.mark.parametrize("damage", ["flipped bit", "truncated file", "empty step folder"])
def test_a_damaged_newest_state_is_set_aside_and_the_one_before_used(damage, machine, undisturbed):
    here = machine()
    running = here.start(*MEDIUM)
    wait_for(lambda: len(here.steps()) == 2, running=running)
    running.everyone(signal.SIGKILL)
    running.process.wait()
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
    said = here.run(*MEDIUM)
    assert "set aside" in said
    assert values(here) == undisturbed
    assert here.records()[0].warnings


def test_a_torn_journal_tail_is_mended(machine):
    here = machine()
    here.run(*SHORT, "study.n_trials=1")
    journal = here.folder / "journal.log"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 4, "trial')
    said = here.run(*SHORT, "study.n_trials=2")
    assert "was torn" in said and len(here.records()) == 2
    assert journal.read_bytes().startswith(whole)
    assert len(list(here.folder.glob("journal.torn-*"))) == 1


def test_a_lost_journal_is_made_again_from_the_records(machine):
    here = machine()
    here.run(*SHORT, "study.n_trials=2")
    before = values(here)
    (here.folder / "journal.log").unlink()
    said = here.run(*SHORT, "study.n_trials=3")
    assert values(here)[:2] == before and "trial 0 (" not in said and "trial 2 (" in said
    assert [claim.finished for claim in here.claims().values()] == [True] * 3


def test_a_record_that_was_never_told_is_told(machine):
    here = machine()
    here.run(*SHORT, "study.n_trials=2")
    journal = here.folder / "journal.log"
    lines = journal.read_text().splitlines(keepends=True)
    told = [i for i, line in enumerate(lines) if '"values"' in line and json.loads(line).get("values")]
    journal.write_text("".join(lines[: told[-1]]))
    before = values(here)
    assert not here.claims()[1].finished
    assert "trial 1 (" not in here.run(*SHORT, "study.n_trials=2")
    assert values(here) == before and here.claims()[1].finished


def test_a_full_disk_in_the_middle_of_training_is_one_line_and_costs_nothing(machine, undisturbed):
    """A file-size limit of the worker stands for a full disk: the kernel refuses every write beyond it."""
    import resource

    here = machine()
    running = here.start(*MEDIUM)
    wait_for(here.steps, running=running)
    for pid in running.workers():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    said = running.end(code=2)
    assert "large" in said.lower() and "mend" in said
    here.run(*MEDIUM)
    assert values(here) == undisturbed


def test_two_coordinators_on_one_study(machine):
    here = machine()
    running = here.start(*MEDIUM)
    wait_for(lambda: list(here.folder.glob("lock-*")), running=running)
    said = here.run(*MEDIUM, code=2)
    assert f"is being run by process {running.process.pid}" in said
    running.end(code=0)


@pytest.mark.parametrize("name", ["../../x", "", "a\nb", "x" * 600, ".hidden"])
def test_a_hostile_study_name_is_refused(name, machine, tmp_path):
    here = machine()
    said = here.run(f"study.name={json.dumps(name)}", code=2)
    assert "study.name" in said
    assert not (here.root / "outputs").exists() and not (tmp_path / "x").exists()
    done = subprocess.run([FINTX, "stop", name], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 5000 + "]" * 5000,
        ".".join(["a"] * 20_000) + " = 1",
        "#" * (20 * 2**20),
        '[train]\nbatch_size = true\n[study]\nname = "x"\n',
        '[optim]\nlearning_rate = nan\n[study]\nname = "x"\n',
        '[execution]\nhang_s = inf\nmemory = "lots"\n[study]\nname = "x"\n',
    ],
    ids=["nested", "long key", "20 MB", "true", "nan", "inf"],
)
def test_a_hostile_file_is_refused_within_seconds(text, machine, tmp_path):
    file = tmp_path / "hostile.toml"
    file.write_text(text)
    said = machine("hostile", own_file=file).run(code=2, timeout_s=30)
    assert "hostile.toml" in said and "bug of fintx" not in said


def test_a_trial_too_big_for_memory_is_an_outcome(machine):
    here = machine()
    said = here.run(*SHORT, "study.n_trials=2", "execution.memory=1000000")
    assert [record.outcome for record in here.records()] == ["out_of_memory"] * 2
    assert all(record.value is None for record in here.records()) and "2 out of memory" in said


def test_an_exception_inside_a_trial_is_retried_and_then_left_aside(machine, tmp_path):
    """The environment breaks: in the worker's Python, opening Orbax raises."""
    here = machine()
    (tmp_path / "broken" / "orbax").mkdir(parents=True)
    (tmp_path / "broken" / "orbax" / "__init__.py").write_text("raise ImportError('broken by hand')\n")
    ENVIRONMENT["PYTHONPATH"] = str(tmp_path / "broken")
    try:
        said = here.run(*SHORT, "study.n_trials=1", "execution.max_attempts=2", code=1)
    finally:
        del ENVIRONMENT["PYTHONPATH"]
    assert "ImportError: broken by hand" in said and "left aside" in said and "log:" in said
    assert here.records() == []
    here.run(*SHORT, "study.n_trials=1", "execution.max_attempts=2")
    assert here.records()[0].attempt == 3


def test_an_edited_space_is_shown_and_nothing_runs_until_it_is_forked(finished):
    edit = 'space."optim.learning_rate"={low=1e-3, high=2e-2, log=true}'
    said = finished.run(*SHORT, "study.n_trials=4", edit, code=2)
    assert "space.optim.learning_rate.high: 0.01 there, 0.02 here" in said and "--fork NAME" in said
    assert len(finished.records()) == 3
    said = finished.run(*SHORT, "study.n_trials=4", edit, options=("--fork", "wider"))
    assert "3 trials taken over from tiny" in said and "4 of 4 trials finished" in said
    taken = records.read_all(finished.folder.parent / "wider")
    assert [record.origin for record in taken] == ["tiny/0", "tiny/1", "tiny/2", ""]
    assert [record.value for record in taken[:3]] == [record.value for record in finished.records()]


def test_a_queue_is_run_once_and_can_be_filled_while_the_study_runs(machine, tmp_path, tiny_file):
    file = tmp_path / "queued.toml"
    file.write_text(tiny_file.read_text().replace("1.2K", "1.6K") + QUEUED)
    here = machine("queued", own_file=file)
    running = here.start("train.max_epochs=60", "train.patience=60", "study.n_trials=4")
    wait_for(lambda: 0 in here.claims(), running=running)
    file.write_text(file.read_text() + QUEUED.replace("n_heads = 2", "n_heads = 1").replace("deep", "later"))
    running.end(code=0)
    found = here.records()
    assert found[0].note == "deep" and "later" in [record.note for record in found]
    again = here.run("train.max_epochs=60", "train.patience=60", "study.n_trials=4")
    assert len(here.records()) == 4 and "…" not in again.partition("feasible shapes")[2]


def test_ten_and_ten_more_are_twenty_at_once(machine):
    at_once, in_two = machine("at_once"), machine("in_two")
    at_once.run("train.max_epochs=1", "study.n_trials=20")
    in_two.run("train.max_epochs=1", "study.n_trials=10")
    in_two.run("train.max_epochs=1", "study.n_trials=20")
    assert values(in_two) == values(at_once)
    assert len({record.config_hash for record in in_two.records()}) == 20
    assert len({tuple(record.params.items()) for record in in_two.records()}) == 20


def test_checkpoint_record_and_model_agree(finished):
    for record in finished.records():
        config = record.config
        params = transformer.init(config.model, config.shape, len(config.data.features), jax.random.key(0))
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == record.param_count
        folder = records.trial_folder(finished.folder, record.trial_number) / "checkpoint" / "fold_0"
        if folder.is_dir():
            assert checkpoint.load(folder).config == config


def test_several_files_go_side_by_side_and_one_that_fails_stops_no_other(machine, tmp_path, tiny_file):
    other, wrong = tmp_path / "other.toml", tmp_path / "wrong.toml"
    other.write_text(tiny_file.read_text().replace('"tiny"', '"other"'))
    wrong.write_text(tiny_file.read_text().replace('"tiny"', '"wrong"').replace("1.2K", "900M"))
    here = machine()
    options = (str(wrong), str(other), "--workers", "2")
    said = here.run(*SHORT, "study.n_trials=2", code=2, options=options)
    assert "no candidate shape holds" in said and "All studies" in said
    assert len(here.records()) == 2 and len(records.read_all(here.folder.parent / "other")) == 2


@pytest.mark.slow
def test_eight_workers_on_an_empty_storage(machine):
    here = machine()
    assert "9 of 9" in here.run(*SHORT, "study.n_trials=9", options=("--workers", "8"), timeout_s=400)
    assert [record.trial_number for record in here.records()] == list(range(9))
    assert len({record.config_hash for record in here.records()}) == 9


@pytest.mark.slow
def test_a_second_machine_on_a_shared_folder_joins(machine):
    here = machine()
    alone = ["unshare", "--uts", "sh", "-c", 'hostname other && exec "$@"', "sh"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let a process have a host name of its own")
    running = here.start(*SHORT, "train.max_epochs=40", "study.n_trials=5")
    wait_for(lambda: 0 in here.claims(), running=running)
    command = [
        *alone, FINTX, "sweep", here.file, "--outputs", here.root / "outputs", "--data-dir", here.root / "data",
        "--set", "train.max_epochs=40", "--set", "study.n_trials=5",
    ]  # fmt: skip
    other = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    running.end(code=0)
    assert other.returncode == 0 and "5 of 5" in other.stdout, other.stderr
    assert {record.host for record in here.records()} == {"other", running_host()}
    assert len({record.config_hash for record in here.records()}) == 5


def running_host() -> str:
    import socket

    return socket.gethostname()


assert sys.platform == "linux", "the fault tests look into /proc"
