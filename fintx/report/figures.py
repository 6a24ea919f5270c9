"""How does a figure of a report look, and how is it kept? One style; as SVG for the page, as SVG and PNG beside it.

Only modules named figures… import matplotlib. Colours are Okabe & Ito's (2008), told apart by the colour-blind. Ink,
grid, paper and the darker hues become variables inside a page, so that one figure serves a light and a dark screen,
and print.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#56b4e9", "#cc79a7"
CYCLE = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)
INK, MUTED, GRID, PAPER = "#1b1f24", "#68707a", "#dfe3e8", "#fffffe"
_ON_THE_PAGE = {
    INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)", PAPER: "var(--paper)", BLUE: "var(--blue)",
    VERMILLION: "var(--vermillion)", GREEN: "var(--green)", SKY: "var(--sky)",
}  # fmt: skip
_FONTS = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
WIDTH = 7.6
"""Inches; a column of the page."""

_STYLE: Any = {
    "figure.facecolor": PAPER, "axes.facecolor": "none", "savefig.facecolor": PAPER,
    "font.size": 9.0, "axes.titlesize": 9.5, "axes.labelsize": 9.0, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.7, "axes.axisbelow": True, "lines.linewidth": 1.6,
    "legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "fintx", "axes.unicode_minus": True,
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A figure in its three forms, and what it shows in words."""

    name: str
    """File stem."""
    title: str
    caption: str
    """How to read it; also what a screen reader says."""
    inline: str
    """SVG for the page, in the page's colours."""
    svg: str
    png: bytes


@contextmanager
def canvas(*, height: float = 3.2, width: float = WIDTH) -> Iterator[Figure]:
    """An empty figure in the style."""
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        yield Figure(figsize=(width, height), layout="constrained")


def keep(figure: Figure, name: str, title: str, caption: str) -> Picture:
    """The figure's three forms; the same figure gives the same bytes."""
    text, pixels = io.StringIO(), io.BytesIO()
    figure.draw_without_rendering()  # places everything, once for both forms
    figure.set_layout_engine("none")
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    figure.savefig(pixels, format="png", dpi=160, metadata={"Software": None})
    svg = text.getvalue()
    return Picture(name, title, caption, _inline(svg, name), svg, pixels.getvalue())


def _inline(svg: str, name: str) -> str:
    """For the page: its colours and fonts, ids of its own, no fixed size, no background."""
    body = svg[svg.index("<svg") :]
    for paint, variable in _ON_THE_PAGE.items():
        body = body.replace(paint, variable)
    body = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", body)
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", rf"font: \1px {_FONTS}", body)
    body = re.sub(r"font-family: [^;\"]*", f"font-family: {_FONTS}", body)
    width, height = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', body).groups()  # type: ignore[union-attr]
    size = f'style="max-width: {float(width) * 4 / 3:.0f}px" role="img" aria-labelledby="{name}-caption"'
    body = body.replace(f'width="{width}pt" height="{height}pt"', size, 1)
    return re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL).strip()


def label_lines(
    axes: Axes, labels: Sequence[tuple[float, str, str]], *, gap: float = 0.06, x: float = 1.01
) -> None:  # fmt: skip
    """Words to the right of the axes at given heights, moved apart where they would overlap.

    Args:
        labels: (y in data, words, colour).
        gap: least distance, as a share of the axes' height.
    """
    low, high = axes.get_ylim()
    places = [(y - low) / (high - low) for y, _, _ in labels]
    for place, (_, words, colour) in zip(spread(places, gap), labels, strict=True):
        axes.text(
            x, place, words, transform=axes.transAxes, color=colour, va="center", ha="left", fontsize=8.5, clip_on=False
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Places moved as little as needed to be `gap` apart, in the same order."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = [places[i] for i in order]
    for _ in range(200):
        for k in range(len(moved) - 1):
            short = gap - (moved[k + 1] - moved[k])
            if short > 1e-9:
                moved[k], moved[k + 1] = moved[k] - short / 2, moved[k + 1] + short / 2
    result = [0.0] * len(places)
    for k, i in enumerate(order):
        result[i] = moved[k]
    return result


def robust_limits(values: Sequence[float], always: Sequence[float] = (), *, reach: float = 3.0) -> tuple[float, float]:
    """Limits that show the bulk of values and all that must be seen; far outliers stay outside.

    Args:
        reach: interquartile ranges beyond the quartiles up to which a value is shown.
    """
    import numpy as np

    held = np.asarray(values, float)
    first, third = np.quantile(held, [0.25, 0.75])
    room = reach * max(third - first, 1e-9)
    inside = held[(held >= first - room) & (held <= third + room)]
    every = np.concatenate([inside, np.asarray(always, float)])
    low, high = float(every.min()), float(every.max())
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad
