"""Trainer: trials from config to result, one alone or several side by side; the loop over segments and epochs.

Members of a population share a program: one dispatch takes the next steps of all, `vmap` of what a trial alone would
run. All that a member's own numbers decide happens on the host, member by member: when its epoch ends, whether that is
its best, whether it stops early, diverged or collapsed. A member that has ended goes on computing until the others
have ended too; its results are ignored, and no second program is needed. Evaluation is the single trial's program, one
member after the other, so that records and later evaluations agree.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from fintx.config.schema import MeshConfig, TrialConfig
from fintx.data.datasets import Dataset
from fintx.errors import FintxError
from fintx.evaluate import metrics
from fintx.model import family
from fintx.train import compilation, memory, multihost, sharding, train_step
from fintx.train.member_run import (
    FitResult,
    Member,
    MemberRun,
    SharedClock,
    TrialEnd,
    agreed_end,
    end_of_trial,
    is_collapsed,
    validation_metrics,
)
from fintx.train.resume import CheckpointManager
from fintx.train.sharding import ONE, Layout
from fintx.train.train_state import (
    BatchLayout,
    FitInputs,
    Hyperparameters,
    TargetScale,
    Timing,
    TrainState,
    hyperparameters,
    static_config,
    static_model,
    target_scale,
)
from fintx.train.train_step import EpochSums
from fintx.types import Floats, Ints, Params

EXPLODED_LOSS = 1e3
"""An epoch's mean training loss above this is divergence though it is finite: a loss on logits never overflows. In
nats, or in variances of the target; a constant prediction has less than 1 in either."""

DISPATCH_S = 1.5
"""Seconds that no dispatch should exceed by much; a single step may."""


def fit(
    config: TrialConfig,
    dataset: Dataset,
    *,
    metric: str,
    should_stop: Callable[[], bool] | None = None,
    memory_limit: int | None = None,
    mesh: MeshConfig | None = None,
    **hooks_and_saves: Any,
) -> FitResult:
    """Train one trial, and restore the step whose validation metric is best.

    Args:
        metric: the validation metric that decides, a key of `metrics.MINIMIZE`.
        should_stop: asked between segments; True saves the training state and ends the attempt as interrupted.
        memory_limit: bytes that the trial may take on this host, on all its devices; none: `memory.available()`.
        mesh: how it is spread over the devices that this process sees; none: on the first alone.
        hooks_and_saves: the other fields of `Member`.

    Raises:
        FintxError: the metric is unknown, does not belong to the task's kind or is undefined on the validation part;
            or balanced classes are asked of a training part that holds one class; or a state can't be saved; or there
            are too few devices for the mesh. And whatever `saves.guard` raises.
    """
    (result,) = fit_population(
        [Member(config, **hooks_and_saves)],
        dataset,
        metric=metric,
        should_stop=should_stop,
        memory_limit=memory_limit,
        mesh=mesh,
    )
    if isinstance(result, Exception):
        raise result
    return result


def fit_population(
    members: Sequence[Member],
    dataset: Dataset,
    *,
    metric: str,
    should_stop: Callable[[], bool] | None = None,
    memory_limit: int | None = None,
    mesh: MeshConfig | None = None,
) -> list[FitResult | Exception]:
    """Train trials side by side; each result is that of the trial alone, but for the rounding of float32 sums.

    A member is saved as the trial that it is, and may be resumed alone or in any other company. Where not all fit
    into memory at once, halves are trained one after the other.

    Args:
        members: of one program (`train_state.static_config`); they may differ in everything else.
        metric, should_stop, memory_limit, mesh: as in `trainer.fit`, for all of them together. Over several hosts one
            member alone can be trained.

    Returns:
        For each member its result; or what its hooks, its saves or its metric raised: that ended it and no other.

    Raises:
        FintxError: the metric is unknown, or there are too few devices for the mesh.
        ValueError: the members are of more than one program.
    """
    clock = SharedClock()
    if metric not in metrics.MINIMIZE:
        raise FintxError(f'metric = "{metric}" is unknown; use one of {", ".join(metrics.MINIMIZE)}')
    if len({static_config(member.config) for member in members}) != 1:
        raise ValueError("the members of a population share one program")
    layout = _device_layout(members[0].config, dataset, mesh)
    limit = multihost.least(memory.available(layout) if memory_limit is None else memory_limit)
    runs = [
        MemberRun(
            member,
            FitInputs(member.config, dataset, metric),
            BatchLayout(member.config.train.batch_size, layout=layout),
        )
        for member in members
    ]
    try:
        _train_all(runs, clock, limit=limit, should_stop=should_stop or (lambda: False))
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if len(runs) > 1 or not memory.is_out_of_memory(error):
            raise
        runs[0].end = TrialEnd("out_of_memory", str(error).partition("\n")[0])
        clock.charge(runs)
    return [run.result() for run in runs]


def compile_ahead(
    config: TrialConfig,
    dataset: Dataset,
    *,
    n_members: int = 1,
    memory_limit: int | None = None,
    mesh: MeshConfig | None = None,
) -> None:
    """Compile, in any thread, the programs that `fit_population` will need."""
    layout = _device_layout(config, dataset, mesh)
    limit = memory.available(layout) if memory_limit is None else memory_limit
    if memory.too_big(config, limit=limit, layout=layout) is not None:
        return
    train, validation = (
        train_step.abstract_windows(
            n_features=dataset.features.shape[1],
            n_rows=train_step.capacity(len(dataset.features)),
            n_samples=train_step.capacity(len(part.rows)),
        )
        for part in (dataset.train, dataset.validation)
    )
    batch_layout = BatchLayout(config.train.batch_size, layout=layout)
    memory.plan_memory(
        config, train, validation, limit=limit, batch_layout=batch_layout, saves=True, n_members=n_members
    )


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
    windows = train_step.place(features, rows, layout=layout)
    forward = train_step.compile_logits(
        static_model(config.model),
        config.shape,
        n_features=windows.features.shape[1],
        n_rows=windows.features.shape[0],
        n_samples=windows.rows.shape[0],
        layout=layout,
    )
    outputs = forward.run(sharding.put(family.of(config.model), layout, params), windows)
    return sharding.to_host(outputs)[: len(rows)].copy()  # type: ignore[no-any-return]


def dispatch_size(steps_left: int, step_s: float) -> int:
    """Steps of the next dispatch: all that are left of the epoch, or one of equal parts of about a second and a half.

    A dispatch can't be interrupted: a trial is stopped, saved and reported on between two of them. The steps of a small
    model take well below a millisecond, and its epochs are one dispatch each. No result depends on where one is cut.

    Args:
        step_s: seconds per step in the latest dispatch; infinite before the first.
    """
    n_parts = max(1, math.ceil(min(steps_left, steps_left * step_s / DISPATCH_S)))
    return math.ceil(steps_left / n_parts)


def _device_layout(config: TrialConfig, dataset: Dataset, mesh: MeshConfig | None) -> Layout:
    if mesh is None:
        return ONE
    layout = memory.choose(
        mesh,
        config.model,
        config.shape,
        dataset.features.shape[1],
        batch_size=config.train.batch_size,
        n_devices=jax.device_count(),
        device_bytes=memory.device_bytes(),
    )
    data, model, fsdp = multihost.agree(layout.data, layout.model, layout.fsdp)
    layout = Layout(data=data, model=model, fsdp=bool(fsdp))
    if layout.n_devices > 1:
        sharding.mesh_of(layout)  # raises now if it can't be made
    return layout


# --- groups of members that fit into memory ---------------------------------------------------------------------------


def _train_all(runs: list[MemberRun], clock: SharedClock, *, limit: int, should_stop: Callable[[], bool]) -> None:
    """Restore what earlier attempts saved, then train group after group of what fits into memory at once."""
    groups: dict[BatchLayout, list[MemberRun]] = {}
    for run in runs:
        config, layout = run.inputs.config, run.batch_layout.layout
        with run.isolated():
            if too_big := memory.too_big(config, limit=limit, layout=layout):
                run.memory_bytes, run.end = too_big.n_bytes, TrialEnd("out_of_memory", str(too_big))
                continue
            run.restore()
            if run.saved is not None and run.at_epoch_end:
                run.end = end_of_trial(run.inputs, run.progress)
            if run.end is None:
                groups.setdefault(run.batch_layout, []).append(run)
    clock.charge(runs)

    waiting = list(groups.values())  # more than one only where memory was once too short for some of them
    any_began = False
    while waiting:
        group, *waiting = waiting
        if any_began and should_stop():
            for run in group:
                run.interrupt()
            continue
        population = _load(group, clock, limit=limit)
        if isinstance(population, _Population):
            any_began = True
            _train(group, population, clock, should_stop)
        elif len(group) > 1:
            half = len(group) // 2
            waiting = [group[:half], group[half:], *waiting]
        else:
            group[0].end = TrialEnd("out_of_memory", str(population))
        clock.charge(group)


@dataclass
class _Population:
    """Members on their devices, compiled; `state` changes. A member alone has no axis R."""

    plan: memory.MemoryPlan
    hyper: Hyperparameters
    train: train_step.Windows
    validation: train_step.Windows
    scale: TargetScale
    state: TrainState
    n_members: int

    def states_on_host(self) -> list[TrainState]:
        """Every member's state, by slot: copies, never views of what the next segment overwrites."""
        state = sharding.to_host(self.state)
        return [state] if self.n_members == 1 else [_member(state, slot) for slot in range(self.n_members)]


def _load(runs: list[MemberRun], clock: SharedClock, *, limit: int) -> _Population | memory.OutOfMemory:
    """Place the data, compile the programs, and put every member's first or saved state onto the devices."""
    config, dataset, layout = runs[0].inputs.config, runs[0].inputs.dataset, runs[0].batch_layout.layout
    labels, n_members = dataset.train.labels, len(runs)
    scale = target_scale(config.task, labels)
    train = train_step.place(dataset.features, dataset.train.rows, scale.apply(labels), layout=layout)
    validation = train_step.place(dataset.features, dataset.validation.rows, layout=layout)
    with compilation.timed_compilation() as compiling:
        plan = memory.plan_memory(
            config,
            train,
            validation,
            limit=limit,
            batch_layout=runs[0].batch_layout,
            saves=any(run.checkpoints is not None for run in runs),
            n_members=n_members,
        )
    clock.charge(runs)
    for run in runs:
        run.timing += Timing(compiling.trace_s, compiling.compile_s, compiling.n_compiled).share(n_members)
        run.memory_bytes = plan.n_bytes // n_members
    if isinstance(plan, memory.OutOfMemory):
        return plan

    for slot, run in enumerate(runs):
        run.slot, run.batch_layout = slot, plan.batch_layout
        if run.saved is not None and plan.batch_layout != run.saved.batch_layout:
            other_masks = (
                config.model.dropout > 0 and plan.batch_layout.micro_batch != run.saved.batch_layout.micro_batch
            )
            run.warn(
                f"began in {run.saved.batch_layout}, goes on in {plan.batch_layout}: its numbers change "
                f"{'with their dropout masks' if other_masks else 'in their last digits'}"
            )

    values = [hyperparameters(run.inputs.config, labels=labels, scale=scale) for run in runs]
    states = [
        plan.training.start(hyper) if run.saved is None else run.saved.state
        for hyper, run in zip(values, runs, strict=True)
    ]
    kind = family.of(config.model)
    if n_members > 1:
        hyper, state = _stacked(values), sharding.put(kind, layout, _stacked(sharding.to_host(states)), leading=1)
    else:
        (hyper,), (state,) = values, states
        state = state if runs[0].saved is None else sharding.put(kind, layout, state)
    return _Population(plan, hyper, train, validation, scale, state, n_members)


def _stacked(trees: Sequence[TrainState | Hyperparameters | EpochSums]) -> Any:
    """Trees of host arrays as one whose leaves have a leading axis R."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _member(tree: Any, slot: int) -> Any:
    """One member's part of a tree that `_stacked` made."""
    return jax.tree.map(lambda leaf: leaf[slot], tree)


# --- the loop ---------------------------------------------------------------------------------------------------------


def _train(runs: list[MemberRun], population: _Population, clock: SharedClock, should_stop: Callable[[], bool]) -> None:
    """Segment after segment, until every member has ended or the population is asked to stop."""
    is_alone, step_s = len(runs) == 1, math.inf
    for run in runs:
        if run.checkpoints is not None:
            run.checkpoints.start_clock()
        if run.member.on_begin is not None:
            with run.isolated():
                run.member.on_begin()

    while active := [run for run in runs if run.end is None]:
        saving = [(run, run.checkpoints) for run in active if run.checkpoints is not None]
        steps_left = min(run.steps_per_epoch - run.step % run.steps_per_epoch for run in active)
        stop, save, n_steps = multihost.agree(
            int(should_stop()),
            int(any(checkpoints.is_due() for _, checkpoints in saving)),
            dispatch_size(steps_left, step_s),
        )

        # Save, and stop if asked to.
        if saving and (stop or save):
            _save(saving, population)
        if stop:
            for run in active:
                if run.end is None:
                    run.interrupt()
            break

        # The next steps of all members, in one dispatch.
        sums = runs[0].sums if is_alone else _stacked([run.sums for run in runs])
        began = time.perf_counter()
        population.state, sums = population.plan.training.segment(
            population.hyper, population.state, sums, population.train, np.int32(n_steps)
        )
        jax.block_until_ready(population.state)
        run_s = time.perf_counter() - began
        step_s = run_s / n_steps
        sums = sharding.to_host(sums)
        for run in active:
            run.timing += Timing(run_s=run_s / len(active))
            run.step += n_steps
            run.sums = sums if is_alone else _member(sums, run.slot)
        for run in active:
            if run.member.on_progress is not None:
                with run.isolated():
                    run.member.on_progress(run.step)

        # The members whose epoch is over: evaluate, report, and decide whether the trial is over.
        at_epoch_end = [run for run in active if run.end is None and run.at_epoch_end]
        for run in at_epoch_end:
            with run.isolated():
                run.end = agreed_end(_evaluate_epoch(run, population))
        clock.charge(active)
        for run in at_epoch_end:
            with run.isolated():
                if run.end is None:
                    _finish_epoch(run, population)


def _save(saving: list[tuple[MemberRun, CheckpointManager]], population: _Population) -> None:
    """Save every member's state. The copies, 12 bytes per parameter, are gone before the next segment."""
    began = time.perf_counter()
    states = population.states_on_host()
    for run, _ in saving:
        with run.isolated():
            run.save(states[run.slot])
    if population.n_members > 1:
        cost_s = time.perf_counter() - began
        for _, checkpoints in saving:
            checkpoints.saved_beside_others(cost_s)


def _evaluate_epoch(run: MemberRun, population: _Population) -> TrialEnd | None:
    """Evaluate the epoch's parameters and keep the result in the run's progress; an end if the epoch diverged."""
    inputs, progress, config = run.inputs, run.progress, run.inputs.config
    loss = float(np.float32(run.sums.loss_sum) / np.float32(len(inputs.dataset.train.rows)))
    bad_step = int(run.sums.bad_step)
    run.sums = EpochSums()
    if bad_step >= 0 or not loss <= EXPLODED_LOSS:
        progress.add_epoch(step=run.step, train_loss=None, evaluated={})
        if bad_step >= 0:
            return TrialEnd("diverged", f"loss, gradients or parameters not finite at step {bad_step + 1}")
        return TrialEnd("diverged", f"mean training loss {loss:.3g} in epoch {progress.epoch}")

    # The model that is evaluated and kept has its output in the target's own units: no scale travels with it.
    kind, scale = family.of(config.model), population.scale
    params = population.plan.training.member(population.state.params, np.int32(run.slot))
    if scale != TargetScale(mean=0.0, sd=1.0):
        params = kind.rescale_output(params, scale.mean, scale.sd)
    params = sharding.put(kind, run.batch_layout.layout, params)
    began = time.perf_counter()
    outputs = sharding.to_host(population.plan.forward.run(params, population.validation))
    outputs = outputs[: len(inputs.dataset.validation.rows)].copy()
    run.timing += Timing(run_s=time.perf_counter() - began)

    # Losses of a regression are in variances of the target; the record's are in squared log returns.
    train_loss = loss * scale.sd**2
    if not np.isfinite(outputs).all():
        progress.add_epoch(step=run.step, train_loss=train_loss, evaluated={})
        return TrialEnd("diverged", f"validation outputs not finite after epoch {progress.epoch}")
    progress.add_epoch(step=run.step, train_loss=train_loss, evaluated=validation_metrics(inputs, outputs))
    is_constant = is_collapsed(config, outputs, scale)
    progress.collapsed_in_a_row = progress.collapsed_in_a_row + 1 if is_constant else 0
    progress.keep_if_best(inputs.metric, params, outputs)
    return None


def _finish_epoch(run: MemberRun, population: _Population) -> None:
    """Report the epoch, and end the trial if it was its last."""
    if run.member.on_epoch is not None:
        run.member.on_epoch(run.report())
    end = agreed_end(end_of_trial(run.inputs, run.progress))
    if end is not None and run.member.saves is not None and run.member.saves.at_end:
        run.save(population.states_on_host()[run.slot])
    run.end = end
