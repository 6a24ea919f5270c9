"""Trial against baseline: a gain that was planted is found with its interval, and none where there is none."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from fintx.analysis import predictions
from fintx.config import load
from fintx.evaluate import metrics
from fintx.study import records


def plant(folder, best, logits: dict[str, np.ndarray], labels: np.ndarray) -> None:
    """Predictions of a model and of baselines on the same rows, as a study keeps them."""

    def table(outputs):
        n = len(labels)
        days = np.datetime64("2020-01-01") + np.arange(n)
        columns = (
            np.zeros(n, np.int32),
            days,
            np.full(n, "SPX"),
            labels.astype(np.float32),
            outputs.astype(np.float32),
        )
        return pa.table([pa.array(column) for column in columns], names=list(records.PREDICTION_COLUMNS))

    baseline_logits = {name: values for name, values in logits.items() if name != "model"}
    records.write_predictions(records.trial_folder(folder, best.trial_number), table(logits["model"]))
    tables = [table(v).append_column("baseline", pa.array([k] * len(labels))) for k, v in baseline_logits.items()]
    records.write_predictions(folder, pa.concat_tables(tables), name="baselines.parquet")


@pytest.fixture
def case(tiny_study, tiny_file, tmp_path):
    best = records.read_all(tiny_study)[0]
    return tmp_path, load.study(tiny_file), best


def test_a_planted_gain_is_found_with_its_interval(case):
    folder, spec, best = case
    rng = np.random.default_rng(0)
    signal = rng.standard_normal(4000)
    labels = (rng.random(4000) < 1 / (1 + np.exp(-signal))).astype(np.float32)
    plant(folder, best, {"model": signal, "weak": 0.2 * signal, "none": np.zeros(4000)}, labels)
    comparison = predictions.compare_trial(folder, spec, best)
    losses = {k: metrics.per_sample_loss("probability", v, labels) for k, v in (("m", signal), ("w", 0.2 * signal))}
    difference = losses["w"] - losses["m"]
    assert comparison.baseline == "weak" and comparison.n_rows == 4000 and comparison.metric == "log_loss"
    assert comparison.difference.mean == pytest.approx(difference.mean(), abs=1e-6)
    # These rows are independent: blocks change nothing, but for what 2,000 draws and chance correlation add.
    assert comparison.difference.se == pytest.approx(difference.std() / np.sqrt(4000), rel=0.15)
    assert comparison.difference.positive and comparison.difference.mean > 4 * comparison.difference.se


def test_a_gain_that_lasts_for_weeks_has_a_wider_interval(case):
    """The same differences, where good and bad days come in spells of twenty."""
    folder, spec, best = case
    rng = np.random.default_rng(2)
    labels = (rng.random(2000) < 0.5).astype(np.float32)
    gap = (2 * labels - 1) * np.repeat(rng.standard_normal(100), 20)
    plant(folder, best, {"model": gap, "prior": np.zeros(2000)}, labels)
    alone = predictions.compare_trial(folder, spec, best)
    order = rng.permutation(2000)
    mixed_up = {"model": gap[order], "prior": np.zeros(2000)}
    plant(folder, best, mixed_up, labels[order])
    mixed = predictions.compare_trial(folder, spec, best)
    assert alone.difference.mean == pytest.approx(mixed.difference.mean)
    assert alone.difference.se > 2.5 * mixed.difference.se  # √20 = 4.5, were the blocks endless


def test_equal_forecasters_have_no_gain(case):
    folder, spec, best = case
    rng = np.random.default_rng(1)
    labels = (rng.random(2000) < 0.4).astype(np.float32)
    noise = [0.3 * rng.standard_normal(2000) for _ in range(2)]
    plant(folder, best, {"model": noise[0], "baseline": noise[1]}, labels)
    comparison = predictions.compare_trial(folder, spec, best)
    assert abs(comparison.difference.mean) < 3 * comparison.difference.se


def test_a_study_has_the_files_the_comparison_needs(tiny_study, tiny_file):
    spec = load.study(tiny_file)
    baselines = json.loads((tiny_study / "baselines.json").read_text())
    best = records.best_of(records.read_all(tiny_study), minimize=True)
    comparison = predictions.compare_trial(tiny_study, spec, best)
    scored = {name: scores["metrics"]["log_loss"] for name, scores in baselines.items()}
    assert comparison.baseline == min(scored, key=scored.get)
    assert comparison.difference.mean == pytest.approx(scored[comparison.baseline] - best.value, abs=1e-6)


def test_a_baseline_that_is_truly_best_is_reported_so(case):
    folder, spec, best = case
    rng = np.random.default_rng(3)
    signal = rng.standard_normal(2000)
    labels = (rng.random(2000) < 1 / (1 + np.exp(-signal))).astype(np.float32)
    noisy = signal + rng.standard_normal(2000)
    plant(folder, best, {"model": noisy, "truth": signal}, labels)
    comparison = predictions.compare_trial(folder, spec, best)
    assert comparison.baseline == "truth" and comparison.difference.negative
