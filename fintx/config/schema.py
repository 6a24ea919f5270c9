"""What is a trial, and what is a study? Frozen, typed, serialisable values; every default of fintx stands here.

A `TrialConfig` holds everything a trial's result depends on. A `StudySpec` is a whole sweep file, resolved. Neither
reads files, the environment or the clock: `config.load` makes a StudySpec, `study.space` makes TrialConfigs of it.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_serializer,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticKnownError

from fintx.errors import without_passwords
from fintx.tasks import TASKS, Prediction, Task, settings

_Model = TypeVar("_Model", bound=BaseModel)


def _in_float32(value: float) -> float:
    """Training computes in float32, whose smallest numbers XLA takes for 0: a rate of 1e-46 would be no rate at all."""
    smallest, largest = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    if value and not smallest <= abs(value) <= largest:
        raise ValueError(f"wanted a number that float32 can hold ({smallest:.2g} … {largest:.2g})")
    return value


def _below_one_in_float32(value: float) -> float:
    """1 − b2 divides: were b2 1 in float32, every parameter would become NaN; so would a dropout's."""
    if np.float32(value) >= 1:
        raise ValueError("wanted a number that float32 can tell from 1 (at most 0.9999999)")
    return value


# Bounds keep what a typo can cost small: what becomes memory, a loop or a time is as large as anybody could use, and
# a floating-point number of training stays what it is in float32.
Float32 = AfterValidator(_in_float32)
PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
"""Trials, epochs, samples: more would outlast any study."""
Days = Annotated[int, Field(ge=1, le=10_000)]
"""Trading days or bars: 10,000 are 40 years."""
Width = Annotated[int, Field(ge=1, le=2**16)]
"""Of a layer or a batch: the widest models have some 20,000."""
Depth = Annotated[int, Field(ge=1, le=1024)]
"""Layers: every depth in a range is a candidate shape."""
Seconds = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
"""Up to 11 days: an operating system's timers end at 24."""
Fraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False), Float32]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False), Float32]
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), Float32, AfterValidator(_below_one_in_float32)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Symbol = Annotated[str, Field(pattern=r"^[A-Za-z0-9^][A-Za-z0-9^._=-]{0,31}$")]

_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def parse_parameters(value: Any) -> Any:
    """'200M' → 200_000_000; an int passes. Suffixes K, M, B; anything else is left for the type check to refuse."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)([KMB]?)", value.strip().upper())
    if match is None:
        raise ValueError('write a count like "200M", "1.5B" or 2000000')
    return round(float(match[1]) * _SUFFIXES[match[2]])


def _parse_bytes(value: Any) -> Any:
    """'12GB' → 12_000_000_000; an int passes. Units MB, GB, MiB, GiB."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?(MB|GB|MIB|GIB)", value.strip().upper())
    if match is None:
        raise ValueError('write an amount like "12GB" or "500MiB"')
    return round(float(match[1]) * _UNITS[match[2]])


def _whole(value: Any) -> Any:
    """768.0 → 768: the same number, however it is written. (From 2⁵³ on, a float is no longer any one integer.)"""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _as_tuple(value: Any) -> Any:
    """One name stands for a list of it. (A strict tuple behind a validator takes no JSON array.)"""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _population(value: Any) -> Any:
    """One complaint, where a union's parts would make three."""
    if value != "auto" and (not isinstance(value, int) or not (isinstance(value, bool) or 1 <= value <= 4096)):
        raise ValueError('wanted "auto", true, false or a number from 1 to 4096')
    return value


class _Config(BaseModel):
    """Strict, frozen, and closed: a wrong type, an edit or an unknown key is an error."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", validate_default=True)


ENCODER = "encoder"


def _known_family(name: str) -> str:
    if name not in FAMILIES:
        raise PydanticKnownError("literal_error", {"expected": " or ".join(f"'{known}'" for known in FAMILIES)})
    return name


class DataConfig(_Config):
    """Which bars, and which inputs are made of them."""

    assets: Annotated[tuple[Symbol, ...], Field(min_length=1)] = ("SPX",)
    """Symbols to predict, one or a panel. SPX is embedded; others come from `fintx data import|yahoo`."""
    context: tuple[Symbol, ...] = ()
    """Symbols whose series every asset sees as extra inputs, such as VIX. They are never predicted."""
    features: Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_as_tuple)] = ("stationary",)
    """In order: names of features or of sets (stationary, a20, a25, vix8). A resolved config holds features alone."""
    scaling: Literal["standardize", "none"] = "standardize"
    """standardize: subtract the mean and divide by the SD of the asset's training rows. none: leave as they are."""
    start: datetime.date | None = None
    """First date used, inclusive; none: all there is."""
    end: datetime.date | None = None
    """Last date used, inclusive; none: all there is."""
    versions: dict[str, str] = {}
    """Symbol → sha256 of its raw snapshot; filled when a study starts, so that it keeps its data for life."""


def _known_task(kind: str) -> str:
    if kind not in TASKS:
        *others, last = (f"'{name}'" for name in TASKS)
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})
    return kind


class TaskConfig(_Config):
    """The question asked of the future. `horizon` lives here and nowhere else."""

    kind: Annotated[str, AfterValidator(_known_task)]
    """threshold: is (1 + threshold) × close reached? direction: is the close higher? regression: the log return."""
    horizon: Days
    """Trading days ahead, h."""
    price: Literal["high", "close"] | None = None
    """For threshold. high: the highest high of the next h bars; close: the close of the h-th bar."""
    threshold: Annotated[float, Field(gt=-1, lt=10, allow_inf_nan=False)] | None = None
    """For threshold: the relative move, .01 = +1 %; the label is 1 when price ≥ (1 + threshold) × close."""

    @model_validator(mode="after")
    def _settings_belong_to_the_task(self) -> TaskConfig:
        for key in ("price", "threshold"):
            wanted = key in settings(self.kind)
            if (getattr(self, key) is not None) != wanted:
                raise ValueError(f'kind = "{self.kind}" {"needs" if wanted else "takes no"} `{key}`')
        return self

    @property
    def rule(self) -> Task:
        """The task itself: how labels are cut, and what is predicted."""
        return TASKS[self.kind](**{key: getattr(self, key) for key in settings(self.kind)})

    @property
    def predicts(self) -> Prediction:
        """What a model puts out, by which losses, metrics and baselines are chosen."""
        return TASKS[self.kind].predicts


class SplitConfig(_Config):
    """Which days train, which choose (validation), and which stay sealed (test). Always in time order."""

    kind: Literal["fractions", "dates", "walk_forward"] = "fractions"
    """Shares of the days in time order, parts by date, or several validation folds one after the other."""
    train: Fraction | None = None
    """fractions: share of the trading days that train."""
    validation: Fraction | None = None
    """fractions: share that validates; the rest is the sealed test part."""
    validation_start: datetime.date | None = None
    """dates, walk_forward: first date of (the first) validation part."""
    test_start: datetime.date | None = None
    """dates, walk_forward: first date of the sealed test part; walk_forward may leave it out to have none."""
    n_folds: Annotated[int, Field(ge=2, le=100)] | None = None
    """walk_forward: validation folds of equal calendar length between validation_start and the test part."""
    window: Literal["expanding", "rolling"] | None = None
    """walk_forward. expanding: train on all days before the fold; rolling: on as many as the first fold has."""
    embargo: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Trading days left out between parts, beyond the purge (which is always the horizon)."""
    min_positives: Count = 30
    """Fewest samples of either class that the train and validation parts may hold (classification)."""
    min_effective: Count = 50
    """Smallest effective sample size (average uniqueness × n) of the validation part."""

    @model_validator(mode="after")
    def _keys_belong_to_kind(self) -> SplitConfig:
        required = {
            "fractions": {"train", "validation"},
            "dates": {"validation_start", "test_start"},
            "walk_forward": {"validation_start", "n_folds", "window"},
        }[self.kind]
        optional = {"test_start"} if self.kind == "walk_forward" else set()
        every = ("train", "validation", "validation_start", "test_start", "n_folds", "window")
        given = {key for key in every if getattr(self, key) is not None}
        if missing := sorted(required - given):
            raise ValueError(f'kind = "{self.kind}" needs {", ".join(f"`{key}`" for key in missing)}')
        if foreign := sorted(given - required - optional):
            raise ValueError(f'kind = "{self.kind}" takes no {", ".join(f"`{key}`" for key in foreign)}')
        if self.kind == "fractions" and self.train + self.validation >= 1:  # type: ignore[operator]
            raise ValueError("`train` + `validation` must be below 1: the rest is the sealed test part")
        if self.test_start and self.validation_start and self.test_start <= self.validation_start:
            raise ValueError("`test_start` must be after `validation_start`")
        return self


class Shape(_Config):
    """A model's shape: whole numbers by the names of its family (d_model, n_layers, n_heads, d_ff for the encoder).

    It is what a parameter budget is solved for. Its identity is its content.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, PositiveInt]

    if TYPE_CHECKING:  # names are the family's

        def __init__(self, **numbers: int): ...

        def __getattr__(self, name: str) -> int: ...

    def __hash__(self) -> int:
        return hash(frozenset(self.__pydantic_extra__.items()))


class ModelConfig(_Config):
    """What of the model a file fixes, or searches by name; its `Shape` is solved from the budget."""

    family: Annotated[str, AfterValidator(_known_family)] = ENCODER
    """Kind of model: encoder is a PatchTST-like transformer. It says what [architecture] and a queue entry hold."""
    context_length: Days = 60
    """Bars that a window holds, T."""
    patch_length: Days = 10
    """Bars in a patch, P."""
    stride: Days = 5
    """Bars between the starts of neighbouring patches."""
    dropout: Share = 0.1
    """Rate on attention weights, residual branches and feed-forward activations."""
    revin: bool = False
    """Normalise every feature within its window, with a learned scale and shift (RevIN, Kim et al. 2022)."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matmul operands and what the backward pass keeps; all else, the residual stream too, is float32. GPUs that
    know TF32 multiply float32 by it (10 bits), unless JAX_DEFAULT_MATMUL_PRECISION=highest."""

    @model_serializer(mode="wrap")
    def _family_unless_encoder(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As configs of before there were families say it: their hashes stay."""
        tree: dict[str, Any] = fields(self)
        return {key: value for key, value in tree.items() if (key, value) != ("family", ENCODER)}

    @model_validator(mode="after")
    def _patch_fits_window(self) -> ModelConfig:
        if self.patch_length > self.context_length:
            raise ValueError(
                f"patch_length = {self.patch_length} is longer than context_length = {self.context_length}"
            )
        return self


class OptimConfig(_Config):
    """AdamW (Loshchilov & Hutter 2019) and its schedule."""

    learning_rate: PositiveFloat = 3e-4
    """Peak rate, after the warm-up."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled, on matrices only (no biases, norms or positions)."""
    schedule: Literal["cosine", "constant", "linear", "inverse_sqrt"] = "cosine"
    """How the rate falls after the warm-up."""
    warmup_fraction: Share = 0.1
    """Share of all steps over which the rate climbs linearly from 0."""
    final_fraction: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), Float32] = 0.0
    """cosine, linear: the last step's rate as a share of the peak."""
    clip_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this global norm."""
    b1: Share = 0.9
    """Decay per step of the gradient's running mean."""
    b2: Share = 0.999
    """Decay per step of the squared gradient's running mean."""
    eps: Annotated[float, Field(ge=1e-16, le=1, allow_inf_nan=False)] = 1e-8
    """Added to the root of that mean; below 1e-16 a gradient whose square is 0 in float32 would explode."""


class TrainConfig(_Config):
    """How long, on what loss, and when to stop."""

    batch_size: Width = 64
    """Windows per step."""
    max_epochs: Count = 30
    """Passes over the training windows at most; the schedule is laid out for them."""
    patience: Count = 5
    """Epochs without a better validation metric before training stops; the best step is restored."""
    loss: Literal["bce", "focal", "mse", "huber"] = "bce"
    """bce, focal (Lin et al. 2017) for threshold and direction; mse, huber for regression."""
    focal_gamma: NonNegativeFloat = 2.0
    """focal only."""
    huber_delta: PositiveFloat = 0.01
    """huber only: the log return at which quadratic turns into linear."""
    label_smoothing: Annotated[float, Field(ge=0, le=0.49, allow_inf_nan=False), Float32] = 0.0
    """Classification: targets become smoothing/2 and 1 − smoothing/2 (training only)."""
    class_weight: Literal["none", "balanced"] = "none"
    """balanced: each class weighs n / (2 n_class), counted in train (training only)."""
    collapse_spread: NonNegativeFloat = 1e-4
    """A validation prediction SD (probability; regression: share of the target's SD) below this is a collapse …"""
    collapse_patience: Count = 3
    """… and so many such epochs in a row stop the trial."""


LOSSES: dict[Prediction, tuple[str, ...]] = {"probability": ("bce", "focal"), "value": ("mse", "huber")}
METRICS: dict[Prediction, tuple[str, ...]] = {
    "probability": ("log_loss", "brier", "auc", "average_precision"),
    "value": ("mse", "mae"),
}
"""What a study may decide by."""


class TrialConfig(_Config):
    """Everything that a trial's result depends on."""

    data: DataConfig
    task: TaskConfig
    split: SplitConfig
    shape: Shape
    model: ModelConfig
    optim: OptimConfig
    train: TrainConfig
    seed: Seed = 0

    @model_validator(mode="after")
    def _parts_fit(self) -> TrialConfig:
        check_loss(self.task, self.train)
        check_shape(self.model, self.shape)
        return self


def check_loss(task: TaskConfig, train: TrainConfig) -> None:
    """What is predicted binds the losses.

    Raises:
        ValueError: a classification loss on a regression task, or the reverse.
    """
    if train.loss not in LOSSES[task.predicts]:
        wanted = " or ".join(f'"{loss}"' for loss in LOSSES[task.predicts])
        raise ValueError(f'train.loss = "{train.loss}" does not fit task.kind = "{task.kind}"; use {wanted}')
    if task.predicts == "value":
        if train.label_smoothing:
            raise ValueError("train.label_smoothing is for classification; leave it out for a regression task")
        if train.class_weight != "none":
            raise ValueError("train.class_weight is for classification; leave it out for a regression task")


_TAKEN = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|experiment_results\.csv|.*\.", re.IGNORECASE)


def _free_name(name: str) -> str:
    """A study's folder lies beside the table of all studies, and may be copied to Windows."""
    if _TAKEN.fullmatch(name):
        raise ValueError(
            "wanted another name: a file of fintx or a device of Windows is called so, or it ends in a dot"
        )
    return name


class StudyConfig(_Config):
    """The search itself."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"), AfterValidator(_free_name)]
    """Folder under outputs/ and study name in the storage: letters, digits, '.', '_', '-'; at most 64."""
    question: str = ""
    """What the study asks, in a sentence; reports print it."""
    n_trials: Count = 50
    """The total, queue included; running the file again never adds to it."""
    seed: Seed = 0
    """Of the sampler and of every trial, each by its number."""
    metric: Literal["log_loss", "brier", "auc", "average_precision", "mse", "mae"] = "log_loss"
    """The validation metric that decides, at the restored best step. mse, mae for regression only."""
    n_startup_trials: Count = 10
    """Random trials before TPE begins to model."""
    keep_checkpoints: Count = 3
    """How many of the best trials keep their checkpoint."""
    replicates: Annotated[int, Field(ge=1, le=1000)] = 1
    """Seeds that every trial is trained with; its value is their mean, and the record holds the standard error."""
    queue_extremes: bool = False
    """Queue the smallest and largest feasible value of each shape axis, so that a search has seen the edges first."""


STORAGE = r"""^(journal|postgresql://[^\s"']+)$"""
"""No quotes: whatever masks a password in a text takes them for the end of the URL."""


class ExecutionConfig(_Config):
    """How a study is run, on what: no part of what it asks, so all of it may change from one run to the next."""

    storage: Annotated[str, Field(pattern=STORAGE)] = "journal"
    """journal: a file in the study's folder. postgresql://USER@HOST/DATABASE: machines with that URL share a study."""
    checkpoint_s: Seconds | None = None
    """Seconds between saves of a running trial; none: 60, or 50 × what a save takes if longer (2 % at most)."""
    hang_s: Seconds = 900.0
    """Seconds without a step after which a worker counts as hung: it is stopped and its trial taken up again."""
    max_attempts: Count = 3
    """Times that a run of the study tries a trial whose worker crashes or hangs, before it leaves the trial aside."""
    max_failures: Count = 10
    """Failures of the same kind in a row that stop the study: something is wrong that more trials won't fix."""
    memory: Annotated[int, Field(ge=1, le=2**50), BeforeValidator(_parse_bytes)] | None = None
    """Memory that all running trials may take together, such as "12GB"; none: what the machine or its GPU has free."""
    program_cache: str | None = None
    """Folder where compiled programs are kept, so that a shape seen before isn't compiled again; none: that of
    JAX_COMPILATION_CACHE_DIR, or .programs beside the studies; off: keep none."""

    population: Annotated[Literal["auto"] | bool | int, PlainValidator(_population)] = "auto"
    """Trials that share a program trained at once. auto: where it pays, a trial's replicates, and on a GPU trials that
    wait for no result (random start, unfinished, queued with values of their own): what is proposed stays the same.
    true: all of one shape where it pays; a number: as many in one program, pay or not; false: none."""
    pipeline: bool | None = None
    """Ask for the next trial and compile it while one trains; none: on a GPU (on a CPU compiling takes its cores)."""

    @field_serializer("storage")
    def _storage_without_password(self, storage: str) -> str:
        return without_passwords(storage)


def _devices(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value == "auto" or (whole and (value == -1 or 1 <= value <= 2**16)):
        return value
    raise ValueError('wanted a number of devices, -1 for all that are left, or "auto"')


def _divisor(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value == "auto" or (whole and 1 <= value <= 2**16):
        return value
    raise ValueError('wanted a number of devices, or "auto"')


def _switch(value: Any) -> Any:
    if isinstance(value, bool) or value == "auto":
        return value
    raise ValueError('wanted true, false or "auto"')


class MeshConfig(_Config):
    """Over which devices each trial is spread, and how: like [execution] no part of what the study asks."""

    data: Annotated[int | Literal["auto"], BeforeValidator(_devices)] = -1
    """Devices that share out a step's windows; -1: all that are left; "auto": one if the trial fits there, else -1."""
    model: Annotated[int | Literal["auto"], BeforeValidator(_divisor)] = 1
    """Devices that share out heads and d_ff, at most: what divides both; "auto": as few as make the trial fit."""
    fsdp: Annotated[bool | Literal["auto"], BeforeValidator(_switch)] = "auto"
    """Cut weights and optimiser state over the data devices too; "auto": where the trial doesn't fit otherwise."""
    hosts: bool = True
    """Where SLURM, MPI or Kubernetes started several processes: all train each trial; false: each is on its own."""


class ConfirmConfig(_Config):
    """The best trials, trained again with fresh seeds. Where this section stands, a sweep ends with it."""

    top_k: Annotated[int, Field(ge=1, le=1000)] = 5
    """How many of the best trials are trained again."""
    n_seeds: Annotated[int, Field(ge=2, le=1000)] = 5
    """Fresh seeds, the same for each of them; fewer than 2 show no spread."""


class BudgetConfig(_Config):
    """How many parameters a model may hold; solved, not searched."""

    parameters: Annotated[int, Field(ge=1, le=10**13), BeforeValidator(parse_parameters)]
    """A count, or text like "200M"."""
    tolerance: Fraction = 0.25
    """Two-sided, on counted parameters."""

    @property
    def low(self) -> int:
        """Fewest parameters inside the tolerance."""
        return math.ceil(self.parameters * (1 - self.tolerance))

    @property
    def high(self) -> int:
        """Most parameters inside the tolerance."""
        return math.floor(self.parameters * (1 + self.tolerance))


class LayerRange(_Config):
    """Every whole number from low to high."""

    low: Depth = 2
    high: Depth = 256

    @model_validator(mode="after")
    def _ordered(self) -> LayerRange:
        if self.low > self.high:
            raise ValueError(f"wanted low up to high, got low = {self.low} and high = {self.high}")
        return self


Candidates = Annotated[tuple[Width, ...], Field(min_length=1, max_length=1000)]


class ArchitectureConfig(_Config):
    """Candidate shapes; those inside the budget are the feasible set that `fintx plan` prints."""

    d_model: Candidates = (256, 384, 512, 768, 1024, 1536, 2048)
    """Widths of the residual stream."""
    n_layers: LayerRange = LayerRange()
    """Depths: every whole number from low to high."""
    n_heads: Candidates = (2, 4, 8, 12, 16, 24, 32)
    """Attention heads; those that divide d_model are paired with it."""
    d_ff_ratio: Annotated[
        tuple[Annotated[float, Field(gt=0, le=64, allow_inf_nan=False)], ...], Field(min_length=1, max_length=1000)
    ] = (2.0, 4.0)
    """d_ff / d_model; the product is rounded to a whole number."""

    @model_validator(mode="after")
    def _few_enough(self) -> ArchitectureConfig:
        depths = self.n_layers.high - self.n_layers.low + 1
        n_shapes = len(self.d_model) * depths * len(self.n_heads) * len(self.d_ff_ratio)
        if n_shapes > 500_000:
            raise ValueError(f"holds {n_shapes:,} candidate shapes; wanted 500,000 at most: shorten a list or n_layers")
        return self


class FloatRange(_Config):
    """A searched number: low ≤ x ≤ high, on a log scale if asked."""

    low: Annotated[float, Field(allow_inf_nan=False)]
    high: Annotated[float, Field(allow_inf_nan=False)]
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> FloatRange:
        if self.low >= self.high:
            raise ValueError(f"wanted low below high, got low = {self.low:g} and high = {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"wanted low above 0 with log = true, got low = {self.low:g}")
        return self


class Choices(_Config):
    """A searched value out of a list."""

    choices: Annotated[tuple[bool | int | float | str, ...], Field(min_length=1, max_length=1000)]


def _range_or_choices(value: Any) -> str:
    has_choices = "choices" in value if isinstance(value, dict) else isinstance(value, Choices)
    return "choices" if has_choices else "range"


Searched = Annotated[
    Annotated[FloatRange, Tag("range")] | Annotated[Choices, Tag("choices")], Discriminator(_range_or_choices)
]


Whole = Annotated[int, Field(ge=1, le=2**22), BeforeValidator(_whole)]


class QueueEntry(_Config):
    """A hand-picked shape to run before the search, with any training values it fixes by dotted path.

    The shape's numbers are fields of each family's own class.
    """

    note: str = ""
    """Why it is tried; kept in the record."""
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = None
    """A name that is the entry's identity; none: its identity is its content."""
    values: dict[str, bool | int | float | str] = {}
    """Dotted path → value, for paths of [space]; `training` says where the rest comes from."""
    training: Literal["best", "defaults", "sampler"] = "best"
    """best: the study's best finished trial, or the file's defaults before there is one; sampler: its own proposal."""
    cancelled: bool = False
    """True: never run; the entry stays in the file as a memory of it."""

    @property
    def shape(self) -> Shape:
        """The entry's shape."""
        return Shape(**{name: getattr(self, name) for name in shape_names(type(self))})


def shape_names(entry: type[QueueEntry]) -> tuple[str, ...]:
    """What a family's queue entries hold beside what all of them do."""
    return tuple(name for name in entry.model_fields if name not in QueueEntry.model_fields)


class EncoderEntry(QueueEntry):
    """A hand-picked shape to run before the search, with any training values it fixes by dotted path."""

    d_model: Whole
    """Width of the residual stream."""
    n_layers: Whole
    """Depth."""
    n_heads: Whole
    """Attention heads; must divide d_model."""
    d_ff: Whole
    """Width of the feed-forward layers."""


def _encoder_misfit(shape: Shape) -> tuple[str, str] | None:
    if shape.d_model % shape.n_heads:
        return "n_heads", f"{shape.n_heads} heads don't divide d_model = {shape.d_model}"
    return None


@dataclass(frozen=True)
class FamilyConfig:
    """What a sweep file and a record may say of a model family."""

    architecture: type[BaseModel]
    """Of the section [architecture]: candidates with defaults."""
    queue_entry: type[QueueEntry]
    """Of a [[queue]] entry: a field for each of a shape's numbers."""
    misfit: Callable[[Shape], tuple[str, str] | None] = lambda shape: None
    """Which of a shape's numbers doesn't fit the others, and why; none: they make a model."""


FAMILIES: dict[str, FamilyConfig] = {
    ENCODER: FamilyConfig(ArchitectureConfig, EncoderEntry, _encoder_misfit),
}
"""By `model.family`. What a family computes stands in `fintx.model.family`, under the same name."""


def check_shape(model: ModelConfig, shape: Shape) -> None:
    """A shape has the numbers of its family, and they make a model.

    Raises:
        ValueError: they don't.
    """
    wanted, given = shape_names(FAMILIES[model.family].queue_entry), tuple(shape.model_dump())
    if sorted(given) != sorted(wanted):
        raise ValueError(f"a shape of model.family = {model.family} has {', '.join(wanted)}, got {', '.join(given)}")
    if misfit := FAMILIES[model.family].misfit(shape):
        raise ValueError(": ".join(misfit))


def _family_of(info: ValidationInfo) -> FamilyConfig:
    model = info.data.get("model")
    return FAMILIES[ENCODER if model is None else model.family]


def _validated(model: type[_Model], value: Any, info: ValidationInfo) -> _Model:
    if isinstance(value, model):
        return value
    return model.model_validate_json(json.dumps(value)) if info.mode == "json" else model.model_validate(value)


def _architecture_of_family(value: Any, _: ValidatorFunctionWrapHandler, info: ValidationInfo) -> BaseModel:
    """The default of another family's is its own."""
    candidates = _family_of(info).architecture
    return candidates() if value == ArchitectureConfig() else _validated(candidates, value, info)


def _entry_of_family(value: Any, _: ValidatorFunctionWrapHandler, info: ValidationInfo) -> QueueEntry:
    return _validated(_family_of(info).queue_entry, value, info)


class StudySpec(_Config):
    """A sweep file, resolved: one question."""

    study: StudyConfig
    data: DataConfig = DataConfig()
    task: TaskConfig
    split: SplitConfig = SplitConfig(kind="fractions", train=0.7, validation=0.15)
    budget: BudgetConfig
    model: ModelConfig = ModelConfig()
    architecture: Annotated[SerializeAsAny[BaseModel], WrapValidator(_architecture_of_family)] = ArchitectureConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    space: dict[str, Searched] = {}
    """Dotted path into TrialConfig (model, optim, train) → what to search."""
    queue: tuple[Annotated[SerializeAsAny[QueueEntry], WrapValidator(_entry_of_family)], ...] = ()
    mesh: MeshConfig = MeshConfig()
    execution: ExecutionConfig = ExecutionConfig()
    confirm: ConfirmConfig | None = None


def canonical_json(config: BaseModel) -> str:
    """The one JSON text of a config: sorted keys, no spaces. Equal configs have equal texts."""
    return json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))


def config_hash(config: BaseModel) -> str:
    """sha256 (hex) of the canonical JSON."""
    return hashlib.sha256(canonical_json(config).encode()).hexdigest()
