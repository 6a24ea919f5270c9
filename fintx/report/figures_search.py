"""Figures of a search: history, slices through its space, the map of shapes, learning curves, importance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from fintx.config.schema import Shape
from fintx.report.figures import (
    BLUE,
    CYCLE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    VERMILLION,
    WIDTH,
    Picture,
    canvas,
    keep,
    label_lines,
    robust_limits,
)
from fintx.report.format import metric_words
from fintx.types import Floats


def history(
    numbers: Sequence[int],
    values: Sequence[float | None],
    *,
    metric: str,
    minimize: bool,
    baselines: Mapping[str, float],
    best_baseline: str | None,
    queued: Sequence[bool],
) -> Picture:
    """Every trial's metric in the order of the search, the best so far, and what must be beaten.

    Args:
        values: by trial; none where it failed.
        baselines: name → metric.
        best_baseline: must be seen; another one far off is named at the edge.
    """
    known = [(n, v, q) for n, v, q in zip(numbers, values, queued, strict=True) if v is not None]
    failed = [n for n, v in zip(numbers, values, strict=True) if v is None]
    with canvas(height=3.3) as figure:
        axes = figure.subplots()
        low, high = _history_limits([v for _, v, _ in known], baselines, best_baseline)
        for wanted, marker, words in ((False, "o", "sampler"), (True, "D", "queue")):
            chosen = [(n, v) for n, v, q in known if q == wanted]
            if chosen:
                axes.plot(*zip(*chosen, strict=True), marker, color=BLUE, alpha=0.75, markersize=4.5, label=words,
                          markeredgewidth=0)  # fmt: skip
        best = np.minimum.accumulate([v for _, v, _ in known]) if minimize else np.maximum.accumulate(
            [v for _, v, _ in known])  # fmt: skip
        steps = [n for n, _, _ in known] + [max(numbers) + 0.5]
        axes.step(steps, [*best, best[-1]], where="post", color=VERMILLION)
        outside = [n for n, v, _ in known if not low <= v <= high]
        edge = high if minimize else low
        if outside:
            axes.plot(outside, [edge] * len(outside), "^" if minimize else "v", color=BLUE, markersize=5, clip_on=False)
        if failed:
            axes.plot(failed, [edge] * len(failed), "x", color=MUTED, markersize=5, clip_on=False)
        labels = [(float(best[-1]), "best so far", VERMILLION)]
        for name, value in baselines.items():
            if low <= value <= high:
                axes.axhline(value, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
                labels.append((value, name, INK))
            else:
                arrow = "↑" if value > high else "↓"
                labels.append((high if value > high else low, f"{arrow} {name} {value:.4f}", MUTED))
        axes.set_ylim(low, high)
        axes.set_xlim(min(numbers) - 0.5, max(numbers) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        label_lines(axes, labels)
        axes.set_xlabel("trial number")
        axes.set_ylabel(_axis_words(metric))
        if any(queued):
            axes.legend(loc="upper right", fontsize=8.5)
        words = "lower" if minimize else "higher"
        more = f" Crosses at the edge: {len(failed)} failed trials." if failed else ""
        more += f" Triangles at the edge: {len(outside)} trials beyond it." if outside else ""
        caption = f"Each point is a trial's validation {metric.replace('_', ' ')} at its best step ({words} is better); dashed: baselines on the same rows.{more}"  # noqa: E501
        return keep(figure, "history", "Course of the search", caption)


def _history_limits(
    values: Sequence[float], baselines: Mapping[str, float], best_baseline: str | None
) -> tuple[float, float]:
    """The trials and the best baseline; the others only where they don't flatten the picture."""
    low, high = robust_limits(
        values, [baselines[best_baseline]] if best_baseline is not None and best_baseline in baselines else []
    )
    near = [value for value in baselines.values() if low - (high - low) <= value <= high + (high - low)]
    return robust_limits(values, near) if near else (low, high)


def _axis_words(metric: str) -> str:
    return f"validation {metric_words(metric)}{', nats per row' if metric == 'log_loss' else ''}"


@dataclass(frozen=True)
class Slice:
    """One searched value of every successful trial."""

    words: str
    values: tuple[float | str, ...]
    log: bool


def slices(found: Sequence[Slice], skills: Floats) -> Picture:
    """One panel per searched value: the value against skill."""
    columns = min(4, len(found))
    rows = math.ceil(len(found) / columns)
    with canvas(height=1.0 + 1.75 * rows) as figure:
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        low, high = robust_limits(list(skills))
        best = int(np.argmax(skills))
        for axes, each in zip(grid.flat, found, strict=False):
            words = any(isinstance(value, str) for value in each.values)
            names = sorted(set(map(str, each.values)))
            x = [float(names.index(str(value)) if words else value) for value in each.values]
            axes.scatter(x, skills, s=14, color=BLUE, alpha=0.75, linewidths=0)
            axes.scatter([x[best]], [skills[best]], s=38, facecolors="none", edgecolors=VERMILLION, linewidths=1.5)
            if words:
                axes.set_xticks(range(len(names)), names)
            elif each.log and min(x) > 0:
                _log_ticks(axes, x)
            axes.set_xlabel(each.words)
            axes.set_ylim(low, high)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1, symbol=" %"))
        for axes in grid.flat[len(found) :]:
            axes.set_visible(False)
        for row in grid:
            row[0].set_ylabel("skill")
        caption = "Each point is a trial; the best one is ringed. Skill is the share of the prior's loss that is saved."
        return keep(figure, "slices", "Slices through the search space", caption)


def _log_ticks(axes: Axes, values: Sequence[float]) -> None:
    """A log axis with few, plain numbers."""
    axes.set_xscale("log")
    low, high = min(values), max(values)
    distinct = sorted(set(values))
    if len(distinct) <= 5 and all(value == _round(value) for value in distinct):  # a list of choices
        ticks = distinct
    else:
        middle = math.sqrt(low * high)
        ticks = [_round(low), _round(middle), _round(high)] if high / low > 1.5 else [_round(middle)]
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()


def _round(value: float) -> float:
    return float(f"{value:.1g}" if value < 10 else f"{value:.2g}")


def shape_map(trained: Sequence[tuple[Shape, float]], feasible: Sequence[Shape]) -> Picture:
    """Width against depth, colour for skill, the feasible set outlined."""
    with canvas(height=3.8) as figure:
        axes = figure.subplots()
        widths = sorted({shape.d_model for shape in feasible} | {shape.d_model for shape, _ in trained})
        for width in sorted({shape.d_model for shape in feasible}):
            depths = [shape.n_layers for shape in feasible if shape.d_model == width]
            middle = widths.index(width)
            low, high = math.log2(min(depths)) - 0.18, math.log2(max(depths)) + 0.18
            axes.add_patch(
                FancyBboxPatch((middle - 0.3, low), 0.6, high - low, boxstyle="round,pad=0,rounding_size=0.15",
                               facecolor="none", edgecolor=MUTED, linewidth=0.9)
            )  # fmt: skip
        ordered = sorted(trained, key=lambda pair: pair[1])
        x = [widths.index(shape.d_model) + _aside(shape) for shape, _ in ordered]
        y = [math.log2(shape.n_layers) for shape, _ in ordered]
        skills = [skill for _, skill in ordered]
        low, high = robust_limits(skills)
        points = axes.scatter(x, y, c=skills, cmap="cividis", s=52, edgecolors=INK, linewidths=0.6, zorder=3,
                              vmin=max(low, min(skills)), vmax=max(skills))  # fmt: skip
        if ordered:
            axes.annotate("best", (x[-1], y[-1]), xytext=(8, 8), textcoords="offset points", color=INK, fontsize=8.5)
        axes.set_xticks(range(len(widths)), [str(width) for width in widths])
        axes.set_xlim(-0.6, len(widths) - 0.4)
        depths = sorted({shape.n_layers for shape in feasible} | {shape.n_layers for shape, _ in trained})
        ticks = [d for d in (1, 2, 4, 8, 12, 24, 48, 96, 192, 256) if depths[0] <= d <= depths[-1]] or [depths[0]]
        axes.set_yticks([math.log2(d) for d in ticks], [str(d) for d in ticks])
        axes.set_ylim(math.log2(depths[0]) - 0.4, math.log2(depths[-1]) + 0.4)
        axes.set_xlabel("d_model")
        axes.set_ylabel("layers")
        bar = figure.colorbar(points, ax=axes, pad=0.02, aspect=28)
        bar.set_label("skill")
        bar.outline.set_visible(False)
        assert bar.solids is not None
        bar.solids.set(rasterized=False, edgecolor="face")  # a picture of vectors alone, without seams
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1, symbol=" %"))
        caption = (
            "Each point is a trained shape, its colour the trial's skill; outlines hold the depths that fit the budget "
            "at each width. Points of one width stand side by side by number of heads."
        )
        return keep(figure, "shape_map", "Map of shapes", caption)


def _aside(shape: Shape) -> float:
    """Heads and feed-forward ratio move a point a little, so that equal widths and depths don't hide each other."""
    return 0.07 * (math.log2(shape.n_heads) % 4 - 1.5) + 0.03 * (1 if shape.d_ff > 2 * shape.d_model else -1)


@dataclass(frozen=True)
class Curve:
    """One training run."""

    words: str
    epochs: Sequence[int]
    train: Sequence[float | None]
    validation: Sequence[float | None]
    best_epoch: int


def learning_curves(found: Sequence[Curve], *, metric: str, baseline: tuple[str, float] | None) -> Picture:
    """Training loss and validation metric by epoch, of the best trials."""
    with canvas(height=3.2) as figure:
        left, right = figure.subplots(1, 2)
        labels = []
        for colour, curve in zip(CYCLE, found, strict=False):
            left.plot(curve.epochs, [np.nan if v is None else v for v in curve.train], color=colour)
            values = [np.nan if v is None else v for v in curve.validation]
            right.plot(curve.epochs, values, color=colour)
            at = list(curve.epochs).index(curve.best_epoch) if curve.best_epoch in curve.epochs else None
            if at is not None:
                right.plot([curve.best_epoch], [values[at]], "o", color=colour, markersize=5, markeredgecolor=PAPER)
            labels.append((float(values[-1]), curve.words, colour))
        if baseline is not None:
            right.axhline(baseline[1], color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
            labels.append((baseline[1], baseline[0], INK))
        held = [v for curve in found for v in curve.validation if v is not None]
        right.set_ylim(*robust_limits(held, [baseline[1]] if baseline else []))
        label_lines(right, [each for each in labels if np.isfinite(each[0])])
        left.set_ylabel("training loss, mean per row")
        right.set_ylabel(_axis_words(metric))
        for axes in (left, right):
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        caption = (
            "The best trials: training loss to the left, validation to the right; a dot marks the epoch that was kept."
        )
        return keep(figure, "learning_curves", "Learning curves", caption)


def importance(found: Sequence[tuple[str, float, float]]) -> Picture:
    """Importances as bars, with what chance alone would reach.

    Args:
        found: (name, share, 95 % of shuffled studies), largest first.
    """
    with canvas(height=0.9 + 0.3 * len(found), width=0.8 * WIDTH) as figure:
        axes = figure.subplots()
        for place, (_, share, by_chance) in enumerate(reversed(found)):
            axes.barh(place, share, height=0.55, color=GREEN if share > by_chance else MUTED, alpha=0.85)
            axes.plot([by_chance] * 2, [place - 0.38, place + 0.38], color=ORANGE, linewidth=2)
        axes.set_yticks(range(len(found)), [name for name, _, _ in reversed(found)])
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        axes.set_xlabel("share of importance (PED-ANOVA)")
        caption = (
            "Bars: how differently the best trials are spread along each value. Orange: what 95 % of studies with "
            "shuffled results stay below; a bar that doesn't reach beyond it (grey) shows nothing."
        )
        return keep(figure, "importance", "What matters for a good trial", caption)
