"""What is known of a trial under way, which of its epochs is the best, and when is it over?"""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from fintx.config.schema import TaskConfig, TrialConfig
from fintx.data.windows import Dataset
from fintx.evaluate import metrics
from fintx.train import hosts, sharding
from fintx.train.state import TargetScale
from fintx.types import FintxError, Floats, Params

Outcome = Literal["completed", "early_stopped", "diverged", "collapsed", "out_of_memory", "interrupted"]
Metrics = dict[str, float | None]

EXPLODED_LOSS = 1e3
"""An epoch's mean training loss above this is divergence though it is finite: a loss on logits never overflows. In
nats, or in variances of the target; a constant prediction has less than 1 in either."""

CONSTANT_OUTPUT = 1e-6
"""Outputs that differ by less than this share of their size don't depend on the input (float32 resolves 1e-7)."""


@dataclass(frozen=True, eq=False)
class Question:
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
        (is_best,) = hosts.agree(int(old is None or metrics.better(metric, new, old)))
        if not is_best:
            return
        self.best, self.best_epoch, self.outputs = self.last, self.epoch, outputs
        self.best_is_collapsed = self.collapsed_in_a_row > 0
        self.params = sharding.to_host(params)


def evaluate(question: Question, outputs: Floats) -> Metrics:
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


def end(question: Question, progress: Progress) -> End | None:
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


def agreed(end: End | None) -> End | None:
    """What the first process of several hosts holds of it, whose numbers the record has; all must call."""
    outcomes = typing.get_args(Outcome)
    (which,) = hosts.agree(-1 if end is None else outcomes.index(end.outcome))
    if which < 0:
        return None
    return end if end is not None and end.outcome == outcomes[which] else End(outcomes[which], "the first process")


def _unless_collapsed(progress: Progress, end: End) -> End:
    """A trial whose best step predicts a constant found nothing, whichever way it came to its end."""
    if progress.best_is_collapsed:
        what = f"validation predictions (nearly) constant at the best step, epoch {progress.best_epoch}"
        return End("collapsed", what)
    return end
