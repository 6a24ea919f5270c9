"""On what was it asked? Label in words, data range and split table: from the data, or as far as the records tell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fintx import tasks
from fintx.data import sources, windows
from fintx.data.bars import Bars
from fintx.report import sheet
from fintx.report.evidence import Evidence
from fintx.report.sheet import Sheet
from fintx.types import FintxError, Floats


@dataclass(frozen=True, eq=False)
class Setting:
    """A study's data, as a report tells of them."""

    label: str
    sheets: tuple[Sheet, ...]
    bars: dict[str, Bars]
    """Of the assets; empty where the data are not here."""
    note: str
    """Why something is missing; empty where nothing is."""


def read(evidence: Evidence, *, data_root: Path) -> Setting:
    """Rebuild the tables that `plan` prints, from the data that the study pinned."""
    spec = evidence.spec
    label = spec.task.rule.describe()
    try:
        prepared = windows.build(spec, data_root)
        bars = sources.load_pinned(spec.data, spec.data.assets, data_root)
    except FintxError as error:
        first = str(error).splitlines()[0]
        note = f"The study's data are not here ({first}): tables from the records alone; give --data-dir."
        return Setting(label, (_from_records(evidence),), {}, note)
    ranges = sheet.of(
        "data", "Data",
        [("symbol", "text"), ("bars", "whole"), ("first", "text"), ("last", "text"), ("version", "text")],
        [(r.symbol, r.bars, r.first, r.last, r.version[:12]) for r in prepared.ranges],
    )  # fmt: skip
    split = sheet.of(
        "split", "Split",
        [("part", "text"), ("first", "text"), ("last", "text"), ("n", "whole"), ("positives", "whole"),
         ("base rate", "number"), ("effective n", "whole"), ("SE log loss", "number"), ("SE AUC", "number")],
        [
            (p.part, p.first, p.last, p.n, "sealed" if p.base_rate is None else p.positives,
             "sealed" if p.base_rate is None else p.base_rate, round(p.n_effective), p.se_log_loss, p.se_auc)
            for p in prepared.parts
        ],
        note="Effective n counts overlapping labels by their average uniqueness; the standard errors use it.",
    )  # fmt: skip
    return Setting(label, (ranges, split), bars, "")


def _from_records(evidence: Evidence) -> Sheet:
    """Sizes of the parts, and the validation's days."""
    rows, folds = evidence.rows, evidence.records[0].folds
    found = []
    for index, fold in enumerate(folds):
        name = f" {index + 1}" if len(folds) > 1 else ""
        days = np.array([], "datetime64[D]") if rows is None else rows.dates[rows.fold == index]
        first, last = (str(days.min()), str(days.max())) if len(days) else ("–", "–")
        found.append((f"train{name}", "–", first, fold.n_train))
        found.append((f"validation{name}", first, last, fold.n_validation))
    return sheet.of("split", "Split", [("part", "text"), ("from", "text"), ("to", "text"), ("n", "whole")], found)


def opposite(evidence: Evidence, bars: dict[str, Bars]) -> Floats | None:
    """(S,) labels of the mirrored event on the validation rows; none without data or without a level."""
    rows, level = evidence.rows, evidence.spec.task.rule.level
    if rows is None or not bars or level is None:
        return None
    assets = np.asarray(rows.key["asset"].to_pylist())
    found = np.full(len(rows.labels), np.nan)
    for symbol, held in bars.items():
        mine = assets == symbol
        mirrored = tasks.opposites(level, held)
        place = np.searchsorted(held.dates, rows.dates[mine])
        found[mine] = mirrored[np.minimum(place, len(held) - 1)]
    return found if np.isfinite(found).all() else None
