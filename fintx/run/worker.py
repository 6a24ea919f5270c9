"""A worker process: it trains the jobs that it is given, and reports how far they are.

A process of its own, so that a crash, a kill or a hang ends the attempts that it trains and nothing else. Lines come on
stdin and events go to stdout (`job`); whatever libraries print goes to the attempt's log. Jobs that come while others
train wait for their turn and are compiled meanwhile. When stdin ends, the coordinator is gone: the worker saves what it
trains and ends.

On several hosts (`workers` has a picture) the first process's worker serves the jobs, and the others train the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import jax

from fintx.config.schema import TrialConfig
from fintx.data import datasets
from fintx.data.datasets import Dataset
from fintx.errors import DISK_ERRORS, FintxError, as_fintx_error
from fintx.run import trial
from fintx.run.job import JOINED, LEAVE, RECALL, STOP, Job, Jobs
from fintx.run.trial import Ending, Hooks
from fintx.study.locks import Superseded
from fintx.train import multihost
from fintx.train.compilation import locked_cache

_RUN_OVER, _WORKER_OVER = "over", "again"
"""Sent to the other hosts instead of jobs: the run is over; or this worker ends, and another one follows."""


class _Channel:
    """The pipes to the coordinator."""

    def __init__(self) -> None:
        self._events = os.fdopen(os.dup(1), "w", encoding="utf-8")
        self._sending = threading.Lock()
        os.dup2(2, 1)  # a library's print is no event
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        """Of jobs; none: there will be no more."""
        self.stopping = threading.Event()
        self.left: set[str] = set()
        """Tickets of trials that were given to another worker."""
        self.recalled: set[str] = set()
        self.training = False
        self.compiler: threading.Thread | None = None
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in map(str.strip, sys.stdin):
            if line == STOP:
                break
            if line.startswith(LEAVE):
                self.left.add(line.removeprefix(LEAVE))
            elif line.startswith(RECALL):
                self.recalled.add(line.removeprefix(RECALL))
            else:
                self.lines.put(line)
                if self.training:
                    self.compiler = threading.Thread(target=_compile, args=(line,), daemon=True)
                    self.compiler.start()
        self.stopping.set()
        self.lines.put(None)

    def send(self, event: str, **values: Any) -> None:
        """Report an event; if the coordinator is gone, what trains is to be saved."""
        try:
            with self._sending:
                self._events.write(json.dumps({"event": event, **values}) + "\n")
                self._events.flush()
        except BrokenPipeError:
            self.stopping.set()


def main() -> None:
    """Serve jobs until there are no more."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cores", help="CPU cores to use, such as 0,1")
    parser.add_argument("--gpus", help="GPUs to use, such as 0,1")
    parser.add_argument("--hosts", action="store_true", help="train together with the launch's other processes")
    parser.add_argument("--follow", action="store_true", help="be one of those")
    parser.add_argument("--dismiss", action="store_true", help="tell them that the run is over")
    options = parser.parse_args()
    if options.cores:  # before JAX starts its threads, as many as there are cores
        os.sched_setaffinity(0, {int(core) for core in options.cores.split(",")})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the coordinator, which then asks
    if options.follow:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # process 0 says when to stop: all save a trial together
        return _follow()
    if options.dismiss:
        join_hosts()
        multihost.broadcast(_RUN_OVER)
        return
    channel = _Channel()
    signal.signal(signal.SIGTERM, lambda *_: channel.stopping.set())
    faulthandler.enable()
    if options.gpus:
        jax.config.update("jax_cuda_visible_devices", options.gpus)
    if not options.hosts:
        _serve(channel)
        if channel.compiler is not None and channel.compiler.is_alive():
            os._exit(0)  # Python can't end while another thread compiles
        return
    join_hosts()
    try:
        _serve(channel, hosts=True)
        multihost.broadcast(_WORKER_OVER)
    except Exception:
        traceback.print_exc()
        _leave_hosts()


def _serve(channel: _Channel, *, hosts: bool = False) -> None:
    """Train jobs until there are no more, or this process can't be trusted with others; give back the rest.

    Args:
        hosts: train them together with the other hosts; an error ends all their workers.
    """
    channel.send("ready")
    idle_since: float | None = None
    while (line := channel.lines.get()) is not None:
        if channel.stopping.is_set():
            _give_back(channel, line)
            break
        if hosts:
            multihost.broadcast(line)
        sound = _train(channel, line, idle_since, hosts=hosts)
        if hosts and not sound:
            _leave_hosts()
        if not sound or channel.stopping.is_set():
            break
        idle_since = time.perf_counter()
        channel.send("ready")
    while not channel.lines.empty():
        if (line := channel.lines.get()) is not None:
            _give_back(channel, line)


def _give_back(channel: _Channel, line: str) -> None:
    for job in Jobs.validate_json(line):
        channel.send("interrupted", ticket=job.ticket)


def _train(channel: _Channel, line: str, idle_since: float | None, *, hosts: bool) -> bool:
    """Train the jobs of a line side by side; false if this process can't be trusted with others.

    Args:
        hosts: other hosts train them too, and are left in the middle of it by any error.
    """
    jobs = []
    for job in Jobs.validate_json(line):
        if job.ticket in channel.recalled:
            channel.send("interrupted", ticket=job.ticket)
        else:
            jobs.append(job)
    if not jobs:
        return True
    channel.training = True
    unfinished, sound = {job.ticket: job for job in jobs}, True
    try:
        _log_to([job.folder / "run" / f"attempt-{job.attempt}.log" for job in jobs])
        folds = _folds(jobs[0].config, jobs[0].data_root)
        for job in jobs:
            channel.send("loaded", ticket=job.ticket)
        for job, ending in trial.run_trials(jobs, folds, [_hooks(channel, job) for job in jobs], idle_since=idle_since):
            del unfinished[job.ticket]
            sound = _report(channel, job, ending) and sound and not (hosts and isinstance(ending, Exception))
    except Exception as error:
        for place, job in enumerate(unfinished.values()):
            sound = _report(channel, job, error, beside=place > 0) and sound and not hosts
    finally:
        channel.training = False
    return sound


def _hooks(channel: _Channel, job: Job) -> Hooks:
    def on_progress(fold: int, step: int) -> None:
        channel.send("progress", ticket=job.ticket, fold=fold, step=step)
        if job.ticket in channel.left:
            raise Superseded(f"{job.folder} was given to another attempt")

    return Hooks(
        on_epoch=lambda fold, replicate, epoch: channel.send(
            "epoch", ticket=job.ticket, fold=fold, replicate=replicate, epoch=dataclasses.asdict(epoch)
        ),
        on_progress=on_progress,
        on_warning=lambda text: channel.send("warning", ticket=job.ticket, text=text),
        should_stop=channel.stopping.is_set,
    )


def _report(channel: _Channel, job: Job, ending: Ending, *, beside: bool = False) -> bool:
    """Report how a job ended; false if this process can't be trusted after it.

    Args:
        beside: the same error ended another job, and was reported with it.
    """
    match ending:
        case None:
            channel.send("interrupted", ticket=job.ticket)
        case Superseded():
            channel.send("superseded", ticket=job.ticket)
        case FintxError():
            channel.send("mistake", ticket=job.ticket, text=str(ending))
        case OSError() if ending.errno in DISK_ERRORS:
            channel.send("mistake", ticket=job.ticket, text=str(as_fintx_error(ending)))
        case Exception():
            traceback.print_exception(ending)
            sys.stderr.flush()
            first_line = next(iter(str(ending).splitlines()), "")
            text = f"{type(ending).__name__}: {first_line}"
            channel.send("failed", ticket=job.ticket, text=text, beside=beside)
            return False
        case _:
            channel.send("done", ticket=job.ticket)
            # After a device ran out of memory, what it computes next can't be trusted.
            return ending.outcome != "out_of_memory"
    return True


def _compile(line: str) -> None:
    """Compile what waiting jobs will run; an error here comes again, and is reported, when they train."""
    jobs = Jobs.validate_json(line)
    try:
        trial.compile_trials(jobs, _folds(jobs[0].config, jobs[0].data_root))
    except Exception:
        traceback.print_exc()


def _log_to(paths: Sequence[Path]) -> None:
    """From now on all that this process, its libraries and a crash print goes to these attempts' logs: one file."""
    first, *others = paths
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    with first.open("ab") as file:
        os.dup2(file.fileno(), 2)
        os.dup2(file.fileno(), 1)
    for other in others:
        other.unlink(missing_ok=True)
        other.hardlink_to(first)


@dataclass(frozen=True)
class _DataKey:
    """A trial's config, equal to any other that needs the same data."""

    key: str
    root: Path
    config: TrialConfig = field(compare=False)


def _folds(config: TrialConfig, data_root: Path) -> tuple[Dataset, ...]:
    """Cached by content: the trials of a study share their data."""
    parts = [part.model_dump_json() for part in (config.data, config.task, config.split)]
    return _build_folds(_DataKey(json.dumps([*parts, config.model.context_length]), data_root, config))


@locked_cache(kept=4)
def _build_folds(data: _DataKey) -> tuple[Dataset, ...]:
    return datasets.build(data.config, data.root).folds


# --- several hosts ----------------------------------------------------------------------------------------------------


def join_hosts() -> None:
    """Become one of the launch's processes; before anything else is asked of JAX."""
    place = multihost.find_place()
    assert place is not None, "started as one of several, by one of several"
    multihost.initialize(
        address=place.address,
        bind=place.bind,
        n_processes=place.n_processes,
        index=place.index,
        local_device=place.local_device,
    )


def _leave_hosts() -> NoReturn:
    """End at once, out of step with the others: JAX would wait for them, and they for this process."""
    sys.stderr.flush()
    os._exit(1)


def _follow() -> None:
    """Train what process 0 trains until it says that this is over; exit with 1 if another worker is to follow."""

    def leave_with_parent() -> None:
        sys.stdin.read()
        _leave_hosts()

    threading.Thread(target=leave_with_parent, daemon=True).start()
    stdout = os.dup(1)
    os.dup2(2, 1)  # a library's print is no message
    try:
        join_hosts()
        os.write(stdout, JOINED)
        while (line := multihost.broadcast(None)) not in (_RUN_OVER, _WORKER_OVER):
            (job,) = Jobs.validate_json(line)
            trial.follow_trial(job, _folds(job.config, job.data_root))
    except BaseException:
        traceback.print_exc()
        _leave_hosts()
    if line == _WORKER_OVER:
        sys.exit(1)


if __name__ == "__main__":
    main()
