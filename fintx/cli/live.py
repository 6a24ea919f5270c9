"""Live view of running studies: a table on a terminal, plain lines everywhere else."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fintx.cli.display import grid, lines, show_data
from fintx.config.schema import StudySpec
from fintx.evaluate import metrics
from fintx.report.format import count, duration, number, shape_words
from fintx.report.table import Column, Table, make
from fintx.study import records
from fintx.study.events import (
    ConfirmReady,
    EpochDone,
    Event,
    Notice,
    RerunFinished,
    StudyReady,
    TrialEnded,
    TrialFinished,
    TrialStarted,
)
from fintx.study.records import TrialRecord

_SAY_EVERY_S = 30
"""Without a terminal: how long a trial may run without a line."""
_SHOWN = 8
"""Newest trials in the live table."""


@dataclass
class _Study:
    """What is shown of one study."""

    spec: StudySpec
    bar: TaskID
    finished_before: int
    to_beat: tuple[str, float] | None = None
    began: float = field(default_factory=time.monotonic)
    records: tuple[TrialRecord, ...] = ()

    @property
    def best(self) -> TrialRecord | None:
        return records.best_of(list(self.records), minimize=metrics.MINIMIZE[self.spec.study.metric])


class View:
    """Shows the events of a run; use it as a context manager and pass `notify` to the runner."""

    def __init__(self, console: Console):
        self._console = console
        self._studies: dict[str, _Study] = {}
        self._trials: dict[tuple[str, int], tuple[TaskID, str]] = {}
        self._said: dict[tuple[str, int], float] = {}
        self._names: dict[tuple[str, int], str] = {}
        """Of what is no trial of a search."""
        self._progress = Progress(
            TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[words]}"),
            TimeElapsedColumn(), console=console,
        )  # fmt: skip
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)

    def __enter__(self) -> View:
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
                self._open(event)
            case TrialStarted():
                self._start_trial(event)
            case EpochDone():
                self._show_epoch(event)
            case TrialEnded():
                self._close(event.study, event.number)
                name = self._names.get((event.study, event.number), f"trial {event.number}")
                self._say(event.study, f"{name}: {event.text}", always=True)
            case TrialFinished():
                self._finish_trial(event)
            case ConfirmReady():
                self._open_confirmation(event)
            case RerunFinished():
                self._finish_rerun(event)
            case Notice():
                self._say(event.study, event.text, always=True)

    def _say(self, study: str, line: str, *, always: bool = False) -> None:
        """A line where there is no live table; what must not scroll away in one is printed above it too."""
        if always or not self._console.is_terminal:
            prefix = f"{study}: " if len(self._studies) > 1 else ""
            lines(self._console, f"{prefix}{line}")

    def _open(self, event: StudyReady) -> None:
        bar = self._progress.add_task(event.study, total=event.total, completed=event.finished, words="")
        self._studies[event.study] = _Study(event.spec, bar, event.finished, event.to_beat)
        show_data(self._console, event.prepared)
        before = f", {event.finished} finished before" if event.finished else ""
        self._console.print(f"{event.n_shapes:,} feasible shapes, {event.total} trials{before}")
        if event.to_beat is not None:
            name, value = event.to_beat
            self._say(event.study, f"to beat: {name}, {event.spec.study.metric} {number(value)}", always=True)

    def _open_confirmation(self, event: ConfirmReady) -> None:
        total = len(event.trials) * event.n_seeds
        bar = self._progress.add_task(event.study, total=total, completed=event.finished, words="trained again")
        self._studies[event.study] = _Study(event.spec, bar, event.finished)
        numbers = ", ".join(map(str, event.trials))
        before = f", {event.finished} of {total} done before" if event.finished else ""
        self._say(
            event.study,
            f"confirmation of {event.study}: the best {len(event.trials)} of {event.searched} trials ({numbers}), "
            f"each trained again with the same {event.n_seeds} fresh seeds{before}",
            always=True,
        )

    def _finish_rerun(self, event: RerunFinished) -> None:
        self._close(event.study, event.number)
        shown, record = self._studies[event.study], event.record
        self._progress.update(shown.bar, completed=event.done)
        self._say(
            event.study,
            f"{event.name} {record.outcome}: {record.metric} {number(record.value)}, skill "
            f"{number(record.best.get('skill'))}, {duration(record.wall_s)} · {event.done}/{event.total} done",
        )

    def _start_trial(self, event: TrialStarted) -> None:
        note = f' "{event.note}"' if event.note else ""
        attempt = f", attempt {event.attempt}" if event.attempt > 1 else ""
        words = f"trial {event.number} ({event.source}{attempt}{note}): {shape_words(event.shape)}"
        if event.name:
            self._names[event.study, event.number] = event.name
            words = f"{event.name}{attempt}: {shape_words(event.shape)}"
        total = self._studies[event.study].spec.train.max_epochs
        task = self._progress.add_task("  epochs", total=total, words=f"{words}, compiling")
        self._trials[event.study, event.number] = (task, words)
        self._said[event.study, event.number] = time.monotonic()
        self._say(event.study, f"{words} …")

    def _show_epoch(self, event: EpochDone) -> None:
        key, epoch = (event.study, event.number), event.epoch
        task, trial = self._trials[key]
        metric = self._studies[event.study].spec.study.metric
        fold = f", fold {event.fold + 1}/{event.n_folds}" if event.n_folds > 1 else ""
        seed = f", seed {event.replicate + 1}/{event.n_replicates}" if event.n_replicates > 1 else ""
        words = f"{trial}{fold}{seed}: {metric} {number(epoch.metrics.get(metric))}, best {number(epoch.best)}"
        self._progress.update(task, completed=epoch.epoch, total=epoch.max_epochs, words=words)
        if time.monotonic() - self._said[key] > _SAY_EVERY_S:
            self._said[key] = time.monotonic()
            line = f"  epoch {epoch.epoch}/{epoch.max_epochs} of {words}, {duration(epoch.seconds)}"
            self._say(event.study, line)

    def _close(self, study: str, number_: int) -> None:
        task, _ = self._trials.pop((study, number_), (None, ""))
        if task is not None:
            self._progress.remove_task(task)

    def _finish_trial(self, event: TrialFinished) -> None:
        self._close(event.study, event.record.trial_number)
        shown, record = self._studies[event.study], event.record
        shown.records = event.records
        done, total, best = len(event.records), event.total, shown.best
        mean_s = (time.monotonic() - shown.began) / max(done - shown.finished_before, 1)
        best_words = f"best {number(best.value)} (trial {best.trial_number})" if best else "no success yet"
        rival = f", to beat {number(shown.to_beat[1])} ({shown.to_beat[0]})" if shown.to_beat else ""
        words = f"{best_words}{rival}, {duration(mean_s * max(total - done, 0))} to go"
        self._progress.update(shown.bar, completed=done, total=total, words=words)
        self._say(
            event.study,
            f"trial {record.trial_number} {record.outcome}: {record.metric} {number(record.value)}, "
            f"skill {number(record.best.get('skill'))}, {shape_words(record.config.shape)}, "
            f"{count(record.param_count)} parameters, {duration(record.wall_s)} · {done}/{total} done, {words}",
        )

    def _render(self) -> RenderableType:
        tables = [grid(_newest(shown)) for shown in self._studies.values() if shown.records]
        failed = Counter(r.outcome for shown in self._studies.values() for r in shown.records if r.value is None)
        words = ", ".join(f"{n} {outcome}" for outcome, n in failed.items())
        return Group(*tables, self._progress, *([f"failed: {words}"] if words else []))


def _newest(shown: _Study) -> Table:
    best = shown.best
    rows: list[tuple[object, ...]] = []
    if shown.to_beat is not None:
        name, value = shown.to_beat
        rows.append(("to beat", value, None, name, None, "", None))
    for record in shown.records[-_SHOWN:]:
        star = "★ " if best is record else ""
        rows.append(
            (f"{star}{record.trial_number}", record.value, record.best.get("skill"), shape_words(record.config.shape),
             record.param_count, record.outcome, record.wall_s)
        )  # fmt: skip
    columns: list[Column] = [
        "trial", (shown.spec.study.metric, "number"), ("skill", "percent"), "shape", ("parameters", "size"), "outcome",
        ("time", "seconds"),
    ]  # fmt: skip
    return make("newest", f"{shown.spec.study.name}: newest trials", columns, rows)
