"""Records: written once, read back equal, and the only source of every table."""

from __future__ import annotations

import csv
import json
import multiprocessing

import pyarrow as pa
import pytest
from pydantic import ValidationError

from fintx.analysis import status
from fintx.config.schema import (
    BudgetConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    Shape,
    SplitConfig,
    StudySpec,
    TaskConfig,
    TrainConfig,
    TrialConfig,
    config_hash,
)
from fintx.errors import FintxError
from fintx.study import locks, records, study_file
from fintx.study.records import FoldRecord, TrialRecord
from fintx.study.study_file import StudyFile

TASK = TaskConfig(kind="threshold", horizon=3, price="high", threshold=0.01)
CONFIG = TrialConfig(
    data=DataConfig(features=("log_return_1", "log_return_5")),
    task=TASK,
    split=SplitConfig(kind="fractions", train=0.7, validation=0.15),
    shape=Shape(d_model=8, n_layers=2, n_heads=2, d_ff=16),
    model=ModelConfig(),
    optim=OptimConfig(),
    train=TrainConfig(),
    seed=5,
)
FOLD = FoldRecord(
    outcome="completed",
    best={"log_loss": 0.6, "skill": 0.1, "n": 100},
    last={"log_loss": 0.7, "skill": 0.0, "n": 100},
    per_asset={"SPX": {"log_loss": 0.6}},
    best_epoch=3,
    best_step=30,
    epochs=5,
    steps=50,
    curve=({"epoch": 1, "train_loss": 0.69, "log_loss": 0.7},),
    data_hash="d",
    label_hash="l",
    split_hash="s",
    n_train=500,
    n_validation=100,
    compile_s=1.0,
    wall_s=2.0,
)


def make(number: int = 0, *, value: float | None = 0.6, **changes) -> TrialRecord:
    base = dict(
        study="s",
        trial_number=number,
        config=CONFIG,
        config_hash=config_hash(CONFIG),
        budget=BudgetConfig(parameters=2000, tolerance=0.25),
        source="sampler",
        params={"shape.aspect": 2.0},
        d_model=8,
        n_layers=2,
        n_heads=2,
        d_ff=16,
        param_count=1900,
        seeds={"study": 0, "trial": 5},
        metric="log_loss",
        value=value,
        outcome="completed" if value is not None else "diverged",
        micro_batch=64,
        memory_bytes=None,
        folds=(FOLD,),
        libraries={"jax": "0.10.2"},
        device="cpu",
        git_commit=None,
        started="2026-01-01T00:00:00+00:00",
        finished="2026-01-01T00:01:00+00:00",
        compile_s=1.0,
        wall_s=2.0,
    )
    return TrialRecord(**{**base, **changes})


def test_a_record_reads_back_equal(tmp_path):
    written = [make(3), make(1, value=None)]
    for record in written:
        records.append(tmp_path, record)
    assert records.read_all(tmp_path) == [written[1], written[0]]


def test_a_record_is_never_overwritten(tmp_path):
    records.append(tmp_path, make(0))
    with pytest.raises(FintxError, match="never overwrites"):
        records.append(tmp_path, make(0, value=0.5))
    assert records.read_all(tmp_path)[0].value == 0.6


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"param_count": 2501}, "outside the budget"),
        ({"param_count": 1499}, "outside the budget"),
        ({"d_model": 16}, "shape is not its config's"),
        ({"config_hash": "0" * 64}, "not the hash"),
        ({"outcome": "diverged"}, "outcome diverged with value"),
    ],
)
def test_an_inconsistent_record_cannot_be_made(change, complaint):
    with pytest.raises(ValidationError, match=complaint):
        make(0, **change)


def test_a_trial_folder_without_a_record_is_not_a_trial(tmp_path):
    records.append(tmp_path, make(0))
    (tmp_path / "trials" / "0001").mkdir()
    assert [record.trial_number for record in records.read_all(tmp_path)] == [0]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"study": 1}'], ids=["empty", "torn", "list", "foreign"])
def test_a_damaged_record_is_named(tmp_path, text):
    path = tmp_path / "trials" / "0000" / "record.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(records.DamagedRecord, match="0000/record.json"):
        records.read_all(tmp_path)


def test_best_ignores_failures_and_prefers_the_earlier_of_equals():
    trials = [make(0, value=None), make(1, value=0.6), make(2, value=0.5), make(3, value=0.5)]
    assert records.best_of(trials, minimize=True) is trials[2]
    assert records.best_of(trials, minimize=False) is trials[1]
    assert records.best_of(trials[:1], minimize=True) is None


def test_fold_metrics_are_averaged_and_counts_summed():
    folds = [{"log_loss": 0.5, "n": 10, "auc": None}, {"log_loss": 0.7, "n": 30, "auc": 0.6}]
    assert records.mean_metrics(folds) == {"log_loss": pytest.approx(0.6), "n": 40, "auc": None}


def test_seeds_are_averaged_and_their_counts_kept():
    seeds = [{"log_loss": 0.5, "n": 10, "auc": None, "tp": 3}, {"log_loss": 0.7, "n": 10, "auc": 0.6, "tp": 4}]
    assert records.mean_over_seeds(seeds) == {"log_loss": pytest.approx(0.6), "n": 10, "auc": None, "tp": 3.5}
    assert records.mean_over_seeds([]) == {}


def test_tables_come_from_records_alone(tmp_path):
    folder = tmp_path / "s"
    spec = StudySpec(
        study={"name": "s"}, task=TASK, budget=BudgetConfig(parameters=2000), data=CONFIG.data
    )  # fmt: skip
    study_file.write_study(folder, StudyFile(
        spec=spec, definition={}, definition_hash="", created="now", fintx_version="0", git_commit=None,
    ))  # fmt: skip
    for record in (make(0, value=0.7), make(1, value=None), make(2, value=0.6)):
        records.append(folder, record)
    found = records.read_all(folder)
    status.write_json(folder, found, n_trials=5, metric="log_loss", minimize=True)
    status.write_csv(tmp_path)

    table = json.loads((folder / "s_all_trials.json").read_text())
    assert [row["trial_number"] for row in table["trials"]] == [0, 1, 2]
    assert [row["value"] for row in table["trials"]] == [0.7, None, 0.6]
    for row in table["trials"]:
        assert {"d_model", "n_layers", "n_heads", "d_ff", "param_count"} <= row.keys()
        assert not any(isinstance(value, dict | list) for value in row.values()), "flat objects"
    assert json.loads((folder / "s_best.json").read_text())["trial_number"] == 2
    rows = list(csv.DictReader((tmp_path / "experiment_results.csv").read_text().splitlines()))
    assert [(row["study"], row["trial_number"], row["value"]) for row in rows] == [
        ("s", "0", "0.7"),
        ("s", "1", ""),
        ("s", "2", "0.6"),
    ]


def test_definition_leaves_out_what_may_change():
    spec = StudySpec(study={"name": "s"}, task=TASK, budget=BudgetConfig(parameters=2000))
    more = spec.model_copy(update={"study": spec.study.model_copy(update={"n_trials": 99, "name": "t"})})
    other = spec.model_copy(update={"train": spec.train.model_copy(update={"batch_size": 7})})
    spread = spec.model_copy(update={"mesh": MeshConfig(data=4, model=2, fsdp=True)})
    assert study_file.definition(spec) == study_file.definition(more) == study_file.definition(spread)
    differing = {k for k, v in study_file.definition(other).items() if study_file.definition(spec)[k] != v}
    assert differing == {"train.batch_size"}


def test_an_unwritable_place_is_one_line(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(FintxError, match="can't be written") as caught:
        records.append(blocker, make(0))
    assert "\n" not in str(caught.value)
    with pytest.raises(FintxError, match="can't be written"):
        records.write_predictions(blocker / "x", pa.table({"fold": [0]}))


def test_openings_are_counted(tmp_path):
    assert study_file.openings(tmp_path) == []
    assert study_file.log_opening(tmp_path, {"trial": 3}) == 1
    assert study_file.log_opening(tmp_path, {"trial": 3}) == 2
    assert [entry["trial"] for entry in study_file.openings(tmp_path)] == [3, 3]


def _hold_until(folder, ready, release):
    with locks.hold(folder):
        ready.set()
        release.wait(30)


def test_a_second_writer_learns_who_holds_the_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=_hold_until, args=(tmp_path, ready, release))
    other.start()
    try:
        assert ready.wait(30)
        assert locks.holder_of(tmp_path)
        with pytest.raises(locks.StudyBusy, match=f"process {other.pid} on "), locks.hold(tmp_path):
            pass
    finally:
        release.set()
        other.join(30)
    assert locks.holder_of(tmp_path) is None
    with locks.hold(tmp_path):
        assert locks.holder_of(tmp_path)
