"""How does a trial run from its config to its result? Train, evaluate, keep the best, stop, and name what happened."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
import numpy as np

from fintx.config import MeshConfig, TrialConfig
from fintx.data.windows import Dataset
from fintx.evaluate import metrics
from fintx.model import sizes
from fintx.train import hosts, memory, placement, progress, sharding, step
from fintx.train.pace import Pace
from fintx.train.progress import EXPLODED_LOSS, End, Progress, Question
from fintx.train.result import Epoch, FitResult
from fintx.train.resume import Keeper, Saves, TrainingState
from fintx.train.sharding import ONE, Layout
from fintx.train.state import (
    Arrangement,
    Hyper,
    TargetScale,
    TrainState,
    for_program,
    hyper,
    in_target_units,
    steps_per_epoch,
    target_scale,
)
from fintx.types import FintxError, Floats, Ints, Params


def fit(
    config: TrialConfig,
    dataset: Dataset,
    *,
    metric: str,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    saves: Saves | None = None,
    memory_limit: int | None = None,
    mesh: MeshConfig | None = None,
) -> FitResult:
    """Train one trial, and restore the step whose validation metric is best.

    Args:
        metric: the validation metric that decides, a key of `metrics.MINIMIZE`.
        on_epoch: called after each epoch.
        on_progress: called after each segment of an epoch, of a second or two, with the steps taken so far.
        on_warning: called with each line of `FitResult.warnings`, as it comes.
        should_stop: asked between segments; True saves the training state and ends the attempt as interrupted.
        saves: where training states are kept, and found again: the trial goes on from the newest good one and ends
            with the numbers of one never interrupted. The caller removes them. None: the trial starts anew.
        memory_limit: bytes that the trial may take on this host, on all its devices; none: `memory.available()`.
        mesh: how it is spread over the devices that this process sees; none: on the first alone.

    Raises:
        FintxError: the metric is unknown, does not belong to the task's kind or is undefined on the validation part;
            or balanced classes are asked of a training part that holds one class; or a state can't be saved; or there
            are too few devices for the mesh. And whatever `saves.guard` raises.
    """
    started = time.perf_counter()
    if metric not in metrics.MINIMIZE:
        raise FintxError(f'metric = "{metric}" is unknown; use one of {", ".join(metrics.MINIMIZE)}')
    layout = ONE if mesh is None else _layout(config, dataset, mesh)
    arrangement = Arrangement(config.train.batch_size, layout=layout)
    run = _Run(Question(config, dataset, metric), arrangement, started=started, on_warning=on_warning)
    try:
        end = _attempt(
            run,
            on_epoch=on_epoch,
            on_progress=on_progress,
            should_stop=should_stop,
            saves=saves,
            limit=hosts.least(memory.available(layout) if memory_limit is None else memory_limit),
        )
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
        end = End("out_of_memory", str(error).partition("\n")[0])
    return run.result(end)


def _layout(config: TrialConfig, dataset: Dataset, mesh: MeshConfig) -> Layout:
    chosen = placement.choose(
        mesh,
        config.model,
        config.shape,
        dataset.features.shape[1],
        batch_size=config.train.batch_size,
        n_devices=jax.device_count(),
        device_bytes=memory.device_bytes(),
    )
    data, model, fsdp = hosts.agree(chosen.data, chosen.model, chosen.fsdp)
    chosen = Layout(data=data, model=model, fsdp=bool(fsdp))
    if chosen.n_devices > 1:
        sharding.mesh_of(chosen)  # says now if it can't be made
    return chosen


def predict(config: TrialConfig, params: Params, features: Floats, rows: Ints, *, layout: Layout = ONE) -> Floats:
    """The model's outputs for the windows that end at `rows`: the numbers that records hold, here as in `fit`.

    Args:
        params: of `FitResult` or of a checkpoint.
        features: float32 (R, F), scaled as in training.
        rows: (S,) index of each sample's decision bar; its window is features[row − T + 1 : row + 1].
        layout: over which devices; that of the `fit` gives its very numbers, another one gives them up to rounding.

    Returns:
        float32 (S,): logits; for regression, log returns.
    """
    if len(rows) == 0:
        return np.zeros(0, np.float32)
    context_length = config.model.context_length
    if rows.min() < context_length - 1 or rows.max() >= len(features):
        raise ValueError(f"rows must lie in [{context_length - 1}, {len(features)}), got {rows.min()} … {rows.max()}")
    windows = step.place(features, rows, layout=layout)
    forward = step.compile_logits(
        for_program(config.model),
        config.shape,
        n_features=windows.features.shape[1],
        n_rows=windows.features.shape[0],
        n_samples=windows.rows.shape[0],
        layout=layout,
    )
    return sharding.to_host(forward.run(sharding.put(layout, params), windows))[: len(rows)].copy()


@dataclass
class _Run:
    """One attempt at a trial: what it was asked, what is known, and what its result will be made of."""

    question: Question
    arrangement: Arrangement
    started: float
    on_warning: Callable[[str], None] | None
    progress: Progress = field(default_factory=Progress)
    step: int = 0
    resumed_step: int = 0
    memory_bytes: int | None = None
    compile_s: float = 0.0
    earlier_s: float = 0.0
    """Seconds that earlier attempts took."""
    warnings: list[str] = field(default_factory=list)

    @property
    def wall_s(self) -> float:
        return self.earlier_s + time.perf_counter() - self.started

    def warn(self, line: str) -> None:
        self.warnings.append(line)
        if self.on_warning is not None:
            self.on_warning(line)

    def adopt(self, saved: TrainingState) -> None:
        """Go on from what an earlier attempt saved, with the relief that it had, on the devices that there are now."""
        self.progress, self.step, self.resumed_step = saved.progress, saved.step, saved.step
        self.arrangement = replace(saved.arrangement, layout=self.arrangement.layout)
        self.compile_s, self.earlier_s = saved.compile_s, saved.wall_s

    def result(self, end: End) -> FitResult:
        question, known = self.question, self.progress
        config = question.config
        per_epoch = _steps_per_epoch(question)
        return FitResult(
            outcome=end.outcome,
            detail=end.detail,
            best=known.best,
            last=known.last,
            best_epoch=known.best_epoch,
            best_step=known.best_epoch * per_epoch,
            epochs=known.epoch,
            steps=self.step,
            curve=known.curve,
            outputs=known.outputs,
            params=known.params,
            param_count=sizes.count(config.model, config.shape, question.dataset.features.shape[1]).total,
            compile_s=self.compile_s,
            wall_s=self.wall_s,
            warnings=tuple(self.warnings),
            resumed_step=self.resumed_step,
            arrangement=self.arrangement,
            memory_bytes=self.memory_bytes,
        )


@dataclass
class _Loaded:
    """A trial on its devices, compiled; its state changes."""

    hyper: Hyper
    training: step.Training
    forward: step.Forward
    train: step.Windows
    validation: step.Windows
    scale: TargetScale
    state: TrainState
    tally: step.Tally


def _load(run: _Run, saved: TrainingState | None, *, limit: int, saves: bool) -> _Loaded | memory.TooBig:
    config, dataset = run.question.config, run.question.dataset
    labels = dataset.train.labels
    scale = target_scale(config.task, labels)
    values = hyper(config, labels=labels, scale=scale)
    layout = run.arrangement.layout
    train = step.place(dataset.features, dataset.train.rows, scale.apply(labels), layout=layout)
    validation = step.place(dataset.features, dataset.validation.rows, layout=layout)
    began = time.perf_counter()
    plan = memory.plan(config, train, validation, limit=limit, arrangement=run.arrangement, saves=saves)
    run.compile_s += time.perf_counter() - began
    run.memory_bytes = plan.n_bytes
    if isinstance(plan, memory.TooBig):
        return plan
    run.arrangement = plan.arrangement
    if saved is not None and plan.arrangement != saved.arrangement:
        masks = config.model.dropout > 0 and plan.arrangement.micro_batch != saved.arrangement.micro_batch
        run.warn(
            f"began in {saved.arrangement}, goes on in {plan.arrangement}: its numbers change "
            f"{'with their dropout masks' if masks else 'in their last digits'}"
        )
    if saved is None:
        state, tally = plan.training.start(values), step.empty_tally()
    else:
        state, tally = sharding.put(layout, saved.state), saved.tally
    return _Loaded(values, plan.training, plan.forward, train, validation, scale, state, tally)


def _attempt(
    run: _Run,
    *,
    on_epoch: Callable[[Epoch], None] | None,
    on_progress: Callable[[int], None] | None,
    should_stop: Callable[[], bool] | None,
    saves: Saves | None,
    limit: int,
) -> End:
    config = run.question.config.train
    if too_big := memory.too_big(run.question.config, limit=limit, layout=run.arrangement.layout):
        run.memory_bytes = too_big.n_bytes
        return End("out_of_memory", str(too_big))
    keeper = None if saves is None else Keeper(saves, run.question)
    saved = None if keeper is None else keeper.newest(run.warn)
    if saved is not None:
        run.adopt(saved)
        if run.step % _steps_per_epoch(run.question) == 0 and (end := progress.end(run.question, run.progress)):
            return end
    trial = _load(run, saved, limit=limit, saves=saves is not None)
    del saved  # up to 16 bytes per parameter
    if isinstance(trial, memory.TooBig):
        return End("out_of_memory", str(trial))
    if keeper is not None:
        keeper.start_clock()
    pace = Pace()
    while True:
        stopping, due, n_steps = hosts.agree(
            int(should_stop is not None and should_stop()),
            int(keeper is not None and keeper.is_due()),
            pace.steps(_left(run)),
        )
        if keeper is not None and (stopping or due):
            keeper.save(_state(run, trial))
        if stopping:
            epochs = f"after epoch {run.progress.epoch} of {config.max_epochs}"
            return End("interrupted", f"asked to stop at step {run.step}, {epochs}")
        _segment(run, trial, pace, n_steps)
        if on_progress is not None:
            on_progress(run.step)
        if run.step % _steps_per_epoch(run.question) == 0:
            if end := progress.agreed(_close_epoch(run, trial)):
                return end
            if on_epoch is not None:
                on_epoch(_epoch(run))
            if end := progress.agreed(progress.end(run.question, run.progress)):
                if keeper is not None and saves is not None and saves.at_end:
                    keeper.save(_state(run, trial))
                return end


def _left(run: _Run) -> int:
    """Steps to the epoch's end."""
    per_epoch = _steps_per_epoch(run.question)
    return per_epoch - run.step % per_epoch


def _segment(run: _Run, trial: _Loaded, pace: Pace, n_steps: int) -> None:
    """Steps in one dispatch."""
    began = time.perf_counter()
    trial.state, trial.tally = trial.training.segment(
        trial.hyper, trial.state, trial.tally, trial.train, np.int32(n_steps)
    )
    jax.block_until_ready(trial.state)
    pace.note(n_steps, time.perf_counter() - began)
    run.step += n_steps


def _state(run: _Run, trial: _Loaded) -> TrainingState:
    return TrainingState(
        state=sharding.to_host(trial.state),
        tally=sharding.to_host(trial.tally),
        progress=run.progress,
        arrangement=run.arrangement,
        compile_s=run.compile_s,
        wall_s=run.wall_s,
    )


def _close_epoch(run: _Run, trial: _Loaded) -> End | None:
    """Evaluate the epoch's parameters and note the result; an end if the epoch diverged."""
    question, known = run.question, run.progress
    n = np.float32(len(question.dataset.train.rows))
    loss, bad_step = float(np.float32(trial.tally.loss_sum) / n), int(trial.tally.bad_step)
    trial.tally = step.empty_tally()
    if bad_step >= 0 or not loss <= EXPLODED_LOSS:
        known.note(step=run.step, train_loss=None, evaluated={})
        what = f"loss, gradients or parameters not finite at step {bad_step + 1}"
        return End("diverged", what if bad_step >= 0 else f"mean training loss {loss:.3g} in epoch {known.epoch}")
    params = sharding.put(run.arrangement.layout, in_target_units(trial.state.params, trial.scale))
    n_validation = len(question.dataset.validation.rows)
    outputs = sharding.to_host(trial.forward.run(params, trial.validation))[:n_validation].copy()
    # Losses of a regression are in variances of the target; the record's are in squared log returns.
    train_loss = loss * trial.scale.sd**2
    if not np.isfinite(outputs).all():
        known.note(step=run.step, train_loss=train_loss, evaluated={})
        return End("diverged", f"validation outputs not finite after epoch {known.epoch}")
    known.note(step=run.step, train_loss=train_loss, evaluated=progress.evaluate(question, outputs))
    collapsed = progress.is_collapsed(question.config, outputs, trial.scale)
    known.collapsed_in_a_row = known.collapsed_in_a_row + 1 if collapsed else 0
    known.keep_if_best(question.metric, params, outputs)
    return None


def _steps_per_epoch(question: Question) -> int:
    return steps_per_epoch(len(question.dataset.train.rows), batch_size=question.config.train.batch_size)


def _epoch(run: _Run) -> Epoch:
    known, config = run.progress, run.question.config.train
    latest, best = known.curve[-1], known.best[run.question.metric]
    assert latest["train_loss"] is not None and best is not None
    return Epoch(
        epoch=known.epoch,
        max_epochs=config.max_epochs,
        step=run.step,
        max_steps=config.max_epochs * _steps_per_epoch(run.question),
        train_loss=latest["train_loss"],
        metrics=known.last,
        best=best,
        best_epoch=known.best_epoch,
        seconds=run.wall_s,
    )
