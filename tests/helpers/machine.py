"""A machine as the fault tests see it: real `fintx` processes that are started, stopped, killed and looked into."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fintx.study import records, trial_table
from fintx.study.records import TrialRecord
from fintx.study.trial_table import Lease
from tests.helpers import shared

FINTX = Path(sys.executable).with_name("fintx")
# Not simulated devices, nor compiling as quickly as possible: every process here loads the same few programs from a
# cache, which one of them fills.
_LEFT_OUT = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in _LEFT_OUT}
T = TypeVar("T")
SHORT = ("train.max_epochs=2",)
"""Settings of trials that end at once."""
MEDIUM = ("train.max_epochs=120", "train.patience=120", "execution.checkpoint_s=0.3")
"""Of trials that train for a second or more, and save on the way."""
LONG = ("train.max_epochs=100000", "train.patience=100000", "execution.checkpoint_s=0.2")
"""Of trials that are still training when something happens to them."""


@dataclass
class Running:
    """A `fintx` process and what it has printed."""

    process: subprocess.Popen[str]
    log: Path

    @property
    def output(self) -> str:
        """Both streams, in the order of writing."""
        return self.log.read_text()

    def end(self, *, code: int, timeout_s: float = 300) -> str:
        """Wait for its end; returns its output."""
        exit_code = self.process.wait(timeout=timeout_s)
        assert exit_code == code, (exit_code, self.output[-3000:])
        assert "Traceback" not in self.output, self.output[-3000:]
        return self.output

    def workers(self) -> list[int]:
        """Process ids of its children."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return [int(pid) for pid in children.read_text().split()]
        return []

    def everyone(self, number: signal.Signals) -> None:
        """Send a signal to it and to its workers."""
        for pid in [self.process.pid, *self.workers()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


@dataclass
class Machine:
    """An outputs folder and a data folder of its own."""

    root: Path
    file: Path
    study: str = "tiny"
    started: list[Running] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The study's."""
        return self.root / "outputs" / self.study

    def start(
        self,
        *changes: str,
        command: str = "sweep",
        options: tuple[object, ...] = (),
        before: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
    ) -> Running:
        """`fintx COMMAND FILE --set CHANGE …`, on its way.

        Args:
            before: a command that runs it, such as `unshare …`.
            environment: variables beside the usual ones.
        """
        data = shared.data_root(self.root / "data")
        places = ["--outputs", self.root / "outputs", "--data-dir", data]
        settings = [part for change in changes for part in ("--set", change)]
        log = self.root / f"log-{len(self.started)}"
        with log.open("w") as out:
            process = subprocess.Popen(
                [*before, FINTX, command, self.file, *places, *settings, *options],
                stdout=out, stderr=subprocess.STDOUT, text=True, env={**ENVIRONMENT, **(environment or {})},
            )  # fmt: skip
        self.started.append(Running(process, log))
        return self.started[-1]

    def run(self, *changes: str, code: int = 0, timeout_s: float = 300, **how: Any) -> str:
        """The same, to its end."""
        return self.start(*changes, **how).end(code=code, timeout_s=timeout_s)

    def stop(self, running: Running) -> str:
        """`fintx stop`, heard while the only worker stands still: no trial ends before it. Returns its output."""
        (worker,) = running.workers()
        os.kill(worker, signal.SIGSTOP)
        assert not self.records(), "it comes too late for this test"
        done = subprocess.run([FINTX, "stop", self.folder], env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done
        wait_for(lambda: "asked to stop" in running.output, running=running)
        os.kill(worker, signal.SIGCONT)
        return done.stdout

    def leases(self) -> dict[int, Lease]:
        """Trial number → lease, from the journal."""
        return {lease.number: lease for lease in trial_table.read(self.folder)} if self.folder.is_dir() else {}

    def records(self) -> list[TrialRecord]:
        """Those in its folder."""
        return records.read_all(self.folder)

    def steps(self) -> list[Path]:
        """Every training state of every unfinished trial, oldest first."""
        return sorted(self.folder.glob("trials/*/run/fold_*/step_*[0-9]"))

    def numbers(self) -> list[tuple]:
        """What of its trials must not depend on what happened to its processes."""
        return [
            (r.trial_number, r.value, r.params, r.config_hash, [(f.best, f.curve, f.steps) for f in r.folds])
            for r in self.records()
        ]

    def first_steps(self, number: int = 0) -> list[int]:
        """The step that each attempt at a trial went on from."""
        path = records.trial_folder(self.folder, number) / "attempts.jsonl"
        return [json.loads(line)["from_step"] for line in path.read_text().splitlines()] if path.is_file() else []

    def close(self) -> None:
        """Leave nothing running, whatever a test came to."""
        for running in self.started:
            running.everyone(signal.SIGCONT)
            running.everyone(signal.SIGKILL)
            running.process.wait()


@contextlib.contextmanager
def machines(tmp_path: Path, default_file: Path) -> Iterator[Callable[..., Machine]]:
    """Makes machines by name, and cleans up after them."""
    made: dict[str, Machine] = {}

    def make(name: str = "here", *, file: Path | None = None) -> Machine:
        if name not in made:
            made[name] = Machine(tmp_path / name, file or default_file)
        return made[name]

    try:
        yield make
    finally:
        for machine in made.values():
            machine.close()


def wait_for(condition: Callable[[], T], *, running: Running | None = None, timeout_s: float = 300) -> T:
    """Poll a condition until it holds; fails when the process ends first, or after a deadline."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain; {running.output[-2000:] if running else ''}"
        if running is not None and running.process.poll() is not None:
            if value := condition():
                return value
            raise AssertionError(f"ended with {running.process.returncode}: {running.output[-2000:]}")
        time.sleep(0.05)
    return value
