"""Events of a running study, as plain values for a live view, a log or a test; and the context of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fintx.config.schema import ExecutionConfig, Shape, StudySpec
from fintx.data import datasets
from fintx.study.records import TrialRecord
from fintx.train.member_run import EpochReport


@dataclass(frozen=True)
class StudyReady:
    """A study is open: its data, label and split are built; no trial of this run has begun."""

    study: str
    spec: StudySpec
    prepared: datasets.PreparedData
    n_shapes: int
    finished: int
    """Records so far."""
    total: int
    """Records at the end of this run, by its file as it is now."""
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
    """Of a rerun; its number then only identifies it."""


@dataclass(frozen=True)
class EpochDone:
    """An epoch of one fold and seed is done."""

    study: str
    number: int
    fold: int
    n_folds: int
    replicate: int
    n_replicates: int
    epoch: EpochReport


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
    """A confirmation is open: its candidates are chosen; no rerun of this run has begun."""

    study: str
    spec: StudySpec
    prepared: datasets.PreparedData
    trials: tuple[int, ...]
    """The candidates, best first."""
    n_seeds: int
    searched: int
    """Records of the search."""
    finished: int
    """Reruns so far."""


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
    """Something that you should know about a study, in a line."""

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
    """Called with every event."""
    should_stop: Callable[[], bool] = lambda: False
    """Called several times a second; true saves what runs and ends the run."""
    hosts: bool = False
    """Whether the one worker trains together with those of the launch's other processes, one trial at a time."""
    on_gpu: bool = False
    """Whether the workers train on GPUs."""
    n_workers: int = 1

    def notice(self, study: str, text: str) -> None:
        """Report something about a study, in a line."""
        self.notify(Notice(study, text))

    def pipelines(self, execution: ExecutionConfig) -> bool:
        """Whether a study's next trial is proposed while one trains."""
        return not self.hosts and (self.on_gpu if execution.pipeline is None else execution.pipeline)
