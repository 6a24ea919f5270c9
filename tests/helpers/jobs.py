"""Jobs of a search or a confirmation, asked for where there is room for any trial."""

from __future__ import annotations

from fintx.run.job import Job
from fintx.run.scheduler import TrialSource


def next_jobs(source: TrialSource) -> list[Job]:
    """The next jobs that would train side by side."""
    return list(source.next_jobs(lambda config: 0))
