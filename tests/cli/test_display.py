"""What the terminal shows: a best trial that isn't ahead is called so, and a narrow terminal breaks nothing in two."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fintx.analysis.predictions import BaselineComparison
from fintx.cli import display
from fintx.cli.terminal import print_lines, print_tables
from fintx.evaluate.significance import Estimate
from fintx.report import format
from fintx.report.table import Table


def comparison_of(mean: float, half: float) -> BaselineComparison:
    difference = Estimate(mean, mean - half, mean + half, half / 2)
    return BaselineComparison("log_loss", "garch_touch", 0.6123, 0.6123 - mean, difference, 1000)


@pytest.mark.parametrize(
    "mean, half, begins, short",
    [
        (-0.01, 0.002, "No: garch_touch is better than the best of 50", "behind"),
        (0.01, 0.02, "No: the best of 50 trials doesn't beat garch_touch with confidence", "can't be told apart"),
        (0.01, 0.002, "Ahead, not confirmed: the best of 50 trials beats garch_touch", "ahead"),
    ],
    ids=["worse", "equal", "better"],
)
def test_the_verdict_is_that_of_the_interval(mean, half, begins, short):
    comparison = comparison_of(mean, half)
    assert format.comparison_verdict(comparison, "the best of 50 trials", "study")[0].startswith(begins)
    assert display.baseline_cells(comparison) == ("garch_touch 0.6123", short)


def test_nothing_to_compare_with_leaves_the_cells_empty():
    assert display.baseline_cells(None) == (None, None)


# --- a narrow terminal ------------------------------------------------------------------------------------------------


def printed(*, terminal: bool, lines: tuple[str, ...] = (), table: Table | None = None) -> list[str]:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=40, color_system=None)
    if table is not None:
        print_tables(console, table)
    print_lines(console, *lines)
    return console.file.getvalue().splitlines()


def test_a_terminal_breaks_lines_between_words_and_leaves_paths_whole():
    path = "/a/folder/whose/name-is-longer/than-the-terminal/is-wide"
    line = f"Records  {path}  (and then some more words that do not fit)"
    assert printed(terminal=True, lines=(line,)) == ["Records", path, "(and then some more words that do not", "fit)"]
    assert printed(terminal=False, lines=(line,)) == [line]


def test_a_narrow_terminal_breaks_heads_and_no_cell():
    table = Table("t", "", ["model", ("average precision", "number"), ("calibration error", "number")],
                  [("garch_touch", 0.5941, 0.0596)])  # fmt: skip
    wide, narrow = printed(terminal=False, table=table), printed(terminal=True, table=table)
    assert wide[0].split() == ["model", "average", "precision", "calibration", "error"]
    assert [line.split() for line in narrow] == [
        ["average", "calibration"], ["model", "precision", "error"], ["garch_touch", "0.5941", "0.0596"],
    ]  # fmt: skip
    assert max(map(len, narrow)) <= 40


def test_a_note_in_square_brackets_is_shown():
    assert "[wide] one" in printed(terminal=False, table=Table("t", "", ["note"], [("[wide] one",)]))[1]
