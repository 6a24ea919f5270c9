"""Plan: what `fintx plan` and `fintx params` print, computed before any trial; nothing is run or written."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
from pydantic import ValidationError

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
"""Seconds per layer and step besides the matmuls: loop overhead, small kernels."""
_COMPILE_S = 8.0
"""Seconds to trace, lower and compile one shape."""
_LARGE_BYTES, _LARGE_GPU = 8 * 2**30, 141_000_000_000
"""A trial above this size is also planned on large GPUs; their memory (an H200's). Bytes."""


@dataclass(frozen=True)
class Machine:
    """Devices to plan for."""

    n_devices: int
    memory: int
    """Bytes of each."""
    here: bool = False
    """Whether they are this machine's; then the memory is what a trial can have of it."""

    @property
    def usable_bytes(self) -> int:
        """What a trial can have on each device, bytes."""
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
    """Time and memory, roughly; time is that of all epochs, without early stopping."""

    matmul_gflops: float
    """Measured now, in the compute dtype on the default device."""
    trial_s: tuple[float, float, float]
    """Smallest, median and largest feasible shape, all epochs."""
    study_s: float
    memory: tuple[MemoryRow, ...]


@dataclass(frozen=True)
class MemoryRow:
    """Estimated memory of one shape's trials on each device of a machine."""

    machine: str
    shape: Shape
    param_count: int
    batch_size: int
    layout: Layout
    footprint: Footprint
    """In one pass per step, with nothing done to save memory."""
    recomputed_bytes: int
    """The activations, if layers are computed again."""
    device_bytes: int
    fitting: BatchLayout | None
    """The least reduction that makes it fit; none: nothing does."""


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
    """Validation part → what it can show, and "all" where there are several; empty for a regression."""
    estimate: TimeEstimate


def machine(devices: int | None, device_memory: str | None) -> Machine:
    """This machine, or what the command line says of another.

    Raises:
        FintxError: the memory is no amount.
    """
    n_devices = devices or jax.device_count()
    if device_memory is None:
        return Machine(n_devices, memory.device_bytes(), here=True)
    try:
        return Machine(n_devices, ExecutionConfig.model_validate({"memory": device_memory}).memory or 0)
    except ValueError:
        raise FintxError(f'--device-memory {device_memory}: wanted an amount like "80GB" or "80GiB"') from None


def plan_study(spec: StudySpec, *, data_root: Path, on: Machine | None = None, where: Where = spelled) -> StudyPlan:
    """Resolve a spec against its data and count everything; nothing is run or written.

    Args:
        on: the devices to plan for; none: this machine's.
        where: where a key of the file is, for messages.

    Raises:
        FintxError: the study couldn't start.
    """
    prepared = datasets.build(spec, data_root)
    spec = spec.model_copy(update={"data": prepared.data})
    n_features = len(spec.data.features)
    queue.check(spec, n_features=n_features, where=where)
    space = SearchSpace.build(spec, n_features=n_features, where=where)
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
    n_trials = spec.study.n_trials
    parts = [part for part in prepared.parts if part.part.startswith("validation") and part.base_rate is not None]
    powers = [
        (part.part, significance.paired_power(part.base_rate, part.n, part.n_effective, n_trials=n_trials))
        for part in parts
        if part.base_rate is not None and 0 < part.base_rate < 1
    ]
    if len(powers) > 1:
        n = sum(part.n for part in parts)
        base_rate = sum(part.n * (part.base_rate or 0) for part in parts) / n
        n_effective = sum(part.n_effective for part in parts)
        powers.append(("all", significance.paired_power(base_rate, n, n_effective, n_trials=n_trials)))
    return tuple(powers)


def _estimate(
    spec: StudySpec,
    counted: tuple[tuple[Shape, int], ...],
    prepared: datasets.PreparedData,
    n_features: int,
    machine: Machine,
) -> TimeEstimate:
    """Time of three sizes; memory of two on the machine, and of a large one on one to eight large GPUs too."""
    by_size = sorted(counted, key=lambda pair: pair[1])
    smallest, median, largest = by_size[0], by_size[len(by_size) // 2], by_size[-1]
    rate = _matmul_rate(spec.model.compute_dtype)
    n_train = sum(len(fold.train.rows) for fold in prepared.folds)
    n_validation = sum(len(fold.validation.rows) for fold in prepared.folds)

    def trial_s(shape: Shape) -> float:
        flops = param_count.flops(spec.model, shape, n_features)
        epoch_flops = n_train * (flops.forward + flops.backward) + n_validation * flops.forward
        steps = n_train / spec.train.batch_size
        epoch_s = epoch_flops / (rate * _EFFICIENCY) + steps * family.of(spec.model).depth(shape) * _LAYER_S
        return _COMPILE_S + spec.train.max_epochs * epoch_s

    rows = [_memory_row(spec, *pair, n_features, machine) for pair in dict.fromkeys((smallest, largest))]
    if rows[-1].footprint.total > _LARGE_BYTES and machine.here:
        rows += [_memory_row(spec, *largest, n_features, Machine(n, _LARGE_GPU)) for n in (1, 2, 4, 8)]
    median_s = trial_s(median[0])
    return TimeEstimate(
        matmul_gflops=rate / 1e9,
        trial_s=(trial_s(smallest[0]), median_s, trial_s(largest[0])),
        study_s=median_s * spec.study.n_trials,
        memory=tuple(rows),
    )


def _memory_row(spec: StudySpec, shape: Shape, n_params: int, n_features: int, machine: Machine) -> MemoryRow:
    layout = memory.choose(
        spec.mesh, spec.model, shape, n_features,
        batch_size=spec.train.batch_size, n_devices=machine.n_devices, device_bytes=machine.usable_bytes,
    )  # fmt: skip
    plain = BatchLayout(spec.train.batch_size, layout=layout)

    def footprint(batch_layout: BatchLayout) -> Footprint:
        return memory.footprint(spec.model, shape, n_features, batch_layout)

    fitting: BatchLayout | None = plain
    while fitting is not None and footprint(fitting).total > machine.usable_bytes:
        fitting = memory.relieved(fitting)
    return MemoryRow(
        machine=str(machine),
        shape=shape,
        param_count=n_params,
        batch_size=spec.train.batch_size,
        layout=layout,
        footprint=footprint(plain),
        recomputed_bytes=footprint(replace(plain, remat=True)).activations,
        device_bytes=machine.usable_bytes,
        fitting=fitting,
    )


def _matmul_rate(dtype: str) -> float:
    """Best of five 1024² products on the default device, in FLOP/s."""
    size = 1024
    a = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - start)
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
class FittingDepth:
    """The depths that fit a budget at one width and d_ff ratio."""

    d_model: int
    d_ff_ratio: float
    fewest: tuple[int, int]
    """Layers, and the parameters that they make."""
    most: tuple[int, int]
    head_counts: tuple[int, ...]
    """Every number of heads that divides d_model."""


@dataclass(frozen=True)
class FittingDepths:
    """Which depths fit a budget."""

    budget: BudgetConfig
    rows: tuple[FittingDepth, ...]


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
        limits = None if budget is None else BudgetConfig(parameters=parse_parameters(budget), tolerance=tolerance)
        if not missing:
            shape = Shape(d_model=d_model, n_layers=n_layers, n_heads=n_heads, d_ff=d_ff)  # type: ignore[arg-type]
            check_shape(model, shape)
    except ValidationError as error:
        problems = [(f"--{p['loc'][0]}: ".replace("_", "-") if p["loc"] else "", p["msg"]) for p in error.errors()]
        lines = [f"params: {option}{message.removeprefix('Value error, ')}" for option, message in problems]
        raise FintxError("; ".join(lines)) from None
    except ValueError as error:
        raise FintxError(f"params: {error}") from None
    if not missing:
        return ShapeCount(
            shape=shape,
            count=param_count.count_params(model, shape, n_features),
            flops=param_count.flops(model, shape, n_features),
            state_bytes=param_count.state_bytes(model, shape, n_features),
            head_counts=encoder.head_counts(shape.d_model),
            budget=limits,
        )
    if limits is None:
        raise FintxError(
            f"params: give a whole shape (missing {', '.join(missing)}), or a budget: fintx params --budget 200M"
        )
    candidates = ArchitectureConfig()
    widths = candidates.d_model if d_model is None else (d_model,)
    rows = []
    for width, ratio in itertools.product(widths, candidates.d_ff_ratio):
        d_ff = round(ratio * width)
        if depths := encoder.depths_for(limits, (model,), n_features, d_model=width, d_ff=d_ff):
            ends = [Shape(d_model=width, n_layers=n, n_heads=1, d_ff=d_ff) for n in (depths[0], depths[-1])]
            first, last = (param_count.count_params(model, shape, n_features).total for shape in ends)
            rows.append(FittingDepth(width, ratio, (depths[0], first), (depths[-1], last), encoder.head_counts(width)))
    if not rows:
        raise FintxError(
            f"params: no depth of d_model {', '.join(map(str, widths))} holds {limits.low:,} … {limits.high:,} "
            "parameters; try another --d-model, --budget or --tolerance"
        )
    return FittingDepths(limits, tuple(rows))
