"""Baselines learn from training rows alone, score the very same validation rows, and reach the published figures."""

from __future__ import annotations

import datetime
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fintx import tasks
from fintx.config.schema import DataConfig, SplitConfig, TaskConfig
from fintx.data import bars as bars_module
from fintx.data import datasets, sources, standardize
from fintx.data.bars import Bars
from fintx.data.datasets import Dataset, Part
from fintx.evaluate import baselines, metrics
from tests.helpers.specs import spec_of

THRESHOLD = TaskConfig(kind="threshold", price="high", threshold=0.01, horizon=1)
REGRESSION = TaskConfig(kind="regression", horizon=3)
N_DAYS = 900


def priced(symbol: str, dates: np.ndarray, returns: np.ndarray) -> Bars:
    """Bars whose high and low lie half a day's move off the close."""
    close = 100 * np.exp(np.cumsum(returns))
    open_ = np.r_[100.0, close[:-1]]
    reach = np.exp(np.abs(returns) / 2)
    high, low = np.maximum(open_, close) * reach, np.minimum(open_, close) / reach
    return bars_module.make_bars(symbol, dates, open=open_, high=high, low=low, close=close, volume=np.ones(len(dates)))


@pytest.fixture(scope="module")
def market() -> tuple[dict[str, Bars], dict[str, Bars]]:
    """Two assets, one of which trades on fewer days, and a VIX that knows the volatility of both."""
    rng = np.random.default_rng(0)
    days = np.datetime64("2010-01-04") + np.arange(N_DAYS)
    log_vol = np.cumsum(rng.normal(scale=0.1, size=N_DAYS))
    log_vol = np.log(0.01) + 0.8 * (log_vol - log_vol.mean()) / log_vol.std()
    vix = 100 * np.sqrt(252) * np.exp(log_vol)
    tomorrow = np.r_[0.0, np.exp(log_vol[:-1])]  # VIX of a close foretells the next day's move
    fewer = np.flatnonzero(rng.random(N_DAYS) < 0.7)
    assets = {
        "AAA": priced("AAA", days, tomorrow * rng.normal(size=N_DAYS)),
        "BBB": priced("BBB", days[fewer], (tomorrow * rng.normal(size=N_DAYS))[fewer]),
    }
    column = {name: vix for name in ("open", "high", "low", "close")}
    return assets, {"VIX": bars_module.make_bars("VIX", days, **column, volume=np.zeros(N_DAYS))}


def stacked(bars: dict[str, Bars], task: TaskConfig, *, first: int = 0, split: float = 0.6) -> Dataset:
    """The dataset of whole assets: rows from day `first`, the older `split` of the days train."""
    days = np.concatenate([b.dates for b in bars.values()])
    cut = np.concatenate([tasks.labels(task.rule, b) for b in bars.values()])
    ids = np.concatenate([np.full(len(b), i, np.int32) for i, b in enumerate(bars.values())])
    begin = days.min()
    usable = ~np.isnan(cut) & (days >= begin + first)
    older = days < begin + round(split * N_DAYS)
    feature = np.zeros((len(days), 1))
    parts = [np.flatnonzero(usable & chosen).astype(np.int32) for chosen in (older, ~older)]
    assets = tuple(bars)
    return Dataset(
        features=feature.astype(np.float32),
        feature_names=("nothing",),
        dates=days,
        asset_ids=ids,
        assets=assets,
        close=np.concatenate([b.close for b in bars.values()]),
        train=Part(parts[0], cut[parts[0]].astype(np.float32)),
        validation=Part(parts[1], cut[parts[1]].astype(np.float32)),
        scaling=standardize.fit_standardizer(feature, ids, assets, parts[0], kind="none"),
        data_hash="",
        label_hash="",
        split_hash="",
    )


def by_name(dataset, task, bars, context) -> dict[str, baselines.Baseline]:
    return {b.name: b for b in baselines.for_dataset(dataset, task, bars, context)}


def inputs_of(names, data, bars, context) -> np.ndarray:
    inputs = baselines.BaselineInputs.build(data, THRESHOLD.rule, bars, context)
    return inputs.vix if names is None else inputs.volatilities


# --- what there is ---------------------------------------------------------------------------------------------------


def test_names_and_words_say_what_was_fitted(market):
    bars, vix = market
    fitted = {
        (task.kind, "VIX" in context): [(b.name, b.words) for b in baselines.for_dataset(data, task, bars, context)]
        for task in (THRESHOLD, REGRESSION)
        for data in [stacked(bars, task)]
        for context in (vix, {})
    }
    names = {key: [name for name, _ in value] for key, value in fitted.items()}
    assert names["threshold", True] == [
        "prior", "climatology", "last_label", "volatility_logistic", "vix_har_logistic", "volatility_touch",
        "garch_touch", "bar_logistic", "bar_boosting", "bar_mlp",
    ]  # fmt: skip
    assert names["threshold", False] == [name for name in names["threshold", True] if name != "vix_har_logistic"]
    assert names["regression", True] == names["regression", False] == [
        "prior", "zero", "har_linear", "volatility_linear",
    ]  # fmt: skip
    realised = "ln realised volatility of 5, 21 and 63 days"
    words = {key: dict(value) for key, value in fitted.items()}
    assert words["threshold", True]["volatility_logistic"] == "logistic regression on ln VIX"
    assert words["threshold", False]["volatility_logistic"] == f"logistic regression on {realised}"
    assert words["regression", False]["volatility_linear"] == f"linear regression on {realised}"


@pytest.mark.parametrize("task", [THRESHOLD, REGRESSION], ids=lambda task: task.kind)
def test_outputs_are_float32_on_the_validation_rows_and_give_the_metrics(market, task):
    bars, vix = market
    data = stacked(bars, task)
    prior = float(np.mean(data.train.labels, dtype=np.float64))
    for baseline in baselines.for_dataset(data, task, bars, vix):
        assert baseline.outputs.dtype == np.float32
        assert baseline.outputs.shape == data.validation.rows.shape
        again = metrics.evaluate(task.predicts, baseline.outputs, data.validation.labels, prior=prior)
        assert again == baseline.metrics


def test_the_prior_has_no_skill_and_the_volatility_has_much_where_it_rules(market):
    bars, vix = market
    fitted_baselines = by_name(stacked(bars, THRESHOLD), THRESHOLD, bars, vix)
    assert fitted_baselines["prior"].metrics["skill"] == 0.0
    assert fitted_baselines["prior"].metrics["prediction_spread"] == pytest.approx(0, abs=1e-12)
    assert fitted_baselines["volatility_logistic"].metrics["auc"] > 0.7
    assert fitted_baselines["volatility_logistic"].metrics["skill"] > 0.1


def test_shuffled_labels_leave_no_skill(market):
    bars, vix = market
    data = stacked(bars, THRESHOLD)
    rng = np.random.default_rng(1)
    data = replace(
        data,
        train=Part(data.train.rows, rng.permutation(data.train.labels)),
        validation=Part(data.validation.rows, rng.permutation(data.validation.labels)),
    )
    scores = by_name(data, THRESHOLD, bars, vix)["volatility_logistic"].metrics
    # n = 600: an AUC without skill has a standard error of .025
    assert abs(scores["auc"] - 0.5) < 0.08
    assert scores["skill"] < 0.01


def test_no_move_is_zero_and_has_the_mean_square_return_as_its_loss(market):
    bars, vix = market
    data = stacked(bars, REGRESSION)
    zero = by_name(data, REGRESSION, bars, vix)["zero"]
    assert not zero.outputs.any()
    assert zero.metrics["mse"] == pytest.approx(np.mean(np.square(data.validation.labels.astype(float))), rel=1e-12)


# --- from labels alone ------------------------------------------------------------------------------------------------

DAY = np.datetime64("2020-01-01")


@given(st.lists(st.tuples(st.integers(0, 1), st.one_of(st.none(), st.integers(0, 30))), max_size=40))
def test_climatology_is_the_mean_of_what_is_known(cases):
    labels = np.array([label for label, _ in cases], float)
    known_from = np.array([np.datetime64("NaT") if day is None else DAY + day for _, day in cases], "datetime64[D]")
    days = DAY + np.arange(35)
    rates = baselines.climatology(labels, known_from, days)
    for value, day in zip(rates, range(35), strict=True):
        seen = [label for label, when in cases if when is not None and when <= day]
        assert value == pytest.approx(np.mean(seen)) if seen else np.isnan(value)


def test_persistence_counts():
    last, labels = np.array([0.0, 0, 0, 1, 1]), np.array([0.0, 1, 0, 1, 1])
    rates = 1 / (1 + np.exp(-baselines.persistence(last[:, None], labels, np.array([[0.0], [1.0]]))))
    np.testing.assert_allclose(rates, [1.5 / 4, 2.5 / 3])


# --- models against other implementations -----------------------------------------------------------------------------


def test_logistic_equals_newtons_method_on_its_stated_objective():
    rng = np.random.default_rng(2)
    x, new = rng.normal(size=(400, 3)) * [1, 5, 0.1] + [0, 3, -1], rng.normal(size=(20, 3))
    y = (rng.random(400) < 1 / (1 + np.exp(-x[:, 0]))).astype(float)
    result = baselines.volatility_logistic(x, y, new)
    mean, std = x.mean(axis=0), x.std(axis=0)
    design, penalty = np.c_[np.ones(400), (x - mean) / std], np.diag([0, 1.0, 1, 1])
    beta = np.zeros(4)
    for _ in range(30):
        p = 1 / (1 + np.exp(-design @ beta))
        hessian = design.T @ (design * (p * (1 - p))[:, None]) + penalty
        beta -= np.linalg.solve(hessian, design.T @ (p - y) + penalty @ beta)
    expected = np.c_[np.ones(20), (new - mean) / std] @ beta
    # lbfgs stops at a gradient of 1e-8 per sample; the logits then agree to about 1e-6
    np.testing.assert_allclose(result, expected, atol=1e-5)
    np.testing.assert_array_equal(result, baselines.volatility_logistic(x, y, new))


def test_linear_equals_a_polynomial_fit_of_degree_one():
    rng = np.random.default_rng(3)
    x, new = rng.normal(size=(200, 1)) * 0.3 - 4, rng.normal(size=(20, 1))
    y = (0.01 * x[:, 0] + rng.normal(size=200) * 0.02).astype(np.float32)
    expected = np.polyval(np.polyfit(x[:, 0], y.astype(float), 1), new[:, 0])
    np.testing.assert_allclose(baselines.volatility_linear(x, y, new), expected, atol=1e-12)


@pytest.mark.parametrize("fit", [baselines.volatility_logistic, baselines.volatility_linear])
def test_a_constant_input_teaches_nothing(fit):
    y = np.r_[np.zeros(30), np.ones(10)]
    outputs = fit(np.full((40, 1), 0.1), y, np.array([[0.1], [0.2]]))
    expected = np.log(10 / 30) if fit is baselines.volatility_logistic else 0.25
    np.testing.assert_allclose(outputs[0], expected, atol=1e-6)


# --- inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [None, baselines.VOLATILITIES], ids=["VIX", "realised"])
def test_inputs_are_those_of_the_rows_own_asset_and_day(market, names):
    bars, vix = market
    shorter = {symbol: b.between(datetime.date(2010, 9, 1), datetime.date(2011, 9, 1)) for symbol, b in bars.items()}
    data = stacked(shorter, THRESHOLD)
    values = inputs_of(names, data, bars, vix)
    for row in np.random.default_rng(4).integers(0, len(data.dates), 40):
        asset, day = bars[data.assets[data.asset_ids[row]]], data.dates[row]
        if names is None:
            expected = [np.log(vix["VIX"].close[vix["VIX"].dates == day][0])]
        else:
            until = np.diff(np.log(asset.close[asset.dates <= day]))
            expected = [0.5 * np.log(np.mean(until[-n:] ** 2)) for n in (5, 21, 63)]
        np.testing.assert_allclose(values[row], expected, rtol=1e-9)


def test_a_price_that_stands_still_has_a_finite_volatility(market):
    bars, _ = market
    still = priced("AAA", bars["AAA"].dates, np.where(np.arange(N_DAYS) < 300, 0.0, 0.01))
    data = stacked({"AAA": still}, THRESHOLD)
    values = inputs_of(baselines.VOLATILITIES, data, {"AAA": still}, {})
    assert values[200].tolist() == [np.log(1e-4)] * 3
    assert np.isfinite(values[63:]).all()


def test_nothing_after_the_last_validation_day_is_seen(market):
    bars, vix = market
    data = stacked({"AAA": bars["AAA"].take(np.arange(700))}, THRESHOLD)
    last = data.dates[-1]
    scrambled = priced("AAA", bars["AAA"].dates, np.random.default_rng(5).normal(size=N_DAYS) * 0.05)
    columns = {
        name: np.where(bars["AAA"].dates <= last, getattr(bars["AAA"], name), getattr(scrambled, name))
        for name in ("open", "high", "low", "close", "volume")
    }
    other = bars_module.make_bars("AAA", bars["AAA"].dates, **columns)
    assert not np.array_equal(other.close, bars["AAA"].close)
    for context in (vix, {}):
        before, after = (by_name(data, THRESHOLD, {"AAA": b}, context) for b in (bars["AAA"], other))
        for name in before:
            np.testing.assert_array_equal(before[name].outputs, after[name].outputs)


@pytest.mark.parametrize("task", [THRESHOLD, REGRESSION], ids=lambda task: task.kind)
def test_validation_labels_teach_nothing(market, task):
    bars, vix = market
    data = stacked(bars, task)
    flipped = replace(data, validation=Part(data.validation.rows, data.validation.labels[::-1].copy()))
    before, after = (by_name(d, task, bars, vix) for d in (data, flipped))
    for name in before:
        np.testing.assert_array_equal(before[name].outputs, after[name].outputs)
    fitted = "volatility_linear" if task.kind == "regression" else "volatility_logistic"
    assert before[fitted].metrics != after[fitted].metrics


# --- rows without an input --------------------------------------------------------------------------------------------


def test_days_without_vix_are_forecast_from_realised_volatility(market):
    bars, vix = market
    data = stacked(bars, THRESHOLD, first=100)
    whole, none = (by_name(data, THRESHOLD, bars, c)["volatility_logistic"].outputs for c in (vix, {}))
    ended = vix["VIX"].take(np.flatnonzero(vix["VIX"].dates < vix["VIX"].dates[0] + 700))
    outputs = by_name(data, THRESHOLD, bars, {"VIX": ended})["volatility_logistic"].outputs
    without = data.dates[data.validation.rows] > ended.dates[-1] + 5  # an as-of join carries a value for 5 days
    assert 0 < without.sum() < len(without)
    np.testing.assert_array_equal(outputs[without], none[without])
    known = data.dates[data.validation.rows] <= ended.dates[-1]
    np.testing.assert_array_equal(outputs[known], whole[known])
    assert np.mean(whole == none) < 0.01


def test_vix_that_training_never_saw_is_not_used(market):
    bars, vix = market
    data = stacked(bars, THRESHOLD, first=100)
    late = vix["VIX"].take(np.flatnonzero(vix["VIX"].dates > vix["VIX"].dates[0] + 600))
    outputs = by_name(data, THRESHOLD, bars, {"VIX": late})["volatility_logistic"].outputs
    np.testing.assert_array_equal(outputs, by_name(data, THRESHOLD, bars, {})["volatility_logistic"].outputs)


def test_vix_that_saw_one_class_in_training_is_not_used(market):
    bars, vix = market
    data = stacked(bars, THRESHOLD, first=100)
    late = vix["VIX"].take(np.flatnonzero(vix["VIX"].dates > vix["VIX"].dates[0] + 500))
    seen = data.dates[data.train.rows] >= late.dates[0]
    assert 0 < seen.sum() < len(seen)
    data = replace(data, train=Part(data.train.rows, np.where(seen, np.float32(0), data.train.labels)))
    outputs = by_name(data, THRESHOLD, bars, {"VIX": late})["volatility_logistic"].outputs
    np.testing.assert_array_equal(outputs, by_name(data, THRESHOLD, bars, {})["volatility_logistic"].outputs)


@pytest.mark.parametrize("task", [THRESHOLD, REGRESSION], ids=lambda task: task.kind)
def test_rows_in_the_warm_up_are_forecast_by_the_prior(market, task):
    bars, _ = market
    newcomer = {"AAA": bars["AAA"], "BBB": bars["BBB"].take(np.arange(500, len(bars["BBB"])))}
    data = stacked(newcomer, task)
    fitted_baselines = by_name(data, task, newcomer, {})
    fitted = fitted_baselines["volatility_linear" if task.kind == "regression" else "volatility_logistic"].outputs
    prior = fitted_baselines["prior"].outputs
    bar = data.validation.rows - np.flatnonzero(data.asset_ids == 1)[0]
    warming = (data.asset_ids[data.validation.rows] == 1) & (bar < 63)
    assert warming.sum() > 30
    np.testing.assert_array_equal(fitted[warming], prior[warming])
    assert np.mean(fitted[~warming] == prior[~warming]) < 0.01


def test_a_training_part_of_one_class_is_refused(market):
    bars, vix = market
    data = stacked(bars, THRESHOLD)
    data = replace(data, train=Part(data.train.rows, np.zeros_like(data.train.labels)))
    with pytest.raises(ValueError, match="base rate must lie between 0 and 1"):
        baselines.for_dataset(data, THRESHOLD, bars, vix)


def test_bars_that_lack_days_of_the_dataset_are_refused(market):
    bars, vix = market
    data = stacked(bars, THRESHOLD)
    lacking = bars | {"AAA": bars["AAA"].take(np.arange(10, N_DAYS - 1))}
    with pytest.raises(ValueError, match="AAA: the bars lack 11 days of the dataset, the first is 2010-01-04"):
        baselines.for_dataset(data, THRESHOLD, lacking, vix)


def test_importing_it_loads_neither_jax_nor_scikit_learn():
    program = "import sys, fintx.evaluate.baselines; print([m for m in ('jax', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- acceptance: the published walk-forward figures -------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(shared_data, tmp_path_factory):
    """The data folder with SPY and VIX imported, and their bars."""
    root = tmp_path_factory.mktemp("data")
    for symbol in ("SPY", "VIX"):
        sources.import_file(shared_data / f"{symbol}.csv", symbol, root=root, today=datetime.date(2026, 11, 1))
    return root, {"SPY": sources.load("SPY", root=root)}, {"VIX": sources.load("VIX", root=root)}


PUBLISHED = {
    1: {
        "prior": (0.5275, None), "volatility_logistic": (0.4430, 0.773), "volatility_touch": (0.4399, None),
        "garch_touch": (None, 0.771), "bar_logistic": (None, 0.788), "bar_boosting": (0.182, 0.785),
    },
    3: {
        "prior": (0.6939, None), "volatility_logistic": (0.6274, 0.705), "volatility_touch": (0.6276, None),
        "garch_touch": (None, 0.702), "bar_logistic": (None, 0.716), "bar_boosting": (0.106, 0.710),
    },
    5: {
        "prior": (0.6835, None), "volatility_logistic": (0.6360, 0.675), "volatility_touch": (0.6359, None),
        "garch_touch": (None, 0.675), "bar_logistic": (None, 0.680), "bar_boosting": (0.066, 0.669),
    },
}  # fmt: skip
"""Horizon → name → log loss (of boosting its skill over the base rate), AUC; what was not published is none. The first
study's base rate of all days before a year is the `prior` of yearly folds."""


@pytest.mark.parametrize(
    "horizon", [pytest.param(h, marks=[pytest.mark.long] if h != 3 else []) for h in PUBLISHED], ids="h{}".format
)
@pytest.mark.slow
def test_walk_forward_figures_on_spy_and_vix(real, horizon):
    """Refitted yearly on all days before, 2005-01 … 2026-06; pooled rows."""
    root, bars, vix = real
    task = TaskConfig(kind="threshold", price="high", threshold=0.01, horizon=horizon)
    split = SplitConfig(kind="walk_forward", validation_start=datetime.date(2005, 1, 1), n_folds=22, window="expanding")
    data = DataConfig(assets=("SPY",), context=("VIX",), features=("stationary",), end=datetime.date(2026, 6, 30))
    folds = datasets.build(spec_of(data, task, split, 1), root).folds
    scored = [by_name(fold, task, bars, vix) for fold in folds]
    truth = np.concatenate([fold.validation.labels for fold in folds])
    outputs = {name: np.concatenate([fold[name].outputs for fold in scored]) for name in scored[0]}
    losses = {name: metrics.per_sample_loss("probability", z, truth).mean() for name, z in outputs.items()}
    assert len(truth) > 5380
    # .003 is the project's own margin: folds of equal length are not calendar years to the day. The published logistic
    # saw 19 features, this one all 36 of the set.
    for name, (loss, auc) in PUBLISHED[horizon].items():
        value = 1 - losses[name] / losses["prior"] if name == "bar_boosting" else losses[name]
        if loss is not None:
            assert value == pytest.approx(loss, abs=0.003), name
        if auc is not None:
            margin = 0.004 if name == "bar_logistic" else 0.003
            assert metrics.auc(outputs[name], truth) == pytest.approx(auc, abs=margin), name
