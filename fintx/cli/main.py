"""Which commands are there? Thin verbs: each reads its arguments, calls one function, prints what came of it.

Exit codes: 0 done; 1 a trial was left aside, `verify` found damage, or a bug of fintx; 2 something the user can mend;
75 stopped on request (EX_TEMPFAIL of sysexits.h: give the same command again to continue).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from typer.exceptions import TyperException

from fintx.errors import Bug, FintxError, as_fintx_error, without_passwords

if TYPE_CHECKING:
    from fintx.run.confirm import ConfirmationSummary
    from fintx.run.scheduler import StudyFailure
    from fintx.run.search import StudySummary
    from fintx.study.events import RunContext
    from fintx.study.lifecycle import StudyRequest

    Results = list[StudySummary | ConfirmationSummary | StudyFailure]

STOPPED = 75

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Does a bigger transformer predict markets better, and at a fixed parameter budget which shape wins?",
)
data_app = typer.Typer(no_args_is_help=True, help="Bring in and list price histories.")
app.add_typer(data_app, name="data")
queue_app = typer.Typer(no_args_is_help=True, help="Show and edit the queue of a sweep file, or of a manual file.")
app.add_typer(queue_app, name="queue")

Outputs = Annotated[Path, typer.Option("--outputs", help="Folder that holds one folder per study.")]
DataDir = Annotated[Path, typer.Option("--data-dir", help="Folder of ingested data.")]
Overrides = Annotated[list[str], typer.Option("--set", help="Change one setting: section.key=value (TOML).")]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        help="Processes that train, each on its share of GPUs or cores; left out: one, or what fills the GPUs.",
    ),
]
Storage = Annotated[
    str | None, typer.Option("--storage", help="postgresql://USER@HOST/DATABASE: share the studies between machines.")
]
OUTPUTS = Path("outputs")
DATA = Path("data")


class _StopAtOnce(BaseException):
    """The second request to stop. Not a KeyboardInterrupt, which typer takes for itself: exit code 130, and no word."""


def main() -> None:
    """The `fintx` command: user mistakes become one line and exit code 2, never a traceback."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop_early)
    try:
        sys.exit(app(prog_name="fintx", standalone_mode=False))
    except _StopAtOnce:
        _complain("stopped at once; nothing finished is lost, the same command continues")
        sys.exit(STOPPED)
    except TyperException as error:  # of arguments; without any, the help has been printed
        if said := error.format_message():
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "fintx"
            _complain(f"{said.rstrip('.')} (see {command} --help)")
        sys.exit(2)
    except Exception as error:
        sys.exit(_complain_of([as_fintx_error(error)]))


def _complain_of(problems: Sequence[FintxError]) -> int:
    """Print them; returns the exit code that they make."""
    for problem in problems:
        _complain(str(problem))
    return 1 if any(isinstance(problem, Bug) for problem in problems) else 2


def _stop_early(number: int, frame: object) -> None:
    """Before a run has its own way to stop: nothing is under way that could be lost, imports at most."""
    os.write(2, b"fintx: stopped before anything ran; give the same command again to continue\n")
    os._exit(STOPPED)


def _complain(text: str) -> None:
    try:
        Console(stderr=True).print(
            f"fintx: {without_passwords(text)}", style="red", highlight=False, markup=False, soft_wrap=True
        )
    except OSError:  # a log on the full disk that is complained of: the exit code still has to say it
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)


@app.command()
def sweep(
    files: Annotated[list[Path], typer.Argument(help="Sweep files.")],
    overrides: Overrides = [],  # noqa: B006  (typer reads the default, nobody changes it)
    outputs: Outputs = OUTPUTS,
    data_dir: DataDir = DATA,
    workers: Workers = None,
    storage: Storage = None,
    fork: Annotated[
        str | None,
        typer.Option(
            "--fork", help="Run as a new study of this name, with the trials of the old that are still valid."
        ),
    ] = None,
) -> None:
    """Run studies; the same command again continues them. Several go side by side where there are workers for it.

    A study whose file has a section [confirm] is confirmed at its end.
    """
    from fintx.config import load

    overrides = _with_storage(overrides, storage)
    for file in files:  # a mistake is told before JAX is loaded
        load.study(file, overrides=overrides, counted=False)

    from fintx.run import requests
    from fintx.study.events import RunContext

    made = [requests.of_sweep(file, overrides) for file in files]
    if fork is not None:
        if len(files) > 1:
            raise FintxError("--fork: takes one sweep file; fork them one by one")
        made = [requests.of_fork(made[0], fork, outputs=outputs)]
    _run(made, RunContext(outputs, data_dir), workers=workers, confirms=True)


@app.command()
def manual(
    file: Annotated[Path, typer.Argument(help="A file of hand-picked trials.")] = Path("sweeps/manual.toml"),
    overrides: Overrides = [],  # noqa: B006
    outputs: Outputs = OUTPUTS,
    data_dir: DataDir = DATA,
    workers: Workers = None,
    storage: Storage = None,
) -> None:
    """Run what is not done yet of a file of hand-picked trials, each inside its study."""
    from fintx.config import load

    overrides = _with_storage(overrides, storage)
    load.manual(file, overrides=overrides)  # a mistake is told before JAX is loaded

    from fintx.run import requests
    from fintx.study.events import RunContext

    made = requests.of_manual(file, overrides)
    also = requests.added(file, overrides, made)
    _run(made, RunContext(outputs, data_dir), workers=workers, also=also)


def _with_storage(overrides: list[str], storage: str | None) -> list[str]:
    return overrides if storage is None else [*overrides, f"execution.storage={json.dumps(storage)}"]


@app.command()
def confirm(
    study: Annotated[str, typer.Argument(help="A study's name, or its folder.")],
    top_k: Annotated[int | None, typer.Option(min=1, help="How many of the best trials are trained again.")] = None,
    n_seeds: Annotated[int | None, typer.Option(min=2, help="Fresh seeds, the same for each of them.")] = None,
    outputs: Outputs = OUTPUTS,
    data_dir: DataDir = DATA,
    workers: Workers = None,
) -> None:
    """Train a study's best trials again with fresh seeds, and say what of the result holds; continues where it was."""
    from fintx.config.schema import ConfirmConfig
    from fintx.study import study_file
    from fintx.study.events import RunContext
    from fintx.study.lifecycle import StudyRequest

    folder = study_file.find_study(study, outputs=outputs)
    known = study_file.read_study(folder)
    assert known is not None
    asked = {key: value for key, value in (("top_k", top_k), ("n_seeds", n_seeds)) if value is not None}
    wanted = (known.spec.confirm or ConfirmConfig()).model_copy(update=asked)
    # A folder that was renamed or copied is the study that lies in it.
    named = known.spec.study.model_copy(update={"name": folder.resolve().name})
    orders = [StudyRequest(known.spec.model_copy(update={"study": named}), confirm=wanted)]
    _run(orders, RunContext(folder.resolve().parent, data_dir), workers=workers)


def _run(
    orders: list[StudyRequest],
    context: RunContext,
    *,
    workers: int | None,
    confirms: bool = False,
    also: Callable[[], Sequence[StudyRequest]] = tuple,
) -> None:
    """Run under a live view, print what came of it, and exit with the code that says so.

    Args:
        confirms: studies that ask for it are confirmed at their end.
        also: gives the studies that are asked for while those run.
    """
    from fintx.run.workers import dismiss_group, follow_group
    from fintx.train import multihost

    place = multihost.find_place() if all(order.spec.mesh.hosts for order in orders) else None
    if place is None:
        return _conduct(orders, functools.partial(_run_all, context, workers, also), confirms=confirms)
    if workers is not None and workers > 1:
        raise FintxError(f"--workers {workers}: {place} trains each trial with all others; leave it out")
    with _stop_on_signal() as should_stop:
        if place.index > 0:
            return follow_group(place, should_stop=should_stop)
    try:
        together = dataclasses.replace(context, hosts=True)
        _conduct(orders, functools.partial(_run_all, together, 1, also), confirms=confirms)
    finally:
        dismiss_group(place)


def _conduct(
    orders: list[StudyRequest], run_all: Callable[[Console, list[StudyRequest]], Results], *, confirms: bool
) -> None:
    from fintx.cli import display
    from fintx.run import scheduler
    from fintx.run.confirm import ConfirmationSummary
    from fintx.run.workers import keep_off_the_gpus
    from fintx.study.lifecycle import StudyRequest

    keep_off_the_gpus()
    console = Console()
    results = run_all(console, orders)
    if len(results) > 1:
        display.print_results(console, [each for each in results if not isinstance(each, ConfirmationSummary)])
    if confirms:
        finished = [each for each in results if isinstance(each, scheduler.StudySummary) and each.to_be_confirmed]
        after = [StudyRequest(each.spec, confirm=each.spec.confirm) for each in finished]
        if after:
            results += run_all(console, after)
    if problems := [result.problem for result in results if result.problem is not None]:
        raise typer.Exit(_complain_of(problems))
    ended = [result for result in results if not isinstance(result, scheduler.StudyFailure)]
    if any(result.interrupted for result in ended):
        console.print("stopped on request; give the same command again to continue", soft_wrap=True)
        raise typer.Exit(STOPPED)
    if any(result.left_aside for result in ended):
        raise typer.Exit(1)


def _run_all(
    context: RunContext,
    workers: int | None,
    also: Callable[[], Sequence[StudyRequest]],
    console: Console,
    orders: list[StudyRequest],
) -> Results:
    from fintx.cli import display, live
    from fintx.run import scheduler
    from fintx.run.confirm import ConfirmationSummary

    with _stop_on_signal() as should_stop, live.View(console) as view:
        watched = dataclasses.replace(context, notify=view.notify, should_stop=should_stop)
        results = scheduler.run_studies(orders, watched, workers=workers, also=also)
    for result in results:
        if isinstance(result, scheduler.StudySummary):
            if result.records or result.problem is None:
                display.print_summary(console, result)
            display.print_unfinished(console, result)
        elif isinstance(result, ConfirmationSummary):
            display.print_confirmed(console, result)
    return results


@app.command()
def stop(
    study: Annotated[str, typer.Argument(help="A study's name, or its folder.")],
    outputs: Outputs = OUTPUTS,
) -> None:
    """Ask a running study to stop as soon as the trials that run now are finished."""
    from fintx.study import locks

    print(locks.ask_to_stop(study, outputs=outputs))


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """First SIGINT, SIGTERM or hang-up: finish the step, save and stop; the second: stop at once."""
    asked = False
    on_terminal = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise _StopAtOnce
        asked = True
        if number == signal.SIGHUP:  # the terminal is gone, and whatever is written to it fails
            for descriptor in on_terminal:
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        # Not through rich: a handler may run in the middle of any of its calls, even of its import.
        os.write(sys.stderr.fileno(), "fintx: saving what runs, then stopping … (once more: stop at once)\n".encode())

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@app.command()
def plan(
    file: Annotated[Path, typer.Argument(help="A sweep file.")],
    overrides: Overrides = [],  # noqa: B006
    data_dir: DataDir = DATA,
    devices: Annotated[int | None, typer.Option("--devices", min=1, help="Plan for so many devices.")] = None,
    device_memory: Annotated[
        str | None, typer.Option("--device-memory", help='Plan for GPUs of so much memory, such as "141GB".')
    ] = None,
) -> None:
    """Print what a sweep file would run; run and write nothing."""
    from fintx.config import load

    spec = load.study(file, overrides=overrides)  # a mistake is told before JAX is loaded

    from fintx.cli import display
    from fintx.study import plan as planning

    machine = planning.machine(devices, device_memory)
    display.print_plan(
        Console(),
        planning.plan_study(spec, data_root=data_dir, on=machine, where=load.where(file, overrides=overrides)),
    )


@app.command()
def status(outputs: Outputs = OUTPUTS) -> None:
    """Say how far every study is, and its best trial."""
    from fintx.analysis import status as statuses
    from fintx.cli import display
    from fintx.study import study_file

    folders = study_file.study_folders(outputs)
    if not folders:
        raise FintxError(f"{outputs}: holds no study yet; run one: just sweep sweeps/demo.toml")
    found, damage = [], []
    for folder in folders:
        try:
            found.append(statuses.read(folder))
        except FintxError as error:  # one study's damage hides no other study
            damage.append(str(error))
    display.print_status(Console(), found)
    if damage:
        raise FintxError("\n".join(damage))


@app.command(name="eval")
def evaluate(
    path: Annotated[Path, typer.Argument(help="A study's folder (its best trial), a trial's, or a checkpoint's.")],
    test: Annotated[
        bool, typer.Option("--test", help="Open the sealed test part for what is confirmed; the opening is logged.")
    ] = False,
    unconfirmed: Annotated[
        bool, typer.Option("--unconfirmed", help="With --test: open it without a confirmation, luck and all.")
    ] = False,
    data: Annotated[Path | None, typer.Option("--data", help="Bars of another asset or later days.")] = None,
    symbol: Annotated[str | None, typer.Option("--symbol", help="With --data: the asset that the file holds.")] = None,
    data_dir: DataDir = DATA,
) -> None:
    """Restore a checkpoint and report all its metrics; with --test, those of a study's confirmed models."""
    from fintx.analysis import evaluation, test_set
    from fintx.cli import display

    if test and data is not None:
        raise FintxError("--test and --data exclude each other: the test part belongs to the study's own data")
    if unconfirmed and not test:
        raise FintxError("--unconfirmed goes with --test: nothing else asks for a confirmation")
    if test:
        opening = test_set.open_test(path, data_root=data_dir, unconfirmed=unconfirmed)
        display.print_opening(Console(), opening)
        return
    if data is not None:
        result = evaluation.on_file(path, data, symbol=symbol, data_root=data_dir)
    else:
        result = evaluation.on_validation(path, data_root=data_dir)
    display.print_evaluation(Console(), result)


Studies = Annotated[list[str], typer.Argument(help="Names or folders of studies, or patterns in quotes.")]


@app.command()
def report(
    studies: Studies,
    backtest: Annotated[
        bool,
        typer.Option("--backtest", help="Add a simple backtest on the validation days, its assumptions beside it."),
    ] = False,
    cost_bp: Annotated[float, typer.Option("--cost-bp", help="Of the backtest: basis points per side.", min=0)] = 5.0,
    outputs: Outputs = OUTPUTS,
    data_dir: DataDir = DATA,
) -> None:
    """Write a study's report, as far as the study is: one HTML page, its figures and tables beside it."""
    from fintx.analysis import study_analysis, study_results
    from fintx.evaluate.backtest import TradingRules
    from fintx.report import study_page

    rules = TradingRules(cost_bp=cost_bp) if backtest else None
    for folder in study_results.find_studies(studies, outputs=outputs):
        print(study_page.write(study_analysis.read(folder, data_root=data_dir, rules=rules)))


@app.command()
def compare(studies: Studies, outputs: Outputs = OUTPUTS) -> None:
    """Set studies side by side: skill, the same shapes, winners trained elsewhere, rank correlation."""
    from fintx.analysis import comparison, study_results
    from fintx.cli import display
    from fintx.report import comparison_page as page

    compared = comparison.read(study_results.find_studies(studies, outputs=outputs))
    after = [f"To fill an empty cell: {command}" for command in page.missing(compared)]
    display.print_tables(Console(), [page.sentence(compared), *compared.notes], page.tables(compared), after)
    print(page.write(compared, outputs=outputs))


@app.command()
def scaling(
    studies: Studies,
    over: Annotated[str, typer.Option(help="parameters; or data, for panels of several sizes.")] = "parameters",
    difference: Annotated[
        float, typer.Option(help="The smallest gain worth the name, as a share of the best baseline's loss.")
    ] = 0.01,
    outputs: Outputs = OUTPUTS,
) -> None:
    """Does loss fall with size? Fits over studies that differ in nothing else, and a plain sentence."""
    from fintx.analysis import scaling_laws, study_results
    from fintx.cli import display
    from fintx.report import scaling_page as page

    laws = scaling_laws.read(study_results.find_studies(studies, outputs=outputs), over=over, difference=difference)
    display.print_tables(Console(), [page.sentence(laws), *laws.trials.notes], page.tables(laws))
    print(page.write(laws, outputs=outputs))


@app.command()
def verify(data_dir: DataDir = DATA) -> None:
    """Check every ingested and processed file against its manifest."""
    from fintx.data import snapshots

    problems = snapshots.verify(data_dir)
    for problem in problems:
        print(problem)
    if problems:
        raise typer.Exit(1)
    print(f"{data_dir}: every file is there and unchanged")


@app.command()
def params(
    d_model: Annotated[int | None, typer.Option(help="Width.")] = None,
    n_layers: Annotated[int | None, typer.Option(help="Depth.")] = None,
    n_heads: Annotated[int | None, typer.Option(help="Attention heads; must divide d_model.")] = None,
    d_ff: Annotated[int | None, typer.Option(help="Feed-forward width.")] = None,
    budget: Annotated[str | None, typer.Option(help='Parameter budget, such as "200M".')] = None,
    tolerance: Annotated[float, typer.Option(help="Two-sided, as a fraction.")] = 0.25,
    n_features: Annotated[int, typer.Option(help="Input features per bar.")] = 25,
    context_length: Annotated[int, typer.Option(help="Bars in a window.")] = 60,
    patch_length: Annotated[int, typer.Option(help="Bars in a patch.")] = 10,
    stride: Annotated[int, typer.Option(help="Bars between patches.")] = 5,
) -> None:
    """Count the parameters of a shape, or list the shapes that fit a budget."""
    from fintx.cli import display
    from fintx.study import plan as planning

    question = planning.shape_or_depths(
        d_model=d_model, n_layers=n_layers, n_heads=n_heads, d_ff=d_ff, budget=budget, tolerance=tolerance,
        n_features=n_features, context_length=context_length, patch_length=patch_length, stride=stride,
    )  # fmt: skip
    display.print_params(Console(), question)


QueueFile = Annotated[Path, typer.Argument(help="A sweep file, or a manual file.")]


@queue_app.command(name="list")
def list_queue(file: QueueFile, outputs: Outputs = OUTPUTS, data_dir: DataDir = DATA) -> None:
    """List every entry with its state, trial, exact size, training values and note."""
    from fintx.cli import display
    from fintx.study import queue_file

    display.print_queue(Console(), queue_file.listings(file, outputs=outputs, data_root=data_dir))


@queue_app.command(name="add")
def add_to_queue(
    file: QueueFile,
    d_model: Annotated[int, typer.Option(help="Width.")],
    n_layers: Annotated[int, typer.Option(help="Depth.")],
    n_heads: Annotated[int, typer.Option(help="Attention heads; must divide d_model.")],
    d_ff: Annotated[int, typer.Option(help="Feed-forward width.")],
    note: Annotated[str | None, typer.Option(help="Why it is tried; kept in the record.")] = None,
    name: Annotated[str | None, typer.Option("--id", help="A name as its identity, instead of its content.")] = None,
    training: Annotated[str | None, typer.Option(help="Values left open: best (default), defaults or sampler.")] = None,
    values: Annotated[list[str], typer.Option("--value", help="Fix a searched value: optim.learning_rate=3e-4.")] = [],  # noqa: B006
    sweep: Annotated[str | None, typer.Option(help="Of a manual file: the sweep file that it belongs to.")] = None,
    data_dir: DataDir = DATA,
) -> None:
    """Add an entry at the file's end, if the file is right with it; a study that runs takes it up."""
    from fintx.cli import display
    from fintx.study import queue_file

    shape = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "d_ff": d_ff}
    words = {"sweep": sweep, "id": name, "training": training, "note": note}
    given = {key: text for key, text in words.items() if text is not None}
    edit = queue_file.add(file, {**shape, **given, **dict(map(queue_file.value_of, values))}, data_root=data_dir)
    display.print_edit(Console(), edit, "added")


@queue_app.command(name="cancel")
def cancel_in_queue(
    file: QueueFile,
    identity: Annotated[str, typer.Argument(metavar="ID", help="As `queue list` shows it.")],
    sweep: Annotated[str | None, typer.Option(help="Of a manual file: the sweep file that it belongs to.")] = None,
    outputs: Outputs = OUTPUTS,
    data_dir: DataDir = DATA,
) -> None:
    """Mark an entry as never to be run; one that runs or is done can't be cancelled."""
    from fintx.cli import display
    from fintx.study import queue_file

    edit = queue_file.cancel(file, identity, sweep=sweep, outputs=outputs, data_root=data_dir)
    display.print_edit(Console(), edit, "cancelled")


@data_app.command(name="import")
def import_file(
    file: Annotated[
        Path, typer.Argument(help="CSV or Parquet with Date, Open, High, Low, Close[, Adj Close, Volume].")
    ],
    symbol: Annotated[str, typer.Option(help="Name for sweep files, such as SPY.")],
    repair: Annotated[bool, typer.Option("--repair", help="Mend what can be mended; the manifest says what.")] = False,
    calendar: Annotated[str | None, typer.Option(help="With --repair: symbol whose trading days to keep.")] = None,
    data_dir: DataDir = DATA,
) -> None:
    """Check a file of daily bars and keep an immutable snapshot of it."""
    from fintx.cli import display
    from fintx.data import sources

    today = datetime.date.today()
    days = None if calendar is None else sources.load(calendar, root=data_dir).dates
    display.print_ingest(
        Console(), sources.import_file(file, symbol, root=data_dir, repair=repair, calendar=days, today=today)
    )


@data_app.command(name="yahoo")
def yahoo(
    symbols: Annotated[list[str], typer.Argument(help="Yahoo symbols, such as SPY ^VIX.")],
    start: Annotated[str | None, typer.Option(help="First date, YYYY-MM-DD.")] = None,
    data_dir: DataDir = DATA,
) -> None:
    """Download daily bars from Yahoo and keep immutable snapshots of them."""
    from fintx.cli import display
    from fintx.data import sources

    console = Console()
    for symbol in symbols:
        entry = sources.import_yahoo(
            symbol, root=data_dir, start=start, today=datetime.date.today(), progress=console.print
        )
        display.print_ingest(console, entry)


@data_app.command(name="list")
def list_data(data_dir: DataDir = DATA) -> None:
    """List what is ingested."""
    from fintx.cli import display
    from fintx.data import snapshots

    display.print_data(
        Console(), snapshots.all_snapshots(data_dir, "raw"), snapshots.all_snapshots(data_dir, "processed")
    )


if __name__ == "__main__":
    main()
