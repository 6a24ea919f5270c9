"""How does an interrupted trial go on where it stopped?

    <folder>/step_00000120/           a training state: a checkpoint of the items `training` and, after an epoch, `best`
    <folder>/step_00000120.damaged/   one that is not what was saved; `.foreign`: one of another trial
    <folder>/.step_…                  what a killed process leaves; the next one removes it

A state is taken between two segments, mid-epoch or after an epoch is evaluated, and holds all that the rest of the
trial depends on: random numbers and batches follow from seed and step. The newest two are kept, for the newest may be
damaged. Nothing is committed, set aside or swept before `Saves.guard` agrees, so that of two workers that believe in
having a trial only its owner does it.
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
from fintx.train.progress import FitInputs, Progress, Timing
from fintx.train.sharding import Layout
from fintx.train.train_state import BatchLayout, TrainState, abstract_state, static_config
from fintx.train.train_step import EpochSums, empty_sums
from fintx.types import Params

KEPT = 2
USUAL_S = 60.0
"""Seconds between saves that cost little: a crash loses a minute."""
COST = 50
"""A save that lasts a second is followed by this many seconds without one: at most 2 % of the time goes into them."""

_FORMAT = 2
_TRAINING, _BEST = "training", "best"
_STEP = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class CheckpointPolicy:
    """Where a trial's training states lie, and when another is due."""

    folder: Path
    """Of this trial and fold alone; made when needed, removed by the caller."""
    every_s: float | None
    """Seconds between saves; none: 60, or 50 times as long as the last save took where that is longer."""
    guard: Callable[[], None]
    """Called right before anything is committed; raises if another worker has taken the trial over."""
    at_end: bool = False
    """Save the end too: of a fold that others follow, so that an interruption of theirs doesn't train it again."""


@dataclass(frozen=True, eq=False)
class TrainingState:
    """A trial between two segments, as host arrays: whole, on however many devices they lay."""

    state: TrainState
    tally: EpochSums
    progress: Progress
    batch_layout: BatchLayout
    timing: Timing

    @property
    def step(self) -> int:
        """Steps taken."""
        return int(self.state.step)


class CheckpointManager:
    """One trial's states on the disk, while it runs. Of several hosts the first alone changes what lies there."""

    def __init__(self, saves: CheckpointPolicy, question: FitInputs):
        self._saves = saves
        self._question = question
        self._since = time.perf_counter()
        self._cost_s = 0.0
        self.saved_step: int | None = None
        """Of the newest state on the disk; none: there is none."""

    def newest(self, warn: Callable[[str], None]) -> TrainingState | None:
        """The newest state that is whole and this trial's; newer ones that aren't are set aside, with a warning each.

        Raises:
            FintxError: the folder can't be changed.
        """
        found = self._newest(warn) if multihost.is_first() else None
        (step,) = multihost.agree(-1 if found is None else found.step)
        if step >= 0 and not multihost.is_first():
            found = self._read(checkpoint.describe(self._folder(step)))
        return found

    def _newest(self, warn: Callable[[str], None]) -> TrainingState | None:
        try:
            self._sweep()
            found, problems = self._search()
        except OSError as error:
            raise FintxError(
                f"could not tidy up {self._saves.folder}: {error.strerror}; mend that and run again"
            ) from error
        self.saved_step = None if found is None else found.step
        for problem in problems:
            warn(f"{problem}; training goes on from step {0 if found is None else found.step}")
        return found

    def start_clock(self) -> None:
        """Training begins now; the time before it, compiling, counts towards no save."""
        self._since = time.perf_counter()

    def is_due(self) -> bool:
        """Is it time for another save?"""
        every_s = max(USUAL_S, COST * self._cost_s) if self._saves.every_s is None else self._saves.every_s
        return time.perf_counter() - self._since >= every_s

    def save(self, training: TrainingState) -> None:
        """Commit a state, then remove all but the newest two; does nothing if the step is on the disk already.

        Raises:
            FintxError: the disk is full or can't be written; older states are as they were.
        """
        if training.step == self.saved_step or not multihost.is_first():
            return
        began = time.perf_counter()
        items = {_TRAINING: _as_dicts((training.state, training.tally))}
        progress = training.progress
        if progress.params is not None:
            assert progress.outputs is not None
            items[_BEST] = {"params": progress.params, "outputs": progress.outputs}
        meta = {
            "trial": self._identity(),
            "step": training.step,
            "progress": progress.to_json(),
            "arrangement": dataclasses.asdict(training.batch_layout),
            **dataclasses.asdict(training.timing),
        }
        folder = self._folder(training.step)
        try:
            checkpoint.write(folder, items, config=self._question.config, meta=meta, guard=self._saves.guard)
        except FintxError:
            self._saves.guard()  # the trial's new owner may have swept this save away: then the disk is not to blame
            raise
        self.saved_step = training.step
        for old in self._steps()[KEPT:]:
            _remove(old)
        self._since = time.perf_counter()
        self._cost_s = self._since - began

    def saved_beside_others(self, cost_s: float) -> None:
        """A round of saves is over, which took so many seconds for all members of a population."""
        self._since, self._cost_s = time.perf_counter(), cost_s

    def _folder(self, step: int) -> Path:
        return self._saves.folder / f"step_{step:08d}"

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a state to be this trial's, beside its config."""
        dataset = self._question.dataset
        return {
            "format": _FORMAT,
            "metric": self._question.metric,
            "data_hash": dataset.data_hash,
            "label_hash": dataset.label_hash,
            "split_hash": dataset.split_hash,
        }

    def _steps(self) -> list[Path]:
        """Folders named like a state, newest first."""
        if not self._saves.folder.is_dir():
            return []
        found = [path for path in self._saves.folder.iterdir() if _STEP.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)

    def _sweep(self) -> None:
        """Remove what killed processes left."""
        left = list(self._saves.folder.glob(".step_*")) if self._saves.folder.is_dir() else []
        if left:
            self._saves.guard()
        for path in left:
            shutil.rmtree(path, ignore_errors=True)

    def _search(self) -> tuple[TrainingState | None, list[str]]:
        problems = []
        for folder in self._steps():
            try:
                found = checkpoint.describe(folder)
                if difference := self._difference(found):
                    problems.append(self._set_aside(folder, "foreign", f"it is of {difference}"))
                    continue
                return self._read(found), problems
            except (NotACheckpoint, CheckpointDamaged) as error:
                reason = str(error).removeprefix(f"{folder.absolute()}").lstrip(": ").partition(";")[0]
                problems.append(self._set_aside(folder, "damaged", reason))
        return None, problems

    def _difference(self, found: Described) -> str:
        """In what a state is not this trial's; empty: it is."""
        if found.config != self._question.config:
            return "another config"
        theirs, ours = found.meta.get("trial", {}), self._identity()
        return ", ".join(f"another {name}" for name in ours if theirs.get(name) != ours[name])

    def _set_aside(self, folder: Path, why: str, reason: str) -> str:
        self._saves.guard()
        aside, n = folder.with_name(f"{folder.name}.{why}"), 1
        while aside.exists():
            n += 1
            aside = folder.with_name(f"{folder.name}.{why}-{n}")
        folder.rename(aside)
        return f"{folder}: this training state can't be used: {reason}; set aside as {aside.name}"

    def _read(self, found: Described) -> TrainingState:
        config, meta = found.config, found.meta
        n_features = len(config.data.features)
        wanted = (abstract_state(static_config(config), n_features=n_features), jax.eval_shape(empty_sums))
        items = {_TRAINING: _as_dicts(wanted)}
        if meta["progress"]["best_epoch"] > 0:
            outputs = jax.ShapeDtypeStruct((len(self._question.dataset.validation.rows),), np.float32)
            params = family.of(config.model).abstract_params(config.model, config.shape, n_features)
            items[_BEST] = {"params": params, "outputs": outputs}
        arrays = checkpoint.read(found, items)
        state, tally = _from_dicts(arrays[_TRAINING], wanted)
        best = arrays.get(_BEST, {"params": None, "outputs": None})
        return TrainingState(
            state=state,
            tally=tally,
            progress=Progress(**meta["progress"], **best),
            batch_layout=_batch_layout(**meta["arrangement"]),
            timing=Timing(**{of.name: meta[of.name] for of in dataclasses.fields(Timing)}),
        )


def _batch_layout(layout: dict[str, Any], **rest: Any) -> BatchLayout:
    return BatchLayout(layout=Layout(**layout), **rest)


def _remove(folder: Path) -> None:
    """Out of sight first: a removal cut short must not look like a damaged state."""
    hidden = folder.with_name(f".{folder.name}.removed")
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _as_dicts(tree: Any) -> Params:
    """Any pytree as nested dicts by the names on the way to each leaf: the files name what they hold."""
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
