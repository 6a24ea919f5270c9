"""Scaling page: what `just scaling` writes and prints, and the section of a study's page on studies beside it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from fintx.analysis import scaling_laws
from fintx.analysis.scaling_laws import Law, NotFitted, ScalingLaws, SizeTrend
from fintx.evaluate.power_law import BOUND
from fintx.report import figures, page
from fintx.report.format import LOSSES, count, number, percent
from fintx.report.page import Block, Page, Prose, Section
from fintx.report.table import Table, make

FOLDER = "_scaling"
UNKNOWN = " (not determined)"


def write(laws: ScalingLaws, *, outputs: Path) -> Path:
    """Write outputs/_scaling/<studies>/index.html with its files."""
    return page.write(build(laws), outputs / FOLDER / page.folder_name(results.name for results in laws.trials.studies))


def build(laws: ScalingLaws) -> Page:
    """The page as a value."""
    trials = laws.trials
    first, last = _ends(laws)
    return Page(
        title=f"Does it scale? {first} to {last}",
        kicker="fintx scaling",
        question=f"Does {_loss(laws)} fall with {_sizes(laws)}, against {trials.baseline} on the same rows?",
        answer=sentence(laws),
        tone={"scales": "good", "flat": "bad", "can't tell": "open"}[laws.verdict],  # type: ignore[arg-type]
        warnings=trials.notes,
        facts=(
            ("studies", str(len(trials.studies))),
            ("successful trials", str(len(trials.loss))),
            ("validation rows", f"{trials.n_rows:,}"),
            ("block of days", str(trials.resamples.block)),
            ("stated difference", percent(laws.difference)),
        ),
        sections=(Section("scaling", "Scaling", _blocks(laws)),),
        footer=page.footer(),
    )


def siblings_section(laws: ScalingLaws | NotFitted | None) -> Section | None:
    """Of a study's page: over it and the studies beside it that differ from it in size alone."""
    if laws is None:
        return None
    if isinstance(laws, ScalingLaws):
        return Section("scaling", "Scaling", (Prose(sentence(laws)), *_blocks(laws)))
    words = (
        f"Beside this study lie {', '.join(laws.names)}, of the same label and other budgets; no line can be fitted "
        "through them:"
    )
    return Section("scaling", "Scaling", (Prose(words), Prose(laws.reasons, "note")))


def _blocks(laws: ScalingLaws) -> tuple[Block, ...]:
    """Figure and tables."""
    how = (
        f"Losses are divided by {laws.trials.baseline}'s on the same days, so that calm and wild times cancel. The "
        f"frontier is the best quarter of each size's first {laws.effort} successful trials: as many for every "
        "size, since the best of more is luckier. Intervals: days resampled in blocks and runs resampled within each "
        "size, together."
    )
    size_words = "parameters (counted)" if laws.trials.over == "parameters" else "training rows"
    return Prose(how, "note"), figures.scaling(laws, size_words=size_words), *tables(laws)


def _loss(laws: ScalingLaws) -> str:
    return LOSSES[laws.trials.studies[0].metric]


def _sizes(laws: ScalingLaws) -> str:
    """What is on the axis."""
    return "parameters" if laws.trials.over == "parameters" else "training rows"


def _cell(cell: int | str) -> str:
    return count(cell) if isinstance(cell, int) else cell


def _ends(laws: ScalingLaws) -> tuple[str, str]:
    return _cell(laws.trials.cells[0]), _cell(laws.trials.cells[-1])


# --- in words ---------------------------------------------------------------------------------------------------------


def sentence(laws: ScalingLaws) -> str:
    """Scales, flat, or can't tell; from where to where, by how much, with the interval."""
    trials, gain = laws.trials, laws.frontier.gain
    first, last = _ends(laws)
    if trials.over == "data":
        first, last = count(trials.size.min()), count(trials.size.max())
    moves = "falls" if gain.mean > 0 else "rises"
    change = (
        f"From {first} to {last} {_sizes(laws)} the {_loss(laws)} of tuned models {moves} by "
        f"{number(100 * abs(gain.mean), 2)} % of {trials.baseline}'s (90 % interval of the gain "
        f"{number(100 * gain.low, 2)} … {number(100 * gain.high, 2)} %)"
    )
    stated = f"the stated {percent(laws.difference)}"
    if laws.verdict == "scales":
        verdict = f"Scales. {change}."
    elif laws.verdict == "flat":
        worse = " Bigger is worse." if gain.high < 0 else ""
        verdict = f"Flat. {change}: less than {stated}.{worse}"
    else:
        why = f"neither above zero nor below {stated}"
        if gain.low > 0:
            why = "above zero, but by AICc a constant explains the trials as well"
        verdict = f"Can't tell. {change}: {why}. {_needed(laws)}"
    if min(laws.frontier.by_cell) >= 1:
        verdict += f" No size beats {trials.baseline}."
    preferred = laws.preferred
    told = laws.prefers_constant and laws.verdict == "can't tell" and gain.low > 0
    if preferred is not None and preferred.weight is not None and not told:
        which = "the frontier" if laws.frontier.preferred is not None else "all trials"
        forms = {"constant": "a constant", "power law": "a power law"}
        form = forms.get(preferred.fit.form, "a power law that turns up again")
        verdict += f" AICc prefers {form} for {which} (weight {preferred.weight:.2f})."
    return verdict


def _needed(laws: ScalingLaws) -> str:
    """How many days and runs would tell the stated difference from none, four times out of five."""
    gain, wanted, n_rows = laws.frontier.gain, laws.needed_se, laws.trials.n_rows
    if gain.se <= wanted:
        return "Sizes further apart, or more trials of each, would tell."
    have = (
        f"To tell {percent(laws.difference)} from nothing takes a standard error of {number(100 * wanted, 2)} %; "
        f"it is {number(100 * gain.se, 2)} %, of which days make {number(100 * gain.by_days, 2)} % and runs "
        f"{number(100 * gain.by_runs, 2)} %"
    )
    rest = wanted**2 - gain.by_days**2
    if rest > 0.1 * wanted**2:
        trials = math.ceil(laws.effort * gain.by_runs**2 / rest)
        return f"{have}: about {max(trials, laws.effort + 1):,} trials of each size would do, on the same days."
    rows = math.ceil(n_rows * 2 * gain.by_days**2 / wanted**2)
    runs = math.ceil(laws.effort * 2 * gain.by_runs**2 / wanted**2)
    return (
        f"{have}: more trials alone can't do it. About {rows:,} validation rows would (there are {n_rows:,}; more "
        f"history, or more assets that move on their own), with {max(runs, laws.effort):,} trials of each size."
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(laws: ScalingLaws) -> tuple[Table, ...]:
    """Sizes, gains, fitted laws."""
    trials, sizes = laws.trials, []
    for i, name in enumerate(trials.cells):
        mine = trials.cell == i
        studies = " ".join(dict.fromkeys(trials.studies[s].name for s in trials.study[mine]))
        sizes.append(
            (_cell(name), studies, int(mine.sum()),
             f"{count(trials.size[mine].min())} … {count(trials.size[mine].max())}",
             float(np.median(trials.flops[mine])), float(trials.loss[mine].min()), laws.frontier.by_cell[i],
             laws.all_trials.by_cell[i], 1 - laws.frontier.by_cell[i] * trials.baseline_loss / trials.prior_loss)
        )  # fmt: skip
    by_size = make(
        "sizes", "By size",
        ["size", "studies", ("trials", "whole"), _sizes(laws), ("median FLOPs", "size"), ("least loss", "number"),
         ("frontier", "number"), ("all trials", "number"), ("frontier's skill", "percent")],
        sizes, note=f"Losses relative to {trials.baseline}: 1 is as good, .98 saves two percent.",
    )  # fmt: skip
    gains = make(
        "gains", "Gain, and the test of flatness",
        ["", ("gain (% of the baseline's loss)", "number"), "90 % interval", ("SE from days", "number"),
         ("SE from runs", "number"), "its interval says"],
        [
            (each.which, 100 * each.gain.mean, f"{100 * each.gain.low:.2f} … {100 * each.gain.high:.2f}",
             100 * each.gain.by_days, 100 * each.gain.by_runs, scaling_laws.gain_verdict(each.gain, laws.difference))
            for each in (laws.frontier, laws.all_trials)
        ],
        note="From the smallest size to the largest. Above 0 with its whole interval: scales. Below "
        f"{percent(laws.difference)} with its whole interval: flat (two one-sided tests at 5 %).",
    )  # fmt: skip
    rows: list[tuple[object, ...]] = []
    for trend in (laws.frontier, laws.all_trials):
        if trend.no_law:
            rows.append((trend.which, trend.no_law, *[None] * 7))
        rows += [_law(trend, law) for law in trend.laws]
    fitted = make(
        "laws", "L(N) = E + A·N^(−α), relative losses",
        ["", "form", "E", "A", "α", "B, β", ("AICc", "number"), ("weight", "percent"),
         ("off at the largest", "percent")],
        rows,
        note="Σ Huber of ln loss (Hoffmann et al. 2022, approach 3), 95 % intervals over days and runs. Off at the "
        "largest: fitted to the smaller sizes alone, the error of its prediction for the largest.",
    )  # fmt: skip
    return by_size, gains, fitted


def _law(trend: SizeTrend, law: Law) -> tuple[object, ...]:
    fit = law.fit
    falls: tuple[str | None, str | None] = (None, None)
    rises = None
    if fit.exponents:
        loose = law.exponent is not None and law.exponent[0] <= BOUND[0] * 1.01 and law.exponent[1] >= BOUND[1] * 0.99
        height, exponent = (UNKNOWN, UNKNOWN) if loose else (_span(law.height), _span(law.exponent))
        falls = (f"{fit.coefficients[0]:.3g}{height}", f"{number(fit.exponents[0], 3)}{exponent}")
    if len(fit.exponents) > 1:
        rises = f"{fit.coefficients[1]:.3g}, {number(fit.exponents[1], 3)}"
    return (
        trend.which, fit.form, f"{number(fit.floor)}{_span(law.floor)}", *falls,
        rises, fit.aicc, law.weight, law.held_out,
    )  # fmt: skip


def _span(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f" ({bounds[0]:.3g} … {bounds[1]:.3g})"
