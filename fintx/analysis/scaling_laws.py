"""Scaling laws: whether loss falls with size, over studies that differ in nothing else, with a test of flatness.

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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
from scipy import stats

from fintx.analysis import study_results
from fintx.analysis.sized_trials import LEAST_TRIALS, NotComparable, Over, SizedTrials, gather, hash_of
from fintx.analysis.study_results import StudyResults
from fintx.errors import FintxError
from fintx.evaluate import power_law
from fintx.evaluate.power_law import FORMS, FittedLaw
from fintx.study import study_file
from fintx.types import Floats, Ints

DIFFERENCE = 0.01
"""A gain below this share of the baseline's loss, from the smallest to the largest size, counts as none."""
TEST = 0.05
POWER = 0.8
REFITS = 200
_REFITS_OF_SIBLINGS = 100
_FRONTIER = 0.25
_WIDEN = (0.5, 0.8, 1.0, 1.25, 2.0)
"""Exponents that a refit starts from, as multiples of the whole sample's: the best of them is descended from."""

ScalingVerdict = Literal["scales", "flat", "can't tell"]


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

    fit: FittedLaw
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
class SizeTrend:
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
class ScalingLaws:
    """The whole answer."""

    trials: SizedTrials
    difference: float
    effort: int
    """m: trials of each size that the frontier is chosen from."""
    frontier: SizeTrend
    all_trials: SizeTrend

    @property
    def verdict(self) -> ScalingVerdict:
        """The verdict on tuned models, the frontier; for "scales" the form with the least AICc must fall, too."""
        word = gain_verdict(self.frontier.gain, self.difference)
        return "can't tell" if word == "scales" and self.prefers_constant else word

    @property
    def preferred(self) -> Law | None:
        """The form with the least AICc, for the frontier, or for all trials where the frontier is too few."""
        return self.frontier.preferred or self.all_trials.preferred

    @property
    def prefers_constant(self) -> bool:
        """Whether a constant explains the trials as well as anything."""
        return self.preferred is not None and self.preferred.fit.form == "constant"

    @property
    def needed_se(self) -> float:
        """Standard error with which the stated difference is told from none, four times out of five."""
        return self.difference / float(stats.norm.ppf(1 - TEST) + stats.norm.ppf(POWER))


@dataclass(frozen=True)
class NotFitted:
    """Studies beside one that may be of its family, and why no line is fitted through them."""

    names: tuple[str, ...]
    reasons: tuple[str, ...]


def read(folders: Sequence[Path], *, over: str, difference: float) -> ScalingLaws:
    """Gather, fit and judge.

    Raises:
        FintxError: options that mean nothing, a study that holds nothing, or studies that differ in more than size.
    """
    if over not in ("parameters", "data"):
        raise FintxError(f'--over {over!r}: wanted "parameters" or "data"')
    if not 0 < difference < 1:
        raise FintxError(f"--difference {difference:g}: wanted a share between 0 and 1, such as 0.01 for one percent")
    trials = gather([study_results.read(folder) for folder in folders], over=cast(Over, over))
    return fit(trials, difference=difference)


def of_siblings(results: StudyResults) -> ScalingLaws | NotFitted | None:
    """Over a study and those beside it that differ from it in size alone; none where there are none."""
    siblings = []
    for folder in study_file.study_folders(results.folder.resolve().parent):
        try:
            study = study_file.read_study(folder)
            if study is None or folder.name == results.name:
                continue
            # Looked at before its predictions are read.
            if study.spec.task != results.spec.task or study.spec.budget.parameters == results.spec.budget.parameters:
                continue
            other = study_results.read(folder)
        except FintxError:  # a study that can't be reported yet is none to compare with
            continue
        if hash_of(other, "label_hash") == hash_of(results, "label_hash"):
            siblings.append(other)
    if not siblings:
        return None
    try:
        return fit(gather([results, *siblings]), refits=_REFITS_OF_SIBLINGS)
    except NotComparable as error:
        return NotFitted(tuple(other.name for other in siblings), tuple(str(error).splitlines()))


def fit(
    trials: SizedTrials, *, difference: float = DIFFERENCE, refits: int = REFITS, seed: int = 0
) -> ScalingLaws:  # fmt: skip
    """FittedLaw, test and judge.

    Args:
        difference: the smallest gain worth the name, as a share of the best baseline's loss.
        refits: bootstrap fits of the power law.
    """
    pools = [np.flatnonzero(trials.cell == cell) for cell in range(len(trials.cells))]
    effort = min(map(len, pools))
    firsts = [pool[np.argsort(trials.number[pool], kind="stable")][:effort] for pool in pools]
    return ScalingLaws(
        trials=trials,
        difference=difference,
        effort=effort,
        frontier=_trend("the frontier", trials, firsts, _FRONTIER, refits=refits, seed=seed),
        all_trials=_trend("all trials", trials, pools, 1.0, refits=refits, seed=seed),
    )


def gain_verdict(gain: Gain, difference: float) -> ScalingVerdict:
    """Flat goes before scales: a gain that is surely there and surely too small to matter is none."""
    if gain.high < difference:
        return "flat"
    return "scales" if gain.low > 0 else "can't tell"


def envelope(flops: Floats, loss: Floats) -> tuple[Floats, Floats]:
    """The least loss reached with up to so much compute: a falling staircase through the best trials."""
    order = np.argsort(flops, kind="stable")
    least = np.array(list(itertools.accumulate(loss[order], min)))
    kept = np.append(True, least[1:] < least[:-1])
    return flops[order][kept], least[kept]


# --- drawing again ----------------------------------------------------------------------------------------------------


def _trend(which: str, trials: SizedTrials, pools: list[Ints], share: float, *, refits: int, seed: int) -> SizeTrend:
    """Choose each size's best share, and see how that comes out on other days and with other runs."""
    chosen = [_best(pool, trials.loss[pool], share) for pool in pools]
    by_cell = [float(trials.loss[members].mean()) for members in chosen]
    weights = trials.resamples.weights.T
    resampled = (trials.days @ weights) / (trials.baseline_days @ weights)  # (T, R)
    rng = np.random.default_rng(seed)
    reps = resampled.shape[1]
    both, runs = np.empty((reps, 2)), np.empty((reps, 2))
    drawn: list[tuple[Ints, Floats]] = []
    for rep in range(reps):
        again = [pool[rng.integers(len(pool), size=len(pool))] for pool in pools]
        for end, members in ((0, again[0]), (1, again[-1])):
            picked = _best(members, resampled[members, rep], share)
            both[rep, end] = resampled[picked, rep].mean()
            runs[rep, end] = trials.loss[_best(members, trials.loss[members], share)].mean()
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
    grid = np.geomspace(trials.size.min(), trials.size.max(), 60)
    if len(members) < LEAST_TRIALS:
        no_law = f"{len(members)} trials are too few for a fit, wanted at least {LEAST_TRIALS}"
        return SizeTrend(which, members, tuple(by_cell), gain, (), no_law, None, grid)
    laws, band = _laws(trials, members, chosen, drawn, grid)
    return SizeTrend(which, members, tuple(by_cell), gain, laws, "", band, grid)


def _best(members: Ints, losses: Floats, share: float) -> Ints:
    """The share of members with the least losses, at least one."""
    if share >= 1:
        return members
    return members[np.argsort(losses, kind="stable")[: max(1, math.ceil(share * len(members)))]]


def _laws(
    trials: SizedTrials, members: Ints, chosen: list[Ints], drawn: list[tuple[Ints, Floats]], grid: Floats
) -> tuple[tuple[Law, ...], Floats]:
    """All forms, and the power law's band."""
    fits = {form: power_law.fit(form, trials.size[members], trials.loss[members]) for form in FORMS}
    alpha = fits["power law"].exponents[0]
    starts = [(float(np.clip(alpha * factor, 0.02, 4.0)),) for factor in _WIDEN] + [(0.1,), (1.0,)]
    refits = [power_law.fit("power law", trials.size[every], losses, starts=starts) for every, losses in drawn]
    numbers = [(refit.floor, refit.coefficients[0], refit.exponents[0]) for refit in refits]
    spans = [(float(low), float(high)) for low, high in np.quantile(numbers, [0.025, 0.975], axis=0).T]
    held_out: dict[str, float | None] = dict.fromkeys(FORMS)
    if len(chosen) > 3:  # a fit to the smaller sizes needs three of them
        smaller, largest = np.concatenate(chosen[:-1]), chosen[-1]
        for form in FORMS:
            predicted = power_law.fit(form, trials.size[smaller], trials.loss[smaller])(trials.size[largest])
            off = np.log(predicted) - np.log(trials.loss[largest].mean())
            held_out[form] = float(np.abs(off).mean())
    laws = tuple(
        Law(fits[form], weight, held_out[form], *(spans if form == "power law" else (None, None, None)))
        for form, weight in zip(FORMS, power_law.weights(list(fits.values())), strict=True)
    )
    return laws, np.quantile([refit(grid) for refit in refits], [0.025, 0.975], axis=0)
