"""One best baseline and one verdict, whoever is asked: live view, status, a sweep's end, a report, a confirmation."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from fintx.analysis import comparison as compared
from fintx.analysis import confirmation, predictions, status
from fintx.analysis import study_results as analysed
from fintx.cli import display
from fintx.config.schema import StudySpec
from fintx.data import sources
from fintx.errors import FintxError
from fintx.evaluate import metrics, significance
from fintx.report import format
from fintx.run import scheduler
from fintx.study import records, study_file
from fintx.study.events import RunContext, StudyReady
from tests.helpers import planted

DAYS, TRIALS, SEEDS = 1500, 3, (11, 12)
BEST = {
    "log_loss": ("calibrated", "ahead"),
    "auc": ("orders_most", "behind"),
    "average_precision": ("sees_the_top", "can't be told apart"),
}
"""Metric → the best baseline, and how the best trial stands beside it."""


def plant(root: Path, metric: str, name: str = "planted") -> tuple[Path, StudySpec]:
    """A finished study in which every metric has another best baseline."""
    rng = np.random.default_rng(3)
    signal = rng.normal(-1.7, 1.7, DAYS)
    labels = (rng.random(DAYS) < metrics.sigmoid(signal)).astype(float)
    baselines = {
        "prior": np.full(DAYS, -1.3),
        "calibrated": 0.5 * (signal + 1.7 + rng.normal(0, 1.9, DAYS)) - 1.3,  # orders worst of the three
        "orders_most": 4 * np.minimum(signal, 0.0) + 4,  # but not the likeliest; both too sure of themselves
        "sees_the_top": 4 * np.maximum(signal, -0.8) + 4,
    }
    spec = planted.spec_of(root / "files", name, task=planted.THRESHOLD, metric=metric)
    versions = {"SPX": sources.load("SPX", root=root / "data").version}
    spec = spec.model_copy(
        update={
            "study": spec.study.model_copy(update={"n_trials": TRIALS}),
            "data": spec.data.model_copy(update={"versions": versions}),
        }
    )
    fresh = np.random.default_rng(4)

    def predict(number: int, total: int) -> np.ndarray:
        return 0.7 * (signal + 1.7 + fresh.normal(0, 1, DAYS)) - 1.36

    folder = planted.write_study(root / "outputs", spec, predict, labels=labels, baselines=baselines, n_trials=TRIALS)
    for record in records.read_all(folder):
        for seed in SEEDS:
            again = records.rerun_folder(folder, record.trial_number, seed)
            kept = pq.read_table(records.trial_folder(folder, record.trial_number) / "predictions.parquet")
            records.write_predictions(again, kept)
            records.write_record(again, record)
    study = study_file.read_study(folder)
    assert study is not None
    return folder, study.spec


@pytest.mark.parametrize("metric", BEST)
def test_all_name_the_same_baseline_and_the_same_verdict(metric, tmp_path):
    folder, spec = plant(tmp_path, metric)
    name, verdict = BEST[metric]
    best = records.best_of(records.read_all(folder), minimize=metrics.MINIMIZE[metric])
    value = predictions.read_baselines(folder)[name]["metrics"][metric]

    seen = status.read(folder).comparison
    assert (seen.metric, seen.baseline, seen.standing) == (metric, name, verdict)
    assert seen.baseline_value == pytest.approx(value, abs=1e-9)
    assert seen.trial_value == pytest.approx(best.value, abs=1e-6)
    sign = 1 if metrics.MINIMIZE[metric] else -1
    assert seen.difference.mean == pytest.approx(sign * (value - best.value), abs=1e-6)

    ready = []
    context = RunContext(
        folder.parent, tmp_path / "data", lambda event: ready.append(event) if isinstance(event, StudyReady) else None
    )
    summary = scheduler.run_study(spec, context)
    assert (summary.problem, summary.comparison) == (None, seen)
    assert ready[0].to_beat == (name, seen.baseline_value)
    starts = {"ahead": "Ahead, not confirmed", "behind": f"No: {name} is better", "can't be told apart": "No: the best"}
    end = printed(display.print_result, summary)
    assert starts[verdict] in end and name in end
    assert verdict in printed(display.print_status, [status.read(folder)])

    page = analysed.read(folder)
    assert (page.best_baseline, page.comparison) == (name, seen)
    shown, kept = page.gain(name), seen.difference
    assert (shown.mean, shown.low, shown.high) == pytest.approx((kept.mean, kept.low, kept.high), rel=1e-9)
    sentence = format.study_verdict(page, None)[0]
    assert sentence.startswith(starts[verdict]) and name in sentence
    assert ("nats per row" in sentence) == (metric == "log_loss")

    trials = records.ranked(records.read_all(folder), minimize=metrics.MINIMIZE[metric])
    confirmed = confirmation.build(folder, spec, trials, SEEDS, data_root=tmp_path / "data")
    gain = confirmed.candidates[0].verdict.gain
    assert (confirmed.baseline, confirmed.loss, predictions.standing(gain)) == (name, metric, verdict)
    assert gain.mean == pytest.approx(seen.difference.mean, abs=1e-12)
    assert bool(confirmed.confirmed) == (verdict == "ahead") and name in format.confirmation_verdict(confirmed)
    assert all(np.isfinite(group.gain.mean) for group in confirmed.candidates[0].groups)


def test_studies_side_by_side_are_judged_by_their_own_metric(tmp_path):
    folders = [plant(tmp_path, metric, metric)[0] for metric in BEST]
    rows = compared.read(folders).rows
    assert {row.name: (row.baseline, row.comparison.standing) for row in rows} == BEST


def printed(show, value) -> str:
    console = Console(file=io.StringIO(), width=400)
    show(console, value)
    return console.file.getvalue()


@pytest.mark.parametrize("metric", BEST)
def test_the_losses_of_a_trial_of_several_seeds_are_their_mean(metric, tmp_path):
    """Verdict, intervals and every test over the search follow from all seeds, as the value does."""
    folder, spec = plant(tmp_path, metric)
    spec = spec.model_copy(update={"study": spec.study.model_copy(update={"replicates": 3})})
    rows, where = predictions.read_rows(folder, spec), records.trial_folder(folder, 0)
    first = pq.read_table(where / "predictions.parquet")
    rng, others = np.random.default_rng(5), []
    for replicate in (1, 2):
        outputs = pa.array((first["output"].to_numpy() + rng.normal(0, replicate, DAYS)).astype(np.float32))
        table = first.set_column(first.column_names.index("output"), "output", outputs)
        others.append(table.append_column("replicate", pa.array(np.full(DAYS, replicate, np.int32))))
    records.write_predictions(where, pa.concat_tables(others), name="replicates.parquet")
    seeds = np.array([first["output"], *(each["output"] for each in others)])
    each = [metrics.evaluate("probability", of_seed, rows.labels, prior=0.4)[metric] for of_seed in seeds]
    losses = predictions.trial_losses(folder, 0, rows)
    assert losses.mean() == pytest.approx(np.mean(each) if metrics.MINIMIZE[metric] else 1 - np.mean(each), rel=1e-6)
    np.testing.assert_allclose(losses, np.mean([rows.losses(of_seed) for of_seed in seeds], axis=0))

    trial = records.read_all(folder)[0]
    assert predictions.compare_trial(folder, spec, trial).trial_value == pytest.approx(np.mean(each), rel=1e-6)
    with pytest.raises(FintxError, match=r"0001/replicates\.parquet: is not there"):
        predictions.trial_losses(folder, 1, rows)
    records.write_predictions(where, others[0], name="replicates.parquet")
    with pytest.raises(FintxError, match="its model of seed 3 was scored on other rows"):
        predictions.trial_losses(folder, 0, rows)


@pytest.mark.parametrize("metric", ["log_loss", "auc"])
def test_a_fold_counts_as_one_however_many_rows_it_has(metric, tmp_path):
    """As in the recorded value: the mean over folds, and a ranking within each."""
    folder, spec = plant(tmp_path, metric)
    rows = predictions.read_rows(folder, spec)
    rows = dataclasses.replace(rows, fold=np.where(np.arange(DAYS) < 400, 0, 1))
    outputs = rows.baselines["orders_most"]
    parts = [significance.row_losses("probability", metric, outputs[rows.fold == f], rows.labels[rows.fold == f])
             for f in (0, 1)]  # fmt: skip
    assert rows.losses(outputs).mean() == pytest.approx(np.mean([part.mean() for part in parts]), rel=1e-12)
    assert rows.losses(outputs).mean() != pytest.approx(np.concatenate(parts).mean(), rel=1e-3)
