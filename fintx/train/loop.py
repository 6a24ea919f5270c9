"""How does a trial run from its config to its result? Train, evaluate, keep the best, stop, and name what happened."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import jax
import numpy as np

from fintx.config import TaskConfig, TrialConfig
from fintx.data.windows import Dataset
from fintx.evaluate import metrics
from fintx.model import transformer
from fintx.train import resume, step
from fintx.train.state import (
    Hyper,
    Program,
    TargetScale,
    TrainState,
    for_program,
    hyper,
    in_target_units,
    program,
    steps_per_epoch,
    target_scale,
)
from fintx.types import FintxError, Floats, Ints, Params

Outcome = Literal["completed", "early_stopped", "diverged", "collapsed", "out_of_memory", "interrupted"]
Metrics = dict[str, float | None]

EXPLODED_LOSS = 1e3
"""An epoch's mean training loss above this is divergence though it is finite: a loss on logits never overflows. In
nats, or in variances of the target; a constant prediction has less than 1 in either."""

CONSTANT_OUTPUT = 1e-6
"""Outputs that differ by less than this share of their size don't depend on the input (float32 resolves 1e-7)."""


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
    """Since `fit` began."""


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
    compile_s: float
    """Tracing, lowering and compiling; 0 where an earlier trial's program served."""
    wall_s: float
    """All of `fit`, compile_s included."""
    warnings: tuple[str, ...] = ()
    resumed_step: int = 0
    micro_batch: int = 0
    memory_bytes: int | None = None


def fit(
    config: TrialConfig,
    dataset: Dataset,
    *,
    metric: str,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    saves: resume.Saves | None = None,
    memory_limit: int | None = None,
) -> FitResult:
    """Train one trial, and restore the step whose validation metric is best.

    Args:
        metric: the validation metric that decides, a key of `metrics.MINIMIZE`.
        on_epoch: called after each epoch.
        should_stop: asked between epochs; True ends the trial as interrupted.

    Raises:
        FintxError: the metric is unknown, does not belong to the task's kind or is undefined on the validation part;
            or balanced classes are asked of a training part that holds one class.
    """
    started = time.perf_counter()
    if metric not in metrics.MINIMIZE:
        raise FintxError(f'metric = "{metric}" is unknown; use one of {", ".join(metrics.MINIMIZE)}')
    run = _Run(config, dataset, metric=metric, started=started)
    try:
        outcome, detail = _train(run, on_epoch=on_epoch, should_stop=should_stop)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        outcome, detail = "out_of_memory", str(error).partition("\n")[0]
    return run.result(outcome, detail)


def predict(config: TrialConfig, params: Params, features: Floats, rows: Ints) -> Floats:
    """The model's outputs for the windows that end at `rows`: the numbers that records hold, here as in `fit`.

    Args:
        params: of `FitResult` or of a checkpoint.
        features: float32 (R, F), scaled as in training.
        rows: (S,) index of each sample's decision bar; its window is features[row − T + 1 : row + 1].

    Returns:
        float32 (S,): logits; for regression, log returns.
    """
    if len(rows) == 0:
        return np.zeros(0, np.float32)
    context_length = config.model.context_length
    if rows.min() < context_length - 1 or rows.max() >= len(features):
        raise ValueError(f"rows must lie in [{context_length - 1}, {len(features)}), got {rows.min()} … {rows.max()}")
    windows = step.place(features, rows)
    return _outputs(config, jax.device_put(params), windows, n=len(rows))


def is_out_of_memory(error: BaseException) -> bool:
    """Did the device or the host run out of memory?

    A full disk arrives under the same name (RESOURCE_EXHAUSTED), so the text decides as well as the type.
    """
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    named = any(mark in text for mark in ("resource_exhausted", "out of memory", "out_of_memory", "failed to allocate"))
    return isinstance(error, jax.errors.JaxRuntimeError) and named and "no space left" not in text


def _outputs(config: TrialConfig, params: Params, windows: step.Windows, *, n: int) -> Floats:
    compiled = step.compile_logits(
        for_program(config.model),
        config.shape,
        n_features=windows.features.shape[1],
        n_rows=windows.features.shape[0],
        n_samples=windows.rows.shape[0],
    )
    return np.array(compiled(params, windows))[:n].copy()


@dataclass
class _Run:
    """A trial under way: what its result will be made of."""

    config: TrialConfig
    dataset: Dataset
    metric: str
    started: float
    best: Metrics = field(default_factory=dict)
    last: Metrics = field(default_factory=dict)
    best_epoch: int = 0
    epoch: int = 0
    curve: list[dict[str, float | int | None]] = field(default_factory=list)
    outputs: Floats | None = None
    params: Params | None = None
    compile_s: float = 0.0
    collapsed_in_a_row: int = 0
    best_is_collapsed: bool = False

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.dataset.train.rows), batch_size=self.config.train.batch_size)

    @property
    def stale(self) -> int:
        return self.epoch - self.best_epoch

    def note(self, train_loss: float | None, evaluated: Metrics) -> None:
        """An epoch is over."""
        self.epoch += 1
        entry: dict[str, float | int | None] = {"epoch": self.epoch, "step": self.epoch * self.steps_per_epoch}
        self.curve.append(entry | {"train_loss": train_loss} | evaluated)
        if evaluated:
            self.last = evaluated

    def keep_if_best(self, params: Params, outputs: Floats) -> None:
        """Copy the epoch's parameters to the host if its metric is the best so far."""
        new, old = self.last[self.metric], self.best.get(self.metric)
        assert new is not None
        if old is not None and not metrics.better(self.metric, new, old):
            return
        self.best, self.best_epoch, self.outputs = self.last, self.epoch, outputs
        self.best_is_collapsed = self.collapsed_in_a_row > 0
        # A copy, never a view: on the CPU the next epoch writes over these very buffers.
        self.params = jax.tree.map(np.array, params)

    def result(self, outcome: Outcome, detail: str) -> FitResult:
        abstract = transformer.abstract_params(self.config.model, self.config.shape, self.dataset.features.shape[1])
        return FitResult(
            outcome=outcome,
            detail=detail,
            best=self.best,
            last=self.last,
            best_epoch=self.best_epoch,
            best_step=self.best_epoch * self.steps_per_epoch,
            epochs=self.epoch,
            steps=self.epoch * self.steps_per_epoch,
            curve=self.curve,
            outputs=self.outputs,
            params=self.params,
            param_count=sum(leaf.size for leaf in jax.tree.leaves(abstract)),
            compile_s=self.compile_s,
            wall_s=time.perf_counter() - self.started,
        )


@dataclass(frozen=True)
class _Loaded:
    """A trial on the device, compiled."""

    static: Program
    hyper: Hyper
    training: step.Training
    train: step.Windows
    validation: step.Windows
    scale: TargetScale


def _load(run: _Run) -> _Loaded:
    config, dataset = run.config, run.dataset
    labels = dataset.train.labels
    scale = target_scale(config.task, labels)
    values = hyper(config, labels=labels, scale=scale)
    train = step.place(dataset.features, dataset.train.rows, scale.apply(labels))
    validation = step.place(dataset.features, dataset.validation.rows)
    sizes = {"n_features": dataset.features.shape[1], "n_rows": train.features.shape[0]}
    began = time.perf_counter()
    training = step.compile_training(program(config), **sizes, n_samples=train.rows.shape[0])
    step.compile_logits(for_program(config.model), config.shape, **sizes, n_samples=validation.rows.shape[0])
    run.compile_s = time.perf_counter() - began
    return _Loaded(program(config), values, training, train, validation, scale)


def _train(
    run: _Run, *, on_epoch: Callable[[Epoch], None] | None, should_stop: Callable[[], bool] | None
) -> tuple[Outcome, str]:
    config = run.config.train
    trial = _load(run)
    state: TrainState = trial.training.start(trial.hyper)
    while run.epoch < config.max_epochs:
        if should_stop is not None and should_stop():
            return "interrupted", f"asked to stop after epoch {run.epoch} of {config.max_epochs}"
        state, report = trial.training.epoch(trial.hyper, state, trial.train)
        if stopped := _close_epoch(run, trial, state, report):
            return stopped
        if on_epoch is not None:
            on_epoch(_epoch(run))
        if stopped := _stops(run):
            return stopped
    return _unless_collapsed(run, "completed", f"all {config.max_epochs} epochs")


def _close_epoch(run: _Run, trial: _Loaded, state: TrainState, report: step.EpochReport) -> tuple[Outcome, str] | None:
    """Evaluate the epoch's parameters and note the result; an outcome if the epoch diverged."""
    loss, bad_step = float(report.loss), int(report.bad_step)
    if bad_step >= 0 or not loss <= EXPLODED_LOSS:
        run.note(None, {})
        what = f"loss, gradients or parameters not finite at step {bad_step + 1}"
        return "diverged", what if bad_step >= 0 else f"mean training loss {loss:.3g} in epoch {run.epoch}"
    params = in_target_units(state.params, trial.scale)
    part = run.dataset.validation
    outputs = _outputs(run.config, params, trial.validation, n=len(part.rows))
    # Losses of a regression are in variances of the target; the record's are in squared log returns.
    train_loss = loss * trial.scale.sd**2
    if not np.isfinite(outputs).all():
        run.note(train_loss, {})
        return "diverged", f"validation outputs not finite after epoch {run.epoch}"
    run.note(train_loss, _evaluate(run, outputs))
    run.collapsed_in_a_row = run.collapsed_in_a_row + 1 if _is_collapsed(run, outputs, trial.scale) else 0
    run.keep_if_best(params, outputs)
    return None


def _evaluate(run: _Run, outputs: Floats) -> Metrics:
    """Validation metrics.

    Raises:
        FintxError: the study's metric is not among them, or undefined on these samples.
    """
    kind, labels = run.config.task.kind, run.dataset.validation.labels
    prior = float(np.mean(run.dataset.train.labels, dtype=np.float64))
    found = metrics.evaluate(kind, outputs, labels, prior=prior)
    if run.metric not in found:
        fitting = ", ".join(name for name in metrics.MINIMIZE if name in found)
        raise FintxError(f'metric = "{run.metric}" does not fit task.kind = "{kind}"; use one of {fitting}')
    if found[run.metric] is None:
        raise FintxError(
            f'metric = "{run.metric}" is undefined on this validation part ({len(labels)} samples, labels from '
            f"{labels.min():g} to {labels.max():g}); widen the validation dates or choose another metric"
        )
    return found


def _is_collapsed(run: _Run, outputs: Floats, scale: TargetScale) -> bool:
    """Is the spread below the floor, or the output the same whatever the input?"""
    wide = outputs.astype(np.float64)
    if np.ptp(wide) <= CONSTANT_OUTPUT * np.abs(wide).max():
        return True
    return _spread(run.config.task, wide, scale) < run.config.train.collapse_spread


def _spread(task: TaskConfig, outputs: Floats, scale: TargetScale) -> float:
    """SD of the predictions: of probabilities, or of log returns as a share of the training target's SD."""
    if task.kind == "regression":
        return float(outputs.std() / scale.sd)
    return float((0.5 * (1 + np.tanh(0.5 * outputs))).std())


def _stops(run: _Run) -> tuple[Outcome, str] | None:
    config = run.config.train
    if run.collapsed_in_a_row >= config.collapse_patience:
        return "collapsed", f"validation predictions (nearly) constant for {run.collapsed_in_a_row} epochs in a row"
    if run.stale >= config.patience:
        return _unless_collapsed(run, "early_stopped", f"no better {run.metric} since epoch {run.best_epoch}")
    return None


def _unless_collapsed(run: _Run, outcome: Outcome, detail: str) -> tuple[Outcome, str]:
    """A trial whose best step predicts a constant found nothing, whichever way it came to its end."""
    if run.best_is_collapsed:
        return "collapsed", f"validation predictions (nearly) constant at the best step, epoch {run.best_epoch}"
    return outcome, detail


def _epoch(run: _Run) -> Epoch:
    latest, best = run.curve[-1], run.best[run.metric]
    assert latest["train_loss"] is not None and best is not None
    return Epoch(
        epoch=run.epoch,
        max_epochs=run.config.train.max_epochs,
        step=run.epoch * run.steps_per_epoch,
        max_steps=run.config.train.max_epochs * run.steps_per_epoch,
        train_loss=latest["train_loss"],
        metrics=run.last,
        best=best,
        best_epoch=run.best_epoch,
        seconds=time.perf_counter() - run.started,
    )
