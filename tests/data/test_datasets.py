"""Datasets: the test part stays sealed, windows stay inside their asset, each sample has its own window and label."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fintx import tasks
from fintx.config.schema import DataConfig, SplitConfig, TaskConfig
from fintx.data import datasets, features, snapshots, sources
from fintx.data.bars import Bars
from fintx.data.datasets import Dataset, NoWindows, PreparedData
from fintx.data.splits import BadSplit, TooFewSamples
from fintx.errors import FintxError
from tests.helpers.specs import spec_of

T = 15
TASK = TaskConfig(kind="threshold", price="high", threshold=0.01, horizon=4)
TASKS = {
    "threshold": TASK,
    "close": TaskConfig(kind="threshold", price="close", threshold=0.005, horizon=3),
    "direction": TaskConfig(kind="direction", horizon=2),
    "regression": TaskConfig(kind="regression", horizon=5),
}
DATES = SplitConfig(
    kind="dates", validation_start=datetime.date(2012, 1, 2), test_start=datetime.date(2012, 9, 3), embargo=3,
    min_effective=20,
)  # fmt: skip
SPLITS = {
    "dates": DATES,
    "fractions": SplitConfig(kind="fractions", train=0.6, validation=0.2, min_effective=20),
    "expanding": SplitConfig(
        kind="walk_forward", validation_start=datetime.date(2011, 9, 1), test_start=datetime.date(2012, 9, 3),
        n_folds=3, window="expanding",
    ),
    "rolling": SplitConfig(
        kind="walk_forward", validation_start=datetime.date(2011, 9, 1), test_start=datetime.date(2012, 9, 3),
        n_folds=3, window="rolling",
    ),
}  # fmt: skip
FEATURES = ("log_return_1", "rsi_14", "weekly_rsi_14", "vix_log", "VIX:log_return_1", "weekday_sin")
ONE = DataConfig(assets=("AAA",), context=("VIX",), features=FEATURES)
PANEL = DataConfig(assets=("AAA", "BBB", "LATE", "GONE"), context=("VIX",), features=FEATURES)


@pytest.fixture(scope="module")
def all_bars(help) -> dict[str, Bars]:
    """Four assets of ragged calendars, and VIX."""
    return {
        "AAA": help.walk("AAA"),
        "BBB": help.walk("BBB", seed=3),
        "LATE": help.walk("LATE", 500, first="2011-02-01"),
        "GONE": help.walk("GONE", 400),
        "VIX": help.walk("VIX", 900, first="2009-11-02"),
    }


@pytest.fixture(scope="module")
def root(all_bars, help, tmp_path_factory) -> Path:
    return help.keep(tmp_path_factory.mktemp("data"), *all_bars.values())


def build(data: DataConfig, root: Path, *, task=TASK, split=DATES, context_length=T) -> PreparedData:
    return datasets.build(spec_of(data, task, split, context_length), root)


def assert_same(a: Dataset, b: Dataset) -> None:
    for name in ("features", "dates", "asset_ids", "close"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    for part in ("train", "validation"):
        for name in ("rows", "labels"):
            np.testing.assert_array_equal(getattr(getattr(a, part), name), getattr(getattr(b, part), name))
    assert a.scaling.to_json() == b.scaling.to_json()
    assert (a.data_hash, a.label_hash, a.split_hash) == (b.data_hash, b.label_hash, b.split_hash)


# --- the seal ---------------------------------------------------------------------------------------------------------


def of_another_world(bars: Bars, first: np.datetime64) -> Bars:
    """From that day on, prices and volumes that have nothing to do with the true ones; the days stay."""
    later, rng = bars.dates >= first, np.random.default_rng(5)
    factor = np.where(later, np.exp(rng.normal(1, 0.5, len(bars))), 1.0)
    low = np.where(later, 0.01, bars.low)
    prices = {name: getattr(bars, name) * factor for name in ("open", "high", "close")}
    return replace(bars, **prices, low=low, volume=np.where(later, 7.0, bars.volume), adj_close=bars.adj_close * factor)


@pytest.mark.parametrize("kind", SPLITS)
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_search_gives_the_same_with_any_other_prices_in_the_test_part(kind, task, all_bars, root, help, tmp_path):
    true = build(PANEL, root, task=task, split=SPLITS[kind])
    assert true.split.test_first is not None
    other = help.keep(tmp_path, *(of_another_world(bars, true.split.test_first) for bars in all_bars.values()))
    false = build(PANEL, other, task=task, split=SPLITS[kind])
    assert true.data.versions["AAA"] != false.data.versions["AAA"]
    assert len(true.folds) == len(false.folds)
    for a, b in zip(true.folds, false.folds, strict=True):
        assert_same(a, b)
    assert (true.parts, true.drift, true.dropped) == (false.parts, false.drift, false.dropped)
    np.testing.assert_array_equal(true.raw_features, false.raw_features)


@pytest.mark.parametrize("kind", SPLITS)
def test_no_label_or_feature_is_made_of_a_bar_of_the_test_part(kind, root, monkeypatch):
    seen: list[np.datetime64] = []

    def watched(function, bars_of):
        def watching(*args, **kwargs):
            seen.extend(bars.dates[-1] for bars in bars_of(*args) if len(bars))
            return function(*args, **kwargs)

        return watching

    monkeypatch.setattr(tasks, "labels", watched(tasks.labels, lambda task, bars: [bars]))
    monkeypatch.setattr(tasks, "label_ends", watched(tasks.label_ends, lambda task, bars: [bars]))
    monkeypatch.setattr(features, "compute", watched(features.compute, lambda n, bars, c: [bars, *c.values()]))
    prepared = build(PANEL, root, split=SPLITS[kind])
    assert len(seen) >= 3 * len(PANEL.assets)
    assert max(seen) < prepared.split.test_first
    assert all(fold.dates.max() < prepared.split.test_first for fold in prepared.folds)


def test_the_choice_of_features_knows_nothing_of_the_test_part(all_bars, help, tmp_path):
    """`stationary` takes `gap` along where opens are prices of their own: up to the seal, that is."""
    bars = all_bars["AAA"]
    later = np.arange(len(bars)) >= 400
    open_ = np.where(later, np.r_[bars.open[0], bars.close[:-1]], bars.open)
    stale = replace(
        bars, open=open_, high=np.where(later, 9 * bars.high, bars.high), low=np.where(later, 0.1, bars.low)
    )  # fmt: skip
    data, split = DataConfig(assets=("AAA",)), SPLITS["fractions"].model_copy(update={"train": 0.35, "validation": 0.1})
    split = split.model_copy(update={"min_effective": 1, "min_positives": 1})
    assert not features.has_gaps(stale)
    roots = [help.keep(tmp_path / "true", bars), help.keep(tmp_path / "false", stale)]
    true, false = (build(data, root, split=split) for root in roots)
    assert "gap" in true.data.features
    assert_same(true.folds[0], false.folds[0])


def test_the_watch_above_sees_the_opening_of_the_seal(root, monkeypatch):
    seen = []
    true_labels = tasks.labels
    monkeypatch.setattr(tasks, "labels", lambda task, bars: seen.append(bars.dates[-1]) or true_labels(task, bars))
    scaling = build(ONE, root).folds[0].scaling
    datasets.build_test(spec_of(ONE, TASK, DATES, T), root, scaling=scaling)
    assert max(seen) > np.datetime64(DATES.test_start)


def test_the_split_table_shows_nothing_of_the_test_part_but_its_days(root):
    line = build(ONE, root).parts[-1]
    assert line.part == "test" and line.n > 50
    assert (line.positives, line.base_rate, line.se_log_loss, line.se_auc) == (None, None, None, None)


def test_the_opened_test_part_holds_every_row_that_the_table_promised(root, all_bars):
    prepared = build(ONE, root)
    dataset, part = datasets.build_test(spec_of(ONE, TASK, DATES, T), root, scaling=prepared.folds[0].scaling)
    assert len(part.rows) == prepared.parts[-1].n
    assert (str(dataset.dates[part.rows[0]]), str(dataset.dates[part.rows[-1]])) == (
        prepared.parts[-1].first, prepared.parts[-1].last,
    )  # fmt: skip
    np.testing.assert_array_equal(part.labels, tasks.labels(TASK.rule, all_bars["AAA"])[part.rows])
    seen = prepared.folds[0]
    np.testing.assert_array_equal(dataset.features[: len(seen.features)], seen.features)  # one scale, one feature


def test_a_walk_forward_without_a_test_part_has_none_to_open(root):
    split = SPLITS["expanding"].model_copy(update={"test_start": None})
    prepared = build(ONE, root, split=split)
    assert prepared.parts[-1].part == "validation 3"
    with pytest.raises(BadSplit, match="no test part"):
        datasets.build_test(spec_of(ONE, TASK, split, T), root, scaling=prepared.folds[0].scaling)


# --- parts ------------------------------------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from([*SPLITS]), horizon=st.integers(1, 12), embargo=st.integers(0, 10), panel=st.booleans()
)  # fmt: skip
def test_no_label_of_a_part_ends_inside_the_next(kind, horizon, embargo, panel, root, all_bars):
    split = SPLITS[kind].model_copy(update={"embargo": embargo, "min_positives": 1, "min_effective": 1})
    task = TaskConfig(kind="direction", horizon=horizon)
    prepared = build(PANEL if panel else ONE, root, task=task, split=split)
    days = np.unique(np.concatenate([all_bars[s].dates for s in prepared.data.assets]))
    for fold, bounds in zip(prepared.folds, prepared.split.folds, strict=True):
        ends = {s: tasks.label_ends(task.rule, all_bars[s]) for s in fold.assets}
        for part, next_first in ((fold.train, bounds.validation_first), (fold.validation, prepared.split.test_first)):
            last = days[np.searchsorted(days, next_first) - embargo]
            for row in part.rows:
                symbol = fold.assets[fold.asset_ids[row]]
                bar = np.searchsorted(all_bars[symbol].dates, fold.dates[row])
                assert ends[symbol][bar] < last
        assert not set(fold.train.rows.tolist()) & set(fold.validation.rows.tolist())
        assert fold.dates[fold.train.rows].max() < fold.dates[fold.validation.rows].min()


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_sample_is_the_window_and_the_label_of_its_day(task, root, all_bars):
    """Against a loop over days: all features of T bars finite, label complete, in the part's days."""
    prepared = build(PANEL, root, task=task)
    fold, names = prepared.folds[0], prepared.data.features
    test_first = np.datetime64(DATES.test_start)
    for i, symbol in enumerate(fold.assets):
        seen = all_bars[symbol].take(np.flatnonzero(all_bars[symbol].dates < test_first))
        vix = all_bars["VIX"].take(np.flatnonzero(all_bars["VIX"].dates < test_first))
        raw = features.compute(names, seen, {"VIX": vix})
        label = tasks.labels(task.rule, seen)
        first = int(np.flatnonzero(fold.asset_ids == i)[0])
        offered = {
            bar + first
            for bar in range(T - 1, len(seen))
            if np.isfinite(raw[bar - T + 1 : bar + 1]).all() and not np.isnan(label[bar])
        }
        own = {
            int(row): y
            for part in (fold.train, fold.validation)
            for row, y in zip(part.rows, part.labels, strict=True)
            if fold.asset_ids[row] == i
        }
        purged = len(offered) - len(own)
        assert set(own) <= offered
        assert 0 <= purged <= 2 * (task.horizon + DATES.embargo) - task.horizon
        for row, y in own.items():
            assert y == np.float32(label[row - first])
            assert fold.dates[row] == seen.dates[row - first] and fold.close[row] == seen.close[row - first]
            window = fold.features[row - T + 1 : row + 1]
            unscaled = window * fold.scaling.std[symbol] + fold.scaling.mean[symbol]
            np.testing.assert_allclose(unscaled, raw[row - first - T + 1 : row - first + 1], rtol=1e-4, atol=1e-5)


def test_labels_come_from_raw_prices_whatever_the_scaling(root):
    raw = build(PANEL.model_copy(update={"scaling": "none"}), root)
    scaled = build(PANEL, root)
    assert raw.folds[0].label_hash == scaled.folds[0].label_hash
    np.testing.assert_array_equal(raw.folds[0].train.labels, scaled.folds[0].train.labels)
    assert raw.folds[0].data_hash == scaled.folds[0].data_hash


def test_hashes_differ_between_questions_and_between_splits(root):
    base = build(ONE, root).folds[0]
    longer = build(ONE, root, task=TASK.model_copy(update={"horizon": 5})).folds[0]
    assert longer.label_hash != base.label_hash and longer.data_hash == base.data_hash
    split = DATES.model_copy(update={"embargo": 8})
    embargoed = build(ONE, root, split=split).folds[0]
    assert embargoed.split_hash != base.split_hash and embargoed.data_hash == base.data_hash
    fewer = build(ONE.model_copy(update={"features": FEATURES[:3]}), root).folds[0]
    assert fewer.data_hash != base.data_hash and fewer.label_hash == base.label_hash


def test_equal_questions_under_other_windows_have_equal_label_hashes(root):
    short, long = build(ONE, root, context_length=5).folds[0], build(ONE, root, context_length=40).folds[0]
    assert short.label_hash == long.label_hash
    assert short.split_hash != long.split_hash  # the long window loses the first rows


def test_the_split_table_counts_what_is_in_the_parts(root):
    prepared = build(PANEL, root, split=SPLITS["expanding"])
    assert [line.part for line in prepared.parts] == [
        f"{part} {k}" for k in (1, 2, 3) for part in ("train", "validation")
    ] + ["test"]
    for k, fold in enumerate(prepared.folds):
        line = prepared.parts[2 * k + 1]
        assert (line.n, line.positives) == (len(fold.validation.rows), int(fold.validation.labels.sum()))
        assert line.base_rate == pytest.approx(fold.validation.labels.mean())
        assert 0 < line.n_effective < line.n
        assert line.first == str(fold.dates[fold.validation.rows].min())


def test_dropped_and_used_rows_are_all_rows(root):
    prepared = build(ONE, root, split=SPLITS["fractions"])
    fold = prepared.folds[0]
    purged = 2 * TASK.horizon - TASK.horizon  # before validation; those before the test part have no label
    n = len(fold.train.rows) + len(fold.validation.rows) + sum(prepared.dropped.values()) + purged
    assert n == len(fold.dates)


# --- panels -----------------------------------------------------------------------------------------------------------


def assert_windows_inside_assets(fold: Dataset) -> None:
    for part in (fold.train, fold.validation):
        assert (fold.asset_ids[part.rows - T + 1] == fold.asset_ids[part.rows]).all()
        assert part.rows.min() >= T - 1


def assert_order_of_assets_is_nothing(data: DataConfig, root: Path, *, split=DATES) -> None:
    turned = data.model_copy(update={"assets": data.assets[::-1]})
    a, b = build(data, root, split=split).folds[-1], build(turned, root, split=split).folds[-1]
    for symbol in data.assets:
        i, j = a.assets.index(symbol), b.assets.index(symbol)
        first, second = np.flatnonzero(a.asset_ids == i), np.flatnonzero(b.asset_ids == j)
        np.testing.assert_array_equal(a.features[first], b.features[second], err_msg=symbol)
        np.testing.assert_array_equal(a.dates[first], b.dates[second])
        for part in ("train", "validation"):
            p, q = getattr(a, part), getattr(b, part)
            own_a, own_b = a.asset_ids[p.rows] == i, b.asset_ids[q.rows] == j
            np.testing.assert_array_equal(p.rows[own_a] - first[0], q.rows[own_b] - second[0])
            np.testing.assert_array_equal(p.labels[own_a], q.labels[own_b])


def test_no_window_crosses_from_one_asset_into_another(root):
    fold = build(PANEL, root).folds[0]
    assert_windows_inside_assets(fold)
    assert set(fold.asset_ids[fold.train.rows]) == {0, 1, 2, 3}
    # GONE has no bar in the validation days
    assert set(fold.asset_ids[fold.validation.rows]) == {0, 1, 2}


def test_no_window_crosses_where_features_need_no_warm_up(root):
    """Where every row is finite from an asset's first bar on, the asset's border alone stops a window."""
    fold = build(PANEL.model_copy(update={"features": ("range", "weekday_sin")}), root).folds[0]
    assert_windows_inside_assets(fold)
    firsts = [int(np.flatnonzero(fold.asset_ids == i)[0]) for i in range(4)]
    assert {first + T - 1 for first in firsts} <= set(fold.train.rows.tolist())


def test_the_order_of_assets_changes_nothing_for_any_of_them(root):
    assert_order_of_assets_is_nothing(PANEL, root)


def test_an_asset_in_a_panel_is_what_it_is_alone(root):
    alone = build(ONE, root).folds[0]
    panel = build(PANEL, root).folds[0]
    np.testing.assert_array_equal(panel.features[: len(alone.features)], alone.features)
    own = panel.asset_ids[panel.train.rows] == 0
    np.testing.assert_array_equal(panel.train.rows[own], alone.train.rows)
    np.testing.assert_array_equal(panel.train.labels[own], alone.train.labels)


def test_a_panel_of_four_real_stocks(shared_data, help, tmp_path):
    symbols = ("AAPL", "COST", "CVX", "DE")
    for symbol in (*symbols, "VIX"):
        sources.import_file(shared_data / f"{symbol}.csv", symbol, root=tmp_path, today=help.today)
    data = DataConfig(
        assets=symbols, context=("VIX",), features=("stationary",), start=datetime.date(2012, 1, 1)
    )  # fmt: skip
    split = SplitConfig(
        kind="dates", validation_start=datetime.date(2018, 1, 2), test_start=datetime.date(2020, 1, 2)
    )  # fmt: skip
    fold = build(data, tmp_path, split=split).folds[0]
    assert_windows_inside_assets(fold)
    assert np.bincount(fold.asset_ids[fold.validation.rows]).tolist() == [503 - TASK.horizon] * 4
    assert_order_of_assets_is_nothing(data, tmp_path, split=split)


# --- stores, foreign data ---------------------------------------------------------------------------------------------


def test_processed_features_are_kept_once_with_their_parents(root, all_bars):
    prepared = build(ONE, root)
    entry = datasets.store_processed(prepared, root)
    assert datasets.store_processed(prepared, root) == entry
    entries = [e for e in snapshots.all_snapshots(root, "processed") if e.version == prepared.folds[0].data_hash]
    assert entries == [entry]
    assert entry.columns == ("date", "asset", *FEATURES)
    versions = prepared.data.versions
    assert entry.parents == (f"AAA.OHLCV.daily@{versions['AAA']}", f"VIX.OHLCV.daily@{versions['VIX']}")
    assert snapshots.verify(root) == []


def test_the_config_handed_back_pins_versions_and_names_features(root, help, all_bars, tmp_path):
    data = DataConfig(assets=("AAA",), features=("stationary",))
    help.keep(tmp_path, all_bars["AAA"])
    first = build(data, tmp_path)
    assert first.data.features == (*features.SETS["stationary"], "gap")
    help.keep(tmp_path, replace(all_bars["AAA"], volume=all_bars["AAA"].volume + 1))  # a newer version
    again = build(first.data, tmp_path)
    assert_same(first.folds[0], again.folds[0])
    assert build(data, tmp_path).data.versions != first.data.versions


def test_foreign_bars_take_the_studys_features_and_scaling(root, all_bars, help):
    prepared = build(ONE, root)
    bars = help.walk("NEW", 300, seed=9)
    dataset, part = datasets.build_external(
        bars, {"VIX": all_bars["VIX"]}, spec_of(prepared.data, TASK, DATES, T), scaling=prepared.folds[0].scaling
    )
    raw = features.compute(prepared.data.features, bars, {"VIX": all_bars["VIX"]})
    warm = int(np.flatnonzero(np.isfinite(raw).all(axis=1))[0])
    np.testing.assert_array_equal(part.rows, np.arange(warm + T - 1, 300 - TASK.horizon))
    np.testing.assert_array_equal(part.labels, tasks.labels(TASK.rule, bars)[part.rows])
    scaling = prepared.folds[0].scaling
    np.testing.assert_allclose(
        dataset.features[warm:], (raw[warm:] - scaling.pooled_mean) / scaling.pooled_std, rtol=1e-5, atol=1e-6
    )


# --- refusals ---------------------------------------------------------------------------------------------------------


def split_at(validation: str, test: str, **more) -> SplitConfig:
    dates = {
        "validation_start": datetime.date.fromisoformat(validation),
        "test_start": datetime.date.fromisoformat(test),
    }
    return SplitConfig(kind="dates", **dates, **more)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"task": TASK.model_copy(update={"horizon": 900})}, BadSplit, "task.horizon = 900 needs more than 901"),
        ({"split": split_at("2012-08-20", "2012-09-03")}, TooFewSamples, "validation has"),
        ({"split": split_at("2012-01-02", "2031-01-01")}, BadSplit, "split.test_start = 2031-01-01 lies outside"),
        (
            {"split": SPLITS["rolling"].model_copy(update={"n_folds": 500})},
            BadSplit,
            "split.n_folds = 500: a fold has no trading day",
        ),
        ({"data": ONE.model_copy(update={"assets": ("AAA", "AAA")})}, FintxError, "data.assets: AAA named twice"),
        (
            {"data": ONE.model_copy(update={"start": datetime.date(2040, 1, 1)})},
            FintxError,
            "data.start/end: no bar of AAA lies in 2040-01-01 … … .it has 2010-",
        ),
        (
            {"data": ONE.model_copy(update={"start": datetime.date(2012, 8, 1), "end": datetime.date(2012, 8, 5)})},
            BadSplit,
            "task.horizon = 4 needs more than 5 trading days, the data have 3",
        ),
        (
            {"data": ONE.model_copy(update={"assets": ("NOPE",)})},
            sources.DataNotFound,
            "no bars of NOPE in .*there: AAA, BBB",
        ),
        ({"context_length": 5000}, NoWindows, "no row has a window of 5000 bars .model.context_length"),
        ({"data": ONE.model_copy(update={"features": ("nope",)})}, features.UnknownFeature, '"nope" is no feature'),
    ],
    ids=["horizon", "small", "outside", "n_folds", "twice", "start", "short", "absent", "window", "feature"],
)
def test_what_does_not_fit_is_refused_with_one_line(changes, kind, words, root):
    arguments = {"data": ONE} | changes
    with pytest.raises(kind, match=words) as raised:
        build(arguments.pop("data"), root, **arguments)
    assert "\n" not in str(raised.value)


def test_a_purge_that_leaves_no_label_is_refused(root):
    split = split_at("2010-01-07", "2010-01-14", min_positives=1, min_effective=1)
    with pytest.raises(FintxError):
        build(ONE, root, split=split, task=TASK.model_copy(update={"horizon": 20}))


def test_context_that_begins_too_late_is_named(all_bars, help, tmp_path):
    late = all_bars["VIX"].take(np.flatnonzero(all_bars["VIX"].dates >= np.datetime64("2012-10-01")))
    root = help.keep(tmp_path, all_bars["AAA"], late)
    with pytest.raises(NoWindows, match="never known here: vix_log, VIX:log_return_1"):
        build(ONE, root)
