"""How far is each study? Read from its folder alone, while it runs or long after."""

from __future__ import annotations

import datetime
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fintx.config.schema import StudySpec
from fintx.evaluate import metrics, significance
from fintx.study import confirmation, lead, ledger, lock, records
from fintx.study.lead import BaselineComparison
from fintx.study.ledger import Claim
from fintx.study.records import TrialRecord
from fintx.types import FintxError


@dataclass(frozen=True)
class StudyStatus:
    """One line of `fintx status`, and what it says below of what is unfinished."""

    name: str
    finished: int
    n_trials: int
    holder: str | None
    """The process that runs it on this host; none: nobody."""
    failed: dict[str, int]
    """Outcome → count, for outcomes that are no success."""
    unfinished: tuple[Claim, ...]
    """Trials without a record: running, interrupted, or failed (their attempts crashed or hung); by number."""
    metric: str
    best: TrialRecord | None
    comparison: BaselineComparison | None
    """The best trial against the best baseline; none where their predictions are not here."""
    eta: datetime.timedelta | None
    """Mean wall time of the finished trials × trials to go, shared out among those that train now; none before the
    first."""
    confirmation: str
    """What its confirmation came to, in a few words; "–": there was none."""
    doubt: str | None
    """Why its best result is too good to be true; none: it is believable."""
    test_openings: int
    note: str
    """Why nothing is known of its unfinished trials, or of its best trial beside the baselines; empty: it is."""

    @property
    def running(self) -> bool:
        """Whether a process of this host runs it."""
        return self.holder is not None


def read(study_folder: Path) -> StudyStatus:
    """The status of the study in a folder.

    Raises:
        DamagedRecord: a file of the study can't be understood.
    """
    study = records.read_study(study_folder)
    if study is None:
        raise records.DamagedRecord(f"{study_folder}: holds no study (no study.json)")
    spec = study.spec
    finished = records.read_all(study_folder)
    numbers = {record.trial_number for record in finished}
    held, unasked = _claims(study_folder, spec)
    claims = {claim.number: claim for claim in held if claim.number not in numbers}
    at_work = sum(claim.state == "running" and claim.step > 0 for claim in claims.values())
    to_go = max(spec.study.n_trials - len(finished), 0)
    best = records.best_of(finished, minimize=metrics.MINIMIZE[spec.study.metric])
    comparison, uncompared = (None, "") if best is None else _comparison(study_folder, spec, best)
    mean_s = sum(record.wall_s for record in finished) / len(finished) if finished else None
    return StudyStatus(
        name=spec.study.name,
        finished=len(finished),
        n_trials=spec.study.n_trials,
        holder=lock.holder(study_folder),
        failed=dict(Counter(record.outcome for record in finished if record.outcome not in records.SUCCESSES)),
        unfinished=tuple(claims[number] for number in sorted(claims)),
        metric=spec.study.metric,
        best=best,
        comparison=comparison,
        eta=None if mean_s is None else datetime.timedelta(seconds=round(mean_s * to_go / max(at_work, 1))),
        confirmation=_confirmation(study_folder, len(finished)),
        doubt=significance.too_good(best.best) if best else None,
        test_openings=len(records.openings(study_folder)),
        note="; ".join(words for words in (unasked, uncompared) if words),
    )


def _comparison(study_folder: Path, spec: StudySpec, best: TrialRecord) -> tuple[BaselineComparison | None, str]:
    """The best trial against the best baseline, or why it can't be said: what the records say is there all the same."""
    here = records.trial_folder(study_folder, best.trial_number) / "predictions.parquet"
    if not here.is_file() or not (study_folder / "baselines.parquet").is_file():
        return None, ""
    try:
        return lead.of_trial(study_folder, spec, best), ""
    except FintxError as error:
        return None, str(error)


def _confirmation(study_folder: Path, finished: int) -> str:
    found = confirmation.read(study_folder)
    if found is None:
        return "–"
    if not found.complete:
        return f"{found.n_trained}/{found.n_members} trained"
    words = f"{len(found.confirmed)} of {len(found.candidates)}"
    return words if found.n_finished == finished else f"{words} (after {found.n_finished} trials)"


def _claims(study_folder: Path, spec: StudySpec) -> tuple[tuple[Claim, ...], str]:
    """What the storage says, or why it says nothing: what the records say is there all the same."""
    url = spec.execution.storage
    if "***" in url:
        return (), f"{url}: its password was not kept, so trials that are under way are not shown"
    try:
        return ledger.read(study_folder, url=url), ""
    except FintxError as error:
        return (), f"{error}; until then trials that are under way are not shown"
