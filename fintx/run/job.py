"""Jobs: all that a worker is told of an attempt at a trial."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from fintx.config.schema import StudySpec, TrialConfig
from fintx.study import records, search_space

STOP = "stop"


class Job(BaseModel):
    """One attempt at one trial: all that a worker is told of it, as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: StudySpec
    config: TrialConfig
    number: int
    attempt: int
    params: dict[str, bool | int | float | str]
    entry: str | None
    """The queue entry's identity; none: the sampler's own proposal."""
    note: str
    training: str
    study_folder: Path
    data_root: Path
    memory_limit: int | None
    """Bytes; none: what the device has."""
    at_once: int = 1
    """Members (trials × replicates) that may train side by side, in one program."""
    on_cores: bool = False
    """Replicates may train at the same time, each by a thread of its worker's."""
    rerun: int | None = None
    """Of a confirmation, which trains a trial again with another seed: its place there. None: the trial itself."""

    @property
    def ticket(self) -> str:
        """Names the attempt among all of a run's."""
        rerun = "" if self.rerun is None else f"/rerun {self.rerun}"
        return f"{self.spec.study.name}/{self.number}{rerun}/{self.attempt}"

    @property
    def replicates(self) -> tuple[TrialConfig, ...]:
        """The config with each of its seeds; a confirmation's has the one that it was given."""
        k = self.spec.study.replicates if self.rerun is None else 1
        return tuple(
            self.config.model_copy(update={"seed": search_space.replicate_seed(self.config.seed, replicate)})
            for replicate in range(k)
        )

    @property
    def source(self) -> Literal["queue", "sampler"]:
        """Who asked."""
        return "sampler" if self.entry is None else "queue"

    @property
    def key(self) -> int:
        """What tells it from the other jobs of its course."""
        return self.number if self.rerun is None else self.rerun

    @property
    def folder(self) -> Path:
        """The trial's, or the rerun's."""
        if self.rerun is None:
            return records.trial_folder(self.study_folder, self.number)
        return records.rerun_folder(self.study_folder, self.number, self.config.seed)


Jobs = TypeAdapter(tuple[Job, ...])
"""Trials that are trained together, as a worker is told of them."""
