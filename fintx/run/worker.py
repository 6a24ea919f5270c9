"""A worker process: it trains the trials that it is handed, and tells how far they are.

A process of its own, so that a crash, a kill or a hang ends the attempts that it trains and nothing else. Each line of
JSON on stdin holds jobs that train together; a line that comes while others train waits for its turn, and is compiled
meanwhile. Events, with the ticket of their job, go as lines of JSON to stdout; whatever libraries print goes to the
attempt's log. When stdin ends the coordinator is gone: the worker saves what it trains and ends. On
several hosts the other workers follow it (group).
"""

from __future__ import annotations

import argparse
import contextlib
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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fintx.run import group
from fintx.run.job import STOP
from fintx.train.compilation import locked_cache

LEAVE, RECALL = "leave ", "recall "
"""Before a ticket: give the trial up though it trains; give it back unless it trains."""


class _Channel:
    """The coordinator's side of the pipes."""

    def __init__(self) -> None:
        self._events = os.fdopen(os.dup(1), "w", encoding="utf-8")
        self._telling = threading.Lock()
        os.dup2(2, 1)  # a library's print is no event
        self.stopping = threading.Event()
        self.left: set[str] = set()
        """Tickets of trials that were given to somebody else."""
        self.recalled: set[str] = set()
        self.busy = False
        self.preparing: threading.Thread | None = None
        self._jobs: queue.SimpleQueue[str | None] = queue.SimpleQueue()
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
                self._jobs.put(line)
                if self.busy:
                    self.preparing = threading.Thread(target=_prepare, args=(line,), daemon=True)
                    self.preparing.start()
        self.stopping.set()
        self._jobs.put(None)

    def next_jobs(self) -> str | None:
        """Waits for them; none: there will be no more."""
        return self._jobs.get()

    def rest(self) -> Iterator[str]:
        """What has come and was not looked at."""
        with contextlib.suppress(queue.Empty):
            while True:
                if (line := self._jobs.get_nowait()) is not None:
                    yield line

    def tell(self, event: str, **values: Any) -> None:
        """Say something; without a coordinator there is nobody to say it to, and the trial is to be saved."""
        try:
            with self._telling:
                self._events.write(json.dumps({"event": event, **values}) + "\n")
                self._events.flush()
        except BrokenPipeError:
            self.stopping.set()


def main() -> None:
    """Serve jobs until there are no more."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--cores", help="CPU cores to use, such as 0,1")
    arguments.add_argument("--gpus", help="GPUs to use, such as 0,1")
    arguments.add_argument("--hosts", action="store_true", help="train together with the launch's other processes")
    arguments.add_argument("--follow", action="store_true", help="be one of those")
    arguments.add_argument("--dismiss", action="store_true", help="send them home")
    given = arguments.parse_args()
    if given.cores:  # before JAX starts its threads, as many as there are cores
        os.sched_setaffinity(0, {int(core) for core in given.cores.split(",")})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the coordinator, who then asks
    if given.follow:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # process 0 says when to stop: a trial is saved by all together
        return group.serve_as_follower(_follow)
    if given.dismiss:
        group.join_group()
        return group.part_group(run_is_over=True)
    channel = _Channel()
    signal.signal(signal.SIGTERM, lambda *_: channel.stopping.set())
    faulthandler.enable()
    if given.gpus:
        import jax

        jax.config.update("jax_cuda_visible_devices", given.gpus)
    if given.hosts:  # whoever is out of step with the others, or died, ends all workers
        group.join_group()
        try:
            _serve_all(channel, together=True)
            group.part_group(run_is_over=False)
        except Exception:
            traceback.print_exc()
            group.leave()
        return
    _serve_all(channel)
    if channel.preparing is not None and channel.preparing.is_alive():
        os._exit(0)  # Python can't end while another thread compiles


def _serve_all(channel: _Channel, *, together: bool = False) -> None:
    """Serve jobs until there are no more, or this process is not to be trusted with others; the rest is given back."""
    channel.tell("ready")
    idle_since: float | None = None
    while (line := channel.next_jobs()) is not None:
        if channel.stopping.is_set():
            _give_back(channel, line)
            break
        if together:
            group.hand_to_group(line)
        trusted = _serve(channel, line, idle_since, together=together)
        if together and not trusted:
            group.leave()
        if not trusted or channel.stopping.is_set():
            break
        idle_since = time.perf_counter()
        channel.tell("ready")
    for line in channel.rest():
        _give_back(channel, line)


def _follow(line: str) -> None:
    from fintx.run import trial
    from fintx.run.job import Jobs

    (job,) = Jobs.validate_json(line)
    trial.follow_trial(job, _folds(job))


def _give_back(channel: _Channel, line: str) -> None:
    """Jobs that never began."""
    from fintx.run.job import Jobs

    for job in Jobs.validate_json(line):
        channel.tell("interrupted", ticket=job.ticket)


def _serve(channel: _Channel, line: str, idle_since: float | None, *, together: bool = False) -> bool:
    """Train jobs side by side; false if this process is not to be trusted with others.

    Args:
        together: other hosts train them too, and are left in the middle of it by whatever ends it early.
    """
    from fintx.run import trial
    from fintx.run.job import Jobs

    jobs = []
    for job in Jobs.validate_json(line):
        if job.ticket in channel.recalled:
            channel.tell("interrupted", ticket=job.ticket)
        else:
            jobs.append(job)
    if not jobs:
        return True
    channel.busy = True
    open_jobs, trusted = {job.ticket: job for job in jobs}, True
    try:
        _log_to([job.folder / "run" / f"attempt-{job.attempt}.log" for job in jobs])
        folds = _folds(jobs[0])
        for job in jobs:
            channel.tell("loaded", ticket=job.ticket)
        for job, ending in trial.run_trials(jobs, folds, [_hooks(channel, job) for job in jobs], idle_since=idle_since):
            del open_jobs[job.ticket]
            trusted = (
                _tell_ending(channel, job, ending) and trusted and not (together and isinstance(ending, Exception))
            )
    except Exception as error:
        for place, job in enumerate(open_jobs.values()):
            trusted = _tell_ending(channel, job, error, beside=place > 0) and trusted and not together
    finally:
        channel.busy = False
    return trusted


def _hooks(channel: _Channel, job: Any) -> Any:
    from fintx.run import trial
    from fintx.study.locks import Superseded

    def on_progress(fold: int, step: int) -> None:
        channel.tell("progress", ticket=job.ticket, fold=fold, step=step)
        if job.ticket in channel.left:
            raise Superseded(f"{job.folder} was given to another attempt")

    def on_epoch(fold: int, replicate: int, epoch: Any) -> None:
        values = dataclasses.asdict(epoch)
        channel.tell("epoch", ticket=job.ticket, fold=fold, replicate=replicate, epoch=values)

    return trial.Hooks(
        on_epoch=on_epoch,
        on_progress=on_progress,
        on_warning=lambda text: channel.tell("warning", ticket=job.ticket, text=text),
        should_stop=channel.stopping.is_set,
    )


def _tell_ending(channel: _Channel, job: Any, ending: Any, *, beside: bool = False) -> bool:
    """Say how a job ended; false if the process is not to be trusted after it.

    Args:
        beside: the ending was another job's too, which told of it.
    """
    from fintx.errors import DISK_ERRORS, FintxError
    from fintx.study.locks import Superseded

    match ending:
        case Superseded():
            channel.tell("superseded", ticket=job.ticket)
        case FintxError():
            channel.tell("mistake", ticket=job.ticket, text=str(ending))
        case OSError() if ending.errno in DISK_ERRORS:
            where = f"{ending.filename}: " if ending.filename else ""
            words = f"{where}{os.strerror(ending.errno or 0)}; fix that, and the same command continues"
            channel.tell("mistake", ticket=job.ticket, text=words)
        case Exception():
            traceback.print_exception(ending)
            sys.stderr.flush()
            first = next(iter(str(ending).splitlines()), "")
            channel.tell("failed", ticket=job.ticket, text=f"{type(ending).__name__}: {first}", beside=beside)
            return False
        case None:
            channel.tell("interrupted", ticket=job.ticket)
        case _:
            channel.tell("done", ticket=job.ticket)
            # After a device ran out of memory, what it computes next is not to be trusted.
            return ending.outcome != "out_of_memory"
    return True


def _prepare(line: str) -> None:
    """Compile, in a thread of its own, what jobs that wait will run; what fails here fails again where it is told."""
    from fintx.run import trial
    from fintx.run.job import Jobs

    jobs = Jobs.validate_json(line)
    try:
        trial.compile_trials(jobs, _folds(jobs[0]))
    except Exception:
        traceback.print_exc()


def _log_to(paths: list[Path]) -> None:
    """All that this process, its libraries and a crash print belongs to these attempts from now on: one file."""
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
class _Asked:
    """A trial's config, equal to any other that asks for the same data."""

    key: str
    root: Path
    config: Any = field(compare=False)


@locked_cache(kept=4)
def _folds_of(asked: _Asked) -> Any:
    from fintx.data import datasets

    return datasets.build(asked.config, asked.root).folds


def _folds(job: Any) -> Any:
    """Cached by content: the trials of a study share their data."""
    config = job.config
    parts = [part.model_dump_json() for part in (config.data, config.task, config.split)]
    return _folds_of(_Asked(json.dumps([*parts, config.model.context_length]), job.data_root, config))


if __name__ == "__main__":
    main()
