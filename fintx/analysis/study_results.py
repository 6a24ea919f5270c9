"""Study results: a study's records and every model's loss on every validation day, read from its folder.

Reads records and predictions alone, never logs; works on a study that is half finished. What is missing is said in
`notes`, a line each, and what depends on it is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fintx.analysis import predictions
from fintx.analysis.predictions import BaselineComparison, Rows
from fintx.config.schema import StudySpec
from fintx.errors import FintxError
from fintx.evaluate import metrics, selection, significance
from fintx.evaluate.significance import Estimate, Resamples
from fintx.study import records, study_file
from fintx.study.records import TrialRecord
from fintx.study.study_file import StudyFile
from fintx.types import Floats


class NoResults(FintxError):
    """The folder holds nothing that could be reported, or what may not be compared."""


@dataclass(frozen=True, eq=False)
class StudyResults:
    """A study as far as it is. Losses are those of the study's metric: 1 − it for a ranking."""

    folder: Path
    study: StudyFile
    records: tuple[TrialRecord, ...]
    """Every finished trial, by number."""
    baselines: dict[str, Any]
    """name → words and metrics, as `study.trial` keeps them."""
    rows: Rows | None
    """None where the baselines' predictions are missing: then nothing is compared row by row."""
    seeds: dict[int, Floats]
    """Trial number → (N, S) logits or log returns of its seeds, of the successful trials whose predictions are here."""
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The study's."""
        return self.folder.resolve().name

    @property
    def spec(self) -> StudySpec:
        """What the study asks."""
        return self.study.spec

    @property
    def metric(self) -> str:
        """The study's."""
        return self.spec.study.metric

    @functools.cached_property
    def outputs(self) -> dict[int, Floats]:
        """Trial number → (S,) outputs of its first seed: what one model says, for all that isn't a loss."""
        return {number: of_seeds[0] for number, of_seeds in self.seeds.items()}

    @property
    def minimize(self) -> bool:
        """Whether less of the study's metric is better."""
        return metrics.MINIMIZE[self.spec.study.metric]

    @functools.cached_property
    def ranked(self) -> tuple[TrialRecord, ...]:
        """The successful trials, best first by the study's metric."""
        return tuple(records.ranked(list(self.records), minimize=self.minimize))

    @property
    def best(self) -> TrialRecord | None:
        """The best trial; none where none succeeded."""
        return next(iter(self.ranked), None)

    @property
    def best_outputs(self) -> Floats | None:
        """(S,) of the best trial's first seed; none where its predictions are not here."""
        return None if self.best is None else self.outputs.get(self.best.trial_number)

    @property
    def skill_loss(self) -> str:
        """The loss that skill is a share of: the study's metric, or log loss where that is a ranking."""
        return significance.skill_loss(self.metric)

    def skill(self, scored: dict[str, Any]) -> float | None:
        """1 − loss / loss of the training prior, of metrics as records and baselines hold them."""
        return scored.get(metrics.SKILLS[self.skill_loss])

    @functools.cached_property
    def best_baseline(self) -> str | None:
        """The best baseline; none without the baselines' predictions."""
        best = None if self.rows is None else predictions.best_baseline(self.rows)
        return None if best is None else best[0]

    @functools.cached_property
    def comparison(self) -> BaselineComparison | None:
        """The best trial against the best baseline; none without their predictions."""
        if self.rows is None or self.best is None or self.best.trial_number not in self.seeds:
            return None
        return predictions.compare(self.rows, self.rows.losses(self.seeds[self.best.trial_number]))

    @functools.cached_property
    def series(self) -> dict[int, Floats]:
        """Trial number → (D,) losses by day, mean over its seeds."""
        return {number: self._by_day(of_seeds) for number, of_seeds in self.seeds.items()}

    @functools.cached_property
    def baseline_series(self) -> dict[str, Floats]:
        """Baseline → (D,) losses by day."""
        outputs = {} if self.rows is None else self.rows.baselines
        return {name: self._by_day(each) for name, each in outputs.items()}

    @functools.cached_property
    def skill_series(self) -> dict[int, Floats]:
        """Trial number → (D,) losses by day that skill is a share of."""
        if self.skill_loss == self.metric:
            return self.series
        return {number: self._by_day(of_seeds, metric=self.skill_loss) for number, of_seeds in self.seeds.items()}

    @functools.cached_property
    def prior_skill_series(self) -> Floats | None:
        """(D,) the same of the prior; none without its predictions."""
        prior = None if self.rows is None else self.rows.baselines.get("prior")
        return None if prior is None else self._by_day(prior, metric=self.skill_loss)

    def _by_day(self, outputs: Floats, *, metric: str | None = None) -> Floats:
        """(S,) outputs, or (N, S) of several seeds → (D,) losses by day."""
        assert self.rows is not None
        return self.rows.series(self.rows.losses(outputs, metric=metric))

    @functools.cached_property
    def resamples(self) -> Resamples | None:
        """Draws of the validation days, in blocks as long as the best trial's difference to the best baseline asks
        for: those of `comparison`. Where its predictions aren't here, the middle length of all trials' differences."""
        if not self.series or self.best_baseline is None:
            return None
        against = self.baseline_series[self.best_baseline]
        best = None if self.best is None else self.series.get(self.best.trial_number)
        compared = [best] if best is not None else list(self.series.values())
        gains = np.stack([against - losses for losses in compared], axis=1)
        block = significance.block_length(gains, horizon=self.spec.task.horizon)
        return significance.resample(len(gains), block)

    def gain(self, baseline: str | None, number: int | None = None) -> Estimate | None:
        """How much better a trial (the best one) is than a baseline, in its metric; the search's luck is not in it."""
        if number is None and self.best is not None:
            number = self.best.trial_number
        if number not in self.series or self.resamples is None or baseline not in self.baseline_series:
            return None
        return significance.estimate(self.baseline_series[baseline] - self.series[number], self.resamples)

    @property
    def luck(self) -> float | None:
        """How much better than their average the best of so many equal trials looks, by chance."""
        if self.resamples is None or len(self.series) < 2:
            return None
        return selection.luck_of_the_best(np.stack(list(self.series.values()), axis=1), self.resamples)

    @property
    def skill_interval(self) -> tuple[float, float, float] | None:
        """(skill, low, high) of the best trial over other days, 95 %; none without predictions."""
        prior = self.prior_skill_series
        mine = None if self.best is None else self.skill_series.get(self.best.trial_number)
        if prior is None or self.resamples is None or mine is None:
            return None
        spread = 1 - (self.resamples.weights @ mine) / (self.resamples.weights @ prior)
        low, high = np.quantile(spread, [0.025, 0.975])
        return float(1 - mine.mean() / prior.mean()), float(low), float(high)


def read(folder: Path) -> StudyResults:
    """All that a study's folder holds.

    Raises:
        NoResults: no study there, no finished trial, or trials that were scored on different labels.
        FintxError: a file that does not hold what fintx wrote.
    """
    study = study_file.read_study(folder)
    if study is None:
        raise NoResults(f"{folder}: holds no study (no study.json); give a study's name, or its folder")
    finished = records.read_all(folder)
    if not finished:
        raise NoResults(f"{folder}: has no finished trial yet; run it (just sweep …), then report as often as you like")
    _check_labels(folder, finished)
    notes: list[str] = []
    rows, seeds = None, {}
    if (folder / "baselines.parquet").is_file():
        rows = predictions.read_rows(folder, study.spec)
        seeds = _seeds(folder, finished, rows, notes)
    else:
        notes.append(
            f"{folder / 'baselines.parquet'} is missing: nothing can be compared row by row; "
            "the next run of the study makes it again."
        )
    return StudyResults(folder, study, tuple(finished), predictions.read_baselines(folder), rows, seeds, tuple(notes))


def find_studies(patterns: Sequence[str], *, outputs: Path) -> list[Path]:
    """The study folders that names, folders or patterns such as 'outputs/*_h3' mean; in order, each once.

    Raises:
        FintxError: a pattern that no study fits.
    """
    folders: dict[Path, None] = {}
    for pattern in patterns:
        matches = _studies(Path(), pattern) or _studies(outputs, pattern)
        if not matches:
            there = ", ".join(path.name for path in study_file.study_folders(outputs)) or "none"
            raise FintxError(
                f"{pattern}: fits no study under {outputs} (there: {there}); give names, folders or a pattern in quotes"
            )
        folders.update(dict.fromkeys(matches))
    return list(folders)


def _studies(root: Path, pattern: str) -> list[Path]:
    """The study folders under a root that a pattern, or a plain name, fits."""
    given = root / pattern
    start = Path(given.anchor) if given.is_absolute() else Path()
    inside = given.relative_to(start) if given.is_absolute() else given
    return [path for path in sorted(start.glob(str(inside))) if (path / "study.json").is_file()]


def _check_labels(folder: Path, finished: Sequence[TrialRecord]) -> None:
    """Losses on different labels are never ranked together."""
    trials: dict[str, list[str]] = {}
    for record in finished:
        for label_hash in sorted({fold.label_hash for fold in record.folds}):
            trials.setdefault(label_hash, []).append(f"trial {record.trial_number}")
    if len(trials) > 1:
        groups = sorted(trials.items(), key=lambda pair: -len(pair[1]))
        words = "; ".join(f"{label_hash[:12]}: {_some(names)}" for label_hash, names in groups)
        raise NoResults(
            f"{folder}: its trials were scored on different labels and can't be ranked together (label hash {words}); "
            "move the trials that don't belong to the study away"
        )


def _some(names: Iterable[str]) -> str:
    """The first few of a list, and how many more there are."""
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _seeds(folder: Path, finished: Sequence[TrialRecord], rows: Rows, notes: list[str]) -> dict[int, Floats]:
    """Of the successful trials whose predictions are here; the others are named."""
    found, missing = {}, []
    for record in finished:
        where = records.trial_folder(folder, record.trial_number)
        if record.value is None:
            continue
        if (where / "predictions.parquet").is_file():
            found[record.trial_number] = predictions.read_seeds(folder, record.trial_number, rows)
        else:
            missing.append(f"trial {record.trial_number}" + (f" (ran on {record.host})" if record.host else ""))
    if missing:
        notes.append(
            f"predictions.parquet is missing of {_some(missing)}: left out of all that is compared row by row; "
            "copy the trial's folder here."
        )
    return found
