"""Comparison page: what `just compare` prints and writes, several studies side by side."""

from __future__ import annotations

from pathlib import Path

from fintx.analysis.comparison import Comparison
from fintx.analysis.patterns import LEAST_PAIRS, RankCorrelation
from fintx.report import figures, format
from fintx.report.format import number, percent, percent_interval, percent_span, shape_words, span
from fintx.report.page import Block, Page, Prose, Section, folder_name
from fintx.report.table import Table


def build(comparison: Comparison, *, outputs: Path) -> Page:
    """The page, to be written to outputs/_compare/<studies>."""
    names = [row.name for row in comparison.rows]
    ladder: list[Block] = []
    if complete := [row for row in comparison.rows if row.best and row.baseline and row.baseline_skill is not None]:
        ladder = [figures.plot_skill_ladder(complete)]
    transfers: list[Block] = [_transfer_table(comparison)]
    if commands := tuple(dict.fromkeys(t.fill for t in comparison.transfers if t.fill.startswith("just "))):
        note = "To fill the cells that are not trained, give these commands and run those studies again:"
        transfers += [Prose(note, "note"), Prose(commands, "command")]
    return Page(
        folder=outputs / "_compare" / folder_name(names),
        title=" · ".join(names),
        kicker="fintx comparison",
        question="Which question can be answered best, does the same shape win, and does a winner win elsewhere too?",
        answer=answer(comparison),
        tone="open" if any(row.comparison and row.comparison.standing == "ahead" for row in comparison.rows) else "bad",
        warnings=comparison.notes,
        sections=(
            Section("studies", "Study by study", (*ladder, _study_table(comparison))),
            Section("shapes", "The same shapes", (_shape_table(comparison),)),
            Section("transfer", "Transfer: a winner trained elsewhere", tuple(transfers)),
            Section("ranks", "Do studies rank shapes alike?", (_rank_table(comparison),)),
        ),
    )


def answer(comparison: Comparison) -> str:
    """The skills of the studies' best trials, and which of them are ahead of their best baseline."""
    rows = sorted(comparison.rows, key=lambda row: -(row.best_skill or 0.0))
    skills = format.listed([f"{row.name} {percent(row.best_skill)}" for row in rows if row.best_skill is not None])
    compared = [(row.name, row.comparison.standing) for row in comparison.rows if row.comparison is not None]
    ahead = [name for name, standing in compared if standing == "ahead"]
    behind = [name for name, standing in compared if standing != "ahead"]
    text = f"Skill of the best trials: {skills}."
    if ahead:
        text += f" Ahead of the best baseline with confidence, luck in the search not counted: {format.listed(ahead)}."
    if behind:
        text += f" Not ahead of {'it' if ahead else 'the best baseline'}: {format.listed(behind)}."
    return text


def _study_table(comparison: Comparison) -> Table:
    return Table(
        "studies", "Studies",
        ["study", "budget", "trials", ("rows", "whole"), ("base rate", "percent"), ("best skill", "percent"),
         "interval", "best baseline", ("its skill", "percent"), "gain, of the prior's loss", "best shape", "label",
         "label hash"],
        [
            (row.name, format.count(row.budget), f"{row.n_finished} of {row.n_trials}", row.n_rows, row.base_rate,
             row.best_skill, None if row.best is None else percent_span(*row.best[1:]), row.baseline,
             row.baseline_skill, percent_interval(row.gain_share), shape_words(row.shape), row.label,
             row.label_hash[:8])
            for row in comparison.rows
        ],
        note="Skill is the share of the prior's loss that is saved; each study has a prior of its own. Intervals: "
        "95 %, over other days. The best of more trials is luckier.",
    )  # fmt: skip


def _shape_table(comparison: Comparison) -> Table:
    return Table(
        "same_shapes", "The same shape in several studies",
        ["shape", *((row.name, "percent") for row in comparison.rows), "trials"],
        [(shape_words(row.shape), *row.skills, " + ".join(map(str, row.counts))) for row in comparison.common],
        note="Mean skill of the shape's trials in each study." if comparison.common else
        "No shape was trained in two of these studies.",
    )  # fmt: skip


def _transfer_table(comparison: Comparison) -> Table:
    """Rows: whose winner; columns: where it was trained."""
    names = [row.name for row in comparison.rows]
    transfers = {(transfer.winner_of, transfer.trained_in): transfer for transfer in comparison.transfers}
    rows = []
    for winner_of in names:
        row = [f"{winner_of}: {shape_words(transfers[winner_of, winner_of].shape)}"]
        for trained_in in names:
            transfer = transfers[winner_of, trained_in]
            if transfer.skill is None:
                row.append("outside the budget" if "outside the budget" in transfer.fill else "not trained")
            else:
                behind = f" ({format.points(-transfer.behind)})" if transfer.behind else ""
                row.append(f"{percent(transfer.skill)}{behind}")
        rows.append(row)
    note = "Best skill of the winner's shape in each study; in brackets, against that study's own best."
    return Table("transfer", "Transfer", ["winner of", *(f"in {name}" for name in names)], rows, note=note)


def _rank_table(comparison: Comparison) -> Table:
    units = ", ".join(dict.fromkeys(format.metric_words(results.metric) for results in comparison.studies))
    return Table(
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


def _correlation(correlation: RankCorrelation) -> str | None:
    if correlation.rho is None:
        return None
    return f"{correlation.rho:.2f} ({number(correlation.low, 2)} … {number(correlation.high, 2)})"
