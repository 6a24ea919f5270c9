"""What was planted is what the confirmation says: the best, the confirmed, those alike, and what was luck."""

from __future__ import annotations

import contextlib
import shutil

import numpy as np
import pytest

from fintx.analysis import confirmation
from fintx.config import load
from fintx.config.schema import ConfirmConfig, config_hash
from fintx.data import sources
from fintx.errors import FintxError
from fintx.evaluate import metrics
from fintx.report.format import confirmation_details, confirmation_verdict
from fintx.run import confirm
from fintx.run.search import Search
from fintx.study import lifecycle, locks, records, search_space, study_file
from fintx.study.events import RunContext
from tests.helpers.jobs import next_jobs
from tests.helpers.planted_predictions import Planted

SEEDS = (11, 12, 13)
DAYS = 900


@pytest.fixture
def spec(tiny_file):
    return load.study(tiny_file)


@pytest.fixture
def plant(tiny_study, tmp_path):
    """An empty study of 900 days; labels follow `signal`."""
    template = records.read_all(tiny_study)[0]

    def make(*, folds: int = 1, first: str = "2012-01-02") -> tuple[Planted, np.ndarray, np.random.Generator]:
        rng = np.random.default_rng(0)
        signal = rng.standard_normal(DAYS)
        labels = (rng.random(DAYS) < metrics.sigmoid(signal)).astype(np.float32)
        days = np.busday_offset(first, np.arange(DAYS), roll="forward").astype("datetime64[D]")
        return Planted(tmp_path, template, labels, days, np.arange(DAYS) * folds // DAYS), signal, rng

    return make


def build(planted, spec, trials, tmp_path, seeds=SEEDS):
    return confirmation.build(planted.folder, spec, trials, seeds, data_root=tmp_path)


def test_a_planted_signal_is_confirmed_and_its_equal_can_not_be_told_from_it(plant, spec, tmp_path):
    planted, signal, rng = plant()
    planted.baselines({"prior": np.zeros(DAYS), "weak": 0.2 * signal})
    noise = {0: 0.3, 1: 0.3, 2: 2.0}
    trials = [planted.trial(n, signal + sd * rng.standard_normal(DAYS)) for n, sd in noise.items()]
    for number, sd in noise.items():
        for seed in SEEDS:
            planted.rerun(number, seed, signal + sd * rng.standard_normal(DAYS))
    findings = build(planted, spec, trials, tmp_path)
    assert findings.complete and findings.baseline == "weak" and findings.n_compared == 3 and findings.seeds == SEEDS
    assert {each.trial for each in findings.confirmed} == {0, 1}
    assert {findings.best.trial, *(each.trial for each in findings.alike)} == {0, 1}
    assert findings.candidates[2].words == "not confirmed"
    assert findings.superior_p_value < 0.01 and findings.overfitting < 0.6
    verdict = confirmation_verdict(findings)
    assert verdict.startswith(f"CONFIRMED: trial {findings.best.trial} beats weak by 0.") and "95 %" in verdict
    assert f"Indistinguishable from the best: trial {findings.alike[0].trial}." in confirmation_details(findings)
    # By Jensen's inequality an ensemble's log loss is below its reruns' mean; how far, their noise decides.
    for each in findings.candidates:
        assert each.ensemble.gain.mean > each.verdict.gain.mean
        assert each.verdict.gain.mean == pytest.approx(findings.baseline_loss - each.mean_value, abs=1e-6)
    assert confirmation.read(tmp_path) is None
    confirmation.write(tmp_path, findings)
    assert confirmation.read(tmp_path) == findings


def test_a_baseline_that_is_truly_best_is_reported_so(plant, spec, tmp_path):
    planted, signal, rng = plant()
    planted.baselines({"prior": np.zeros(DAYS), "truth": signal})
    trials = [planted.trial(n, signal + rng.standard_normal(DAYS)) for n in range(2)]
    for record in trials:
        for seed in SEEDS:
            planted.rerun(record.trial_number, seed, signal + rng.standard_normal(DAYS))
    findings = build(planted, spec, trials, tmp_path)
    assert findings.baseline == "truth" and findings.confirmed == () and findings.superior_p_value > 0.5
    assert confirmation_verdict(findings).startswith("NOT CONFIRMED: truth is better than every trial trained again")


def test_a_lucky_search_is_seen_through(plant, spec, tmp_path):
    """The winner knew a tenth of the labels; its fresh seeds know nothing."""
    planted, _, rng = plant()
    planted.baselines({"prior": np.zeros(DAYS)})
    lucky = 0.3 * rng.standard_normal(DAYS) + 0.6 * (2 * planted.labels - 1)
    trials = [planted.trial(0, lucky)]
    for seed in SEEDS:
        planted.rerun(0, seed, 0.3 * rng.standard_normal(DAYS))
    findings = build(planted, spec, trials, tmp_path)
    (candidate,) = findings.candidates
    assert candidate.too_good.low > 0.2
    assert candidate.too_good.mean == pytest.approx(candidate.mean_value - candidate.search_value, abs=1e-6)
    assert findings.confirmed == () and findings.overfitting is None and findings.luck is None
    assert "too good (95 %:" in " ".join(confirmation_details(findings))


def test_a_candidate_whose_seed_fails_is_not_confirmed_and_says_why(plant, spec, tmp_path):
    planted, signal, rng = plant()
    planted.baselines({"prior": np.zeros(DAYS)})
    trials = [planted.trial(n, signal) for n in range(2)]
    for seed in SEEDS:
        planted.rerun(0, seed, None if seed == 12 else signal + 0.1 * rng.standard_normal(DAYS))
        planted.rerun(1, seed, signal + 0.1 * rng.standard_normal(DAYS))
    findings = build(planted, spec, trials, tmp_path)
    assert findings.complete and findings.candidates[0].verdict is None
    assert findings.candidates[0].words == "not confirmed: 1 of 3 seeds diverged"
    assert findings.candidates[0].values[1] is None and findings.candidates[0].mean_value is not None
    assert findings.candidates[1].words == "best, confirmed"


def test_half_a_confirmation_compares_the_seeds_that_all_have(plant, spec, tmp_path):
    planted, signal, rng = plant()
    planted.baselines({"prior": np.zeros(DAYS)})
    trials = [planted.trial(n, signal) for n in range(2)]
    empty = build(planted, spec, trials, tmp_path)
    assert not empty.complete and empty.seeds == () and empty.best is None
    assert "nothing can be said yet" in confirmation_verdict(empty)
    for number, seed in ((0, 11), (1, 11), (0, 12), (1, 12), (0, 13)):
        planted.rerun(number, seed, signal + 0.1 * rng.standard_normal(DAYS))
    findings = build(planted, spec, trials, tmp_path)
    assert (findings.n_trained, findings.n_members, findings.seeds) == (5, 6, (11, 12))
    assert not findings.complete and all(len(each.values) == 2 for each in findings.candidates)


def test_what_the_search_lacks_is_stated(plant, spec, tmp_path):
    planted, signal, rng = plant()
    planted.baselines({"prior": np.zeros(DAYS)})
    trials = [planted.trial(n, signal) for n in range(2)]
    (records.trial_folder(tmp_path, 1) / "predictions.parquet").unlink()
    for seed in SEEDS:
        planted.rerun(0, seed, signal + 0.1 * rng.standard_normal(DAYS))
    study_file.log_opening(tmp_path, {})
    raised = spec.model_copy(update={"study": spec.study.model_copy(update={"n_trials": 9})})
    findings = build(planted, raised, trials[:1], tmp_path)
    assert findings.n_compared == 1 and findings.n_finished == 2
    for note_text in (
        "opened once",
        "its best of 2 trials so far, of 9",
        "1 trials are in no test over the whole search",
    ):
        assert any(note_text in note for note in findings.notes), findings.notes


@pytest.mark.parametrize("damage", ["no baselines", "no predictions", "torn", "other rows"])
def test_what_can_not_be_compared_is_one_clear_line(damage, plant, spec, tmp_path):
    planted, signal, _ = plant()
    planted.baselines({"prior": np.zeros(DAYS)})
    trials = [planted.trial(0, signal)]
    for seed in SEEDS:
        planted.rerun(0, seed, signal)
    path = records.rerun_folder(tmp_path, 0, 12) / "predictions.parquet"
    if damage == "no baselines":
        path = tmp_path / "baselines.parquet"
        path.unlink()
    elif damage == "no predictions":
        path.unlink()
    elif damage == "torn":
        path.write_bytes(path.read_bytes()[:100])
    else:
        records.write_predictions(path.parent, planted.table(signal).slice(1))
    with pytest.raises(FintxError) as caught:
        build(planted, spec, trials, tmp_path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_damaged_confirmation_is_named(tmp_path):
    (tmp_path / confirmation.FILE).write_text('{"study": 1}')
    with pytest.raises(records.DamagedRecord, match="is no confirmation of this fintx"):
        confirmation.read(tmp_path)


def test_folds_and_years_share_the_gain_out(plant, spec, tmp_path):
    """Half of the days have a signal that the model knows, and half have none."""
    planted, signal, rng = plant(folds=2)
    late = np.arange(DAYS) >= DAYS // 2
    planted.labels[late] = (rng.random(late.sum()) < 0.5).astype(np.float32)
    planted.baselines({"prior": np.zeros(DAYS)})
    trials = [planted.trial(0, np.where(late, 0.05, 1) * signal)]
    for seed in SEEDS:
        planted.rerun(0, seed, np.where(late, 0.05, 1) * signal + 0.02 * rng.standard_normal(DAYS))
    findings = build(planted, spec, trials, tmp_path)
    groups = {(group.kind, group.name): group for group in findings.candidates[0].groups}
    first, second = groups["fold", "1"].gain, groups["fold", "2"].gain
    assert first.low > 0.05 and second.low < 0 < second.high
    years = [group for (kind, _), group in groups.items() if kind == "year"]
    assert sum(group.n for group in years) == DAYS and len(years) == 4
    assert findings.candidates[0].verdict.gain.mean == pytest.approx((first.mean + second.mean) / 2)
    weighted = sum(group.n * group.gain.mean for group in years) / DAYS
    assert findings.candidates[0].verdict.gain.mean == pytest.approx(weighted)


def test_thirds_of_vix_are_reported_where_vix_is_in_the_data(shared_data, plant, spec, tmp_path):
    import datetime

    sources.import_file(shared_data / "VIX.csv", "VIX", root=tmp_path, today=datetime.date(2026, 11, 1))
    planted, signal, _ = plant(first="2008-01-02")
    planted.baselines({"prior": np.zeros(DAYS)})
    trials = [planted.trial(0, signal)]
    for seed in SEEDS:
        planted.rerun(0, seed, signal + 0.001 * seed)
    with_vix = spec.model_copy(update={"data": spec.data.model_copy(update={"context": ("VIX",)})})
    findings = build(planted, with_vix, trials, tmp_path)
    thirds = [group for group in findings.candidates[0].groups if group.kind == "vix"]
    assert [group.name for group in thirds] == ["calm", "middling", "nervous"]
    assert all(abs(group.n - DAYS / 3) < 25 for group in thirds)


def test_a_regression_is_compared_by_its_squared_error(plant, spec, tmp_path):
    planted, signal, rng = plant()
    planted.predicts = "value"
    planted.labels = (0.01 * signal + 0.01 * rng.standard_normal(DAYS)).astype(np.float32)
    task = spec.task.model_copy(update={"kind": "regression", "price": None, "threshold": None})
    study = spec.study.model_copy(update={"metric": "mse"})
    regression = spec.model_copy(update={"task": task, "study": study})
    planted.baselines({"zero": np.zeros(DAYS)})
    trials = [planted.trial(0, 0.01 * signal)]
    for seed in SEEDS:
        planted.rerun(0, seed, 0.01 * signal + 0.001 * rng.standard_normal(DAYS))
    findings = build(planted, regression, trials, tmp_path)
    assert findings.loss == "mse" and findings.best.words == "best, confirmed"
    assert findings.best.verdict.gain.mean == pytest.approx(1e-4, rel=0.2)


# --- what is trained --------------------------------------------------------------------------------------------------


def test_fresh_seeds_are_the_same_for_ever_and_none_of_the_searchs():
    few, many = confirm.fresh_seeds(0, 3, used=set()), confirm.fresh_seeds(0, 20, used=set())
    assert many[:3] == few and len(set(many)) == 20
    search = {search_space.derive_seed(0, search_space.TRIAL, number) for number in range(200)}
    assert not search & set(many)
    assert confirm.fresh_seeds(0, 2, used={few[0]}) == many[1:3]
    assert confirm.fresh_seeds(1, 3, used=set()) != few


@pytest.fixture
def opened(tiny_study, tmp_path):
    """A confirmation of the best two of a real study, three seeds each, and its events."""
    folder = shutil.copytree(tiny_study, tmp_path / "tiny")
    events: list = []
    config = ConfirmConfig(top_k=2, n_seeds=3)
    context = RunContext(tmp_path, tiny_study.parents[1] / "data", events.append)
    with confirm.open_confirmation(folder, config, context) as confirmation_run:
        yield confirmation_run, events


def test_each_of_the_best_gets_the_same_seeds_in_turn(opened, tiny_study):
    source, _ = opened
    ranked = records.ranked(records.read_all(tiny_study), minimize=True)
    jobs = [next_jobs(source)[0] for _ in range(6)]
    assert not next_jobs(source) and not source.over and not source.settled
    assert [job.number for job in jobs] == [ranked[0].trial_number, ranked[1].trial_number] * 3
    assert [job.config.seed for job in jobs] == [seed for seed in source.seeds for _ in range(2)]
    assert len({job.folder for job in jobs}) == 6 and [job.key for job in jobs] == list(range(6))
    first = ranked[0].config
    assert jobs[0].config == first.model_copy(update={"seed": source.seeds[0]})
    assert not {record.config.seed for record in ranked} & set(source.seeds)


def test_a_rerun_that_crashes_is_tried_again_and_then_given_up(opened):
    source, events = opened
    for attempt in range(1, 4):
        job = next_jobs(source)[0]
        assert (job.key, job.attempt) == (0, attempt)
        source.handle(job.key, "died", {"text": "killed by SIGSEGV", "beside": False}, pid=1)
    assert source.run.given_up(source.done) == (
        f"trial {source.trials[0].trial_number} again, seed 1 of 3 died: killed by SIGSEGV",
    )
    assert "2 attempts left" in events[2].text and "given up; the next run tries it again" in events[-1].text
    assert next_jobs(source)[0].key == 1
    assert not list(source.next_jobs(lambda config: None)), "no memory for it now"
    source.handle(1, "mistake", {"text": "No space left on device"}, pid=1)
    assert "No space left" in str(source.run.problem) and not next_jobs(source)
    result = source.result(interrupted=False)
    assert result.problem is source.run.problem and not result.confirmation.complete


def test_failures_in_a_row_stop_it(opened):
    source, _ = opened
    source.run.spec = source.spec.model_copy(
        update={"execution": source.spec.execution.model_copy(update={"max_failures": 4})}
    )  # fmt: skip
    for _ in range(4):
        source.handle(next_jobs(source)[0].key, "hung", {"text": "no step for 900 s", "beside": False}, pid=1)
    assert "stopped after 4 failures in a row of the same kind, hung" in str(source.run.problem) and source.settled


@pytest.mark.parametrize("of_reruns", [False, True], ids=["of a search", "of a confirmation"])
def test_failures_of_different_kinds_in_a_row_do_not_stop_it(opened, tiny_study, tiny_file, tmp_path, of_reruns):
    """One policy for both: what stops a study is one cause that more trials won't cure."""
    if of_reruns:
        source, _ = opened
    else:
        order = lifecycle.StudyRequest(load.study(tiny_file, overrides=["study.name='another'"]))
        context = RunContext(tmp_path, tiny_study.parents[1] / "data")
        stack = contextlib.ExitStack()
        source = Search(stack.enter_context(lifecycle.open_study(order, context)), order, context)
    limits = source.spec.execution.model_copy(update={"max_failures": 3, "max_attempts": 9})
    source.run.spec = source.spec.model_copy(update={"execution": limits})

    def fails(kind, text):
        source.handle(next_jobs(source)[0].key, kind, {"text": text, "beside": False}, pid=1)

    for _ in range(2):
        fails("died", "killed by SIGKILL")
        fails("failed", "OSError: [Errno 5] Input/output error: 'a'")
    fails("failed", "OSError: [Errno 5] Input/output error: 'b'")
    assert source.run.problem is None
    fails("failed", "OSError: [Errno 5] Input/output error: 'c'")
    wanted = "stopped after 3 failures in a row of the same kind, failed (OSError)"
    assert wanted in str(source.run.problem) and not next_jobs(source)
    if not of_reruns:
        stack.close()


def test_reruns_that_diverge_one_after_the_other_stop_a_confirmation_as_they_stop_a_search(opened):
    source, _ = opened
    limits = source.spec.execution.model_copy(update={"max_failures": 2})
    source.run.spec = source.spec.model_copy(update={"execution": limits})
    for record in source.trials:
        job = next_jobs(source)[0]
        diverged = {"value": None, "outcome": "diverged", "detail": "the loss is nan"}
        mine = {"config": job.config, "config_hash": config_hash(job.config)}
        records.write_record(job.folder, record.model_copy(update=mine | diverged))
        source.handle(job.key, "done", {}, pid=1)
    assert "stopped after 2 failures in a row of the same kind, diverged: the loss is nan" in str(source.run.problem)
    assert source.done == {0, 1} and source.run.given_up(source.done) == ()


def test_a_request_to_stop_is_heard_once_and_no_rerun_begins_after_it(opened):
    source, events = opened
    source.tick()
    locks.ask_to_stop(str(source.folder), outputs=source.folder.parent)
    before = len(events)
    source.tick()
    source.tick()
    assert [event.text for event in events[before:]] == [locks.STOP_HEARD]
    assert not next_jobs(source) and source.result(interrupted=False).interrupted


def test_who_asks_before_the_first_rerun_is_heard_too(tiny_study, tmp_path):
    folder = shutil.copytree(tiny_study, tmp_path / "tiny")
    (folder / "baselines.json").unlink()  # source again: it is asked for on the way
    asked = []

    def ask() -> bool:
        if not asked:
            asked.append(locks.ask_to_stop(str(folder), outputs=tmp_path))
        return False

    with (
        pytest.raises(locks.Stopped),
        confirm.open_confirmation(
            folder, ConfirmConfig(), RunContext(tmp_path, tiny_study.parents[1] / "data", should_stop=ask)
        ),
    ):
        pass
    assert asked


def test_a_study_without_a_success_or_with_other_data_is_refused(tiny_study, tmp_path):
    wanted, data = ConfirmConfig(), tiny_study.parents[1] / "data"
    empty = shutil.copytree(tiny_study, tmp_path / "empty", ignore=lambda *_: ["trials"])
    with (
        pytest.raises(FintxError, match="no successful trial yet"),
        confirm.open_confirmation(empty, wanted, RunContext(tmp_path, data)),
    ):
        pass
    other = shutil.copytree(tiny_study, tmp_path / "other")
    path = records.trial_folder(other, records.ranked(records.read_all(other), minimize=True)[0].trial_number)
    text = (path / "record.json").read_text()
    findings = records.read(path / "record.json").folds[0].label_hash
    (path / "record.json").write_text(text.replace(findings, "0" * 64))
    with (
        pytest.raises(FintxError, match="trained on other label"),
        confirm.open_confirmation(other, wanted, RunContext(tmp_path, data)),
    ):
        pass
    with pytest.raises(FintxError, match="is no study under"):
        study_file.find_study("nowhere", outputs=tmp_path)
    assert (
        study_file.find_study("other", outputs=tmp_path) == study_file.find_study(str(other), outputs=tmp_path) == other
    )
