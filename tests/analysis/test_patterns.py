"""Groups of trials: what Tukey and Kramer's procedure says of them, planted differences, and none where none is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from fintx.analysis import patterns, study_results
from fintx.analysis.patterns import pattern
from fintx.report import search_page
from fintx.study.search_space import SearchSpace
from tests.helpers import planted

SIGMA = 0.01


def study(outputs, excess, *, name="p", n_trials=12, n_rows=800, seed=0, **more):
    """A study whose trials have squared errors σ² (1 + excess(number, parameters)); the prior's is 1.3 σ²."""
    rng = np.random.default_rng(seed)
    signal = rng.normal(0, SIGMA * np.sqrt(0.3), n_rows)
    target = signal + rng.normal(0, SIGMA, n_rows)
    spec = planted.spec_of(outputs / "files", name)
    return planted.write_study(
        outputs, spec, lambda i, n: signal + SIGMA * np.sqrt(excess(i, n)) * rng.normal(size=n_rows), labels=target,
        baselines={"prior": np.zeros(n_rows), "volatility_linear": signal * 0.5}, n_trials=n_trials, seed=seed, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def equal(tmp_path_factory):
    """Twelve trials that are equally good."""
    return study_results.read(study(tmp_path_factory.mktemp("equal"), lambda i, n: 0.05))


def without_days(results):
    """The same results, with nothing to draw days from."""
    alone = dataclasses.replace(results)
    alone.__dict__["resamples"] = None
    return alone


def test_differences_are_tukey_and_kramers(equal):
    """Without the days' part the procedure is SciPy's `tukey_hsd`, unequal group sizes included."""
    key = lambda r: 0 if r.trial_number < 3 else 1 if r.trial_number < 7 else 2  # noqa: E731
    compared = pattern(without_days(equal), "x", "x", key, str)
    samples = [np.array([equal.skill(r.best) for r in equal.ranked if key(r) == g]) for g in range(3)]
    reference = stats.tukey_hsd(*samples)
    interval = reference.confidence_interval(0.95)
    best = int(np.argmax([sample.mean() for sample in samples]))
    for i, group in enumerate(compared.groups):
        assert group.n == len(samples[i]) and group.best == samples[i].max()
        assert group.mean == pytest.approx(samples[i].mean())
        if i == best:
            assert group.behind is None and group.verdict == "best mean"
        else:
            assert group.behind == pytest.approx(reference.statistic[best, i])
            # SciPy's studentised range is a numerical integral: six digits.
            assert group.behind_low == pytest.approx(interval.low[best, i], rel=1e-5)
            assert group.behind_high == pytest.approx(interval.high[best, i], rel=1e-5)


def test_the_choice_of_days_widens_every_interval(equal):
    key = lambda r: r.trial_number % 2  # noqa: E731
    with_days = pattern(equal, "x", "x", key, str)
    without = pattern(without_days(equal), "x", "x", key, str)
    for a, b in zip(with_days.groups, without.groups, strict=True):
        assert a.high - a.low > b.high - b.low and a.mean == b.mean
        if a.behind is not None:
            assert a.behind_high - a.behind_low > b.behind_high - b.behind_low


@pytest.mark.slow
def test_equal_groups_are_rarely_told_apart(tmp_path):
    """At 5 %: more than 5 of 30 series would come once in a hundred."""
    told = 0
    for seed in range(10):
        results = study_results.read(study(tmp_path / str(seed), lambda i, n: 0.05, n_rows=200, seed=seed))
        for k in (2, 3, 4):
            told += pattern(results, "x", "x", lambda r, k=k: r.trial_number % k, str).distinguishable
    assert told <= 5


def test_a_planted_difference_is_found(tmp_path):
    folder = study(tmp_path, lambda i, n: 0.02 if i % 3 == 0 else 0.3)
    compared = pattern(study_results.read(folder), "x", "x", lambda r: r.trial_number % 3, "group {:.0f}".format)
    assert [group.verdict for group in compared.groups] == ["best mean", "worse", "worse"]
    assert search_page.pattern_words(compared) == "group 0 has the best mean; group 1 and group 2 are worse."
    # Skill is 1 − loss / prior's: (1.3 − 1.02) / 1.3 against (1.3 − 1.3) / 1.3.
    assert compared.groups[0].low < 0.28 / 1.3 < compared.groups[0].high
    assert compared.groups[1].behind_low < 0.28 / 1.3 < compared.groups[1].behind_high


def test_every_pattern_counts_every_successful_trial(tmp_path):
    results = study_results.read(study(tmp_path, lambda i, n: 0.05, failed=[2, 5]))
    for each in (*patterns.by_shape(results), *patterns.by_values(results)):
        assert sum(group.n for group in each.groups) == 10, each.name
        assert sum(group.behind is None for group in each.groups) == 1
    names = [each.name for each in patterns.by_shape(results)]
    assert names == ["d_model", "depth", "d_ff_ratio", "n_heads", "aspect"]
    by_values = patterns.by_values(results)
    assert [each.name for each in by_values] == ["learning_rate", "dropout"]
    assert all(len(each.groups) == 3 and each.trend is not None for each in by_values)


@pytest.mark.parametrize(
    ("layers", "words"),
    [(1, "≤ 12"), (12, "≤ 12"), (13, "13–24"), (24, "13–24"), (25, "25–48"), (48, "25–48"), (49, "> 48")],
)
def test_depth_buckets(layers, words):
    assert patterns.DEPTHS[patterns.depth_bucket(layers)][1] == words


# --- ranks ------------------------------------------------------------------------------------------------------------


def test_rank_correlation_is_scipys_and_its_interval_covers():
    rng, covered, runs = np.random.default_rng(0), 0, 200
    rho = 0.6
    truth = 6 / np.pi * np.arcsin(rho / 2)  # Spearman's ρ of a bivariate normal distribution
    for _ in range(runs):
        a = rng.normal(size=15)
        b = rho * a + np.sqrt(1 - rho**2) * rng.normal(size=15)
        correlation = patterns.spearman(a, b)
        assert correlation.rho == pytest.approx(stats.spearmanr(a, b).statistic)
        covered += correlation.low <= truth <= correlation.high
    assert covered >= 0.9 * runs  # stated: 95 %


def test_too_few_pairs_or_constants_say_nothing():
    assert patterns.spearman(np.arange(4.0), np.arange(4.0)).rho is None
    assert patterns.spearman(np.arange(9.0), np.ones(9)).rho is None
    perfect = patterns.spearman(np.arange(9.0), np.arange(9.0))
    assert perfect.rho == pytest.approx(1) and perfect.low > 0.9


# --- importance -------------------------------------------------------------------------------------------------------


def test_the_value_that_decides_is_the_important_one(tmp_path):
    folder = study(tmp_path, lambda i, n: 0.05, n_trials=40, n_rows=60)
    results = study_results.read(folder)
    space = SearchSpace.build(results.spec, n_features=len(planted.FEATURES))
    records = [
        record.model_copy(update={"value": (np.log(record.params["optim.learning_rate"]) - np.log(3e-3)) ** 2})
        for record in results.records
    ]
    importance = patterns.ped_anova(records, space)
    assert importance[0].name == "optim.learning_rate" and importance[0].share > importance[0].by_chance
    assert sum(each.share for each in importance) == pytest.approx(1)
    assert patterns.ped_anova(records[:9], space) == ()


# --- the search -------------------------------------------------------------------------------------------------------


def test_outcomes_coverage_and_duplicates(tmp_path):
    results = study_results.read(study(tmp_path, lambda i, n: 0.05, failed=[2, 5]))
    space = SearchSpace.build(results.spec, n_features=len(planted.FEATURES))
    summary = patterns.summarize(results, space)
    assert {(row.outcome, row.n) for row in summary.outcomes} == {("completed", 10), ("diverged", 2)}
    assert next(row.detail for row in summary.outcomes if row.outcome == "diverged") == "the loss became NaN at step 3"
    assert sum(row.feasible for row in summary.coverage) == len(summary.shapes) == len(space.shapes)
    assert (
        sum(row.trained for row in summary.coverage)
        == summary.trained
        == len({r.config.shape for r in results.records})
    )
    assert summary.repeated_configs == () and summary.wall_s == 12 * 60
    twice = results.records[0].model_copy(update={"trial_number": 99})
    again = patterns.summarize(dataclasses.replace(results, records=(*results.records, twice)), space)
    assert again.repeated_configs == ((0, 99),)
