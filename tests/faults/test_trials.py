"""Trials go wrong by themselves: what they bring is an outcome or another attempt, and a rotten study stops."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from fintx.run.job import Job
from fintx.study import study_file
from fintx.train import memory
from tests.helpers.machine import ENVIRONMENT, LONG, SHORT, wait_for

ONE = "study.n_trials=1"
ABSURD = 'space."optim.learning_rate"={low=1e29, high=1e30, log=true}'


def test_a_loss_of_nan_is_an_outcome_and_many_in_a_row_stop_the_study(machine):
    here = machine()
    output = here.run(*SHORT, "study.n_trials=9", "execution.max_failures=3", ABSURD, code=2)
    assert "stopped after 3 failures in a row of the same kind, diverged" in output.replace("\n", " ")
    records = here.records()
    assert [record.outcome for record in records] == ["diverged"] * 3
    assert all(record.value is None for record in records)
    assert len({record.config_hash for record in records}) == 3
    assert [lease.finished for lease in here.leases().values()] == [True] * 3
    json.loads((here.folder / "tiny_all_trials.json").read_text(), parse_constant=_no_nan)


def _no_nan(text: str) -> None:
    raise AssertionError(f"{text} in a table")


def test_a_trial_too_big_for_memory_is_an_outcome(machine):
    here = machine()
    output = here.run(*SHORT, "study.n_trials=2", "execution.memory=100000")
    assert [record.outcome for record in here.records()] == ["out_of_memory"] * 2
    assert all(record.value is None for record in here.records()) and "out of memory" in output
    here.run(*SHORT, "study.n_trials=3")
    assert [record.outcome for record in here.records()][2] == "completed"


def test_an_exception_inside_a_trial_is_retried_and_then_given_up(machine, tmp_path):
    """The environment breaks: in this Python, importing Orbax raises."""
    here = machine()
    (tmp_path / "broken" / "orbax").mkdir(parents=True)
    (tmp_path / "broken" / "orbax" / "__init__.py").write_text("raise ImportError('broken by hand')\n")
    broken = {"PYTHONPATH": str(tmp_path / "broken")}
    output = here.run(*SHORT, ONE, "execution.max_attempts=2", code=1, environment=broken)
    assert output.count("ImportError: broken by hand") >= 2 and "given up" in output
    logs = sorted((here.folder / "trials" / "0000" / "run").glob("attempt-*.log"))
    assert len(logs) == 2 and all("Traceback" in log.read_text() and str(log) in output for log in logs)
    assert here.records() == [] and here.leases()[0].failures == 2
    here.run(*SHORT, ONE, "execution.max_attempts=2")
    assert here.records()[0].attempt == 3


def test_crashes_of_one_kind_in_a_row_stop_the_study(machine, tmp_path):
    here = machine()
    (tmp_path / "broken" / "orbax").mkdir(parents=True)
    (tmp_path / "broken" / "orbax" / "__init__.py").write_text("raise ImportError('broken by hand')\n")
    broken = {"PYTHONPATH": str(tmp_path / "broken")}
    limits = ("study.n_trials=50", "execution.max_attempts=1", "execution.max_failures=3")
    output = here.run(*SHORT, *limits, code=2, environment=broken)
    assert "stopped after 3 failures in a row of the same kind" in output.replace("\n", " ")
    assert sorted(here.leases()) == [0, 1, 2]


def test_two_trials_that_are_too_big_together_run_one_after_the_other(machine, finished):
    """With --workers 2 each gets half of the memory; who may need more waits until nothing else runs."""
    here = machine()
    budget = memory.upper_guess(finished.records()[0].config) * 3 // 2
    running = here.start(*LONG, "study.n_trials=2", f"execution.memory={budget}", options=("--workers", "2"))
    wait_for(here.first_steps, running=running)
    assert list(here.leases()) == [0] and len(running.workers()) == 1


def test_a_worker_that_is_asked_to_stop_with_its_first_job_gives_the_trial_back(finished, tmp_path):
    """A worker for a GPU imports JAX before it looks at its jobs, and the request may be there by then."""
    study = study_file.read_study(finished.folder)
    record = finished.records()[0]
    job = Job(
        spec=study.spec, config=record.config, number=7, attempt=1, params=record.params, entry=None, note="",
        training="", study_folder=tmp_path / "study", data_root=finished.root / "data", memory_limit=None,
    )  # fmt: skip
    command = [sys.executable, "-m", "fintx.run.worker", "--gpu", "0"]
    output = subprocess.run(
        command, input=f"[{job.model_dump_json()}]\nstop\n", env={**ENVIRONMENT, "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert output.returncode == 0, output.stderr[-2000:]
    events = [json.loads(line)["event"] for line in output.stdout.splitlines()]
    assert events[0] == "ready" and events[-1] == "interrupted"
