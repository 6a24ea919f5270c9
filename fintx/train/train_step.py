"""How many steps go into one dispatch? As many as take about a second and a half, by the clock.

A dispatch can't be cut short: between two of them a trial can be stopped, saved and heard of. The steps of a small
model take well below a millisecond, and its epochs are one dispatch each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from fintx.config.schema import ModelConfig, Shape
from fintx.model import family
from fintx.train import losses, sharding
from fintx.train.compilation import compile_lowered, locked_cache
from fintx.train.optimizer import adamw, global_norm
from fintx.train.sharding import ONE, Layout
from fintx.train.train_state import (
    ORDER,
    STEP,
    Hyperparameters,
    StaticConfig,
    TrainState,
    abstract_hyperparameters,
    abstract_state,
    init_state,
    stream_key,
)
from fintx.types import Floats, Ints, Params

DISPATCH_S = 1.5
"""Seconds that no dispatch should exceed by much; a single step may."""


@dataclass
class DispatchSize:
    """What is known of a trial's speed. It decides where epochs are cut, which no result depends on."""

    step_s: float = math.inf
    """Seconds per step in the latest dispatch."""

    def steps(self, left: int) -> int:
        """Steps of the next dispatch, of `left` until the epoch's end: equal parts that are short enough, or one."""
        parts = max(1, math.ceil(min(left, left * self.step_s / DISPATCH_S)))
        return math.ceil(left / parts)

    def note(self, n_steps: int, seconds: float) -> None:
        """A dispatch is over."""
        self.step_s = seconds / n_steps


EVALUATION_BATCH = 256
"""Windows in a forward pass outside training: bounds its memory, and is part of the program, so that a number
computed again is the same number."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Windows:
    """Samples on the device: windows are gathered out of `features` inside jit, never stored."""

    features: Any
    """float32 (rows, F), padded with zeros."""
    rows: Any
    """int32 (S,): each sample's decision bar, padded with the first."""
    targets: Any
    """float32 (S,), padded with zeros."""
    n: Any
    """int32: true samples among the S."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """What a step sees. A weight is 1 for a sample and 0 for padding."""

    x: Any
    """float32 (B, T, F)."""
    targets: Any
    """float32 (B,)."""
    weights: Any
    """float32 (B,)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepReport:
    """What a step says of itself."""

    loss_sum: Any
    """Over the batch's true samples."""
    finite: Any
    """bool: loss and gradients."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EpochSums:
    """What an epoch adds up from step to step; it goes from segment to segment, so that no cut shows in it."""

    loss_sum: Any
    """float32: over the samples so far, each under the parameters that its step began with."""
    bad_step: Any
    """int32: the first step (from 0) whose loss, gradients or parameters were not finite; −1: none."""


def empty_sums() -> EpochSums:
    """Of an epoch that begins."""
    return EpochSums(loss_sum=np.float32(0), bad_step=np.int32(-1))


def train_step(
    static: StaticConfig, hyper: Hyperparameters, state: TrainState, batch: Batch
) -> tuple[TrainState, StepReport]:
    """One update on the mean loss of the batch's true samples."""
    loss, gradients = _gradients(static, hyper, state, batch)
    finite = jnp.isfinite(loss) & jnp.isfinite(global_norm(gradients))
    # optax mixes dtypes in its own arithmetic; nothing of ours does.
    with jax.numpy_dtype_promotion("standard"):
        transformation = adamw(hyper.optim, schedule=static.schedule, mask=static.family.weight_decay_mask)
        updates, optimizer = transformation.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
    report = StepReport(loss_sum=loss * jnp.sum(batch.weights), finite=finite)
    return TrainState(step=state.step + 1, params=params, optimizer=optimizer), report


def _gradients(
    static: StaticConfig, hyper: Hyperparameters, state: TrainState, batch: Batch
) -> tuple[Float[Array, ""], Params]:
    """The mean loss of the batch's true samples and its gradients, in as many passes as micro-batches fill the batch.

    Passes differ in the dropout's key; but for that, and for the order of sums (1e-6), they don't show.
    """
    key = jax.random.fold_in(stream_key(hyper, STEP), state.step) if static.stochastic else None
    total = jnp.sum(batch.weights)
    before_layer = partial(sharding.before_layer, static.family, static.layout)

    def share(params: Params, part: Batch, key: PRNGKeyArray | None) -> Float[Array, ""]:
        params, part = sharding.before_pass(static.family, static.layout, params, part)
        outputs_B = static.family.apply(
            static.model, static.shape, params, part.x,
            key=key, dropout=hyper.dropout, remat=static.remat, before_layer=before_layer,
        )  # fmt: skip
        losses_B = losses.per_example(static.loss, outputs_B, part.targets, values=hyper.loss)
        return jnp.sum(part.weights * losses_B) / total

    if static.micro_batch >= static.batch_size:
        return jax.value_and_grad(share)(state.params, batch, key)

    def add(carry: Any, indexed: tuple[Array, Batch]) -> tuple[Any, None]:
        index, part = indexed
        part_key = None if key is None else jax.random.fold_in(key, index)
        return jax.tree.map(jnp.add, carry, jax.value_and_grad(share)(state.params, part, part_key)), None

    parts = _micro_batches(batch, size=static.micro_batch)
    nothing = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.params))
    return jax.lax.scan(add, nothing, (jnp.arange(len(parts.weights), dtype=jnp.int32), parts))[0]


def _micro_batches(batch: Batch, *, size: int) -> Batch:
    """The batch with a leading axis of micro-batches; the last is filled up with its last sample, at weight 0."""
    missing = -batch.weights.shape[0] % size

    def cut(leaf: Array) -> Array:
        # A real sample, not zeros: its loss is as finite as any, and 0 times infinity would be NaN.
        padded = jnp.pad(leaf, ((0, missing), *[(0, 0)] * (leaf.ndim - 1)), mode="edge")
        return padded.reshape(-1, size, *leaf.shape[1:])

    weights = jnp.pad(batch.weights, (0, missing)).reshape(-1, size)
    return Batch(x=cut(batch.x), targets=cut(batch.targets), weights=weights)


def train_segment(
    static: StaticConfig,
    hyper: Hyperparameters,
    state: TrainState,
    tally: EpochSums,
    windows: Windows,
    n_steps: Int[Array, ""] | int,
) -> tuple[TrainState, EpochSums]:
    """The next `n_steps` batches of the epoch that `state.step` lies in, in that epoch's order; at most to its end."""
    size = static.batch_size
    per_epoch = (windows.n + size - 1) // size
    epoch, done = state.step // per_epoch, state.step % per_epoch
    order_S = epoch_order(hyper, epoch=epoch, n=windows.n, capacity=windows.rows.shape[0])

    def body(i: Any, carry: Any) -> Any:
        state, tally = carry
        step = state.step
        batch = gather_batch(static, windows, order_S, first=(done + i) * size)
        state, report = train_step(static, hyper, state, batch)
        return state, _add(tally, loss_sum=report.loss_sum, bad=~report.finite, step=step)

    state, tally = jax.lax.fori_loop(0, n_steps, body, (state, tally))
    # An update can overflow where loss and gradients did not; only an epoch's last would go unseen by the next step.
    overflown = (state.step % per_epoch == 0) & ~all_finite(state.params)
    return state, _add(tally, loss_sum=jnp.zeros_like(tally.loss_sum), bad=overflown, step=state.step - 1)


def _add(tally: EpochSums, *, loss_sum: Float[Array, ""], bad: Bool[Array, ""], step: Int[Array, ""]) -> EpochSums:
    first = bad & (tally.bad_step < 0)
    return EpochSums(loss_sum=tally.loss_sum + loss_sum, bad_step=jnp.where(first, step, tally.bad_step))


def epoch_order(
    hyper: Hyperparameters, *, epoch: Int[Array, ""] | int, n: Int[Array, ""] | int, capacity: int
) -> Int[Array, " S"]:
    """A permutation of 0 … n − 1, followed by the padding; a pure function of seed and epoch, whatever the capacity."""
    key = jax.random.fold_in(stream_key(hyper, ORDER), epoch)
    index_S = jnp.arange(capacity, dtype=jnp.int32)
    padding_S = (index_S >= n).astype(jnp.int32)
    bits_S = jax.random.bits(key, (capacity,), jnp.uint32)
    return jax.lax.sort((padding_S, bits_S, index_S), num_keys=2)[2]


def gather_batch(
    static: StaticConfig, windows: Windows, order_S: Int[Array, " S"], *, first: Int[Array, ""] | int
) -> Batch:
    """The batch of the samples order[first : first + B]; beyond the n-th sample, padding of weight 0."""
    position_B = first + jnp.arange(static.batch_size, dtype=jnp.int32)
    sample_B = order_S.at[position_B].get(mode="clip")
    x_BTF = _gather_windows(static.model.context_length, windows.features, windows.rows[sample_B])
    return Batch(x=x_BTF, targets=windows.targets[sample_B], weights=(position_B < windows.n).astype(jnp.float32))


def logits(
    model: ModelConfig, shape: Shape, params: Params, windows: Windows, *, layout: Layout = ONE
) -> Float[Array, " S"]:
    """The model's output for each sample, without dropout; rubbish beyond the n-th."""
    kind = family.of(model)
    before_layer = partial(sharding.before_layer, kind, layout)
    n_batches = (windows.n + EVALUATION_BATCH - 1) // EVALUATION_BATCH

    def body(i: Any, outputs_S: Any) -> Any:
        rows_B = jax.lax.dynamic_slice_in_dim(windows.rows, i * EVALUATION_BATCH, EVALUATION_BATCH)
        x_BTF = _gather_windows(model.context_length, windows.features, rows_B)
        together, x_BTF = sharding.before_pass(kind, layout, params, x_BTF)
        outputs_B = kind.apply(model, shape, together, x_BTF, before_layer=before_layer).astype(jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(outputs_S, outputs_B, i * EVALUATION_BATCH, axis=0)

    return jax.lax.fori_loop(0, n_batches, body, jnp.zeros(windows.rows.shape, jnp.float32))


def all_finite(params: Params) -> Bool[Array, ""]:
    """Is every number of the tree finite, and none so large (1e19) that float32 can't hold its square?"""
    return jnp.isfinite(global_norm(params))


def _gather_windows(
    context_length: int, features: Float[Array, "rows F"], rows_B: Int[Array, " B"]
) -> Float[Array, "B T F"]:
    offset_T = jnp.arange(1 - context_length, 1, dtype=jnp.int32)
    return features.at[rows_B[:, None] + offset_T[None, :]].get(mode="promise_in_bounds")


@dataclass(frozen=True)
class TrainPrograms:
    """The compiled programs of a training: a trial's, or of several trials side by side (a population)."""

    start: Callable[[Hyperparameters], TrainState]
    """Of one trial."""
    segment: Callable[[Hyperparameters, TrainState, EpochSums, Windows, np.int32], tuple[TrainState, EpochSums]]
    """Takes the state over: the one that it was handed is gone afterwards. A population's hyper, state and tally have
    a leading axis R; the number of steps is one for all."""
    n_bytes: int
    """What the largest of them holds on each device, its arguments included."""
    member: Callable[[Params, np.int32], Params] = lambda params, index: params
    """A copy of one member's parameters out of the population's; a trial alone has its own."""


@dataclass(frozen=True)
class ForwardProgram:
    """The compiled forward pass over windows."""

    run: Callable[[Params, Windows], Array]
    n_bytes: int
    """What it holds on each device, its arguments included."""


@locked_cache(kept=16)
def compile_training(
    static: StaticConfig, *, n_features: int, n_rows: int, n_samples: int, n_members: int = 1
) -> TrainPrograms:
    """Trace, lower and compile a trial's start and segment, once per process and set of arguments (sizes: capacities).

    Nothing is allocated.

    Args:
        n_members: R. Above 1, the segment is that of a population: `vmap` of the trial's, over one set of windows.
    """
    windows = abstract_windows(n_features=n_features, n_rows=n_rows, n_samples=n_samples)

    def start(hyper: Hyperparameters) -> TrainState:
        return init_state(static, hyper, n_features=n_features)

    def segment(
        hyper: Hyperparameters, state: TrainState, tally: EpochSums, windows: Windows, n_steps: Int[Array, ""]
    ) -> tuple[TrainState, EpochSums]:
        return train_segment(static, hyper, state, tally, windows, n_steps)

    state = abstract_state(static, n_features=n_features)
    values = (abstract_hyperparameters(), state, jax.eval_shape(empty_sums))
    count = jax.ShapeDtypeStruct((), jnp.int32)
    starting, stepping = _placed(static, state)
    started = compile_lowered(jax.jit(start, **starting).lower(abstract_hyperparameters()), static.model, static.shape)
    if n_members == 1:
        lowered = jax.jit(segment, donate_argnums=1, **stepping).lower(*values, windows, count)
        running = compile_lowered(lowered, static.model, static.shape)
        return TrainPrograms(start=started, segment=running, n_bytes=max(_bytes(started), _bytes(running)))
    together = jax.vmap(segment, in_axes=(0, 0, 0, None, None))
    values = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((n_members, *leaf.shape), leaf.dtype), values)
    _, stepping = _placed(static, values[1], leading=1)
    lowered = jax.jit(together, donate_argnums=1, **stepping).lower(*values, windows, count)
    running = compile_lowered(lowered, static.model, static.shape)
    taking: dict[str, Any] = {}
    if static.layout.n_devices > 1:
        cut = sharding.shardings(static.family, static.layout, state.params)
        taking = {"in_shardings": (stepping["in_shardings"][1].params, None), "out_shardings": cut}
    taken = compile_lowered(jax.jit(member_params, **taking).lower(values[1].params, count), static.model, static.shape)
    n_bytes = max(map(_bytes, (started, running, taken)))
    return TrainPrograms(start=started, segment=running, n_bytes=n_bytes, member=taken)


def member_params(population: Params, index: Int[Array, ""] | int) -> Params:
    """One member's part of a tree whose leaves have a leading axis R."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), population)


def _placed(static: StaticConfig, state: TrainState, *, leading: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where arguments and results of start and segment lie; on one device that goes without saying."""
    if static.layout.n_devices == 1:
        return {}, {}
    whole = sharding.everywhere(static.layout)
    cut = sharding.shardings(static.family, static.layout, state, leading=leading)
    starting = {"in_shardings": whole, "out_shardings": cut}
    return starting, {"in_shardings": (whole, cut, whole, whole, whole), "out_shardings": (cut, whole)}


@locked_cache(kept=16)
def compile_logits(
    model: ModelConfig, shape: Shape, *, n_features: int, n_rows: int, n_samples: int, layout: Layout = ONE
) -> ForwardProgram:
    """Trace, lower and compile the forward pass over windows, once per process and set of arguments."""

    def forward(params: Params, windows: Windows) -> Array:
        return logits(model, shape, params, windows, layout=layout)

    kind = family.of(model)
    params = kind.abstract_params(model, shape, n_features)
    placed: dict[str, Any] = {}
    if layout.n_devices > 1:
        whole = sharding.everywhere(layout)
        placed = {"in_shardings": (sharding.shardings(kind, layout, params), whole), "out_shardings": whole}
    windows = abstract_windows(n_features=n_features, n_rows=n_rows, n_samples=n_samples)
    run = compile_lowered(jax.jit(forward, **placed).lower(params, windows), model, shape)
    return ForwardProgram(run=run, n_bytes=_bytes(run))


def _bytes(program: jax.stages.Compiled) -> int:
    """Arguments, outputs and temporaries on each device; what is donated serves as both of the first two."""
    stats = program.memory_analysis()
    assert stats is not None
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
    return held - stats.alias_size_in_bytes


def place(features: Floats, rows: Ints, targets: Floats | None = None, *, layout: Layout = ONE) -> Windows:
    """Samples onto the device, or whole onto each, padded to a capacity. Without targets they are zeros."""
    padded_features = np.zeros((capacity(len(features)), features.shape[1]), np.float32)
    padded_features[: len(features)] = features
    padded_rows = np.full(capacity(len(rows)), rows[0], np.int32)
    padded_rows[: len(rows)] = rows
    padded_targets = np.zeros(capacity(len(rows)), np.float32)
    if targets is not None:
        padded_targets[: len(rows)] = targets
    arrays = (padded_features, padded_rows, padded_targets, np.int32(len(rows)))
    return Windows(*sharding.put_everywhere(layout, arrays))


def capacity(n: int) -> int:
    """How many of something an array on the device holds for n of it: the next power of two, at least 256."""
    return max(EVALUATION_BATCH, 1 << (n - 1).bit_length())


def abstract_windows(*, n_features: int, n_rows: int, n_samples: int) -> Windows:
    """`Windows` of shapes and dtypes, to compile with; sizes are capacities."""
    return Windows(
        features=jax.ShapeDtypeStruct((n_rows, n_features), jnp.float32),
        rows=jax.ShapeDtypeStruct((n_samples,), jnp.int32),
        targets=jax.ShapeDtypeStruct((n_samples,), jnp.float32),
        n=jax.ShapeDtypeStruct((), jnp.int32),
    )
