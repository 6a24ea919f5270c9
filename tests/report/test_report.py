"""The study's report: what it says of known truths, of half-finished and damaged studies, and that it stands alone."""

from __future__ import annotations

import csv
import html
import io
import re
import shutil
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from fintx.analysis import study_analysis, study_results
from fintx.errors import FintxError
from fintx.evaluate import direction
from fintx.evaluate.backtest import TradingRules
from fintx.report import figures, format, study_page
from fintx.report.page import Page, Prose, Section, Text
from fintx.report.table import Table
from fintx.study import records, study_file
from tests.helpers import planted
from tests.helpers.planted import event_study

SECTIONS = ("asked", "baselines", "confirmation", "direction", "calibration", "search", "patterns", "outcomes", "test",
            "origin")  # fmt: skip


def report(folder, **options):
    """The page of a study, from its folder."""
    return study_page.build(study_analysis.read(folder, **options)).write()


def verdict_of(folder):
    """The page's first sentence, and whether it is good news."""
    return format.study_verdict(study_results.read(folder), None)


# --- the answer -------------------------------------------------------------------------------------------------------


def test_a_baseline_that_is_truly_best_is_called_best(tmp_path):
    sentence, tone = verdict_of(event_study(tmp_path, skill=0.3, baseline_skill=1.0, n_trials=12))
    assert tone == "bad"
    assert sentence.startswith("No: volatility_logistic is better than the best of 12 trials, trial ")
    assert re.search(r"which loses 0\.\d+ nats per row \(95 % interval of what it saves −0\.\d+ … −0\.\d+\)", sentence)


def test_a_trial_that_is_truly_better_is_ahead_but_not_confirmed(tmp_path):
    sentence, tone = verdict_of(event_study(tmp_path, skill=1.0, baseline_skill=0.2, n_trials=12))
    assert tone == "open"
    assert sentence.startswith("Ahead, not confirmed: the best of 12 trials")
    assert (
        "run `just confirm events` before you believe it" in sentence
        and "(by chance the best of as many equal trials looks" in sentence
    )


def test_a_trial_as_good_as_the_baseline_does_not_beat_it(tmp_path):
    sentence, tone = verdict_of(event_study(tmp_path, skill=0.8, baseline_skill=0.8, n_trials=1))
    assert sentence.startswith("No: ") and tone == "bad"


def test_shuffled_labels_are_no_skill(tmp_path):
    rng = np.random.default_rng(3)
    n = 900
    spec = planted.spec_of(tmp_path / "files", "shuffled", task=planted.THRESHOLD)
    labels = (rng.random(n) < 0.45).astype(float)
    beaten = {"prior": np.full(n, -0.2), "volatility_logistic": -0.2 + 0.05 * rng.normal(size=n)}
    folder = planted.write_study(
        tmp_path, spec, lambda i, k: -0.2 + 0.2 * rng.normal(size=n), labels=labels, baselines=beaten, n_trials=12
    )
    assert verdict_of(folder)[0].startswith("No skill: the best of 12 trials")


def test_a_planted_leak_is_too_good_to_be_true(tmp_path):
    rng = np.random.default_rng(4)
    n = 600
    spec = planted.spec_of(tmp_path / "files", "leak", task=planted.THRESHOLD)
    labels = (rng.random(n) < 0.45).astype(float)
    beaten = {"prior": np.full(n, -0.2), "volatility_logistic": -0.2 + 0.05 * rng.normal(size=n)}
    folder = planted.write_study(
        tmp_path,
        spec,
        lambda i, k: 6 * (labels - 0.5) + rng.normal(size=n),
        labels=labels,
        baselines=beaten,
        n_trials=3,
    )
    built = study_page.build(study_analysis.read(folder, data_root=tmp_path))
    assert any("too good to be true" in words for words in built.warnings)
    assert "too good to be true" in report(folder, data_root=tmp_path).read_text()


# --- half-finished and damaged studies --------------------------------------------------------------------------------


def test_an_unfinished_study_is_reported_as_far_as_it_goes(tmp_path):
    folder = event_study(tmp_path, n_trials=2, asset="NONE")
    text = report(folder, data_root=tmp_path / "nowhere").read_text()
    assert "The study is unfinished: 2 of 12 trials." in text
    assert all(f'id="{name}"' in text for name in SECTIONS)
    assert "The study&#39;s data are not here" in text and "The mirror test needs the study" in text


def test_a_study_of_failures_alone_is_reported(tmp_path):
    folder = event_study(tmp_path, n_trials=2, failed=[0, 1])
    text = report(folder, data_root=tmp_path).read_text()
    assert "No trial has succeeded yet: 2 diverged." in text and "the loss became NaN" in text


def test_a_study_without_finished_trials_says_so_in_a_line(tmp_path):
    folder = event_study(tmp_path, n_trials=0)
    with pytest.raises(FintxError, match=r"events: has no finished trial yet; run it") as caught:
        report(folder, data_root=tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(FintxError, match="holds no study"):
        report(tmp_path, data_root=tmp_path)


def test_mixed_labels_are_refused_in_a_line(tmp_path):
    folder = event_study(tmp_path, n_trials=3)
    other = event_study(tmp_path / "other", n_trials=5, label_hash="m" * 64)
    for number in (3, 4):
        shutil.copytree(records.trial_folder(other, number), records.trial_folder(folder, number))
    with pytest.raises(FintxError) as caught:
        report(folder, data_root=tmp_path)
    message = str(caught.value)
    assert "llllllllllll: trial 0, trial 1, trial 2; mmmmmmmmmmmm: trial 3, trial 4" in message and "\n" not in message


def test_missing_predictions_are_named_and_the_rest_is_reported(tmp_path):
    folder = event_study(tmp_path, n_trials=4)
    (records.trial_folder(folder, 1) / "predictions.parquet").unlink()
    text = report(folder, data_root=tmp_path).read_text()
    assert "predictions.parquet is missing of trial 1 (ran on planted)" in text
    (folder / "baselines.parquet").unlink()
    text = report(folder, data_root=tmp_path).read_text()
    assert "baselines.parquet is missing: nothing can be compared row by row" in text
    assert "Not decided: the best of 4 trials" in text


def test_damaged_predictions_are_an_error_with_their_name(tmp_path):
    folder = event_study(tmp_path, n_trials=2)
    (records.trial_folder(folder, 1) / "predictions.parquet").write_bytes(b"torn")
    with pytest.raises(FintxError, match=r"0001/predictions\.parquet: holds no predictions of fintx"):
        report(folder, data_root=tmp_path)


def test_regression_studies_have_their_own_report(tmp_path):
    rng = np.random.default_rng(0)
    signal = rng.normal(0, 0.005, 300)
    target = signal + rng.normal(0, 0.01, 300)
    spec = planted.spec_of(tmp_path / "files", "returns")
    folder = planted.write_study(
        tmp_path, spec, lambda i, n: signal + rng.normal(0, 0.002, 300), labels=target,
        baselines={"prior": np.zeros(300), "zero": np.zeros(300), "volatility_linear": signal * 0.3}, n_trials=3,
    )  # fmt: skip
    text = report(folder, data_root=tmp_path).read_text()
    assert "of squared error per row" in text and 'id="direction"' not in text and "sign accuracy" in text
    assert "Conformal intervals" in text and "adaptive" in text


# --- the page ---------------------------------------------------------------------------------------------------------


def test_a_real_study_is_reported_whole(tiny_study):
    target = report(tiny_study, data_root=tiny_study.parents[1] / "data")
    text = html.unescape(target.read_text())
    assert all(f'id="{name}"' in text for name in SECTIONS)
    for words in (
        "Does the smallest model that trains in a second learn anything?",
        "1 if the highest high of the next 3 trading days",
        "The same probabilities score the opposite event", "sealed", "never been opened", "Nothing is confirmed yet",
        '"optim.learning_rate" = { low', "orbax-checkpoint",
    ):  # fmt: skip
        assert words in text, words
    names = {path.name for path in (target.parent / "figures").iterdir()}
    for name in ("history", "slices", "shape_map", "learning_curves", "reliability", "forest", "cumulative_gain"):
        assert {f"{name}.svg", f"{name}.png"} <= names
    for path in (target.parent / "tables").iterdir():
        assert list(csv.reader(io.StringIO(path.read_text())))[0], path.name
    rows = list(csv.DictReader((target.parent / "tables" / "all_trials.csv").read_text().splitlines()))
    best = min(records.read_all(tiny_study), key=lambda record: record.value)
    assert int(rows[0]["trial"]) == best.trial_number and float(rows[0]["log_loss"]) == best.value


def test_the_file_needs_nothing_else(tiny_study):
    text = report(tiny_study, data_root=tiny_study.parents[1] / "data").read_text()
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert not re.search(r"https?:|<script|@import|<img|srcset|url\((?!#)", without_names)
    links = set(re.findall(r'(?:href|src)="([^"#][^"]*)"', text)) - {"data:,"}
    assert all(re.fullmatch(r"(figures|tables)/[\w.]+", link) for link in links), links
    here = tiny_study / "report"
    assert all((here / link).is_file() for link in links)


def test_a_second_report_replaces_the_first(tiny_study):
    data = tiny_study.parents[1] / "data"
    target = report(tiny_study, data_root=data)
    (target.parent / "figures" / "stale.svg").write_text("old")
    before = {path.name: path.read_bytes() for path in target.parent.rglob("*.*g")}
    report(tiny_study, data_root=data)
    after = {path.name: path.read_bytes() for path in target.parent.rglob("*.*g")}
    assert "stale.svg" not in after
    assert {name: before[name] for name in after} == after  # the same study gives the same pictures


def test_what_a_file_says_can_not_write_into_the_page(tmp_path):
    evil = '<script>alert(1)</script><b title="x">'
    made = Page(
        folder=tmp_path / "p", title=evil, kicker=evil, question=evil, answer=evil, tone="open", warnings=(evil,),
        facts=((evil, evil),),
        sections=(Section("s", evil, (Prose(evil), Prose((evil,)), Text(evil, evil),
                                      Table("t", evil, [(evil, "text")], [[evil]], note=evil))),),
    )  # fmt: skip
    text = made.render()
    assert Page(tmp_path, "", "", "", "run `a < b`", "open", ()).render().count("run <code>a &lt; b</code>") == 1
    assert "<script" not in text and '<b title="x">' not in text and text.count("&lt;script&gt;") >= 12
    assert made.write().is_file()


def test_a_page_that_can_not_be_written_says_where(tmp_path):
    (tmp_path / "file").write_text("")
    made = Page(tmp_path / "file", "t", "k", "", "a", "open", ())
    with pytest.raises(FintxError, match=r"file/index\.html: can't be written"):
        made.write()


def test_figures_are_svg_in_the_pages_colours():
    with figures.canvas(height=3) as figure:
        axes = figure.subplots()
        axes.plot([1, 2], [3, 4], color=figures.BLUE)
        axes.set_xlabel("x")
        made = figures.picture(figure, "name", "title", "caption")
    tree = ET.fromstring(made.inline)
    assert tree.tag.endswith("svg") and "width" not in tree.attrib
    assert "var(--blue)" in made.inline and figures.BLUE in made.svg and figures.BLUE not in made.inline
    ids = re.findall(r'\bid="([^"]*)"', made.inline)
    assert ids and all(each.startswith("name-") for each in ids)
    assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', made.inline)) <= {
        pair for each in ids for pair in ((each, ""), ("", each))
    }
    assert made.png.startswith(b"\x89PNG")


def test_labels_are_moved_apart_and_keep_their_order():
    moved = figures.keep_apart([0.5, 0.51, 0.9, 0.49], 0.06)
    assert sorted(range(4), key=lambda i: moved[i]) == [3, 0, 1, 2]
    ordered = sorted(moved)
    assert all(b - a >= 0.06 - 1e-6 for a, b in zip(ordered, ordered[1:], strict=False))


def test_tables_show_words_and_keep_numbers():
    made = Table("t", "T", [("a", "text"), ("b", "number"), ("c", "percent"), ("d", "whole")],
                    [["x", -0.5, 0.123, 1234], [None, None, None, None]])  # fmt: skip
    assert made.cells == [["x", "−0.5000", "12.3 %", "1,234"], ["–"] * 4]
    assert made.csv.splitlines() == ["a,b,c,d", "x,-0.5,0.123,1234", ",,,"]


def test_the_door_is_shut_to_scripts(tiny_study):
    """Every picture of the page parses as XML, and none holds a script or an outside address."""
    for path in (tiny_study / "report" / "figures").glob("*.svg"):
        tree = ET.parse(path)
        assert not [each for each in tree.iter() if str(each.tag).endswith(("script", "image", "foreignObject"))]


def test_a_backtest_is_off_until_asked_for_and_prints_its_assumptions(tiny_study):
    data = tiny_study.parents[1] / "data"
    asked = report(tiny_study, data_root=data, rules=TradingRules(cost_bp=7)).read_text()
    for words in (
        'id="backtest"',
        "Costs are 7 basis points per side",
        "buy and hold",
        "Deflated Sharpe ratio, with all 3",
    ):
        assert words in asked, words
    assert "no evidence of more than luck" in asked or "evidence of more than luck" in asked
    assert 'id="backtest"' not in report(tiny_study, data_root=data).read_text()


def test_openings_of_the_test_part_are_listed(tmp_path):
    folder = event_study(tmp_path, n_trials=2)
    for confirmed in (True, False):
        study_file.log_opening(folder, {"confirmed": confirmed, "models": ["trial 1"], "checkpoints": []})
    text = report(folder, data_root=tmp_path).read_text()
    assert "The sealed test part was opened 2 times." in text and "it is no longer a test" in text


def test_direction_is_told_from_volatility(tmp_path):
    """A forecast of moves alone scores both events alike; one that knows the side does not."""
    rng = np.random.default_rng(5)
    n = 800
    size, side = rng.normal(size=n), rng.normal(size=n)
    up = (rng.random(n) < 1 / (1 + np.exp(-(size + side)))).astype(float)
    down = (rng.random(n) < 1 / (1 + np.exp(-(size - side)))).astype(float)
    blind = direction.mirror_test(size, up, down, horizon=1)
    seeing = direction.mirror_test(size + side, up, down, horizon=1)
    assert "no knowledge of direction is shown" in study_page.mirror_words(blind)
    assert "more than chance" in study_page.mirror_words(seeing)
