"""Does loss fall with size? Power laws with intervals, a test of flatness, and a plain sentence.

Two sets of trials are read. *All trials*: what a search at that size finds on average. *The frontier*: what a tuned
model of that size reaches, the best quarter of each size's first m trials, where m is the fewest that any size has: of
more trials the best are luckier, and no size may have more luck than another.

Two kinds of chance are drawn together, again and again: other days (blocks, the same for all trials and the baseline)
and other runs (a size's trials, with replacement; the frontier is chosen anew from each draw). The gain is the mean
relative loss at the smallest size less that at the largest. One interval of 90 % holds two tests of 5 %: its lower
bound above 0 means *scales* (unless AICc finds that a constant explains the trials as well), its upper bound below the
stated difference means *flat* (Schuirmann 1987), and anything else *can't tell*.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from fintx.report import powerlaw
from fintx.report.field import LEAST_TRIALS, Field
from fintx.report.powerlaw import FORMS, Fit, Form
from fintx.report.words import count, number, percent
from fintx.types import Floats, Ints

DIFFERENCE = 0.01
"""A gain below this share of the baseline's loss, from the smallest to the largest size, counts as none."""
TEST = 0.05
POWER = 0.8
REFITS = 200
_FRONTIER = 0.25
_WIDEN = (0.5, 0.8, 1.0, 1.25, 2.0)
"""Exponents that a refit starts from, as multiples of the whole sample's: the best of them is descended from."""

Word = Literal["scales", "flat", "can't tell"]


@dataclass(frozen=True)
class Gain:
    """Relative loss saved from the smallest size to the largest; .01 is one percent of the baseline's loss."""

    mean: float
    low: float
    high: float
    """90 %: each end is a test at 5 %."""
    by_days: float
    """Standard error from the choice of days alone."""
    by_runs: float
    """Standard error from the choice of runs alone."""

    @property
    def se(self) -> float:
        """Both together."""
        return math.hypot(self.by_days, self.by_runs)


@dataclass(frozen=True)
class Law:
    """One form, fitted, with 95 % intervals of its numbers; relative losses."""

    fit: Fit
    weight: float | None
    """Akaike's: how probable the form is, of the three."""
    held_out: float | None
    """Fitted without the largest size, how far off its prediction there is, mean |ln|; none with too few sizes."""
    floor: tuple[float, float] | None
    height: tuple[float, float] | None
    """Of A; for the power law."""
    exponent: tuple[float, float] | None
    """Of α; for the power law."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What one set of trials says."""

    which: str
    chosen: Ints
    """Indices of the field's trials."""
    by_cell: tuple[float, ...]
    """Mean relative loss of each size."""
    gain: Gain
    laws: tuple[Law, ...]
    no_law: str
    """Why there is no fit; empty where there is."""
    band: Floats | None
    """(2, G) 95 % band of the power law on `grid`."""
    grid: Floats

    @property
    def preferred(self) -> Law | None:
        """The form with the least AICc."""
        known = [law for law in self.laws if law.fit.aicc is not None]
        return min(known, key=lambda law: law.fit.aicc or 0.0) if known else None


@dataclass(frozen=True, eq=False)
class Scaling:
    """The whole answer."""

    field: Field
    difference: float
    effort: int
    """m: trials of each size that the frontier is chosen from."""
    frontier: Reading
    every: Reading

    @property
    def word(self) -> Word:
        """The verdict on tuned models, the frontier; for "scales" the form with the least AICc must fall, too."""
        word = verdict(self.frontier.gain, self.difference)
        return "can't tell" if word == "scales" and self.doubted else word

    @property
    def preferred(self) -> Law | None:
        """The form with the least AICc, for the frontier, or for all trials where the frontier is too few."""
        return self.frontier.preferred or self.every.preferred

    @property
    def doubted(self) -> bool:
        """Whether a constant explains the trials as well as anything."""
        return self.preferred is not None and self.preferred.fit.form == "constant"

    @property
    def sentence(self) -> str:
        """The verdict in words, with what it would take to tell where it can't be told."""
        return sentence(self)


def read(field: Field, *, difference: float = DIFFERENCE, refits: int = REFITS, seed: int = 0) -> Scaling:
    """Fit, test and judge.

    Args:
        difference: the smallest gain worth the name, as a share of the best baseline's loss.
        refits: bootstrap fits of the power law.
    """
    cells = range(len(field.cells))
    effort = min(int(np.sum(field.cell == cell)) for cell in cells)
    firsts = [np.flatnonzero(field.cell == cell)[np.argsort(field.number[field.cell == cell], kind="stable")][:effort]
              for cell in cells]  # fmt: skip
    everyone = [np.flatnonzero(field.cell == cell) for cell in cells]
    return Scaling(
        field=field,
        difference=difference,
        effort=effort,
        frontier=_reading("the frontier", field, firsts, _FRONTIER, refits=refits, seed=seed),
        every=_reading("all trials", field, everyone, 1.0, refits=refits, seed=seed),
    )


def verdict(gain: Gain, difference: float) -> Word:
    """Flat goes before scales: a gain that is surely there and surely too small to matter is none."""
    if gain.high < difference:
        return "flat"
    return "scales" if gain.low > 0 else "can't tell"


# --- drawing again ----------------------------------------------------------------------------------------------------


def _reading(which: str, field: Field, pools: list[Ints], share: float, *, refits: int, seed: int) -> Reading:
    """Choose each size's best share, and see how that comes out on other days and with other runs."""
    chosen = [_best(pool, field.loss[pool], share) for pool in pools]
    by_cell = [float(field.loss[members].mean()) for members in chosen]
    resampled = field.resampled()
    rng = np.random.default_rng(seed)
    reps = resampled.shape[1]
    both, runs = np.empty((reps, 2)), np.empty((reps, 2))
    drawn: list[tuple[Ints, Floats]] = []
    for rep in range(reps):
        again = [pool[rng.integers(len(pool), size=len(pool))] for pool in pools]
        for end, members in ((0, again[0]), (1, again[-1])):
            picked = _best(members, resampled[members, rep], share)
            both[rep, end] = resampled[picked, rep].mean()
            runs[rep, end] = field.loss[_best(members, field.loss[members], share)].mean()
        if rep < refits:
            every = np.concatenate([_best(m, resampled[m, rep], share) for m in again])
            drawn.append((every, resampled[every, rep]))
    days = [resampled[members].mean(axis=0) for members in (chosen[0], chosen[-1])]
    low, high = np.quantile(both[:, 0] - both[:, 1], [TEST, 1 - TEST])
    gain = Gain(
        mean=by_cell[0] - by_cell[-1],
        low=float(low),
        high=float(high),
        by_days=float(np.std(days[0] - days[1], ddof=1)),
        by_runs=float(np.std(runs[:, 0] - runs[:, 1], ddof=1)),
    )
    members = np.concatenate(chosen)
    grid = np.geomspace(field.size.min(), field.size.max(), 60)
    if len(members) < LEAST_TRIALS:
        no_law = f"{len(members)} trials are too few for a fit, wanted at least {LEAST_TRIALS}"
        return Reading(which, members, tuple(by_cell), gain, (), no_law, None, grid)
    laws, band = _laws(field, members, chosen, drawn, grid)
    return Reading(which, members, tuple(by_cell), gain, laws, "", band, grid)


def _best(members: Ints, losses: Floats, share: float) -> Ints:
    """The share of members with the least losses, at least one."""
    if share >= 1:
        return members
    return members[np.argsort(losses, kind="stable")[: max(1, math.ceil(share * len(members)))]]


def _laws(
    field: Field, members: Ints, chosen: list[Ints], drawn: list[tuple[Ints, Floats]], grid: Floats
) -> tuple[tuple[Law, ...], Floats]:
    """All forms, and the power law's band."""
    size, loss = field.size[members], field.loss[members]
    fits = {form: powerlaw.fit(form, size, loss) for form in FORMS}
    shares = powerlaw.weights(list(fits.values()))
    alpha = fits["power law"].exponents[0]
    starts = [(float(np.clip(alpha * factor, 0.02, 4.0)),) for factor in _WIDEN] + [(0.1,), (1.0,)]
    again = [powerlaw.fit("power law", field.size[every], losses, starts=starts) for every, losses in drawn]
    span = {
        "floor": _interval([each.floor for each in again]),
        "height": _interval([each.coefficients[0] for each in again]),
        "exponent": _interval([each.exponents[0] for each in again]),
    }
    band = np.quantile([each(grid) for each in again], [0.025, 0.975], axis=0)
    laws = tuple(
        Law(
            fit=fits[form],
            weight=weight,
            held_out=_held_out(form, field, chosen),
            **(span if form == "power law" else {"floor": None, "height": None, "exponent": None}),
        )
        for form, weight in zip(FORMS, shares, strict=True)
    )
    return laws, band


def _interval(values: list[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _held_out(form: Form, field: Field, chosen: list[Ints]) -> float | None:
    """Mean |ln| error at the largest size of a fit to the smaller ones; none where these are fewer than three."""
    if len(chosen) < 4:
        return None
    known, largest = np.concatenate(chosen[:-1]), chosen[-1]
    found = powerlaw.fit(form, field.size[known], field.loss[known])
    return float(np.abs(np.log(found(field.size[largest])) - np.log(field.loss[largest].mean())).mean())


# --- in words ---------------------------------------------------------------------------------------------------------


def sentence(scaling: Scaling) -> str:
    """Scales, flat, or can't tell; from where to where, by how much, with the interval."""
    field, gain = scaling.field, scaling.frontier.gain
    span = f"From {field.cells[0]} to {field.cells[-1]} {field.size_words}"
    if field.over == "data":
        span = f"From {count(field.size.min())} to {count(field.size.max())} training rows"
    moves = "falls" if gain.mean > 0 else "rises"
    figures = (
        f"the {field.loss_words} of tuned models {moves} by {number(100 * abs(gain.mean), 2)} % of {field.baseline}'s "
        f"(90 % interval of the gain {number(100 * gain.low, 2)} … {number(100 * gain.high, 2)} %)"
    )
    stated = f"the stated {percent(scaling.difference)}"
    if scaling.word == "scales":
        said = f"Scales. {span} {figures}."
    elif scaling.word == "flat":
        worse = " Bigger is worse." if gain.high < 0 else ""
        said = f"Flat. {span} {figures}: less than {stated}.{worse}"
    else:
        why = f"neither above zero nor below {stated}"
        if gain.low > 0:
            why = "above zero, but by AICc a constant explains the trials as well"
        said = f"Can't tell. {span} {figures}: {why}. {needed(scaling)}"
    return f"{said} {_beside(scaling)}".strip()


def needed(scaling: Scaling) -> str:
    """How many days and runs would tell the stated difference from none, four times out of five."""
    gain, wanted = scaling.frontier.gain, scaling.difference / _reach()
    if gain.se <= wanted:
        return "Sizes further apart, or more trials of each, would tell."
    rest = wanted**2 - gain.by_days**2
    have = (
        f"To tell {percent(scaling.difference)} from nothing takes a standard error of {number(100 * wanted, 2)} %; "
        f"it is {number(100 * gain.se, 2)} %, of which days make {number(100 * gain.by_days, 2)} % and runs "
        f"{number(100 * gain.by_runs, 2)} %"
    )
    if rest > 0.1 * wanted**2:
        trials = math.ceil(scaling.effort * gain.by_runs**2 / rest)
        return f"{have}: about {max(trials, scaling.effort + 1):,} trials of each size would do, on the same days."
    rows = math.ceil(scaling.field.n_rows * 2 * gain.by_days**2 / wanted**2)
    runs = math.ceil(scaling.effort * 2 * gain.by_runs**2 / wanted**2)
    return (
        f"{have}: more trials alone can't do it. About {rows:,} validation rows would (there are "
        f"{scaling.field.n_rows:,}; more history, or more assets that move on their own), with "
        f"{max(runs, scaling.effort):,} trials of each size."
    )


def _reach() -> float:
    """Standard errors that a difference must measure to be told with probability `POWER` at level `TEST`."""
    return float(stats.norm.ppf(1 - TEST) + stats.norm.ppf(POWER))


def _beside(scaling: Scaling) -> str:
    """What the baseline and the information criterion add."""
    parts = []
    best = min(scaling.frontier.by_cell)
    if best >= 1:
        parts.append(f"No size beats {scaling.field.baseline}.")
    preferred = scaling.preferred
    told = scaling.doubted and scaling.word == "can't tell" and scaling.frontier.gain.low > 0
    if preferred is not None and preferred.weight is not None and not told:
        which = "the frontier" if scaling.frontier.preferred is not None else "all trials"
        words = {"constant": "a constant", "power law": "a power law"}.get(
            preferred.fit.form, "a power law that turns up again"
        )
        parts.append(f"AICc prefers {words} for {which} (weight {preferred.weight:.2f}).")
    return " ".join(parts)


def envelope(flops: Floats, loss: Floats) -> tuple[Floats, Floats]:
    """The least loss reached with up to so much compute: a falling staircase through the best trials."""
    order = np.argsort(flops, kind="stable")
    least = np.array(list(itertools.accumulate(loss[order], min)))
    kept = np.append(True, least[1:] < least[:-1])
    return flops[order][kept], least[kept]
