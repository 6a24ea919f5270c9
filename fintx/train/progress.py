"""What is known of a trial under way, which of its epochs is the best, and when is it over?"""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from fintx.config.schema import TaskConfig, TrialConfig
from fintx.data.datasets import Dataset
from fintx.errors import FintxError
from fintx.evaluate import metrics
from fintx.train import multihost, sharding
from fintx.train.train_state import BatchLayout, TargetScale
from fintx.types import Floats, Params

Outcome = Literal["completed", "early_stopped", "diverged", "collapsed", "out_of_memory", "interrupted"]
Metrics = dict[str, float | None]

EXPLODED_LOSS = 1e3
"""An epoch's mean training loss above this is divergence though it is finite: a loss on logits never overflows. In
nats, or in variances of the target; a constant prediction has less than 1 in either."""

CONSTANT_OUTPUT = 1e-6
"""Outputs that differ by less than this share of their size don't depend on the input (float32 resolves 1e-7)."""


@dataclass(frozen=True, eq=False)
class FitInputs:
    """What a trial is asked, apart from its parameters."""

    config: TrialConfig
    dataset: Dataset
    metric: str
    """The validation metric that decides."""


@dataclass(frozen=True)
class End:
    """Why a trial is over."""

    outcome: Outcome
    detail: str
    """One line."""


@dataclass
class Progress:
    """What the epochs so far have told; with the training state, all that a trial's future depends on."""

    epoch: int = 0
    """Epochs that are over."""
    best: Metrics = field(default_factory=dict)
    last: Metrics = field(default_factory=dict)
    best_epoch: int = 0
    best_is_collapsed: bool = False
    collapsed_in_a_row: int = 0
    curve: list[dict[str, float | int | None]] = field(default_factory=list)
    outputs: Floats | None = None
    """float32 (S,): validation outputs of the best epoch."""
    params: Params | None = None
    """Of the best epoch, on the host."""

    def to_json(self) -> dict[str, Any]:
        """All but the arrays; `Progress(**value, outputs=…, params=…)` is the same again."""
        return {
            "epoch": self.epoch,
            "best": self.best,
            "last": self.last,
            "best_epoch": self.best_epoch,
            "best_is_collapsed": self.best_is_collapsed,
            "collapsed_in_a_row": self.collapsed_in_a_row,
            "curve": self.curve,
        }

    def note(self, *, step: int, train_loss: float | None, evaluated: Metrics) -> None:
        """An epoch is over, after `step` steps in all."""
        self.epoch += 1
        entry: dict[str, float | int | None] = {"epoch": self.epoch, "step": step}
        self.curve.append(entry | {"train_loss": train_loss} | evaluated)
        if evaluated:
            self.last = evaluated

    def keep_if_best(self, metric: str, params: Params, outputs: Floats) -> None:
        """Copy the epoch's parameters to the host if its metric is the best so far."""
        new, old = self.last[metric], self.best.get(metric)
        assert new is not None
        (is_best,) = multihost.agree(int(old is None or metrics.better(metric, new, old)))
        if not is_best:
            return
        self.best, self.best_epoch, self.outputs = self.last, self.epoch, outputs
        self.best_is_collapsed = self.collapsed_in_a_row > 0
        self.params = sharding.to_host(params)


def validation_metrics(question: FitInputs, outputs: Floats) -> Metrics:
    """Validation metrics.

    Raises:
        FintxError: the study's metric is not among them, or undefined on these samples.
    """
    task, labels, metric = question.config.task, question.dataset.validation.labels, question.metric
    prior = float(np.mean(question.dataset.train.labels, dtype=np.float64))
    found = metrics.evaluate(task.predicts, outputs, labels, prior=prior)
    if metric not in found:
        fitting = ", ".join(name for name in metrics.MINIMIZE if name in found)
        raise FintxError(f'metric = "{metric}" does not fit task.kind = "{task.kind}"; use one of {fitting}')
    if found[metric] is None:
        raise FintxError(
            f'metric = "{metric}" is undefined on this validation part ({len(labels)} samples, labels from '
            f"{labels.min():g} to {labels.max():g}); widen the validation dates or choose another metric"
        )
    return found


def is_collapsed(config: TrialConfig, outputs: Floats, scale: TargetScale) -> bool:
    """Is the spread below the floor, or the output the same whatever the input?"""
    wide = outputs.astype(np.float64)
    if np.ptp(wide) <= CONSTANT_OUTPUT * np.abs(wide).max():
        return True
    return _spread(config.task, wide, scale) < config.train.collapse_spread


def _spread(task: TaskConfig, outputs: Floats, scale: TargetScale) -> float:
    """SD of the predictions: of probabilities, or of log returns as a share of the training target's SD."""
    if task.predicts == "value":
        return float(outputs.std() / scale.sd)
    return float((0.5 * (1 + np.tanh(0.5 * outputs))).std())


def end_of_trial(question: FitInputs, progress: Progress) -> End | None:
    """Is the trial over after this epoch?"""
    config = question.config.train
    if progress.collapsed_in_a_row >= config.collapse_patience:
        what = f"validation predictions (nearly) constant for {progress.collapsed_in_a_row} epochs in a row"
        return End("collapsed", what)
    if progress.epoch - progress.best_epoch >= config.patience:
        what = f"no better {question.metric} since epoch {progress.best_epoch}"
        return _unless_collapsed(progress, End("early_stopped", what))
    if progress.epoch >= config.max_epochs:
        return _unless_collapsed(progress, End("completed", f"all {config.max_epochs} epochs"))
    return None


def agreed_end(end: End | None) -> End | None:
    """What the first process of several hosts holds of it, whose numbers the record has; all must call."""
    outcomes = typing.get_args(Outcome)
    (which,) = multihost.agree(-1 if end is None else outcomes.index(end.outcome))
    if which < 0:
        return None
    return end if end is not None and end.outcome == outcomes[which] else End(outcomes[which], "the first process")


def _unless_collapsed(progress: Progress, end: End) -> End:
    """A trial whose best step predicts a constant found nothing, whichever way it came to its end."""
    if progress.best_is_collapsed:
        what = f"validation predictions (nearly) constant at the best step, epoch {progress.best_epoch}"
        return End("collapsed", what)
    return end


@dataclass(frozen=True)
class Timing:
    """Where a training's time went, in all attempts up to their last save; of a population, its share."""

    trace_s: float = 0.0
    """Python's part of making the programs, tracing and lowering; next to nothing where an earlier trial's programs
    served. Waiting for a thread that makes them ahead counts here."""
    compile_s: float = 0.0
    """XLA's part, or reading from the program cache what it once made; 0 where an earlier trial's programs served."""
    n_compiled: int = 0
    """Programs that XLA compiled; those of the cache or of an earlier trial don't count."""
    run_s: float = 0.0
    """Training and evaluating on the devices."""
    wall_s: float = 0.0
    """All of it."""

    def __add__(self, other: Timing) -> Timing:
        return Timing(
            self.trace_s + other.trace_s,
            self.compile_s + other.compile_s,
            self.n_compiled + other.n_compiled,
            self.run_s + other.run_s,
            self.wall_s + other.wall_s,
        )

    def share(self, n: int) -> Timing:
        """Of one of n that trained side by side; the programs are everybody's."""
        return Timing(self.trace_s / n, self.compile_s / n, self.n_compiled, self.run_s / n, self.wall_s / n)


@dataclass(frozen=True)
class Epoch:
    """What is known after an epoch; for the live view."""

    epoch: int
    """From 1."""
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


@dataclass(frozen=True, eq=False)
class FitResult:
    """What a trial came to."""

    outcome: Outcome
    detail: str
    """One line: why it stopped."""
    best: Metrics
    """Validation metrics at the restored best step; empty where no epoch came to an end."""
    last: Metrics
    """Validation metrics at the last step that was evaluated."""
    best_epoch: int
    """From 1; 0: none."""
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
    """Where an earlier attempt's state was taken up; 0: at the beginning."""
    batch_layout: BatchLayout
    """Micro-batch, remat and devices, as memory asked for; below train.batch_size, a step is several passes."""
    memory_bytes: int | None
    """Estimated peak, over the trial's devices of this host; none: failed before it was known."""

    @property
    def micro_batch(self) -> int:
        """Samples in a pass."""
        return self.batch_layout.micro_batch
