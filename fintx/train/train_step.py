"""Train step: loss, gradients, update; a segment of steps as one program; the forward pass that evaluates.

The dataset lies on the device, and windows are gathered inside the program. Sizes are capacities, powers of two, and
the number of steps is a value: folds and evaluations of other lengths find their program compiled.
"""

from __future__ import annotations

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

EVALUATION_BATCH = 256
"""Windows in a forward pass outside training: bounds its memory, and is part of the program, so that a number
computed again is the same number."""

# --- samples on the device --------------------------------------------------------------------------------------------


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


def place(features: Floats, rows: Ints, targets: Floats | None = None, *, layout: Layout = ONE) -> Windows:
    """Samples onto the device, or whole onto each, padded to a capacity. Without targets they are zeros."""
    n_rows, n = len(features), len(rows)
    windows = Windows(
        features=np.pad(np.asarray(features, np.float32), ((0, capacity(n_rows) - n_rows), (0, 0))),
        rows=np.pad(np.asarray(rows, np.int32), (0, capacity(n) - n), constant_values=rows[0]),
        targets=np.pad(np.asarray(np.zeros(n) if targets is None else targets, np.float32), (0, capacity(n) - n)),
        n=np.int32(n),
    )
    return sharding.put_everywhere(layout, windows)  # type: ignore[no-any-return]


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


def _gather_windows(
    context_length: int, features: Float[Array, "rows F"], rows_B: Int[Array, " B"]
) -> Float[Array, "B T F"]:
    offset_T = jnp.arange(1 - context_length, 1, dtype=jnp.int32)
    return features.at[rows_B[:, None] + offset_T[None, :]].get(mode="promise_in_bounds")


# --- one step ---------------------------------------------------------------------------------------------------------


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
class EpochSums:
    """What an epoch adds up from step to step, and hands from segment to segment, so that no cut shows in it."""

    loss_sum: Any = np.float32(0)
    """float32: over the samples so far, each under the parameters that its step began with."""
    bad_step: Any = np.int32(-1)
    """int32: the first step (from 0) whose loss, gradients or parameters were not finite; −1: none."""

    def add(self, *, loss_sum: Float[Array, ""], bad: Bool[Array, ""], step: Int[Array, ""]) -> EpochSums:
        """The sums after one more step."""
        first = bad & (self.bad_step < 0)
        return EpochSums(loss_sum=self.loss_sum + loss_sum, bad_step=jnp.where(first, step, self.bad_step))


def train_step(
    static: StaticConfig, hyper: Hyperparameters, state: TrainState, sums: EpochSums, batch: Batch
) -> tuple[TrainState, EpochSums]:
    """One update on the mean loss of the batch's true samples."""
    loss, grads = loss_and_grads(static, hyper, state, batch)
    finite = jnp.isfinite(loss) & jnp.isfinite(global_norm(grads))
    # optax mixes dtypes in its own arithmetic; nothing of ours does.
    with jax.numpy_dtype_promotion("standard"):
        transformation = adamw(hyper.optim, schedule=static.schedule, mask=static.family.weight_decay_mask)
        updates, optimizer = transformation.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
    loss_sum = loss * jnp.sum(batch.weights)
    after = TrainState(step=state.step + 1, params=params, optimizer=optimizer)
    return after, sums.add(loss_sum=loss_sum, bad=~finite, step=state.step)


def loss_and_grads(
    static: StaticConfig, hyper: Hyperparameters, state: TrainState, batch: Batch
) -> tuple[Float[Array, ""], Params]:
    """The mean loss of the batch's true samples and its gradients, in as many passes as micro-batches fill the batch.

    Passes differ in the dropout's key; but for that, and for the order of sums (1e-6), they don't show.
    """
    key = jax.random.fold_in(stream_key(hyper, STEP), state.step) if static.stochastic else None
    n_samples = jnp.sum(batch.weights)
    before_layer = partial(sharding.before_layer, static.family, static.layout)

    def share_of_loss(params: Params, part: Batch, key: PRNGKeyArray | None) -> Float[Array, ""]:
        params, part = sharding.before_pass(static.family, static.layout, params, part)
        outputs_B = static.family.apply(
            static.model, static.shape, params, part.x,
            key=key, dropout=hyper.dropout, remat=static.remat, before_layer=before_layer,
        )  # fmt: skip
        losses_B = losses.per_example(static.loss, outputs_B, part.targets, values=hyper.loss)
        return jnp.sum(part.weights * losses_B) / n_samples

    if static.micro_batch >= static.batch_size:
        return jax.value_and_grad(share_of_loss)(state.params, batch, key)

    def add_pass(totals: Any, indexed: tuple[Array, Batch]) -> tuple[Any, None]:
        index, part = indexed
        part_key = None if key is None else jax.random.fold_in(key, index)
        return jax.tree.map(jnp.add, totals, jax.value_and_grad(share_of_loss)(state.params, part, part_key)), None

    parts = _micro_batches(batch, size=static.micro_batch)
    zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.params))
    return jax.lax.scan(add_pass, zeros, (jnp.arange(len(parts.weights), dtype=jnp.int32), parts))[0]


def _micro_batches(batch: Batch, *, size: int) -> Batch:
    """The batch with a leading axis of micro-batches; the last is filled up with its last sample, at weight 0."""
    missing = -batch.weights.shape[0] % size

    def cut(leaf: Array) -> Array:
        # A real sample, not zeros: its loss is as finite as any, and 0 times infinity would be NaN.
        padded = jnp.pad(leaf, ((0, missing), *[(0, 0)] * (leaf.ndim - 1)), mode="edge")
        return padded.reshape(-1, size, *leaf.shape[1:])

    weights = jnp.pad(batch.weights, (0, missing)).reshape(-1, size)
    return Batch(x=cut(batch.x), targets=cut(batch.targets), weights=weights)


# --- a segment of an epoch, in one dispatch ---------------------------------------------------------------------------


def train_segment(
    static: StaticConfig,
    hyper: Hyperparameters,
    state: TrainState,
    sums: EpochSums,
    windows: Windows,
    n_steps: Int[Array, ""] | int,
) -> tuple[TrainState, EpochSums]:
    """The next `n_steps` batches of the epoch that `state.step` lies in, in that epoch's order; at most to its end."""
    size = static.batch_size
    per_epoch = (windows.n + size - 1) // size
    epoch, done = state.step // per_epoch, state.step % per_epoch
    order_S = epoch_order(hyper, epoch=epoch, n=windows.n, capacity=windows.rows.shape[0])

    def body(i: Any, carry: Any) -> Any:
        state, sums = carry
        batch = gather_batch(static, windows, order_S, first=(done + i) * size)
        return train_step(static, hyper, state, sums, batch)

    state, sums = jax.lax.fori_loop(0, n_steps, body, (state, sums))
    # An update can overflow where loss and gradients did not; only an epoch's last would go unseen by the next step.
    overflown = (state.step % per_epoch == 0) & ~all_finite(state.params)
    return state, sums.add(loss_sum=jnp.zeros_like(sums.loss_sum), bad=overflown, step=state.step - 1)


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


def all_finite(params: Params) -> Bool[Array, ""]:
    """Whether every number of the tree is finite, and none so large (1e19) that float32 can't hold its square."""
    return jnp.isfinite(global_norm(params))


# --- evaluation -------------------------------------------------------------------------------------------------------


def logits(
    model: ModelConfig, shape: Shape, params: Params, windows: Windows, *, layout: Layout = ONE
) -> Float[Array, " S"]:
    """The model's output for each sample, without dropout; meaningless beyond the n-th."""
    kind = family.of(model)
    before_layer = partial(sharding.before_layer, kind, layout)
    n_batches = (windows.n + EVALUATION_BATCH - 1) // EVALUATION_BATCH

    def body(i: Any, outputs_S: Any) -> Any:
        rows_B = jax.lax.dynamic_slice_in_dim(windows.rows, i * EVALUATION_BATCH, EVALUATION_BATCH)
        x_BTF = _gather_windows(model.context_length, windows.features, rows_B)
        gathered, x_BTF = sharding.before_pass(kind, layout, params, x_BTF)
        outputs_B = kind.apply(model, shape, gathered, x_BTF, before_layer=before_layer).astype(jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(outputs_S, outputs_B, i * EVALUATION_BATCH, axis=0)

    return jax.lax.fori_loop(0, n_batches, body, jnp.zeros(windows.rows.shape, jnp.float32))


# --- compiled programs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainPrograms:
    """The compiled programs of a training: a trial's, or of several trials side by side (a population)."""

    start: Callable[[Hyperparameters], TrainState]
    """The state before the first step, of one trial."""
    segment: Callable[[Hyperparameters, TrainState, EpochSums, Windows, np.int32], tuple[TrainState, EpochSums]]
    """Donates the state: the one that it is given is gone afterwards. A population's hyperparameters, state and sums
    have a leading axis R; the number of steps is one for all."""
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

    def start(hyper: Hyperparameters) -> TrainState:
        return init_state(static, hyper, n_features=n_features)

    def segment(
        hyper: Hyperparameters, state: TrainState, sums: EpochSums, windows: Windows, n_steps: Int[Array, ""]
    ) -> tuple[TrainState, EpochSums]:
        return train_segment(static, hyper, state, sums, windows, n_steps)

    def compiled(function: Callable[..., Any], *arguments: Any, **options: Any) -> jax.stages.Compiled:
        return compile_lowered(jax.jit(function, **options).lower(*arguments), static.model, static.shape)

    is_population = n_members > 1
    windows = abstract_windows(n_features=n_features, n_rows=n_rows, n_samples=n_samples)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    one = (abstract_hyperparameters(), abstract_state(static, n_features=n_features), jax.eval_shape(EpochSums))
    hyper, state, sums = one
    if is_population:
        segment = jax.vmap(segment, in_axes=(0, 0, 0, None, None))
        hyper, state, sums = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((n_members, *leaf.shape), leaf.dtype), one)

    # Where arguments and results lie; on one device that goes without saying.
    start_options: dict[str, Any] = {}
    segment_options: dict[str, Any] = {}
    member_options: dict[str, Any] = {}
    if static.layout.n_devices > 1:
        whole = sharding.everywhere(static.layout)
        cut_one = sharding.shardings(static.family, static.layout, one[1])
        cut = sharding.shardings(static.family, static.layout, state, leading=int(is_population))
        start_options = {"in_shardings": whole, "out_shardings": cut_one}
        segment_options = {"in_shardings": (whole, cut, whole, whole, whole), "out_shardings": (cut, whole)}
        member_options = {"in_shardings": (cut.params, None), "out_shardings": cut_one.params}

    programs = {
        "start": compiled(start, one[0], **start_options),
        "segment": compiled(segment, hyper, state, sums, windows, count, donate_argnums=1, **segment_options),
    }
    if is_population:
        programs["member"] = compiled(member_params, state.params, count, **member_options)
    return TrainPrograms(**programs, n_bytes=max(map(_bytes, programs.values())))


def member_params(population: Params, index: Int[Array, ""] | int) -> Params:
    """One member's part of a tree whose leaves have a leading axis R."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), population)


@locked_cache(kept=16)
def compile_logits(
    model: ModelConfig, shape: Shape, *, n_features: int, n_rows: int, n_samples: int, layout: Layout = ONE
) -> ForwardProgram:
    """Trace, lower and compile the forward pass over windows, once per process and set of arguments."""

    def forward(params: Params, windows: Windows) -> Array:
        return logits(model, shape, params, windows, layout=layout)

    kind = family.of(model)
    params = kind.abstract_params(model, shape, n_features)
    options: dict[str, Any] = {}
    if layout.n_devices > 1:
        whole = sharding.everywhere(layout)
        options = {"in_shardings": (sharding.shardings(kind, layout, params), whole), "out_shardings": whole}
    windows = abstract_windows(n_features=n_features, n_rows=n_rows, n_samples=n_samples)
    program = compile_lowered(jax.jit(forward, **options).lower(params, windows), model, shape)
    return ForwardProgram(run=program, n_bytes=_bytes(program))


def _bytes(program: jax.stages.Compiled) -> int:
    """Arguments, outputs and temporaries on each device; what is donated serves as both of the first two."""
    stats = program.memory_analysis()
    assert stats is not None
    total = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
    return total - stats.alias_size_in_bytes
