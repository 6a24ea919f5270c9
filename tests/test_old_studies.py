"""A study that version 0.1 trained still opens: its records, its checkpoint and its definition are read as they stand.

`golden/study_0_1.tar.gz` is the folder of two trials of the tiny study, as version 0.1 left it.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from fintx.study import records, study_file
from tests.helpers.command import fintx

GOLDEN = Path(__file__).parent / "golden" / "study_0_1.tar.gz"


@pytest.fixture
def old_study(tmp_path: Path) -> Path:
    with tarfile.open(GOLDEN) as archive:
        archive.extractall(tmp_path / "outputs", filter="data")
    return tmp_path / "outputs" / "kept"


def test_its_records_and_definition_are_read(old_study: Path) -> None:
    trials = records.read_all(old_study)
    assert [record.trial_number for record in trials] == [0, 1]
    assert all(record.config.model.family == "encoder" for record in trials)
    study = study_file.read_study(old_study)
    assert study is not None and study_file.definition(study.spec) == study.definition


def test_its_checkpoint_repeats_the_recorded_loss(old_study: Path, data_root: Path) -> None:
    assert "kept" in fintx("status", "--outputs", old_study.parent).stdout
    output = fintx("eval", old_study, "--data-dir", data_root).stdout
    _, value, recorded, _ = next(line for line in output.splitlines() if line.startswith("log_loss")).split()
    assert float(value) == pytest.approx(float(recorded), abs=1e-4)  # another processor, or tests' compiler options


def test_its_report_is_written(old_study: Path, data_root: Path) -> None:
    fintx("report", "kept", "--outputs", old_study.parent, "--data-dir", data_root)
    assert "kept" in (old_study / "report" / "index.html").read_text()


def test_the_same_file_continues_it(old_study: Path, tiny_file: Path, data_root: Path, tmp_path: Path) -> None:
    file = tmp_path / "kept.toml"
    file.write_text(
        tiny_file.read_text().replace('name = "tiny"', 'name = "kept"').replace("n_trials = 3", "n_trials = 2")
    )
    output = fintx("sweep", file, "--outputs", old_study.parent, "--data-dir", data_root).stdout
    assert "2 of 2 trials finished" in output
    assert len(records.read_all(old_study)) == 2
