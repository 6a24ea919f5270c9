"""Events of a running study: plain values, for a live view, a log or a test."""

from __future__ import annotations

from dataclasses import dataclass

from fintx.config.schema import Shape, StudySpec
from fintx.data import windows
from fintx.study.records import TrialRecord
from fintx.train import loop


@dataclass(frozen=True)
class StudyReady:
    """Data, label and split stand; no trial of this run has begun."""

    study: str
    spec: StudySpec
    prepared: windows.Prepared
    n_shapes: int
    finished: int
    """Records that stand already."""
    total: int
    """Records at the end of this run, as far as its file asks for them now."""
    to_beat: tuple[str, float] | None = None
    """The best baseline and its score; none where no baseline has the study's metric."""


@dataclass(frozen=True)
class TrialStarted:
    """A trial has been handed to a worker."""

    study: str
    number: int
    attempt: int
    shape: Shape
    source: str
    note: str
    name: str = ""
    """What it is called where it is no trial of the search; its number then only tells it from others."""


@dataclass(frozen=True)
class EpochDone:
    """One epoch of one fold and seed is done."""

    study: str
    number: int
    fold: int
    n_folds: int
    replicate: int
    n_replicates: int
    epoch: loop.Epoch


@dataclass(frozen=True)
class TrialEnded:
    """An attempt ended without a record."""

    study: str
    number: int
    words: str


@dataclass(frozen=True)
class TrialFinished:
    """A record has been written."""

    study: str
    record: TrialRecord
    records: tuple[TrialRecord, ...]
    total: int
    """Records at the end of this run."""


@dataclass(frozen=True)
class ConfirmReady:
    """A confirmation stands: which trials are trained again; no member of this run has begun."""

    study: str
    spec: StudySpec
    prepared: windows.Prepared
    trials: tuple[int, ...]
    """The candidates, best first."""
    n_seeds: int
    searched: int
    """Records of the search."""
    finished: int
    """Members that are trained already."""


@dataclass(frozen=True)
class MemberFinished:
    """A candidate has been trained with one of the fresh seeds."""

    study: str
    number: int
    name: str
    record: TrialRecord
    done: int
    total: int


@dataclass(frozen=True)
class Notice:
    """Something that its user should know, in a line."""

    study: str
    words: str


Event = StudyReady | TrialStarted | EpochDone | TrialEnded | TrialFinished | ConfirmReady | MemberFinished | Notice
