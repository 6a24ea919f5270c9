"""Schema: every setting of a trial and of a study, with its type, bounds, unit and default.

A `TrialConfig` holds everything that a trial's result depends on. A `StudySpec` is a whole sweep file, resolved. Both
are frozen values: `config.load` makes a StudySpec from a file, `study.search_space` makes TrialConfigs from it.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
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

from fintx.config.bounds import (
    Bytes,
    Count,
    Days,
    Float32,
    Fraction,
    Name,
    NonNegativeFloat,
    Parameters,
    PositiveFloat,
    Scalar,
    Seconds,
    Seed,
    Share,
    StrictModel,
    Symbol,
    Width,
    name_in,
    one_of,
)
from fintx.config.families import ENCODER, FAMILY_CONFIGS, ArchitectureConfig, QueueEntry, Shape, shape_names
from fintx.errors import without_passwords
from fintx.tasks import TASKS, Prediction, Task, settings


def _as_tuple(value: Any) -> Any:
    """One name stands for a list of it. (A strict tuple behind a validator takes no JSON array.)"""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


class DataConfig(StrictModel):
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


class TaskConfig(StrictModel):
    """What is predicted, and how many days ahead."""

    kind: Annotated[str, name_in(TASKS)]
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
            is_needed = key in settings(self.kind)
            if (getattr(self, key) is not None) != is_needed:
                raise ValueError(f'kind = "{self.kind}" {"needs" if is_needed else "takes no"} `{key}`')
        return self

    @property
    def rule(self) -> Task:
        """The task with these settings: cuts labels from prices."""
        return TASKS[self.kind](**{key: getattr(self, key) for key in settings(self.kind)})

    @property
    def predicts(self) -> Prediction:
        """What a model outputs; losses, metrics and baselines follow from it."""
        return TASKS[self.kind].predicts


class SplitConfig(StrictModel):
    """Which days are for training, for validation, and for the sealed test; always in time order."""

    kind: Literal["fractions", "dates", "walk_forward"] = "fractions"
    """Shares of the days in time order, parts by date, or several validation folds in a row."""
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
        keys = ("train", "validation", "validation_start", "test_start", "n_folds", "window")
        present = {key for key in keys if getattr(self, key) is not None}
        if missing := sorted(required - present):
            raise ValueError(f'kind = "{self.kind}" needs {", ".join(f"`{key}`" for key in missing)}')
        if foreign := sorted(present - required - optional):
            raise ValueError(f'kind = "{self.kind}" takes no {", ".join(f"`{key}`" for key in foreign)}')
        if self.kind == "fractions" and self.train + self.validation >= 1:  # type: ignore[operator]
            raise ValueError("`train` + `validation` must be below 1: the rest is the sealed test part")
        if self.test_start and self.validation_start and self.test_start <= self.validation_start:
            raise ValueError("`test_start` must be after `validation_start`")
        return self


class ModelConfig(StrictModel):
    """The model, except for its shape, which is solved from the budget."""

    family: Annotated[str, name_in(FAMILY_CONFIGS)] = ENCODER
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
        """The encoder is left out, so that hashes of configs from before there were families stay the same."""
        tree: dict[str, Any] = fields(self)
        return {key: value for key, value in tree.items() if (key, value) != ("family", ENCODER)}

    @model_validator(mode="after")
    def _patch_fits_window(self) -> ModelConfig:
        if self.patch_length > self.context_length:
            raise ValueError(
                f"patch_length = {self.patch_length} is longer than context_length = {self.context_length}"
            )
        return self


class OptimConfig(StrictModel):
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


class TrainConfig(StrictModel):
    """How long, on what loss, and when to stop."""

    batch_size: Width = 64
    """Windows per step."""
    max_epochs: Count = 30
    """Passes over the training windows at most; the schedule is laid out for them."""
    patience: Count = 5
    """Epochs without a better validation metric before training stops; the best step is restored."""
    loss: Literal["bce", "focal", "mse", "huber"] = "bce"
    """bce, focal (Lin et al. 2017) for threshold and direction; mse, huber for regression."""
    focal_gamma: Annotated[NonNegativeFloat, Field(le=100)] = 2.0
    """Exponent of the focal loss; other losses ignore it. Beyond 100 hardly a sample would weigh anything."""
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


def check_loss(task: TaskConfig, train: TrainConfig) -> None:
    """Check that the loss is for what is predicted.

    Raises:
        ValueError: a classification loss on a regression task, or the reverse.
    """
    if train.loss not in LOSSES[task.predicts]:
        fitting = " or ".join(f'"{loss}"' for loss in LOSSES[task.predicts])
        raise ValueError(f'train.loss = "{train.loss}" does not fit task.kind = "{task.kind}"; use {fitting}')
    if task.predicts == "value":
        if train.label_smoothing:
            raise ValueError("train.label_smoothing is for classification; leave it out for a regression task")
        if train.class_weight != "none":
            raise ValueError("train.class_weight is for classification; leave it out for a regression task")


def check_shape(model: ModelConfig, shape: Shape) -> None:
    """Check that a shape has the numbers of its family, and that they make a model.

    Raises:
        ValueError: they don't.
    """
    expected, actual = shape_names(FAMILY_CONFIGS[model.family].queue_entry), tuple(shape.model_dump())
    if sorted(actual) != sorted(expected):
        raise ValueError(f"a shape of model.family = {model.family} has {', '.join(expected)}, got {', '.join(actual)}")
    if misfit := FAMILY_CONFIGS[model.family].misfit(shape):
        raise ValueError(": ".join(misfit))


class TrialConfig(StrictModel):
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


def _free_name(name: str) -> str:
    """A study's folder lies beside the table of all studies, and may be copied to Windows."""
    if re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|experiment_results\.csv|.*\.", name, re.IGNORECASE):
        raise ValueError("wanted another name: this one is of a file of fintx, a device of Windows, or ends in a dot")
    return name


class StudyConfig(StrictModel):
    """The study: its name, question, metric and number of trials."""

    name: Annotated[Name, AfterValidator(_free_name)]
    """Folder under outputs/ and study name in the storage: letters, digits, '.', '_', '-'; at most 64."""
    question: str = ""
    """What the study asks, in a sentence; reports print it."""
    n_trials: Count = 50
    """The total, queue included; running the file again never adds to it."""
    seed: Seed = 0
    """Seeds the sampler and, together with its number, every trial."""
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


class ExecutionConfig(StrictModel):
    """How a study is run, and on what. It has no part in what a study asks, so it may change from run to run."""

    # No quotes: what hides passwords in a text takes them for the end of the URL.
    storage: Annotated[str, Field(pattern=r"""^(journal|postgresql://[^\s"']+)$""")] = "journal"
    """journal: a file in the study's folder. postgresql://USER@HOST/DATABASE: machines with that URL share a study."""
    checkpoint_s: Seconds | None = None
    """Seconds between saves of a running trial; none: 60, or 50 × what a save takes if longer (2 % at most)."""
    hang_s: Annotated[Seconds, Field(ge=1)] = 900.0
    """Seconds without a step after which a worker counts as hung: it is stopped and its trial taken up again."""
    max_attempts: Count = 3
    """Times that a run of the study tries a trial whose worker crashes or hangs, before it leaves the trial aside."""
    max_failures: Count = 10
    """Failures of the same kind in a row that stop the study: something is wrong that more trials won't fix."""
    memory: Bytes | None = None
    """Memory that all running trials may take together, such as "12GB"; none: what the machine or its GPU has free."""
    program_cache: str | None = None
    """Folder where compiled programs are kept, so that a shape seen before isn't compiled again; none: that of
    JAX_COMPILATION_CACHE_DIR, or .programs beside the studies; off: keep none."""

    population: Annotated[
        Literal["auto"] | bool | int,
        one_of('"auto", true, false or a number from 1 to 4096', "auto", True, False, most=4096),
    ] = "auto"
    """Trials that share a program trained at once. auto: where it pays, a trial's replicates, and on a GPU trials that
    wait for no result (random start, unfinished, queued with values of their own): what is proposed stays the same.
    true: all of one shape where it pays; a number: as many in one program, pay or not; false: none."""
    pipeline: bool | None = None
    """Ask for the next trial and compile it while one trains; none: on a GPU (on a CPU compiling takes its cores)."""

    @field_serializer("storage")
    def _storage_without_password(self, storage: str) -> str:
        return without_passwords(storage)


class MeshConfig(StrictModel):
    """How each trial is spread over devices; like [execution] no part of what the study asks."""

    data: Annotated[
        int | Literal["auto"],
        one_of('a number of devices, -1 for all that are left, or "auto"', "auto", -1, most=2**16),
    ] = -1
    """Devices that share a step's windows; -1: all that are left; "auto": one if the trial fits there, else -1."""
    model: Annotated[int | Literal["auto"], one_of('a number of devices, or "auto"', "auto", most=2**16)] = 1
    """Most devices that share heads and d_ff: as many as divide both are used; "auto": as few as the trial fits on."""
    fsdp: Annotated[bool | Literal["auto"], one_of('true, false or "auto"', "auto", True, False)] = "auto"
    """Cut weights and optimiser state over the data devices too; "auto": where the trial doesn't fit otherwise."""
    hosts: bool = True
    """Where SLURM, MPI or Kubernetes started several processes: all train each trial; false: each is on its own."""


class ConfirmConfig(StrictModel):
    """Training the best trials again with fresh seeds; a sweep with this section ends with it."""

    top_k: Annotated[int, Field(ge=1, le=1000)] = 5
    """How many of the best trials are trained again."""
    n_seeds: Annotated[int, Field(ge=2, le=1000)] = 5
    """Fresh seeds, the same for each of them; fewer than 2 show no spread."""


class BudgetConfig(StrictModel):
    """How many parameters a model may have; shapes are solved from it."""

    parameters: Parameters
    """A count, or text like "200M"."""
    tolerance: Fraction = 0.25
    """Share by which the exact count may be above or below."""

    @property
    def low(self) -> int:
        """Fewest parameters inside the tolerance."""
        return math.ceil(self.parameters * (1 - self.tolerance))

    @property
    def high(self) -> int:
        """Most parameters inside the tolerance."""
        return math.floor(self.parameters * (1 + self.tolerance))


class FloatRange(StrictModel):
    """A searched number: low ≤ x ≤ high, on a log scale if log is true."""

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


class Choices(StrictModel):
    """A searched value from a list."""

    choices: Annotated[tuple[Scalar, ...], Field(min_length=1, max_length=1000)]


def _range_or_choices(value: Any) -> str:
    has_choices = "choices" in value if isinstance(value, dict) else isinstance(value, Choices)
    return "choices" if has_choices else "range"


Searched = Annotated[
    Annotated[FloatRange, Tag("range")] | Annotated[Choices, Tag("choices")], Discriminator(_range_or_choices)
]


def _of_its_family(value: Any, _: ValidatorFunctionWrapHandler, info: ValidationInfo) -> BaseModel:
    """[architecture] or a [[queue]] entry, as a value of the class that the model's family has for it."""
    model = info.data.get("model")  # not there if it is wrong itself
    family = FAMILY_CONFIGS[ENCODER if model is None else model.family]
    section = family.architecture if info.field_name == "architecture" else family.queue_entry
    if isinstance(value, section):
        return value
    if value == ArchitectureConfig():  # the field's default; each family has its own
        return section()
    return section.model_validate_json(json.dumps(value)) if info.mode == "json" else section.model_validate(value)


class StudySpec(StrictModel):
    """A sweep file with everything filled in: one study."""

    study: StudyConfig
    data: DataConfig = DataConfig()
    task: TaskConfig
    split: SplitConfig = SplitConfig(kind="fractions", train=0.7, validation=0.15)
    budget: BudgetConfig
    model: ModelConfig = ModelConfig()
    architecture: Annotated[SerializeAsAny[BaseModel], WrapValidator(_of_its_family)] = ArchitectureConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    space: dict[str, Searched] = {}
    """Dotted path into TrialConfig (model, optim, train) → what to search."""
    queue: tuple[Annotated[SerializeAsAny[QueueEntry], WrapValidator(_of_its_family)], ...] = ()
    mesh: MeshConfig = MeshConfig()
    execution: ExecutionConfig = ExecutionConfig()
    confirm: ConfirmConfig | None = None


def config_hash(config: BaseModel) -> str:
    """sha256 (hex) of the config's JSON with sorted keys and no spaces, which is the same for equal configs."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
