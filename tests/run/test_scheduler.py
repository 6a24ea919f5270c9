"""A study runs to its total, stops anywhere, goes on as if it had not stopped, and never changes under its name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import pyarrow.parquet as pq
import pytest

from fintx.cli import main
from fintx.config import load
from fintx.config.schema import Shape
from fintx.errors import Bug, FintxError
from fintx.evaluate import metrics
from fintx.model import encoder
from fintx.run import scheduler
from fintx.study import lifecycle, records
from fintx.study.events import EpochDone, RunContext, StudyReady, TrialFinished, TrialStarted
from tests.helpers import shared


@pytest.fixture(scope="module")
def spec(tiny_file):
    return load.study(tiny_file)


def run(spec, tmp_path, **arguments):
    return scheduler.run_study(spec, RunContext(tmp_path / "outputs", shared.data_root(tmp_path / "data"), **arguments))


def essence(folder):
    """What of a study must not depend on when and how often it was stopped."""
    return [
        (r.trial_number, r.value, r.params, r.config_hash, r.source, r.folds[0].best) for r in records.read_all(folder)
    ]


def test_a_finished_study_holds_all_that_was_asked_for(tiny_study):
    finished = records.read_all(tiny_study)
    assert [record.trial_number for record in finished] == [0, 1, 2]
    assert (tiny_study / "tiny_all_trials.json").is_file()
    assert (tiny_study / "tiny_best.json").is_file()
    assert (tiny_study.parent / "experiment_results.csv").is_file()
    assert len({record.config_hash for record in finished}) == 3


def test_every_record_rebuilds_a_model_of_its_count(tiny_study):
    for record in records.read_all(tiny_study):
        config = record.config
        params = encoder.init(config.model, config.shape, len(config.data.features), jax.random.key(0))
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == record.param_count


def test_recorded_metrics_follow_from_the_recorded_predictions(tiny_study):
    for record in records.read_all(tiny_study):
        table = pq.read_table(records.trial_folder(tiny_study, record.trial_number) / "predictions.parquet")
        assert table.column_names == list(records.PREDICTION_COLUMNS)
        outputs, labels = table["output"].to_numpy(), table["label"].to_numpy()
        again = metrics.evaluate("probability", outputs, labels, prior=record.folds[0].best["prior"])
        for key in ("log_loss", "brier", "auc"):
            assert again[key] == record.folds[0].best[key]
        assert record.value == record.folds[0].best["log_loss"]


def test_only_the_best_keep_checkpoints(tiny_study):
    finished = sorted(records.read_all(tiny_study), key=lambda record: record.value)
    has_checkpoint = [
        (records.trial_folder(tiny_study, r.trial_number) / "checkpoint" / "fold_0").is_dir() for r in finished
    ]
    assert has_checkpoint == [True, True, False]


def test_running_a_finished_study_again_changes_nothing(tiny_study, spec):
    before = {path: path.read_bytes() for path in tiny_study.rglob("record.json")}
    events = []
    root = tiny_study.parents[1]
    summary = scheduler.run_study(spec, RunContext(root / "outputs", root / "data", notify=events.append))
    assert [event for event in events if not isinstance(event, StudyReady)] == []
    assert summary.best.value == min(record.value for record in summary.records)
    assert {path: path.read_bytes() for path in tiny_study.rglob("record.json")} == before


@pytest.mark.slow
def test_a_study_stopped_mid_trial_ends_like_one_never_stopped(tiny_study, spec, tmp_path):
    seen = []

    def stop_in_second_trial():
        return any(isinstance(event, EpochDone) and event.number == 1 for event in seen)

    first = run(spec, tmp_path, notify=seen.append, should_stop=stop_in_second_trial)
    assert first.interrupted
    assert [record.trial_number for record in first.records] == [0]
    second = run(spec, tmp_path)
    assert not second.interrupted
    assert essence(second.folder) == essence(tiny_study)


@pytest.mark.slow
def test_a_raised_total_continues_the_same_study(tiny_study, spec, tmp_path):
    fewer = spec.model_copy(update={"study": spec.study.model_copy(update={"n_trials": 1})})
    assert len(run(fewer, tmp_path).records) == 1
    summary = run(spec, tmp_path)
    assert essence(summary.folder) == essence(tiny_study)


@pytest.mark.slow
def test_a_record_that_the_storage_does_not_know_is_reported_to_it(spec, tmp_path):
    """A record that the sampler never heard of is events, not trained again."""
    one = spec.model_copy(update={"study": spec.study.model_copy(update={"n_trials": 1})})

    class Killed(BaseException):
        pass

    def die(event):
        if isinstance(event, TrialStarted) and event.number == 1:
            raise Killed

    with pytest.raises(Killed):
        run(spec, tmp_path, notify=die)
    summary = run(one, tmp_path)
    assert [record.trial_number for record in summary.records] == [0]
    started = []
    full = run(spec, tmp_path, notify=started.append)
    assert [event.number for event in started if isinstance(event, TrialStarted)] == [1, 2]
    assert len(full.records) == 3


def test_another_definition_under_the_same_name_is_refused(tiny_study, tiny_file):
    other = load.study(tiny_file, overrides=["train.batch_size=64", "task.horizon=2"])
    before = sorted(path for path in tiny_study.rglob("*"))
    root = tiny_study.parents[1]
    with pytest.raises(
        lifecycle.StudyConflict, match=r"(?s)task.horizon: 3 there, 2 here.*train.batch_size: 128 there"
    ):
        scheduler.run_study(other, RunContext(root / "outputs", root / "data"))
    assert sorted(path for path in tiny_study.rglob("*")) == before


def test_a_folder_of_foreign_files_is_refused(spec, tmp_path):
    folder = tmp_path / "outputs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "thesis.docx").write_text("mine")
    with pytest.raises(lifecycle.StudyConflict, match="thesis.docx"):
        run(spec, tmp_path)
    assert (folder / "thesis.docx").read_text() == "mine"


@pytest.mark.slow
def test_the_queue_runs_first_in_order_and_counts(tiny_file, tmp_path):
    entries = [
        {"d_model": 8, "n_layers": 2, "n_heads": 2, "d_ff": 16, "note": "wide heads"},
        {"d_model": 8, "n_layers": 2, "n_heads": 1, "d_ff": 16, "values": {"optim.learning_rate": 0.005}},
    ]
    spec = load.study(tiny_file)
    shapes = [Shape(**{key: entry[key] for key in ("d_model", "n_layers", "n_heads", "d_ff")}) for entry in entries]
    queued = type(spec).model_validate_json(
        json.dumps({**spec.model_dump(mode="json", exclude_none=True), "queue": entries})
    )  # fmt: skip
    events = []
    summary = run(queued, tmp_path, notify=events.append)
    assert [record.source for record in summary.records] == ["queue", "queue", "sampler"]
    assert [record.config.shape for record in summary.records[:2]] == shapes
    assert summary.records[0].note == "wide heads"
    assert summary.records[1].config.optim.learning_rate == 0.005
    assert len([event for event in events if isinstance(event, TrialFinished)]) == 3


def test_a_bug_ends_its_own_study_alone_and_its_traceback_is_named(tiny_file, tmp_path, data_root):
    short = ["study.n_trials=1", "train.max_epochs=1"]
    broken, good = (load.study(tiny_file, overrides=[*short, f"study.name='{name}'"]) for name in ("b", "g"))
    requests = [lifecycle.StudyRequest(broken, reload=lambda: 1 // 0), lifecycle.StudyRequest(good)]
    first, second = scheduler.run_studies(requests, RunContext(tmp_path / "outputs", data_root))
    assert len(second.records) == 1 and second.problem is None
    assert isinstance(first.problem, Bug) and str(first.problem).startswith("b: ZeroDivisionError: ")
    (named,) = re.findall(r"/\S+traceback\.txt", str(first.problem))
    assert "ZeroDivisionError" in Path(named).read_text()
    assert main._print_problems([FintxError("x"), first.problem]) == 1 and main._print_problems([FintxError("x")]) == 2
    Path(named).unlink()


def test_a_stop_while_a_study_begins_begins_no_other(tiny_file, tmp_path):
    requests = [lifecycle.StudyRequest(load.study(tiny_file, overrides=[f"study.name='{name}'"])) for name in "ab"]
    events = []

    def stop_once_it_fits():
        return any("fitting" in getattr(event, "text", "") for event in events)

    context = RunContext(tmp_path / "outputs", tmp_path / "data", events.append, stop_once_it_fits)
    results = scheduler.run_studies(requests, context)
    assert [result.interrupted and result.records == () for result in results] == [True, True]
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["a"]
    assert not (tmp_path / "outputs" / "a" / "baselines.json").exists()
