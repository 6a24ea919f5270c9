"""Scaling laws: the answer where the law is known, and refusals where no line may be drawn through the studies."""

from __future__ import annotations

import numpy as np
import pytest

from fintx.analysis import scaling_laws, study_results
from fintx.analysis.scaling_laws import NotComparable, SizedTrials, gather
from fintx.errors import FintxError
from fintx.report import scaling_page
from tests.helpers import planted
from tests.helpers.planted import noise_study

SIGMA = 0.01
BUDGETS = ("2K", "10K", "50K", "250K")


def write(outputs, law, *, budgets=BUDGETS, n_rows=1200, n_trials=12, baseline=0.05, seed=0, spread=0.1, **more):
    """A study per budget, on the same rows; squared error σ² (1 + law(N)) beside the baseline's σ² (1 + .05)."""
    rng = np.random.default_rng(seed)
    signal = rng.normal(0, 0.003, n_rows)
    target = signal + rng.normal(0, SIGMA, n_rows)
    beaten = {
        "prior": np.zeros(n_rows),
        "volatility_linear": signal + SIGMA * np.sqrt(baseline) * rng.normal(size=n_rows),
    }
    folders = []
    for budget in budgets:
        spec = planted.spec_of(outputs / "files", f"b{budget}", budget=budget)

        def predict(number, n):
            return signal + SIGMA * np.sqrt(law(n) * np.exp(rng.normal(0, spread))) * rng.normal(size=n_rows)

        folders.append(
            planted.write_study(outputs, spec, predict, labels=target, baselines=beaten, n_trials=n_trials, **more)
        )
    return folders


def read(folders, **options):
    return scaling_laws.fit(gather([study_results.read(folder) for folder in folders]), **options)


@pytest.mark.slow
def test_a_planted_power_law_is_recovered_within_its_interval(tmp_path):
    scaling = read(write(tmp_path, lambda n: 12 * n**-0.5), refits=40)
    assert scaling.verdict == "scales"
    assert scaling_page.answer(scaling).startswith(
        "Scales. From 2.0K to 250.0K parameters the squared error of tuned models falls"
    )
    law = next(each for each in scaling.all_trials.laws if each.fit.form == "power law")
    # Relative to the baseline's expected loss, σ² · 1.05.
    assert law.floor[0] < 1 / 1.05 < law.floor[1]
    assert law.height[0] < 12 / 1.05 < law.height[1]
    assert law.exponent[0] < 0.5 < law.exponent[1]
    assert scaling.all_trials.preferred.fit.form == "power law" and law.weight > 0.8
    assert law.held_out < next(each for each in scaling.all_trials.laws if each.fit.form == "constant").held_out


@pytest.mark.slow
def test_a_flat_one_is_called_flat(tmp_path):
    scaling = read(write(tmp_path, lambda n: 0.01, n_rows=3000), difference=0.02, refits=20)
    assert scaling.verdict == "flat" and scaling_page.answer(scaling).startswith("Flat. ")
    assert "less than the stated 2.0 %" in scaling_page.answer(scaling)
    assert scaling.preferred.fit.form == "constant"


@pytest.mark.slow
def test_what_it_would_take_is_stated_where_it_cant_be_told(tmp_path):
    scaling = read(write(tmp_path, lambda n: 0.1, n_rows=400, n_trials=4), refits=20)
    sentence = scaling_page.answer(scaling)
    assert scaling.verdict == "can't tell"
    assert "more trials alone can't do it" in sentence and "validation rows would (there are 400" in sentence


@pytest.mark.slow
@pytest.mark.long
def test_intervals_cover_the_truth_as_often_as_they_say():
    """24 planted fields; the bounds are what fewer than one series in a hundred would miss."""
    sizes, runs = (2e3, 1e4, 5e4, 2.5e5), 24
    # Mean excess at a size whose trials spread by ±25 % and .1 in ln: E[N^−½] E[e^spread].
    factor = (2 * (np.sqrt(1.25) - np.sqrt(0.75)) / 0.5) * np.exp(0.005)
    gain = 12 * factor * (sizes[0] ** -0.5 - sizes[-1] ** -0.5) / 1.05
    covered = {"exponent": 0, "floor": 0, "gain": 0}
    for seed in range(runs):
        sized = planted.field_of(lambda n: 12 * n**-0.5, sizes_=sizes, n=8, seed=seed)
        pools = [np.flatnonzero(sized.cell == i) for i in range(len(sizes))]
        trend = scaling_laws._trend("all trials", sized, pools, 1.0, refits=50, seed=seed)
        law = next(each for each in trend.laws if each.fit.form == "power law")
        covered["exponent"] += law.exponent[0] <= 0.5 <= law.exponent[1]
        covered["floor"] += law.floor[0] <= 1 / 1.05 <= law.floor[1]
        covered["gain"] += trend.gain.low <= gain <= trend.gain.high
    assert covered["exponent"] >= 19 and covered["floor"] >= 19 and covered["gain"] >= 18, covered  # 95, 95 and 90 %


@pytest.mark.slow
def test_flat_fields_seldom_look_like_scaling(monkeypatch):
    monkeypatch.setattr(scaling_laws, "LEAST_TRIALS", 10**9)  # no fits: the gain alone is asked
    words = []
    for seed in range(40):
        sized = planted.field_of(lambda n: 0.05, sizes_=(1e4, 1e5, 1e6), n=8, n_days=600, seed=seed)
        words.append(scaling_laws.fit(sized, seed=seed).verdict)
    # One-sided at 5 %: more than 6 of 40 would come once in 500 series.
    assert words.count("scales") <= 6


def test_the_frontier_gives_no_size_more_luck_than_another(monkeypatch):
    monkeypatch.setattr(scaling_laws, "LEAST_TRIALS", 10**9)
    sized = planted.field_of(lambda n: 0.05, sizes_=(1e4, 1e5, 1e6), n=12, n_days=200)
    kept = ~((sized.cell == 0) & (sized.number >= 5))  # the smallest size has five trials, the others twelve
    fewer = SizedTrials(
        **{
            **sized.__dict__,
            **{k: getattr(sized, k)[kept] for k in ("cell", "study", "number", "size", "flops", "loss", "days")},
        }
    )
    scaling = scaling_laws.fit(fewer)
    assert scaling.effort == 5
    assert all(fewer.number[scaling.frontier.chosen] < 5)
    assert np.bincount(fewer.cell[scaling.frontier.chosen]).tolist() == [2, 2, 2]
    assert len(scaling.all_trials.chosen) == kept.sum()


def test_the_staircase_falls_through_the_best_trials():
    flops, loss = np.array([3.0, 1.0, 2.0, 4.0]), np.array([0.9, 1.0, 1.1, 0.95])
    x, y = scaling_laws.envelope(flops, loss)
    assert x.tolist() == [1.0, 3.0] and y.tolist() == [1.0, 0.9]


@pytest.mark.parametrize(
    ("gain", "word"),
    [
        ((0.002, 0.001, 0.003), "flat"),
        ((0.05, 0.02, 0.08), "scales"),
        ((0.01, -0.01, 0.03), "can't tell"),
        ((-0.05, -0.08, -0.02), "flat"),
    ],
)
def test_one_interval_holds_both_tests(gain, word):
    assert scaling_laws.gain_verdict(scaling_laws.Gain(*gain, 0.001, 0.001), 0.01) == word


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusal(*folders, over="parameters"):
    with pytest.raises(NotComparable) as caught:
        gather([study_results.read(folder) for folder in folders], over=over)
    return str(caught.value)


def test_studies_that_differ_in_kind_are_refused_with_what_differs(tmp_path):
    a, b = noise_study(tmp_path, "a", budget="2K"), noise_study(tmp_path, "b", budget="10K")
    other_hash = noise_study(tmp_path, "c", budget="50K", label_hash="m" * 64, data_hash="e" * 64)
    message = refusal(a, b, other_hash)
    assert "no fit: the studies differ in their label hashes (a, b: llllllllllll; c: mmmmmmmmmmmm)" in message
    assert "differ in their data" in message


def test_other_splits_and_tolerances_are_refused(tmp_path, monkeypatch):
    folders = [noise_study(tmp_path, "a", budget="2K"), noise_study(tmp_path, "b", budget="10K")]
    monkeypatch.setattr(planted, "SWEEP", planted.SWEEP.replace("train = 0.6", "train = 0.5"))
    folders.append(noise_study(tmp_path, "c", budget="50K"))
    monkeypatch.setattr(planted, "SWEEP", planted.SWEEP.replace('"BUDGET"', '"BUDGET"\ntolerance = 0.4'))
    folders.append(noise_study(tmp_path, "d", budget="250K"))
    message = refusal(*folders)
    assert "differ in their splits" in message and "train 0.5" in message
    assert "differ in their budget tolerances (a, b, c: ± 25 %; d: ± 40 %)" in message


def test_too_few_points_are_counted(tmp_path):
    a, b = noise_study(tmp_path, "a", budget="2K", n_trials=1), noise_study(tmp_path, "b", budget="10K")
    message = refusal(a, b)
    assert "2 different parameter budgets, wanted at least 3" in message
    assert "too few successful trials to know their spread: 2,000 has 1" in message
    assert "4 successful trials in all, wanted at least 8" in message


def test_missing_predictions_and_other_rows_are_named(tmp_path):
    folders = [noise_study(tmp_path, name, budget=budget) for name, budget in (("a", "2K"), ("b", "10K"), ("c", "50K"))]
    longer = noise_study(tmp_path, "d", budget="250K", n_rows=61)
    assert "validation rows differ" in refusal(*folders, longer)
    for path in folders[0].glob("trials/*/predictions.parquet"):
        path.unlink()
    assert "no fit: a: predictions.parquet is missing of trial 0" in refusal(*folders)
    (folders[1] / "baselines.parquet").unlink()
    assert "b: " in refusal(*folders) and "baselines.parquet is missing" in refusal(*folders)


@pytest.mark.slow
def test_panels_are_read_over_their_data(tmp_path):
    """The more assets, the less error: on the rows that all panels share."""
    rng = np.random.default_rng(0)
    n_days, names = 500, ["AAPL", "COST", "CVX", "DE", "DIS", "DUK", "SPY", "VIX"]
    signal, target = rng.normal(0, 0.003, (8, n_days)), None
    target = signal + rng.normal(0, SIGMA, (8, n_days))
    folders = []
    for n_assets in (2, 4, 8):
        spec = planted.spec_of(tmp_path / "files", f"p{n_assets}")
        spec = spec.model_copy(update={"data": spec.data.model_copy(update={"assets": tuple(names[:n_assets])})})
        flat_signal, flat_target = signal[:n_assets].T.ravel(), target[:n_assets].T.ravel()

        def predict(i, n, s=flat_signal, k=n_assets):
            return s + SIGMA * np.sqrt(0.4 / k) * rng.normal(size=len(s))

        base = {
            "prior": np.zeros(len(flat_target)),
            "volatility_linear": flat_signal + 0.003 * rng.normal(size=len(flat_signal)),
        }
        folders.append(
            planted.write_study(
                tmp_path, spec, predict, labels=flat_target, baselines=base, n_trials=6,
                dates=np.repeat(planted.days_of(n_days), n_assets), assets=names[:n_assets] * n_days,
                label_hash=f"{n_assets}" * 64, data_hash=f"{n_assets}" * 64, n_train=1000 * n_assets,
            )
        )  # fmt: skip
    scaling = scaling_laws.fit(gather([study_results.read(each) for each in folders], over="data"), refits=20)
    assert scaling.trials.size.min() == 2000 and scaling.trials.size.max() == 8000
    assert scaling.trials.n_rows == 2 * n_days  # what the smallest panel has, too
    assert scaling.verdict == "scales" and "From 2.0K to 8.0K training rows" in scaling_page.answer(scaling)


# --- the command ------------------------------------------------------------------------------------------------------


def test_patterns_and_names_find_studies(tmp_path):
    for name in ("2K_h3", "10K_h3", "10K_h1"):
        noise_study(tmp_path, name, budget=name.partition("_")[0], n_trials=1)
    names = [path.name for path in study_results.find_studies(["*_h3", "10K_h1", "10K_h3"], outputs=tmp_path)]
    assert names == ["10K_h3", "2K_h3", "10K_h1"]
    assert len(study_results.find_studies([str(tmp_path / "*_h3")], outputs=tmp_path / "elsewhere")) == 2
    with pytest.raises(FintxError, match=r"nowhere: fits no study under .* \(there: 10K_h1, 10K_h3, 2K_h3\)"):
        study_results.find_studies(["nowhere"], outputs=tmp_path)


def test_options_that_mean_nothing_are_refused(tmp_path):
    with pytest.raises(FintxError, match='wanted "parameters" or "data"'):
        scaling_laws.read([], over="compute", difference=0.01)
    with pytest.raises(FintxError, match="wanted a share between 0 and 1"):
        scaling_laws.read([], over="data", difference=1.5)
