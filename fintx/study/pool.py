"""How are worker processes kept? Started, given jobs, listened to, stopped; the dead and the hung are reported."""

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
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from fintx.study import allocator
from fintx.study.worker import STOP

_FREEZE_S = 5.0
"""A coordinator that was not run for longer than this (a stopped process, a suspended machine) blames no worker."""


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
    busy: bool = False
    ready: bool = False
    """It waits for a job; a worker whose job ended may be about to end itself."""
    stopping: bool = False
    """It has been asked to save and end."""
    heard: float = 0.0
    """When it last made progress, on the monotonic clock."""
    unread: bytes = field(default=b"", repr=False)

    @property
    def free(self) -> bool:
        """Whether a job may be sent."""
        return not self.busy and (self.process is None or self.ready)

    @property
    def pid(self) -> int:
        """0: not started."""
        return self.process.pid if self.process else 0


@dataclass(frozen=True)
class Event:
    """What a worker said, or what became of it."""

    worker: Worker
    kind: str
    """loaded, progress, epoch, warning; and how a job ended: one of `ENDS`."""
    values: dict[str, Any]


ENDS = ("done", "interrupted", "superseded", "mistake", "failed", "died", "hung")


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

    def send(self, worker: Worker, job: str) -> None:
        """Hand a job (a line of JSON) to an idle worker."""
        assert worker.free
        if worker.process is None:
            self._start(worker)
        assert worker.process is not None and worker.process.stdin is not None
        worker.busy, worker.ready, worker.heard = True, False, time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it died meanwhile: the next poll says so
            worker.process.stdin.write(job.encode() + b"\n")
            worker.process.stdin.flush()

    def poll(self, *, wait_s: float, hang_s: dict[Worker, float]) -> list[Event]:
        """What happened, waiting for something at most so long.

        Args:
            hang_s: seconds that each busy worker may be silent before it is killed.
        """
        events: list[Event] = []
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
                self.kill(worker)
                events.append(self._ended(worker, "hung", text=f"no step for {silent:.0f} s"))
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
        with contextlib.suppress(BrokenPipeError):
            worker.process.stdin.write(f"{STOP}\n".encode())
            worker.process.stdin.flush()

    def kill(self, worker: Worker) -> None:
        """End a worker now, whatever it does; a stopped process too."""
        if worker.process is not None:
            worker.process.kill()
            worker.process.wait()
            self._forget(worker)
        worker.busy = worker.ready = False

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
        command = [sys.executable, "-m", "fintx.study.worker"]
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
            env=allocator.environment(),
        )
        assert worker.process.stdout is not None
        os.set_blocking(worker.process.stdout.fileno(), False)
        worker.unread, worker.stopping = b"", False
        self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def _read(self, worker: Worker) -> Iterator[Event]:
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
            elif kind in ENDS:
                yield self._ended(worker, kind, **values)
            else:
                yield Event(worker, kind, values)
        if chunk == b"":  # end of file; None: nothing to read now
            yield from self._buried(worker)

    def _buried(self, worker: Worker) -> Iterator[Event]:
        assert worker.process is not None
        code, was_busy, said = worker.process.wait(), worker.busy, _last_line(worker)
        self._forget(worker)
        if was_busy:
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            yield self._ended(worker, "died", text=f"{how}{f' ({said})' if said else ''}")

    def _ended(self, worker: Worker, kind: str, **values: Any) -> Event:
        worker.busy = worker.ready = False
        return Event(worker, kind, values)

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


def n_gpus() -> int:
    """NVIDIA GPUs of this machine, asked of the driver: JAX would take their memory to tell."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return done.stdout.count("GPU ") if done.returncode == 0 else 0


def _shares(n: int) -> list[tuple[int, ...]]:
    """The cores that this process may use, shared out; more workers than cores share them all."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if n == 1 or len(cores) < n:
        return [()] * n
    return [tuple(cores[i::n]) for i in range(n)]


def _last_line(worker: Worker) -> str:
    if worker.log is None:
        return ""
    worker.log.seek(0, os.SEEK_END)
    worker.log.seek(max(0, worker.log.tell() - 2000))
    lines = worker.log.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else ""
