"""report, compare and scaling as a user gives them: what they print, where they write, and mistakes in a line."""

from __future__ import annotations

import re

from tests.helpers.command import fintx, mistake
from tests.helpers.planted import event_study, noise_study


def test_report_prints_where_the_page_lies(tiny_study):
    root = tiny_study.parents[1]
    shown = fintx("report", "tiny", "--outputs", tiny_study.parent, "--data-dir", root / "data").stdout
    assert shown.strip() == str(tiny_study / "report" / "index.html")
    assert (tiny_study / "report" / "index.html").is_file()
    shown = fintx("report", tiny_study, "--backtest", "--data-dir", root / "data").stdout
    assert "Costs are 5 basis points" in (tiny_study / "report" / "index.html").read_text()


def test_reports_come_by_pattern_and_mistakes_in_a_line(tmp_path):
    for name in ("a_h3", "b_h3"):
        event_study(tmp_path, name, n_trials=1, n_rows=100)
    shown = fintx("report", str(tmp_path / "*_h3"), "--outputs", tmp_path, "--data-dir", tmp_path).stdout
    assert len(shown.splitlines()) == 2
    assert re.fullmatch(
        r"fintx: nowhere: fits no study under .* \(there: a_h3, b_h3\); give names, folders or a pattern in quotes\n",
        mistake("report", "nowhere", "--outputs", tmp_path),
    )


def test_compare_and_scaling_print_tables_and_refuse_in_lines(tmp_path):
    for name, budget in (("a", "2K"), ("b", "10K"), ("c", "50K")):
        noise_study(tmp_path, name, budget=budget)
    shown = fintx("compare", "a", "b", "--outputs", tmp_path).stdout
    for words in ("Skill of the best trials", "Transfer", "outside the budget", "_compare/a+b/index.html"):
        assert words in shown, words
    shown = fintx("scaling", "a", "b", "c", "--outputs", tmp_path).stdout
    assert re.match(r"(Scales|Flat|Can't tell)\. From 2\.0K to 50\.0K parameters", shown)
    assert "AICc" in shown and "_scaling/a+b+c/index.html" in shown
    noise_study(tmp_path, "d", budget="250K", label_hash="m" * 64)
    message = mistake("scaling", "a", "b", "c", "d", "--outputs", tmp_path)
    assert message.startswith("fintx: no fit: the studies differ in their label hashes")
    assert "wanted two studies or more" in mistake("compare", "a", "--outputs", tmp_path)
