"""SIGKILL at any moment of a save leaves the state before it, or the new one: whole, and never damaged."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from fintx.config.schema import TrialConfig
from fintx.data.datasets import Dataset
from fintx.train.resume import CheckpointManager, CheckpointPolicy, TrainingState
from fintx.train.train_state import BatchLayout, FitInputs, Progress, Timing, abstract_state, static_config
from fintx.train.train_step import EpochSums

Trials = Callable[..., TrialConfig]
Datasets = Callable[..., Dataset]
KILLS = 40
WIDE = {"shape.d_model": 64, "shape.d_ff": 256}
"""Half a million bytes of state: there is something to be in the middle of."""


def filled(config: TrialConfig, step: int) -> TrainingState:
    """A state whose every number is its step."""
    abstract = abstract_state(static_config(config), n_features=3)
    return TrainingState(
        state=jax.tree.map(lambda leaf: np.full(leaf.shape, step, leaf.dtype), abstract),
        sums=EpochSums(),
        progress=Progress(),
        batch_layout=BatchLayout(16),
        timing=Timing(),
    )


def save_for_ever(config: TrialConfig, data: Dataset, folder: Path) -> None:
    """Says which step is on the disk, one a line, and saves the next."""
    manager = CheckpointManager(CheckpointPolicy(folder, 0.0, lambda: None), FitInputs(config, data, "log_loss"))
    newest = manager.newest(lambda line: print(line, flush=True))
    step = 0 if newest is None else newest.step
    while True:
        print("saved", step, flush=True)
        step += 1
        manager.save(filled(config, step))


def serve(config: TrialConfig, data: Dataset, folder: Path) -> None:
    """A fresh process per line of the input: forked, since Python and JAX take seconds to begin. Forks start JAX."""
    import orbax.checkpoint  # noqa: F401

    filled(config, 0)
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            save_for_ever(config, data, folder)
        print("pid", pid, flush=True)
        os.waitpid(pid, 0)
        print("gone", pid, flush=True)


MAIN = """
import sys
from collections.abc import Callable
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import conftest, test_resume_killed
test_resume_killed.serve(conftest.trial(test_resume_killed.WIDE), conftest.dataset(), Path(sys.argv[2]))
"""


def heard(server: subprocess.Popen[str], word: str) -> int:
    """The number behind the next such word; other lines are passed over."""
    assert server.stdout is not None
    for line in server.stdout:
        first, _, rest = line.partition(" ")
        if first == word:
            return int(rest)
    raise AssertionError(f"the saving process ended before it said {word}")


@pytest.mark.slow
def test_killed_in_the_middle_of_a_save(make_trial: Trials, make_dataset: Datasets, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    config, data, folder = make_trial(WIDE), make_dataset(), tmp_path / "states"
    mid_save = 0
    command = [sys.executable, "-c", MAIN, str(Path(__file__).parent), str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as server:
        assert server.stdin is not None
        for _ in range(KILLS):
            print("go", file=server.stdin, flush=True)
            pid = heard(server, "pid")
            committed = [heard(server, "saved") for _ in range(3)][-1]
            # A save takes about a tenth of a second: the signal comes anywhere in the next one, or the one after.
            select.select([], [], [], rng.uniform(0, 0.15))
            os.kill(pid, signal.SIGKILL)
            assert heard(server, "gone") == pid
            mid_save += any(name.startswith(".") for name in os.listdir(folder))
            warnings: list[str] = []
            manager = CheckpointManager(
                CheckpointPolicy(folder, 0.0, lambda: None), FitInputs(config, data, "log_loss")
            )
            newest = manager.newest(warnings.append)
            assert warnings == []
            assert newest is not None and committed <= newest.step
            jax.tree.map(np.testing.assert_array_equal, newest.state, filled(config, newest.step).state)
            assert all(name.startswith("step_") for name in os.listdir(folder))
            assert 1 <= len(os.listdir(folder)) <= 3
        server.stdin.close()
    assert server.returncode == 0
    assert mid_save >= KILLS // 4
