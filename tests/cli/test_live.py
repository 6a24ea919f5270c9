"""What a running study shows: what has to be beaten, and how far it is."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from fintx.cli.live import View
from fintx.config import load
from fintx.run import scheduler
from fintx.study.events import EpochDone, Event, RunContext, StudyReady, TrialFinished
from fintx.study.lifecycle import StudyRequest

ENTRY = (
    '\n[[queue]]\nd_model = 8\nn_layers = 2\nn_heads = 1\nd_ff = 16\nid = "by-hand"\n"optim.learning_rate" = 0.0017\n'
)


@pytest.fixture(scope="module")
def outputs(tiny_study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished study's."""
    root = tmp_path_factory.mktemp("live")
    shutil.copytree(tiny_study, root / "outputs" / "tiny")
    shutil.copytree(tiny_study.parents[1] / "data", root / "data")
    return root / "outputs"


@pytest.fixture(scope="module")
def events(tiny_file: Path, outputs: Path) -> list[Event]:
    """Of a run by hand of one trial, beyond the study's three."""
    file = outputs.parent / "tiny.toml"
    file.write_text(tiny_file.read_text() + ENTRY)
    reported: list[Event] = []
    request = StudyRequest(load.study(file), queue_only=True)
    scheduler.run_studies([request], RunContext(outputs, outputs.parent / "data", notify=reported.append))
    return reported


@pytest.fixture
def best_baseline(outputs: Path) -> tuple[str, str]:
    """Name and rounded score, from what the study keeps."""
    kept = json.loads((outputs / "tiny" / "baselines.json").read_text())
    scores = {name: each["metrics"]["log_loss"] for name, each in kept.items()}
    name = min(scores, key=scores.__getitem__)
    return name, f"{scores[name]:.4f}"


def shown(events: list[Event], *, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=140, color_system=None)
    with View(console) as view:
        for event in events:
            view.notify(event)
        if terminal:
            console.print(view._render())
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_what_has_to_be_beaten_stands_beside_the_best(events, best_baseline, terminal):
    name, score = best_baseline
    output = shown(events, terminal=terminal)
    assert f"to beat: {name}, log_loss {score}" in output
    if terminal:
        row = next(line for line in output.splitlines() if line.startswith("to beat "))
        assert score in row and name in row
    else:
        assert f"to beat {score} ({name})" in output


def test_a_run_by_hand_counts_to_its_own_end(events):
    (ready,) = [event for event in events if isinstance(event, StudyReady)]
    (ended,) = [event for event in events if isinstance(event, TrialFinished)]
    assert (ready.finished, ready.total, ended.total, ended.record.entry) == (3, 4, 4, "by-hand")
    output = shown(events, terminal=False)
    assert "4 trials, 3 finished before" in output and "4/4 done" in output


def test_a_narrow_terminal_keeps_the_scores(events, best_baseline):
    """The column of shapes gives way, and a running trial's scores wrap."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    view, views = View(console), []
    for event in events:
        view.notify(event)
        with console.capture() as capture:
            console.print(view._render())
        views.append(capture.get())
    best = min(record.value for event in events if isinstance(event, TrialFinished) for record in event.records)
    rows = [line for line in views[-1].splitlines() if line.startswith(("to beat ", "★ "))]
    assert best_baseline[1] in rows[0] and f"{best:.4f}" in rows[1]
    assert f"to beat {best_baseline[1]}" in " ".join(views[-1].split())
    assert max(len(line) for text in views for line in text.splitlines()) <= 80
    (last,) = [i for i, event in enumerate(events) if isinstance(event, EpochDone)][-1:]
    assert f"best {events[last].epoch.best:.4f}" in " ".join(views[last].split())
