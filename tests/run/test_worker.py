"""A worker with a second line of jobs: it compiles them while it trains, and gives back what never began."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fintx.config.schema import Shape
from fintx.run.job import LEAVE, RECALL, STOP, Job, Jobs
from fintx.study import records, study_file

pytestmark = pytest.mark.slow  # every test starts processes that import JAX and compile

ROOT = Path(__file__).parents[2]
WATCHED = """
import sys, threading
import jax
from fintx.run import worker

def note(event, seconds, fun_name="", **_):
    if event == "/jax/core/compile/backend_compile_duration":
        with open(LOG, "a") as file:
            file.write(f"{threading.current_thread() is threading.main_thread()} {fun_name}\\n")

jax.monitoring.register_event_duration_secs_listener(note)
worker.main()
"""
"""A worker that writes down what each thread compiles."""
PROGRAMS = ["jit(forward)", "jit(segment)", "jit(start)"]


class Worker:
    """A worker process, as the pool sees it."""

    def __init__(self, folder: Path):
        self.log = folder / "compiled"
        script = WATCHED.replace("LOG", repr(str(self.log)))
        command = [sys.executable, "-c", script]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
        )
        self.events: list[dict[str, Any]] = []

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def send(self, *jobs: Job) -> None:
        self.say(Jobs.dump_json(jobs).decode())

    def hear(self, event: str, ticket: str | None = None) -> dict[str, Any]:
        """The next such event; what comes before it is kept."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == event and self.events[-1].get("ticket") == ticket:
                return self.events[-1]
        raise AssertionError(f"no {event} of {ticket}; {self.events[-5:]}")

    def end(self) -> int:
        """Wait for its end, hearing the rest."""
        assert self.process.stdout is not None
        self.events += map(json.loads, self.process.stdout)
        return self.process.wait(timeout=120)

    def ends(self) -> dict[str, str]:
        """Ticket → how its job ended."""
        kinds = ("done", "interrupted", "superseded", "mistake", "failed")
        return {event["ticket"]: event["event"] for event in self.events if event["event"] in kinds}

    def compiled(self, *, by_main: bool) -> list[str]:
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return sorted(name for thread, name in lines if thread == str(by_main))


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    started = Worker(tmp_path)
    yield started
    started.process.kill()
    started.process.communicate()


@pytest.fixture
def make_job(tiny_study: Path, tmp_path: Path) -> Callable[..., Job]:
    """Jobs of the tiny study, by number, in a folder of their own."""
    study, record = study_file.read_study(tiny_study), records.read_all(tiny_study)[0]
    assert study is not None

    def make(number: int, *, n_heads: int = 1, max_epochs: int = 2, population_size: int = 1) -> Job:
        shape = Shape(d_model=8, n_layers=2, n_heads=n_heads, d_ff=16)
        train = record.config.train.model_copy(update={"max_epochs": max_epochs, "patience": max_epochs})
        config = record.config.model_copy(update={"shape": shape, "train": train, "seed": number})
        return Job(
            spec=study.spec, config=config, number=number, attempt=1, params=record.params, entry=None, note="",
            training="", study_folder=tmp_path / "study", data_root=tiny_study.parents[1] / "data", memory_limit=None,
            population_size=population_size,
        )  # fmt: skip

    return make


LONG = 10**6
"""Epochs of a trial that is asked to stop before its end."""


def test_the_training_thread_compiles_the_first_trial_alone(worker: Worker, make_job: Callable[..., Job]) -> None:
    """Two shapes: what the second needs is compiled by another thread while the first trains, all of it."""
    first, second = make_job(1, max_epochs=20), make_job(2, n_heads=2)
    worker.send(first)
    worker.hear("progress", first.ticket)
    worker.send(second)
    worker.hear("done", second.ticket)
    assert worker.compiled(by_main=True) == worker.compiled(by_main=False) == PROGRAMS
    waits = [records.read(job.folder / "record.json").wait_s for job in (first, second)]
    assert waits[0] is None and waits[1] is not None and waits[1] > 0
    worker.say(STOP)
    assert worker.end() == 0


def test_without_a_line_behind_it_compiles_between_trials(worker: Worker, make_job: Callable[..., Job]) -> None:
    for job in (make_job(1), make_job(2, n_heads=2)):
        worker.send(job)
        worker.hear("done", job.ticket)
        worker.hear("ready")
    assert worker.compiled(by_main=True) == sorted(2 * PROGRAMS) and worker.compiled(by_main=False) == []


def test_a_request_to_stop_gives_back_what_waits(worker: Worker, make_job: Callable[..., Job]) -> None:
    """The first is saved; of the second there is no trace, nor of a crash while its program was being compiled."""
    first, second = make_job(1, max_epochs=LONG), make_job(2, n_heads=2)
    worker.send(first)
    worker.hear("progress", first.ticket)
    worker.send(second)
    worker.say(STOP)
    assert worker.end() == 0
    assert worker.ends() == {first.ticket: "interrupted", second.ticket: "interrupted"}
    assert list((first.folder / "run" / "fold_0").glob("step_*")) and not second.folder.exists()


def test_what_is_recalled_never_begins_and_what_trains_ends_well(worker: Worker, make_job: Callable[..., Job]) -> None:
    first, second = make_job(1, max_epochs=60), make_job(2)
    worker.send(first)
    worker.hear("progress", first.ticket)
    worker.send(second)
    worker.say(f"{RECALL}{first.ticket}")  # too late: it trains
    worker.say(f"{RECALL}{second.ticket}")
    worker.hear("interrupted", second.ticket)
    assert worker.ends() == {first.ticket: "done", second.ticket: "interrupted"}
    worker.hear("ready")
    assert not second.folder.exists()


def test_a_superseded_member_leaves_alone(worker: Worker, make_job: Callable[..., Job]) -> None:
    jobs = [make_job(number, max_epochs=30, population_size=3) for number in (1, 2, 3)]
    worker.send(*jobs)
    worker.hear("progress", jobs[2].ticket)
    worker.say(f"{LEAVE}{jobs[1].ticket}")
    worker.hear("superseded", jobs[1].ticket)
    for job in (jobs[0], jobs[2]):
        worker.hear("done", job.ticket) if job.ticket not in worker.ends() else None
    assert not (jobs[1].folder / "record.json").exists()
    assert {job.number: (job.folder / "record.json").is_file() for job in jobs} == {1: True, 2: False, 3: True}
    assert worker.compiled(by_main=True).count("jit(segment)") == 1
