"""The `fintx` command: thin verbs. Each reads its arguments, calls one function and prints the result.

Exit codes: 0 done; 1 a trial was given up, `verify` found damage, or a bug in fintx; 2 something you can fix;
75 stopped on request (EX_TEMPFAIL of sysexits.h: give the same command again to continue).

Verbs import what they call only when they run: a mistyped option or sweep file is reported before JAX is loaded.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from typer.exceptions import TyperException

from fintx.errors import Bug, FintxError, StopAtOnce, as_fintx_error, without_passwords

if TYPE_CHECKING:
    from fintx.study.lifecycle import StudyRequest

STOPPED = 75

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Does a bigger transformer predict markets better, and at a fixed parameter budget which shape wins?",
)
data_app = typer.Typer(no_args_is_help=True, help="Import and list price histories.")
app.add_typer(data_app, name="data")
queue_app = typer.Typer(no_args_is_help=True, help="Show and edit the queue of a sweep file or a manual file.")
app.add_typer(queue_app, name="queue")

Study = Annotated[str, typer.Argument(help="A study's name or folder.")]
Studies = Annotated[list[str], typer.Argument(help="Names or folders of studies, or quoted patterns.")]
QueueFile = Annotated[Path, typer.Argument(help="A sweep file or a manual file.")]
Outputs = Annotated[Path, typer.Option(help="Folder that holds one folder per study.")]
DataDir = Annotated[Path, typer.Option(help="Folder of imported data.")]
Overrides = Annotated[list[str], typer.Option("--set", help="Change one setting: section.key=value (TOML).")]
Workers = Annotated[int | None, typer.Option(min=1, help="Training processes. Default: 1, or enough to fill the GPUs.")]
StorageUrl = Annotated[str | None, typer.Option(help="Database that machines share: postgresql://USER@HOST/NAME.")]
ManualSweep = Annotated[str | None, typer.Option(help="In a manual file: the sweep file the entry belongs to.")]
WIDTH = typer.Option(help="Width of the model.")
DEPTH = typer.Option(help="Number of layers.")
HEADS = typer.Option(help="Attention heads; must divide d_model.")
FEED_FORWARD = typer.Option(help="Width of the feed-forward layers.")
OUTPUTS = Path("outputs")
DATA = Path("data")


def main() -> None:
    """The `fintx` command: user mistakes become one line and exit code 2, never a traceback."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop_early)
    try:
        sys.exit(app(prog_name="fintx", standalone_mode=False))
    except StopAtOnce:
        _complain("stopped at once; finished work is kept, the same command continues")
        sys.exit(STOPPED)
    except TyperException as error:  # wrong arguments; the message is empty where the help has been printed
        if message := error.format_message():
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "fintx"
            _complain(f"{message.rstrip('.')} (see {command} --help)")
        sys.exit(2)
    except Exception as error:
        sys.exit(_print_problems([as_fintx_error(error)]))


def _print_problems(problems: Sequence[FintxError]) -> int:
    """Print them to stderr; returns the exit code."""
    for problem in problems:
        _complain(str(problem))
    return 1 if any(isinstance(problem, Bug) for problem in problems) else 2


def _complain(message: str) -> None:
    line = f"fintx: {without_passwords(message)}"
    try:
        Console(stderr=True).print(line, style="red", highlight=False, markup=False, soft_wrap=True)
    except OSError:  # the log itself may lie on the full disk; the exit code still has to get out
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(null, stream)


def _stop_early(number: int, frame: object) -> None:
    """Before a run handles signals itself: nothing can be lost yet."""
    os.write(2, b"fintx: stopped before anything ran; give the same command again to continue\n")
    os._exit(STOPPED)


# --- running ----------------------------------------------------------------------------------------------------------


@app.command()
def sweep(
    files: Annotated[list[Path], typer.Argument(help="Sweep files.")],
    overrides: Overrides = [],  # noqa: B006  (typer reads the default, nobody changes it)
    outputs: Outputs = OUTPUTS,
    data_dir: DataDir = DATA,
    workers: Workers = None,
    storage: StorageUrl = None,
    fork: Annotated[str | None, typer.Option(help="A new study of this name, with the trials still valid.")] = None,
) -> None:
    """Run studies; give the same command again to continue them.

    Several files run side by side if there are enough workers. A study whose
    file has a confirm section is confirmed at the end.
    """
    from fintx.config import load

    overrides = _with_storage(overrides, storage)
    for file in files:  # reports a mistake before JAX is loaded
        load.study(file, overrides=overrides, counted=False)

    from fintx.run import requests

    studies = [requests.of_sweep(file, overrides) for file in files]
    if fork is not None:
        if len(files) > 1:
            raise FintxError("--fork: takes one sweep file; fork them one by one")
        studies = [requests.of_fork(studies[0], fork, outputs=outputs)]
    _run(studies, outputs, data_dir, workers=workers, confirms=True)


@app.command()
def manual(
    file: Annotated[Path, typer.Argument(help="A file of hand-picked trials.")] = Path("sweeps/manual.toml"),
    overrides: Overrides = [],  # noqa: B006
    outputs: Outputs = OUTPUTS,
    data_dir: DataDir = DATA,
    workers: Workers = None,
    storage: StorageUrl = None,
) -> None:
    """Run the hand-picked trials of a file that are not done yet, each inside its study."""
    from fintx.config import load

    overrides = _with_storage(overrides, storage)
    load.manual(file, overrides=overrides)  # reports a mistake before JAX is loaded

    from fintx.run import requests

    studies = requests.of_manual(file, overrides)
    added = requests.added(file, overrides, studies)
    _run(studies, outputs, data_dir, workers=workers, added=added)


def _with_storage(overrides: list[str], storage: str | None) -> list[str]:
    return overrides if storage is None else [*overrides, f"execution.storage={json.dumps(storage)}"]


@app.command()
def confirm(
    study: Study,
    top_k: Annotated[int | None, typer.Option(min=1, help="How many of the best trials to train again.")] = None,
    n_seeds: Annotated[int | None, typer.Option(min=2, help="How many fresh seeds, the same for each trial.")] = None,
    outputs: Outputs = OUTPUTS,
    data_dir: DataDir = DATA,
    workers: Workers = None,
) -> None:
    """Train a study's best trials again with fresh seeds and say which results hold.

    Give the same command again to continue.
    """
    from fintx.run import requests

    changes = {key: value for key, value in (("top_k", top_k), ("n_seeds", n_seeds)) if value is not None}
    folder, request = requests.of_confirmation(study, changes, outputs=outputs)
    _run([request], folder.parent, data_dir, workers=workers)


def _run(
    studies: list[StudyRequest],
    outputs: Path,
    data_dir: Path,
    *,
    workers: int | None,
    confirms: bool = False,
    added: Callable[[], Sequence[StudyRequest]] = tuple,
) -> None:
    """Run studies, alone or as one process of a launcher's many; exits with the code that says how they ended.

    Args:
        confirms: also run the confirmations that the studies' files ask for.
        added: returns studies that were added since it was last called.
    """
    from fintx.cli import live
    from fintx.run import scheduler
    from fintx.run.workers import dismiss_group, follow_group
    from fintx.study.events import RunContext
    from fintx.train import multihost

    place = multihost.find_place() if all(study.spec.mesh.hosts for study in studies) else None
    if place is not None and workers is not None and workers > 1:
        raise FintxError(f"--workers {workers}: {place} trains each trial with all others; leave it out")
    with live.stop_on_signal() as should_stop:
        if place is not None and place.index > 0:
            return follow_group(place, should_stop=should_stop)
        context = RunContext(outputs, data_dir, should_stop=should_stop, hosts=place is not None)
        workers = workers if place is None else 1
        try:
            results = live.run(studies, context, workers=workers, confirms=confirms, added=added)
        finally:
            if place is not None:
                dismiss_group(place)
    if problems := [result.problem for result in results if result.problem is not None]:
        raise typer.Exit(_print_problems(problems))
    ended = [result for result in results if not isinstance(result, scheduler.StudyFailure)]
    if any(result.interrupted for result in ended):
        print("stopped on request; give the same command again to continue")
        raise typer.Exit(STOPPED)
    if any(result.given_up for result in ended):
        raise typer.Exit(1)


@app.command()
def stop(study: Study, outputs: Outputs = OUTPUTS) -> None:
    """Ask a running study to stop once the trials that run now are finished."""
    from fintx.study import locks

    print(locks.ask_to_stop(study, outputs=outputs))


# --- before and during a run ------------------------------------------------------------------------------------------


@app.command()
def plan(
    file: Annotated[Path, typer.Argument(help="A sweep file.")],
    overrides: Overrides = [],  # noqa: B006
    data_dir: DataDir = DATA,
    devices: Annotated[int | None, typer.Option(min=1, help="Plan for this many devices.")] = None,
    device_memory: Annotated[str | None, typer.Option(help='Plan for GPUs of this memory, such as "141GB".')] = None,
) -> None:
    """Print what a sweep file would run; run and write nothing."""
    from fintx.config import load

    spec = load.study(file, overrides=overrides)  # reports a mistake before JAX is loaded

    from fintx.cli import display
    from fintx.study import plan as planning

    machine, where = planning.machine(devices, device_memory), load.where(file, overrides=overrides)
    display.print_plan(Console(), planning.plan_study(spec, data_root=data_dir, on=machine, where=where))


@app.command()
def params(
    d_model: Annotated[int | None, WIDTH] = None,
    n_layers: Annotated[int | None, DEPTH] = None,
    n_heads: Annotated[int | None, HEADS] = None,
    d_ff: Annotated[int | None, FEED_FORWARD] = None,
    budget: Annotated[str | None, typer.Option(help='Parameter budget, such as "200M".')] = None,
    tolerance: Annotated[float, typer.Option(help="Allowed distance from the budget, as a fraction.")] = 0.25,
    n_features: Annotated[int, typer.Option(help="Input features per bar.")] = 25,
    context_length: Annotated[int, typer.Option(help="Bars in a window.")] = 60,
    patch_length: Annotated[int, typer.Option(help="Bars in a patch.")] = 10,
    stride: Annotated[int, typer.Option(help="Bars from one patch to the next.")] = 5,
) -> None:
    """Count the parameters of a shape, or list the shapes that fit a budget."""
    from fintx.cli import display
    from fintx.study import plan as planning

    question = planning.shape_or_depths(
        d_model=d_model, n_layers=n_layers, n_heads=n_heads, d_ff=d_ff, budget=budget, tolerance=tolerance,
        n_features=n_features, context_length=context_length, patch_length=patch_length, stride=stride,
    )  # fmt: skip
    display.print_params(Console(), question)


@app.command()
def status(outputs: Outputs = OUTPUTS) -> None:
    """Show how far each study is, and its best trial."""
    from fintx.analysis import status as analysis
    from fintx.cli import display
    from fintx.study import study_file

    folders = study_file.study_folders(outputs)
    if not folders:
        raise FintxError(f"{outputs}: holds no study yet; run one: just sweep sweeps/demo.toml")
    statuses, damage = [], []
    for folder in folders:
        try:
            statuses.append(analysis.read(folder))
        except FintxError as error:  # one damaged study hides no other
            damage.append(str(error))
    display.print_status(Console(), statuses)
    if damage:
        raise FintxError("\n".join(damage))


@queue_app.command(name="list")
def list_queue(file: QueueFile, outputs: Outputs = OUTPUTS, data_dir: DataDir = DATA) -> None:
    """List every entry with its state, trial, parameter count, training values and note."""
    from fintx.cli import display
    from fintx.study import queue_file

    display.print_queue(Console(), queue_file.listings(file, outputs=outputs, data_root=data_dir))


@queue_app.command(name="add")
def add_to_queue(
    file: QueueFile,
    d_model: Annotated[int, WIDTH],
    n_layers: Annotated[int, DEPTH],
    n_heads: Annotated[int, HEADS],
    d_ff: Annotated[int, FEED_FORWARD],
    note: Annotated[str | None, typer.Option(help="Why it is tried; kept in the record.")] = None,
    name: Annotated[str | None, typer.Option("--id", help="A name that identifies it. Default: its content.")] = None,
    training: Annotated[str | None, typer.Option(help="Values left open: best (default), defaults or sampler.")] = None,
    values: Annotated[list[str], typer.Option("--value", help="Fix a searched value: optim.learning_rate=3e-4.")] = [],  # noqa: B006
    sweep: ManualSweep = None,
    data_dir: DataDir = DATA,
) -> None:
    """Add an entry at the end of the file, if the file stays valid; a running study picks it up."""
    from fintx.cli import display
    from fintx.study import queue_file

    entry = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "d_ff": d_ff,
             "sweep": sweep, "id": name, "training": training, "note": note}  # fmt: skip
    fields = {key: value for key, value in entry.items() if value is not None}
    edit = queue_file.add(file, fields | dict(map(queue_file.value_of, values)), data_root=data_dir)
    display.print_edit(Console(), edit, "added")


@queue_app.command(name="cancel")
def cancel_in_queue(
    file: QueueFile,
    identity: Annotated[str, typer.Argument(metavar="ID", help="As `queue list` shows it.")],
    sweep: ManualSweep = None,
    outputs: Outputs = OUTPUTS,
    data_dir: DataDir = DATA,
) -> None:
    """Mark an entry as never to be run; one that is running or done can't be cancelled."""
    from fintx.cli import display
    from fintx.study import queue_file

    edit = queue_file.cancel(file, identity, sweep=sweep, outputs=outputs, data_root=data_dir)
    display.print_edit(Console(), edit, "cancelled")


# --- results ----------------------------------------------------------------------------------------------------------


@app.command(name="eval")
def evaluate(
    path: Annotated[Path, typer.Argument(help="Folder of a study (its best trial), a trial or a checkpoint.")],
    test: Annotated[bool, typer.Option("--test", help="Open the sealed test part; the opening is logged.")] = False,
    unconfirmed: Annotated[bool, typer.Option("--unconfirmed", help="With --test: unconfirmed too.")] = False,
    data: Annotated[Path | None, typer.Option(help="A file of bars: another asset, or later days.")] = None,
    symbol: Annotated[str | None, typer.Option(help="With --data: the asset in that file.")] = None,
    data_dir: DataDir = DATA,
) -> None:
    """Restore a checkpoint and report its metrics; with --test, those of a study's confirmed trials."""
    from fintx.analysis import evaluation, test_set
    from fintx.cli import display

    if test and data is not None:
        raise FintxError("--test and --data exclude each other: the test part belongs to the study's own data")
    if unconfirmed and not test:
        raise FintxError("--unconfirmed goes with --test: nothing else asks for a confirmation")
    if test:
        display.print_opening(Console(), test_set.open_test(path, data_root=data_dir, unconfirmed=unconfirmed))
    elif data is not None:
        display.print_evaluation(Console(), evaluation.on_file(path, data, symbol=symbol, data_root=data_dir))
    else:
        display.print_evaluation(Console(), evaluation.on_validation(path, data_root=data_dir))


@app.command()
def report(
    studies: Studies,
    backtest: Annotated[bool, typer.Option("--backtest", help="Add a backtest on the validation days.")] = False,
    cost_bp: Annotated[float, typer.Option(min=0, help="Backtest: cost per side, in basis points.")] = 5.0,
    outputs: Outputs = OUTPUTS,
    data_dir: DataDir = DATA,
) -> None:
    """Write a study's report, finished or not: one HTML page, with its figures and tables beside it."""
    from fintx.analysis import study_results

    folders = study_results.find_studies(studies, outputs=outputs)  # reports a mistake before the rest is loaded

    from fintx.analysis import study_analysis
    from fintx.evaluate.backtest import TradingRules
    from fintx.report import study_page

    rules = TradingRules(cost_bp=cost_bp) if backtest else None
    for folder in folders:
        print(study_page.build(study_analysis.read(folder, data_root=data_dir, rules=rules)).write())


@app.command()
def compare(studies: Studies, outputs: Outputs = OUTPUTS) -> None:
    """Compare studies: skill, shapes they share, winners trained elsewhere, rank correlation."""
    from fintx.analysis import study_results

    folders = study_results.find_studies(studies, outputs=outputs)  # reports a mistake before the rest is loaded

    from fintx.analysis import comparison
    from fintx.cli import display
    from fintx.report import comparison_page

    display.write_page(Console(), comparison_page.build(comparison.read(folders), outputs=outputs))


@app.command()
def scaling(
    studies: Studies,
    over: Annotated[str, typer.Option(help="What grows: parameters or data (panels).")] = "parameters",
    difference: Annotated[float, typer.Option(help="Smallest gain that matters, as a share of the loss.")] = 0.01,
    outputs: Outputs = OUTPUTS,
) -> None:
    """Fit studies that differ in size alone, and answer in a sentence whether loss falls with size."""
    from fintx.analysis import study_results

    folders = study_results.find_studies(studies, outputs=outputs)  # reports a mistake before the rest is loaded

    from fintx.analysis import scaling_laws
    from fintx.cli import display
    from fintx.report import scaling_page

    laws = scaling_laws.read(folders, over=over, difference=difference)
    display.write_page(Console(), scaling_page.build(laws, outputs=outputs))


# --- data -------------------------------------------------------------------------------------------------------------


@data_app.command(name="import")
def import_file(
    file: Annotated[Path, typer.Argument(help="CSV or Parquet: Date, Open, High, Low, Close[, Adj Close, Volume].")],
    symbol: Annotated[str, typer.Option(help="Name for sweep files, such as SPY.")],
    repair: Annotated[bool, typer.Option("--repair", help="Repair what is possible; the manifest lists it.")] = False,
    calendar: Annotated[str | None, typer.Option(help="With --repair: keep the trading days of this symbol.")] = None,
    data_dir: DataDir = DATA,
) -> None:
    """Check a file of daily bars and keep an immutable snapshot of it."""
    from fintx.cli import display
    from fintx.data import sources

    days = None if calendar is None else sources.load(calendar, root=data_dir).dates
    entry = sources.import_file(file, symbol, root=data_dir, repair=repair, calendar=days, today=datetime.date.today())
    display.print_ingest(Console(), entry)


@data_app.command(name="yahoo")
def yahoo(
    symbols: Annotated[list[str], typer.Argument(help="Yahoo symbols, such as SPY ^VIX.")],
    start: Annotated[str | None, typer.Option(help="First date, YYYY-MM-DD.")] = None,
    data_dir: DataDir = DATA,
) -> None:
    """Download daily bars from Yahoo and keep immutable snapshots of them."""
    from fintx.cli import display
    from fintx.data import sources

    console, today = Console(), datetime.date.today()
    for symbol in symbols:
        entry = sources.import_yahoo(symbol, root=data_dir, start=start, today=today, progress=console.print)
        display.print_ingest(console, entry)


@data_app.command(name="list")
def list_data(data_dir: DataDir = DATA) -> None:
    """List the imported data."""
    from fintx.cli import display
    from fintx.data import snapshots

    raw, processed = (snapshots.all_snapshots(data_dir, kind) for kind in ("raw", "processed"))
    display.print_data(Console(), raw, processed)


@app.command()
def verify(data_dir: DataDir = DATA) -> None:
    """Check every imported and processed file against its manifest."""
    from fintx.data import snapshots

    if not data_dir.is_dir():
        raise FintxError(f"{data_dir}: is not there; give the folder of the imported data: --data-dir FOLDER")
    problems = snapshots.verify(data_dir)
    for problem in problems:
        print(problem)
    if problems:
        raise typer.Exit(1)
    print(f"{data_dir}: every file is there and unchanged")


if __name__ == "__main__":
    main()
