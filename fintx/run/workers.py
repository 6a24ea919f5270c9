"""Worker processes: started, given jobs, listened to, stopped; the dead and the hung are reported.

A worker trains one assignment, the jobs of a line, and may have a second one that waits behind it. When it dies, those
that trained are reported as such; those that waited are given back, for they had no part in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from fintx.config.schema import Choices, StudySpec
from fintx.data import features
from fintx.model import param_count
from fintx.run.job import STOP
from fintx.run.worker import LEAVE, RECALL
from fintx.study import environment
from fintx.train import memory

_FREEZE_S = 5.0
"""A coordinator that was not run for longer than this (a stopped process, a suspended machine) blames no worker."""

_PIPE = 1 << 20
"""Bytes that a worker need not have read (it is still starting, or frozen) before the coordinator has to wait for it:
a population's jobs take some tens of thousands. Linux only; elsewhere it is the system's own size."""


@dataclass(eq=False)
class Worker:
    """One slot: a process that is started when it gets a job and none is there."""

    cores: tuple[int, ...]
    """Empty: all."""
    gpus: tuple[int, ...]
    """Empty: all."""
    process: subprocess.Popen[bytes] | None = None
    log: IO[bytes] | None = None
    """What it prints before its first job."""
    assigned: list[set[str]] = field(default_factory=list)
    """Tickets of the jobs that it trains, and of those that wait behind them; who has ended is out."""
    ready: bool = False
    """It waits for a job; a worker whose job ended may be about to end itself."""
    stopping: bool = False
    """It has been asked to save and end."""
    heard: float = 0.0
    """When it last made progress, on the monotonic clock."""
    unread: bytes = field(default=b"", repr=False)

    @property
    def busy(self) -> bool:
        """Whether it has jobs that have not ended."""
        return bool(self.assigned)

    @property
    def free(self) -> bool:
        """Whether jobs may be sent to be trained at once."""
        return not self.busy and (self.process is None or self.ready)

    @property
    def takes_one_more(self) -> bool:
        """Whether jobs may be sent to wait behind those that train."""
        return len(self.assigned) == 1 and self.process is not None and not self.stopping

    @property
    def pid(self) -> int:
        """0: not started."""
        return self.process.pid if self.process else 0


@dataclass(frozen=True)
class WorkerEvent:
    """What a worker said, or what became of it."""

    worker: Worker
    ticket: str
    """Of the job that it is about."""
    kind: str
    """loaded, progress, epoch, warning; and how a job ended: one of `ENDS`."""
    values: dict[str, Any]


ENDS = ("done", "interrupted", "superseded", "mistake", "failed", "died", "hung", "returned")


class Pool:
    """A fixed number of workers."""

    def __init__(self, n: int, *, gpus: int, hosts: bool = False):
        """
        Args:
            n: workers; they share out the cores, and `gpus` of them where there are any.
            hosts: the workers (it is one) train together with those of the launch's other processes.
        """
        cores, each = _shares(n), gpus // n if n > 1 else 0
        self._hosts = hosts
        self.workers = [Worker(cores=cores[i], gpus=tuple(range(i * each, (i + 1) * each))) for i in range(n)]
        self._selector = selectors.DefaultSelector()
        self._polled = time.monotonic()

    def send(self, worker: Worker, jobs: str, tickets: Iterable[str]) -> None:
        """Hand jobs (a line of JSON) to a worker that is free, or that takes one more assignment."""
        assert worker.free or worker.takes_one_more
        if worker.process is None:
            self._start(worker)
        if not worker.busy:
            worker.ready, worker.heard = False, time.monotonic()
        worker.assigned.append(set(tickets))
        self._say(worker, jobs)  # if it died meanwhile, the next poll says so

    def leave(self, worker: Worker, ticket: str) -> None:
        """Have a worker give up one of the jobs that it trains; the others go on."""
        self._say(worker, f"{LEAVE}{ticket}")

    def recall(self, worker: Worker) -> None:
        """Have a worker give back the jobs that wait, if they still do when their turn comes."""
        for ticket in sorted(set().union(*worker.assigned[1:])):
            self._say(worker, f"{RECALL}{ticket}")

    def _say(self, worker: Worker, line: str) -> None:
        assert worker.process is not None and worker.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            worker.process.stdin.write(line.encode() + b"\n")
            worker.process.stdin.flush()

    def poll(self, *, wait_s: float, hang_s: dict[Worker, float]) -> list[WorkerEvent]:
        """What happened, waiting for something at most so long.

        Args:
            hang_s: seconds that each busy worker may be silent before it is killed.
        """
        events: list[WorkerEvent] = []
        for key, _ in self._selector.select(wait_s) if self._selector.get_map() else ():
            events += self._read(key.data)
        now = time.monotonic()
        frozen = now - self._polled - wait_s
        self._polled = now
        if not self._selector.get_map():
            time.sleep(wait_s)
        for worker in self.workers:
            if frozen > _FREEZE_S:
                worker.heard += frozen
            silent = now - worker.heard
            if worker.busy and silent > hang_s.get(worker, float("inf")):
                assigned = worker.assigned
                self.kill(worker)
                events += _casualties(worker, assigned, "hung", f"no step for {silent:.0f} s")
        return events

    def stop(self) -> None:
        """Ask every worker to save its trial, if it has one, and end."""
        for worker in self.workers:
            self.stop_one(worker)

    def stop_one(self, worker: Worker) -> None:
        """As `stop`, for one worker; asked once."""
        if worker.process is None or worker.process.stdin is None or worker.stopping:
            return
        worker.stopping = True
        self._say(worker, STOP)

    def kill(self, worker: Worker) -> None:
        """End a worker now, whatever it does; a stopped process too."""
        if worker.process is not None:
            worker.process.kill()
            worker.process.wait()
            self._forget(worker)
        worker.assigned, worker.ready = [], False

    def close(self) -> None:
        """End all workers: idle ones by closing their stdin, busy ones by force."""
        for worker in self.workers:
            if worker.process is None:
                continue
            if not worker.busy and worker.process.stdin is not None:
                with contextlib.suppress(BrokenPipeError, ValueError):
                    worker.process.stdin.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.process.wait(timeout=5)
            self.kill(worker)

    # --- one process ---

    def _start(self, worker: Worker) -> None:
        command = [sys.executable, "-m", "fintx.run.worker"]
        if worker.cores:
            command += ["--cores", ",".join(map(str, worker.cores))]
        if worker.gpus:
            command += ["--gpus", ",".join(map(str, worker.gpus))]
        if self._hosts:
            command += ["--hosts"]
        worker.log = tempfile.TemporaryFile()
        # A session of its own: Ctrl-C on the terminal reaches the coordinator alone.
        worker.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=worker.log, start_new_session=True,
            pipesize=_PIPE, env=environment.worker_environment(),
        )  # fmt: skip
        assert worker.process.stdout is not None
        os.set_blocking(worker.process.stdout.fileno(), False)
        worker.unread, worker.stopping = b"", False
        self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def _read(self, worker: Worker) -> Iterator[WorkerEvent]:
        assert worker.process is not None and worker.process.stdout is not None
        while chunk := worker.process.stdout.read(1 << 16):
            worker.unread += chunk
        *lines, worker.unread = worker.unread.split(b"\n")
        for line in lines:
            values = json.loads(line)
            kind = values.pop("event")
            worker.heard = time.monotonic()
            if kind == "ready":
                worker.ready = True
                continue
            ticket = values.pop("ticket")
            if kind in ENDS:
                for tickets in worker.assigned:
                    tickets.discard(ticket)
                worker.assigned = [tickets for tickets in worker.assigned if tickets]
                worker.ready = False
            yield WorkerEvent(worker, ticket, kind, values)
        if chunk == b"":  # end of file; None: nothing to read now
            yield from self._buried(worker)

    def _buried(self, worker: Worker) -> Iterator[WorkerEvent]:
        assert worker.process is not None
        code, assigned, said = worker.process.wait(), worker.assigned, _last_line(worker)
        self._forget(worker)
        worker.assigned, worker.ready = [], False
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        yield from _casualties(worker, assigned, "died", f"{how}{f' ({said})' if said else ''}")

    def _forget(self, worker: Worker) -> None:
        if worker.process is None:
            return
        assert worker.process.stdout is not None and worker.process.stdin is not None
        with contextlib.suppress(KeyError):
            self._selector.unregister(worker.process.stdout)
        worker.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            worker.process.stdin.close()
        if worker.log is not None:
            worker.log.close()
        worker.process = worker.log = None


def keep_off_the_gpus() -> None:
    """For the coordinator, which only counts shapes: JAX would take most of a GPU's memory from the workers."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def _shares(n: int) -> list[tuple[int, ...]]:
    """The cores that this process may use, shared out; more workers than cores share them all."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if n == 1 or len(cores) < n:
        return [()] * n
    return [tuple(cores[i::n]) for i in range(n)]


def _casualties(worker: Worker, assigned: list[set[str]], kind: str, text: str) -> list[WorkerEvent]:
    """What a worker's end means for its jobs; it is one failure, however many it trained."""
    training, *waiting = assigned or [set()]
    died = [
        WorkerEvent(worker, ticket, kind, {"text": text, "beside": place > 0})
        for place, ticket in enumerate(sorted(training))
    ]
    words = f"its worker {kind} before its turn"
    return died + [
        WorkerEvent(worker, ticket, "returned", {"text": words}) for tickets in waiting for ticket in sorted(tickets)
    ]


def _last_line(worker: Worker) -> str:
    if worker.log is None:
        return ""
    worker.log.seek(0, os.SEEK_END)
    worker.log.seek(max(0, worker.log.tell() - 2000))
    lines = worker.log.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else ""


def gpus() -> tuple[int, ...]:
    """Bytes of each NVIDIA GPU that this process may use, asked of the driver: JAX would take their memory to tell."""
    ask = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    lines = done.stdout.split("\n") if done.returncode == 0 else []
    # A GPU that shares the host's memory tells none.
    every = tuple(2**20 * int(line) if line.strip().isdigit() else 0 for line in lines if line.strip())
    names = environment.visible_gpus()
    if names is None or not every:
        return every
    by_index = {str(index): n_bytes for index, n_bytes in enumerate(every)}
    return tuple(by_index.get(name, min(every)) for name in names)  # by name: which of them it is doesn't matter


def filling(specs: Sequence[StudySpec], gpus: Sequence[int]) -> int:
    """Workers that fill a machine's GPUs (bytes of each): as many as the largest trial of any study leaves room for."""
    if len(gpus) < 2:
        return 1
    return min(len(gpus) // _of_a_trial(spec, gpus) for spec in specs)


def _of_a_trial(spec: StudySpec, gpus: Sequence[int]) -> int:
    n_features = len(features.resolve(spec.data.features, context=spec.data.context))
    shapes = param_count.feasible_shapes(spec.architecture, spec.budget, [spec.model], n_features)
    searched = spec.space.get("train.batch_size")
    batch_sizes = searched.choices if isinstance(searched, Choices) else (spec.train.batch_size,)
    if not shapes:  # said when the study begins
        return len(gpus)
    largest = max(shapes, key=lambda shape: param_count.count_params(spec.model, shape, n_features).total)
    return memory.fewest(
        spec.mesh, spec.model, largest, n_features,
        batch_size=max(int(each) for each in batch_sizes), n_devices=len(gpus),
        device_bytes=int(memory.OF_A_GPU * min(gpus)),
    )  # fmt: skip
