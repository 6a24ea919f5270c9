"""Panels of ragged histories: each asset on its own calendar, parts by date across all; the test part stays unknown.

The rows of each part are counted a second time, bar by bar, and compared as sets.
"""

from __future__ import annotations

import ast
import datetime
import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fintx import tasks
from fintx.config.schema import DataConfig, SplitConfig, TaskConfig
from fintx.data import bars as bars_module
from fintx.data import datasets, features, sources, splits
from fintx.data.bars import Bars
from fintx.data.datasets import Dataset, NoWindows, Part, PreparedData
from fintx.data.splits import TooFewSamples
from fintx.errors import FintxError
from tests.helpers.specs import spec_of

DAY = datetime.date
SMALL = {"min_positives": 1, "min_effective": 1}
SPLITS = {
    "fractions": SplitConfig(kind="fractions", train=0.6, validation=0.2, **SMALL),
    "dates": SplitConfig(
        kind="dates", validation_start=DAY(2001, 3, 1), test_start=DAY(2001, 10, 6), embargo=4, **SMALL
    ),
    "rolling folds": SplitConfig(
        kind="walk_forward", validation_start=DAY(2000, 12, 1), test_start=DAY(2001, 11, 1), n_folds=3,
        window="rolling", embargo=2, **SMALL,
    ),
    "expanding folds to the end": SplitConfig(
        kind="walk_forward", validation_start=DAY(2000, 12, 1), n_folds=4, window="expanding", **SMALL
    ),
}  # fmt: skip
every_split = pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())


def threshold(horizon: int, *, level: float = 0.01) -> TaskConfig:
    return TaskConfig(kind="threshold", price="high", threshold=level, horizon=horizon)


def make_bars(symbol: str, n: int, *, seed: int, first: str = "2000-01-03", missing: float = 0.0) -> Bars:
    """A random walk on weekdays; a share `missing` of them, drawn by the seed, is not traded."""
    rng = np.random.default_rng(seed)
    days = np.busday_offset(first, np.arange(n), roll="forward")
    days = days[rng.random(n) >= missing]
    close = 50 * np.exp(np.cumsum(rng.normal(scale=0.012, size=len(days))))
    open_ = close * np.exp(rng.normal(scale=0.004, size=len(days)))
    high = np.maximum(open_, close) * np.exp(np.abs(rng.normal(scale=0.004, size=len(days))))
    low = np.minimum(open_, close) * np.exp(-np.abs(rng.normal(scale=0.004, size=len(days))))
    volume = rng.integers(1_000, 9_000, len(days)).astype(float)
    return bars_module.make_bars(symbol, days, open=open_, high=high, low=low, close=close, volume=volume)


PANEL = {
    "AAA": make_bars("AAA", 500, seed=1),
    "BBB": make_bars("BBB", 500, seed=2, missing=0.25),
    "CCC": make_bars("CCC", 250, seed=3, first="2000-12-18", missing=0.1),
}
"""Two years of three assets: one whole, one that misses a quarter of the days, one that is listed late."""


def serve(bars: Mapping[str, Bars]):
    """Within it fintx loads these bars, by symbol; nothing is read from disk."""
    return mock.patch.object(sources, "load", lambda symbol, *, root, version=None: bars[symbol])


def prepare(
    bars: Mapping[str, Bars], task: TaskConfig, split: SplitConfig, *, features: tuple[str, ...] = ("range",),
    context_length: int = 8, scaling: str = "standardize",
) -> PreparedData:  # fmt: skip
    """`datasets.build` over bars by symbol; VIX is context, all others are assets."""
    data = DataConfig(
        assets=tuple(symbol for symbol in bars if symbol != "VIX"),
        context=("VIX",) if "VIX" in bars else (),
        features=features,
        scaling=scaling,
    )
    with serve(bars):
        return datasets.build(spec_of(data, task, split, context_length), Path("nowhere"))


def keyed(dataset: Dataset, part: Part) -> dict[tuple[str, np.datetime64], float]:
    """(asset, day) → label."""
    names = np.asarray(dataset.assets)[dataset.asset_ids[part.rows]]
    return dict(zip(zip(names.tolist(), dataset.dates[part.rows], strict=True), part.labels.tolist(), strict=True))


# --- who is in which part ---------------------------------------------------------------------------------------------


def counted_by_hand(task: TaskConfig, split: SplitConfig, fold: splits.Fold, test_first, *, warm_up: int) -> list[set]:
    """(asset, day) of the train and of the validation part."""
    union, embargo = sorted({day for b in PANEL.values() for day in b.dates}), split.embargo
    train_until = union[union.index(fold.validation_first) - embargo]
    # A rolling fold trains on as many days of the union as lie before the first fold.
    rolled = 0
    if split.window == "rolling":
        rolled = sum(np.datetime64(split.validation_start) <= day < fold.validation_first for day in union)
    sealed_until = np.datetime64("2100-01-01") if test_first is None else union[union.index(test_first) - embargo]
    train, validation = set(), set()
    for symbol, b in PANEL.items():
        days = [day for day in b.dates if test_first is None or day < test_first]
        for t, day in enumerate(days[: -task.horizon]):
            reached = days[t + task.horizon]
            if t >= warm_up and union[rolled] <= day and reached < train_until:
                train.add((symbol, day))
            if t >= warm_up and fold.validation_first <= day < fold.validation_before and reached < sealed_until:
                validation.add((symbol, day))
    return [train, validation]


@every_split
@pytest.mark.parametrize("horizon", [1, 3, 10])
def test_parts_hold_exactly_the_rows_of_an_independent_count(split, horizon):
    task = threshold(horizon)
    prepared = prepare(PANEL, task, split, features=("log_return_5",), context_length=8)
    for fold, dataset in zip(prepared.split.folds, prepared.folds, strict=True):
        # The return of 5 days is known from bar 5 on, so the first whole window of 8 ends at bar 12.
        expected = counted_by_hand(task, split, fold, prepared.split.test_first, warm_up=12)
        assert [set(keyed(dataset, part)) for part in (dataset.train, dataset.validation)] == expected
        assert min(map(len, expected)) > 20, "the case shows nothing"


@given(
    seed=st.integers(0, 10_000),
    missing=st.lists(st.floats(0, 0.6), min_size=1, max_size=3),
    horizon=st.integers(1, 15),
    embargo=st.integers(0, 12),
    context_length=st.integers(1, 20),
)
@settings(derandomize=True)
def test_any_panel_is_split_without_overlap_in_time(seed, missing, horizon, embargo, context_length):
    bars = {
        name: make_bars(name, 300, seed=seed + i, missing=share)
        for i, (name, share) in enumerate(zip("ABC", missing, strict=False))
    }
    split = SplitConfig(kind="fractions", train=0.6, validation=0.25, embargo=embargo, **SMALL)
    prepared = prepare(bars, TaskConfig(kind="regression", horizon=horizon), split, context_length=context_length)
    (dataset,), union = prepared.folds, np.unique(np.concatenate([b.dates for b in bars.values()]))
    bounds = (prepared.split.folds[0].validation_first, prepared.split.test_first)
    for part, bound in zip((dataset.train, dataset.validation), bounds, strict=True):
        for symbol, day in keyed(dataset, part):
            own = bars[symbol].dates
            reached = own[np.searchsorted(own, day) + horizon]
            assert np.searchsorted(union, reached) < np.searchsorted(union, bound) - embargo
        for row in part.rows:
            window = slice(row - context_length + 1, row + 1)
            assert row - context_length + 1 >= 0
            assert len(set(dataset.asset_ids[window])) == 1
            assert np.isfinite(prepared.raw_features[window]).all()


def test_another_asset_changes_nothing_within_an_asset():
    # AAA trades on every day, so the others bring no day to the calendar.
    alone = prepare({"AAA": PANEL["AAA"]}, threshold(3), SPLITS["dates"]).folds[0]
    among = prepare(PANEL, threshold(3), SPLITS["dates"]).folds[0]
    np.testing.assert_array_equal(among.features[among.asset_ids == 0], alone.features)
    for name in ("train", "validation"):
        rows = getattr(among, name).rows
        np.testing.assert_array_equal(rows[among.asset_ids[rows] == 0], getattr(alone, name).rows)


@pytest.mark.parametrize("context_length", [1, 5, 40])
def test_the_window_length_does_not_choose_the_validation_rows(context_length):
    bars = {symbol: PANEL[symbol] for symbol in ("AAA", "BBB")}
    short = prepare(bars, threshold(3), SPLITS["dates"], context_length=2).folds[0]
    other = prepare(bars, threshold(3), SPLITS["dates"], context_length=context_length).folds[0]
    np.testing.assert_array_equal(other.validation.rows, short.validation.rows)
    assert other.train.rows[0] == context_length - 1


def test_a_missing_value_costs_only_the_windows_that_would_hold_it():
    """VIX pauses for two weeks: days more than 5 days behind its last value have none."""
    vix = make_bars("VIX", 500, seed=9)
    pause = (vix.dates >= np.datetime64("2000-09-04")) & (vix.dates < np.datetime64("2000-09-18"))
    bars = {"AAA": PANEL["AAA"], "VIX": vix.take(np.flatnonzero(~pause))}
    prepared = prepare(bars, threshold(1), SPLITS["fractions"], features=("range", "vix_log"), context_length=4)
    dataset, dates = prepared.folds[0], PANEL["AAA"].dates
    # Friday the 1st is 5 days old on the 6th; the gap is the 7th up to Friday the 15th, and the windows that hold it.
    gap = np.flatnonzero((dates >= np.datetime64("2000-09-07")) & (dates <= np.datetime64("2000-09-15")))
    train = np.arange(3, dataset.train.rows[-1] + 1)
    np.testing.assert_array_equal(np.setdiff1d(train, dataset.train.rows), np.arange(gap[0], gap[-1] + 4))
    assert not dataset.features[gap].any()
    assert prepared.dropped["no whole window of features yet"] == 3 + len(gap) + 3


def test_effective_n_of_a_panel_is_the_sum_over_its_assets():
    prepared = prepare(PANEL, threshold(5), SPLITS["fractions"])
    dataset, total = prepared.folds[0], 0.0
    for i, b in enumerate(PANEL.values()):
        days = dataset.dates[dataset.train.rows[dataset.asset_ids[dataset.train.rows] == i]]
        total += splits.effective_n(np.searchsorted(b.dates, days), horizon=5)
    assert prepared.parts[0].part == "train"
    assert prepared.parts[0].n_effective == pytest.approx(total)


# --- nothing of the future --------------------------------------------------------------------------------------------


def other_from(bars: Bars, day: np.datetime64) -> Bars:
    """From that day on, prices of another world; the days stay."""
    later = bars.dates >= day
    factor = np.where(later, np.random.default_rng(0).uniform(0.2, 5, len(bars)), 1.0)
    return replace(
        bars,
        **{name: getattr(bars, name) * factor for name in ("open", "high", "low", "close")},
        volume=bars.volume * np.where(later, 7, 1),
    )


@every_split
def test_prices_of_validation_days_change_nothing_in_training(split):
    before = prepare(PANEL, threshold(3), split)
    for index, fold in enumerate(before.split.folds):
        changed = {symbol: other_from(b, fold.validation_first) for symbol, b in PANEL.items()}
        a, b = before.folds[index], prepare(changed, threshold(3), split).folds[index]
        assert keyed(a, a.train) == keyed(b, b.train)
        np.testing.assert_array_equal(a.features[a.train.rows], b.features[b.train.rows])
        assert a.scaling.to_json() == b.scaling.to_json()
        assert keyed(a, a.validation) != keyed(b, b.validation), "the case shows nothing"


def without_gaps_from(bars: Bars, day: str) -> Bars:
    """From that day on each open is the close before."""
    later = bars.dates >= np.datetime64(day)
    before = np.r_[bars.open[0], bars.close[:-1]]
    open_ = np.where(later, before, bars.open)
    return replace(bars, open=open_, high=np.maximum(bars.high, open_), low=np.minimum(bars.low, open_))


def test_the_test_part_does_not_choose_features():
    """`stationary` holds `gap` where opens are prices of their own, as the days before the test part show."""
    whole = make_bars("AAA", 900, seed=1)
    split = SPLITS["dates"].model_copy(update={"validation_start": DAY(2001, 9, 3), "test_start": DAY(2002, 3, 1)})
    test_only, always = (without_gaps_from(whole, day) for day in ("2002-03-01", "2000-01-03"))
    assert not features.has_gaps(test_only), "the case shows nothing: the whole history has gaps too"
    chosen = [
        prepare({"AAA": bars}, threshold(3), split, features=("stationary",)) for bars in (whole, test_only, always)
    ]
    assert [("gap" in prepared.data.features) for prepared in chosen] == [True, True, False]


def modules_that(refers: str) -> set[str]:
    """Modules of fintx whose code names `refers`, as a name, an attribute, or an import."""
    spec = importlib.util.find_spec("fintx")
    package = Path(spec.submodule_search_locations[0])
    modules = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = {getattr(node, "id", None), getattr(node, "attr", None)}
            if isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}.{alias.name}" for alias in node.names} | {a.name for a in node.names}
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            if refers in names:
                modules.add(path.relative_to(package).as_posix())
    return modules


def test_eval_alone_opens_the_test_part_and_few_ask_for_labels():
    assert modules_that("build_test") == {"analysis/test_set.py"}
    assert modules_that("cut_labels") == modules_that("cut_mirror_labels") == {"tasks.py"}
    # Baselines ask for labels that are known by then, of bars that end with the dataset; a page for the mirror image.
    assert modules_that("fintx.tasks") == {"data/datasets.py", "evaluate/baselines.py", "analysis/study_analysis.py"}


# --- hashes -----------------------------------------------------------------------------------------------------------


def hashes(prepared: PreparedData) -> dict[str, str]:
    return {name: getattr(prepared.folds[-1], f"{name}_hash") for name in ("data", "label", "split")}


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({}, set()),
        ({"task": threshold(4)}, {"label", "split"}),
        ({"task": threshold(3, level=0.011)}, {"label"}),
        ({"task": TaskConfig(kind="direction", horizon=3)}, {"label"}),
        ({"features": ("range", "close_in_range")}, {"data"}),
        ({"features": ("close_in_range", "range")}, {"data"}),
        ({"split": SPLITS["dates"].model_copy(update={"validation_start": DAY(2001, 3, 2)})}, {"split"}),
        ({"split": SPLITS["dates"].model_copy(update={"embargo": 5})}, {"split"}),
        ({"split": SPLITS["dates"].model_copy(update={"test_start": DAY(2001, 10, 9)})}, {"data", "label", "split"}),
        ({"scaling": "none"}, set()),
        ({"context_length": 30}, {"split"}),
    ],
    ids=["nothing", "horizon", "threshold", "kind", "features", "their order", "validation start", "embargo",
         "test start", "scaling", "window"],
)  # fmt: skip
def test_a_hash_changes_with_what_it_stands_for_and_with_nothing_else(changed, names):
    base = {"task": threshold(3), "split": SPLITS["dates"]}
    before, after = hashes(prepare(PANEL, **base)), hashes(prepare(PANEL, **(base | changed)))
    assert {name for name in before if before[name] != after[name]} == names


# --- histories too short ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_days", [0, 1, 2, 4, 30])
def test_an_asset_listed_around_the_test_start_is_no_obstacle(n_days):
    """Fewer days before it than the horizon, than a feature, or than a window needs: the others keep their samples."""
    late = make_bars("NEW", 100, seed=5, first=np.busday_offset("2001-10-08", -n_days))
    pair, task = {"AAA": PANEL["AAA"], "NEW": late}, threshold(5)
    alone = prepare({"AAA": PANEL["AAA"]}, task, SPLITS["dates"], features=("stationary",)).folds[0]
    among = prepare(pair, task, SPLITS["dates"], features=("stationary",)).folds[0]
    assert keyed(among, among.train) == keyed(alone, alone.train)
    assert keyed(among, among.validation) == keyed(alone, alone.validation)
    assert among.assets == ("AAA", "NEW") and (among.asset_ids == 1).sum() == n_days


@pytest.mark.parametrize(
    ("keys", "task", "split", "context_length", "error", "words"),
    [
        (
            {"end": DAY(2000, 6, 1), "context": ("VIX",)}, threshold(3), SPLITS["fractions"], 8, FintxError,
            r"no bar of VIX lies in … … 2000-06-01 \(it has 2001-",
        ),
        ({}, threshold(700), SPLITS["fractions"], 8, splits.BadSplit, r"task\.horizon = 700 needs more than 701"),
        ({}, threshold(450), SPLITS["fractions"], 8, NoWindows, r"no bar has 450 days \(task\.horizon\) of future"),
        ({}, threshold(200), SPLITS["fractions"], 8, TooFewSamples, "validation has 0 positives among 0 samples"),
        ({}, threshold(3), SPLITS["fractions"], 450, NoWindows, r"window of 450 bars \(model\.context_length\)"),
        (
            {"features": ("vix_log",), "context": ("VIX",)}, threshold(3),
            SPLITS["dates"].model_copy(update={"validation_start": DAY(2000, 6, 1), "test_start": DAY(2000, 9, 1)}),
            8, NoWindows, "never known here: vix_log",
        ),
    ],
    ids=["no context until then", "horizon beyond the data", "horizon beyond the parts", "horizon beyond a part",
         "window beyond the data", "context begins too late"],
)  # fmt: skip
def test_data_that_cannot_carry_the_question_are_refused(keys, task, split, context_length, error, words):
    bars = PANEL | {"VIX": make_bars("VIX", 200, seed=9, first="2001-01-02")}
    data = DataConfig(**{"assets": ("AAA",), "features": ("range",), **keys})
    with serve(bars), pytest.raises(error, match=words) as caught:
        datasets.build(spec_of(data, task, split, context_length), Path("nowhere"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("n", [0, 1, 3, 9, 10])
def test_foreign_bars_too_few_for_a_window_and_its_future_are_refused(n):
    prepared = prepare(PANEL, threshold(3), SPLITS["dates"], features=("stationary",))
    short, scaling = make_bars("ZZZ", 20, seed=8).take(np.arange(n)), prepared.folds[0].scaling
    with pytest.raises(NoWindows, match=f"ZZZ: no row has a window of 8 bars .* among {n} bars; give a longer"):
        datasets.build_external(short, {}, spec_of(prepared.data, threshold(3), SPLITS["dates"], 8), scaling=scaling)


@pytest.mark.parametrize("n", range(9))
def test_a_history_no_longer_than_the_horizon_has_no_label_and_no_end(n):
    bars, task = make_bars("X", 20, seed=4).take(np.arange(n)), threshold(8)
    assert len(tasks.labels(task.rule, bars)) == n and np.isnan(tasks.labels(task.rule, bars)).all()
    assert len(tasks.label_ends(task.rule, bars)) == n and np.isnat(tasks.label_ends(task.rule, bars)).all()


@pytest.mark.parametrize("name", features.FEATURES)
def test_every_feature_takes_a_history_of_any_length(name):
    long, vix = make_bars("X", 70, seed=4), make_bars("VIX", 70, seed=9)
    for n in (0, 1, 2, 4, 6, 14, 20, 60):
        for context in (vix, vix.take(np.arange(0))):
            values = features.compute((name,), long.take(np.arange(n)), {"VIX": context})
            assert values.shape == (n, 1)
