"""Tables: rows of plain values with a format per column, rendered alike by the terminal, a page and a CSV file.

Below: the tables that both the terminal and a page show, of data and split, scores, and a confirmation.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fintx.evaluate import metrics, significance
from fintx.evaluate.significance import Estimate
from fintx.report import format

if TYPE_CHECKING:  # importing these takes seconds
    from fintx.analysis.confirmation import Confirmation
    from fintx.analysis.test_set import TestOpening
    from fintx.data.datasets import PreparedData

CellFormat = Literal["text", "whole", "number", "percent", "points", "size", "bytes", "seconds"]
Column = str | tuple[str, CellFormat]
"""A head with the format of its cells; a head alone holds text."""

_FORMATS = {
    "whole": "{:,.0f}".format,
    "number": format.number,
    "percent": format.percent,
    "points": format.points,
    "size": format.count,
    "bytes": format.size,
    "seconds": format.duration,
}


@dataclass(frozen=True)
class Table:
    """A table, its cells as values."""

    name: str
    """File stem of its CSV."""
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    """What a reader must know to read it correctly."""
    marked: Sequence[int] = ()
    """Rows to highlight."""

    @property
    def formats(self) -> list[CellFormat]:
        """Format of each column."""
        return ["text" if isinstance(column, str) else column[1] for column in self.columns]

    @property
    def heads(self) -> list[str]:
        """Head of each column."""
        return [column if isinstance(column, str) else column[0] for column in self.columns]

    @property
    def left(self) -> list[bool]:
        """Which columns hold text, and so are left-aligned."""
        return [form == "text" for form in self.formats]

    @property
    def cells(self) -> list[list[str]]:
        """The rows as a person reads them; "–" where there is no value."""
        return [[_cell(value, form) for value, form in zip(row, self.formats, strict=True)] for row in self.rows]

    @property
    def csv(self) -> str:
        """The rows as a program reads them: plain numbers, an empty cell where there is no value."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.heads)
        writer.writerows(self.rows)  # writes None as an empty cell
        return text.getvalue()


def _cell(value: Any, form: CellFormat) -> str:
    if value is None:
        return "–"
    if isinstance(value, str) or form == "text":
        return str(value)
    return _FORMATS[form](value).replace("-", "−", 1)  # type: ignore[operator]


def estimate_cells(estimate: Estimate | None) -> tuple[float | None, str | None]:
    """Two cells: the mean, and its interval in words."""
    return (None, None) if estimate is None else (estimate.mean, format.span(estimate.low, estimate.high))


# --- data -------------------------------------------------------------------------------------------------------------


def data_tables(prepared: PreparedData) -> tuple[Table, Table]:
    """The assets' bars; and the split with base rates and standard errors."""
    ranges = Table(
        "data", "Data", ["symbol", ("bars", "whole"), "first", "last", "version"],
        [(r.symbol, r.bars, r.first, r.last, r.version[:12]) for r in prepared.ranges],
    )  # fmt: skip
    split = Table(
        "split", "Split",
        ["part", "first", "last", ("n", "whole"), ("positives", "whole"), ("base rate", "number"),
         ("effective n", "whole"), ("SE log loss", "number"), ("SE AUC", "number")],
        [
            (p.part, p.first, p.last, p.n, *(("sealed",) * 2 if p.base_rate is None else (p.positives, p.base_rate)),
             round(p.n_effective), p.se_log_loss, p.se_auc)
            for p in prepared.parts
        ],
        note="Effective n counts overlapping labels by their average uniqueness; the standard errors use it (that of "
        "AUC supposes an AUC of 0.7).",
    )  # fmt: skip
    return ranges, split


# --- scores -----------------------------------------------------------------------------------------------------------

_SCORES = ("log_loss", "auc", "brier", "average_precision", "calibration_error")
_SCORES_REGRESSION = ("mse", "mae", "correlation", "sign_accuracy")


@dataclass(frozen=True)
class Score:
    """A model or a baseline with its metrics."""

    name: str
    metrics: Mapping[str, Any]
    gain: Estimate | None = None
    words: str | None = None
    """What it is."""


def score_table(
    name: str, title: str, rows: Sequence[Score], *, metric: str | None = None, gain: str = "", what: bool = False,
    note: str = "", marked: Sequence[int] = (),
) -> Table:  # fmt: skip
    """Models and baselines on identical rows.

    Args:
        metric: the study's; default: log loss, or squared error.
        gain: head of the column of gains; empty: no such column.
        what: add what each model is.
    """
    regression = not any("log_loss" in row.metrics for row in rows)
    first, *others = _SCORES_REGRESSION if regression else _SCORES
    skill = metrics.SKILLS[significance.skill_loss(metric or first)]
    gains: list[Column] = [(gain, "number"), "95 % interval"] if gain else []
    return Table(
        name, title,
        ["", (format.metric_words(first), "number"), ("skill", "percent"), *gains,
         *((format.metric_words(key), "number") for key in others), *(["what it is"] if what else [])],
        [
            (row.name, row.metrics.get(first), row.metrics.get(skill),
             *(estimate_cells(row.gain) if gain else ()), *(row.metrics.get(key) for key in others),
             *([row.words] if what else []))
            for row in rows
        ],
        note=note, marked=marked,
    )  # fmt: skip


def opening_table(opening: TestOpening) -> Table:
    """Models and baselines on the test part, as one opening of it showed them."""
    return score_table(
        f"test_opening_{opening.number}",
        f"Opening {opening.number}: {opening.n_rows:,} test rows, {opening.first_date} … {opening.last_date}",
        [Score(model.name, model.metrics, model.gain) for model in (*opening.models, *opening.baselines)],
        metric=opening.loss, gain=f"gain over {opening.baseline}", marked=range(len(opening.models)),
        note=f"Gains are in {format.metric_words(opening.loss)} (blocks of {opening.block} days); {opening.baseline} "
        f"was the best baseline on validation.",
    )  # fmt: skip


# --- confirmation -----------------------------------------------------------------------------------------------------


def confirmation_tables(confirmation: Confirmation) -> list[Table]:
    """Every candidate; then the gain of the best one by fold, by year and by third of VIX."""
    rows = [
        (str(c.trial), format.shape_words(c.shape), c.param_count, c.search_value, c.mean_value, c.spread,
         *estimate_cells(c.verdict.gain if c.verdict else None),
         *estimate_cells(c.verdict.behind if c.verdict else None),
         *estimate_cells(c.ensemble.gain if c.ensemble else None), c.words)
        for c in confirmation.candidates
    ]  # fmt: skip
    p = confirmation.superior_p_value
    candidates = Table(
        "confirmation", "Candidates",
        ["trial", "shape", ("parameters", "size"), (f"search {confirmation.metric}", "number"), ("fresh", "number"),
         ("SD of seeds", "number"), ("gain", "number"), "interval", ("behind the best", "number"), "interval",
         ("ensemble's gain", "number"), "interval", "result"],
        rows,
        note=f"On {confirmation.n_rows:,} validation rows of {confirmation.n_days:,} days (blocks of "
        f"{confirmation.block} days); gains in {format.metric_words(confirmation.loss)} over {confirmation.baseline}."
        + (f" SPA p = {format.number(p)} with {confirmation.n_compared} trials." if p else ""),
    )  # fmt: skip
    tables, best = [candidates], confirmation.best
    for kind, title in (("fold", "fold"), ("year", "year"), ("vix", "third of VIX")):
        groups = best.of_kind(kind) if best else ()
        if best is not None and len(groups) > 1:
            ahead = sum(group.gain.mean > 0 for group in groups)
            tables.append(
                Table(
                    f"confirmed_by_{kind}", f"Gain of trial {best.trial} by {title}",
                    [title, ("rows", "whole"), ("gain", "number"), "interval"],
                    [(group.name, group.n, *estimate_cells(group.gain)) for group in groups],
                    note=f"Ahead in {ahead} of {len(groups)}; SD between them "
                    f"{format.number(best.spread_of_gains(kind))}.",
                )
            )  # fmt: skip
    return tables
