"""Jobs: what a worker is given for one attempt at a trial, and the lines that it and its coordinator exchange.

The coordinator writes to the worker's stdin: jobs that train together as one line of JSON, or one of the commands
below. The worker answers on stdout with events, a line of JSON each: "ready", or a job's ticket with what happened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from fintx.config.schema import StudySpec, TrialConfig
from fintx.study import records, search_space

STOP = "stop"
"""Save what trains, give back what waits, and end."""
LEAVE, RECALL = "leave ", "recall "
"""Before a ticket: give the job up even if it trains; give it back unless it trains."""
ENDS = ("done", "interrupted", "superseded", "mistake", "failed", "died", "hung", "returned")
"""Events that end a job; the last three are the coordinator's own findings."""
JOINED = b"joined\n"
"""What a worker that follows another host's prints once all processes are connected."""


class Job(BaseModel):
    """One attempt at one trial, as JSON."""

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
    population_size: int = 1
    """Members (trials × replicates) that may train side by side, in one program."""
    on_cores: bool = False
    """Replicates may train at the same time, each in a thread of the worker."""
    rerun: int | None = None
    """Of a confirmation, which trains a trial again with another seed: its place there. None: the trial itself."""

    @property
    def ticket(self) -> str:
        """Unique among all attempts of a run."""
        rerun = "" if self.rerun is None else f"/rerun {self.rerun}"
        return f"{self.spec.study.name}/{self.number}{rerun}/{self.attempt}"

    @property
    def replicates(self) -> tuple[TrialConfig, ...]:
        """The config with each of its seeds; a rerun has a single one."""
        k = self.spec.study.replicates if self.rerun is None else 1
        return tuple(
            self.config.model_copy(update={"seed": search_space.replicate_seed(self.config.seed, replicate)})
            for replicate in range(k)
        )

    @property
    def source(self) -> Literal["queue", "sampler"]:
        """Where the trial comes from."""
        return "sampler" if self.entry is None else "queue"

    @property
    def key(self) -> int:
        """Unique among the jobs of its search or confirmation."""
        return self.number if self.rerun is None else self.rerun

    @property
    def folder(self) -> Path:
        """The trial's, or the rerun's."""
        if self.rerun is None:
            return records.trial_folder(self.study_folder, self.number)
        return records.rerun_folder(self.study_folder, self.number, self.config.seed)


Jobs = TypeAdapter(tuple[Job, ...])
"""Jobs that train together."""
