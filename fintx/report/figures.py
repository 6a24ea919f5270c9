"""Figures: one style, kept as SVG for the page and as SVG and PNG beside it; forecasts and studies compared.

Only modules named figures… import matplotlib. Colours are Okabe & Ito's (2008), told apart by the colour-blind. Ink,
grid, paper and the darker hues become variables inside a page, so that one figure serves a light and a dark screen,
and print.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from fintx.analysis import scaling_laws
from fintx.analysis.scaling_laws import ScalingLaws
from fintx.evaluate.calibration import PrecisionRecall, ReliabilityBin
from fintx.evaluate.significance import Estimate
from fintx.report.format import LOSSES, count
from fintx.types import Floats

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
    shown = np.asarray(values, float)
    first, third = np.quantile(shown, [0.25, 0.75])
    room = reach * max(third - first, 1e-9)
    inside = shown[(shown >= first - room) & (shown <= third + room)]
    every = np.concatenate([inside, np.asarray(always, float)])
    low, high = float(every.min()), float(every.max())
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad


# --- forecasts and studies compared -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """One line of a forest plot."""

    words: str
    gain: Estimate
    strong: bool
    """Painted green."""

    @classmethod
    def of(cls, words: str, gain: Estimate, *, strong: bool | None = None) -> Interval:
        """Strong where it lies above zero, unless said otherwise."""
        return cls(words, gain, gain.positive if strong is None else strong)


def forest(intervals: Sequence[Interval], *, baseline: str, unit: str, title: str, caption: str) -> Picture:
    """Gains over the best baseline with their intervals."""
    with canvas(height=0.95 + 0.27 * len(intervals)) as figure:
        axes = figure.subplots()
        for place, each in enumerate(reversed(intervals)):
            colour = GREEN if each.strong else MUTED
            axes.plot(
                [each.gain.low, each.gain.high], [place, place], color=colour, linewidth=2, solid_capstyle="round"
            )
            axes.plot([each.gain.mean], [place], "o", color=colour, markersize=6, markeredgecolor=PAPER)
        axes.axvline(0, color=INK, linewidth=1)
        axes.text(0, len(intervals) - 0.4, f"  {baseline}", va="bottom", ha="left", fontsize=8.5, color=INK)
        axes.set_yticks(range(len(intervals)), [each.words for each in reversed(intervals)])
        axes.set_ylim(-0.6, len(intervals) + 0.25)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"gain over {baseline} in {unit} (right is better)")
        return keep(figure, "forest", title, caption)


def reliability(curves: Mapping[str, Sequence[ReliabilityBin]]) -> Picture:
    """Observed frequency against predicted probability, with Wilson intervals."""
    with canvas(height=3.6, width=0.72 * WIDTH) as figure:
        axes = figure.subplots()
        top = max((each.observed.high for bins in curves.values() for each in bins), default=1.0)
        top = min(1.0, max(top, max(each.mean for bins in curves.values() for each in bins)) * 1.05)
        axes.plot([0, top], [0, top], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        labels = []
        for colour, (words, bins) in zip(CYCLE, curves.items(), strict=False):
            x = np.array([each.mean for each in bins])
            y = np.array([each.observed.value for each in bins], float)
            low, high = np.array([each.observed.low for each in bins]), np.array([each.observed.high for each in bins])
            axes.vlines(x, low, high, color=colour, linewidth=1.1, alpha=0.6)
            axes.plot(x, y, "o-", color=colour, markersize=4.5, linewidth=1.1)
            labels.append((float(y[-1]), words, colour))
        axes.set_xlim(0, top)
        axes.set_ylim(0, top)
        label_lines(axes, [*labels, (top, "perfect calibration", MUTED)])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        axes.set_xlabel("predicted probability")
        axes.set_ylabel("observed frequency")
        caption = (
            "Ten bins of equal size; bars are 95 % Wilson intervals, too narrow where labels overlap. On the dashed "
            "line predicted probabilities are observed frequencies."
        )
        return keep(figure, "reliability", "Reliability", caption)


def precision_recall(curves: Mapping[str, PrecisionRecall]) -> Picture:
    """Precision against recall, with the base rate that guessing reaches."""
    with canvas(height=3.2, width=0.8 * WIDTH) as figure:
        axes = figure.subplots()
        for colour, each in zip(CYCLE, curves.values(), strict=False):
            axes.fill_between(
                each.recall, each.precision_low, each.precision_high, color=colour, alpha=0.12, linewidth=0
            )
            axes.plot(each.recall, each.precision, color=colour, linewidth=1.3)
        rate = next(iter(curves.values())).base_rate
        axes.axhline(rate, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        label_lines(axes, [(rate, "base rate", MUTED)])
        _label_where_apart(axes, curves)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        axes.set_xlabel("recall: share of all events that were called")
        axes.set_ylabel("precision: share of calls that were events")
        return keep(
            figure, "precision_recall", "Precision and recall",
            "Each threshold is a point; bands are 95 % Wilson intervals. Guessing reaches the base rate at any recall.",
        )  # fmt: skip


def _label_where_apart(axes: Axes, curves: Mapping[str, PrecisionRecall]) -> None:
    """Each curve's words near it, at the recall where the curves lie furthest apart: at full recall all meet.

    The highest curve's words stand above all curves, the others' below them.
    """
    at = np.linspace(0.1, 0.6, 51)
    heights = np.array([np.interp(at, *_ascending(each)) for each in curves.values()])
    apart = np.diff(np.sort(heights, axis=0), axis=0).min(axis=0) if len(curves) > 1 else np.ones(len(at))
    best = int(np.argmax(apart[:26]))  # room for words to the right
    beside = heights[:, best : best + 25]
    above, below = float(beside.max()) + 0.04, float(beside.min()) - 0.06
    highest = int(np.argmax(heights[:, best]))
    for index, (colour, words) in enumerate(zip(CYCLE, curves, strict=False)):
        place = above if index == highest else below
        below -= 0.0 if index == highest else 0.08
        axes.annotate(
            words, (float(at[best]), float(heights[index, best])), (float(at[best]) + 0.05, place), color=colour,
            fontsize=8.5, va="bottom" if index == highest else "top",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7},
        )  # fmt: skip


def _ascending(each: PrecisionRecall) -> tuple[Floats, Floats]:
    order = np.argsort(each.recall, kind="stable")
    return np.asarray(each.recall)[order], np.asarray(each.precision)[order]


def cumulative(dates: np.ndarray, gains: Mapping[str, Floats], *, against: str, unit: str) -> Picture:
    """Loss saved against a baseline, added up over time."""
    with canvas(height=3.0) as figure:
        axes = figure.subplots()
        labels = []
        for colour, (words, gain) in zip(CYCLE, gains.items(), strict=False):
            axes.plot(dates.astype("datetime64[D]"), gain, color=colour, linewidth=1.3)
            labels.append((float(gain[-1]), words, colour))
        axes.axhline(0, color=INK, linewidth=0.9)
        axes.margins(x=0)
        label_lines(axes, [*labels, (0.0, against, INK)])
        axes.set_ylabel(f"{unit} saved so far")
        axes.set_xlabel("validation day")
        caption = (
            f"Rising: the trial is ahead of {against}; falling: behind. A lead that one stretch of days made alone is "
            "no steady one."
        )
        return keep(figure, "cumulative_gain", f"Lead over {against} through time", caption)


def scaling(laws: ScalingLaws, *, size_words: str) -> Picture:
    """Relative loss against size and against compute: all trials, the frontier, the fit."""
    trials, loss = laws.trials, laws.trials.loss
    frontier = np.zeros(len(loss), bool)
    frontier[laws.frontier.chosen] = True
    trend = laws.frontier if laws.frontier.laws else laws.all_trials
    law = next((each.fit for each in trend.laws if each.fit.form == "power law"), None)
    with canvas(height=3.6, width=1.1 * WIDTH) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, x in ((left, trials.size), (right, trials.flops)):
            axes.plot(x[~frontier], loss[~frontier], "o", color=SKY, alpha=0.6, markersize=4, markeredgewidth=0,
                      label="all trials")  # fmt: skip
            axes.plot(x[frontier], loss[frontier], "o", color=BLUE, markersize=5.5, markeredgecolor=PAPER,
                      label="frontier")  # fmt: skip
            axes.axhline(1.0, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
            axes.minorticks_off()
        if trend.band is not None and law is not None:
            left.fill_between(trend.grid, *trend.band, color=VERMILLION, alpha=0.15, linewidth=0)
            left.plot(trend.grid, law(trend.grid), color=VERMILLION, label="power law, 95 %")
        staircase = scaling_laws.envelope(trials.flops, loss)
        right.step(*staircase, where="post", color=ORANGE, label="least so far")
        pad = 0.06 * (max(*loss, 1.0) - min(*loss, 1.0))
        # Badly tuned trials may lie far above: the bulk is what the eye needs.
        top = max(float(np.quantile(loss, 0.95)), 1.0, float(loss[frontier].max()))
        left.set_ylim(min(float(loss.min()), 1.0) - pad, top + pad)
        left.text(left.get_xlim()[1], 1.0, trials.baseline, va="bottom", ha="right", fontsize=8.5, color=INK)
        left.set_xlabel(size_words)
        right.set_xlabel("training compute (FLOPs)")
        left.set_ylabel(f"{LOSSES[trials.studies[0].metric]} ÷ that of {trials.baseline}")
        left.legend(fontsize=8, loc="upper right")
        right.legend(fontsize=8, loc="upper right", handles=[right.lines[-1]])
        ratio = trials.baseline_loss / trials.prior_loss
        skills = right.secondary_yaxis("right", functions=(lambda y: 1 - ratio * y, lambda skill: (1 - skill) / ratio))
        skills.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1, symbol=" %"))
        skills.set_ylabel("skill over the prior")
        caption = (
            f"Below the dashed line a trial beats {trials.baseline}. Dark: the best quarter of each size's first "
            "trials; light: all. The right-hand scale says the same as skill over the prior."
        )
        return keep(figure, "scaling", "Loss against size and compute", caption)


def _power(value: float) -> str:
    if value < 1e12:
        return count(value).replace(".0", "")
    exponent = int(np.floor(np.log10(value) + 1e-9))
    return f"$10^{{{exponent}}}$" if abs(value / 10**exponent - 1) < 1e-6 else f"{value:.0e}"


def ladder(
    names: Sequence[str], trials: Sequence[tuple[float, float, float]], baselines: Sequence[tuple[float, str]]
) -> Picture:
    """Skill of each study's best trial with its interval, beside its best baseline.

    Args:
        trials: (skill, low, high) of each study's best trial.
        baselines: (skill, name) of its best baseline.
    """
    with canvas(height=0.95 + 0.46 * len(names)) as figure:
        axes = figure.subplots()
        for place, ((skill, low, high), (other, words)) in enumerate(
            zip(reversed(trials), reversed(baselines), strict=True)
        ):
            axes.plot([low, high], [place, place], color=BLUE, linewidth=2, solid_capstyle="round")
            axes.plot([skill], [place], "o", color=BLUE, markersize=6.5, markeredgecolor=PAPER)
            axes.plot([other], [place], "|", color=VERMILLION, markersize=15, markeredgewidth=2.2)
            axes.annotate(words, (other, place), xytext=(0, -16), textcoords="offset points", ha="center", fontsize=7.5,
                          color=VERMILLION)  # fmt: skip
        axes.axvline(0, color=INK, linewidth=0.9)
        axes.set_yticks(range(len(names)), list(reversed(names)))
        axes.set_ylim(-0.7, len(names) - 0.4)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        axes.set_xlabel("skill over the prior")
        caption = (
            "Dots: the best trial of each study with the 95 % interval of its skill over other days; upright "
            "marks: the best baseline on the same rows. Skills compare studies whose labels differ; losses don't."
        )
        return keep(figure, "skill_by_study", "Skill by study", caption)
