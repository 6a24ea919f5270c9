"""What do comparisons look like? Forest plots, reliability, precision and recall, gains over time, scaling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, PercentFormatter

from fintx.evaluate.calibration import ReliabilityBin
from fintx.evaluate.decisions import PrecisionRecall
from fintx.report.figures import (
    BLUE,
    CYCLE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    SKY,
    VERMILLION,
    WIDTH,
    Picture,
    canvas,
    keep,
    label_lines,
)
from fintx.report.words import count
from fintx.types import Floats


@dataclass(frozen=True)
class Row:
    """One line of a forest plot."""

    words: str
    mean: float
    low: float
    high: float
    strong: bool
    """Painted: its interval lies above zero."""


def forest(rows: Sequence[Row], *, baseline: str, unit: str, name: str, title: str, caption: str) -> Picture:
    """Gains over the best baseline with their intervals."""
    with canvas(height=0.95 + 0.27 * len(rows)) as figure:
        axes = figure.subplots()
        for place, row in enumerate(reversed(rows)):
            colour = GREEN if row.strong else MUTED
            axes.plot([row.low, row.high], [place, place], color=colour, linewidth=2, solid_capstyle="round")
            axes.plot([row.mean], [place], "o", color=colour, markersize=6, markeredgecolor=PAPER)
        axes.axvline(0, color=INK, linewidth=1)
        axes.text(0, len(rows) - 0.4, f"  {baseline}", va="bottom", ha="left", fontsize=8.5, color=INK)
        axes.set_yticks(range(len(rows)), [row.words for row in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) + 0.25)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"gain over {baseline} in {unit} (right is better)")
        return keep(figure, name, title, caption)


def reliability(found: Mapping[str, Sequence[ReliabilityBin]]) -> Picture:
    """Observed share against the probability that was said, with Wilson intervals."""
    with canvas(height=3.6, width=0.72 * WIDTH) as figure:
        axes = figure.subplots()
        top = max((each.observed.high for bins in found.values() for each in bins), default=1.0)
        top = min(1.0, max(top, max(each.mean for bins in found.values() for each in bins)) * 1.05)
        axes.plot([0, top], [0, top], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        labels = []
        for colour, (words, bins) in zip(CYCLE, found.items(), strict=False):
            x = np.array([each.mean for each in bins])
            y = np.array([each.observed.value for each in bins], float)
            low, high = np.array([each.observed.low for each in bins]), np.array([each.observed.high for each in bins])
            axes.vlines(x, low, high, color=colour, linewidth=1.1, alpha=0.6)
            axes.plot(x, y, "o-", color=colour, markersize=4.5, linewidth=1.1)
            labels.append((float(y[-1]), words, colour))
        axes.set_xlim(0, top)
        axes.set_ylim(0, top)
        label_lines(axes, [*labels, (top, "as said = as came", MUTED)])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        axes.set_xlabel("probability said")
        axes.set_ylabel("share that came")
        caption = (
            "Ten bins of equal size; bars are 95 % Wilson intervals, too narrow where labels overlap. On the dashed "
            "line a forecast means what it says."
        )
        return keep(figure, "reliability", "Reliability", caption)


def precision_recall(found: Mapping[str, PrecisionRecall]) -> Picture:
    """Precision against recall, with the base rate that guessing reaches."""
    with canvas(height=3.2, width=0.8 * WIDTH) as figure:
        axes = figure.subplots()
        for colour, each in zip(CYCLE, found.values(), strict=False):
            axes.fill_between(
                each.recall, each.precision_low, each.precision_high, color=colour, alpha=0.12, linewidth=0
            )
            axes.plot(each.recall, each.precision, color=colour, linewidth=1.3)
        rate = next(iter(found.values())).base_rate
        axes.axhline(rate, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        label_lines(axes, [(rate, "base rate", MUTED)])
        _label_where_apart(axes, found)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        axes.set_xlabel("recall: share of all events that were called")
        axes.set_ylabel("precision: share of calls that came")
        return keep(
            figure, "precision_recall", "Precision and recall",
            "Each threshold is a point; bands are 95 % Wilson intervals. Guessing reaches the base rate at any recall.",
        )  # fmt: skip


def _label_where_apart(axes: Axes, found: Mapping[str, PrecisionRecall]) -> None:
    """Each curve's words near it, at the recall where the curves lie furthest apart: at full recall all meet.

    The highest curve's words stand above all curves, the others' below them.
    """
    at = np.linspace(0.1, 0.6, 51)
    heights = np.array([np.interp(at, *_ascending(each)) for each in found.values()])
    apart = np.diff(np.sort(heights, axis=0), axis=0).min(axis=0) if len(found) > 1 else np.ones(len(at))
    best = int(np.argmax(apart[:26]))  # room for words to the right
    beside = heights[:, best : best + 25]
    above, below = float(beside.max()) + 0.04, float(beside.min()) - 0.06
    highest = int(np.argmax(heights[:, best]))
    for index, (colour, words) in enumerate(zip(CYCLE, found, strict=False)):
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
    """Loss saved against a rival, added up over time."""
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


@dataclass(frozen=True, eq=False)
class ScalingPlot:
    """What the scaling figure shows; losses relative to the best baseline's."""

    size: Floats
    flops: Floats
    loss: Floats
    frontier: np.ndarray
    """(T,) bool."""
    size_words: str
    baseline: str
    loss_words: str
    grid: Floats
    law: Floats | None
    band: Floats | None
    staircase: tuple[Floats, Floats]
    skill_of: tuple[float, float]
    """Skill = a + b · relative loss."""


def scaling(shown: ScalingPlot) -> Picture:
    """Relative loss against size and against compute: all trials, the frontier, the fit."""
    with canvas(height=3.6, width=1.1 * WIDTH) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, x in ((left, shown.size), (right, shown.flops)):
            axes.plot(x[~shown.frontier], shown.loss[~shown.frontier], "o", color=SKY, alpha=0.6, markersize=4,
                      markeredgewidth=0, label="all trials")  # fmt: skip
            axes.plot(x[shown.frontier], shown.loss[shown.frontier], "o", color=BLUE, markersize=5.5,
                      markeredgecolor=PAPER, label="frontier")  # fmt: skip
            axes.axhline(1.0, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
            axes.minorticks_off()
        if shown.band is not None and shown.law is not None:
            left.fill_between(shown.grid, *shown.band, color=VERMILLION, alpha=0.15, linewidth=0)
            left.plot(shown.grid, shown.law, color=VERMILLION, label="power law, 95 %")
        right.step(*shown.staircase, where="post", color=ORANGE, label="least so far")
        values = [*shown.loss, 1.0]
        pad = 0.06 * (max(values) - min(values))
        left.set_ylim(_bottom(shown) - pad, _top(shown) + pad)
        left.text(left.get_xlim()[1], 1.0, shown.baseline, va="bottom", ha="right", fontsize=8.5, color=INK)
        left.set_xlabel(shown.size_words)
        right.set_xlabel("training compute (FLOPs)")
        left.set_ylabel(f"{shown.loss_words} ÷ that of {shown.baseline}")
        left.legend(fontsize=8, loc="upper right")
        right.legend(fontsize=8, loc="upper right", handles=[right.lines[-1]])
        _skill_axis(right, shown.skill_of)
        caption = (
            f"Below the dashed line a trial beats {shown.baseline}. Dark: the best quarter of each size's first "
            "trials; light: all. The right-hand scale says the same as skill over the prior."
        )
        return keep(figure, "scaling", "Loss against size and compute", caption)


def _top(shown: ScalingPlot) -> float:
    """Badly tuned trials may lie far above: the bulk is what the eye needs."""
    return max(float(np.quantile(shown.loss, 0.95)), 1.0, float(shown.loss[shown.frontier].max()))


def _bottom(shown: ScalingPlot) -> float:
    return min(float(shown.loss.min()), 1.0)


def _skill_axis(axes: Axes, skill_of: tuple[float, float]) -> None:
    a, b = skill_of

    def to_skill(loss: Any) -> Any:
        return a + b * loss

    def to_loss(skill: Any) -> Any:
        return (skill - a) / b

    second = axes.secondary_yaxis("right", functions=(to_skill, to_loss))
    second.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1, symbol=" %"))
    second.set_ylabel("skill over the prior")


def _power(value: float) -> str:
    if value < 1e12:
        return count(value).replace(".0", "")
    exponent = int(np.floor(np.log10(value) + 1e-9))
    return f"$10^{{{exponent}}}$" if abs(value / 10**exponent - 1) < 1e-6 else f"{value:.0e}"


def ladder(
    names: Sequence[str], trials: Sequence[tuple[float, float, float]], rivals: Sequence[tuple[float, str]]
) -> Picture:
    """Skill of each study's best trial with its interval, beside its best baseline.

    Args:
        trials: (skill, low, high) of each study's best trial.
        rivals: (skill, name) of its best baseline.
    """
    with canvas(height=0.95 + 0.46 * len(names)) as figure:
        axes = figure.subplots()
        for place, ((skill, low, high), (rival, words)) in enumerate(
            zip(reversed(trials), reversed(rivals), strict=True)
        ):
            axes.plot([low, high], [place, place], color=BLUE, linewidth=2, solid_capstyle="round")
            axes.plot([skill], [place], "o", color=BLUE, markersize=6.5, markeredgecolor=PAPER)
            axes.plot([rival], [place], "|", color=VERMILLION, markersize=15, markeredgewidth=2.2)
            axes.annotate(words, (rival, place), xytext=(0, -16), textcoords="offset points", ha="center", fontsize=7.5,
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
