"""What is a table of a report? Rows of plain values with a format per column: one thing for page, terminal and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fintx.report import words

Format = Literal["text", "whole", "number", "percent", "points", "size", "seconds"]

_WORDS = {
    "text": str,
    "whole": lambda value: f"{value:,}",
    "number": words.number,
    "percent": words.percent,
    "points": words.points,
    "size": words.count,
    "seconds": words.duration,
}


@dataclass(frozen=True)
class Sheet:
    """A table: what it is called as a file, how it is headed, and its cells as values."""

    name: str
    """File stem of its CSV."""
    title: str
    columns: tuple[tuple[str, Format], ...]
    """(head, format)."""
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""
    """What its reader must know to read it rightly."""
    marked: tuple[int, ...] = ()
    """Rows that the eye should find first."""

    @property
    def heads(self) -> tuple[str, ...]:
        """Column heads."""
        return tuple(head for head, _ in self.columns)

    @property
    def left(self) -> tuple[bool, ...]:
        """Which columns are words, and so stand to the left."""
        return tuple(form == "text" for _, form in self.columns)

    @property
    def cells(self) -> list[list[str]]:
        """The rows as a person reads them; "–" where there is no value."""
        forms = [form for _, form in self.columns]
        return [[cell(value, form) for value, form in zip(row, forms, strict=True)] for row in self.rows]

    @property
    def csv(self) -> str:
        """The rows as a program reads them: plain numbers, an empty cell where there is no value."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.heads)
        writer.writerows([["" if value is None else value for value in row] for row in self.rows])
        return text.getvalue()


def cell(value: Any, form: Format) -> str:
    """One value in words."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return _WORDS[form](value).replace("-", "−", 1) if form != "text" else str(value)  # type: ignore[operator]


def of(
    name: str, title: str, columns: Sequence[tuple[str, Format]], rows: Sequence[Sequence[Any]], **rest: Any
) -> Sheet:
    """A sheet of lists."""
    return Sheet(name, title, tuple(columns), tuple(tuple(row) for row in rows), **rest)
