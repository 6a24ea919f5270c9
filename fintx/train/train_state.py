"""Training state: what a trial's program is made for, what it is given, and what training changes as it goes on."""

from __future__ import annotations

import operator
from dataclasses import astuple, dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from fintx.config.schema import ModelConfig, Shape, TaskConfig, TrialConfig
from fintx.data.datasets import Dataset
from fintx.evaluate import metrics
from fintx.evaluate.metrics import Metrics
from fintx.model import family
from fintx.model.family import Family
from fintx.train import losses, multihost, sharding
from fintx.train.losses import LossKind, LossValues
from fintx.train.optimizer import OptimValues, ScheduleKind, adamw
from fintx.train.sharding import ONE, Layout
from fintx.types import Floats, Params

# --- what the program is made for: static -----------------------------------------------------------------------------


@dataclass(frozen=True)
class StaticConfig:
    """All of a trial that its compiled program is made for. Trials that differ in anything else share the program."""

    model: ModelConfig
    """With a dropout rate of 0: the rate is a value (`static_model`)."""
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
        """The model's family."""
        return family.of(self.model)


@dataclass(frozen=True)
class BatchLayout:
    """How a trial is computed on the memory and devices there are: no part of what it is.

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


# --- what the program is given: values --------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hyperparameters:
    """All of a trial that is a value of the program: scalars, or (R,) arrays for a population under vmap."""

    seed: Any
    dropout: Any
    loss: LossValues
    optim: OptimValues


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
    train, optim = config.train, config.optim
    negative, positive = losses.balanced_weights(labels) if train.class_weight == "balanced" else (1.0, 1.0)
    total_steps = train.max_epochs * steps_per_epoch(len(labels), batch_size=train.batch_size)
    return Hyperparameters(
        seed=np.uint32(config.seed),
        dropout=np.float32(config.model.dropout),
        loss=LossValues(
            focal_gamma=np.float32(train.focal_gamma),
            huber_delta=np.float32(train.huber_delta / scale.sd),
            label_smoothing=np.float32(train.label_smoothing),
            negative_weight=np.float32(negative),
            positive_weight=np.float32(positive),
        ),
        optim=OptimValues(
            learning_rate=np.float32(optim.learning_rate),
            weight_decay=np.float32(optim.weight_decay),
            warmup_steps=np.int32(round(optim.warmup_fraction * total_steps)),
            total_steps=np.int32(total_steps),
            final_fraction=np.float32(optim.final_fraction),
            clip_norm=np.float32(optim.clip_norm),
            b1=np.float32(optim.b1),
            b2=np.float32(optim.b2),
            eps=np.float32(optim.eps),
        ),
    )


def abstract_hyperparameters() -> Hyperparameters:
    """`Hyperparameters` of shapes and dtypes, to compile with."""
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


# The streams of random numbers that a trial's seed gives; each is a `fold_in` of one key, and no key is ever stored.
INIT, ORDER, STEP = 0, 1, 2


def stream_key(hyper: Hyperparameters, which: int) -> PRNGKeyArray:
    """The key of one of the trial's streams: INIT, ORDER or STEP."""
    # threefry by name: its numbers are the same on every backend, under vmap and for every sharding.
    return jax.random.fold_in(jax.random.key(hyper.seed, impl="threefry2x32"), which)


# --- what a step changes, on the devices ------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes: 12 bytes per parameter (parameters and AdamW's two moments, all float32)."""

    step: Any
    """Steps taken; int32."""
    params: Params
    optimizer: Any
    """State of the optax chain."""


def init_state(static: StaticConfig, hyper: Hyperparameters, *, n_features: int) -> TrainState:
    """The state before the first step; pure, so that vmap over `hyper` starts a population."""
    params = static.family.init(static.model, static.shape, n_features, stream_key(hyper, INIT))
    transformation = adamw(hyper.optim, schedule=static.schedule, mask=static.family.weight_decay_mask)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, optimizer=transformation.init(params))


def abstract_state(static: StaticConfig, *, n_features: int) -> TrainState:
    """A `TrainState` of shapes and dtypes."""
    return jax.eval_shape(lambda hyper: init_state(static, hyper, n_features=n_features), abstract_hyperparameters())


# --- what an epoch changes, on the host -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FitInputs:
    """What is trained, on which data, and by which validation metric its best epoch is chosen."""

    config: TrialConfig
    dataset: Dataset
    metric: str


@dataclass
class Progress:
    """What the epochs so far came to; with the training state, all that a trial's future depends on."""

    epoch: int = 0
    """Epochs that are over."""
    best: Metrics = field(default_factory=dict)
    last: Metrics = field(default_factory=dict)
    best_epoch: int = 0
    best_is_collapsed: bool = False
    collapsed_in_a_row: int = 0
    curve: list[dict[str, float | int | None]] = field(default_factory=list)
    outputs: Floats | None = None
    """float32 (S,): validation outputs of the best epoch."""
    params: Params | None = None
    """Of the best epoch, on the host."""

    def to_json(self) -> dict[str, Any]:
        """All but the arrays; `Progress(**value, outputs=…, params=…)` is the same again."""
        return {name: value for name, value in vars(self).items() if name not in ("outputs", "params")}

    def add_epoch(self, *, step: int, train_loss: float | None, evaluated: Metrics) -> None:
        """An epoch is over, after `step` steps in all."""
        self.epoch += 1
        self.curve.append({"epoch": self.epoch, "step": step, "train_loss": train_loss, **evaluated})
        if evaluated:
            self.last = evaluated

    def keep_if_best(self, metric: str, params: Params, outputs: Floats) -> None:
        """Copy the epoch's parameters to the host if its metric is the best so far."""
        new, old = self.last[metric], self.best.get(metric)
        assert new is not None
        (is_best,) = multihost.agree(int(old is None or metrics.better(metric, new, old)))
        if is_best:
            self.best, self.best_epoch, self.outputs = self.last, self.epoch, outputs
            self.best_is_collapsed = self.collapsed_in_a_row > 0
            self.params = sharding.to_host(params)


@dataclass(frozen=True)
class Timing:
    """Where a training's time went, in all attempts up to their last save; of a population, its share."""

    trace_s: float = 0.0
    """Python's part of making the programs, tracing and lowering; next to nothing where an earlier trial's programs
    served. Waiting for a thread that makes them ahead counts here."""
    compile_s: float = 0.0
    """XLA's part, or reading from the program cache what it once made; 0 where an earlier trial's programs served."""
    n_compiled: int = 0
    """Programs that XLA compiled; those of the cache or of an earlier trial don't count."""
    run_s: float = 0.0
    """Training and evaluating on the devices."""
    wall_s: float = 0.0
    """Wall time of the whole fit."""

    def __add__(self, other: Timing) -> Timing:
        return Timing(*map(operator.add, astuple(self), astuple(other)))

    def share(self, n: int) -> Timing:
        """Of one of n that trained side by side; the programs are everybody's."""
        return Timing(self.trace_s / n, self.compile_s / n, self.n_compiled, self.run_s / n, self.wall_s / n)
