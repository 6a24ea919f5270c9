"""Study results: a study's records and every model's loss on every validation day, read from its folder.

Works on a study that is half finished: what is missing is named in `notes`, a line each, and what depends on it is
left out.
"""

from __future__ import annotations

import functools
import glob
from collections.abc import Sequence
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


@dataclass(frozen=True, eq=False)
class StudyResults:
    """A study, as far as it has come. Losses are those of the study's metric: 1 − it for a ranking."""

    folder: Path
    study: StudyFile
    records: tuple[TrialRecord, ...]
    """Every finished trial, by number."""
    baselines: dict[str, Any]
    """baselines.json: name → words and metrics."""
    rows: Rows | None
    """None if the baselines' predictions are missing: then nothing is compared row by row."""
    seed_outputs: dict[int, Floats]
    """Trial number → (N, S) logits or log returns of its seeds; of successful trials with predictions in the folder."""
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The study\'s name."""
        return self.folder.resolve().name

    @property
    def spec(self) -> StudySpec:
        """The study's settings."""
        return self.study.spec

    @property
    def metric(self) -> str:
        """The metric that the study ranks trials by."""
        return self.spec.study.metric

    @property
    def minimize(self) -> bool:
        """Whether less of the study's metric is better."""
        return metrics.MINIMIZE[self.metric]

    @functools.cached_property
    def ranked(self) -> tuple[TrialRecord, ...]:
        """The successful trials, best first by the study's metric."""
        return tuple(records.ranked(list(self.records), minimize=self.minimize))

    @property
    def best(self) -> TrialRecord | None:
        """The best trial; none if none succeeded."""
        return next(iter(self.ranked), None)

    @property
    def best_outputs(self) -> Floats | None:
        """(S,) of the best trial's first seed, which is one model; none without its predictions."""
        of_seeds = None if self.best is None else self.seed_outputs.get(self.best.trial_number)
        return None if of_seeds is None else of_seeds[0]

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
        if self.rows is None or self.best is None or self.best.trial_number not in self.seed_outputs:
            return None
        return predictions.compare(self.rows, self.rows.losses(self.seed_outputs[self.best.trial_number]))

    @functools.cached_property
    def daily_losses(self) -> dict[int | str, Floats]:
        """Trial number, or baseline → (D,) losses by day; of a trial, the mean over its seeds."""
        return self._daily_losses(self.metric)

    @functools.cached_property
    def skill_daily_losses(self) -> dict[int | str, Floats]:
        """The same in the loss that skill is a share of."""
        return self.daily_losses if self.skill_loss == self.metric else self._daily_losses(self.skill_loss)

    def _daily_losses(self, metric: str) -> dict[int | str, Floats]:
        if self.rows is None:
            return {}
        models = self.seed_outputs | self.rows.baselines
        return {name: self.rows.by_day(self.rows.losses(outputs, metric=metric)) for name, outputs in models.items()}

    @functools.cached_property
    def resamples(self) -> Resamples | None:
        """Draws of the validation days, in blocks as long as the best trial's difference to the best baseline asks
        for: those of `comparison`. Without its predictions, the median length of all trials' differences."""
        if not self.seed_outputs or self.best_baseline is None:
            return None
        best = None if self.best is None else self.best.trial_number
        compared = [best] if best in self.seed_outputs else list(self.seed_outputs)
        against = self.daily_losses[self.best_baseline]
        gains = np.stack([against - self.daily_losses[number] for number in compared if number is not None], axis=1)
        return significance.resample(len(gains), significance.block_length(gains, horizon=self.spec.task.horizon))

    def gain(self, baseline: str | None, number: int | None = None) -> Estimate | None:
        """How much better a trial (none: the best) is than a baseline, in the study's metric.

        That a trial was chosen as the best of many is not in the interval.
        """
        if number is None and self.best is not None:
            number = self.best.trial_number
        if number not in self.daily_losses or baseline not in self.daily_losses or self.resamples is None:
            return None
        return significance.estimate(self.daily_losses[baseline] - self.daily_losses[number], self.resamples)

    @property
    def luck(self) -> float | None:
        """How much better than their average the best of so many equal trials looks, by chance."""
        if self.resamples is None or len(self.seed_outputs) < 2:
            return None
        losses = np.stack([self.daily_losses[number] for number in self.seed_outputs], axis=1)
        return selection.luck_of_the_best(losses, self.resamples)

    @property
    def skill_interval(self) -> tuple[float, float, float] | None:
        """(skill, low, high) of the best trial over other days, 95 %; none without predictions."""
        prior = self.skill_daily_losses.get("prior")
        losses = None if self.best is None else self.skill_daily_losses.get(self.best.trial_number)
        if prior is None or losses is None or self.resamples is None:
            return None
        resampled = 1 - (self.resamples.weights @ losses) / (self.resamples.weights @ prior)
        low, high = np.quantile(resampled, [0.025, 0.975])
        return float(1 - losses.mean() / prior.mean()), float(low), float(high)


def read(folder: Path) -> StudyResults:
    """All that a study's folder holds.

    Raises:
        FintxError: no study there, no finished trial, trials scored on different labels, or a damaged file.
    """
    study = study_file.read_study(folder)
    if study is None:
        raise FintxError(f"{folder}: holds no study (no study.json); give a study's name, or its folder")
    finished = records.read_all(folder)
    if not finished:
        raise FintxError(
            f"{folder}: has no finished trial yet; run it (just sweep …), then report as often as you like"
        )
    _check_labels(folder, finished)
    rows, seed_outputs, notes, missing = None, {}, [], []
    if (folder / "baselines.parquet").is_file():
        rows = predictions.read_rows(folder, study.spec)
        for record in (record for record in finished if record.value is not None):
            number = record.trial_number
            if (records.trial_folder(folder, number) / "predictions.parquet").is_file():
                seed_outputs[number] = predictions.read_seeds(folder, number, rows)
            else:
                missing.append(f"trial {number}" + (f" (ran on {record.host})" if record.host else ""))
    else:
        notes.append(
            f"{folder / 'baselines.parquet'} is missing: nothing can be compared row by row; "
            "the next run of the study makes it again."
        )
    if missing:
        notes.append(
            f"predictions.parquet is missing of {_first_few(missing)}: left out of all that is compared row by row; "
            "copy the trial's folder here."
        )
    baselines = predictions.read_baselines(folder)
    return StudyResults(folder, study, tuple(finished), baselines, rows, seed_outputs, tuple(notes))


def _check_labels(folder: Path, finished: Sequence[TrialRecord]) -> None:
    """Losses on different labels are never ranked together."""
    trials: dict[str, list[str]] = {}
    for record in finished:
        for label_hash in sorted({fold.label_hash for fold in record.folds}):
            trials.setdefault(label_hash, []).append(f"trial {record.trial_number}")
    if len(trials) > 1:
        by_size = sorted(trials.items(), key=lambda pair: -len(pair[1]))
        lists = "; ".join(f"{label_hash[:12]}: {_first_few(names)}" for label_hash, names in by_size)
        raise FintxError(
            f"{folder}: its trials were scored on different labels and can't be ranked together (label hash {lists}); "
            "move the trials that don't belong to the study away"
        )


def _first_few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def find_studies(patterns: Sequence[str], *, outputs: Path) -> list[Path]:
    """The study folders that names, folders or patterns such as 'outputs/*_h3' mean; in order, each once.

    Raises:
        FintxError: a pattern that fits no study.
    """
    folders: dict[Path, None] = {}
    for pattern in patterns:
        for root in (Path(), outputs):
            matches = [root / match for match in sorted(glob.glob(pattern, root_dir=root))]
            studies = [path for path in matches if (path / "study.json").is_file()]
            if studies:
                break
        else:
            names = ", ".join(path.name for path in study_file.study_folders(outputs)) or "none"
            raise FintxError(
                f"{pattern}: fits no study under {outputs} (there: {names}); give names, folders or a pattern in quotes"
            )
        folders.update(dict.fromkeys(studies))
    return list(folders)
