"""Running studies at a terminal: a live view (plain lines where there is no terminal), results, a clean stop."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from fintx.cli import display
from fintx.cli.terminal import print_lines, rich_table
from fintx.config.schema import StudySpec
from fintx.errors import StopAtOnce
from fintx.evaluate import metrics
from fintx.report.format import count, duration, number, percent, shape_words
from fintx.report.table import Table
from fintx.run import scheduler
from fintx.run.search import StudySummary
from fintx.run.workers import keep_off_the_gpus
from fintx.study import events, records
from fintx.study.lifecycle import StudyRequest
from fintx.study.records import TrialRecord

_LINE_EVERY_S = 30
"""Without a terminal: how long a trial may run without a line."""
_N_NEWEST = 8
"""Newest trials in the live table."""


def run(
    studies: Sequence[StudyRequest],
    context: events.RunContext,
    *,
    workers: int | None,
    confirms: bool,
    added: Callable[[], Sequence[StudyRequest]],
) -> list[display.Result]:
    """Run studies under a live view and print their results.

    Args:
        confirms: then run the confirmations that the studies' files ask for.
        added: returns studies that were added since it was last called.
    """
    keep_off_the_gpus()
    console = Console()

    def run_watched(studies: Sequence[StudyRequest]) -> list[display.Result]:
        with View(console) as view:
            watched = dataclasses.replace(context, notify=view.notify)
            results = scheduler.run_studies(studies, watched, workers=workers, added=added)
        for result in results:
            display.print_result(console, result)
        return results

    results = run_watched(studies)
    if len(results) > 1:
        display.print_overview(console, results)
    finished = [result for result in results if isinstance(result, StudySummary) and result.to_be_confirmed]
    if confirms and finished:
        results += run_watched([StudyRequest(result.spec, confirm=result.spec.confirm) for result in finished])
    return results


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Whether to stop: the first SIGINT, SIGTERM or hang-up asks for it; the second raises StopAtOnce."""
    requested = False
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def request_stop(number: int, frame: object) -> None:
        nonlocal requested
        if requested:
            raise StopAtOnce
        requested = True
        if number == signal.SIGHUP:  # the terminal is gone; writing to it would fail
            for descriptor in terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        # Not through rich: a handler may run in the middle of any of its calls, even of its import.
        os.write(sys.stderr.fileno(), "fintx: saving what runs, then stopping … (once more: stop at once)\n".encode())

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, request_stop) for number in signals}
    try:
        yield lambda: requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- the live view ----------------------------------------------------------------------------------------------------


@dataclass
class _Study:
    """What is shown of one study."""

    spec: StudySpec
    bar: TaskID
    finished_before: int
    to_beat: tuple[str, float] | None = None
    started: float = field(default_factory=time.monotonic)
    records: tuple[TrialRecord, ...] = ()

    @property
    def best(self) -> TrialRecord | None:
        return records.best_of(list(self.records), minimize=metrics.MINIMIZE[self.spec.study.metric])


@dataclass
class _Trial:
    """What is shown of one running trial."""

    name: str
    title: str
    """Name, attempt and shape."""
    bar: TaskID
    last_line: float
    """When it last printed a line, by the monotonic clock, in seconds."""


class View:
    """Shows the events of a run; use it as a context manager and pass `notify` to the scheduler."""

    def __init__(self, console: Console):
        self._console = console
        self._studies: dict[str, _Study] = {}
        self._trials: dict[tuple[str, int], _Trial] = {}
        self._progress = Progress(
            TextColumn("{task.description:<10}"), BarColumn(bar_width=min(40, console.width // 8)),
            MofNCompleteColumn(), TextColumn("{task.fields[text]}", table_column=Column(no_wrap=False)),
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

    def notify(self, event: events.Event) -> None:
        """Show an event of the scheduler."""
        match event:
            case events.StudyReady():
                self._open_study(event)
            case events.ConfirmReady():
                self._open_confirmation(event)
            case events.TrialStarted():
                self._start_trial(event)
            case events.EpochDone():
                self._show_epoch(event)
            case events.TrialEnded():
                name = self._close_trial(event.study, event.number, f"trial {event.number}")
                self._print(event.study, f"{name}: {event.text}", always=True)
            case events.TrialFinished():
                self._finish_trial(event)
            case events.RerunFinished():
                self._close_trial(event.study, event.number)
                self._progress.update(self._studies[event.study].bar, completed=event.done)
                self._print_outcome(event.study, event.name, event.record, f"{event.done}/{event.total} done")
            case events.Notice():
                self._print(event.study, event.text, always=True)

    def _print(self, study: str, line: str, *, always: bool = False) -> None:
        """A line where there is no live table; above the table too if it must not scroll away."""
        if always or not self._console.is_terminal:
            prefix = f"{study}: " if len(self._studies) > 1 else ""
            print_lines(self._console, f"{prefix}{line}")

    def _print_outcome(self, study: str, name: str, record: TrialRecord, progress: str, shape: str = "") -> None:
        scores = f"{record.metric} {number(record.value)}, skill {percent(record.best.get('skill'))}"
        self._print(study, f"{name} {record.outcome}: {scores}{shape}, {duration(record.wall_s)} · {progress}")

    def _open_study(self, event: events.StudyReady) -> None:
        bar = self._progress.add_task(event.study, total=event.total, completed=event.finished, text="")
        self._studies[event.study] = _Study(event.spec, bar, event.finished, event.to_beat)
        display.print_prepared(self._console, event.prepared)
        before = f", {event.finished} finished before" if event.finished else ""
        self._console.print(f"{event.n_shapes:,} feasible shapes, {event.total} trials{before}")
        if event.to_beat is not None:
            name, value = event.to_beat
            self._print(event.study, f"to beat: {name}, {event.spec.study.metric} {number(value)}", always=True)

    def _open_confirmation(self, event: events.ConfirmReady) -> None:
        total = len(event.trials) * event.n_seeds
        bar = self._progress.add_task(event.study, total=total, completed=event.finished, text="trained again")
        self._studies[event.study] = _Study(event.spec, bar, event.finished)
        numbers = ", ".join(map(str, event.trials))
        before = f", {event.finished} of {total} done before" if event.finished else ""
        self._print(
            event.study,
            f"confirmation of {event.study}: the best {len(event.trials)} of {event.searched} trials ({numbers}), "
            f"each trained again with the same {event.n_seeds} fresh seeds{before}",
            always=True,
        )

    def _start_trial(self, event: events.TrialStarted) -> None:
        attempt = f", attempt {event.attempt}" if event.attempt > 1 else ""
        name = event.name or f"trial {event.number}"
        note = f' "{event.note}"' if event.note else ""
        origin = attempt if event.name else f" ({event.source}{attempt}{note})"
        title = f"{name}{origin}: {shape_words(event.shape)}"
        epochs = self._studies[event.study].spec.train.max_epochs
        bar = self._progress.add_task("  epochs", total=epochs, text=f"{title}, compiling")
        self._trials[event.study, event.number] = _Trial(name, title, bar, time.monotonic())
        self._print(event.study, f"{title} …")

    def _show_epoch(self, event: events.EpochDone) -> None:
        trial, epoch = self._trials[event.study, event.number], event.epoch
        metric = self._studies[event.study].spec.study.metric
        fold = f", fold {event.fold + 1}/{event.n_folds}" if event.n_folds > 1 else ""
        seed = f", seed {event.replicate + 1}/{event.n_replicates}" if event.n_replicates > 1 else ""
        scores = f"{metric} {number(epoch.metrics.get(metric))}, best {number(epoch.best)}"
        text = f"{trial.title}{fold}{seed}: {scores}"
        self._progress.update(trial.bar, completed=epoch.epoch, total=epoch.max_epochs, text=text)
        if time.monotonic() - trial.last_line > _LINE_EVERY_S:
            trial.last_line = time.monotonic()
            line = f"  epoch {epoch.epoch}/{epoch.max_epochs} of {text}, {duration(epoch.seconds)}"
            self._print(event.study, line)

    def _close_trial(self, study: str, number: int, default: str = "") -> str:
        """Remove a trial's bar; returns its name, or the default if it never started."""
        trial = self._trials.pop((study, number), None)
        if trial is None:
            return default
        self._progress.remove_task(trial.bar)
        return trial.name

    def _finish_trial(self, event: events.TrialFinished) -> None:
        record, study = event.record, self._studies[event.study]
        self._close_trial(event.study, record.trial_number)
        study.records = event.records
        done, best = len(event.records), study.best
        mean_s = (time.monotonic() - study.started) / max(done - study.finished_before, 1)
        lead = f"best {number(best.value)} (trial {best.trial_number})" if best else "no success yet"
        to_beat = f", to beat {number(study.to_beat[1])} ({study.to_beat[0]})" if study.to_beat else ""
        text = f"{lead}{to_beat}, {duration(mean_s * max(event.total - done, 0))} to go"
        self._progress.update(study.bar, completed=done, total=event.total, text=text)
        shape = f", {shape_words(record.config.shape)}, {count(record.param_count)} parameters"
        name, progress = f"trial {record.trial_number}", f"{done}/{event.total} done, {text}"
        self._print_outcome(event.study, name, record, progress, shape)

    def _render(self) -> RenderableType:
        studies = [study for study in self._studies.values() if study.records]
        failed = Counter(r.outcome for study in studies for r in study.records if r.value is None)
        text = ", ".join(f"{n} {outcome}" for outcome, n in failed.items())
        tables = [rich_table(_newest_trials(study), elastic="shape") for study in studies]
        return Group(*tables, self._progress, *([f"failed: {text}"] if text else []))


def _newest_trials(study: _Study) -> Table:
    best, metric = study.best, study.spec.study.metric
    rows: list[tuple[object, ...]] = []
    if study.to_beat is not None:
        name, value = study.to_beat
        rows.append(("to beat", value, None, name, None, "", None))
    for record in study.records[-_N_NEWEST:]:
        rows.append(
            (f"{'★ ' if best is record else ''}{record.trial_number}", record.value, record.best.get("skill"),
             shape_words(record.config.shape), record.param_count, record.outcome, record.wall_s)
        )  # fmt: skip
    return Table(
        "newest", f"{study.spec.study.name}: newest trials",
        ["trial", (metric, "number"), ("skill", "percent"), "shape", ("parameters", "size"), "outcome",
         ("time", "seconds")],
        rows,
    )  # fmt: skip
