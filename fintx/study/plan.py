"""What would a sweep file run? Everything that can be said before the first trial, as data; nothing is written."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp

from fintx.config import load
from fintx.config.bounds import parse_parameters
from fintx.config.schema import (
    ArchitectureConfig,
    BudgetConfig,
    ExecutionConfig,
    ModelConfig,
    Shape,
    StudySpec,
    check_shape,
)
from fintx.config.validate import Where, spelled
from fintx.data import datasets
from fintx.errors import FintxError
from fintx.evaluate import significance
from fintx.evaluate.significance import Power
from fintx.model import encoder, family, param_count
from fintx.study import queue
from fintx.study.search_space import SearchSpace
from fintx.train import memory
from fintx.train.memory import Footprint
from fintx.train.sharding import Layout
from fintx.train.train_state import BatchLayout

_EFFICIENCY = 0.35
"""Share of this machine's matmul rate that a train step reaches (small matmuls, elementwise work, dropout)."""
_LAYER_S = 5e-4
"""Per layer and step beside the matmuls: loop turns, small kernels."""
_COMPILE_S = 8.0
"""Trace, lower and compile one shape."""
_LARGE_BYTES, _LARGE_GPU = 8 * 2**30, 141_000_000_000
"""From which size on a trial is also planned on large GPUs, and their memory (an H200's)."""


@dataclass(frozen=True)
class Machine:
    """Devices to plan for."""

    n_devices: int
    memory: int
    """Bytes of each."""
    here: bool = False
    """They are this machine's, and the memory is what a trial can have of it."""

    @property
    def usable_bytes(self) -> int:
        """What a trial can have on each device."""
        return self.memory if self.here else round(memory.OF_A_GPU * self.memory)

    def __str__(self) -> str:
        if self.here:
            return "here" if self.n_devices == 1 else f"here, {self.n_devices} devices"
        return f"{self.n_devices} × {self.memory / 1e9:.0f} GB"


@dataclass(frozen=True)
class QueueRow:
    """A queued shape, its exact size, where the values it leaves open come from, and the note it carries."""

    identity: str
    shape: Shape
    param_count: int
    training: str
    note: str


@dataclass(frozen=True)
class TimeEstimate:
    """Time and memory on this machine: rough, and an upper bound in epochs (early stopping comes sooner)."""

    matmul_gflops: float
    """Measured now: matrix products in the compute dtype on the default device."""
    trial_s: tuple[float, float, float]
    """Smallest, median and largest feasible shape, all epochs."""
    study_s: float
    memory: tuple[MemoryRow, ...]


@dataclass(frozen=True)
class MemoryRow:
    """What one shape's trials hold on each of some devices, estimated."""

    machine: str
    shape: Shape
    param_count: int
    batch_size: int
    layout: Layout
    footprint: Footprint
    """In one pass per step, as long as memory asks for no relief."""
    recomputed_bytes: int
    """The activations, if layers are computed again."""
    device_bytes: int
    fitting: BatchLayout | None
    """With the least relief that makes it fit; none: nothing does."""


@dataclass(frozen=True)
class StudyPlan:
    """What `fintx plan` prints."""

    spec: StudySpec
    resolved: str
    """The whole sweep file, resolved, as TOML."""
    prepared: datasets.PreparedData
    shapes: tuple[tuple[Shape, int], ...]
    """Every feasible shape with its exact parameter count."""
    queue: tuple[QueueRow, ...]
    """What runs first, extremes included; cancelled entries are left out."""
    power: tuple[tuple[str, Power], ...]
    """What each validation part can show, and all of them together where there are several; none for a regression."""
    estimate: TimeEstimate


def machine(devices: int | None, device_memory: str | None) -> Machine:
    """This machine, or what the command line says of another.

    Raises:
        FintxError: the memory is no amount.
    """
    if device_memory is None:
        return Machine(devices or jax.device_count(), memory.device_bytes(), here=True)
    try:
        return Machine(
            devices or jax.device_count(), ExecutionConfig.model_validate({"memory": device_memory}).memory or 0
        )
    except ValueError:
        raise FintxError(f'--device-memory {device_memory}: wanted an amount like "80GB" or "80GiB"') from None


def plan_study(spec: StudySpec, *, data_root: Path, on: Machine | None = None, where: Where = spelled) -> StudyPlan:
    """Resolve a spec against its data and count everything; runs and writes nothing.

    Args:
        on: the devices to plan for; none: this machine's.
        where: tells where a key of the file stands.

    Raises:
        FintxError: whatever would stop the study from starting.
    """
    prepared = datasets.build(spec, data_root)
    spec = spec.model_copy(update={"data": prepared.data})
    n_features = len(spec.data.features)
    queue.validate(spec, n_features=n_features, where=where)
    space = SearchSpace.build(spec, n_features=n_features)
    counted = tuple((shape, param_count.count_params(spec.model, shape, n_features).total) for shape in space.shapes)
    return StudyPlan(
        spec=spec,
        resolved=load.dump(spec),
        prepared=prepared,
        shapes=counted,
        queue=tuple(
            QueueRow(
                identity=queue.entry_id(entry),
                shape=entry.shape,
                param_count=param_count.count_params(spec.model, entry.shape, n_features).total,
                training=entry.training,
                note=entry.note,
            )
            for entry in queue.entries(spec, space)
        ),
        power=_power(spec, prepared),
        estimate=_estimate(spec, counted, prepared, n_features, on or machine(None, None)),
    )


def _power(spec: StudySpec, prepared: datasets.PreparedData) -> tuple[tuple[str, Power], ...]:
    if spec.task.predicts != "probability":
        return ()
    found, n_trials = [], spec.study.n_trials
    n = n_positive = effective = 0.0
    for part in prepared.parts:
        if part.part.startswith("validation") and part.base_rate is not None:
            n, n_positive, effective = n + part.n, n_positive + part.n * part.base_rate, effective + part.n_effective
            if 0 < part.base_rate < 1:
                found.append(
                    (part.part, significance.paired_power(part.base_rate, part.n, part.n_effective, n_trials=n_trials))
                )
    if len(found) > 1:
        found.append(("all", significance.paired_power(n_positive / n, int(n), effective, n_trials=n_trials)))
    return tuple(found)


def _estimate(
    spec: StudySpec,
    counted: tuple[tuple[Shape, int], ...],
    prepared: datasets.PreparedData,
    n_features: int,
    machine: Machine,
) -> TimeEstimate:
    by_size = sorted(counted, key=lambda pair: pair[1])
    typical = (by_size[0][0], by_size[len(by_size) // 2][0], by_size[-1][0])
    rate = _matmul_rate(spec.model.compute_dtype)
    n_train = sum(len(fold.train.rows) for fold in prepared.folds)
    n_validation = sum(len(fold.validation.rows) for fold in prepared.folds)
    seconds = []
    for shape in typical:
        flops = param_count.flops(spec.model, shape, n_features)
        epoch = n_train * (flops.forward + flops.backward) + n_validation * flops.forward
        steps = n_train / spec.train.batch_size
        epoch_s = epoch / (rate * _EFFICIENCY) + steps * family.of(spec.model).depth(shape) * _LAYER_S
        seconds.append(_COMPILE_S + spec.train.max_epochs * epoch_s)
    return TimeEstimate(
        matmul_gflops=rate / 1e9,
        trial_s=(seconds[0], seconds[1], seconds[2]),
        study_s=seconds[1] * spec.study.n_trials,
        memory=_memory(spec, by_size[0], by_size[-1], n_features, machine),
    )


def _memory(
    spec: StudySpec, smallest: tuple[Shape, int], largest: tuple[Shape, int], n_features: int, machine: Machine
) -> tuple[MemoryRow, ...]:
    """The smallest and the largest shape on the machine; a large one on one to eight large GPUs too."""
    rows = [_memory_row(spec, pair, n_features, machine) for pair in dict.fromkeys((smallest, largest))]
    if rows[-1].footprint.total > _LARGE_BYTES and machine.here:
        rows += [_memory_row(spec, largest, n_features, Machine(n, _LARGE_GPU)) for n in (1, 2, 4, 8)]
    return tuple(rows)


def _memory_row(spec: StudySpec, pair: tuple[Shape, int], n_features: int, machine: Machine) -> MemoryRow:
    (shape, total), batch_size = pair, spec.train.batch_size
    layout = memory.choose(
        spec.mesh, spec.model, shape, n_features,
        batch_size=batch_size, n_devices=machine.n_devices, device_bytes=machine.usable_bytes,
    )  # fmt: skip
    plain = BatchLayout(batch_size, layout=layout)

    def held(batch_layout: BatchLayout) -> Footprint:
        return memory.footprint(spec.model, shape, n_features, batch_layout)

    fitting: BatchLayout | None = plain
    while fitting is not None and held(fitting).total > machine.usable_bytes:
        fitting = memory.relieved(fitting)
    recomputed = held(replace(plain, remat=True)).activations
    return MemoryRow(
        str(machine), shape, total, batch_size, layout, held(plain), recomputed, machine.usable_bytes, fitting
    )  # fmt: skip


def _matmul_rate(dtype: str) -> float:
    """Best of five 1024² products on the default device, in FLOP/s."""
    size = 1024
    a = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


# --- fintx params -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShapeCount:
    """One shape, counted."""

    shape: Shape
    count: param_count.ParamCount
    flops: param_count.Flops
    state_bytes: int
    head_counts: tuple[int, ...]
    """Every number of heads that divides d_model."""
    budget: BudgetConfig | None


@dataclass(frozen=True)
class FittingDepths:
    """Which depths fit a budget, per width and d_ff ratio."""

    budget: BudgetConfig
    rows: tuple[tuple[int, float, int, int, int, int], ...]
    """(d_model, d_ff ratio, fewest layers, its count, most layers, its count)."""
    head_counts: dict[int, tuple[int, ...]]


def shape_or_depths(
    *, d_model: int | None, n_layers: int | None, n_heads: int | None, d_ff: int | None, budget: str | None,
    tolerance: float, n_features: int, context_length: int, patch_length: int, stride: int,
) -> ShapeCount | FittingDepths:  # fmt: skip
    """Answer `fintx params`: a whole shape is counted; a budget without one lists the depths that fit.

    Raises:
        FintxError: values that make no model, or neither a shape nor a budget.
    """
    parts = {"--d-model": d_model, "--n-layers": n_layers, "--n-heads": n_heads, "--d-ff": d_ff}
    missing = [name for name, value in parts.items() if value is None]
    try:
        model = ModelConfig(context_length=context_length, patch_length=patch_length, stride=stride)
        wanted = None if budget is None else BudgetConfig(parameters=parse_parameters(budget), tolerance=tolerance)
        if not missing:
            shape = Shape(d_model=d_model, n_layers=n_layers, n_heads=n_heads, d_ff=d_ff)  # type: ignore[arg-type]
            check_shape(model, shape)
    except ValueError as error:
        raise FintxError(_plain(error)) from None
    if not missing:
        return ShapeCount(
            shape=shape,
            count=param_count.count_params(model, shape, n_features),
            flops=param_count.flops(model, shape, n_features),
            state_bytes=param_count.state_bytes(model, shape, n_features),
            head_counts=encoder.head_counts(shape.d_model),
            budget=wanted,
        )
    if wanted is None:
        raise FintxError(
            f"params: give a whole shape (missing {', '.join(missing)}), or a budget: fintx params --budget 200M"
        )
    return _depths(model, wanted, d_model, n_features)


def _depths(model: ModelConfig, budget: BudgetConfig, d_model: int | None, n_features: int) -> FittingDepths:
    candidates = ArchitectureConfig()
    widths = candidates.d_model if d_model is None else (d_model,)
    rows = []
    for width in widths:
        for ratio in candidates.d_ff_ratio:
            d_ff = round(ratio * width)
            depths = encoder.depths_for(budget, (model,), n_features, d_model=width, d_ff=d_ff)
            if depths:
                ends = [Shape(d_model=width, n_layers=n, n_heads=1, d_ff=d_ff) for n in (depths[0], depths[-1])]
                first, last = (param_count.count_params(model, shape, n_features).total for shape in ends)
                rows.append((width, ratio, depths[0], first, depths[-1], last))
    if not rows:
        raise FintxError(
            f"params: no depth of d_model {', '.join(map(str, widths))} holds {budget.low:,} … {budget.high:,} "
            "parameters; try another --d-model, --budget or --tolerance"
        )
    return FittingDepths(budget, tuple(rows), {width: encoder.head_counts(width) for width in {row[0] for row in rows}})


def _plain(error: ValueError) -> str:
    problems = getattr(error, "errors", None)
    if problems is None:
        return f"params: {error}"
    return "; ".join(f"params: {_option(p['loc'])}{p['msg'].removeprefix('Value error, ')}" for p in problems())


def _option(location: tuple[int | str, ...]) -> str:
    return f"--{str(location[0]).replace('_', '-')}: " if location else ""
