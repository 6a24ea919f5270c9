"""Scaling laws: whether loss falls with size, over studies that differ in nothing else, with a test of flatness.

Losses are relative to the best baseline's on the same days, so that a calm or wild regime, which moves both, cancels:
1 is as good as the baseline, .98 saves two percent of its loss. Two sets of trials are fitted. *All trials*: what a
search at that size finds on average. *The frontier*: what a tuned model of that size reaches, the best quarter of each
size's first m trials, where m is the fewest that any size has: of more trials the best are luckier.

Two kinds of chance are drawn together: other days (blocks, the same for all trials and the baseline) and other runs (a
size's trials, with replacement; the frontier is chosen anew from each draw). The gain is the mean relative loss at the
smallest size less that at the largest. One interval of 90 % holds two tests of 5 %: its lower bound above 0 means
*scales* (unless AICc finds that a constant explains the trials as well), its upper bound below the stated difference
means *flat* (Schuirmann 1987), and anything else *can't tell*.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
from scipy import stats

from fintx.analysis import predictions, study_results
from fintx.analysis.study_results import StudyResults
from fintx.errors import FintxError
from fintx.evaluate import power_law, significance
from fintx.evaluate.power_law import FORMS, FittedLaw
from fintx.evaluate.significance import Resamples
from fintx.model import param_count
from fintx.study import study_file
from fintx.study.records import TrialRecord
from fintx.types import Floats, Ints

LEAST_SIZES, LEAST_TRIALS, LEAST_PER_SIZE = 3, 8, 2
LEAST_SPAN = 2.0
"""Largest over smallest size: within less, nothing could be seen."""
DIFFERENCE = 0.01
"""A gain below this share of the baseline's loss, from the smallest to the largest size, counts as none."""
TEST, POWER = 0.05, 0.8
REFITS = 200
_REFITS_OF_SIBLINGS = 100
_FRONTIER = 0.25
_STARTS = (0.5, 0.8, 1.0, 1.25, 2.0)
"""Exponents that a refit starts from, as multiples of the whole sample's."""

Over = Literal["parameters", "data"]
ScalingVerdict = Literal["scales", "flat", "can't tell"]


class NotComparable(FintxError):
    """Studies that differ in more than size, or too few of them: no line is fitted through those."""


@dataclass(frozen=True, eq=False)
class SizedTrials:
    """The successful trials of several studies, by size, on the validation rows that all studies share."""

    over: Over
    studies: tuple[StudyResults, ...]
    """From the smallest size to the largest."""
    cells: tuple[int | str, ...]
    """The sizes that were set out for, smallest first: budgets, or names of studies of different data."""
    cell: Ints
    """(T,) index of each trial's cell."""
    study: Ints
    """(T,) index of each trial's study."""
    number: Ints
    """(T,) trial numbers: the order in which a study's trials were proposed."""
    size: Floats
    """(T,) counted parameters, or training rows."""
    flops: Floats
    """(T,) floating-point operations of its training."""
    loss: Floats
    """(T,) relative to the best baseline's."""
    days: Floats
    """(T, D) losses by day."""
    baseline: str
    baseline_days: Floats
    """(D,)."""
    prior_loss: float
    baseline_loss: float
    n_rows: int
    resamples: Resamples
    notes: tuple[str, ...]


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
    """Interval of E; of A and of α below. For the power law alone."""
    height: tuple[float, float] | None
    exponent: tuple[float, float] | None


@dataclass(frozen=True, eq=False)
class SizeTrend:
    """Loss against size, of one set of trials."""

    which: str
    chosen: Ints
    """Indices of the trials."""
    by_cell: tuple[float, ...]
    """Mean relative loss of each size."""
    gain: Gain
    laws: tuple[Law, ...]
    band: Floats | None
    """(2, G) 95 % band of the power law on `grid`."""
    grid: Floats
    no_law: str = ""
    """Why there is no fit."""

    @property
    def preferred(self) -> Law | None:
        """The form with the least AICc."""
        laws = [law for law in self.laws if law.fit.aicc is not None]
        return min(laws, key=lambda law: law.fit.aicc or 0.0) if laws else None


@dataclass(frozen=True, eq=False)
class ScalingLaws:
    """The frontier and all trials, and the verdict."""

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
    siblings, spec = [], results.spec
    for folder in study_file.study_folders(results.folder.resolve().parent):
        try:
            study = study_file.read_study(folder)
            # The cheap questions come first: predictions are read last.
            if study is None or study.spec.task != spec.task or study.spec.budget.parameters == spec.budget.parameters:
                continue
            other = study_results.read(folder)
        except FintxError:  # a study that can't be reported yet is none to compare with
            continue
        if _short_hash(other, "label_hash") == _short_hash(results, "label_hash"):
            siblings.append(other)
    if not siblings:
        return None
    try:
        return fit(gather([results, *siblings]), refits=_REFITS_OF_SIBLINGS)
    except NotComparable as error:
        return NotFitted(tuple(other.name for other in siblings), tuple(str(error).splitlines()))


def fit(trials: SizedTrials, *, difference: float = DIFFERENCE, refits: int = REFITS, seed: int = 0) -> ScalingLaws:
    """Fit both sets of trials, and test.

    Args:
        difference: the smallest gain that matters, as a share of the best baseline's loss.
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
    """Flat goes before scales: a gain that is certain, and certainly too small to matter, is none."""
    if gain.high < difference:
        return "flat"
    return "scales" if gain.low > 0 else "can't tell"


def envelope(flops: Floats, loss: Floats) -> tuple[Floats, Floats]:
    """The least loss reached with up to so much compute: a falling staircase through the best trials."""
    order = np.argsort(flops, kind="stable")
    least = np.array(list(itertools.accumulate(loss[order], min)))
    falls = np.append(True, least[1:] < least[:-1])
    return flops[order][falls], least[falls]


# --- gathering trials -------------------------------------------------------------------------------------------------


def gather(studies: Sequence[StudyResults], *, over: Over = "parameters") -> SizedTrials:
    """Put the successful trials of several studies on one axis.

    Raises:
        NotComparable: a line per reason why they may not be.
    """
    studies = sorted(studies, key=lambda results: float(np.median([_size(record, over) for record in results.records])))
    missing = [
        f"no fit: {results.name}: {'; '.join(results.notes) or 'it has no successful trial'}"
        for results in studies
        if not results.seed_outputs
    ]
    if problems := [*_differences(studies, over), *missing]:
        raise NotComparable("\n".join(problems))
    places = _shared_rows(studies, over)
    rows = [results.rows.take(own) for results, own in zip(studies, places, strict=True) if results.rows]
    largest = rows[-1]
    best = predictions.best_baseline(largest)
    if best is None:
        raise NotComparable(f"no fit: no baseline has a {largest.metric} on the {len(places[-1]):,} shared rows")
    baseline_days, prior_days = (largest.by_day(largest.losses(largest.baselines[n])) for n in (best[0], "prior"))
    members = [
        (index, record)
        for index, results in enumerate(studies)
        for record in results.records
        if record.trial_number in results.seed_outputs
    ]
    days = np.stack([
        rows[i].by_day(rows[i].losses(studies[i].seed_outputs[record.trial_number][:, places[i]]))
        for i, record in members
    ])  # fmt: skip
    names = [results.spec.budget.parameters if over == "parameters" else results.name for results in studies]
    cells = list(dict.fromkeys(names))
    cell = np.array([cells.index(names[index]) for index, _ in members], int)
    size = np.array([_size(record, over) for _, record in members], float)
    if problems := _too_few(cells, cell, size, over):
        raise NotComparable("\n".join(problems))
    block = significance.block_length((baseline_days - days).T, horizon=studies[0].spec.task.horizon)
    return SizedTrials(
        over=over,
        studies=tuple(studies),
        cells=tuple(cells),
        cell=cell,
        study=np.array([index for index, _ in members], int),
        number=np.array([record.trial_number for _, record in members], int),
        size=size,
        flops=np.array([_training_flops(record) for _, record in members]),
        loss=days.mean(axis=1) / baseline_days.mean(),
        days=days,
        baseline=best[0],
        baseline_days=baseline_days,
        prior_loss=float(prior_days.mean()),
        baseline_loss=float(baseline_days.mean()),
        n_rows=len(places[-1]),
        resamples=significance.resample(days.shape[1], block),
        notes=_notes(studies),
    )


def _training_flops(record: TrialRecord) -> float:
    """Forward and backward passes over every training window that the trial saw."""
    per_sample = param_count.flops(record.config.model, record.config.shape, len(record.config.data.features))
    n_samples = sum(fold.steps for fold in record.folds) * record.config.train.batch_size
    return n_samples * (per_sample.forward + per_sample.backward)


def _size(record: TrialRecord, over: Over) -> float:
    return record.param_count if over == "parameters" else float(np.mean([fold.n_train for fold in record.folds]))


def _differences(studies: Sequence[StudyResults], over: Over) -> list[str]:
    """A line per respect in which studies differ that should not."""
    lines = []
    for what in _must_agree(studies[0], over):
        studies_by: dict[str, list[str]] = {}
        for results in studies:
            studies_by.setdefault(_must_agree(results, over)[what], []).append(results.name)
        if len(studies_by) > 1:
            parts = "; ".join(f"{', '.join(names)}: {text}" for text, names in studies_by.items())
            lines.append(
                f"no fit: the studies differ in their {what} ({parts}); give studies that differ in size alone"
            )
    return lines


def _must_agree(results: StudyResults, over: Over) -> dict[str, str]:
    """What must be the same in studies that differ in size alone."""
    spec, n_features = results.spec, f"{len(results.spec.data.features)} features"
    split = spec.split.model_dump(mode="json", exclude_none=True)
    settings = {
        "labels": spec.task.rule.describe(),
        "metrics": spec.study.metric,
        "splits": ", ".join(f"{key} {value}" for key, value in split.items()),
        "budget tolerances": f"± {100 * spec.budget.tolerance:g} %",
    }
    if over == "data":
        return settings | {"budgets": f"{spec.budget.parameters:,}", "inputs": f"{n_features}, {spec.data.scaling}"}
    data = f"{', '.join(spec.data.assets)} with {n_features}, data hash {_short_hash(results, 'data_hash')}"
    return settings | {"data": data, "label hashes": _short_hash(results, "label_hash")}


def _short_hash(results: StudyResults, name: str) -> str:
    return getattr(results.records[0].folds[0], name)[:12] if results.records[0].folds else "none"


def _too_few(cells: Sequence[int | str], cell: Ints, size: Floats, over: Over) -> list[str]:
    what = "parameter budgets" if over == "parameters" else "amounts of training data"
    counts, n = np.bincount(cell, minlength=len(cells)), len(cell)
    few = [f"{name if isinstance(name, str) else format(name, ',')} has {count}"
           for name, count in zip(cells, counts, strict=True) if count < LEAST_PER_SIZE]  # fmt: skip
    lines = []
    if len(cells) < LEAST_SIZES:
        lines.append(f"{len(cells)} different {what}, wanted at least {LEAST_SIZES}; run more studies")
    elif size.max() < LEAST_SPAN * size.min():
        lines.append(
            f"sizes {size.min():,.0f} … {size.max():,.0f} span less than a factor of {LEAST_SPAN:g}; nothing could be "
            "seen in that; run studies further apart"
        )
    if few:
        lines.append(
            f"too few successful trials to know their spread: {', '.join(few)}, wanted at least {LEAST_PER_SIZE} each; "
            "raise study.n_trials"
        )
    if n < LEAST_TRIALS:
        lines.append(f"{n} successful trials in all, wanted at least {LEAST_TRIALS}; raise study.n_trials")
    return [f"no fit: {line}" for line in lines]


def _shared_rows(studies: Sequence[StudyResults], over: Over) -> list[Ints]:
    """Per study, the places of the rows that all have, in one order."""
    rows = [results.rows for results in studies if results.rows is not None]
    keys = [np.char.add(np.char.add(own.dates.astype(str), " "), own.assets) for own in rows]
    shared = functools.reduce(np.intersect1d, keys)  # sorted, each once
    if over == "parameters" and any(len(shared) != len(key) for key in keys):
        names = ", ".join(f"{results.name} {len(key):,}" for results, key in zip(studies, keys, strict=True))
        raise NotComparable(f"no fit: the studies' validation rows differ ({names}; {len(shared):,} shared)")
    if not len(shared):
        raise NotComparable("no fit: the studies share no validation row; give panels that share assets and days")
    orders = [np.argsort(key, kind="stable") for key in keys]
    places = [order[np.searchsorted(key, shared, sorter=order)] for key, order in zip(keys, orders, strict=True)]
    labels = [own.labels[place] for own, place in zip(rows, places, strict=True)]
    for results, own in zip(studies, labels, strict=True):
        if not np.array_equal(own, labels[0]):
            raise NotComparable(f"no fit: {studies[0].name} and {results.name} have other labels on the same rows")
    return places


def _notes(studies: Sequence[StudyResults]) -> tuple[str, ...]:
    """What may differ, but should be known: how the models were trained."""
    notes = []
    for what, setting in (
        ("training settings", lambda spec: spec.train.model_dump_json() + spec.optim.model_dump_json()),
        ("search spaces", lambda spec: str({path: values.model_dump() for path, values in spec.space.items()})),
        ("model settings", lambda spec: spec.model.model_dump_json()),
    ):
        if len({setting(results.spec) for results in studies}) > 1:
            notes.append(f"The studies' {what} differ: what looks like size may be that.")
    unfinished = [results.name for results in studies if len(results.records) < results.spec.study.n_trials]
    if unfinished:
        notes.append(f"Not finished yet: {', '.join(unfinished)}.")
    return (*notes, *(f"{results.name}: {note}" for results in studies for note in results.notes))


# --- drawing again ----------------------------------------------------------------------------------------------------


def _trend(which: str, trials: SizedTrials, pools: list[Ints], share: float, *, refits: int, seed: int) -> SizeTrend:
    """Choose each size's best share, and see how that comes out on other days and with other runs."""
    chosen = [_best(pool, trials.loss, share) for pool in pools]
    weights = trials.resamples.weights.T
    resampled = (trials.days @ weights) / (trials.baseline_days @ weights)  # (T, R)
    rng, gains, gains_by_runs = np.random.default_rng(seed), [], []
    samples: list[tuple[Ints, Floats]] = []
    for losses in resampled.T:
        runs = [pool[rng.integers(len(pool), size=len(pool))] for pool in pools]
        gains.append(_saved(runs, losses, share))
        gains_by_runs.append(_saved(runs, trials.loss, share))
        if len(samples) < refits:
            drawn = np.concatenate([_best(pool, losses, share) for pool in runs])
            samples.append((drawn, losses[drawn]))
    low, high = np.quantile(gains, [TEST, 1 - TEST])
    gain = Gain(
        mean=_saved(pools, trials.loss, share),
        low=float(low),
        high=float(high),
        by_days=float(np.std(resampled[chosen[0]].mean(axis=0) - resampled[chosen[-1]].mean(axis=0), ddof=1)),
        by_runs=float(np.std(gains_by_runs, ddof=1)),
    )
    members, by_cell = np.concatenate(chosen), tuple(float(trials.loss[own].mean()) for own in chosen)
    grid = np.geomspace(trials.size.min(), trials.size.max(), 60)
    if len(members) >= LEAST_TRIALS:
        return SizeTrend(which, members, by_cell, gain, *_laws(trials, chosen, samples, grid), grid)
    no_law = f"{len(members)} trials are too few for a fit, wanted at least {LEAST_TRIALS}"
    return SizeTrend(which, members, by_cell, gain, (), None, grid, no_law)


def _best(pool: Ints, losses: Floats, share: float) -> Ints:
    """The share of a pool with the least losses, at least one; in the pool's order if that is all of it."""
    if share >= 1:
        return pool
    return pool[np.argsort(losses[pool], kind="stable")[: max(1, math.ceil(share * len(pool)))]]


def _saved(pools: list[Ints], losses: Floats, share: float) -> float:
    """Mean loss of the first pool's best less that of the last one's."""
    first, last = (losses[_best(pool, losses, share)].mean() for pool in (pools[0], pools[-1]))
    return float(first - last)


def _laws(
    trials: SizedTrials, chosen: list[Ints], samples: list[tuple[Ints, Floats]], grid: Floats
) -> tuple[tuple[Law, ...], Floats]:
    """All forms, and the power law's band on the grid; samples: each bootstrap draw's trials and their losses."""
    members = np.concatenate(chosen)
    fits = {form: power_law.fit(form, trials.size[members], trials.loss[members]) for form in FORMS}
    alpha = fits["power law"].exponents[0]
    starts = [(float(np.clip(alpha * factor, 0.02, 4.0)),) for factor in _STARTS] + [(0.1,), (1.0,)]
    refits = [power_law.fit("power law", trials.size[drawn], losses, starts=starts) for drawn, losses in samples]
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
