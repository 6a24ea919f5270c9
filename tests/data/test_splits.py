"""Splits: parts come in time order, no label reaches out of its part, and the printed sizes are correct."""

from __future__ import annotations

import datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fintx.config.schema import SplitConfig, TaskConfig
from fintx.data import splits
from fintx.data.splits import BadSplit, PartRow, TooFewSamples

DAYS = np.arange(np.datetime64("2010-01-01"), np.datetime64("2014-01-01"))
DAYS = DAYS[(DAYS.astype(int) + 3) % 7 < 5]


def day(text: str) -> datetime.date:
    return datetime.date.fromisoformat(text)


def fractions(**changes) -> SplitConfig:
    return SplitConfig(**{"kind": "fractions", "train": 0.6, "validation": 0.2} | changes)


def walk_forward(**changes) -> SplitConfig:
    base = {"kind": "walk_forward", "validation_start": day("2011-06-01"), "n_folds": 4, "window": "expanding"}
    return SplitConfig(**base | changes)


def by_dates(**changes) -> SplitConfig:
    return SplitConfig(
        **{"kind": "dates", "validation_start": day("2012-01-01"), "test_start": day("2013-01-01")} | changes
    )


def test_fractions_count_trading_days_in_time_order():
    split = splits.split_days(fractions(), horizon=3, dates=DAYS)
    (fold,) = split.folds
    assert fold.train_first == DAYS[0]
    assert fold.validation_first == fold.train_labels_before == DAYS[round(0.6 * len(DAYS))]
    assert split.test_first == fold.validation_before == fold.validation_labels_before == DAYS[round(0.8 * len(DAYS))]


def test_dates_that_are_no_trading_days_mean_the_next_one():
    split = splits.split_days(by_dates(), horizon=1, dates=DAYS)
    assert split.folds[0].validation_first == np.datetime64("2012-01-02")  # the 1st was a Sunday
    assert split.test_first == np.datetime64("2013-01-01")


def test_the_embargo_is_counted_in_trading_days():
    plain = splits.split_days(by_dates(), horizon=1, dates=DAYS).folds[0]
    embargoed = splits.split_days(by_dates(embargo=5), horizon=1, dates=DAYS).folds[0]
    assert embargoed.validation_first == plain.validation_first
    for bound in ("train_labels_before", "validation_labels_before"):
        assert np.busday_count(getattr(embargoed, bound), getattr(plain, bound)) == 5


def test_walk_forward_folds_touch_and_fill_the_span_up_to_the_test_part():
    split = splits.split_days(walk_forward(test_start=day("2013-06-03")), horizon=1, dates=DAYS)
    firsts = [fold.validation_first for fold in split.folds]
    assert len(firsts) == 4 and firsts[0] == np.datetime64("2011-06-01")
    assert [fold.validation_before for fold in split.folds] == [*firsts[1:], np.datetime64("2013-06-03")]
    lengths = np.diff([*firsts, np.datetime64("2013-06-03")]).astype(int)
    assert lengths.max() - lengths.min() <= 4  # equal but for week-ends
    assert {fold.validation_labels_before for fold in split.folds} == {np.datetime64("2013-06-03")}


def test_walk_forward_without_a_test_part_uses_every_day_and_seals_nothing():
    split = splits.split_days(walk_forward(), horizon=1, dates=DAYS)
    assert split.test_first is None
    assert split.folds[-1].validation_before > DAYS[-1]


def test_expanding_trains_on_all_days_before_and_rolling_on_as_many_as_the_first_fold():
    expanding = splits.split_days(walk_forward(), horizon=1, dates=DAYS).folds
    rolling = splits.split_days(walk_forward(window="rolling"), horizon=1, dates=DAYS).folds
    assert {fold.train_first for fold in expanding} == {DAYS[0]}
    spans = [np.searchsorted(DAYS, f.validation_first) - np.searchsorted(DAYS, f.train_first) for f in rolling]
    assert len(set(spans)) == 1


@given(
    kind=st.sampled_from(["fractions", "dates", "expanding", "rolling"]),
    horizon=st.integers(1, 25),
    embargo=st.integers(0, 30),
    n_folds=st.integers(2, 7),
    sealed=st.booleans(),
)
def test_no_label_reaches_out_of_its_part(kind, horizon, embargo, n_folds, sealed):
    """The purge and the embargo as promised, with the rows chosen as `Fold` says."""
    if kind == "fractions":
        config = fractions(embargo=embargo)
    elif kind == "dates":
        config = by_dates(embargo=embargo)
    else:
        test = day("2013-06-03") if sealed else None
        config = walk_forward(embargo=embargo, n_folds=n_folds, window=kind, test_start=test)
    split = splits.split_days(config, horizon=horizon, dates=DAYS)
    ends = np.full(len(DAYS), np.datetime64("NaT"), "datetime64[D]")
    ends[:-horizon] = DAYS[horizon:]
    before = np.datetime64("0000-01-01")
    for fold in split.folds:
        train = np.flatnonzero((DAYS >= fold.train_first) & (ends < fold.train_labels_before))
        validation = (DAYS >= fold.validation_first) & (DAYS < fold.validation_before)
        validation = np.flatnonzero(validation & (ends < fold.validation_labels_before))
        assert len(train) and len(validation)
        first = int(np.searchsorted(DAYS, fold.validation_first))
        assert train.max() + horizon == first - embargo - 1  # the last day its label looks at: none is wasted either
        assert validation.min() == first
        if split.test_first is not None:
            assert validation.max() + horizon < int(np.searchsorted(DAYS, split.test_first)) - embargo
        assert fold.validation_first > before  # folds in time order
        before = fold.validation_first


@pytest.mark.parametrize(
    ("config", "horizon", "n_days", "words"),
    [
        (fractions(), 30, 25, "task.horizon = 30 needs more than 31 trading days, the data have 25"),
        (fractions(train=0.01, validation=0.01), 1, 20, "leave a part of the 20 trading days empty"),
        (by_dates(validation_start=day("2005-01-01")), 1, None, "split.validation_start = 2005-01-01 lies outside"),
        (by_dates(test_start=day("2044-01-01")), 1, None, "split.test_start = 2044-01-01 lies outside .* 2013-12-31"),
        (
            by_dates(validation_start=day("2012-01-07"), test_start=day("2012-01-08")), 1, None,
            r"no trading day lies in \[2012-01-07, 2012-01-08\)",
        ),
        (
            walk_forward(validation_start=day("2012-01-07"), test_start=day("2012-01-08")), 1, None,
            "no trading day lies in",
        ),
        (walk_forward(validation_start=day("2014-05-01")), 1, None, "split.validation_start = 2014-05-01 lies outside"),
        (walk_forward(validation_start=day("2013-10-01"), n_folds=100), 1, None, "split.n_folds = 100: a fold has no"),
        (by_dates(embargo=5000), 1, None, "split.embargo = 5000 leaves no day before 2013-01-01; lower it"),
    ],
    ids=["horizon", "fractions", "before", "after", "weekend", "wf weekend", "wf after", "n_folds", "embargo"],
)  # fmt: skip
def test_a_split_that_does_not_fit_the_data_is_refused(config, horizon, n_days, words):
    with pytest.raises(BadSplit, match=words):
        splits.split_days(config, horizon=horizon, dates=DAYS[:n_days])


# --- what a part can show ---------------------------------------------------------------------------------------------


def slow_effective_n(rows: list[int], horizon: int) -> float:
    spans = [set(range(r + 1, r + horizon + 1)) for r in rows]
    return sum(np.mean([1 / sum(bar in other for other in spans) for bar in span]) for span in spans)


@given(rows=st.sets(st.integers(0, 80), min_size=1), horizon=st.integers(1, 12))
def test_effective_n_is_the_sum_of_average_uniqueness(rows, horizon):
    effective = splits.effective_n(np.array(sorted(rows)), horizon=horizon)
    assert effective == pytest.approx(slow_effective_n(sorted(rows), horizon))


def test_effective_n_of_labels_of_one_day_is_their_number():
    assert splits.effective_n(np.arange(5, 105), horizon=1) == pytest.approx(100)


def test_effective_n_of_a_long_part_is_about_n_over_h():
    assert splits.effective_n(np.arange(10_000), horizon=5) == pytest.approx(2_000, rel=0.01)


def test_effective_n_of_nothing_is_nothing():
    assert splits.effective_n(np.zeros(0, int), horizon=5) == 0.0


@pytest.mark.parametrize(("n", "expected"), [(19, 0.162), (180, 0.055), (421, 0.036), (502, 0.031), (5400, 0.009)])
def test_se_of_auc_at_base_rate_a_fifth(n, expected):
    """At AUC .7, against DeLong's by simulation: Hanley & McNeil's exponential scores lie up to a tenth above."""
    assert splits.se_auc(0.2, n) == pytest.approx(expected, rel=0.12)


@pytest.mark.parametrize("base_rate", [0.2, 0.5])
def test_standard_errors_are_those_of_simulated_forecasts(base_rate):
    """The forecaster that `se_log_loss` describes, 1,000 times on 300 labels: their SD is known to 2.2 %."""
    rng = np.random.default_rng(7)
    p = 1 / (1 + np.exp(-(np.log(base_rate / (1 - base_rate)) + rng.normal(size=(1000, 300)))))
    y = rng.random(p.shape) < p
    losses = -np.where(y, np.log(p), np.log(1 - p)).mean(axis=1)
    ranks = p.argsort(axis=1).argsort(axis=1) + 1
    n_positive = y.sum(axis=1)
    areas = ((ranks * y).sum(axis=1) - n_positive * (n_positive + 1) / 2) / (n_positive * (300 - n_positive))
    assert splits.se_log_loss(base_rate, 300) == pytest.approx(losses.std(), rel=0.08)
    assert splits.se_auc(y.mean(), 300, auc=areas.mean()) == pytest.approx(areas.std(), rel=0.12)
    assert areas.mean() == pytest.approx(0.745, abs=0.01)  # about the AUC that its docstring tells


@pytest.mark.parametrize(("rate", "n"), [(0.0, 100), (1.0, 100), (0.5, 0)], ids=["no positives", "all", "no rows"])
def test_no_standard_error_where_there_is_one_class(rate, n):
    assert splits.se_log_loss(rate, n) is None
    assert splits.se_auc(rate, n) is None


TASK = TaskConfig(kind="threshold", price="high", threshold=0.01, horizon=5)


def row(part: str, *, n: int = 1000, positives: int | None = 300, n_effective: float = 200.0) -> PartRow:
    return PartRow(part, "", "", n, positives, None, n_effective, None, None)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ((row("train", positives=12), row("validation")), "train has 12 positives among 1000 samples, below split.min"),
        ((row("train"), row("validation", positives=990)), "validation has 10 negatives among 1000 samples"),
        (
            (row("train"), row("validation", n=90, positives=40, n_effective=18.4)),
            r"validation has an effective sample size of 18 \(90 labels that overlap over 5 days\), below "
            r"split.min_effective = 50",
        ),
        ((row("train 1"), row("train 2", positives=0), row("validation 1"), row("validation 2")), "train 2 has 0 posi"),
    ],
    ids=["train", "negatives", "effective", "fold"],
)
def test_parts_that_are_too_small_are_refused_with_their_numbers_and_what_to_change(rows, words):
    with pytest.raises(TooFewSamples, match=words) as raised:
        splits.check_sizes(fractions(), TASK, rows)
    assert "shorten task.horizon" in str(raised.value)


def test_all_complaints_come_at_once():
    with pytest.raises(TooFewSamples) as raised:
        splits.check_sizes(
            fractions(), TASK, (row("train", positives=1), row("validation", positives=2, n_effective=3))
        )
    assert str(raised.value).count("below split.min") == 3


def test_validation_folds_are_counted_together():
    rows = (row("train 1"), *(row(f"validation {k}", positives=12, n_effective=20) for k in (1, 2, 3)))
    splits.check_sizes(fractions(), TASK, rows)
    with pytest.raises(TooFewSamples, match="validation has 24 positives"):
        splits.check_sizes(fractions(), TASK, rows[:-1])


def test_regression_counts_samples():
    task = TaskConfig(kind="regression", horizon=1)
    with pytest.raises(TooFewSamples, match="train has 20 samples"):
        splits.check_sizes(fractions(), task, (row("train", n=20, positives=None), row("validation", positives=None)))


def test_a_line_of_the_split_table_holds_the_part():
    labels = np.array([1, 0, 0, 1, 0], np.float32)
    line = splits.describe_part("train", TASK, dates=DAYS[:5], labels=labels, bars=[np.arange(5)])
    assert (line.first, line.last, line.n, line.positives) == (str(DAYS[0]), str(DAYS[4]), 5, 2)
    assert line.base_rate == pytest.approx(0.4)


def test_a_sealed_line_shows_no_base_rate():
    line = splits.describe_part("test", TASK, dates=DAYS[:5], labels=None, bars=[np.arange(5)])
    assert (line.n, line.positives, line.base_rate, line.se_auc) == (5, None, None, None)
