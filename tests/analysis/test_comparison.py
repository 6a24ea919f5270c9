"""Studies side by side: skill, shapes in common, transfers, and commands for what is missing."""

from __future__ import annotations

import numpy as np
import pytest

from fintx.analysis import comparison, study_results
from fintx.errors import FintxError
from fintx.report import comparison_page
from fintx.report.table import Table
from tests.helpers import planted
from tests.helpers.planted import return_study

SIGMA = 0.01


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """Two horizons with the same shapes, a third with others, and a fourth of another budget."""
    root = tmp_path_factory.mktemp("compare")
    return [
        return_study(root, "h1", label_hash="a" * 64),
        return_study(root, "h3", seed=1, horizon=3, label_hash="b" * 64, excess=0.1),
        return_study(root, "h5", seed=2, shapes_seed=5, horizon=5, label_hash="c" * 64, n_trials=3),
        return_study(root, "big_h1", budget="50K", label_hash="a" * 64, excess=0.01),
    ]


@pytest.fixture(scope="module")
def result(studies):
    return comparison.read(studies)


def test_skills_stand_beside_baselines_with_intervals(result):
    for row in result.rows:
        mean, low, high = row.best
        assert low < mean < high and mean == pytest.approx(row.best_skill, abs=1e-6)
        assert row.baseline == "volatility_linear"
    assert (
        result.rows[0].comparison.standing == result.rows[3].comparison.standing == "ahead"
    )  # by .19 and .23 σ² per row
    # Skill: 1 − (1 + excess) / 1.3 for the truth.
    assert result.rows[0].best[1] < 1 - 1.05 / 1.3 < result.rows[0].best[2]


def test_losses_are_compared_only_where_labels_are_equal(result, tmp_path):
    differences = {(pair.first, pair.second): pair.difference for pair in result.pairs}
    assert differences["h1", "big_h1"] is not None
    # The same target, excess .01 against .05, in units of σ².
    gain = differences["h1", "big_h1"]
    assert gain.low < 0.04 * SIGMA**2 < gain.high
    assert all(value is None for pair, value in differences.items() if pair != ("h1", "big_h1"))
    assert "Equal labels: h1 = big_h1" in result.notes[0]
    page = comparison_page.build(result, outputs=tmp_path)
    tables = [block for section in page.sections for block in section.blocks if isinstance(block, Table)]
    assert len(tables) == 4 and not any("mse" in table.csv for table in tables)


def test_the_same_shapes_are_found_across_horizons(result, studies):
    a, b = (study_results.read(folder) for folder in studies[:2])
    both = {r.config.shape for r in a.records} & {r.config.shape for r in b.records}
    assert {row.shape for row in result.common} >= both
    first = result.common[0]
    assert first.skills[0] is not None and first.skills[1] is not None
    pair = next(pair for pair in result.pairs if (pair.first, pair.second) == ("h1", "h3"))
    assert pair.shapes.n == len({r.config.shape for r in a.records})
    # Trials lose with their number in both studies, so that shapes rank alike.
    assert pair.shapes.low > 0


def test_transfers_say_how_to_fill_them(result):
    cells = {(each.winner_of, each.trained_in): each for each in result.transfers}
    assert len(cells) == 16
    assert all(cells[name, name].behind == 0 for name in ("h1", "h3", "h5", "big_h1"))
    assert cells["h1", "h3"].skill is not None and cells["h1", "h3"].behind >= 0
    assert "parameters lie outside the budget 37,500 … 62,500" in cells["h1", "big_h1"].fill
    shape = cells["h5", "h5"].shape
    wanted = (
        f"just queue add sweeps/h1.toml --d-model {shape.d_model} --n-layers {shape.n_layers} "
        f"--n-heads {shape.n_heads} --d-ff {shape.d_ff}"
    )
    assert cells["h5", "h1"].skill is not None or cells["h5", "h1"].fill == wanted
    assert any(transfer.fill.startswith("just queue add sweeps/") for transfer in result.transfers)


def test_the_page_holds_it_all(result, tmp_path):
    target = comparison_page.build(result, outputs=tmp_path).write()
    assert target == tmp_path / "_compare" / "h1+h3+h5+big_h1" / "index.html"
    text = target.read_text()
    for words in ("Skill of the best trials", "Rank correlation", "outside the budget", "just queue add"):
        assert words in text
    assert {path.name for path in (target.parent / "tables").iterdir()} == {
        "studies.csv", "same_shapes.csv", "transfer.csv", "rank_correlation.csv",
    }  # fmt: skip


def test_what_can_not_be_compared_is_reported(studies, tmp_path):
    with pytest.raises(FintxError, match="wanted two studies or more"):
        comparison.read(studies[:1])
    nothing = return_study(tmp_path, "nothing", n_trials=2, failed=[0, 1])
    with pytest.raises(FintxError, match=r"nothing: has no successful trial yet \(2 finished\)"):
        comparison.read([studies[0], nothing])
    n = 300
    rng = np.random.default_rng(0)
    spec = planted.spec_of(tmp_path / "files", "events", task=planted.THRESHOLD)
    prior = np.full(n, -0.2)
    events = planted.write_study(
        tmp_path, spec, lambda i, k: rng.normal(size=n), labels=(rng.random(n) < 0.45).astype(float),
        baselines={"prior": prior, "volatility_logistic": prior + 0.1 * rng.normal(size=n)}, n_trials=2,
    )  # fmt: skip
    with pytest.raises(FintxError, match="skills are of different losses"):
        comparison.read([studies[0], events])
