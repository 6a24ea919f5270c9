"""What does a running study look like? A live table on a terminal, plain lines everywhere else."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from fintx.config import StudySpec
from fintx.evaluate import metrics
from fintx.study import records, runner
from fintx.study.records import TrialRecord
from fintx.study.runner import EpochDone, Event, StudyReady, Summary, TrialFinished, TrialStarted
from fintx.terminal.tables import show_data
from fintx.terminal.words import count, duration, number, shape_words

_SAY_EVERY_S = 30
"""Without a terminal: how long a trial may run without a line."""
_SHOWN = 8
"""Newest trials in the live table."""


class StudyView:
    """Shows the events of one study; use it as a context manager and pass `notify` to the runner."""

    def __init__(self, spec: StudySpec, console: Console, *, finished: int):
        self._spec = spec
        self._console = console
        self._minimize = metrics.MINIMIZE[spec.study.metric]
        self._began = self._last_said = time.monotonic()
        self._finished_before = finished
        self._records: tuple[TrialRecord, ...] = ()
        self._current = ""
        self._epoch_line = ""
        self._progress = Progress(
            TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[words]}"),
            TimeElapsedColumn(), console=console,
        )  # fmt: skip
        self._study_bar: TaskID = self._progress.add_task(
            "trials", total=spec.study.n_trials, completed=finished, words=""
        )
        self._trial_bar: TaskID = self._progress.add_task("epochs", total=spec.train.max_epochs, words="")
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)

    def __enter__(self) -> StudyView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def notify(self, event: Event) -> None:
        """Take an event of the runner."""
        match event:
            case StudyReady():
                show_data(self._console, event.prepared)
                self._console.print(f"{event.n_shapes:,} feasible shapes, {self._spec.study.n_trials} trials")
            case TrialStarted():
                self._start_trial(event)
            case EpochDone():
                self._show_epoch(event)
            case TrialFinished():
                self._finish_trial(event)

    def _say(self, line: str) -> None:
        self._last_said = time.monotonic()
        if not self._console.is_terminal:
            self._console.print(line, highlight=False, soft_wrap=True)

    def _start_trial(self, event: TrialStarted) -> None:
        note = f' "{event.note}"' if event.note else ""
        self._current = f"trial {event.number} ({event.source}{note}): {shape_words(event.shape)}"
        self._progress.reset(self._trial_bar, total=self._spec.train.max_epochs, words=f"{self._current}, compiling")
        self._say(f"{self._current} …")

    def _show_epoch(self, event: EpochDone) -> None:
        epoch, metric = event.epoch, self._spec.study.metric
        fold = f", fold {event.fold + 1}/{event.n_folds}" if event.n_folds > 1 else ""
        words = f"{self._current}{fold}: {metric} {number(epoch.metrics.get(metric))}, best {number(epoch.best)}"
        self._progress.update(self._trial_bar, completed=epoch.epoch, total=epoch.max_epochs, words=words)
        if time.monotonic() - self._last_said > _SAY_EVERY_S:
            self._say(f"  epoch {epoch.epoch}/{epoch.max_epochs} of {words}, {duration(epoch.seconds)}")

    def _finish_trial(self, event: TrialFinished) -> None:
        self._records = event.records
        record, done, total = event.record, len(event.records), self._spec.study.n_trials
        best = records.best_of(list(event.records), minimize=self._minimize)
        eta = (time.monotonic() - self._began) / max(done - self._finished_before, 1) * (total - done)
        best_words = f"best {number(best.value)} (trial {best.trial_number})" if best else "no success yet"
        words = f"{best_words}, {duration(eta)} to go"
        self._progress.update(self._study_bar, completed=done, words=words)
        self._say(
            f"trial {record.trial_number} {record.outcome}: {record.metric} {number(record.value)}, "
            f"skill {number(record.best.get('skill'))}, {shape_words(record.config.shape)}, "
            f"{count(record.param_count)} parameters, {duration(record.wall_s)} · {done}/{total} done, {words}"
        )

    def _render(self) -> Group:
        table = Table(title=f"{self._spec.study.name}: newest trials", title_justify="left", box=None, pad_edge=False)
        for head in ("trial", self._spec.study.metric, "skill", "shape", "parameters", "outcome", "time"):
            table.add_column(head, justify="left" if head in ("shape", "outcome") else "right")
        best = records.best_of(list(self._records), minimize=self._minimize)
        for record in self._records[-_SHOWN:]:
            table.add_row(
                f"{'★ ' if best is record else ''}{record.trial_number}",
                number(record.value),
                number(record.best.get("skill")),
                shape_words(record.config.shape),
                count(record.param_count),
                record.outcome,
                duration(record.wall_s),
            )
        failed = Counter(r.outcome for r in self._records if r.value is None)
        words = ", ".join(f"{n} {outcome}" for outcome, n in failed.items())
        return Group(table, self._progress, *([f"failed: {words}"] if words else []))


def run(
    spec: StudySpec, console: Console, *, outputs: Path, data_root: Path, should_stop: Callable[[], bool]
) -> Summary:
    """Run one study under a live view.

    Raises:
        FintxError: as `study.runner.run`.
    """
    folder = outputs / spec.study.name
    finished = len(records.read_all(folder)) if records.read_study(folder) else 0
    with StudyView(spec, console, finished=finished) as view:
        return runner.run(spec, outputs=outputs, data_root=data_root, notify=view.notify, should_stop=should_stop)
