"""How do contestants take turns? Each is a process of its own, told over a pipe to work, and silent while others do."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any


class Contestant:
    """The driver's side: a process that answers each line of JSON with one."""

    def __init__(self, python: str, script: Path, *, cores: Sequence[int], environment: dict[str, str] | None = None):
        env = {**os.environ, **(environment or {})}
        command = [python, str(script), ",".join(map(str, cores))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def ask(self, what: str, **values: Any) -> dict[str, Any]:
        """Send an order and wait for the answer.

        Raises:
            RuntimeError: it failed; what it printed is on stderr.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"what": what, **values}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{what}: the contestant died with code {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{what}: {answer['error']}")
        return answer

    @contextlib.contextmanager
    def limited(self, seconds: float) -> Iterator[None]:
        """Kill it after so long: what it is asked meanwhile then fails as `ask` says."""
        timer = threading.Timer(max(0.0, seconds), self._process.kill)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # killed, with an order unread
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve(orders: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """The contestant's side: answer orders until there are no more. Call it once all threads are set up."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = orders[order.pop("what")](**order)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def timed(work: Callable[[], None]) -> dict[str, Any]:
    """Seconds by the clock, and of all this process's threads."""
    began, cpu_began = time.perf_counter(), time.process_time()
    work()
    return {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu_began}


def keep_to_cores() -> int:
    """Before any library starts its threads: the cores that the driver names, and how many they are."""
    cores = {int(core) for core in sys.argv[1].split(",")}
    os.sched_setaffinity(0, cores)
    os.environ["OMP_NUM_THREADS"] = str(len(cores))
    return len(cores)
