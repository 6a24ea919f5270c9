"""The context of a run: where studies and data lie, who is told, who may stop it, and what its workers train on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fintx.config.schema import ExecutionConfig
from fintx.study.events import Event, Notice


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
