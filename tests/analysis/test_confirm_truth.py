"""From bars to the word: a signal in the volume is confirmed, a leak is flagged, and chance is called chance."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from fintx.analysis import confirmation, test_set
from fintx.study import records
from tests.helpers.command import fintx, mistake

pytestmark = pytest.mark.slow

N = 1600
SWEEP = """
[study]
name = "{name}"
question = "Does the volume of yesterday know tomorrow?"
n_trials = 2
n_startup_trials = 2

[data]
assets = ["{name}"]
features = ["volume_ratio_20", "log_return_1"]

[task]
kind = "direction"
horizon = 1

[split]
{split}

[budget]
parameters = "1.2K"

[architecture]
d_model = [8]
n_layers = {{ low = 1, high = 3 }}
n_heads = [1, 2]
d_ff_ratio = [2]

[model]
context_length = 10
patch_length = 1
stride = 1
dropout = 0.0

[train]
batch_size = 64
max_epochs = 6
patience = 6

[space]
"optim.learning_rate" = {{ low = 5e-3, high = 1e-2, log = true }}

[confirm]
top_k = 1
n_seeds = 2
"""


def bars(strength: float) -> str:
    """A random walk whose volume holds `strength` of the sign of the day after the next; 0: of nothing.

    So yesterday's volume knows tomorrow: a model that sees the days before today can learn it, no baseline can.
    """
    rng = np.random.default_rng(0)
    returns = 0.01 * rng.standard_normal(N)
    close = 100 * np.exp(np.cumsum(returns))
    ahead = np.sign(np.append(returns[2:], [1.0, 1.0]))
    volume = np.exp(12 + strength * ahead + 0.5 * rng.standard_normal(N))
    days = np.busday_offset("2010-01-04", np.arange(N), roll="forward").astype(str)
    reach = np.abs(0.002 * rng.standard_normal(N)) + 1e-4
    rows = [
        f"{day},{c * (1 - r / 2):.6f},{c * (1 + r):.6f},{c * (1 - r):.6f},{c:.6f},{v:.0f}"
        for day, c, r, v in zip(days, close, reach, volume, strict=True)
    ]
    return "\n".join(["Date,Open,High,Low,Close,Volume", *rows]) + "\n"


FRACTIONS = 'kind = "fractions"\ntrain = 0.5\nvalidation = 0.3'
WALK_FORWARD = """kind = "walk_forward"
window = "expanding"
validation_start = 2013-01-01
test_start = 2015-01-01
n_folds = 2"""


def swept(name: str, strength: float, tmp_path: Path, *, split: str = FRACTIONS) -> tuple[Path, str]:
    """The folder of a study that was searched and confirmed by one command, and what that printed."""
    (tmp_path / "bars.csv").write_text(bars(strength))
    (tmp_path / "s.toml").write_text(SWEEP.format(name=name, split=split))
    fintx("data", "import", "bars.csv", "--symbol", name, cwd=tmp_path)
    return tmp_path / "outputs" / name, fintx("sweep", "s.toml", cwd=tmp_path).stdout


def test_a_planted_signal_is_confirmed_and_opens_the_test_part(tmp_path):
    folder, output = swept("SIGNAL", 0.5, tmp_path, split=WALK_FORWARD)
    assert "Ahead, not confirmed: the best of" in output and "too good to be true" not in output
    assert re.search(
        r"confirmation of SIGNAL: the best 1 of 2 trials \(\d\), each trained again with the same 2", output
    )
    assert "CONFIRMED: trial" in output and "best, confirmed" in output
    assert re.search(r"by fold.*Ahead in 2 of 2.*by year.*Ahead in 2 of 2", output, re.DOTALL)
    result = confirmation.read(folder)
    assert result.complete and result.n_compared == 2
    (best,) = result.confirmed
    searched = {record.config.seed for record in records.read_all(folder)}
    assert not searched & set(result.seeds)

    before = {path: path.read_bytes() for path in (folder / "confirm").rglob("record.json")}
    again = fintx("confirm", "SIGNAL", cwd=tmp_path).stdout
    assert "2 of 2 done before" in again and {path: path.read_bytes() for path in before} == before
    assert confirmation.read(folder).model_copy(update={"created": ""}) == result.model_copy(update={"created": ""})
    wider = fintx("confirm", folder, "--n-seeds", 3, cwd=tmp_path).stdout
    assert "2 of 3 done before" in wider and confirmation.read(folder).seeds[:2] == result.seeds

    opened = fintx("eval", folder, "--test", cwd=tmp_path).stdout
    assert "opening number 1 is logged" in opened and f"trial {best.trial}, ensemble of 3" in opened
    assert "volatility_logistic" in opened and "had been opened" not in opened
    (opening,) = test_set.read_openings(folder)
    assert opening.confirmed and [each.name for each in opening.models][0] == f"trial {best.trial}, mean of 3 seeds"
    assert all(each.gain.positive for each in opening.models)
    assert opening.first_date >= "2015-01-01" and opening.n_rows > 200
    assert any("scored by the last fold's models" in note for note in opening.notes)
    assert "it had been opened 1 times before" in fintx("eval", folder, "--test", cwd=tmp_path).stdout
    entries = [json.loads(line) for line in (folder / "openings.jsonl").read_text().splitlines()]
    assert [entry["confirmed"] for entry in entries] == [True, True] and len(entries[0]["checkpoints"]) == 3
    for later in (fintx("eval", folder, cwd=tmp_path), fintx("confirm", folder, cwd=tmp_path)):
        assert "has been opened 2 times" in later.stdout.replace("\n", " ")
    assert re.search(r"SIGNAL.* 1 of 1 +2$", fintx("status", cwd=tmp_path).stdout.rstrip())


def test_chance_is_called_chance_and_keeps_the_test_part_sealed(tmp_path):
    folder, output = swept("CHANCE", 0.0, tmp_path)
    first = output[output.index("2 of 2 trials finished") :].splitlines()[1]
    assert first.startswith("No: ")
    assert "NOT CONFIRMED" in output and confirmation.read(folder).confirmed == ()
    refused = mistake("eval", folder, "--test", cwd=tmp_path).replace("\n", " ")
    assert "no trial was confirmed" in refused and "--unconfirmed" in refused
    assert not (folder / "openings.jsonl").exists()


def test_a_planted_leak_is_flagged_as_too_good_to_be_true(tmp_path):
    folder, output = swept("LEAK", 4.0, tmp_path)
    assert records.best_of(records.read_all(folder), minimize=True).best["auc"] > 0.95
    flagged = [line for line in output.splitlines() if "too good to be true" in line]
    assert flagged and all(line.startswith("WARNING: ") for line in flagged)
    assert "WARNING: LEAK: AUC" in fintx("status", cwd=tmp_path).stdout
