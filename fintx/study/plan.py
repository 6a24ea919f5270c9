"""What would a sweep file run? Everything that can be said before the first trial, as data; nothing is written."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from fintx import sweepfile
from fintx.config import (
    ArchitectureConfig,
    BudgetConfig,
    ModelConfig,
    Shape,
    StudySpec,
    parse_parameters,
)
from fintx.data import windows
from fintx.model import sizes
from fintx.study import queue
from fintx.study.space import SearchSpace
from fintx.types import FintxError

_EFFICIENCY = 0.35
"""Share of this machine's matmul rate that a train step reaches (small matmuls, elementwise work, dropout)."""
_LAYER_S = 5e-4
"""Per layer and step beside the matmuls: loop turns, small kernels."""
_COMPILE_S = 8.0
"""Trace, lower and compile one shape."""


@dataclass(frozen=True)
class QueueRow:
    """A queued shape, its exact size, where the values it leaves open come from, and the note it carries."""

    identity: str
    shape: Shape
    param_count: int
    training: str
    note: str


@dataclass(frozen=True)
class Estimate:
    """Time and memory on this machine: rough, and an upper bound in epochs (early stopping comes sooner)."""

    matmul_gflops: float
    """Measured now: matrix products in the compute dtype on the default device."""
    trial_s: tuple[float, float, float]
    """Smallest, median and largest feasible shape, all epochs."""
    study_s: float
    memory_bytes: tuple[float, float]
    """Training state and activations: smallest and largest feasible shape."""
    available_bytes: float


@dataclass(frozen=True)
class Plan:
    """What `fintx plan` prints."""

    spec: StudySpec
    resolved: str
    """The whole sweep file, resolved, as TOML."""
    prepared: windows.Prepared
    shapes: tuple[tuple[Shape, int], ...]
    """Every feasible shape with its exact parameter count."""
    queue: tuple[QueueRow, ...]
    """What runs first, extremes included; cancelled entries are left out."""
    estimate: Estimate


def build(spec: StudySpec, *, data_root: Path) -> Plan:
    """Resolve a spec against its data and count everything; runs and writes nothing.

    Raises:
        FintxError: whatever would stop the study from starting.
    """
    prepared = windows.build(
        spec.data, spec.task, spec.split, context_length=spec.model.context_length, root=data_root
    )  # fmt: skip
    spec = spec.model_copy(update={"data": prepared.data})
    n_features = len(spec.data.features)
    queue.validate(spec, n_features=n_features)
    space = SearchSpace.build(spec, n_features=n_features)
    counted = tuple((shape, sizes.count(spec.model, shape, n_features).total) for shape in space.shapes)
    return Plan(
        spec=spec,
        resolved=sweepfile.dump(spec),
        prepared=prepared,
        shapes=counted,
        queue=tuple(
            QueueRow(
                identity=queue.identity(entry),
                shape=entry.shape,
                param_count=sizes.count(spec.model, entry.shape, n_features).total,
                training=entry.training,
                note=entry.note,
            )
            for entry in queue.entries(spec, space)
        ),
        estimate=_estimate(spec, counted, prepared, n_features),
    )


def _estimate(
    spec: StudySpec, counted: tuple[tuple[Shape, int], ...], prepared: windows.Prepared, n_features: int
) -> Estimate:
    by_size = sorted(counted, key=lambda pair: pair[1])
    typical = (by_size[0][0], by_size[len(by_size) // 2][0], by_size[-1][0])
    rate = _matmul_rate(spec.model.compute_dtype)
    n_train = sum(len(fold.train.rows) for fold in prepared.folds)
    n_validation = sum(len(fold.validation.rows) for fold in prepared.folds)
    seconds = []
    for shape in typical:
        flops = sizes.flops(spec.model, shape, n_features)
        epoch = n_train * (flops.forward + flops.backward) + n_validation * flops.forward
        steps = n_train / spec.train.batch_size
        epoch_s = epoch / (rate * _EFFICIENCY) + steps * shape.n_layers * _LAYER_S
        seconds.append(_COMPILE_S + spec.train.max_epochs * epoch_s)
    memory = [sizes.memory(spec.model, shape, n_features, batch_size=spec.train.batch_size) for shape in typical]
    return Estimate(
        matmul_gflops=rate / 1e9,
        trial_s=(seconds[0], seconds[1], seconds[2]),
        study_s=seconds[1] * spec.study.n_trials,
        memory_bytes=(float(min(memory)), float(max(memory))),
        available_bytes=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
    )


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
class ShapeAnswer:
    """One shape, counted."""

    shape: Shape
    count: sizes.Count
    flops: sizes.Flops
    state_bytes: int
    head_counts: tuple[int, ...]
    """Every number of heads that divides d_model."""
    budget: BudgetConfig | None


@dataclass(frozen=True)
class DepthsAnswer:
    """Which depths fit a budget, per width and d_ff ratio."""

    budget: BudgetConfig
    rows: tuple[tuple[int, float, int, int, int, int], ...]
    """(d_model, d_ff ratio, fewest layers, its count, most layers, its count)."""
    head_counts: dict[int, tuple[int, ...]]


def params_question(
    *, d_model: int | None, n_layers: int | None, n_heads: int | None, d_ff: int | None, budget: str | None,
    tolerance: float, n_features: int, context_length: int, patch_length: int, stride: int,
) -> ShapeAnswer | DepthsAnswer:  # fmt: skip
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
    except ValueError as error:
        raise FintxError(_plain(error)) from None
    if not missing:
        return ShapeAnswer(
            shape=shape,
            count=sizes.count(model, shape, n_features),
            flops=sizes.flops(model, shape, n_features),
            state_bytes=sizes.state_bytes(model, shape, n_features),
            head_counts=sizes.head_counts(shape.d_model),
            budget=wanted,
        )
    if wanted is None:
        raise FintxError(
            f"params: give a whole shape (missing {', '.join(missing)}), or a budget: fintx params --budget 200M"
        )
    return _depths(model, wanted, d_model, n_features)


def _depths(model: ModelConfig, budget: BudgetConfig, d_model: int | None, n_features: int) -> DepthsAnswer:
    candidates = ArchitectureConfig()
    widths = candidates.d_model if d_model is None else (d_model,)
    rows = []
    for width in widths:
        for ratio in candidates.d_ff_ratio:
            d_ff = round(ratio * width)
            depths = sizes.depths_for(budget, (model,), n_features, d_model=width, d_ff=d_ff)
            if depths:
                ends = [Shape(d_model=width, n_layers=n, n_heads=1, d_ff=d_ff) for n in (depths[0], depths[-1])]
                first, last = (sizes.count(model, shape, n_features).total for shape in ends)
                rows.append((width, ratio, depths[0], first, depths[-1], last))
    if not rows:
        raise FintxError(
            f"params: no depth of d_model {', '.join(map(str, widths))} holds {budget.low:,} … {budget.high:,} "
            "parameters; try another --d-model, --budget or --tolerance"
        )
    return DepthsAnswer(budget, tuple(rows), {width: sizes.head_counts(width) for width in {row[0] for row in rows}})


def _plain(error: ValueError) -> str:
    problems = getattr(error, "errors", None)
    if problems is None:
        return f"params: {error}"
    return "; ".join(f"params: {_option(p['loc'])}{p['msg'].removeprefix('Value error, ')}" for p in problems())


def _option(location: tuple[int | str, ...]) -> str:
    return f"--{str(location[0]).replace('_', '-')}: " if location else ""
