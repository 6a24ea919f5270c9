"""A report needs nothing but its own file; what can't be judged is refused in a line; planted laws are said."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest

from fintx.report import compare, evidence, scaling_report, study_report
from fintx.study import records
from fintx.types import FintxError
from tests.report import planted

N = 800


def study(outputs, name, *, budget="10K", excess=lambda n: 0.05, **how):
    """A regression study whose models miss the truth by `excess(parameters)` of the noise's variance."""
    rng = np.random.default_rng(0)
    signal, noise = 0.3 * rng.normal(size=N), rng.normal(size=N)

    def predict(number: int, parameters: int) -> np.ndarray:
        own = np.random.default_rng([number, parameters])
        return signal + np.sqrt(excess(parameters)) * own.normal(size=N)

    spec = planted.spec_of(outputs.parent / "files", name, budget=budget)
    return planted.write_study(
        outputs, spec, predict, labels=signal + noise,
        baselines={"prior": np.zeros(N), "zero": np.zeros(N), "volatility_linear": 0.1 * signal}, **how,
    )  # fmt: skip


def test_a_page_stands_alone_with_its_figures_and_tables(tmp_path):
    folder = study(tmp_path / "outputs", "planted", failed=(3,))
    page = study_report.write(folder, data_root=tmp_path / "data")
    text = page.read_text()
    assert "What is planted here?" in text and "<svg" in text and "diverged" in text
    assert not re.search(r'(?:src="(?!data:)|href="(?:https?:)?//|url\(http)', text) and "<script" not in text
    assert len(list((page.parent / "figures").glob("*.png"))) >= 3 and list((page.parent / "tables").glob("*.csv"))


def test_what_cannot_be_judged_is_one_line(tmp_path):
    outputs = tmp_path / "outputs"
    with pytest.raises(FintxError, match="holds no study"):
        evidence.read(outputs / "nothing")
    with pytest.raises(FintxError, match="no finished trial"):
        evidence.read(study(outputs, "empty", n_trials=0))
    mixed = study(outputs, "mixed")
    other = study(outputs, "other", label_hash="m" * 64)
    shutil.copytree(records.trial_folder(other, 0), records.trial_folder(mixed, 99))
    with pytest.raises(FintxError, match="different labels"):
        evidence.read(mixed)
    with pytest.raises(FintxError):
        compare.read([other])


def test_missing_predictions_are_noted_and_left_out(tmp_path):
    folder = study(tmp_path / "outputs", "planted")
    (records.trial_folder(folder, 2) / "predictions.parquet").unlink()
    found = evidence.read(folder)
    assert 2 not in found.outputs and any("trial 2" in note for note in found.notes)


@pytest.mark.slow
@pytest.mark.parametrize(("law", "word"), [(lambda n: 300 * n**-0.9, "scales"), (lambda n: 0.02, "flat")])
def test_a_planted_law_is_said(tmp_path, law, word):
    outputs = tmp_path / "outputs"
    folders = [study(outputs, f"s{budget}", budget=budget, excess=law) for budget in ("3K", "12K", "50K", "200K")]
    found = scaling_report.read(folders, over="parameters", difference=0.05)
    assert found.word == word, found.sentence
