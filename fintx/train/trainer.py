"""How do trials run from config to result, one alone or several side by side? The loop over segments and epochs.

Members of a population share a program: one dispatch takes the next steps of all, `vmap` of what a trial alone would
run. All that a member's own numbers decide happens on the host, member by member: when its epoch ends, whether that is
its best, whether it stops early, diverged or collapsed. Whoever has ended is left to compute on unheeded, until the
others have ended too; that is free of errors and of a second program. Evaluation is the single trial's program, one
member after the other, so that records and later evaluations agree.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from fintx.config.schema import MeshConfig, ModelConfig, TrialConfig
from fintx.data.datasets import Dataset
from fintx.errors import FintxError
from fintx.evaluate import metrics
from fintx.model import family
from fintx.train import compilation, memory, multihost, progress, sharding, train_step
from fintx.train.member_run import Member, MemberRun, SharedClock
from fintx.train.progress import EXPLODED_LOSS, End, Epoch, FitInputs, FitResult, Timing
from fintx.train.resume import CheckpointManager, CheckpointPolicy, TrainingState
from fintx.train.sharding import ONE, Layout
from fintx.train.train_state import (
    BatchLayout,
    Hyperparameters,
    TargetScale,
    TrainState,
    hyperparameters,
    in_target_units,
    static_config,
    static_model,
    target_scale,
)
from fintx.train.train_step import DispatchSize, empty_sums
from fintx.types import Floats, Ints, Params

_Begun = tuple[MemberRun, TrainingState | None]
"""An attempt, and what an earlier one has left."""


def fit_population(
    members: Sequence[Member],
    dataset: Dataset,
    *,
    metric: str,
    should_stop: Callable[[], bool] | None = None,
    memory_limit: int | None = None,
    mesh: MeshConfig | None = None,
) -> list[FitResult | Exception]:
    """Train trials side by side; each comes to what it comes to alone, but for the rounding of float32 sums.

    A member is saved as the trial that it is, and may be taken up alone or in any other company. Where not all fit
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
    watch = SharedClock()
    if metric not in metrics.MINIMIZE:
        raise FintxError(f'metric = "{metric}" is unknown; use one of {", ".join(metrics.MINIMIZE)}')
    if len({static_config(member.config) for member in members}) != 1:
        raise ValueError("the members of a population share one program")
    layout = _layout(members[0].config, dataset, mesh)
    limit = multihost.least(memory.available(layout) if memory_limit is None else memory_limit)
    attempts = [
        MemberRun(
            member,
            FitInputs(member.config, dataset, metric),
            BatchLayout(member.config.train.batch_size, layout=layout),
        )
        for member in members
    ]
    try:
        _run(attempts, watch, limit=limit, should_stop=should_stop or (lambda: False))
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if len(attempts) > 1 or not memory.is_out_of_memory(error):
            raise
        attempts[0].ended = End("out_of_memory", str(error).partition("\n")[0])
        watch.charge(attempts)
    return [attempt.result() for attempt in attempts]


def compile_ahead(
    config: TrialConfig,
    dataset: Dataset,
    *,
    n_members: int = 1,
    memory_limit: int | None = None,
    mesh: MeshConfig | None = None,
) -> None:
    """Compile what `fit_population` will ask for, from any thread, so that it finds it made."""
    layout = _layout(config, dataset, mesh)
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


def _layout(config: TrialConfig, dataset: Dataset, mesh: MeshConfig | None) -> Layout:
    if mesh is None:
        return ONE
    chosen = memory.choose(
        mesh,
        config.model,
        config.shape,
        dataset.features.shape[1],
        batch_size=config.train.batch_size,
        n_devices=jax.device_count(),
        device_bytes=memory.device_bytes(),
    )
    data, model, fsdp = multihost.agree(chosen.data, chosen.model, chosen.fsdp)
    chosen = Layout(data=data, model=model, fsdp=bool(fsdp))
    if chosen.n_devices > 1:
        sharding.mesh_of(chosen)  # says now if it can't be made
    return chosen


def _run(attempts: list[MemberRun], watch: SharedClock, *, limit: int, should_stop: Callable[[], bool]) -> None:
    begun: dict[BatchLayout, list[_Begun]] = {}
    for attempt in attempts:
        with attempt.own():
            saved = _begin(attempt, limit=limit)
            if attempt.ended is None:
                begun.setdefault(attempt.batch_layout, []).append((attempt, saved))
    watch.charge(attempts)
    waiting = list(begun.values())  # more than one only where memory was once too short for some of them
    some_began = False
    while waiting:
        group, *waiting = waiting
        together = [attempt for attempt, _ in group]
        if some_began and should_stop():
            for attempt in together:
                attempt.ended = _interrupted(attempt)
            continue
        loaded = _load(group, watch, limit=limit)
        if isinstance(loaded, _Loaded):
            some_began = True
            _train(together, loaded, watch, should_stop)
        elif len(group) > 1:
            half = len(group) // 2
            waiting = [group[:half], group[half:], *waiting]
        else:
            together[0].ended = End("out_of_memory", str(loaded))
        watch.charge(together)


def _begin(attempt: MemberRun, *, limit: int) -> TrainingState | None:
    """What an earlier attempt has left; this one may be at its end already."""
    config, saves = attempt.question.config, attempt.member.saves
    if too_big := memory.too_big(config, limit=limit, layout=attempt.batch_layout.layout):
        attempt.memory_bytes = too_big.n_bytes
        attempt.ended = End("out_of_memory", str(too_big))
        return None
    if saves is None:
        return None
    attempt.keeper = CheckpointManager(saves, attempt.question)
    saved = attempt.keeper.newest(attempt.warn)
    if saved is not None:
        attempt.adopt(saved)
        if attempt.at_epochs_end:
            attempt.ended = progress.end_of_trial(attempt.question, attempt.progress)
    return saved


@dataclass
class _Loaded:
    """Members on their devices, compiled; their state changes. One alone has no axis R."""

    model: ModelConfig
    hyper: Hyperparameters
    training: train_step.TrainPrograms
    forward: train_step.ForwardProgram
    layout: Layout
    train: train_step.Windows
    validation: train_step.Windows
    scale: TargetScale
    state: TrainState
    n_members: int

    def params(self, slot: int) -> Params:
        """A member's parameters, in the target's units."""
        own = self.training.member(self.state.params, np.int32(slot))
        return sharding.put(family.of(self.model), self.layout, in_target_units(self.model, own, self.scale))

    def on_host(self) -> list[TrainState]:
        """Every member's state, by slot: copies, never views of what the next segment writes over."""
        whole = sharding.to_host(self.state)
        if self.n_members == 1:
            return [whole]
        return [jax.tree.map(lambda leaf, slot=slot: leaf[slot], whole) for slot in range(self.n_members)]


def _load(begun: list[_Begun], watch: SharedClock, *, limit: int) -> _Loaded | memory.OutOfMemory:
    attempts = [attempt for attempt, _ in begun]
    config, dataset = attempts[0].question.config, attempts[0].question.dataset
    labels, layout = dataset.train.labels, attempts[0].batch_layout.layout
    scale = target_scale(config.task, labels)
    train = train_step.place(dataset.features, dataset.train.rows, scale.apply(labels), layout=layout)
    validation = train_step.place(dataset.features, dataset.validation.rows, layout=layout)
    with compilation.timed_compilation() as made:
        plan = memory.plan_memory(
            config,
            train,
            validation,
            limit=limit,
            batch_layout=attempts[0].batch_layout,
            saves=any(attempt.keeper is not None for attempt in attempts),
            n_members=len(begun),
        )
    watch.charge(attempts)
    for attempt in attempts:
        attempt.timing += Timing(made.trace_s, made.compile_s, made.n_compiled).share(len(begun))
        attempt.memory_bytes = plan.n_bytes // len(begun)
    if isinstance(plan, memory.OutOfMemory):
        return plan
    for slot, (attempt, saved) in enumerate(begun):
        attempt.slot, attempt.batch_layout = slot, plan.batch_layout
        if saved is not None and plan.batch_layout != saved.batch_layout:
            masks = config.model.dropout > 0 and plan.batch_layout.micro_batch != saved.batch_layout.micro_batch
            attempt.warn(
                f"began in {saved.batch_layout}, goes on in {plan.batch_layout}: its numbers change "
                f"{'with their dropout masks' if masks else 'in their last digits'}"
            )
    values = [hyperparameters(attempt.question.config, labels=labels, scale=scale) for attempt in attempts]
    states = [
        plan.training.start(value) if saved is None else saved.state
        for value, (_, saved) in zip(values, begun, strict=True)
    ]
    kind = family.of(config.model)
    if len(begun) == 1:
        (value,), (state,) = values, states
        state = state if begun[0][1] is None else sharding.put(kind, layout, state)
    else:
        value, state = _stacked(values), sharding.put(kind, layout, _stacked(sharding.to_host(states)), leading=1)
    return _Loaded(
        config.model, value, plan.training, plan.forward, layout, train, validation, scale, state, len(begun)
    )  # fmt: skip


def _train(attempts: list[MemberRun], loaded: _Loaded, watch: SharedClock, should_stop: Callable[[], bool]) -> None:
    pace = DispatchSize()
    for attempt in attempts:
        if attempt.keeper is not None:
            attempt.keeper.start_clock()
        if attempt.member.on_begin is not None:
            with attempt.own():
                attempt.member.on_begin()
    while running := [attempt for attempt in attempts if attempt.ended is None]:
        stopping, due, n_steps = multihost.agree(
            int(should_stop()),
            int(any(attempt.keeper is not None and attempt.keeper.is_due() for attempt in running)),
            pace.steps(min(attempt.steps_left for attempt in running)),
        )
        if stopping or due:
            _save(running, loaded)
        if stopping:
            for attempt in running:
                attempt.ended = attempt.ended or _interrupted(attempt)
            break
        _segment(attempts, running, loaded, pace, n_steps)
        for attempt in running:
            if attempt.member.on_progress is not None:
                with attempt.own():
                    attempt.member.on_progress(attempt.step)
        closing = [attempt for attempt in running if attempt.ended is None and attempt.at_epochs_end]
        for attempt in closing:
            with attempt.own():
                attempt.ended = progress.agreed_end(_close_epoch(attempt, loaded))
        watch.charge(running)
        for attempt in closing:
            if attempt.ended is None:
                with attempt.own():
                    _go_on(attempt, loaded)


def _segment(
    attempts: list[MemberRun], running: list[MemberRun], loaded: _Loaded, pace: DispatchSize, n_steps: int
) -> None:
    """Steps of all in one dispatch."""
    alone = len(attempts) == 1
    tally = attempts[0].tally if alone else _stacked([attempt.tally for attempt in attempts])
    began = time.perf_counter()
    loaded.state, tally = loaded.training.segment(loaded.hyper, loaded.state, tally, loaded.train, np.int32(n_steps))
    jax.block_until_ready(loaded.state)
    took_s = time.perf_counter() - began
    pace.note(n_steps, took_s)
    tally = sharding.to_host(tally)
    for attempt in running:
        attempt.timing += Timing(run_s=took_s / len(running))
        attempt.step += n_steps
        attempt.tally = tally if alone else jax.tree.map(lambda leaf, slot=attempt.slot: leaf[slot], tally)


def _save(running: list[MemberRun], loaded: _Loaded) -> None:
    saving = [attempt for attempt in running if attempt.keeper is not None]
    if not saving:
        return
    began = time.perf_counter()
    states = loaded.on_host()
    for attempt in saving:
        with attempt.own():
            attempt.save(states[attempt.slot])
    cost_s = time.perf_counter() - began
    for attempt in saving:
        assert attempt.keeper is not None
        if loaded.n_members > 1:
            attempt.keeper.saved_beside_others(cost_s)


def _interrupted(attempt: MemberRun) -> End:
    epochs = f"after epoch {attempt.progress.epoch} of {attempt.question.config.train.max_epochs}"
    return End("interrupted", f"asked to stop at step {attempt.step}, {epochs}")


def _close_epoch(attempt: MemberRun, loaded: _Loaded) -> End | None:
    """Evaluate the epoch's parameters and note the result; an end if the epoch diverged."""
    question, known = attempt.question, attempt.progress
    n = np.float32(len(question.dataset.train.rows))
    loss, bad_step = float(np.float32(attempt.tally.loss_sum) / n), int(attempt.tally.bad_step)
    attempt.tally = empty_sums()
    if bad_step >= 0 or not loss <= EXPLODED_LOSS:
        known.note(step=attempt.step, train_loss=None, evaluated={})
        what = f"loss, gradients or parameters not finite at step {bad_step + 1}"
        return End("diverged", what if bad_step >= 0 else f"mean training loss {loss:.3g} in epoch {known.epoch}")
    params = loaded.params(attempt.slot)
    n_validation = len(question.dataset.validation.rows)
    began = time.perf_counter()
    outputs = sharding.to_host(loaded.forward.run(params, loaded.validation))[:n_validation].copy()
    attempt.timing += Timing(run_s=time.perf_counter() - began)
    # Losses of a regression are in variances of the target; the record's are in squared log returns.
    train_loss = loss * loaded.scale.sd**2
    if not np.isfinite(outputs).all():
        known.note(step=attempt.step, train_loss=train_loss, evaluated={})
        return End("diverged", f"validation outputs not finite after epoch {known.epoch}")
    known.note(step=attempt.step, train_loss=train_loss, evaluated=progress.validation_metrics(question, outputs))
    collapsed = progress.is_collapsed(question.config, outputs, loaded.scale)
    known.collapsed_in_a_row = known.collapsed_in_a_row + 1 if collapsed else 0
    known.keep_if_best(question.metric, params, outputs)
    return None


def _go_on(attempt: MemberRun, loaded: _Loaded) -> None:
    """Tell of the epoch; was it the last?"""
    if attempt.member.on_epoch is not None:
        attempt.member.on_epoch(attempt.epoch())
    end = progress.agreed_end(progress.end_of_trial(attempt.question, attempt.progress))
    if end is not None and attempt.member.saves is not None and attempt.member.saves.at_end:
        attempt.save(loaded.on_host()[attempt.slot])
    attempt.ended = end


def _stacked(trees: Sequence[TrainState | Hyperparameters | train_step.EpochSums]) -> Any:
    """Trees of host arrays as one whose leaves have a leading axis R."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def fit(
    config: TrialConfig,
    dataset: Dataset,
    *,
    metric: str,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    saves: CheckpointPolicy | None = None,
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
    member = Member(config, on_epoch=on_epoch, on_progress=on_progress, on_warning=on_warning, saves=saves)
    (result,) = fit_population(
        [member], dataset, metric=metric, should_stop=should_stop, memory_limit=memory_limit, mesh=mesh
    )  # fmt: skip
    if isinstance(result, Exception):
        raise result
    return result


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
    return sharding.to_host(forward.run(sharding.put(family.of(config.model), layout, params), windows))[
        : len(rows)
    ].copy()
