"""From CSV files to an answer, on SPY with VIX: studies, reports, a comparison, a scaling fit, a confirmation.

Few trials of one epoch, so that two cores can do it: what is held here is that every number of the way is there, is
the one that the records hold, and that no page claims more than it may.
"""

from __future__ import annotations

import html
import json
import math
import re
from pathlib import Path

import pytest

from fintx.study import records
from tests.helpers.command import fintx

pytestmark = [pytest.mark.slow, pytest.mark.long]
ROOT = Path(__file__).resolve().parents[2]
HORIZONS = (1, 3, 5)
BUDGETS = ("10K", "60K", "400K")
SHORT = ("train.max_epochs=1", "execution.max_failures=3", 'data.assets=["SPY"]', 'data.context=["VIX"]',
         "data.start=2012-01-01", "study.n_startup_trials=1")  # fmt: skip


def settings(*changes: str) -> list[str]:
    return [part for change in (*SHORT, *changes) for part in ("--set", change)]


@pytest.fixture(scope="module")
def places(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Where data and studies lie, once they are there."""
    root = tmp_path_factory.mktemp("end_to_end")
    data = ["--data-dir", root / "data"]
    for symbol in ("SPY", "VIX"):
        fintx("data", "import", shared_data / f"{symbol}.csv", "--symbol", symbol, *data)
    both = ["--outputs", root / "outputs", *data]
    for h in HORIZONS:
        wide = ("architecture.d_model=[256]", "architecture.n_layers={low=3, high=3}", "study.n_trials=2")
        fintx("sweep", ROOT / "sweeps" / f"2M_h{h}.toml", *both, *settings(*wide))
    for budget in BUDGETS:
        of = (f'study.name="{budget}_h1"', f'budget.parameters="{budget}"', "architecture.d_model=[16, 32, 64]",
              "architecture.n_heads=[2]", "architecture.n_layers={low=1, high=10}", "study.n_trials=3")  # fmt: skip
        fintx("sweep", ROOT / "sweeps" / "2M_h1.toml", *both, *settings(*of))
    return both


def folder(places: list[object], name: str) -> Path:
    return Path(str(places[1])) / name


@pytest.mark.parametrize("h", HORIZONS)
def test_a_report_says_what_was_asked_and_what_came_of_it(places: list[object], h: int) -> None:
    study = folder(places, f"2M_h{h}")
    (page,) = fintx("report", f"2M_h{h}", *places).stdout.split()
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", Path(page).read_text())).split())
    day = "the next trading day" if h == 1 else f"the next {h} trading days"
    for words in ("SPY", "VIX", day, "volatility_touch", "The same probabilities score the opposite event", "sealed"):
        assert words in text, words
    best = min(records.read_all(study), key=lambda record: record.value)
    assert 1.5e6 <= best.param_count <= 2.5e6 and f"{best.param_count:,}" in text
    beaten = json.loads((study / "baselines.json").read_text())
    best_baseline = min(beaten, key=lambda name: beaten[name]["metrics"]["log_loss"])
    first = re.search(r"(No skill|No|Ahead, not confirmed): ", text)
    assert first is not None and best_baseline in text
    if best.value > beaten[best_baseline]["metrics"]["log_loss"]:
        assert first[1] != "Ahead, not confirmed"


def test_horizons_are_compared_by_skill(places: list[object]) -> None:
    shown = fintx("compare", *(f"2M_h{h}" for h in HORIZONS), *places[:2]).stdout
    for h in HORIZONS:
        best = min(records.read_all(folder(places, f"2M_h{h}")), key=lambda record: record.value)
        assert f"{100 * best.best['skill']:.1f}" in shown
    assert "Transfer" in shown
    assert (folder(places, "_compare") / "2M_h1+2M_h3+2M_h5" / "index.html").is_file()


def test_three_budgets_scale_or_are_flat_or_can_not_be_told(places: list[object]) -> None:
    names = [f"{budget}_h1" for budget in BUDGETS]
    shown = fintx("scaling", *names, *places[:2]).stdout
    assert re.match(r"(Scales|Flat|Can't tell)\. From ", shown), shown[:300]
    assert "too few for a fit" in shown  # the frontier's three; all nine trials are enough
    refused = fintx("scaling", "2M_h1", "2M_h3", "2M_h5", *places[:2], code=2).stderr
    assert refused.startswith("fintx: no fit: the studies differ in their labels")


def test_a_confirmation_counts_the_search_and_is_what_the_report_says(places: list[object]) -> None:
    shown = fintx("confirm", "10K_h1", "--top-k", "2", "--n-seeds", "2", *places).stdout
    assert re.search("CONFIRMED|loses", shown)
    found = json.loads((folder(places, "10K_h1") / "confirmation.json").read_text())
    values = [records.read(path).value for path in sorted(folder(places, "10K_h1").glob("confirm/*/*/record.json"))]
    assert len(values) == 4 and all(math.isfinite(value) for value in values)
    (page,) = fintx("report", "10K_h1", *places).stdout.split()
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", Path(page).read_text())).split())
    assert ("NOT CONFIRMED" in text) == ("NOT CONFIRMED" in shown)
    assert found["n_compared"] == 3
