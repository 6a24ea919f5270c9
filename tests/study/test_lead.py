"""The paired comparison finds a lead that was planted, and none where there is none."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from fintx import sweepfile
from fintx.evaluate import metrics
from fintx.study import records
from fintx.study.lead import over_baselines


def plant(folder, best, logits: dict[str, np.ndarray], labels: np.ndarray) -> dict:
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

    rivals = {name: values for name, values in logits.items() if name != "model"}
    records.write_predictions(records.trial_folder(folder, best.trial_number), table(logits["model"]))
    tables = [table(v).append_column("baseline", pa.array([k] * len(labels))) for k, v in rivals.items()]
    records.write_predictions(folder, pa.concat_tables(tables), name="baselines.parquet")
    return {
        name: {"metrics": metrics.evaluate("threshold", values.astype(np.float32), labels, prior=0.5)}
        for name, values in rivals.items()
    }


@pytest.fixture
def case(tiny_study, tiny_file, tmp_path):
    best = records.read_all(tiny_study)[0]
    return tmp_path, sweepfile.load(tiny_file), best


def test_a_planted_lead_is_found_with_its_error(case):
    folder, spec, best = case
    rng = np.random.default_rng(0)
    signal = rng.standard_normal(4000)
    labels = (rng.random(4000) < 1 / (1 + np.exp(-signal))).astype(np.float32)
    held = plant(folder, best, {"model": signal, "weak": 0.2 * signal, "none": np.zeros(4000)}, labels)
    lead = over_baselines(folder, spec, best, held, n_effective=4000)
    losses = {k: metrics.per_sample_loss("threshold", v, labels) for k, v in (("m", signal), ("w", 0.2 * signal))}
    difference = losses["w"] - losses["m"]
    assert lead.baseline == "weak" and lead.n == 4000
    assert lead.gain == pytest.approx(difference.mean(), abs=1e-6)
    assert lead.se == pytest.approx(difference.std() / np.sqrt(4000), rel=1e-4)
    assert lead.gain > 4 * lead.se
    fewer = over_baselines(folder, spec, best, held, n_effective=1000)
    assert fewer.se == pytest.approx(2 * lead.se)


def test_equal_forecasters_have_no_lead(case):
    folder, spec, best = case
    rng = np.random.default_rng(1)
    labels = (rng.random(2000) < 0.4).astype(np.float32)
    noise = [0.3 * rng.standard_normal(2000) for _ in range(2)]
    held = plant(folder, best, {"model": noise[0], "rival": noise[1]}, labels)
    lead = over_baselines(folder, spec, best, held, n_effective=2000)
    assert abs(lead.gain) < 3 * lead.se


def test_a_study_has_the_files_the_comparison_needs(tiny_study, tiny_file):
    spec = sweepfile.load(tiny_file)
    held = json.loads((tiny_study / "baselines.json").read_text())
    best = records.best_of(records.read_all(tiny_study), minimize=True)
    lead = over_baselines(tiny_study, spec, best, held, n_effective=100)
    scored = {name: rival["metrics"]["log_loss"] for name, rival in held.items()}
    assert lead.baseline == min(scored, key=scored.get)
    assert lead.gain == pytest.approx(scored[lead.baseline] - best.value, abs=1e-6)
