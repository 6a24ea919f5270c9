"""What is shown of a study is what is known: no more where the storage can't be asked, and why."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fintx.analysis import status
from fintx.config import load
from fintx.run.search import Search
from fintx.study import lifecycle
from fintx.study.events import RunContext
from tests.helpers.jobs import next_jobs


@pytest.fixture
def folder(tiny_study: Path, tmp_path: Path) -> Path:
    """A copy of the finished study."""
    return Path(shutil.copytree(tiny_study, tmp_path / "outputs" / "tiny"))


def test_a_finished_study_has_nothing_to_note(folder):
    study_status = status.read(folder)
    assert (study_status.finished, study_status.note, study_status.unfinished) == (3, "", ())


def test_a_damaged_journal_is_noted_and_the_records_are_shown(folder):
    journal = folder / "journal.log"
    first, *others = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([first, b"\x00" * 40 + b"\n", *others]))
    study_status = status.read(folder)
    assert study_status.finished == 3 and study_status.best is not None
    assert (
        str(journal) in study_status.note
        and "is damaged" in study_status.note
        and "under way are not shown" in study_status.note
    )


@pytest.mark.parametrize("name", ["baselines.parquet", "predictions.parquet"])
def test_damage_to_what_the_best_is_compared_with_is_noted_and_the_records_are_shown(folder, name):
    best = status.read(folder).best
    path = folder / name if name.startswith("baselines") else folder / "trials" / f"{best.trial_number:04d}" / name
    path.write_bytes(path.read_bytes()[:50])
    study_status = status.read(folder)
    assert (study_status.finished, study_status.best, study_status.comparison) == (3, best, None)
    assert str(path) in study_status.note and "\n" not in study_status.note


def test_a_storage_whose_password_was_not_kept_is_noted(folder):
    path = folder / "study.json"
    path.write_text(path.read_text().replace('"journal"', '"postgresql://me:***@there/studies"'))
    study_status = status.read(folder)
    assert study_status.finished == 3 and "its password was not kept" in study_status.note


def test_time_to_go_is_shared_out_among_those_that_train(folder, tiny_file, tiny_study):
    data = tiny_study.parents[1] / "data"
    spec = load.study(tiny_file, overrides=["study.n_trials=9"])
    request, context = lifecycle.StudyRequest(spec), RunContext(folder.parent, data, n_workers=2)
    with lifecycle.open_study(request, context) as study:
        search = Search(study, request, context)
        alone = status.read(folder).eta
        for number in (3, 4):
            assert next_jobs(search)
            search.handle(number, "progress", {"step": 5}, pid=number)
        search.tick()
        shared = status.read(folder).eta
    assert alone is not None and shared is not None
    assert shared.total_seconds() == pytest.approx(alone.total_seconds() / 2, abs=1)
