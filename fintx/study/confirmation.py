"""What came of training a study's best trials again? Compared row by row with the baselines and the whole search.

outputs/<study>/confirmation.json holds it: written at the end of every run of a confirmation, as far as that got
(comparison makes it).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError

from fintx.config.schema import Shape
from fintx.evaluate.significance import Estimate
from fintx.evaluate.verdict import Verdict
from fintx.study import records
from fintx.study.records import Kept, Metrics

FILE = "confirmation.json"
GroupKind = Literal["fold", "year", "vix"]


class Group(Kept):
    """A candidate's gain over the best baseline on some of the rows."""

    kind: GroupKind
    name: str
    """The fold, counted from 1; the year; or calm, middling, nervous: the thirds of VIX."""
    n: int
    """Rows."""
    gain: Estimate


class Ensemble(Kept):
    """The candidate's members as one model, by their mean probability (or mean return)."""

    metrics: Metrics
    gain: Estimate
    """Over the best baseline."""


class Candidate(Kept):
    """One of the search's best, trained again."""

    trial: int
    shape: Shape
    param_count: int
    search_value: float
    """The study's metric as the search found it."""
    values: tuple[float | None, ...]
    """The same with each fresh seed; none: that member failed."""
    outcomes: tuple[str, ...]
    """Of the members."""
    verdict: Verdict | None
    """None: not judged, because a member failed or none is finished."""
    too_good: Estimate | None
    """By how much the search's mean loss per row lies below the fresh seeds'; none without its predictions."""
    metrics: Metrics
    """Mean over the seeds."""
    ensemble: Ensemble | None
    groups: tuple[Group, ...]

    @property
    def words(self) -> str:
        """The result in words."""
        if self.verdict is not None:
            return self.verdict.words
        failed = [outcome for outcome in self.outcomes if outcome not in records.SUCCESSES]
        return f"not confirmed: {len(failed)} of {len(self.outcomes)} seeds {failed[0]}" if failed else "not judged yet"

    @property
    def spread(self) -> float | None:
        """Standard deviation of the study's metric between the fresh seeds; none for fewer than two that succeeded."""
        return _spread([value for value in self.values if value is not None])

    def of_kind(self, kind: str) -> tuple[Group, ...]:
        """Its folds, its years, or its thirds of VIX."""
        return tuple(group for group in self.groups if group.kind == kind)

    def spread_of_gains(self, kind: str) -> float | None:
        """Standard deviation of its gain between those groups."""
        return _spread([group.gain.mean for group in self.of_kind(kind)])

    @property
    def mean_value(self) -> float | None:
        """The study's metric, mean over the fresh seeds that succeeded."""
        known = [value for value in self.values if value is not None]
        return float(np.mean(known)) if known else None


class Confirmation(Kept):
    """confirmation.json."""

    study: str
    created: str
    complete: bool
    """Every member is trained."""
    n_members: int
    n_trained: int
    seeds: tuple[int, ...]
    """Those with which every candidate has been trained: what is compared."""
    n_seeds: int
    """Wanted."""
    n_trials: int
    """Of the study, wanted."""
    n_finished: int
    """Of the search when this was written; fewer: the study was, or is, unfinished."""
    n_compared: int
    """Trials in the tests over the whole search: the successful ones whose predictions lie here."""
    metric: str
    loss: str
    """The metric that gains are in: the study's; log_loss in older ones of a ranking."""
    level: float
    reps: int
    block: int | None
    """Days, mean length of the bootstrap's blocks."""
    n_rows: int
    n_days: int
    baseline: str
    """The best one in the study's metric."""
    baseline_loss: float
    """1 − the metric for a ranking, as every loss here."""
    superior_p_value: float | None
    """Hansen's SPA: of "no trial of the search beats the best baseline"."""
    overfitting: float | None
    """Probability of backtest overfitting over the search's own trials; none for fewer than two of them."""
    luck: float | None
    """How much better than their average the best of so many equal trials looks on these rows by chance."""
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]

    @property
    def best(self) -> Candidate | None:
        """That with the least mean loss over fresh seeds."""
        return next((each for each in self.candidates if each.verdict is not None and each.verdict.best), None)

    @property
    def confirmed(self) -> tuple[Candidate, ...]:
        """Those that beat the best baseline with confidence, the best first."""
        found = [each for each in self.candidates if each.verdict is not None and each.verdict.confirmed]
        return tuple(sorted(found, key=lambda each: each.verdict.loss.mean))  # type: ignore[union-attr]

    @property
    def alike(self) -> tuple[Candidate, ...]:
        """Those that can't be told from the best, itself left out."""
        judged = [each for each in self.candidates if each.verdict is not None and not each.verdict.best]
        return tuple(each for each in judged if each.verdict is not None and each.verdict.indistinguishable)


def _spread(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def write(study_folder: Path, found: Confirmation) -> None:
    """Write confirmation.json, whole or not at all.

    Raises:
        FintxError: it can't be written.
    """
    records.write_atomically(study_folder / FILE, found.model_dump_json(indent=1) + "\n")


def read(study_folder: Path) -> Confirmation | None:
    """The confirmation of the study in a folder; none: there has been none.

    Raises:
        DamagedRecord: the file is there but is not fintx's.
    """
    path = study_folder / FILE
    if not path.is_file():
        return None
    try:
        return Confirmation.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        raise records.DamagedRecord(
            f"{path}: is no confirmation of this fintx ({type(error).__name__}); delete it and run: just confirm "
            f"{study_folder}"
        ) from None
