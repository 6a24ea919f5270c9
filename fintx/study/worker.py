"""What does a worker process do? It trains the trials it is handed, one at a time, and tells how far it is.

A process of its own, so that a crash, a kill or a hang ends one trial's attempt and nothing else. Jobs come as lines of
JSON on stdin, events go as lines of JSON to stdout; whatever libraries print goes to the attempt's log. When stdin ends
the coordinator is gone: the worker saves its trial and ends. On several hosts the other workers follow it (group).
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import functools
import json
import os
import queue
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from fintx.study import group

STOP = "stop"


class _Channel:
    """The coordinator's side of the pipes."""

    def __init__(self) -> None:
        self._events = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # a library's print is no event
        self.stopping = threading.Event()
        self._jobs: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in sys.stdin:
            if line.strip() == STOP:
                break
            self._jobs.put(line)
        self.stopping.set()
        self._jobs.put(None)

    def next_job(self) -> str | None:
        """Waits for it; none: there will be no more."""
        return self._jobs.get()

    def tell(self, event: str, **values: Any) -> None:
        """Say something; without a coordinator there is nobody to say it to, and the trial is to be saved."""
        try:
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
        group.join()
        return group.part(run_is_over=True)
    channel = _Channel()
    signal.signal(signal.SIGTERM, lambda *_: channel.stopping.set())
    faulthandler.enable()
    if given.gpus:
        import jax

        jax.config.update("jax_cuda_visible_devices", given.gpus)
    if given.hosts:
        group.join()
        return _lead(channel)
    channel.tell("ready")
    # A job that came with the request to stop is served too: it saves and is given back, and is not taken for a crash.
    while (line := channel.next_job()) is not None and _serve(channel, line) and not channel.stopping.is_set():
        channel.tell("ready")


def _lead(channel: _Channel) -> None:
    """Serve jobs together with the other hosts; whoever is out of step with them, or died, ends all workers."""
    try:
        channel.tell("ready")
        while (line := channel.next_job()) is not None:
            group.lead(line)
            if not _serve(channel, line, together=True):
                group.leave()
            if channel.stopping.is_set():
                break
            channel.tell("ready")
        group.part(run_is_over=False)
    except Exception:
        traceback.print_exc()
        group.leave()


def _follow(line: str) -> None:
    from fintx.study import trial

    job = trial.Job.model_validate_json(line)
    trial.follow(job, _folds(*_data_of(job)))


def _serve(channel: _Channel, line: str, *, together: bool = False) -> bool:
    """Train one trial; false if this process is not to be trusted with another.

    Args:
        together: other hosts train it too, and are left in the middle of it by whatever ends it early.
    """
    from fintx.study import trial
    from fintx.study.lock import Superseded
    from fintx.types import DISK_ERRORS, FintxError

    job = trial.Job.model_validate_json(line)
    hooks = trial.Hooks(
        on_epoch=lambda fold, epoch: channel.tell("epoch", fold=fold, epoch=dataclasses.asdict(epoch)),
        on_progress=lambda fold, step: channel.tell("progress", fold=fold, step=step),
        on_warning=lambda text: channel.tell("warning", text=text),
        should_stop=channel.stopping.is_set,
    )
    try:
        _log_to(job.folder / "run" / f"attempt-{job.attempt}.log")
        folds = _folds(*_data_of(job))
        channel.tell("loaded")
        record = trial.run(job, folds, hooks)
    except Superseded:
        channel.tell("superseded")
    except FintxError as error:
        channel.tell("mistake", text=str(error))
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            return _failed(channel, error)
        where = f"{error.filename}: " if error.filename else ""
        channel.tell(
            "mistake", text=f"{where}{os.strerror(error.errno or 0)}; mend that, and the same command continues"
        )
    except Exception as error:
        return _failed(channel, error)
    else:
        channel.tell("interrupted" if record is None else "done")
        # After a device ran out of memory, what it computes next is not to be trusted.
        return record is None or record.outcome != "out_of_memory"
    return not together


def _failed(channel: _Channel, error: Exception) -> bool:
    traceback.print_exc()
    sys.stderr.flush()
    first = next(iter(str(error).splitlines()), "")
    channel.tell("failed", text=f"{type(error).__name__}: {first}")
    return False


def _log_to(path: Path) -> None:
    """All that this process, its libraries and a crash print belongs to the attempt from now on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 2)
        os.dup2(file.fileno(), 1)


def _data_of(job: Any) -> tuple[Any, ...]:
    return job.config.data, job.config.task, job.config.split, job.config.model.context_length, job.data_root


@functools.lru_cache(maxsize=4)
def _folds_of(key: str, root: Path) -> Any:
    from fintx.config import DataConfig, SplitConfig, TaskConfig
    from fintx.data import windows

    data, task, split, context_length = json.loads(key)
    return windows.build(
        DataConfig.model_validate_json(data),
        TaskConfig.model_validate_json(task),
        SplitConfig.model_validate_json(split),
        context_length=context_length,
        root=root,
    ).folds


def _folds(data: Any, task: Any, split: Any, context_length: int, root: Path) -> Any:
    """Cached by content: the trials of a study share their data."""
    parts = [config.model_dump_json() for config in (data, task, split)]
    return _folds_of(json.dumps([*parts, context_length]), root)


if __name__ == "__main__":
    main()
