"""Resuming: the states of a training under way on disk, and the newest whole one of them back.

    <folder>/step_00000120/           a training state: a checkpoint of the items `training` and, after an epoch, `best`
    <folder>/step_00000120.damaged/   a state that is not what was saved; `.foreign`: one of another trial
    <folder>/.step_…                  a save that a killed process left half done; the next process removes it

A state is taken between two segments, mid-epoch or after an epoch is evaluated, and holds all that the rest of the
trial depends on: random numbers and batches follow from seed and step. The newest two are kept, since the newest may be
damaged. Nothing is committed, set aside or removed before `CheckpointPolicy.guard` agrees, so that of two workers that
believe they hold a trial only its owner changes it.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fintx.errors import FintxError
from fintx.model import family
from fintx.train import checkpoint, multihost
from fintx.train.checkpoint import CheckpointDamaged, Described, NotACheckpoint
from fintx.train.sharding import Layout
from fintx.train.train_state import (
    BatchLayout,
    FitInputs,
    Progress,
    Timing,
    TrainState,
    abstract_state,
    static_config,
)
from fintx.train.train_step import EpochSums
from fintx.types import Params

KEPT = 2
USUAL_S = 60.0
"""Seconds between cheap saves: a crash loses a minute."""
COST = 50
"""Seconds without a save after one that took a second: saves take at most 2 % of the time."""

_FORMAT = 2
_TRAINING, _BEST = "training", "best"
_STEP = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class CheckpointPolicy:
    """Where a trial's training states lie, and when another is due."""

    folder: Path
    """Of this trial and fold alone; made when needed, removed by the caller."""
    every_s: float | None
    """Seconds between saves; none: 60, or 50 times what the last save took if that is longer."""
    guard: Callable[[], None]
    """Called right before anything is committed; raises if another worker has taken the trial over."""
    at_end: bool = False
    """Save the end too: of a fold that others follow, so that an interruption there doesn't train it again."""


@dataclass(frozen=True, eq=False)
class TrainingState:
    """A trial between two segments, as whole host arrays, on however many devices they lay."""

    state: TrainState
    sums: EpochSums
    progress: Progress
    batch_layout: BatchLayout
    timing: Timing

    @property
    def step(self) -> int:
        """Steps taken."""
        return int(self.state.step)


class CheckpointManager:
    """One trial's states on the disk, while it runs. Of several hosts only the first changes them."""

    def __init__(self, policy: CheckpointPolicy, inputs: FitInputs):
        self._policy = policy
        self._inputs = inputs
        self._since = time.perf_counter()
        self._cost_s = 0.0
        self.saved_step: int | None = None
        """Of the newest state on the disk; none: there is none."""

    def newest(self, warn: Callable[[str], None]) -> TrainingState | None:
        """The newest state that is whole and this trial's; newer ones that aren't are set aside, with a warning each.

        Raises:
            FintxError: the folder can't be changed.
        """
        state = self._newest(warn) if multihost.is_first() else None
        (step,) = multihost.agree(-1 if state is None else state.step)
        if step >= 0 and not multihost.is_first():
            state = self._read(checkpoint.describe(self._folder(step)))
        return state

    def _newest(self, warn: Callable[[str], None]) -> TrainingState | None:
        try:
            self._remove_leftovers()
            state, problems = self._newest_whole()
        except OSError as error:
            raise FintxError(
                f"{self._policy.folder}: could not be tidied up: {error.strerror}; fix that and run again"
            ) from error
        self.saved_step = None if state is None else state.step
        for problem in problems:
            warn(f"{problem}; training goes on from step {0 if state is None else state.step}")
        return state

    def start_clock(self) -> None:
        """Training begins now: time spent compiling counts towards no save."""
        self._since = time.perf_counter()

    def is_due(self) -> bool:
        """Whether it is time for another save."""
        every_s = max(USUAL_S, COST * self._cost_s) if self._policy.every_s is None else self._policy.every_s
        return time.perf_counter() - self._since >= every_s

    def save(self, training: TrainingState) -> None:
        """Commit a state, then remove all but the newest two; does nothing if the step is on the disk already.

        Raises:
            FintxError: the disk is full or can't be written; older states are as they were.
        """
        if training.step == self.saved_step or not multihost.is_first():
            return
        began = time.perf_counter()
        items = {_TRAINING: _as_dicts((training.state, training.sums))}
        progress = training.progress
        if progress.params is not None:
            assert progress.outputs is not None
            items[_BEST] = {"params": progress.params, "outputs": progress.outputs}
        meta = {
            "trial": self._identity(),
            "step": training.step,
            "progress": progress.to_json(),
            "arrangement": dataclasses.asdict(training.batch_layout),  # the name that version 0.1 wrote
            **dataclasses.asdict(training.timing),
        }
        folder = self._folder(training.step)
        try:
            checkpoint.write(folder, items, config=self._inputs.config, meta=meta, guard=self._policy.guard)
        except FintxError:
            self._policy.guard()  # the trial's new owner may have removed this save: then the disk is not to blame
            raise
        self.saved_step = training.step
        for old in self._steps()[KEPT:]:
            _remove(old)
        self._since = time.perf_counter()
        self._cost_s = self._since - began

    def saved_beside_others(self, cost_s: float) -> None:
        """All members of a population were saved, which took `cost_s` seconds."""
        self._since, self._cost_s = time.perf_counter(), cost_s

    def _folder(self, step: int) -> Path:
        return self._policy.folder / f"step_{step:08d}"

    def _identity(self) -> dict[str, Any]:
        """What must be equal, beside the config, for a state to be this trial's."""
        dataset = self._inputs.dataset
        return {
            "format": _FORMAT,
            "metric": self._inputs.metric,
            "data_hash": dataset.data_hash,
            "label_hash": dataset.label_hash,
            "split_hash": dataset.split_hash,
        }

    def _steps(self) -> list[Path]:
        """Folders named like a state, newest first."""
        if not self._policy.folder.is_dir():
            return []
        folders = [path for path in self._policy.folder.iterdir() if _STEP.fullmatch(path.name)]
        return sorted(folders, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)

    def _remove_leftovers(self) -> None:
        """Remove half-done saves of killed processes."""
        leftovers = list(self._policy.folder.glob(".step_*")) if self._policy.folder.is_dir() else []
        if leftovers:
            self._policy.guard()
        for path in leftovers:
            shutil.rmtree(path, ignore_errors=True)

    def _newest_whole(self) -> tuple[TrainingState | None, list[str]]:
        problems = []
        for folder in self._steps():
            try:
                described = checkpoint.describe(folder)
                if difference := self._difference(described):
                    problems.append(self._set_aside(folder, "foreign", f"it is of {difference}"))
                    continue
                return self._read(described), problems
            except (NotACheckpoint, CheckpointDamaged) as error:
                reason = str(error).removeprefix(f"{folder.absolute()}").lstrip(": ").partition(";")[0]
                problems.append(self._set_aside(folder, "damaged", reason))
        return None, problems

    def _difference(self, described: Described) -> str:
        """What makes a state another trial's; empty: it is this trial's."""
        if described.config != self._inputs.config:
            return "another config"
        theirs, ours = described.meta.get("trial", {}), self._identity()
        return ", ".join(f"another {name}" for name in ours if theirs.get(name) != ours[name])

    def _set_aside(self, folder: Path, why: str, reason: str) -> str:
        self._policy.guard()
        aside, n = folder.with_name(f"{folder.name}.{why}"), 1
        while aside.exists():
            n += 1
            aside = folder.with_name(f"{folder.name}.{why}-{n}")
        folder.rename(aside)
        return f"{folder}: this training state can't be used: {reason}; set aside as {aside.name}"

    def _read(self, described: Described) -> TrainingState:
        config, meta = described.config, described.meta
        n_features = len(config.data.features)
        abstract = (abstract_state(static_config(config), n_features=n_features), jax.eval_shape(EpochSums))
        items = {_TRAINING: _as_dicts(abstract)}
        if meta["progress"]["best_epoch"] > 0:
            outputs = jax.ShapeDtypeStruct((len(self._inputs.dataset.validation.rows),), np.float32)
            params = family.of(config.model).abstract_params(config.model, config.shape, n_features)
            items[_BEST] = {"params": params, "outputs": outputs}
        arrays = checkpoint.read(described, items)
        state, sums = _from_dicts(arrays[_TRAINING], abstract)
        best = arrays.get(_BEST, {"params": None, "outputs": None})
        return TrainingState(
            state=state,
            sums=sums,
            progress=Progress(**meta["progress"], **best),
            batch_layout=BatchLayout(**{**meta["arrangement"], "layout": Layout(**meta["arrangement"]["layout"])}),
            timing=Timing(**{field.name: meta[field.name] for field in dataclasses.fields(Timing)}),
        )


def _remove(folder: Path) -> None:
    """Hidden first: a removal cut short must not look like a damaged state."""
    hidden = folder.with_name(f".{folder.name}.removed")
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _as_dicts(tree: Any) -> Params:
    """Any pytree as nested dicts by the names on each leaf's path, so that the files name what they hold."""
    nested: Params = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        *parents, name = _names(path)
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = leaf
    return nested


def _from_dicts(nested: Params, like: Any) -> Any:
    """`_as_dicts` undone: the leaves of `nested` in the structure of `like`."""
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    leaves = []
    for path, _ in paths:
        inner: Any = nested
        for name in _names(path):
            inner = inner[name]
        leaves.append(inner)
    return jax.tree_util.tree_unflatten(structure, leaves)


def _names(path: tuple[Any, ...]) -> list[str]:
    return jax.tree_util.keystr(path, simple=True, separator="/").split("/")
