"""Comparison page: what `just compare` writes and prints, several studies side by side."""

from __future__ import annotations

from pathlib import Path

from fintx.analysis.comparison import Comparison, StudyRow
from fintx.analysis.patterns import LEAST_PAIRS, RankCorrelation
from fintx.report import figures, page
from fintx.report.format import (
    count,
    listed,
    metric_words,
    number,
    percent,
    shape_words,
    share_interval,
    share_span,
    span,
)
from fintx.report.page import Block, Page, Prose, Section
from fintx.report.table import Table, make

FOLDER = "_compare"


def write(comparison: Comparison, *, outputs: Path) -> Path:
    """Write outputs/_compare/<studies>/index.html with its files."""
    return page.write(build(comparison), outputs / FOLDER / page.folder_name(row.name for row in comparison.rows))


def build(comparison: Comparison) -> Page:
    """The page as a value."""
    studies, common, transfers, pairs = tables(comparison)
    fill: tuple[Block, ...] = ()
    if commands := missing(comparison):
        fill = (
            Prose("To fill the cells that are not trained (then run those studies again):", "note"),
            Prose(commands, "note"),
        )
    return Page(
        title=" · ".join(row.name for row in comparison.rows),
        kicker="fintx comparison",
        question="Which question can be answered best, does the same shape win, and does a winner win elsewhere too?",
        answer=sentence(comparison),
        tone="open" if any(map(_ahead, comparison.rows)) else "bad",
        warnings=comparison.notes,
        facts=(),
        sections=(
            Section("studies", "Study by study", (*_ladder(comparison), studies)),
            Section("shapes", "The same shapes", (common,)),
            Section("transfer", "Transfer: a winner trained elsewhere", (transfers, *fill)),
            Section("ranks", "Do studies rank shapes alike?", (pairs,)),
        ),
        footer=page.footer(),
    )


def _ahead(row: StudyRow) -> bool:
    return row.comparison is not None and row.comparison.standing == "ahead"


def sentence(comparison: Comparison) -> str:
    """Which study's best trial is ahead of its baseline, and how skills stand."""
    known = [row for row in comparison.rows if row.best_skill is not None]
    order = sorted(known, key=lambda row: -(row.best_skill or 0.0))
    skills = listed([f"{row.name} {percent(row.best_skill)}" for row in order])
    ahead = [row.name for row in comparison.rows if _ahead(row)]
    behind = [row.name for row in comparison.rows if row.comparison is not None and not _ahead(row)]
    words = f"Skill of the best trials: {skills}."
    if ahead:
        words += f" Ahead of the best baseline with confidence, the search's luck not counted: {listed(ahead)}."
    if behind:
        words += f" Not ahead of {'it' if ahead else 'the best baseline'}: {listed(behind)}."
    return words


def missing(comparison: Comparison) -> tuple[str, ...]:
    """Commands that fill the empty cells of the transfer table."""
    return tuple(dict.fromkeys(each.fill for each in comparison.transfers if each.fill.startswith("just ")))


def tables(comparison: Comparison) -> tuple[Table, Table, Table, Table]:
    """A line per study; shapes that several trained; winners elsewhere; pairs of studies."""
    names = [row.name for row in comparison.rows]
    units = ", ".join(dict.fromkeys(metric_words(results.metric) for results in comparison.studies))
    studies = make(
        "studies", "Studies",
        ["study", "budget", "trials", ("rows", "whole"), ("base rate", "percent"), ("best skill", "percent"),
         "interval", "best baseline", ("its skill", "percent"), "lead, of the prior's loss", "best shape", "label",
         "label hash"],
        [
            (row.name, count(row.budget), f"{row.n_finished} of {row.n_trials}", row.n_rows, row.base_rate,
             row.best_skill, None if row.best is None else share_span(*row.best[1:]), row.baseline,
             row.baseline_skill, share_interval(row.lead_share), shape_words(row.shape), row.label,
             row.label_hash[:8])
            for row in comparison.rows
        ],
        note="Skill is the share of the prior's loss that is saved; each study's prior is its own. Intervals: 95 %, "
        "other days. The best of more trials is luckier.",
    )  # fmt: skip
    common = make(
        "same_shapes", "The same shape in several studies",
        ["shape", *((name, "percent") for name in names), "trials"],
        [(shape_words(row.shape), *row.skills, " + ".join(map(str, row.counts))) for row in comparison.common],
        note="Mean skill of the shape's trials in each study." if comparison.common else
        "No shape was trained in two of these studies.",
    )  # fmt: skip
    pairs = make(
        "rank_correlation", "Rank correlation",
        ["studies", "rank correlation of shapes", ("shapes", "whole"), "of cells (width × depth bucket)",
         ("cells", "whole"), "the second's best saves"],
        [
            (f"{pair.first} – {pair.second}", _correlation(pair.shapes), pair.shapes.n, _correlation(pair.cells),
             pair.cells.n,
             pair.difference and f"{number(pair.difference.mean)} "
             f"({span(pair.difference.low, pair.difference.high)})")
            for pair in comparison.pairs
        ],
        note="Spearman's ρ of mean skill with its 95 % interval, over what both studies trained; fewer than "
        f"{LEAST_PAIRS} say nothing. Losses ({units}) are compared only where labels, rows and metrics are equal.",
    )  # fmt: skip
    return studies, common, _transfers(comparison, names), pairs


def _transfers(comparison: Comparison, names: list[str]) -> Table:
    """Rows: whose winner; columns: where it was trained."""
    cells = {(each.winner_of, each.trained_in): each for each in comparison.transfers}
    rows = []
    for a in names:
        line = [f"{a}: {shape_words(cells[a, a].shape)}"]
        for b in names:
            each = cells[a, b]
            if each.skill is None:
                line.append("outside the budget" if "outside the budget" in each.fill else "not trained")
            else:
                behind = "" if not each.behind else f" ({100 * -each.behind:+.1f} pp)".replace("-", "−")
                line.append(f"{percent(each.skill)}{behind}")
        rows.append(line)
    note = "Best skill of the winner's shape in each study; in brackets, against that study's own best."
    return make("transfer", "Transfer", ["winner of", *(f"in {name}" for name in names)], rows, note=note)


def _ladder(comparison: Comparison) -> tuple[Block, ...]:
    def known(row: StudyRow) -> bool:
        return row.best is not None and row.baseline is not None and row.baseline_skill is not None

    rows = [row for row in comparison.rows if known(row)]
    if not rows:
        return ()
    bests = [row.best for row in rows if row.best is not None]
    baselines = [(row.baseline_skill or 0.0, row.baseline or "") for row in rows]
    return (figures.ladder([row.name for row in rows], bests, baselines),)


def _correlation(agreement: RankCorrelation) -> str | None:
    if agreement.rho is None:
        return None
    return f"{agreement.rho:.2f} ({number(agreement.low, 2)} … {number(agreement.high, 2)})"
