"""Splits tile the calendar in time order, and what a part can show is counted as the references count it."""

from __future__ import annotations

import datetime
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fintx.config import SplitConfig, TaskConfig
from fintx.data import splits
from fintx.data.splits import BadSplit, PartRow, TooFewSamples

WEEKDAYS = np.busday_offset("2000-01-03", np.arange(1000))
THRESHOLD = TaskConfig(kind="threshold", price="high", threshold=0.01, horizon=5)
REGRESSION = TaskConfig(kind="regression", horizon=5)


def day(text: str) -> datetime.date:
    return datetime.date.fromisoformat(text)


def fractions(train: float, validation: float, **keys) -> SplitConfig:
    return SplitConfig(kind="fractions", train=train, validation=validation, **keys)


def dates(validation_start: str, test_start: str, **keys) -> SplitConfig:
    return SplitConfig(kind="dates", validation_start=day(validation_start), test_start=day(test_start), **keys)


def walk_forward(validation_start: str, n_folds: int, *, test_start: str | None = None, **keys) -> SplitConfig:
    return SplitConfig(
        kind="walk_forward",
        validation_start=day(validation_start),
        test_start=None if test_start is None else day(test_start),
        n_folds=n_folds,
        **{"window": "expanding", **keys},
    )


# --- where the parts lie ----------------------------------------------------------------------------------------------


def test_fractions_count_trading_days_in_time_order():
    split = splits.build(fractions(0.7, 0.2), horizon=5, dates=WEEKDAYS)
    (fold,) = split.folds
    assert (fold.train_first, fold.validation_first) == (WEEKDAYS[0], WEEKDAYS[700])
    assert fold.validation_before == split.test_first == WEEKDAYS[900]


def test_dates_begin_parts_on_the_first_trading_day_from_there():
    # 2001-01-06 and 2002-01-05 are Saturdays.
    split = splits.build(dates("2001-01-06", "2002-01-05"), horizon=5, dates=WEEKDAYS)
    (fold,) = split.folds
    assert fold.validation_first == np.datetime64("2001-01-08")
    assert fold.validation_before == split.test_first == np.datetime64("2002-01-07")


@pytest.mark.parametrize("embargo", [0, 1, 10])
def test_the_embargo_moves_both_label_bounds_back_by_trading_days(embargo):
    (fold,) = splits.build(fractions(0.7, 0.2, embargo=embargo), horizon=5, dates=WEEKDAYS).folds
    assert fold.train_labels_before == WEEKDAYS[700 - embargo]
    assert fold.validation_labels_before == WEEKDAYS[900 - embargo]


@pytest.mark.parametrize("window", ["expanding", "rolling"])
@pytest.mark.parametrize("test_start", [None, "2003-01-01"])
@pytest.mark.parametrize("n_folds", [2, 7, 25])
def test_walk_forward_folds_tile_the_days_from_the_start_to_the_test_part(window, test_start, n_folds):
    config = walk_forward("2001-01-01", n_folds, test_start=test_start, window=window)
    split = splits.build(config, horizon=5, dates=WEEKDAYS)
    until = np.datetime64("9999-01-01") if test_start is None else np.datetime64(test_start)
    wanted = WEEKDAYS[(WEEKDAYS >= np.datetime64("2001-01-01")) & (WEEKDAYS < until)]
    held = [WEEKDAYS[(WEEKDAYS >= f.validation_first) & (WEEKDAYS < f.validation_before)] for f in split.folds]
    np.testing.assert_array_equal(np.concatenate(held), wanted)
    assert len(split.folds) == n_folds
    assert split.test_first == (None if test_start is None else WEEKDAYS[WEEKDAYS >= until][0])


def test_walk_forward_folds_are_of_equal_calendar_length():
    folds = splits.build(walk_forward("2001-01-01", 6, test_start="2003-01-01"), horizon=5, dates=WEEKDAYS).folds
    starts = np.array([f.validation_first for f in folds] + [folds[-1].validation_before])
    lengths = np.diff(starts).astype(int)
    # A bound that falls on a weekend moves to the Monday: up to two days to either side, and the rounding.
    assert np.ptp(lengths) <= 5 and abs(lengths.mean() - 730 / 6) < 1


def test_expanding_folds_train_from_the_first_day():
    folds = splits.build(walk_forward("2001-01-01", 4), horizon=5, dates=WEEKDAYS).folds
    assert {f.train_first for f in folds} == {WEEKDAYS[0]}
    assert [f.train_labels_before for f in folds] == [f.validation_first for f in folds]


def test_rolling_folds_all_span_as_many_trading_days_as_the_first():
    folds = splits.build(walk_forward("2001-01-01", 4, window="rolling"), horizon=5, dates=WEEKDAYS).folds
    spans = [int(np.sum((WEEKDAYS >= f.train_first) & (WEEKDAYS < f.validation_first))) for f in folds]
    assert folds[0].train_first == WEEKDAYS[0] and len(set(spans)) == 1


@pytest.mark.parametrize(
    ("config", "horizon", "words"),
    [
        (dates("1999-01-01", "2001-01-01"), 5, r"split\.validation_start = 1999-01-01 lies outside .*2000-01-03"),
        (dates("2000-01-03", "2001-01-01"), 5, r"split\.validation_start = 2000-01-03 lies outside"),
        (dates("2001-01-01", "2010-01-01"), 5, r"split\.test_start = 2010-01-01 lies outside"),
        (dates("2001-01-06", "2001-01-07"), 5, "no trading day lies in .*move them apart"),
        (walk_forward("1999-01-01", 3), 5, r"split\.validation_start = 1999-01-01 lies outside"),
        (walk_forward("2001-01-01", 3, test_start="2010-01-01"), 5, r"split\.test_start = 2010-01-01 lies outside"),
        (walk_forward("2001-01-06", 2, test_start="2001-01-07"), 5, "no trading day lies in"),
        (walk_forward("2003-10-01", 600), 5, r"split\.n_folds = 600: a fold has no trading day; lower it"),
        (fractions(0.0001, 0.5), 5, "leave a part of the 1000 trading days empty"),
        (fractions(0.9, 0.0999), 5, "leave a part of the 1000 trading days empty"),
        (fractions(0.7, 0.2, embargo=700), 5, r"split\.embargo = 700 leaves no day before"),
        (fractions(0.7, 0.2), 999, r"task\.horizon = 999 needs more than 1000 trading days, the data have 1000"),
    ],
    ids=lambda value: None if isinstance(value, SplitConfig | int) else value[:40],
)
def test_a_split_that_does_not_fit_says_why(config, horizon, words):
    with pytest.raises(BadSplit, match=words):
        splits.build(config, horizon=horizon, dates=WEEKDAYS)


# --- effective sample size --------------------------------------------------------------------------------------------


def uniqueness_by_hand(rows: list[int], horizon: int) -> float:
    """López de Prado 2018, section 4.4, bar by bar: Σ over labels of the mean of 1 / (labels that span the bar)."""
    spans = [set(range(row + 1, row + horizon + 1)) for row in rows]
    return sum(
        sum(1 / sum(moment in other for other in spans) for moment in span) / horizon for span in spans
    )  # fmt: skip


@given(rows=st.sets(st.integers(0, 60), max_size=30), horizon=st.integers(1, 12))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_effective_n_is_the_sum_of_average_uniqueness(rows, horizon):
    found = splits.effective_n(np.array(sorted(rows), int), horizon=horizon)
    assert found == pytest.approx(uniqueness_by_hand(sorted(rows), horizon), rel=1e-12)


@pytest.mark.parametrize("horizon", [1, 3, 5, 20])
def test_effective_n_of_consecutive_labels_is_about_n_over_h(horizon):
    assert splits.effective_n(np.arange(4000), horizon=horizon) == pytest.approx(4000 / horizon, rel=0.015)


@pytest.mark.parametrize("horizon", [1, 3, 5])
def test_labels_that_do_not_overlap_count_in_full(horizon):
    assert splits.effective_n(np.arange(40) * horizon, horizon=horizon) == pytest.approx(40)


def test_effective_n_knows_no_order_and_no_origin():
    rows = np.array([4, 9, 5, 20, 21, 22])
    assert splits.effective_n(rows + 10_000, horizon=4) == pytest.approx(
        splits.effective_n(np.sort(rows), horizon=4)
    )  # fmt: skip


# --- standard errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "rate", "published"), [(19, 4 / 19, 0.162), (502, 0.2, 0.031), (1260, 0.2, 0.020)]
)  # fmt: skip
def test_se_of_auc_is_the_published_one(n, rate, published):
    """At AUC .7 and base rate .2 (4 of 19), to the third decimal, as the project's table of measured figures has it.

    The table's other figures are not met: it has .055 at n = 180, .036 at 421 and .009 at 5,400, where the formula
    gives .0525, .0343 and .0096. No base rate and AUC give both .036 at 421 and .031 at 502, as the error falls with
    1/√n: those figures are of other rates. The simulation below is the reference for every n.
    """
    assert splits.se_auc(rate, n) == pytest.approx(published, abs=5e-4)


@pytest.mark.parametrize(("n", "rate"), [(20, 0.2), (180, 0.2), (420, 0.2), (180, 0.5), (300, 0.8)])
def test_se_of_auc_equals_the_spread_of_simulated_aucs(n, rate):
    """Hanley & McNeil's Q1 and Q2 are exact for exponential scores: with means a and 1 the AUC is a / (1 + a)."""
    rng = np.random.default_rng(0)
    n_positive, draws = round(n * rate), 10_000
    positive = rng.exponential(0.7 / 0.3, (draws, n_positive))
    negative = np.sort(rng.exponential(1.0, (draws, n - n_positive)), axis=1)
    wins = np.array([np.searchsorted(negative[i], positive[i]).sum() for i in range(draws)])
    aucs = wins / (n_positive * (n - n_positive))
    # 4 standard errors of an SD of 10,000 draws: 4 / √20000 = 2.8 %.
    assert splits.se_auc(rate, n) == pytest.approx(aucs.std(), rel=0.03)


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
def test_se_of_log_loss_equals_the_spread_of_simulated_losses(rate):
    """A calibrated forecaster whose logits spread by 1 about the base rate's; its AUC is about .75, as documented."""
    rng = np.random.default_rng(1)
    logits = math.log(rate / (1 - rate)) + rng.normal(size=400_000)
    p = 1 / (1 + np.exp(-logits))
    happened = rng.random(len(p)) < p
    losses = np.where(happened, -np.log(p), -np.log1p(-p))
    assert splits.se_log_loss(rate, 250) == pytest.approx(losses.std() / math.sqrt(250), rel=0.01)
    ranks = np.argsort(np.argsort(logits)) + 1
    positives = happened.sum()
    auc = (ranks[happened].sum() - positives * (positives + 1) / 2) / (positives * (len(p) - positives))
    assert auc == pytest.approx(0.75, abs=0.015)


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5])
def test_standard_errors_fall_with_the_root_of_n(rate):
    assert splits.se_log_loss(rate, 100) / splits.se_log_loss(rate, 400) == pytest.approx(2)
    assert splits.se_auc(rate, 10_000) / splits.se_auc(rate, 40_000) == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize(("rate", "n"), [(0.0, 100), (1.0, 100), (0.2, 0)])
def test_there_is_no_standard_error_without_both_classes(rate, n):
    assert splits.se_auc(rate, n) is None
    assert splits.se_log_loss(rate, n) is None


# --- the table and its checks -----------------------------------------------------------------------------------------


def test_a_table_row_counts_and_judges_by_the_effective_n():
    labels = np.r_[np.ones(30), np.zeros(70)]
    row = splits.describe_part("train", THRESHOLD, dates=WEEKDAYS[:100], labels=labels, n_effective=20.0)
    assert (row.n, row.positives, row.base_rate, row.n_effective) == (100, 30, 0.3, 20.0)
    assert (row.first, row.last) == (str(WEEKDAYS[0]), str(WEEKDAYS[99]))
    assert row.se_auc == splits.se_auc(0.3, 20) and row.se_log_loss == splits.se_log_loss(0.3, 20)


def test_a_regression_row_has_a_mean_but_no_positives():
    row = splits.describe_part("train", REGRESSION, dates=WEEKDAYS[:4], labels=np.arange(4.0), n_effective=1.0)
    assert (row.positives, row.base_rate, row.se_auc, row.se_log_loss) == (None, 1.5, None, None)


def test_the_sealed_row_says_days_and_nothing_of_labels():
    row = splits.describe_part("test", THRESHOLD, dates=WEEKDAYS[:9], labels=None, n_effective=3.0)
    assert (row.n, row.n_effective) == (9, 3.0)
    assert (row.positives, row.base_rate, row.se_log_loss, row.se_auc) == (None, None, None, None)


def part(name: str, n: int, positives: int | None, n_effective: float) -> PartRow:
    return PartRow(name, "a", "b", n, positives, None, n_effective, None, None)


LIMITS = fractions(0.7, 0.2, min_positives=30, min_effective=50)


@pytest.mark.parametrize(
    ("task", "rows", "words"),
    [
        (
            THRESHOLD,
            (part("train", 900, 29, 180), part("validation", 300, 90, 60)),
            r"train has 29 positives among 900 samples, below split\.min_positives = 30",
        ),
        (
            THRESHOLD,
            (part("train", 900, 871, 180), part("validation", 300, 90, 60)),
            "train has 29 negatives among 900",
        ),
        (
            THRESHOLD,
            (part("train", 900, 300, 180), part("validation", 300, 12, 60)),
            "validation has 12 positives among 300",
        ),
        (
            THRESHOLD,
            (part("train", 900, 300, 180), part("validation", 240, 90, 48.4)),
            r"effective sample size of 48 \(240 labels that overlap over 5 days\), below split\.min_effective = 50",
        ),
        (
            THRESHOLD,
            (part("train 1", 60, 20, 12), part("validation 1", 300, 90, 60), part("train 2", 900, 300, 180)),
            "train 1 has 20 positives",
        ),
        (
            REGRESSION,
            (part("train", 12, None, 3), part("validation", 300, None, 60)),
            "train has 12 samples, below",
        ),
        (THRESHOLD, (part("train", 0, 0, 0), part("validation", 0, 0, 0)), "validation has 0 positives among 0"),
    ],
)  # fmt: skip
def test_a_part_too_small_is_refused_with_the_numbers_and_the_mend(task, rows, words):
    with pytest.raises(TooFewSamples, match=words) as caught:
        splits.check(LIMITS, task, rows)
    assert "shorten task.horizon" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "rows"),
    [
        (THRESHOLD, (part("train", 900, 30, 180), part("validation", 250, 30, 50.0))),
        (REGRESSION, (part("train", 30, None, 6), part("validation", 250, None, 50.0))),
        # Walk-forward: every fold's validation part is small, all of them together are not.
        (
            THRESHOLD,
            tuple(
                row
                for k in range(5)
                for row in (part(f"train {k + 1}", 900, 99, 180), part(f"validation {k + 1}", 60, 9, 12.0))
            ),
        ),
        (THRESHOLD, (part("train", 900, 30, 180), part("validation", 250, 30, 50.0), part("test", 3, None, 1))),
    ],
    ids=["just enough", "regression", "folds are pooled", "the sealed part is not judged"],
)
def test_parts_that_are_large_enough_pass(task, rows):
    assert splits.check(LIMITS, task, rows) is None
