"""A trial of several seeds: its value is their mean, and all that is one model's is the first seed's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from fintx.analysis import evaluation
from fintx.config import load
from fintx.config.schema import StudySpec
from fintx.run import scheduler
from fintx.study import lifecycle, records, search_space, study_file
from fintx.study.events import RunContext
from fintx.study.records import TrialRecord
from fintx.study.search_space import SearchSpace
from tests.helpers import shared

TOLERANCE = 2e-4
"""Of metrics, between side by side and one by one: some 20 steps multiply float32's rounding."""


def run(spec: StudySpec, root: Path) -> Path:
    return scheduler.run_study(spec, RunContext(root / "outputs", shared.data_root(root / "data"))).folder


def spec_of(file: Path, *changes: str) -> StudySpec:
    return load.study(file, overrides=["study.n_trials=1", *changes])


def run_once(name: str, spec: StudySpec) -> Path:
    """The same, once for all processes; tests don't change it."""
    return shared.once(name, lambda root: run(spec, root)) / "outputs" / "tiny"


@pytest.fixture(scope="module")
def one_by_one(tiny_file: Path) -> Path:
    return run_once("one_by_one", spec_of(tiny_file, "study.replicates=3", "execution.population=false"))


@pytest.fixture(scope="module")
def side_by_side(tiny_file: Path) -> Path:
    return run_once("side_by_side", spec_of(tiny_file, "study.replicates=3", "execution.population=3"))


def only(folder: Path) -> TrialRecord:
    (record,) = records.read_all(folder)
    return record


def values(record: TrialRecord) -> list[float]:
    folds = [record.folds, *(replicate.folds for replicate in record.replicates)]
    return [fold.best["log_loss"] for (fold,) in folds]  # type: ignore[misc]


def test_the_value_is_the_mean_and_has_its_standard_error(one_by_one: Path) -> None:
    record = only(one_by_one)
    by_seed = values(record)
    assert len(set(by_seed)) == 3
    assert record.value == pytest.approx(np.mean(by_seed), rel=1e-12)
    assert record.value_se == pytest.approx(np.std(by_seed, ddof=1) / np.sqrt(3), rel=1e-12)
    assert record.best["log_loss"] == pytest.approx(record.value, rel=1e-12)
    assert record.best["n"] == record.folds[0].best["n"]
    row = json.loads((one_by_one / "tiny_best.json").read_text())
    assert (row["value"], row["value_se"], row["n_replicates"]) == (record.value, record.value_se, 3)


def test_the_first_seed_is_the_trial_that_it_was_without_replicates(one_by_one: Path, tiny_study: Path) -> None:
    without, first = records.read_all(tiny_study)[0], only(one_by_one)
    assert first.config == without.config
    assert (first.folds[0].best, first.folds[0].curve) == (without.folds[0].best, without.folds[0].curve)
    assert without.value_se is None and without.replicates == ()


def test_every_seed_is_another(one_by_one: Path) -> None:
    record = only(one_by_one)
    drawn = [record.config.seed, *(replicate.seed for replicate in record.replicates)]
    assert drawn == [search_space.replicate_seed(record.config.seed, number) for number in range(3)]
    assert len(set(drawn)) == 3


@pytest.mark.slow
def test_side_by_side_they_come_to_the_same(side_by_side: Path, one_by_one: Path) -> None:
    lines = (side_by_side / "trials" / "0000" / "attempts.jsonl").read_text().splitlines()
    assert [(json.loads(line)["replicate"], json.loads(line)["population"]) for line in lines] == [
        (0, 3), (1, 3), (2, 3)
    ]  # fmt: skip
    together, single = only(side_by_side), only(one_by_one)
    assert values(together) == pytest.approx(values(single), rel=TOLERANCE)
    assert [r.seed for r in together.replicates] == [r.seed for r in single.replicates]
    for ours, theirs in zip(together.replicates, single.replicates, strict=True):
        assert (ours.folds[0].best_epoch, ours.folds[0].epochs) == (theirs.folds[0].best_epoch, theirs.folds[0].epochs)


@pytest.mark.slow
def test_more_seeds_than_train_at_once_keep_their_order(one_by_one: Path, tiny_file: Path, tmp_path: Path) -> None:
    record = only(run(spec_of(tiny_file, "study.replicates=3", "execution.population=2"), tmp_path))
    assert values(record) == pytest.approx(values(only(one_by_one)), rel=TOLERANCE)


@pytest.mark.slow
def test_on_the_cores_of_a_worker_they_come_to_the_same_bit_for_bit(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one device: several simulated ones make a mesh, and wait for each other."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("this process may use a single core")
    monkeypatch.delenv("XLA_FLAGS")
    folders = [
        run(spec_of(tiny_file, "study.replicates=4", "execution.checkpoint_s=0.01", setting), tmp_path / str(number))
        for number, setting in enumerate(("execution.population=false", "execution.population='auto'"))
    ]
    single, at_once = (only(folder) for folder in folders)
    assert values(at_once) == values(single) and at_once.value_se == single.value_se
    curves = [[replicate.folds[0].curve for replicate in record.replicates] for record in (single, at_once)]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("how", ["one_by_one", pytest.param("side_by_side", marks=pytest.mark.slow)])
def test_predictions_and_checkpoint_are_the_first_seeds(how: str, request: pytest.FixtureRequest) -> None:
    study: Path = request.getfixturevalue(how)
    record, folder = only(study), study / "trials" / "0000"
    table, others = pq.read_table(folder / "predictions.parquet"), pq.read_table(folder / "replicates.parquet")
    assert table.column_names == list(records.PREDICTION_COLUMNS)
    assert others.column_names == [*records.PREDICTION_COLUMNS, "replicate"]
    assert others["replicate"].to_pylist() == [1] * len(table) + [2] * len(table)
    for column in ("date", "asset", "label"):
        assert others[column].to_pylist() == table[column].to_pylist() * 2
    outputs = others["output"].to_numpy().reshape(2, -1)
    assert not np.array_equal(outputs[0], outputs[1]) and not np.array_equal(outputs[0], table["output"].to_numpy())
    evaluated = evaluation.on_validation(study, data_root=study.parents[1] / "data")
    assert evaluated.metrics == evaluated.recorded == record.folds[0].best


def test_replicates_are_what_a_study_is_and_one_says_nothing(tiny_file: Path) -> None:
    three, one = spec_of(tiny_file, "study.replicates=3"), spec_of(tiny_file)
    assert study_file.definition(three)["study.replicates"] == 3
    assert "study.replicates" not in study_file.definition(one)


def test_a_fork_takes_over_trials_of_as_many_seeds_alone(one_by_one: Path, tiny_file: Path, tmp_path: Path) -> None:
    stored = study_file.read_study(one_by_one)
    assert stored is not None
    for replicates, taken in ((3, 1), (2, 0)):
        study = stored.spec.study.model_copy(update={"name": f"of_{replicates}", "replicates": replicates})
        spec = stored.spec.model_copy(update={"study": study})
        notices: list[str] = []
        folder = tmp_path / study.name
        space = SearchSpace.build(spec, n_features=len(spec.data.features))
        lifecycle.take_over_from(one_by_one)(folder, spec, space, notices.append)
        assert len(records.read_all(folder)) == taken
        assert ("they have 3" in notices[0]) == (taken == 0)
        assert (folder / "trials" / "0000" / "replicates.parquet").is_file() == (taken == 1)


def test_a_record_from_before_there_were_replicates_is_read(tiny_study: Path, tmp_path: Path) -> None:
    tree = json.loads((tiny_study / "trials" / "0000" / "record.json").read_text())
    for key in ("replicates", "value_se", "wait_s"):
        del tree[key]
    path = tmp_path / "record.json"
    path.write_text(json.dumps(tree))
    assert records.read(path).replicates == ()
