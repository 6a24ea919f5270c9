"""Seams: a task, a baseline and a feature are added from outside, without a change to fintx."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from fintx import tasks
from fintx.analysis import comparison, study_analysis
from fintx.config import load
from fintx.config.schema import StudySpec
from fintx.data import datasets, features, sources
from fintx.data.bars import Bars
from fintx.data.features import Feature
from fintx.errors import FintxError
from fintx.evaluate import baselines
from fintx.evaluate.baselines import Input, Recipe
from fintx.report import format, study_page
from fintx.report.table import Table
from fintx.study import study_file
from fintx.types import Floats
from tests.helpers import planted

SPX = sources.embedded()


@dataclass(frozen=True)
class BigMove:
    """Whether the close moves by more than the threshold, up or down."""

    predicts: ClassVar[tasks.Prediction] = "probability"
    level: ClassVar[None] = None
    horizon: int
    threshold: float

    def cut_labels(self, bars: tasks.Prices) -> Floats:
        return np.abs(bars.close[self.horizon :] / bars.close[: -self.horizon] - 1) > self.threshold

    def describe(self) -> str:
        return f"1 if the close moves by more than {self.threshold:.1%} in {self.horizon} days, else 0."


@dataclass(frozen=True)
class Range:
    """ln(highest high / lowest low) of the next h days."""

    predicts: ClassVar[tasks.Prediction] = "value"
    level: ClassVar[None] = None
    horizon: int

    def cut_labels(self, bars: tasks.Prices) -> Floats:
        ahead = [
            (bars.high[t + 1 : t + 1 + self.horizon].max(), bars.low[t + 1 : t + 1 + self.horizon].min())
            for t in range(len(bars) - self.horizon)
        ]
        return np.array([np.log(high / low) for high, low in ahead])

    def describe(self) -> str:
        return f"The log range of the next {self.horizon} days."


TOYS = {
    "big_move": (BigMove, 'kind = "big_move"\nthreshold = 0.01\nhorizon = 2', "log_loss", "bce", "auc"),
    "range": (Range, 'kind = "range"\nhorizon = 2', "mse", "mse", "correlation"),
}


@pytest.fixture(params=TOYS)
def toy(request, monkeypatch):
    """A task from outside, in its place while the test runs; and what fits it."""
    task, *settings = TOYS[request.param]
    monkeypatch.setitem(tasks.TASKS, request.param, task)
    return request.param, *settings


def spec_of(folder: Path, task: str, metric: str, loss: str, edit: str = "") -> StudySpec:
    text = planted.SWEEP.replace("NAME", "toy").replace("TASK", task).replace("BUDGET", "10K").replace("METRIC", metric)
    text = text.replace("[train]", f'[train]\nloss = "{loss}"').replace("[data]", "[data]\nstart = 2008-01-01")
    path = folder / "toy.toml"
    path.write_text(text + edit)
    return load.study(path)


# --- a task -----------------------------------------------------------------------------------------------------------


def test_a_task_from_outside_is_trained_scored_and_kept(toy, tmp_path):
    from fintx.study.search_space import SearchSpace
    from fintx.train import trainer

    _, text, metric, loss, also = toy
    spec = spec_of(tmp_path, text, metric, loss)
    prepared = datasets.build(spec, tmp_path)
    (fold,) = prepared.folds
    rule = spec.task.rule
    np.testing.assert_array_equal(
        fold.validation.labels,
        tasks.labels(rule, SPX.between(spec.data.start, None))[fold.validation.rows].astype("f4"),
    )
    assert prepared.label_description == rule.describe()
    assert (prepared.parts[0].positives is None) == (rule.predicts == "value")

    space = SearchSpace.build(spec, n_features=3)
    shape = min(space.shapes, key=lambda shape: shape.n_layers * shape.d_model)
    config = space.trial_config(
        space.encode(shape) | {"optim.learning_rate": 3e-3, "model.dropout": 0.0}, shape, seed=0
    )
    assert json.loads(config.model_dump_json())["task"]["kind"] == spec.task.kind
    assert type(config).model_validate_json(config.model_dump_json()) == config
    fit = trainer.fit(
        config.model_copy(update={"train": config.train.model_copy(update={"max_epochs": 1})}), fold, metric=metric
    )
    assert fit.outcome == "completed" and fit.outputs.shape == fold.validation.labels.shape
    assert fit.best[metric] > 0 and also in fit.best

    beaten = study_file.ensure_baselines(tmp_path, prepared.folds, spec, tmp_path, notify=lambda line: None)
    assert {"prior"} < beaten.keys() <= baselines.BASELINES[rule.predicts].keys()
    assert not {"volatility_touch", "garch_touch"} & beaten.keys()  # no level is touched
    assert beaten["prior"]["metrics"]["skill"] == 0.0


def test_reports_describe_a_task_from_outside(toy, tmp_path):
    _, text, metric, loss, also = toy
    spec, rng = spec_of(tmp_path, text, metric, loss), np.random.default_rng(0)
    signal = rng.normal(size=500)
    labels = (signal > 0).astype(float) if metric == "log_loss" else 0.02 + 0.01 * signal
    prior = np.full(500, 0.0 if metric == "log_loss" else 0.02)
    folder = planted.write_study(
        tmp_path, spec, lambda i, k: prior + 0.005 * signal, labels=labels, baselines={"prior": prior}, n_trials=3
    )
    shown = study_analysis.read(folder, data_root=tmp_path)
    assert format.study_verdict(shown.results, None)[0].startswith(("Ahead", "No"))
    blocks = [block for section in study_page.build(shown).sections for block in section.blocks]
    table = next(block for block in blocks if isinstance(block, Table) and block.name == "baselines")
    assert also.replace("_", " ") in str(table.columns).lower()
    assert shown.label == spec.task.rule.describe() and shown.prepared is not None
    assert shown.direction is None
    twin = planted.write_study(
        tmp_path / "twin", spec, lambda i, k: prior, labels=labels, baselines={"prior": prior}, n_trials=3
    )
    assert comparison.read([folder, twin]).rows[0].label == spec.task.rule.describe()


def test_settings_losses_and_metrics_are_checked_against_the_task_from_outside(toy, tmp_path):
    name, text, metric, loss, _ = toy
    wrong = {"log_loss": ("mse", "mse"), "mse": ("log_loss", "bce")}[metric]
    with pytest.raises(FintxError, match="metric.*does not fit task.kind"):
        spec_of(tmp_path, text, wrong[0], loss)
    with pytest.raises(FintxError, match="train.loss.*does not fit task.kind"):
        spec_of(tmp_path, text, metric, wrong[1])
    with pytest.raises(FintxError, match=f'kind = "{name}" takes no `price`'):
        spec_of(tmp_path, text + '\nprice = "high"', metric, loss)


def test_without_it_the_task_is_unknown(tmp_path):
    with pytest.raises(FintxError, match='wanted "threshold", "direction" or "regression", got "big_move"'):
        spec_of(tmp_path, TOYS["big_move"][1], "log_loss", "bce")


# --- a baseline -------------------------------------------------------------------------------------------------------


def _nearest(train: Floats, labels: Floats, validation: Floats) -> Floats:
    """The label of the training row whose input is nearest."""
    return labels[np.abs(validation - train.T).argmin(axis=1)].astype(float)


def test_a_baseline_from_outside_is_fitted_and_kept_beside_the_others(tmp_path, monkeypatch):
    weekday = Input("the day of the week", lambda inputs: inputs.features(("weekday_sin",)))
    absent = Input("the price of tea", lambda inputs: None)
    monkeypatch.setitem(
        baselines.BASELINES["probability"], "nearest", Recipe("nearest by {}", (absent, weekday), lambda _: _nearest)
    )
    monkeypatch.setitem(
        baselines.BASELINES["probability"], "idle", Recipe("", (absent,), applies=lambda inputs: inputs.vix is not None)
    )
    for slow in ("bar_mlp", "bar_boosting", "garch_touch"):
        monkeypatch.delitem(baselines.BASELINES["probability"], slow)
    spec = spec_of(tmp_path, planted.THRESHOLD, "log_loss", "bce")
    prepared = datasets.build(spec, tmp_path)
    beaten = study_file.ensure_baselines(tmp_path, prepared.folds, spec, tmp_path, notify=lambda line: None)
    assert "nearest" in beaten and "idle" not in beaten
    assert beaten["nearest"]["words"] == "nearest by the day of the week"
    (fold,) = prepared.folds
    days = {row: fold.dates[row].astype(datetime.date).weekday() for row in (*fold.train.rows, *fold.validation.rows)}
    first = {days[row]: label for row, label in zip(fold.train.rows[::-1], fold.train.labels[::-1], strict=True)}
    expected = [first[days[row]] for row in fold.validation.rows]
    (forecast,) = {name: column for name, column in _outputs(tmp_path).items() if name == "nearest"}.values()
    np.testing.assert_array_equal(forecast, expected)


def _outputs(folder: Path) -> dict[str, np.ndarray]:
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "baselines.parquet")
    names = np.asarray(table["baseline"].to_pylist())
    return {name: table["output"].to_numpy()[names == name] for name in dict.fromkeys(names)}


# --- a feature --------------------------------------------------------------------------------------------------------


def _week_range(bars: Bars, _: Floats) -> Floats:
    """ln(highest high / lowest low) of five days."""
    return np.log(features.rolling(bars.high, 5).max(axis=1) / features.rolling(bars.low, 5).min(axis=1))


def test_a_feature_from_outside_is_an_input_like_any_other_and_joins_no_set(tmp_path, monkeypatch):
    published, names = dict(features.SETS), ("week_range", "log_return_1")
    before = datasets.build(spec_of(tmp_path, planted.THRESHOLD, "log_loss", "bce"), tmp_path).folds[0]
    monkeypatch.setitem(features.FEATURES, "week_range", Feature("range of five days", _week_range, 4, ("gaps",)))
    spec = spec_of(tmp_path, planted.THRESHOLD, "log_loss", "bce")
    assert datasets.build(spec, tmp_path).folds[0].data_hash == before.data_hash
    assert features.resolve(("stationary",), context=(), gaps=True) == (*published["stationary"], "gap")

    whole = features.compute(names, SPX, {})[:, 0]
    assert np.isnan(whole).sum() == features.slowest(names)[1] == 4
    for row in (3, 4, 700, len(SPX) - 2):  # no look-ahead: nothing moves when the future is cut off
        np.testing.assert_array_equal(features.compute(names, SPX.take(np.arange(row + 1)), {})[:, 0], whole[: row + 1])
    data = spec.data.model_copy(update={"features": names})
    with pytest.raises(FintxError, match='"week_range" means nothing where the open equals the close before'):
        datasets.build(spec.model_copy(update={"data": data.model_copy(update={"start": None})}), tmp_path)
    fold = datasets.build(spec.model_copy(update={"data": data}), tmp_path).folds[0]
    assert fold.feature_names == names and np.isfinite(fold.features).all()


def test_a_misspelt_feature_from_outside_is_answered_with_the_nearest(monkeypatch):
    monkeypatch.setitem(features.FEATURES, "week_range", Feature("range of five days", _week_range, 4))
    with pytest.raises(FintxError, match="did you mean week_range"):
        features.resolve(("week_rang",), context=())
