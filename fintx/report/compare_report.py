"""What does `just compare` write? One page on several studies side by side."""

from __future__ import annotations

from pathlib import Path

from fintx.report import figures_evidence, page, sheet
from fintx.report.answer import percent_interval
from fintx.report.compare import Comparison, Pair
from fintx.report.page import Block, Page, Prose, Section
from fintx.report.ranks import LEAST, Agreement
from fintx.report.sheet import Format, Sheet
from fintx.report.words import count, listed, metric_words, number, percent, shape_words, span

FOLDER = "_compare"


def write(found: Comparison, *, outputs: Path) -> Path:
    """Write outputs/_compare/<studies>/index.html with its files."""
    name = "+".join(row.name for row in found.rows)
    return page.write(build(found), outputs / FOLDER / (name if len(name) <= 120 else f"{name[:110]}+more"))


def build(found: Comparison) -> Page:
    """The page as a value."""
    told = sentence(found)
    ahead = [row for row in found.rows if row.comparison is not None and row.comparison.standing == "ahead"]
    return Page(
        title=" · ".join(row.name for row in found.rows),
        kicker="fintx comparison",
        question="Which question can be answered best, does the same shape win, and does a winner win elsewhere too?",
        answer=told,
        tone="open" if ahead else "bad",
        warnings=found.notes,
        facts=(),
        sections=(
            Section("studies", "Study by study", (*_ladder(found), studies_sheet(found))),
            Section("shapes", "The same shapes", (common_sheet(found),)),
            Section("transfer", "Transfer: a winner trained elsewhere", (transfer_sheet(found), *_fills(found))),
            Section("ranks", "Do studies rank shapes alike?", (pairs_sheet(found),)),
        ),
        footer=page.footer(),
    )


def sentence(found: Comparison) -> str:
    """Which study's best trial is ahead of its baseline, and how skills stand."""
    known = [row for row in found.rows if row.best_skill is not None]
    order = sorted(known, key=lambda row: -(row.best_skill or 0.0))
    said = listed([f"{row.name} {percent(row.best_skill)}" for row in order])
    ahead = [row.name for row in found.rows if row.comparison is not None and row.comparison.standing == "ahead"]
    behind = [row.name for row in found.rows if row.comparison is not None and row.comparison.standing != "ahead"]
    words = f"Skill of the best trials: {said}."
    if ahead:
        words += f" Ahead of the best baseline with confidence, the search's luck not counted: {listed(ahead)}."
    if behind:
        words += f" Not ahead of {'it' if ahead else 'the best baseline'}: {listed(behind)}."
    return words


def sheets(found: Comparison) -> tuple[Sheet, ...]:
    """All tables, for the terminal."""
    return (studies_sheet(found), common_sheet(found), transfer_sheet(found), pairs_sheet(found))


def studies_sheet(found: Comparison) -> Sheet:
    """A line per study."""
    rows = [
        (
            row.name, count(row.budget), f"{row.n_finished} of {row.n_trials}", row.n_rows, row.base_rate,
            row.best_skill, None if row.best is None else f"{100 * row.best[1]:.1f} … {100 * row.best[2]:.1f} %",
            row.rival, row.rival_skill, percent_interval(row.lead_share), shape_words(row.shape), row.label,
            row.label_hash[:8],
        )
        for row in found.rows
    ]  # fmt: skip
    columns: list[tuple[str, Format]] = [
        ("study", "text"), ("budget", "text"), ("trials", "text"), ("rows", "whole"), ("base rate", "percent"),
        ("best skill", "percent"), ("interval", "text"), ("best baseline", "text"), ("its skill", "percent"),
        ("lead, of the prior's loss", "text"), ("best shape", "text"), ("label", "text"), ("label hash", "text"),
    ]  # fmt: skip
    note = (
        "Skill is the share of the prior's loss that is saved; each study's prior is its own. Intervals: 95 %, other "
        "days. The best of more trials is luckier."
    )
    return sheet.of("studies", "Studies", columns, rows, note=note)


def _ladder(found: Comparison) -> tuple[Block, ...]:
    known = [
        row for row in found.rows if row.best is not None and row.rival is not None and row.rival_skill is not None
    ]
    if not known:
        return ()
    return (
        figures_evidence.ladder(
            [row.name for row in known],
            [row.best for row in known if row.best is not None],
            [(row.rival_skill or 0.0, row.rival or "") for row in known],
        ),
    )


def common_sheet(found: Comparison) -> Sheet:
    """Shapes that several studies trained."""
    names = [row.name for row in found.rows]
    columns: list[tuple[str, Format]] = [("shape", "text"), *((name, "percent") for name in names), ("trials", "text")]
    rows = [(shape_words(row.shape), *row.skills, " + ".join(map(str, row.counts))) for row in found.common]
    note = (
        "Mean skill of the shape's trials in each study." if rows else "No shape was trained in two of these studies."
    )
    return sheet.of("same_shapes", "The same shape in several studies", columns, rows, note=note)


def transfer_sheet(found: Comparison) -> Sheet:
    """Rows: whose winner; columns: where it was trained."""
    names = [row.name for row in found.rows]
    cells = {(each.winner_of, each.trained_in): each for each in found.transfers}
    rows = []
    for a in names:
        line: list[object] = [f"{a}: {shape_words(cells[a, a].shape)}"]
        for b in names:
            each = cells[a, b]
            if each.skill is None:
                line.append("outside the budget" if "outside the budget" in each.fill else "not trained")
            else:
                behind = "" if not each.behind else f" ({100 * -each.behind:+.1f} pp)".replace("-", "−")
                line.append(f"{percent(each.skill)}{behind}")
        rows.append(line)
    columns: list[tuple[str, Format]] = [("winner of", "text"), *((f"in {name}", "text") for name in names)]
    note = "Best skill of the winner's shape in each study; in brackets, against that study's own best."
    return sheet.of("transfer", "Transfer", columns, rows, note=note)


def _fills(found: Comparison) -> tuple[Block, ...]:
    commands = fills(found)
    if not commands:
        return ()
    how = Prose("To fill the cells that are not trained (then run those studies again):", "note")
    return how, Prose(commands, "note")


def fills(found: Comparison) -> tuple[str, ...]:
    """Commands that fill the empty cells of the transfer table."""
    return tuple(dict.fromkeys(each.fill for each in found.transfers if each.fill.startswith("just ")))


def pairs_sheet(found: Comparison) -> Sheet:
    """A line per pair of studies."""
    rows = [
        (
            f"{pair.first} – {pair.second}", _agreed(pair.shapes), pair.shapes.n, _agreed(pair.cells), pair.cells.n,
            _saved(pair),
        )
        for pair in found.pairs
    ]  # fmt: skip
    columns: list[tuple[str, Format]] = [
        ("studies", "text"), ("rank correlation of shapes", "text"), ("shapes", "whole"),
        ("of cells (width × depth bucket)", "text"), ("cells", "whole"), ("the second's best saves", "text"),
    ]  # fmt: skip
    units = ", ".join(dict.fromkeys(metric_words(each.metric) for each in found.studies))
    note = (
        f"Spearman's ρ of mean skill with its 95 % interval, over what both studies trained; fewer than {LEAST} say "
        f"nothing. Losses ({units}) are compared only where labels, rows and metrics are equal."
    )
    return sheet.of("rank_correlation", "Rank correlation", columns, rows, note=note)


def _agreed(found: Agreement) -> str | None:
    return None if found.rho is None else f"{found.rho:.2f} ({number(found.low, 2)} … {number(found.high, 2)})"


def _saved(pair: Pair) -> str | None:
    found = pair.difference
    return None if found is None else f"{number(found.mean)} ({span(found.low, found.high)})"
