"""A worker that is asked to stop gives back what it holds, also what it has not begun."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fintx import sweepfile
from fintx.study import records, trial
from tests.faults.machine import ENVIRONMENT


@pytest.mark.slow
def test_a_job_that_comes_together_with_a_request_to_stop_is_given_back(tiny_study, tiny_file, tmp_path):
    record = records.read_all(tiny_study)[0]
    job = trial.Job(
        spec=sweepfile.load(tiny_file), config=record.config, number=0, attempt=1, params=record.params, entry=None,
        note="", training="", study_folder=tmp_path / "tiny", data_root=tiny_study.parents[1] / "data",
        memory_limit=None,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "fintx.study.worker"], input=f"{job.model_dump_json()}\nstop\n", text=True,
        capture_output=True, env=ENVIRONMENT, timeout=600,
    )  # fmt: skip
    events = [json.loads(line)["event"] for line in done.stdout.splitlines()]
    assert done.returncode == 0 and events[-1] == "interrupted", (events, done.stderr[-2000:])
    assert not list(tmp_path.rglob("record.json"))
