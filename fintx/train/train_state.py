"""What does training carry from step to step, and what is it handed? Pytrees of values, and the static rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from fintx.config.schema import ModelConfig, Shape, TaskConfig, TrialConfig
from fintx.model import family
from fintx.model.family import Family
from fintx.train import losses
from fintx.train.losses import LossKind, LossValues
from fintx.train.optimizer import OptimValues, ScheduleKind, adamw
from fintx.train.sharding import ONE, Layout
from fintx.types import Floats, Params

# The streams of random numbers that a trial's seed gives; each is a `fold_in` of one key, and no key is ever stored.
INIT, ORDER, STEP = 0, 1, 2


@dataclass(frozen=True)
class StaticConfig:
    """All of a trial that its compiled program is made for. Trials that differ in anything else share the program."""

    model: ModelConfig
    """Without its dropout rate, which is a value (`for_program`)."""
    shape: Shape
    batch_size: int
    micro_batch: int
    """Samples in a pass forward and back; below batch_size, a step adds up the gradients of several passes."""
    loss: LossKind
    schedule: ScheduleKind
    stochastic: bool
    """False: the trial's dropout rate is 0, and the program draws no masks."""
    remat: bool = False
    """Keep each layer's input alone for the backward pass, and compute the layer again."""
    layout: Layout = ONE

    @property
    def family(self) -> Family:
        """What the model is made of."""
        return family.of(self.model)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hyperparameters:
    """All of a trial that is a value of the program: scalars, or (R,) arrays for a population under vmap."""

    seed: Any
    dropout: Any
    loss: LossValues
    optim: OptimValues


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes: 12 bytes per parameter (parameters and AdamW's two moments, all float32)."""

    step: Any
    """Steps taken; int32."""
    params: Params
    optimizer: Any
    """State of the optax chain."""


@dataclass(frozen=True)
class TargetScale:
    """Regression trains on (target − mean) / sd of the training part; classification on the labels as they are.

    Log returns of a day have an SD of about .01: unscaled, their losses and gradients are 10⁴ times smaller than a
    cross-entropy's, and neither the learning rates, the clip norm nor the initial head would mean the same.
    """

    mean: float
    sd: float

    def apply(self, labels: Floats) -> Floats:
        """Labels as the loss sees them, float32."""
        return ((labels.astype(np.float64) - self.mean) / self.sd).astype(np.float32)


@dataclass(frozen=True)
class BatchLayout:
    """How a trial is computed on what memory and devices there are: no part of what it is.

    Another one gives the same numbers but for rounding; where there is dropout, another micro-batch draws other masks.
    """

    micro_batch: int
    remat: bool = False
    layout: Layout = ONE

    def __str__(self) -> str:
        remat = ", layers computed again" if self.remat else ""
        return f"micro-batch {self.micro_batch} on {self.layout}{remat}"


def static_config(
    config: TrialConfig, *, micro_batch: int | None = None, remat: bool = False, layout: Layout = ONE
) -> StaticConfig:
    """The static part of a trial; without a micro-batch, a step is one pass."""
    return StaticConfig(
        model=static_model(config.model),
        shape=config.shape,
        batch_size=config.train.batch_size,
        micro_batch=config.train.batch_size if micro_batch is None else micro_batch,
        loss=config.train.loss,
        schedule=config.optim.schedule,
        stochastic=config.model.dropout > 0,
        remat=remat,
        layout=layout,
    )


def static_model(model: ModelConfig) -> ModelConfig:
    """The model without what may differ between trials that share a program."""
    return model.model_copy(update={"dropout": 0.0})


def target_scale(task: TaskConfig, labels: Floats) -> TargetScale:
    """The scale of the training targets; (0, 1) for probabilities, and where all targets are equal an sd of 1."""
    if task.predicts == "probability":
        return TargetScale(mean=0.0, sd=1.0)
    sd = float(np.std(labels, dtype=np.float64))
    return TargetScale(mean=float(np.mean(labels, dtype=np.float64)), sd=sd if sd > 0 else 1.0)


def hyperparameters(config: TrialConfig, *, labels: Floats, scale: TargetScale) -> Hyperparameters:
    """The values of a trial.

    Args:
        labels: (S,) of the training part: their number sets the total steps, their base rate the class weights.
        scale: of the training targets; a Huber δ in log returns is divided by its sd.
    """
    train, optimizer = config.train, config.optim
    negative, positive = losses.balanced_weights(labels) if train.class_weight == "balanced" else (1.0, 1.0)
    total_steps = train.max_epochs * steps_per_epoch(len(labels), batch_size=train.batch_size)
    loss_values = LossValues(
        focal_gamma=np.float32(train.focal_gamma),
        huber_delta=np.float32(train.huber_delta / scale.sd),
        label_smoothing=np.float32(train.label_smoothing),
        negative_weight=np.float32(negative),
        positive_weight=np.float32(positive),
    )
    optim_values = OptimValues(
        learning_rate=np.float32(optimizer.learning_rate),
        weight_decay=np.float32(optimizer.weight_decay),
        warmup_steps=np.int32(round(optimizer.warmup_fraction * total_steps)),
        total_steps=np.int32(total_steps),
        final_fraction=np.float32(optimizer.final_fraction),
        clip_norm=np.float32(optimizer.clip_norm),
        b1=np.float32(optimizer.b1),
        b2=np.float32(optimizer.b2),
        eps=np.float32(optimizer.eps),
    )
    return Hyperparameters(
        seed=np.uint32(config.seed), dropout=np.float32(config.model.dropout), loss=loss_values, optim=optim_values
    )


def abstract_hyperparameters() -> Hyperparameters:
    """A `Hyper` of shapes and dtypes, to compile with."""
    real, whole = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    return Hyperparameters(
        seed=jax.ShapeDtypeStruct((), jnp.uint32),
        dropout=real,
        loss=LossValues(real, real, real, real, real),
        optim=OptimValues(real, real, whole, whole, real, real, real, real, real),
    )


def steps_per_epoch(n: int, *, batch_size: int) -> int:
    """Batches that n samples fill; the last may be partial."""
    return -(-n // batch_size)


def stream_key(values: Hyperparameters, which: int) -> PRNGKeyArray:
    """The key of one of the trial's streams: INIT, ORDER or STEP."""
    # threefry by name: its numbers are the same on every backend, under vmap and for every sharding.
    return jax.random.fold_in(jax.random.key(values.seed, impl="threefry2x32"), which)


def init_state(static: StaticConfig, values: Hyperparameters, *, n_features: int) -> TrainState:
    """The state before the first step; pure, so that vmap over `values` starts a population."""
    params = static.family.init(static.model, static.shape, n_features, stream_key(values, INIT))
    mask = static.family.weight_decay_mask
    optimizer = adamw(values.optim, schedule=static.schedule, mask=mask).init(params)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, optimizer=optimizer)


def abstract_state(static: StaticConfig, *, n_features: int) -> TrainState:
    """A `TrainState` of shapes and dtypes."""
    return jax.eval_shape(lambda values: init_state(static, values, n_features=n_features), abstract_hyperparameters())


def in_target_units(model: ModelConfig, params: Params, scale: TargetScale) -> Params:
    """The parameters of the model whose output is in the target's own units: what is evaluated and kept.

    So no scale has to travel with the parameters.
    """
    if scale == TargetScale(mean=0.0, sd=1.0):
        return params
    return family.of(model).rescale_output(params, scale.mean, scale.sd)
