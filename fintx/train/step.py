"""What does the device run? A train step, an epoch of them in one dispatch, and the forward pass over many windows.

All three are pure functions, static in their first argument. An epoch is a loop whose trip count is a value, over
arrays that are padded to the next power of two: folds of different lengths, and a checkpoint's later evaluation on
other bars, run the program that is compiled already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from fintx.config import ModelConfig, Shape
from fintx.model import transformer
from fintx.train import losses, optim
from fintx.train.state import ORDER, STEP, Hyper, Program, TrainState, abstract_hyper, init, stream
from fintx.types import Floats, Ints, Params

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
class EpochReport:
    """What an epoch says of itself."""

    loss: Any
    """Mean over the epoch's samples, each under the parameters that its step began with."""
    bad_step: Any
    """int32: the first step (from 0) whose loss, gradients or parameters were not finite; −1: none."""


def train_step(static: Program, hyper: Hyper, state: TrainState, batch: Batch) -> tuple[TrainState, StepReport]:
    """One update on the mean loss of the batch's true samples."""
    key = jax.random.fold_in(stream(hyper, STEP), state.step) if static.stochastic else None

    def mean_loss(params: Params) -> Float[Array, ""]:
        outputs_B = transformer.apply(static.model, static.shape, params, batch.x, key=key, dropout=hyper.dropout)
        losses_B = losses.per_example(static.loss, outputs_B, batch.targets, values=hyper.loss)
        return jnp.sum(batch.weights * losses_B) / jnp.sum(batch.weights)

    loss, gradients = jax.value_and_grad(mean_loss)(state.params)
    finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradients))
    # optax mixes dtypes in its own arithmetic; nothing of ours does.
    with jax.numpy_dtype_promotion("standard"):
        transformation = optim.transformation(hyper.optim, schedule=static.schedule)
        updates, optimizer = transformation.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
    report = StepReport(loss_sum=loss * jnp.sum(batch.weights), finite=finite)
    return TrainState(step=state.step + 1, params=params, optimizer=optimizer), report


def train_epoch(static: Program, hyper: Hyper, state: TrainState, windows: Windows) -> tuple[TrainState, EpochReport]:
    """All batches of the epoch that `state.step` begins, in that epoch's order."""
    size = static.batch_size
    n_steps = (windows.n + size - 1) // size
    order_S = epoch_order(hyper, epoch=state.step // n_steps, n=windows.n, capacity=windows.rows.shape[0])
    never = jnp.iinfo(jnp.int32).max

    def body(i: Any, carry: Any) -> Any:
        state, loss_sum, bad_step = carry
        step = state.step
        batch = gather(static, windows, order_S, first=i * size)
        state, report = train_step(static, hyper, state, batch)
        bad_step = jnp.minimum(bad_step, jnp.where(report.finite, never, step))
        return state, loss_sum + report.loss_sum, bad_step

    start = (state, jnp.zeros((), jnp.float32), jnp.full((), never, jnp.int32))
    state, loss_sum, bad_step = jax.lax.fori_loop(0, n_steps, body, start)
    # An update can overflow where loss and gradients did not; only an epoch's last would go unseen by the next step.
    bad_step = jnp.minimum(bad_step, jnp.where(all_finite(state.params), never, state.step - 1))
    bad_step = jnp.where(bad_step == never, -1, bad_step)
    return state, EpochReport(loss=loss_sum / windows.n.astype(jnp.float32), bad_step=bad_step)


def epoch_order(
    hyper: Hyper, *, epoch: Int[Array, ""] | int, n: Int[Array, ""] | int, capacity: int
) -> Int[Array, " S"]:
    """A permutation of 0 … n − 1, followed by the padding; a pure function of seed and epoch, whatever the capacity."""
    key = jax.random.fold_in(stream(hyper, ORDER), epoch)
    index_S = jnp.arange(capacity, dtype=jnp.int32)
    padding_S = (index_S >= n).astype(jnp.int32)
    bits_S = jax.random.bits(key, (capacity,), jnp.uint32)
    return jax.lax.sort((padding_S, bits_S, index_S), num_keys=2)[2]


def gather(static: Program, windows: Windows, order_S: Int[Array, " S"], *, first: Int[Array, ""] | int) -> Batch:
    """The batch of the samples order[first : first + B]; beyond the n-th sample, padding of weight 0."""
    position_B = first + jnp.arange(static.batch_size, dtype=jnp.int32)
    sample_B = order_S.at[position_B].get(mode="clip")
    x_BTF = _gather_windows(static.model.context_length, windows.features, windows.rows[sample_B])
    return Batch(x=x_BTF, targets=windows.targets[sample_B], weights=(position_B < windows.n).astype(jnp.float32))


def logits(model: ModelConfig, shape: Shape, params: Params, windows: Windows) -> Float[Array, " S"]:
    """The model's output for each sample, without dropout; rubbish beyond the n-th."""
    n_batches = (windows.n + EVALUATION_BATCH - 1) // EVALUATION_BATCH

    def body(i: Any, outputs_S: Any) -> Any:
        rows_B = jax.lax.dynamic_slice_in_dim(windows.rows, i * EVALUATION_BATCH, EVALUATION_BATCH)
        x_BTF = _gather_windows(model.context_length, windows.features, rows_B)
        outputs_B = transformer.apply(model, shape, params, x_BTF).astype(jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(outputs_S, outputs_B, i * EVALUATION_BATCH, axis=0)

    return jax.lax.fori_loop(0, n_batches, body, jnp.zeros(windows.rows.shape, jnp.float32))


def all_finite(params: Params) -> Bool[Array, ""]:
    """Is every number of the tree finite?"""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()


def _gather_windows(
    context_length: int, features: Float[Array, "rows F"], rows_B: Int[Array, " B"]
) -> Float[Array, "B T F"]:
    offset_T = jnp.arange(1 - context_length, 1, dtype=jnp.int32)
    return features.at[rows_B[:, None] + offset_T[None, :]].get(mode="promise_in_bounds")


@dataclass(frozen=True)
class Training:
    """The two compiled programs of a trial's training."""

    start: Callable[[Hyper], TrainState]
    epoch: Callable[[Hyper, TrainState, Windows], tuple[TrainState, EpochReport]]
    """Takes the state over: the one that it was handed is gone afterwards."""


@lru_cache(maxsize=16)
def compile_training(static: Program, *, n_features: int, n_rows: int, n_samples: int) -> Training:
    """Trace, lower and compile a trial's start and epoch, once per process and set of arguments (sizes: capacities)."""
    windows = _abstract_windows(n_features, n_rows, n_samples)

    def start(hyper: Hyper) -> TrainState:
        return init(static, hyper, n_features=n_features)

    def epoch(hyper: Hyper, state: TrainState, windows: Windows) -> tuple[TrainState, EpochReport]:
        return train_epoch(static, hyper, state, windows)

    state = jax.eval_shape(start, abstract_hyper())
    return Training(
        start=jax.jit(start).lower(abstract_hyper()).compile(),
        epoch=jax.jit(epoch, donate_argnums=1).lower(abstract_hyper(), state, windows).compile(),
    )


@lru_cache(maxsize=16)
def compile_logits(
    model: ModelConfig, shape: Shape, *, n_features: int, n_rows: int, n_samples: int
) -> Callable[[Params, Windows], Array]:
    """Trace, lower and compile the forward pass over windows, once per process and set of arguments."""

    def forward(params: Params, windows: Windows) -> Array:
        return logits(model, shape, params, windows)

    params = transformer.abstract_params(model, shape, n_features)
    return jax.jit(forward).lower(params, _abstract_windows(n_features, n_rows, n_samples)).compile()


def place(features: Floats, rows: Ints, targets: Floats | None = None) -> Windows:
    """Samples onto the device, padded to a capacity. Without targets they are zeros."""
    padded_features = np.zeros((capacity(len(features)), features.shape[1]), np.float32)
    padded_features[: len(features)] = features
    padded_rows = np.full(capacity(len(rows)), rows[0], np.int32)
    padded_rows[: len(rows)] = rows
    padded_targets = np.zeros(capacity(len(rows)), np.float32)
    if targets is not None:
        padded_targets[: len(rows)] = targets
    return Windows(*jax.device_put((padded_features, padded_rows, padded_targets, np.int32(len(rows)))))


def capacity(n: int) -> int:
    """How many of something an array on the device holds for n of it: the next power of two, at least 256."""
    return max(EVALUATION_BATCH, 1 << (n - 1).bit_length())


def _abstract_windows(n_features: int, n_rows: int, n_samples: int) -> Windows:
    return Windows(
        features=jax.ShapeDtypeStruct((n_rows, n_features), jnp.float32),
        rows=jax.ShapeDtypeStruct((n_samples,), jnp.int32),
        targets=jax.ShapeDtypeStruct((n_samples,), jnp.float32),
        n=jax.ShapeDtypeStruct((), jnp.int32),
    )
