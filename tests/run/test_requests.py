"""Files are edited while their studies run, or between: what may change is taken, all else is reported at its line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fintx.run import requests, scheduler
from fintx.run.search import Search
from fintx.study import lifecycle, locks, queue, study_file
from fintx.study.events import Event, Notice, RunContext, StudyReady
from fintx.study.lifecycle import StudyRequest
from tests.helpers.jobs import next_jobs

ENTRY = '\n[[queue]]\nd_model = 8\nn_layers = {}\nn_heads = 1\nd_ff = 16\nid = "{}"\n'
MANUAL = ENTRY + 'sweep = "tiny.toml"\n'

OpenSearch = Callable[[StudyRequest], Search]


@pytest.fixture
def file(tiny_file: Path, tmp_path: Path) -> Path:
    """The tiny sweep file, of a budget that takes two depths, to be edited."""
    path = tmp_path / "tiny.toml"
    path.write_text(tiny_file.read_text().replace('"1.2K"', '"1.5K"\ntolerance = 0.6'))
    return path


@pytest.fixture
def notices() -> list[str]:
    """Notices of the searches."""
    return []


@pytest.fixture
def open_search(tmp_path: Path, data_root: Path, notices: list[str]) -> Iterator[OpenSearch]:
    """Opens a request's study; nothing is trained. The one opened before is closed."""
    stack = ExitStack()

    def hear(event: Event) -> None:
        if isinstance(event, Notice):
            notices.append(event.text)

    def open_request(request: StudyRequest) -> Search:
        stack.close()
        context = RunContext(tmp_path / "outputs", data_root, hear)
        study = stack.enter_context(lifecycle.open_study(request, context))
        notices.clear()
        return Search(study, request, context)

    with stack:
        yield open_request


def line_of(path: Path, nth: int) -> int:
    """The line of the nth queue entry's head."""
    lines = path.read_text().splitlines()
    return [index for index, line in enumerate(lines, start=1) if line == "[[queue]]"][nth]


def add(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


@pytest.mark.parametrize("change", ["n_layers = 3", 'n_layers = 2\n"optim.learning_rate" = 0.002'])
def test_an_id_that_a_trial_has_is_refused_for_another_content(change, file, open_search):
    add(file, ENTRY.format(2, "deep") + '"optim.learning_rate" = 0.001\n')
    next_jobs(open_search(requests.of_sweep(file, ())))
    open_search(requests.of_sweep(file, ()))
    text = file.read_text()
    file.write_text(
        text.replace("= 0.001\n", "= 0.002\n") if "rate" in change else text.replace("n_layers = 2", change)
    )
    before = (file.parent / "outputs" / "tiny" / "study.json").read_bytes()
    with pytest.raises(queue.QueueError) as caught:
        open_search(requests.of_sweep(file, ()))
    assert str(caught.value).startswith(
        f"{file}:{line_of(file, 0)}: queue[0]: its id deep is that of trial 0, which has"
    )
    assert "\n" not in str(caught.value)
    assert (file.parent / "outputs" / "tiny" / "study.json").read_bytes() == before


def test_and_while_the_study_runs(file, open_search, notices):
    add(file, ENTRY.format(2, "deep"))
    search = open_search(requests.of_sweep(file, ()))
    assert next_jobs(search)[0].entry == "deep"
    file.write_text(file.read_text().replace("n_layers = 2\n", "n_layers = 3\n"))
    search.tick()
    assert any("is not taken" in notice and "its id deep is that of trial 0" in notice for notice in notices)
    assert search.spec.queue[0].n_layers == 2


def test_what_is_wrong_with_a_manual_files_entry_is_reported_at_its_line_there(file, tmp_path):
    manual = tmp_path / "manual.toml"
    (tmp_path / "other.toml").write_text(file.read_text().replace('"tiny"', '"other"'))
    manual.write_text(MANUAL.format(2, "a").replace("tiny", "other") + MANUAL.format(2, "b") + MANUAL.format(90, "c"))
    with pytest.raises(queue.QueueError) as caught:
        scheduler.run_studies(requests.of_manual(manual, ()), RunContext(tmp_path / "outputs", tmp_path / "data"))
    assert str(caught.value).startswith(f"{manual}:{line_of(manual, 2)}: queue[2]: d_model 8, n_layers 90, n_heads 1")
    assert not (tmp_path / "outputs").exists()


def test_a_queue_in_a_base_is_reported_at_its_line_there(file, tmp_path):
    add(file, ENTRY.format(90, "a"))
    own = tmp_path / "own.toml"
    own.write_text('extends = "tiny.toml"\n[study]\nname = "own"\n')
    (result,) = scheduler.run_studies([requests.of_sweep(own, ())], RunContext(tmp_path / "outputs", tmp_path / "data"))
    assert str(result.problem).startswith(f"{file}:{line_of(file, 0)}: queue[0]: d_model 8, n_layers 90")


def test_a_manual_file_can_be_filled_while_it_runs(file, open_search, notices):
    manual = file.with_name("manual.toml")
    manual.write_text(MANUAL.format(2, "first"))
    (request,) = requests.of_manual(manual, ())
    search = open_search(request)
    assert next_jobs(search)[0].entry == "first" and not next_jobs(search)
    add(manual, MANUAL.format(3, "second"))
    search.tick()
    assert next_jobs(search)[0].entry == "second"
    stored = study_file.read_study(search.study.folder)
    assert stored is not None and stored.spec.queue == ()
    add(manual, MANUAL.format(90, "wrong"))
    search._look_at = 0.0
    search.tick()
    assert f"{manual}:{line_of(manual, 2)}: queue[2]: d_model 8, n_layers 90" in notices[-1]


def test_the_base_may_be_edited_too(file, open_search):
    own = file.with_name("own.toml")
    own.write_text('extends = "tiny.toml"\n[study]\nname = "own"\n')
    search = open_search(requests.of_sweep(own, ()))
    file.write_text(file.read_text().replace("n_trials = 3", "n_trials = 30"))
    search.tick()
    assert search.spec.study.n_trials == 30


def test_a_manual_run_keeps_the_studys_own_queue_and_its_extremes(file, open_search):
    add(file, ENTRY.format(2, "own"))
    file.write_text(file.read_text().replace("[data]", "queue_extremes = true\n\n[data]", 1))
    open_search(requests.of_sweep(file, ()))
    manual = file.with_name("manual.toml")
    manual.write_text(MANUAL.format(3, "manual"))
    (request,) = requests.of_manual(manual, ())
    search = open_search(request)
    assert next_jobs(search)[0].entry == "manual" and search.result(interrupted=True).waiting == ()
    stored = study_file.read_study(search.study.folder)
    assert (
        stored is not None and stored.spec.study.queue_extremes and [entry.id for entry in stored.spec.queue] == ["own"]
    )
    again = open_search(requests.of_sweep(file, ()))
    waiting = again.result(interrupted=True).waiting
    assert len(waiting) > 1 and "own" in waiting


def test_execution_is_taken_while_the_study_runs_and_what_waits_is_reported(file, open_search, notices):
    search = open_search(requests.of_sweep(file, ()))
    text = file.read_text().replace("high = 1e-2", "high = 2e-2").replace("seed = 0", "seed = 1")
    file.write_text(text + "\n[execution]\nhang_s = 77\nstorage = 'postgresql://me@there/x'\n[mesh]\nmodel = 2\n")
    search.tick()
    assert search.spec.execution.hang_s == 77 and search.spec.execution.storage == "journal"
    assert next_jobs(search)[0].spec.execution.hang_s == 77
    assert search.spec.mesh.model == 1
    (notice,) = [notice for notice in notices if "hold from the next start" in notice]
    assert all(key in notice for key in ("execution.storage", "mesh.model", "space.optim.learning_rate.high"))
    assert "hang_s" not in notice


def test_a_fork_keeps_the_bars_of_the_old_study(file, open_search):
    search = open_search(requests.of_sweep(file, ()))
    versions = search.spec.data.versions
    assert versions
    forked = requests.of_fork(requests.of_sweep(file, ()), "forked", outputs=search.context.study_root)
    assert forked.spec.data.versions == versions and forked.spec.study.name == "forked"
    add(file, ENTRY.format(2, "later"))
    fresh = forked.reload()
    assert fresh is not None and fresh.data.versions == versions and fresh.queue[0].id == "later"


def test_a_study_that_a_manual_file_comes_to_name_is_run_too(file, tmp_path, data_root):
    """Stopped once it begins: what then happens to it is as for any other."""
    manual, other = tmp_path / "manual.toml", tmp_path / "other.toml"
    other.write_text(file.read_text().replace('"tiny"', '"other"'))
    manual.write_text(MANUAL.format(2, "a"))
    studies, ready = requests.of_manual(manual, ()), []

    def notify(event: Event) -> None:
        if isinstance(event, StudyReady):
            ready.append(event.study)
            if event.study == "tiny":
                add(manual, MANUAL.format(3, "b").replace("tiny", "other"))

    results = scheduler.run_studies(
        studies, RunContext(tmp_path / "outputs", data_root, notify, lambda: "other" in ready), workers=2,
        added=requests.added(manual, (), studies),
    )  # fmt: skip
    assert ready == ["tiny", "other"] and [result.spec.study.name for result in results] == ready
    assert [entry.id for entry in results[1].spec.queue] == ["b"]


def test_one_study_of_two_can_be_stopped_while_its_baselines_are_fitted(file, tmp_path):
    other = tmp_path / "other.toml"
    other.write_text(file.read_text().replace('"tiny"', '"other"'))
    outputs = tmp_path / "outputs"

    def hear(event: Event) -> None:
        if isinstance(event, Notice) and event.study == "tiny" and "what must be beaten" in event.text:
            locks.ask_to_stop("tiny", outputs=outputs)

    studies = [requests.of_sweep(path, ("study.n_trials=1",)) for path in (file, other)]
    stopped, run = scheduler.run_studies(studies, RunContext(outputs, tmp_path / "data", hear))
    assert stopped.interrupted and stopped.records == ()
    assert not run.interrupted and len(run.records) == 1
