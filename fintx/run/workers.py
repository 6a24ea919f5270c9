"""Worker processes: a pool that starts them, sends them jobs, reads their events and reports the dead and the hung.

A worker trains one assignment, the jobs of a line, and may have a second one that waits behind it. When it dies, the
jobs that trained are reported as such; those that waited had no part in it and are given back.

The processes that a launcher starts on several hosts train as one:

    process 0    coordinator ────── worker --hosts ──┐
    process 1    follow_group() ─── worker --follow ─┼── one mesh; process 0's worker sends each job and each decision
    process 2    follow_group() ─── worker --follow ─┘

Process 0 alone speaks to the storage and writes. The workers belong together: when one dies, JAX ends the others, each
is started again beside the coordinator's next one, and the trial goes on from its last saved step. At the end of the
run the coordinator's process dismisses all others.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from fintx.config.schema import Choices, StudySpec
from fintx.data import features
from fintx.errors import FintxError
from fintx.model import param_count
from fintx.run.job import ENDS, JOINED, LEAVE, RECALL, STOP
from fintx.study import environment
from fintx.train import memory
from fintx.train.multihost import ProcessPlace

_FREEZE_S = 5.0
"""A coordinator that was not run for longer than this (a stopped process, a suspended machine) blames no worker."""
_PIPE = 1 << 20
"""Bytes that the coordinator can write without waiting for a worker that is still starting, or frozen: a population's
jobs take some tens of thousands. Linux only; elsewhere it is the system's own size."""
_PATIENCE_S = 3600.0
"""How long a host waits for process 0's worker, which may wait for a database, or may have ended without notice."""
_DISMISSAL_S = 120.0
_COMMAND = (sys.executable, "-m", "fintx.run.worker")


@dataclass(eq=False)
class Worker:
    """A place for a worker process, which is started when it gets jobs."""

    cores: tuple[int, ...]
    """Cores that it may use; empty: all."""
    gpus: tuple[int, ...]
    """GPUs that it sees; empty: all."""
    process: subprocess.Popen[bytes] | None = None
    log: IO[bytes] | None = None
    """What it prints before its first job."""
    assigned: list[set[str]] = field(default_factory=list)
    """Tickets of the jobs that it trains, and of those that wait behind them, without those that have ended."""
    ready: bool = False
    """It waits for a job; a worker whose job ended may be about to end itself."""
    stopping: bool = False
    """It has been asked to save and end."""
    last_event: float = 0.0
    """Its time, on the monotonic clock."""
    unread: bytes = field(default=b"", repr=False)
    """The beginning of a line."""

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
    """What a worker reported of a job, or what became of it."""

    worker: Worker
    ticket: str
    kind: str
    """loaded, progress, epoch, warning; or how the job ended: one of `job.ENDS`."""
    values: dict[str, Any]


class Pool:
    """A fixed number of workers."""

    def __init__(self, n: int, *, gpus: int, hosts: bool = False):
        """
        Args:
            n: workers; they share out the cores, and `gpus` of them where there are any.
            hosts: the one worker trains together with those of the launch's other processes.
        """
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        if n == 1 or len(cores) < n:  # it has them all, or they share them all
            cores = []
        n_gpus = gpus // n if n > 1 else 0
        self._hosts = hosts
        self.workers = [
            Worker(cores=tuple(cores[i::n]), gpus=tuple(range(i * n_gpus, (i + 1) * n_gpus))) for i in range(n)
        ]
        self._selector = selectors.DefaultSelector()
        self._polled = time.monotonic()

    def send(self, worker: Worker, jobs: str, tickets: Iterable[str]) -> None:
        """Hand jobs (a line of JSON) to a worker that is free, or that takes one more assignment."""
        assert worker.free or worker.takes_one_more
        if worker.process is None:
            self._start(worker)
        if not worker.busy:
            worker.ready, worker.last_event = False, time.monotonic()
        worker.assigned.append(set(tickets))
        self._write(worker, jobs)  # if it died meanwhile, the next poll reports it

    def leave(self, worker: Worker, ticket: str) -> None:
        """Make a worker give up one of the jobs that it trains; the others go on."""
        self._write(worker, f"{LEAVE}{ticket}")

    def recall(self, worker: Worker) -> None:
        """Make a worker give back the jobs that wait, if they still do when their turn comes."""
        for ticket in sorted(set().union(*worker.assigned[1:])):
            self._write(worker, f"{RECALL}{ticket}")

    def _write(self, worker: Worker, line: str) -> None:
        assert worker.process is not None and worker.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            worker.process.stdin.write(line.encode() + b"\n")
            worker.process.stdin.flush()

    def poll(self, *, wait_s: float, hang_s: dict[Worker, float]) -> list[WorkerEvent]:
        """What happened since the last call.

        Args:
            wait_s: seconds to wait for something to happen.
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
                worker.last_event += frozen
            silent = now - worker.last_event
            if worker.busy and silent > hang_s.get(worker, float("inf")):
                assigned = worker.assigned
                self.kill(worker)
                events += _lost_jobs(worker, assigned, "hung", f"no step for {silent:.0f} s")
        return events

    def stop(self, worker: Worker) -> None:
        """Ask a worker to save its trial, if it has one, and end; asked once."""
        if worker.process is None or worker.process.stdin is None or worker.stopping:
            return
        worker.stopping = True
        self._write(worker, STOP)

    def kill(self, worker: Worker) -> None:
        """End a worker now, whatever it does; a stopped process too."""
        if worker.process is not None:
            worker.process.kill()
            self._reap(worker)

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
        command = [*_COMMAND]
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
            worker.last_event = time.monotonic()
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
            assigned, last_line = worker.assigned, _last_line(worker)
            code = self._reap(worker)
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            yield from _lost_jobs(worker, assigned, "died", f"{how} ({last_line})" if last_line else how)

    def _reap(self, worker: Worker) -> int:
        """Wait for a worker that ends, and forget it; its exit code."""
        assert worker.process is not None and worker.log is not None
        assert worker.process.stdout is not None and worker.process.stdin is not None
        code = worker.process.wait()
        with contextlib.suppress(KeyError):
            self._selector.unregister(worker.process.stdout)
        worker.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            worker.process.stdin.close()
        worker.log.close()
        worker.process = worker.log = None
        worker.assigned, worker.ready = [], False
        return code


def _lost_jobs(worker: Worker, assigned: list[set[str]], kind: str, text: str) -> list[WorkerEvent]:
    """What a worker's end means for its jobs; it is one failure, however many it trained."""
    training, *waiting = assigned or [set()]
    lost = [
        WorkerEvent(worker, ticket, kind, {"text": text, "beside": place > 0})
        for place, ticket in enumerate(sorted(training))
    ]
    returned = {"text": f"its worker {kind} before its turn"}
    return lost + [
        WorkerEvent(worker, ticket, "returned", returned) for tickets in waiting for ticket in sorted(tickets)
    ]


def _last_line(worker: Worker) -> str:
    """Of what it printed before its first job."""
    if worker.log is None:
        return ""
    worker.log.seek(0, os.SEEK_END)
    worker.log.seek(max(0, worker.log.tell() - 2000))
    lines = worker.log.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else ""


# --- several hosts ----------------------------------------------------------------------------------------------------


def follow_group(place: ProcessPlace, *, should_stop: Callable[[], bool]) -> None:
    """What every process of a launch but the first does: keep a following worker until the run is over.

    Args:
        should_stop: true ends it as soon as process 0's worker, which is asked to stop too, has saved the trial.

    Raises:
        FintxError: no worker of process 0 was reached for an hour.
    """
    waiting_since = time.monotonic()
    while not should_stop():
        code, joined = None, False
        with subprocess.Popen(
            [*_COMMAND, "--follow"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        ) as process:
            assert process.stdout is not None
            os.set_blocking(process.stdout.fileno(), False)
            try:
                while code is None and (joined or not should_stop()):
                    time.sleep(0.2)
                    code = process.poll()
                    joined = joined or JOINED in (process.stdout.read() or b"")
            finally:
                process.kill()
        if code == 0:
            return
        if joined:
            waiting_since = time.monotonic()
        elif time.monotonic() - waiting_since > _PATIENCE_S:
            where = f" at {place.address}" if place.address else ""
            raise FintxError(f"{place}: no answer{where}; does process 0 run, and can it be reached?")


def dismiss_group(place: ProcessPlace) -> None:
    """Tell the launch's other processes that the run is over; those that can't be reached are left alone."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [*_COMMAND, "--dismiss"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=_DISMISSAL_S,
        )  # fmt: skip


# --- GPUs -------------------------------------------------------------------------------------------------------------


def keep_off_the_gpus() -> None:
    """For the coordinator, which only counts shapes: JAX would take most of a GPU's memory from the workers."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def gpu_bytes() -> tuple[int, ...]:
    """Memory of each NVIDIA GPU that this process may use, from the driver: JAX would allocate it to tell."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    lines = answer.stdout.split("\n") if answer.returncode == 0 else []
    # A GPU that shares the host's memory reports none.
    present = tuple(2**20 * int(line) if line.strip().isdigit() else 0 for line in lines if line.strip())
    visible = environment.visible_gpus()
    if visible is None or not present:
        return present
    by_index = {str(index): n_bytes for index, n_bytes in enumerate(present)}
    return tuple(by_index.get(name, min(present)) for name in visible)  # by name: which of them it is doesn't matter


def workers_that_fit(specs: Sequence[StudySpec], gpu_bytes: Sequence[int]) -> int:
    """Workers for a machine's GPUs (memory of each): as many as the largest trial of any study leaves room for."""
    if len(gpu_bytes) < 2:
        return 1
    return min(len(gpu_bytes) // _gpus_per_trial(spec, gpu_bytes) for spec in specs)


def _gpus_per_trial(spec: StudySpec, gpu_bytes: Sequence[int]) -> int:
    n_features = len(features.resolve(spec.data.features, context=spec.data.context))
    shapes = param_count.feasible_shapes(spec.architecture, spec.budget, [spec.model], n_features)
    searched = spec.space.get("train.batch_size")
    batch_sizes = searched.choices if isinstance(searched, Choices) else (spec.train.batch_size,)
    if not shapes:  # reported when the study begins
        return len(gpu_bytes)
    largest = max(shapes, key=lambda shape: param_count.count_params(spec.model, shape, n_features).total)
    return memory.fewest(
        spec.mesh, spec.model, largest, n_features,
        batch_size=max(int(size) for size in batch_sizes), n_devices=len(gpu_bytes),
        device_bytes=int(memory.OF_A_GPU * min(gpu_bytes)),
    )  # fmt: skip
