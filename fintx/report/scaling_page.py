"""Scaling page: what `just scaling` prints and writes, and the section of a study's page on studies beside it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from fintx.analysis import scaling_laws
from fintx.analysis.scaling_laws import Law, NotFitted, ScalingLaws, SizeTrend
from fintx.evaluate.power_law import BOUND
from fintx.report import figures
from fintx.report.format import LOSS_WORDS, Tone, count, number, percent
from fintx.report.page import Block, Page, Prose, Section, folder_name
from fintx.report.table import Table

_TONES: dict[str, Tone] = {"scales": "good", "flat": "bad", "can't tell": "open"}


def build(laws: ScalingLaws, *, outputs: Path) -> Page:
    """The page, to be written to outputs/_scaling/<studies>."""
    trials = laws.trials
    first, last = (_size_words(trials.cells[i]) for i in (0, -1))
    return Page(
        folder=outputs / "_scaling" / folder_name(results.name for results in trials.studies),
        title=f"Does it scale? {first} to {last}",
        kicker="fintx scaling",
        question=f"Does {_loss(laws)} fall with {_unit(laws)}, against {trials.baseline} on the same rows?",
        answer=answer(laws),
        tone=_TONES[laws.verdict],
        warnings=trials.notes,
        facts=(
            ("studies", str(len(trials.studies))),
            ("successful trials", str(len(trials.loss))),
            ("validation rows", f"{trials.n_rows:,}"),
            ("block of days", str(trials.resamples.block)),
            ("smallest gain that matters", percent(laws.difference)),
        ),
        sections=(Section("scaling", "Scaling", _blocks(laws)),),
    )


def siblings_section(laws: ScalingLaws | NotFitted | None) -> Section | None:
    """For a study's page: the study and those beside it that differ from it in size alone."""
    if laws is None:
        return None
    if isinstance(laws, ScalingLaws):
        return Section("scaling", "Scaling", (Prose(answer(laws)), *_blocks(laws)))
    text = (
        f"Beside this study are {', '.join(laws.names)}, with the same label and other budgets; no curve can be fitted "
        "through them:"
    )
    return Section("scaling", "Scaling", (Prose(text), Prose(laws.reasons, "note")))


def _blocks(laws: ScalingLaws) -> tuple[Block, ...]:
    method = (
        f"Losses are divided by {laws.trials.baseline}'s on the same days, so that calm and wild times cancel. The "
        f"frontier is the best quarter of each size's first {laws.effort} successful trials: the same number for every "
        "size, since the best of more is luckier. Intervals resample days in blocks and runs within each size together."
    )
    figure = figures.plot_scaling(laws, size_label=f"{_unit(laws)}{' (counted)' * (laws.trials.over == 'parameters')}")
    return Prose(method, "note"), figure, _size_table(laws), _gain_table(laws), _law_table(laws)


def _loss(laws: ScalingLaws) -> str:
    return LOSS_WORDS[laws.trials.studies[0].metric]


def _unit(laws: ScalingLaws) -> str:
    """What size is measured in."""
    return "parameters" if laws.trials.over == "parameters" else "training rows"


def _size_words(cell: int | str) -> str:
    return count(cell) if isinstance(cell, int) else cell


# --- in words ---------------------------------------------------------------------------------------------------------


def answer(laws: ScalingLaws) -> str:
    """Scales, flat, or can't tell; from where to where, by how much, with the interval."""
    trials, gain = laws.trials, laws.frontier.gain
    first, last = (_size_words(trials.cells[i]) for i in (0, -1))
    if trials.over == "data":
        first, last = count(trials.size.min()), count(trials.size.max())
    verb = "falls" if gain.mean > 0 else "rises"
    change = (
        f"From {first} to {last} {_unit(laws)} the {_loss(laws)} of tuned models {verb} by "
        f"{number(100 * abs(gain.mean), 2)} % of {trials.baseline}'s (90 % interval of the gain "
        f"{number(100 * gain.low, 2)} … {number(100 * gain.high, 2)} %)"
    )
    stated = f"the stated {percent(laws.difference)}"
    if laws.verdict == "scales":
        text = f"Scales. {change}."
    elif laws.verdict == "flat":
        text = f"Flat. {change}: less than {stated}.{' Bigger is worse.' if gain.high < 0 else ''}"
    else:
        reason = f"neither above zero nor below {stated}"
        if gain.low > 0:
            reason = "above zero, but by AICc a constant explains the trials as well"
        text = f"Can't tell. {change}: {reason}. {_what_would_tell(laws)}"
    if min(laws.frontier.by_cell) >= 1:
        text += f" No size beats {trials.baseline}."
    preferred = laws.preferred
    aicc_was_the_reason = laws.prefers_constant and laws.verdict == "can't tell" and gain.low > 0
    if preferred is not None and preferred.weight is not None and not aicc_was_the_reason:
        which = "the frontier" if laws.frontier.preferred is not None else "all trials"
        forms = {"constant": "a constant", "power law": "a power law"}
        form = forms.get(preferred.fit.form, "a power law that turns up again")
        text += f" AICc prefers {form} for {which} (weight {preferred.weight:.2f})."
    return text


def _what_would_tell(laws: ScalingLaws) -> str:
    """How many days and runs would tell the stated difference from none, four times out of five."""
    gain, needed, n_rows = laws.frontier.gain, laws.needed_se, laws.trials.n_rows
    if gain.se <= needed:
        return "Sizes further apart, or more trials of each, would tell."
    have = (
        f"To tell {percent(laws.difference)} from nothing takes a standard error of {number(100 * needed, 2)} %; "
        f"it is {number(100 * gain.se, 2)} %, of which days make {number(100 * gain.by_days, 2)} % and runs "
        f"{number(100 * gain.by_runs, 2)} %"
    )
    rest = needed**2 - gain.by_days**2
    if rest > 0.1 * needed**2:
        n_trials = max(math.ceil(laws.effort * gain.by_runs**2 / rest), laws.effort + 1)
        return f"{have}: about {n_trials:,} trials of each size would do, on the same days."
    rows = math.ceil(n_rows * 2 * gain.by_days**2 / needed**2)
    n_trials = max(math.ceil(laws.effort * 2 * gain.by_runs**2 / needed**2), laws.effort)
    return (
        f"{have}: more trials alone can't do it. About {rows:,} validation rows would (there are {n_rows:,}; more "
        f"history, or more assets that move on their own), with {n_trials:,} trials of each size."
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def _size_table(laws: ScalingLaws) -> Table:
    trials, rows = laws.trials, []
    for i, cell in enumerate(trials.cells):
        members = trials.cell == i
        studies = " ".join(dict.fromkeys(trials.studies[s].name for s in trials.study[members]))
        sizes, frontier = trials.size[members], laws.frontier.by_cell[i]
        rows.append(
            (_size_words(cell), studies, int(members.sum()), f"{count(sizes.min())} … {count(sizes.max())}",
             float(np.median(trials.flops[members])), float(trials.loss[members].min()), frontier,
             laws.all_trials.by_cell[i], 1 - frontier * trials.baseline_loss / trials.prior_loss)
        )  # fmt: skip
    return Table(
        "sizes", "By size",
        ["size", "studies", ("trials", "whole"), _unit(laws), ("median FLOPs", "size"), ("least loss", "number"),
         ("frontier", "number"), ("all trials", "number"), ("frontier's skill", "percent")],
        rows, note=f"Losses relative to {trials.baseline}: 1 is as good, .98 saves two percent.",
    )  # fmt: skip


def _gain_table(laws: ScalingLaws) -> Table:
    return Table(
        "gains", "Gain, and the test of flatness",
        ["", ("gain (% of the baseline's loss)", "number"), "90 % interval", ("SE from days", "number"),
         ("SE from runs", "number"), "verdict"],
        [
            (trend.which, 100 * trend.gain.mean, f"{100 * trend.gain.low:.2f} … {100 * trend.gain.high:.2f}",
             100 * trend.gain.by_days, 100 * trend.gain.by_runs,
             scaling_laws.gain_verdict(trend.gain, laws.difference))
            for trend in (laws.frontier, laws.all_trials)
        ],
        note="From the smallest size to the largest. Scales: the whole interval lies above 0. Flat: it lies below "
        f"{percent(laws.difference)} (two one-sided tests at 5 %).",
    )  # fmt: skip


def _law_table(laws: ScalingLaws) -> Table:
    rows: list[tuple[object, ...]] = []
    for trend in (laws.frontier, laws.all_trials):
        if trend.no_law:
            rows.append((trend.which, trend.no_law, *[None] * 7))
        rows += [_law_row(trend, law) for law in trend.laws]
    return Table(
        "laws", "L(N) = E + A·N^(−α), relative losses",
        ["", "form", "E", "A", "α", "B, β", ("AICc", "number"), ("weight", "percent"),
         ("off at the largest", "percent")],
        rows,
        note="Σ Huber of ln loss (Hoffmann et al. 2022, approach 3), 95 % intervals over days and runs. Off at the "
        "largest: the error at the largest size of a fit to the smaller sizes alone.",
    )  # fmt: skip


def _law_row(trend: SizeTrend, law: Law) -> tuple[object, ...]:
    def bounds(interval: tuple[float, float] | None) -> str:
        return "" if interval is None else f" ({interval[0]:.3g} … {interval[1]:.3g})"

    fit, a, alpha, rise = law.fit, None, None, None
    if fit.exponents:
        height, exponent = bounds(law.height), bounds(law.exponent)
        if law.exponent is not None and law.exponent[0] <= BOUND[0] * 1.01 and law.exponent[1] >= BOUND[1] * 0.99:
            height = exponent = " (not determined)"
        a, alpha = f"{fit.coefficients[0]:.3g}{height}", f"{number(fit.exponents[0], 3)}{exponent}"
    if len(fit.exponents) > 1:
        rise = f"{fit.coefficients[1]:.3g}, {number(fit.exponents[1], 3)}"
    floor = f"{number(fit.floor)}{bounds(law.floor)}"
    return trend.which, fit.form, floor, a, alpha, rise, fit.aicc, law.weight, law.held_out
