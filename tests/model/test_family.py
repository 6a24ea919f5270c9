"""A model family from outside the package: sizes, search, training, memory, devices and files work with it as it is."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from pydantic import BaseModel, ConfigDict

from fintx.analysis import comparison, status, study_analysis
from fintx.config import load, schema
from fintx.config.bounds import PositiveInt
from fintx.config.families import FamilyConfig
from fintx.config.schema import (
    BudgetConfig,
    MeshConfig,
    ModelConfig,
    QueueEntry,
    Shape,
    StudySpec,
    TrialConfig,
    config_hash,
)
from fintx.config.toml import SweepFileError
from fintx.data import datasets
from fintx.data.datasets import Dataset
from fintx.errors import FintxError
from fintx.model import family
from fintx.model.family import Family
from fintx.model.param_count import InfeasibleBudget, count_params, feasible_shapes
from fintx.report import comparison_page, study_page
from fintx.run import trial as trials
from fintx.run.job import Job
from fintx.run.trial import Hooks
from fintx.study import queue, records
from fintx.study.search_space import SearchSpace
from fintx.train import checkpoint, memory, sharding, train_step, trainer
from fintx.train.resume import CheckpointPolicy
from fintx.train.sharding import Layout
from fintx.train.train_state import BatchLayout, static_config
from tests.helpers import planted

# --- the family: tanh(window · W) · w, of a width ---------------------------------------------------------------------


class Widths(BaseModel):
    """What [architecture] holds."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    width: tuple[int, ...] = (8, 16, 24, 32)


class WidthEntry(QueueEntry):
    """What a [[queue]] entry holds."""

    width: PositiveInt


def abstract_params(model: ModelConfig, shape: Shape, n_features: int) -> dict[str, Any]:
    real = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)  # noqa: E731
    hidden = {"kernel": real(model.context_length * n_features, shape.width), "bias": real(shape.width)}
    return {"hidden": hidden, "out": {"kernel": real(shape.width, 1), "bias": real(1)}}


def init(model: ModelConfig, shape: Shape, n_features: int, key: jax.Array) -> dict[str, Any]:
    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if len(leaf.shape) == 1:
            return jnp.zeros(leaf.shape, jnp.float32)
        return jax.random.normal(key, leaf.shape, jnp.float32) / math.sqrt(leaf.shape[0])

    return jax.tree.map(draw, abstract_params(model, shape, n_features))


def apply(model: ModelConfig, shape: Shape, params: Any, x_BTF: jax.Array, **_: Any) -> jax.Array:
    flat = x_BTF.reshape(x_BTF.shape[0], -1)
    hidden = jnp.tanh(flat @ params["hidden"]["kernel"] + params["hidden"]["bias"][None, :])
    return (hidden @ params["out"]["kernel"])[:, 0] + params["out"]["bias"]


def param_count(model: ModelConfig, shape: Shape, n_features: int) -> dict[str, int]:
    params = abstract_params(model, shape, n_features)
    return {name: sum(math.prod(leaf.shape) for leaf in layer.values()) for name, layer in params.items()}


def feasible(
    architecture: Widths, budget: BudgetConfig, models: Sequence[ModelConfig], n_features: int
) -> tuple[Shape, ...]:
    return tuple(
        shape
        for shape in (Shape(width=width) for width in sorted(architecture.width))
        if all(budget.low <= sum(param_count(model, shape, n_features).values()) <= budget.high for model in models)
    )


def rescale_output(params: Any, mean: float, sd: float) -> Any:
    return params | {"out": {"kernel": params["out"]["kernel"] * sd, "bias": params["out"]["bias"] * sd + mean}}


MLP = Family(
    init=init,
    apply=apply,
    abstract_params=abstract_params,
    rescale_output=rescale_output,
    param_count=param_count,
    flops=lambda model, shape, n_features: 2.0 * shape.width * (model.context_length * n_features + 1),
    activation_bytes=lambda model, shape, *, windows, remat=False, parts=1: 3 * 4 * windows * shape.width // parts,
    weight_decay_mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim == 2, params),
    partition_rules={
        "hidden/kernel": PartitionSpec(None, "model"),
        "hidden/bias": PartitionSpec("model"),
        "out/kernel": PartitionSpec("model", None),
    },
    model_parts=lambda shape: shape.width,
    stacked=None,
    depth=lambda shape: 2,
    width=lambda shape: shape.width,
    feasible=feasible,
    why_infeasible=lambda *_: "add to architecture.width",
    coordinates={"shape.width": lambda shape: math.log2(shape.width)},
    extents={"width": lambda shape: shape.width},
)


@pytest.fixture(autouse=True)
def mlp() -> Iterator[Family]:
    """The family, known for the length of a test."""
    schema.FAMILY_CONFIGS["mlp"] = FamilyConfig(Widths, WidthEntry)
    family.FAMILIES["mlp"] = MLP
    yield MLP
    del schema.FAMILY_CONFIGS["mlp"], family.FAMILIES["mlp"]


SWEEP = """
[study]
name = "mlp"
queue_extremes = true

[data]
features = ["log_return_1", "log_return_5", "realized_vol_21"]
start = 2008-01-01

[task]
kind = "threshold"
price = "high"
threshold = 0.01
horizon = 3

[split]
kind = "fractions"
train = 0.6
validation = 0.2

[budget]
parameters = 1200
tolerance = 0.5

[architecture]
width = [8, 16, 24, 256]

[model]
family = "mlp"
context_length = 20

[train]
batch_size = 128
max_epochs = 2

[space]
"optim.learning_rate" = { low = 1e-3, high = 1e-2, log = true }
"""


def loaded(folder: Path, text: str = SWEEP) -> StudySpec:
    path = folder / "mlp.toml"
    path.write_text(text)
    return load.study(path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> datasets.PreparedData:
    """Real data, small: the embedded index."""
    schema.FAMILY_CONFIGS["mlp"] = FamilyConfig(Widths, WidthEntry)
    spec = loaded(tmp_path_factory.mktemp("sweeps"))
    return datasets.build(spec, tmp_path_factory.mktemp("data"))


@pytest.fixture
def spec(tmp_path: Path, prepared: datasets.PreparedData) -> StudySpec:
    return loaded(tmp_path).model_copy(update={"data": prepared.data})


@pytest.fixture
def trial(spec: StudySpec) -> TrialConfig:
    space = SearchSpace.build(spec, n_features=3)
    return space.trial_config({"optim.learning_rate": 3e-3}, Shape(width=16), seed=1)


@pytest.fixture
def dataset(prepared: datasets.PreparedData) -> Dataset:
    return prepared.folds[0]


# --- what is written and read -----------------------------------------------------------------------------------------


def test_a_sweep_file_names_the_family_and_its_candidates(spec: StudySpec, tmp_path: Path) -> None:
    assert spec.model.family == "mlp" and spec.architecture == Widths(width=(8, 16, 24, 256))
    assert loaded(tmp_path, load.dump(spec)) == spec
    assert StudySpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    ("line", "instead", "words"),
    [
        ('family = "mlp"', 'family = "mpl"', 'model.family: wanted "encoder" or "mlp", got "mpl"; did you mean "mlp"?'),
        ("width = [8, 16, 24, 256]", "widht = [8]", 'architecture.widht: unknown key; did you mean "width"?'),
        ("width = [8, 16, 24, 256]", "d_model = [8]", "architecture.d_model: unknown key; known: width"),
        ('"optim.learning_rate" = { low = 1e-3, high = 1e-2, log = true }', '"model.family" = { choices = ["mlp"] }',
         "model.family: can't be searched"),
    ],
    ids=["no such family", "a key of it", "a key of another", "searched"],
)  # fmt: skip
def test_a_mistake_is_one_line(line: str, instead: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(SweepFileError) as caught:
        loaded(tmp_path, SWEEP.replace(line, instead))
    assert words in str(caught.value)


def test_a_family_without_functions_is_one_line() -> None:
    del family.FAMILIES["mlp"]
    try:
        with pytest.raises(FintxError, match='model.family: wanted "encoder", got "mlp"'):
            count_params(ModelConfig(family="mlp"), Shape(width=8), 3)
    finally:
        family.FAMILIES["mlp"] = MLP


def test_a_trials_shape_is_its_familys(trial: TrialConfig) -> None:
    assert TrialConfig.model_validate_json(trial.model_dump_json()) == trial
    assert '"family":"mlp"' in trial.model_dump_json() and '"shape":{"width":16}' in trial.model_dump_json()
    encoder = trial.model_dump() | {"model": ModelConfig()}
    with pytest.raises(ValueError, match="a shape of model.family = encoder has d_model, n_layers, n_heads, d_ff"):
        TrialConfig(**encoder)


def test_a_config_of_before_there_were_families_is_the_encoders() -> None:
    """Its text and so its hash are what they were: records and studies on disk are found again."""
    assert "family" not in ModelConfig().model_dump() and ModelConfig(**ModelConfig().model_dump()).family == "encoder"
    assert config_hash(ModelConfig()) == "ce465260bac5299940349819585c9a88a86b9922c32b9df5a46e14a16fccf241"


def test_both_tables_hold_the_same_families() -> None:
    assert schema.FAMILY_CONFIGS.keys() == family.FAMILIES.keys()


# --- counted and searched ---------------------------------------------------------------------------------------------


def test_it_is_counted_and_solved_for_a_budget(spec: StudySpec) -> None:
    counted = count_params(spec.model, Shape(width=16), 3)
    assert counted.total == 20 * 3 * 16 + 16 + 16 + 1 and counted.parts.keys() == {"hidden", "out"}
    shapes = feasible_shapes(spec.architecture, spec.budget, [spec.model], 3)
    assert [shape.width for shape in shapes] == [16, 24]
    with pytest.raises(InfeasibleBudget, match="no candidate shape holds .*: add to architecture.width"):
        feasible_shapes(spec.architecture, BudgetConfig(parameters=10), [spec.model], 3)


def test_the_sampler_sees_its_coordinates(spec: StudySpec) -> None:
    space = SearchSpace.build(spec, n_features=3)
    assert space.distributions.keys() == {"shape.width", "optim.learning_rate"}
    assert [space.decode(space.encode(shape)) for shape in space.shapes] == list(space.shapes)
    assert space.encode(Shape(width=1000)) == {"shape.width": math.log2(24)}


# --- trained ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["threshold", "regression"])
def test_it_trains_on_real_data_and_its_model_comes_back(
    kind: str, trial: TrialConfig, dataset: Dataset, tmp_path: Path
) -> None:
    metric = "log_loss"
    if kind == "regression":
        task, train = schema.TaskConfig(kind="regression", horizon=3), trial.train.model_copy(update={"loss": "mse"})
        trial, metric = trial.model_copy(update={"task": task, "train": train}), "mse"
    result = trainer.fit(trial, dataset, metric=metric)
    assert result.outcome == "completed" and result.params is not None and result.outputs is not None
    assert result.param_count == count_params(trial.model, trial.shape, 3).total
    assert len({round(epoch[metric], 6) for epoch in result.curve}) == 2, "an epoch changes it"
    checkpoint.save(tmp_path / "model", result.params, config=trial, meta={})
    restored = checkpoint.load(tmp_path / "model")
    assert restored.config == trial
    again = trainer.predict(restored.config, restored.params, dataset.features, dataset.validation.rows)
    np.testing.assert_array_equal(again, result.outputs)


def test_an_interrupted_trial_goes_on_to_the_same_numbers(
    trial: TrialConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves, taken = CheckpointPolicy(tmp_path, 1e9, lambda: None), [0]
    stopped = trainer.fit(
        trial, dataset, metric="log_loss", saves=saves,
        on_progress=taken.append, should_stop=lambda: taken[-1] >= 9,
    )  # fmt: skip
    assert stopped.outcome == "interrupted"
    result = trainer.fit(trial, dataset, metric="log_loss", saves=saves)
    assert result.resumed_step > 0 and result.curve == trainer.fit(trial, dataset, metric="log_loss").curve


def test_shapes_are_queued_by_its_names(tmp_path: Path, prepared: datasets.PreparedData) -> None:
    spec = loaded(tmp_path, SWEEP + '[[queue]]\nwidth = 20\nnote = "between"\n"optim.learning_rate" = 5e-3\n')
    assert [entry.shape for entry in spec.queue] == [Shape(width=20)]
    assert loaded(tmp_path, load.dump(spec)) == spec
    space = SearchSpace.build(spec, n_features=3)
    assert queue.settle(spec.queue[0], space, best=None).shape == Shape(width=20)
    extremes = [(entry.note, entry.shape.width) for entry in queue.unlisted_extremes(spec, space)]
    assert extremes == [("smallest width", 16), ("largest width", 24)]
    queue.check(spec, n_features=3)
    with pytest.raises(queue.QueueError, match="width 900 holds 55,801 parameters, outside the budget"):
        queue.check(loaded(tmp_path, SWEEP + "[[queue]]\nwidth = 900\n"), n_features=3)
    with pytest.raises(SweepFileError, match=r"queue\[0\].d_model: unknown key"):
        loaded(tmp_path, SWEEP + "[[queue]]\nd_model = 8\n")


def test_a_trial_becomes_a_record(
    spec: StudySpec, trial: TrialConfig, prepared: datasets.PreparedData, tmp_path: Path
) -> None:
    """Its file says the shape's numbers once more, by the family's names."""
    job = Job(
        spec=spec, config=trial, number=0, attempt=1, params={"optim.learning_rate": 3e-3}, entry=None, note="",
        training="", study_folder=tmp_path / "mlp", data_root=tmp_path, memory_limit=None,
    )  # fmt: skip
    ((_, record),) = trials.run_trials([job], prepared.folds, [Hooks()])
    assert record is not None and record.outcome == "completed" and record.param_count == 993
    file = records.trial_folder(job.study_folder, 0) / "record.json"
    assert json.loads(file.read_text())["width"] == 16 and records.read(file) == record
    row = status.trial_row(record)
    assert row["width"] == 16 and "d_model" not in row
    file.write_text(file.read_text().replace('"width": 16', '"width": 17'))
    with pytest.raises(records.DamagedRecord):
        records.read(file)


def test_studies_of_it_are_reported_and_compared(tmp_path: Path) -> None:
    """Tables, figures and patterns go over its own numbers."""
    rng, n = np.random.default_rng(0), 300
    labels, prior = (rng.random(n) < 0.4).astype(float), np.full(n, -0.4)
    baselines = {"prior": prior, "volatility_logistic": prior + 0.1 * rng.normal(size=n)}
    folders = []
    for name in ("one", "two"):
        text = SWEEP.replace('name = "mlp"', f'name = "{name}"') + '"model.dropout" = { low = 0.0, high = 0.5 }\n'
        folders.append(
            planted.write_study(
                tmp_path, loaded(tmp_path, text), lambda *_: prior + 0.1 * rng.normal(size=n), labels=labels,
                baselines=baselines,
            )
        )  # fmt: skip
    analysis = study_analysis.read(folders[0], data_root=tmp_path)
    assert [(pattern.name, len(pattern.groups)) for pattern in analysis.shapes] == [("width", 2)]
    assert [(row.width, row.depths) for row in analysis.search.coverage] == [(16, "2"), (24, "2")]
    page = study_page.build(analysis).write().read_text()
    assert "By width" in page and re.search(r"trial \d+ · width (16|24)", page)
    side_by_side = comparison.read(folders)
    assert {row.shape for row in side_by_side.common} == {Shape(width=16), Shape(width=24)}
    assert "width 16" in comparison_page.build(side_by_side, outputs=tmp_path).write().read_text()


def test_what_it_holds_is_guessed_before_it_is_compiled(trial: TrialConfig) -> None:
    n = count_params(trial.model, trial.shape, 3).total
    assert memory.lower_bound(trial, host_is_device=False) == 16 * n
    footprint = memory.footprint(trial.model, trial.shape, 3, BatchLayout(128))
    assert (footprint.parameters, footprint.gradients, footprint.moments) == (4 * n, 4 * n, 8 * n)
    needed = train_step.compile_training(static_config(trial), n_features=3, n_rows=512, n_samples=256).n_bytes
    assert needed > 12 * n


@pytest.mark.parametrize(
    ("mesh", "layout"),
    [
        (MeshConfig(data=8), Layout(data=8)),
        (MeshConfig(data=2, model=4, fsdp=True), Layout(data=2, model=4, fsdp=True)),
    ],
    ids=["over windows", "width and fsdp"],
)
def test_it_lies_on_a_mesh_and_trains_to_the_same_numbers(
    mesh: MeshConfig, layout: Layout, trial: TrialConfig, dataset: Dataset
) -> None:
    """Losses of two epochs of sums in another order; an eps that keeps Adam from turning roundings into steps."""
    trial = trial.model_copy(update={"optim": trial.optim.model_copy(update={"eps": 1e-3})})
    alone, spread = (trainer.fit(trial, dataset, metric="log_loss", mesh=each) for each in (None, mesh))
    assert spread.batch_layout.layout == layout
    for spread_epoch, alone_epoch in zip(spread.curve, alone.curve, strict=True):
        assert spread_epoch == pytest.approx(alone_epoch, rel=1e-4)
    specs = sharding.specs(MLP, layout, MLP.abstract_params(trial.model, trial.shape, 3))
    cut = layout.model > 1
    assert specs["hidden"]["kernel"] == (PartitionSpec("data", "model") if cut else PartitionSpec())
    assert specs["hidden"]["bias"] == (PartitionSpec("model") if cut else PartitionSpec())
    assert sharding.part_bytes(MLP, layout, alone.params) < sharding.part_bytes(MLP, Layout(), alone.params) or not cut
