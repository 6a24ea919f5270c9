"""Figures: one style, each kept as SVG for the page and as SVG and PNG beside it.

The only module that imports matplotlib. Colours are Okabe & Ito's (2008), which colour-blind readers can tell apart; on
a page they become CSS variables, so that one figure serves a light screen, a dark screen and print.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter
from scipy.optimize import isotonic_regression

from fintx.analysis import scaling_laws
from fintx.analysis.comparison import StudyRow
from fintx.analysis.study_results import StudyResults
from fintx.config.schema import Shape
from fintx.evaluate.calibration import PrecisionRecall, ReliabilityBin
from fintx.evaluate.significance import Estimate
from fintx.model.family import Family
from fintx.report.format import LOSS_WORDS, count, metric_words
from fintx.types import Floats

BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#56b4e9", "#cc79a7"
_CYCLE = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)
INK, MUTED, GRID, PAPER = "#1b1f24", "#68707a", "#dfe3e8", "#fffffe"
_VARIABLES = {
    INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)", PAPER: "var(--paper)", BLUE: "var(--blue)",
    VERMILLION: "var(--vermillion)", GREEN: "var(--green)", SKY: "var(--sky)",
}  # fmt: skip
_FONTS = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
_WIDTH = 7.6  # inches: a column of the page
_N_CURVES = 5  # best trials whose learning curves are drawn
_DASHED: Any = {"linewidth": 0.9, "linestyle": (0, (4, 3))}
_STYLE: Any = {
    "figure.facecolor": PAPER, "axes.facecolor": "none", "savefig.facecolor": PAPER,
    "font.size": 9.0, "axes.titlesize": 9.5, "axes.labelsize": 9.0, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.7, "axes.axisbelow": True, "lines.linewidth": 1.6,
    "legend.frameon": False, "legend.fontsize": 8.5, "svg.fonttype": "none", "svg.hashsalt": "fintx",
    "axes.unicode_minus": True,
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A figure in its three forms, with its caption."""

    name: str
    """File stem."""
    title: str
    caption: str  # how to read it; screen readers say it too
    inline: str
    """SVG for the page, in the page's colours."""
    svg: str
    png: bytes


@contextmanager
def canvas(*, height: float, width: float = _WIDTH) -> Iterator[Figure]:
    """An empty figure in the house style; sizes in inches."""
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        yield Figure(figsize=(width, height), layout="constrained")


def picture(figure: Figure, name: str, title: str, caption: str) -> Picture:
    """The figure's three forms; equal figures give equal bytes."""
    text, pixels = io.StringIO(), io.BytesIO()
    figure.draw_without_rendering()  # lays it out once for both formats
    figure.set_layout_engine("none")
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    figure.savefig(pixels, format="png", dpi=160, metadata={"Software": None})
    svg = text.getvalue()
    return Picture(name, title, caption, _inline(svg, name), svg, pixels.getvalue())


def _inline(svg: str, name: str) -> str:
    """The SVG with the page's colours and fonts, ids of its own, no fixed size and no metadata."""
    body = svg[svg.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, variable)
    body = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", body)
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", rf"font: \1px {_FONTS}", body)
    body = re.sub(r"font-family: [^;\"]*", f"font-family: {_FONTS}", body)
    width, height = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', body).groups()  # type: ignore[union-attr]
    size = f'style="max-width: {float(width) * 4 / 3:.0f}px" role="img" aria-labelledby="{name}-caption"'
    body = body.replace(f'width="{width}pt" height="{height}pt"', size, 1)
    return re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL).strip()


def keep_apart(places: Sequence[float], gap: float) -> Floats:
    """Places at least `gap` apart in the same order, moved as little as possible (least squares)."""
    order, steps = np.argsort(places, kind="stable"), gap * np.arange(len(places))
    moved = isotonic_regression(np.asarray(places)[order] - steps).x + steps
    return moved[np.argsort(order)]


def _label_right(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write (y, text, colour) labels right of the axes, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    heights = keep_apart([(y - low) / (high - low) for y, _, _ in labels], gap=0.06)
    for height, (_, text, colour) in zip(heights, labels, strict=True):
        axes.text(1.01, height, text, transform=axes.transAxes, color=colour, va="center", fontsize=8.5, clip_on=False)


def _limits(values: Sequence[float], always: Sequence[float] = ()) -> tuple[float, float]:
    """Axis limits that show the bulk of the values, and all that must be seen; far outliers stay outside."""
    first, third = np.quantile(values, [0.25, 0.75])
    reach = 3 * max(third - first, 1e-9)
    visible = [*(v for v in values if first - reach <= v <= third + reach), *always]
    low, high = min(visible), max(visible)
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad


def _in_percent(*axes: Axis, decimals: int | None = None) -> None:
    for axis in axes:
        axis.set_major_formatter(PercentFormatter(1.0, decimals=decimals, symbol=" %"))


def _plot_interval(axes: Axes, y: int, low: float, mean: float, high: float, colour: str) -> None:
    axes.plot([low, high], [y, y], color=colour, linewidth=2, solid_capstyle="round")
    axes.plot([mean], [y], "o", color=colour, markersize=6, markeredgecolor=PAPER)


def _metric_label(metric: str) -> str:
    return f"validation {metric_words(metric)}{', nats per row' if metric == 'log_loss' else ''}"


# --- forecasts and studies compared -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ForestRow:
    """One line of a forest plot."""

    label: str
    gain: Estimate
    strong: bool  # green


def plot_forest(rows: Sequence[ForestRow], *, baseline: str, unit: str, title: str, caption: str) -> Picture:
    """Gains over the best baseline with their intervals."""
    with canvas(height=0.95 + 0.27 * len(rows)) as figure:
        axes = figure.subplots()
        for y, row in enumerate(reversed(rows)):
            _plot_interval(axes, y, row.gain.low, row.gain.mean, row.gain.high, GREEN if row.strong else MUTED)
        axes.axvline(0, color=INK, linewidth=1)
        axes.text(0, len(rows) - 0.4, f"  {baseline}", va="bottom", fontsize=8.5, color=INK)
        axes.set_yticks(range(len(rows)), [row.label for row in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) + 0.25)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"gain over {baseline} in {unit} (right is better)")
        return picture(figure, "forest", title, caption)


def plot_reliability(curves: Mapping[str, Sequence[ReliabilityBin]]) -> Picture:
    """Observed frequency against predicted probability, with Wilson intervals."""
    with canvas(height=3.6, width=0.72 * _WIDTH) as figure:
        axes = figure.subplots()
        top = min(1.0, 1.05 * max(max(b.observed.high, b.mean) for bins in curves.values() for b in bins))
        axes.plot([0, top], [0, top], color=MUTED, **_DASHED)
        labels = [(top, "perfect calibration", MUTED)]
        for colour, (name, bins) in zip(_CYCLE, curves.items(), strict=False):
            predicted, observed = [b.mean for b in bins], [b.observed.value or 0.0 for b in bins]
            intervals = [b.observed.low for b in bins], [b.observed.high for b in bins]
            axes.vlines(predicted, *intervals, color=colour, linewidth=1.1, alpha=0.6)
            axes.plot(predicted, observed, "o-", color=colour, markersize=4.5, linewidth=1.1)
            labels.append((observed[-1], name, colour))
        axes.set(xlim=(0, top), ylim=(0, top), xlabel="predicted probability", ylabel="observed frequency")
        _label_right(axes, labels)
        _in_percent(axes.xaxis, axes.yaxis)
        caption = (
            "Ten bins of equal size; bars are 95 % Wilson intervals, too narrow where labels overlap. The dashed line "
            "is perfect calibration: predicted probabilities equal observed frequencies."
        )
        return picture(figure, "reliability", "Reliability", caption)


def plot_precision_recall(curves: Mapping[str, PrecisionRecall]) -> Picture:
    """Precision against recall, with the base rate that guessing reaches."""
    with canvas(height=3.2, width=0.8 * _WIDTH) as figure:
        axes = figure.subplots()
        for colour, (name, curve) in zip(_CYCLE, curves.items(), strict=False):
            band = curve.precision_low, curve.precision_high
            axes.fill_between(curve.recall, *band, color=colour, alpha=0.12, linewidth=0)
            axes.plot(curve.recall, curve.precision, color=colour, linewidth=1.3, label=name)
            base_rate = curve.base_rate
        axes.axhline(base_rate, color=MUTED, **_DASHED)
        axes.set(xlim=(0, 1), ylim=(0, 1))
        _label_right(axes, [(base_rate, "base rate", MUTED)])
        axes.legend(loc="upper right")
        _in_percent(axes.xaxis, axes.yaxis)
        axes.set_xlabel("recall: share of all events that were predicted")
        axes.set_ylabel("precision: share of predictions that came true")
        caption = (
            "Each point is a threshold; bands are 95 % Wilson intervals. Guessing has the base rate at any recall."
        )
        return picture(figure, "precision_recall", "Precision and recall", caption)


def plot_cumulative_gain(dates: np.ndarray, gain: Floats, *, name: str, against: str) -> Picture:
    """Loss saved against a baseline, in nats, summed over time."""
    with canvas(height=3.0) as figure:
        axes = figure.subplots()
        axes.plot(dates.astype("datetime64[D]"), gain, color=BLUE, linewidth=1.3)
        axes.axhline(0, color=INK, linewidth=0.9)
        axes.margins(x=0)
        _label_right(axes, [(float(gain[-1]), name, BLUE), (0.0, against, INK)])
        axes.set(xlabel="validation day", ylabel="nats saved so far")
        caption = (
            f"Where it rises, the trial is ahead of {against}; where it falls, behind. A gain that comes from a single "
            "stretch of days is not a steady one."
        )
        return picture(figure, "cumulative_gain", f"Gain over {against} through time", caption)


def plot_scaling(laws: scaling_laws.ScalingLaws, *, size_label: str) -> Picture:
    """Relative loss against size and against compute: all trials, the frontier, the fit."""
    trials, loss = laws.trials, laws.trials.loss
    frontier = np.zeros(len(loss), bool)
    frontier[laws.frontier.chosen] = True
    trend = laws.frontier if laws.frontier.laws else laws.all_trials
    law = next((law.fit for law in trend.laws if law.fit.form == "power law"), None)
    with canvas(height=3.6, width=1.1 * _WIDTH) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        points: Any = {"marker": "o", "linestyle": "none"}
        for axes, x in ((left, trials.size), (right, trials.flops)):
            axes.plot(x[~frontier], loss[~frontier], color=SKY, alpha=0.6, markersize=4, markeredgewidth=0,
                      label="all trials", **points)  # fmt: skip
            axes.plot(x[frontier], loss[frontier], color=BLUE, markersize=5.5, markeredgecolor=PAPER,
                      label="frontier", **points)  # fmt: skip
            axes.axhline(1.0, color=INK, **_DASHED)
            axes.set_xscale("log")
            axes.minorticks_off()
        left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value).replace(".0", "")))
        if trend.band is not None and law is not None:
            left.fill_between(trend.grid, *trend.band, color=VERMILLION, alpha=0.15, linewidth=0)
            left.plot(trend.grid, law(trend.grid), color=VERMILLION, label="power law, 95 %")
        envelope = scaling_laws.envelope(trials.flops, loss)
        (steps,) = right.step(*envelope, where="post", color=ORANGE, label="least so far")
        # Badly tuned trials may lie far above: the axis shows the bulk.
        top = max(float(np.quantile(loss, 0.95)), 1.0, float(loss[frontier].max()))
        pad = 0.06 * (max(*loss, 1.0) - min(*loss, 1.0))
        left.set_ylim(min(float(loss.min()), 1.0) - pad, top + pad)
        left.text(left.get_xlim()[1], 1.0, trials.baseline, va="bottom", ha="right", fontsize=8.5, color=INK)
        left.set(xlabel=size_label, ylabel=f"{LOSS_WORDS[trials.studies[0].metric]} ÷ that of {trials.baseline}")
        right.set_xlabel("training compute (FLOPs)")
        left.legend(loc="upper right")
        right.legend(loc="upper right", handles=[steps])
        ratio = trials.baseline_loss / trials.prior_loss
        skills = right.secondary_yaxis("right", functions=(lambda y: 1 - ratio * y, lambda skill: (1 - skill) / ratio))
        _in_percent(skills.yaxis, decimals=1)
        skills.set_ylabel("skill over the prior")
        caption = (
            f"Below the dashed line a trial beats {trials.baseline}. Dark: the best quarter of each size's first "
            "trials; light: all others. The scale on the right gives the same values as skill over the prior."
        )
        return picture(figure, "scaling", "Loss against size and compute", caption)


def plot_skill_ladder(rows: Sequence[StudyRow]) -> Picture:
    """Skill of each study's best trial with its interval, beside its best baseline."""
    with canvas(height=0.95 + 0.46 * len(rows)) as figure:
        axes = figure.subplots()
        for y, row in enumerate(reversed(rows)):
            assert row.best is not None and row.baseline is not None and row.baseline_skill is not None
            skill, low, high = row.best
            _plot_interval(axes, y, low, skill, high, BLUE)
            axes.plot([row.baseline_skill], [y], "|", color=VERMILLION, markersize=15, markeredgewidth=2.2)
            axes.annotate(row.baseline, (row.baseline_skill, y), xytext=(0, -16), textcoords="offset points",
                          ha="center", fontsize=7.5, color=VERMILLION)  # fmt: skip
        axes.axvline(0, color=INK, linewidth=0.9)
        axes.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
        axes.set_ylim(-0.7, len(rows) - 0.4)
        axes.grid(axis="y", visible=False)
        _in_percent(axes.xaxis)
        axes.set_xlabel("skill over the prior")
        caption = (
            "Dots: each study's best trial with the 95 % interval of its skill over other days; upright marks: the "
            "best baseline on the same rows. Skills compare across studies with different labels; losses don't."
        )
        return picture(figure, "skill_by_study", "Skill by study", caption)


# --- a search ---------------------------------------------------------------------------------------------------------


def _baseline_values(results: StudyResults, *names: str | None) -> dict[str, float]:
    scores = {name: results.baselines[name]["metrics"] for name in names if name in results.baselines}
    return {name: values[results.metric] for name, values in scores.items() if values.get(results.metric) is not None}


def plot_history(results: StudyResults) -> Picture:
    """Every trial's metric in the order of the search, the best so far, and the baselines to beat."""
    metric, minimize = results.metric, results.minimize
    trials = [(r.trial_number, r.value, r.source == "queue") for r in results.records if r.value is not None]
    failed = [record.trial_number for record in results.records if record.value is None]
    values = [value for _, value, _ in trials]
    baselines = _baseline_values(results, "prior", results.best_baseline)
    # The best baseline must be seen; another one only where it doesn't squeeze the trials together.
    low, high = _limits(values, [value for name, value in baselines.items() if name == results.best_baseline])
    near = [value for value in baselines.values() if 2 * low - high <= value <= 2 * high - low]
    low, high = _limits(values, near) if near else (low, high)
    with canvas(height=3.3) as figure:
        axes = figure.subplots()
        for source, marker in (("sampler", "o"), ("queue", "D")):
            if points := [(n, value) for n, value, queued in trials if queued == (source == "queue")]:
                axes.plot(*zip(*points, strict=True), marker, color=BLUE, alpha=0.75, markersize=4.5, label=source,
                          markeredgewidth=0)  # fmt: skip
        best = (np.minimum if minimize else np.maximum).accumulate(values)
        last = max(record.trial_number for record in results.records)
        axes.step([*(n for n, _, _ in trials), last + 0.5], [*best, best[-1]], where="post", color=VERMILLION)
        outside = [n for n, value, _ in trials if not low <= value <= high]
        edge = high if minimize else low
        axes.plot(outside, [edge] * len(outside), "^" if minimize else "v", color=BLUE, markersize=5, clip_on=False)
        axes.plot(failed, [edge] * len(failed), "x", color=MUTED, markersize=5, clip_on=False)
        labels = [(float(best[-1]), "best so far", VERMILLION)]
        for name, value in baselines.items():
            if low <= value <= high:
                axes.axhline(value, color=INK, **_DASHED)
                labels.append((value, name, INK))
            else:
                labels.append((min(max(value, low), high), f"{'↑' if value > high else '↓'} {name} {value:.4f}", MUTED))
        axes.set(xlim=(min(r.trial_number for r in results.records) - 0.5, last + 0.5), ylim=(low, high))
        axes.set(xlabel="trial number", ylabel=_metric_label(metric))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _label_right(axes, labels)
        if any(queued for _, _, queued in trials):
            axes.legend(loc="upper right")
        caption = (
            f"Each point is a trial's validation {metric_words(metric)} at its best step "
            f"({'lower' if minimize else 'higher'} is better); dashed: baselines on the same rows."
            + (f" Crosses at the edge: {len(failed)} failed trials." if failed else "")
            + (f" Triangles at the edge: {len(outside)} trials beyond it." if outside else "")
        )
        return picture(figure, "history", "Progress of the search", caption)


@dataclass(frozen=True)
class Slice:
    """One searched value of every trial."""

    label: str
    values: Sequence[Any]
    log: bool = False


def plot_slices(slices: Sequence[Slice], skills: Sequence[float]) -> Picture:
    """Skill against each searched value, a panel each."""
    columns = min(4, len(slices))
    rows = math.ceil(len(slices) / columns)
    with canvas(height=1.0 + 1.75 * rows) as figure:
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        best = int(np.argmax(skills))
        for axes, each in zip(grid.flat, slices, strict=False):
            x = each.values
            if any(isinstance(value, str | bool) for value in x):
                names = sorted(set(map(str, x)))
                x = [names.index(str(value)) for value in x]
                axes.set_xticks(range(len(names)), names)
            elif each.log and min(x) > 0:
                _set_log_ticks(axes, x)
            axes.scatter(x, skills, s=14, color=BLUE, alpha=0.75, linewidths=0)
            axes.scatter([x[best]], [skills[best]], s=38, facecolors="none", edgecolors=VERMILLION, linewidths=1.5)
            axes.set(xlabel=each.label, ylim=_limits(skills))
            _in_percent(axes.yaxis, decimals=1)
        for axes in grid.flat[len(slices) :]:
            axes.set_visible(False)
        for row in grid:
            row[0].set_ylabel("skill")
        caption = "Each point is a trial; the best one is ringed. Skill is the share of the prior's loss that is saved."
        return picture(figure, "slices", "Slices through the search space", caption)


def _set_log_ticks(axes: Axes, values: Sequence[float]) -> None:
    """A log axis with few, plain numbers: a list of choices in full, a range by its ends and middle."""

    def plain(value: float) -> float:
        return float(f"{value:.1g}" if value < 10 else f"{value:.2g}")

    axes.set_xscale("log")
    low, high, choices = min(values), max(values), sorted(set(values))
    ticks = [plain(low), plain(math.sqrt(low * high)), plain(high)]
    if len(choices) <= 5 and all(value == plain(value) for value in choices):
        ticks = choices
    elif high / low <= 1.5:
        ticks = ticks[1:2]
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()


def plot_shape_map(trained: Sequence[tuple[Shape, float]], feasible: Sequence[Shape], kind: Family) -> Picture:
    """Width against depth of each trial's (shape, skill), skill as colour, the feasible set outlined."""
    with canvas(height=3.8) as figure:
        axes = figure.subplots()
        shapes = [*feasible, *(shape for shape, _ in trained)]
        widths, depths = sorted({*map(kind.width, shapes)}), sorted({*map(kind.depth, shapes)})
        for width in {kind.width(shape) for shape in feasible}:
            fitting = [math.log2(kind.depth(shape)) for shape in feasible if kind.width(shape) == width]
            corner = widths.index(width) - 0.3, min(fitting) - 0.18
            axes.add_patch(
                FancyBboxPatch(corner, 0.6, max(fitting) - min(fitting) + 0.36, facecolor="none", edgecolor=MUTED,
                               boxstyle="round,pad=0,rounding_size=0.15", linewidth=0.9)
            )  # fmt: skip
        ordered = sorted(trained, key=lambda pair: pair[1])
        skills = [skill for _, skill in ordered]
        x = [widths.index(kind.width(shape)) + _aside(shape) for shape, _ in ordered]
        y = [math.log2(kind.depth(shape)) for shape, _ in ordered]
        points = axes.scatter(x, y, c=skills, cmap="cividis", s=52, edgecolors=INK, linewidths=0.6, zorder=3,
                              vmin=max(_limits(skills)[0], skills[0]), vmax=skills[-1])  # fmt: skip
        axes.annotate("best", (x[-1], y[-1]), xytext=(8, 8), textcoords="offset points", color=INK, fontsize=8.5)
        axes.set_xticks(range(len(widths)), list(map(str, widths)))
        ticks = [d for d in (1, 2, 4, 8, 12, 24, 48, 96, 192, 256) if depths[0] <= d <= depths[-1]] or [depths[0]]
        axes.set_yticks([math.log2(d) for d in ticks], list(map(str, ticks)))
        axes.set(xlim=(-0.6, len(widths) - 0.4), ylim=(math.log2(depths[0]) - 0.4, math.log2(depths[-1]) + 0.4))
        axes.set(xlabel=next(iter(kind.extents)), ylabel="layers")
        bar = figure.colorbar(points, ax=axes, pad=0.02, aspect=28, label="skill")
        bar.outline.set_visible(False)
        assert bar.solids is not None
        bar.solids.set(rasterized=False, edgecolor="face")  # vectors, without seams
        _in_percent(bar.ax.yaxis, decimals=1)
        caption = (
            "Each point is a trained shape, its colour the trial's skill; outlines hold the depths that fit the budget "
            "at each width. Points of one width are set side by side by number of heads."
        )
        return picture(figure, "shape_map", "Map of shapes", caption)


def _aside(shape: Shape) -> float:
    """Heads and feed-forward ratio move a point a little, so that equal widths and depths don't hide each other."""
    if "n_heads" not in shape.model_dump():
        return 0.0
    return 0.07 * (math.log2(shape.n_heads) % 4 - 1.5) + 0.03 * (1 if shape.d_ff > 2 * shape.d_model else -1)


def plot_learning_curves(results: StudyResults) -> Picture:
    """Training loss and validation metric by epoch, of the best trials (their last fold)."""
    walk_forward = len(results.ranked[0].folds) > 1  # baselines are scored over all folds
    baselines = {} if walk_forward else _baseline_values(results, results.best_baseline)
    labels, finite = [(value, name, INK) for name, value in baselines.items()], list(baselines.values())
    with canvas(height=3.2) as figure:
        left, right = figure.subplots(1, 2)
        for colour, record in zip(_CYCLE, results.ranked[:_N_CURVES], strict=False):
            fold = record.folds[-1]
            epochs = [int(entry["epoch"] or 0) for entry in fold.curve]
            train, validation = (np.array([entry.get(key) for entry in fold.curve], float)  # None becomes NaN
                                 for key in ("train_loss", results.metric))  # fmt: skip
            left.plot(epochs, train, color=colour)
            right.plot(epochs, validation, color=colour)
            if fold.best_epoch in epochs:
                value = validation[epochs.index(fold.best_epoch)]
                right.plot([fold.best_epoch], [value], "o", color=colour, markersize=5, markeredgecolor=PAPER)
            finite += list(validation[np.isfinite(validation)])
            labels.append((float(validation[-1]), f"trial {record.trial_number}", colour))
        for value in baselines.values():
            right.axhline(value, color=INK, **_DASHED)
        right.set_ylim(*_limits(finite, list(baselines.values())))
        _label_right(right, [label for label in labels if np.isfinite(label[0])])
        left.set_ylabel("training loss, mean per row")
        right.set_ylabel(_metric_label(results.metric))
        for axes in (left, right):
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        caption = "The best trials: training loss left, validation right; a dot marks the epoch that was kept."
        return picture(figure, "learning_curves", "Learning curves", caption)


def plot_importance(rows: Sequence[tuple[str, float, float]]) -> Picture:
    """Bars of (name, share of importance, what 95 % of shuffled studies stay below), largest first."""
    with canvas(height=0.9 + 0.3 * len(rows), width=0.8 * _WIDTH) as figure:
        axes = figure.subplots()
        for y, (_, share, by_chance) in enumerate(reversed(rows)):
            axes.barh(y, share, height=0.55, color=GREEN if share > by_chance else MUTED, alpha=0.85)
            axes.plot([by_chance] * 2, [y - 0.38, y + 0.38], color=ORANGE, linewidth=2)
        axes.set_yticks(range(len(rows)), [name for name, _, _ in reversed(rows)])
        axes.grid(axis="y", visible=False)
        _in_percent(axes.xaxis)
        axes.set_xlabel("share of importance (PED-ANOVA)")
        caption = (
            "Bars: how differently the best trials are spread along each value. Orange: the level that 95 % of studies "
            "with shuffled results stay below; a bar that doesn't pass it (grey) shows nothing."
        )
        return picture(figure, "importance", "What matters for a good trial", caption)
