"""Events of a running study: plain values, for a live view, a log or a test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fintx.config.schema import ExecutionConfig, Shape, StudySpec
from fintx.data import datasets
from fintx.study.records import TrialRecord
from fintx.train import progress


@dataclass(frozen=True)
class StudyReady:
    """Data, label and split stand; no trial of this run has begun."""

    study: str
    spec: StudySpec
    prepared: datasets.PreparedData
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
    epoch: progress.Epoch


@dataclass(frozen=True)
class TrialEnded:
    """An attempt ended without a record."""

    study: str
    number: int
    text: str


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
    """A confirmation stands: which trials are trained again; no rerun of it has begun."""

    study: str
    spec: StudySpec
    prepared: datasets.PreparedData
    trials: tuple[int, ...]
    """The candidates, best first."""
    n_seeds: int
    searched: int
    """Records of the search."""
    finished: int
    """Reruns that are trained already."""


@dataclass(frozen=True)
class RerunFinished:
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
    text: str


Event = StudyReady | TrialStarted | EpochDone | TrialEnded | TrialFinished | ConfirmReady | RerunFinished | Notice


@dataclass(frozen=True)
class RunContext:
    """What is the same for every study of a run."""

    study_root: Path
    """Folder that holds one folder per study."""
    data_root: Path
    notify: Callable[[Event], None] = lambda event: None
    """Called with every event, for the live view."""
    should_stop: Callable[[], bool] = lambda: False
    """Asked several times a second; true saves what runs and ends the run."""
    hosts: bool = False
    """The one worker trains together with those of the launch's other processes: one trial at a time."""
    on_gpu: bool = False
    """Whether the workers' trials run on one."""
    n_workers: int = 1

    def notice(self, study: str, words: str) -> None:
        """Tell the user something about a study, in a line."""
        self.notify(Notice(study, words))

    def pipelines(self, execution: ExecutionConfig) -> bool:
        """Whether a study's next trial is asked for while one trains."""
        wanted = execution.pipeline
        return not self.hosts and (self.on_gpu if wanted is None else wanted)
