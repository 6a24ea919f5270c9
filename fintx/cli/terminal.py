"""Terminal: tables and lines of text, whole however narrow the terminal is."""

from __future__ import annotations

import functools
import textwrap

import rich.table
from rich.console import Console
from rich.text import Text

from fintx.report.table import Table


def print_tables(console: Console, *tables: Table) -> None:
    """Print tables whole: a line that wraps is better than a number cut off to fit a narrow terminal."""
    for table in tables:
        renderable, width = rich_table(table), console.width
        needed = _width(console, renderable)
        if console.is_terminal and needed > width:
            renderable = rich_table(table, narrow=True)
            needed = _width(console, renderable)
        console.width = max(width, needed)
        console.print(renderable)
        console.width = width
        if table.note:
            _print_words(console, table.note, style="dim")


def _width(console: Console, renderable: rich.table.Table) -> int:
    """Columns that it takes when nothing of it wraps."""
    return console.measure(renderable, options=console.options.update(max_width=1_000)).maximum


def rich_table(table: Table, *, narrow: bool = False, elastic: str | None = None) -> rich.table.Table:
    """A table for the terminal: numbers right-aligned, words left-aligned.

    Args:
        narrow: break heads that are wider than their column's cells.
        elastic: head of the column that is cut where the terminal is too narrow, before any other is.
    """
    title = f"\n{table.title}" if table.title else ""
    rendered = rich.table.Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim"
    )
    cells = table.cells
    for i, (head, left) in enumerate(zip(table.heads, table.left, strict=True)):
        if narrow:
            head = "\n".join(textwrap.wrap(head, max([4, *(len(row[i]) for row in cells)]), break_long_words=False))
        rendered.add_column(head, justify="left" if left else "right", no_wrap=head not in ("note", elastic))
    for i, row in enumerate(cells):
        # As text: a note in square brackets is no markup.
        texts = [
            Text(cell, no_wrap=True if head == elastic else None) for head, cell in zip(table.heads, row, strict=True)
        ]
        rendered.add_row(*texts, style="bold" if i in table.marked and len(table.rows) > 1 else None)
    return rendered


def print_lines(console: Console, *lines: str) -> None:
    """Print lines; a terminal shows them broken between words, so that paths stay whole however narrow it is."""
    for line in lines:
        _print_words(console, line)


def _print_words(console: Console, line: str, style: str | None = None) -> None:
    if console.is_terminal:
        # A word wider than the terminal is left for the terminal to break: it can still be copied in one piece.
        wrap = functools.partial(textwrap.fill, width=console.width, break_long_words=False, break_on_hyphens=False)
        line = "\n".join(map(wrap, line.split("\n")))
    console.print(line, highlight=False, soft_wrap=True, markup=False, style=style)
