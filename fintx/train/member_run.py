"""Member runs: a trial that trains, alone or in a population; how far it is, when it ends, and its result."""

from __future__ import annotations

import contextlib
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import numpy as np

from fintx.config.schema import TrialConfig
from fintx.errors import FintxError
from fintx.evaluate import metrics
from fintx.evaluate.metrics import Metrics
from fintx.model import param_count
from fintx.train import multihost
from fintx.train.resume import CheckpointManager, CheckpointPolicy, TrainingState
from fintx.train.train_state import (
    BatchLayout,
    FitInputs,
    Progress,
    TargetScale,
    Timing,
    TrainState,
    steps_per_epoch,
)
from fintx.train.train_step import EpochSums
from fintx.types import Floats, Params

TrainingOutcome = Literal["completed", "early_stopped", "diverged", "collapsed", "out_of_memory", "interrupted"]

CONSTANT_OUTPUT = 1e-6
"""Outputs that differ by less than this share of their size don't depend on the input (float32 resolves 1e-7)."""


@dataclass(frozen=True)
class EpochReport:
    """What is known after an epoch; for the live view."""

    epoch: int
    """Number of the epoch, from 1."""
    max_epochs: int
    step: int
    """Steps taken so far."""
    max_steps: int
    train_loss: float
    metrics: Metrics
    """Of the validation part."""
    best: float
    """The study's metric at the best epoch so far."""
    best_epoch: int
    seconds: float
    """Since the trial began, in all attempts."""


@dataclass(frozen=True)
class TrialEnd:
    """Why a trial is over."""

    outcome: TrainingOutcome
    detail: str
    """The reason, in one line."""


@dataclass(frozen=True, eq=False)
class FitResult:
    """The result of training a trial."""

    outcome: TrainingOutcome
    detail: str
    """One line: why it stopped."""
    best: Metrics
    """Validation metrics at the restored best step; empty where no epoch came to an end."""
    last: Metrics
    """Validation metrics at the last step that was evaluated."""
    best_epoch: int
    """Number of the best epoch, from 1; 0: no epoch came to an end."""
    best_step: int
    epochs: int
    """Epochs trained."""
    steps: int
    curve: list[dict[str, float | int | None]]
    """Per epoch: epoch, step, train_loss, and the validation metrics; the losses of a diverged epoch are None."""
    outputs: Floats | None
    """float32 (S,): validation logits (regression: log returns) at the best step."""
    params: Params | None
    """At the best step, on the host."""
    param_count: int
    timing: Timing
    warnings: tuple[str, ...]
    """One line each: what was wrong with saved states."""
    resumed_step: int
    """The step at which an earlier attempt's state was restored; 0: none was."""
    batch_layout: BatchLayout
    """Micro-batch, remat and devices, as memory demanded; below train.batch_size, a step is several passes."""
    memory_bytes: int | None
    """Estimated peak, over the trial's devices of this host; none: failed before it was known."""


@dataclass(frozen=True)
class Member:
    """A trial to train, alone or beside others. What its hooks or its saves raise ends this member and no other."""

    config: TrialConfig
    on_begin: Callable[[], None] | None = None
    """Called once all is compiled and in place, right before the first step."""
    on_epoch: Callable[[EpochReport], None] | None = None
    on_progress: Callable[[int], None] | None = None
    """Called after each segment of an epoch, of a second or two, with the steps taken so far."""
    on_warning: Callable[[str], None] | None = None
    """Called with each line of `FitResult.warnings` at once."""
    saves: CheckpointPolicy | None = None
    """Where training states are kept, and found again: the trial goes on from the newest good one and ends with the
    numbers of one never interrupted. The caller removes them. None: the trial starts anew."""


@dataclass
class MemberRun:
    """One member while it trains."""

    member: Member
    inputs: FitInputs
    batch_layout: BatchLayout
    progress: Progress = field(default_factory=Progress)
    step: int = 0
    sums: EpochSums = field(default_factory=EpochSums)
    """Of the current epoch, on the host."""
    slot: int = 0
    """Its place in the population."""
    saved: TrainingState | None = None
    """What an earlier attempt left."""
    memory_bytes: int | None = None
    timing: Timing = Timing()
    """Of this attempt and those before it; where several train at once, its share."""
    warnings: list[str] = field(default_factory=list)
    checkpoints: CheckpointManager | None = None
    end: TrialEnd | Exception | None = None

    @property
    def steps_per_epoch(self) -> int:
        """The same for all members of a population."""
        return steps_per_epoch(len(self.inputs.dataset.train.rows), batch_size=self.inputs.config.train.batch_size)

    @property
    def at_epoch_end(self) -> bool:
        """Between two epochs, or at the very beginning."""
        return self.step % self.steps_per_epoch == 0

    @contextlib.contextmanager
    def isolated(self) -> Iterator[None]:
        """An error within ends this member and no other; but out of memory is everybody's."""
        try:
            yield
        except (jax.errors.JaxRuntimeError, MemoryError):
            raise
        except Exception as error:
            self.end = error

    def warn(self, line: str) -> None:
        """A line for the result's warnings."""
        self.warnings.append(line)
        if self.member.on_warning is not None:
            self.member.on_warning(line)

    def restore(self) -> None:
        """Find the newest saved state, and continue from it with its micro-batch and remat, on today's devices."""
        if self.member.saves is None:
            return
        self.checkpoints = CheckpointManager(self.member.saves, self.inputs)
        self.saved = saved = self.checkpoints.newest(self.warn)
        if saved is not None:
            self.progress, self.step, self.sums, self.timing = saved.progress, saved.step, saved.sums, saved.timing
            self.batch_layout = replace(saved.batch_layout, layout=self.batch_layout.layout)

    def save(self, state: TrainState) -> None:
        """Commit the member's state, given as host arrays that nobody overwrites."""
        assert self.checkpoints is not None
        self.checkpoints.save(
            TrainingState(
                state=state,
                sums=self.sums,
                progress=self.progress,
                batch_layout=self.batch_layout,
                timing=self.timing,
            )
        )

    def interrupt(self) -> None:
        """End the run where it is, as asked to."""
        epochs = f"after epoch {self.progress.epoch} of {self.inputs.config.train.max_epochs}"
        self.end = TrialEnd("interrupted", f"asked to stop at step {self.step}, {epochs}")

    def report(self) -> EpochReport:
        """The epoch that has just ended."""
        progress, train = self.progress, self.inputs.config.train
        train_loss, best = progress.curve[-1]["train_loss"], progress.best[self.inputs.metric]
        assert train_loss is not None and best is not None
        return EpochReport(
            epoch=progress.epoch,
            max_epochs=train.max_epochs,
            step=self.step,
            max_steps=train.max_epochs * self.steps_per_epoch,
            train_loss=train_loss,
            metrics=progress.last,
            best=best,
            best_epoch=progress.best_epoch,
            seconds=self.timing.wall_s,
        )

    def result(self) -> FitResult | Exception:
        """The result, once the run has ended."""
        progress, config = self.progress, self.inputs.config
        if isinstance(self.end, Exception):
            return self.end
        assert self.end is not None
        n_features = self.inputs.dataset.features.shape[1]
        return FitResult(
            outcome=self.end.outcome,
            detail=self.end.detail,
            best=progress.best,
            last=progress.last,
            best_epoch=progress.best_epoch,
            best_step=progress.best_epoch * self.steps_per_epoch,
            epochs=progress.epoch,
            steps=self.step,
            curve=progress.curve,
            outputs=progress.outputs,
            params=progress.params,
            param_count=param_count.count_params(config.model, config.shape, n_features).total,
            timing=self.timing,
            warnings=tuple(self.warnings),
            resumed_step=0 if self.saved is None else self.saved.step,
            batch_layout=self.batch_layout,
            memory_bytes=self.memory_bytes,
        )


class SharedClock:
    """Wall time, shared out among the members that were training."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def charge(self, runs: Sequence[MemberRun]) -> None:
        """Add the time since the last call to these, in equal shares."""
        now = time.perf_counter()
        share_s = (now - self._since) / max(len(runs), 1)
        self._since = now
        for run in runs:
            run.timing += Timing(wall_s=share_s)


# --- what an epoch's evaluation decides -------------------------------------------------------------------------------


def validation_metrics(inputs: FitInputs, outputs: Floats) -> Metrics:
    """Metrics of the validation part.

    Raises:
        FintxError: the study's metric is not among them, or undefined on these samples.
    """
    task, labels, metric = inputs.config.task, inputs.dataset.validation.labels, inputs.metric
    prior = float(np.mean(inputs.dataset.train.labels, dtype=np.float64))
    values = metrics.evaluate(task.predicts, outputs, labels, prior=prior)
    if metric not in values:
        fitting = ", ".join(name for name in metrics.MINIMIZE if name in values)
        raise FintxError(f'metric = "{metric}" does not fit task.kind = "{task.kind}"; use one of {fitting}')
    if values[metric] is None:
        raise FintxError(
            f'metric = "{metric}" is undefined on this validation part ({len(labels)} samples, labels from '
            f"{labels.min():g} to {labels.max():g}); widen the validation dates or choose another metric"
        )
    return values


def is_collapsed(config: TrialConfig, outputs: Floats, scale: TargetScale) -> bool:
    """Whether the spread is below the floor, or the output the same whatever the input.

    The spread is the SD of the probabilities, or of the log returns as a share of the training target's SD.
    """
    outputs = outputs.astype(np.float64)
    if np.ptp(outputs) <= CONSTANT_OUTPUT * np.abs(outputs).max():
        return True
    is_value = config.task.predicts == "value"
    spread = outputs.std() / scale.sd if is_value else (0.5 * (1 + np.tanh(0.5 * outputs))).std()
    return float(spread) < config.train.collapse_spread


def end_of_trial(inputs: FitInputs, progress: Progress) -> TrialEnd | None:
    """Whether the trial is over after this epoch, and why."""
    train, constant = inputs.config.train, "validation predictions (nearly) constant"
    if progress.collapsed_in_a_row >= train.collapse_patience:
        return TrialEnd("collapsed", f"{constant} for {progress.collapsed_in_a_row} epochs in a row")
    if progress.epoch - progress.best_epoch >= train.patience:
        end = TrialEnd("early_stopped", f"no better {inputs.metric} since epoch {progress.best_epoch}")
    elif progress.epoch >= train.max_epochs:
        end = TrialEnd("completed", f"all {train.max_epochs} epochs")
    else:
        return None
    # A trial whose best step predicts a constant has collapsed, whichever way it ended.
    if progress.best_is_collapsed:
        return TrialEnd("collapsed", f"{constant} at the best step, epoch {progress.best_epoch}")
    return end


def agreed_end(end: TrialEnd | None) -> TrialEnd | None:
    """The end that the first process of several hosts sees, whose numbers the record has; all must call."""
    outcomes = typing.get_args(TrainingOutcome)
    (which,) = multihost.agree(-1 if end is None else outcomes.index(end.outcome))
    if which < 0:
        return None
    return end if end is not None and end.outcome == outcomes[which] else TrialEnd(outcomes[which], "the first process")
