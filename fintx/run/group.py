"""The processes that a launcher started, which train as one: the first serves the jobs, the others follow.

    process 0    coordinator ── worker --hosts ─┐
    process 1    follow() ───── worker --follow ┼── one mesh; each job and each decision comes from process 0's worker
    process 2    follow() ───── worker --follow ┘

Process 0 alone speaks to the storage and writes. The workers belong together: when one dies, JAX ends the others, each
is started again beside the coordinator's next one, and the trial goes on from its last saved step. At the end of the
run the coordinator's process sends all others home.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from fintx.errors import FintxError
from fintx.train import multihost
from fintx.train.multihost import ProcessPlace

OVER, AGAIN = "over", "again"
"""Instead of a job: the run is over; this worker is over, and another one follows."""
_JOINED = b"joined\n"
_PATIENCE_S = 3600.0
"""How long a host waits for a worker of process 0; that waits for a database, or ends without a word."""
_DISMISSAL_S = 120.0


def join_group() -> None:
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


def hand_to_group(job: str) -> None:
    """Hand a job to the others, who wait for it in `serve_as_follower`."""

    multihost.broadcast(job)


def part_group(*, run_is_over: bool) -> None:
    """End the others' workers too."""
    hand_to_group(OVER if run_is_over else AGAIN)


def leave() -> NoReturn:
    """End at once, out of step with the others: JAX would wait for them, and they for this process."""
    sys.stderr.flush()
    os._exit(1)


def serve_as_follower(train: Callable[[str], None]) -> None:
    """Train what process 0 says, until it says that this is over; exits with 1 if another worker is to follow."""

    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    said = os.dup(1)
    os.dup2(2, 1)  # a library's print is no message
    try:
        join_group()
        os.write(said, _JOINED)
        while (job := multihost.broadcast(None)) not in (OVER, AGAIN):
            train(job)
    except BaseException:
        traceback.print_exc()
        leave()
    if job == AGAIN:
        sys.exit(1)


def _end_with_the_parent() -> None:
    sys.stdin.read()
    leave()


# --- the processes that keep these workers ----------------------------------------------------------------------------


def follow_group(place: ProcessPlace, *, should_stop: Callable[[], bool]) -> None:
    """What `fintx sweep` does on every process but the first: keep a following worker until the run is over.

    Args:
        should_stop: true ends it as soon as process 0's worker, which is asked to stop too, has saved the trial.

    Raises:
        FintxError: no worker of process 0 was reached for an hour.
    """
    since = time.monotonic()
    while not should_stop():
        joined, code = _follow_once(should_stop)
        if code == 0:
            return
        if joined:
            since = time.monotonic()
        elif time.monotonic() - since > _PATIENCE_S:
            where = f" at {place.address}" if place.address else ""
            raise FintxError(f"{place}: nobody answers{where}; does process 0 run, and can it be reached?")
        time.sleep(0.2)


def _follow_once(should_stop: Callable[[], bool]) -> tuple[bool, int]:
    """One following worker: whether it met the others, and its exit code."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fintx.run.worker", "--follow"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    joined = threading.Event()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line == _JOINED:
                joined.set()

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=0.2)
                listener.join()
                return joined.is_set(), code
            if should_stop() and not joined.is_set():
                return False, 0
    finally:
        process.kill()
        process.wait()


def dismiss(place: ProcessPlace) -> None:
    """Send the other processes home, wherever they stand; whoever can't be reached stays."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [sys.executable, "-m", "fintx.run.worker", "--dismiss"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=_DISMISSAL_S,
        )  # fmt: skip
