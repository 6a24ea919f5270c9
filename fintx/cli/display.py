"""Display: what each command prints, in lines and tables."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import rich.table
from rich.console import Console

from fintx.analysis.predictions import BaselineComparison
from fintx.config.schema import Shape
from fintx.evaluate import significance
from fintx.report.format import confirmation_details, confirmation_verdict, count, duration, number, shape_words, size
from fintx.report.table import Column, Score, Table, confirmation_tables, data_tables, make, opening_table, scores
from fintx.study import records, study_file
from fintx.study.records import Metrics

if TYPE_CHECKING:  # what is printed has been made by then; to import its makers takes seconds
    from fintx.analysis.confirmation import Confirmation
    from fintx.analysis.evaluation import Evaluation
    from fintx.analysis.status import StudyStatus
    from fintx.analysis.test_set import TestOpening
    from fintx.data.datasets import PreparedData
    from fintx.data.snapshots import Snapshot
    from fintx.data.sources import Imported
    from fintx.data.standardize import Drift
    from fintx.run.confirm import ConfirmationSummary
    from fintx.run.scheduler import StudyFailure
    from fintx.run.search import StudySummary
    from fintx.study.plan import FittingDepths, MemoryRow, ShapeCount, StudyPlan
    from fintx.study.queue_file import QueueEdit, QueueListing
    from fintx.study.trial_table import Lease


def show(console: Console, *tables: Table) -> None:
    """Print tables whole: a number cut off to fit a narrow terminal is worse than a line that wraps."""
    for table in tables:
        shown = grid(table)
        before = console.width
        console.width = max(before, console.measure(shown, options=console.options.update(max_width=1_000)).maximum)
        console.print(shown)
        console.width = before
        if table.note:
            console.print(table.note, highlight=False, soft_wrap=True, markup=False, style="dim")


def grid(table: Table) -> rich.table.Table:
    """A table for the terminal: numbers to the right, words to the left."""
    title = f"\n{table.title}" if table.title else ""
    shown = rich.table.Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim"
    )
    for head, left in zip(table.heads, table.left, strict=True):
        shown.add_column(head, justify="left" if left else "right", no_wrap=head != "note")
    for i, row in enumerate(table.cells):
        shown.add_row(*row, style="bold" if i in table.marked and len(table.rows) > 1 else None)
    return shown


def lines(console: Console, *texts: str) -> None:
    """Print lines as they are, however wide the terminal is."""
    for text in texts:
        console.print(text, highlight=False, soft_wrap=True, markup=False)


# --- the end of a run -------------------------------------------------------------------------------------------------


def print_summary(console: Console, summary: StudySummary) -> None:
    """The end of a sweep: the best trial beside what it must beat, and where everything lies."""
    spec, best, folder = summary.spec, summary.best, summary.folder
    failed = Counter(record.outcome for record in summary.records if record.value is None)
    outcomes = "".join(f", {n} {outcome.replace('_', ' ')}" for outcome, n in failed.items())
    console.rule(f"{spec.study.name}: {len(summary.records)} of {spec.study.n_trials} trials finished{outcomes}")
    if best is not None:
        lines(console, _verdict(summary))
        if (doubt := significance.leakage_warning(best.best)) is not None:
            lines(console, f"WARNING: {doubt}")
    if opened := study_file.openings_note(folder):
        lines(console, f"Note: {opened}.")
    if spec.study.question:
        lines(console, spec.study.question)
    if best is None:
        lines(console, "No trial succeeded yet: see each record's `outcome` and `detail`.")
    else:
        baselines = {name: kept["metrics"] for name, kept in summary.baselines.items()}
        show(console, _beside_baselines(f"best trial ({best.trial_number})", best.best, baselines, "validation rows"))
        if best.value_se is not None:
            value, n_seeds = number(best.value), 1 + len(best.replicates)
            lines(console, f"Its {best.metric} {value} is the mean over {n_seeds} seeds, ± {number(best.value_se)}")
        lines(console, f"Best shape: {shape_words(best.config.shape)} = {best.param_count:,} parameters")
    lines(console, f"Records    {folder}/trials/*/record.json   (tables: {folder.name}_all_trials.json, …_best.json)")
    if best is not None and summary.predictions_here:
        lines(console, f"Checkpoint {records.trial_folder(folder, best.trial_number)}/checkpoint")
    lines(console, f"All trials {folder.parent}/experiment_results.csv")
    if best is not None and summary.predictions_here:
        lines(console, f"Next       just confirm {folder}     just eval {folder}     just status")


def _beside_baselines(name: str, model: Metrics, baselines: Mapping[str, Metrics], rows: str) -> Table:
    """A model's scores above those of all that must be beaten, on the identical rows."""
    every = [Score(name, model), *(Score(each, scored) for each, scored in baselines.items())]
    return scores("baselines", f"On the same {number(model.get('n'))} {rows}", every, marked=(0,))


def _verdict(summary: StudySummary) -> str:
    """Whether the winner beats the best baseline by more than noise, or why that can't be said here."""
    if summary.comparison is not None:
        return sentence(summary.comparison, len(summary.records))
    if summary.best is not None and not summary.predictions_here:
        return f"The best trial's predictions lie on {summary.best.host}: compare it with the baselines there."
    return f"No baseline has a {summary.spec.study.metric}."


def print_unfinished(console: Console, summary: StudySummary) -> None:
    """What a run leaves to do: trials whose attempts all failed, and queue entries without room."""
    _print_left_aside(console, summary.left_aside)
    if summary.waiting and not summary.interrupted:
        full = f"All {summary.spec.study.n_trials} trials are spoken for; raise study.n_trials."
        lines(console, f"Still queued: {', '.join(summary.waiting)}. {full}")


def _print_left_aside(console: Console, left_aside: Sequence[str]) -> None:
    lines(console, *(f"left aside  {line}" for line in left_aside))
    if left_aside:
        lines(console, "Give the same command again to try them again.")


def print_results(console: Console, results: Sequence[StudySummary | StudyFailure]) -> None:
    """One line per study of a run of several."""
    from fintx.run.scheduler import StudyFailure

    rows = []
    for result in results:
        note = "" if result.problem is None else str(result.problem).partition("\n")[0]
        if isinstance(result, StudyFailure):
            rows.append([result.spec.study.name, "–", "failed", "–", note])
            continue
        study, best = result.spec.study, result.best
        state = "failed" if result.problem else "stopped" if result.interrupted else "done"
        value = f"{study.metric} {number(best.value)}" if best else "–"
        rows.append([study.name, f"{len(result.records)}/{study.n_trials}", state, value, note])
    show(console, make("results", "All studies", ["study", "finished", "state", "best", "note"], rows))


def print_confirmed(console: Console, result: ConfirmationSummary) -> None:
    """What a run of a confirmation came to, and what it leaves to do."""
    _print_left_aside(console, result.left_aside)
    if result.confirmation is not None:
        print_confirmation(console, result.confirmation)
        lines(console, f"Kept in    {result.folder}/confirmation.json")
        if result.confirmation.complete and result.confirmation.confirmed:
            lines(
                console, f"Next       just eval {result.folder} --test     (opens the sealed test part; it is logged)"
            )


def print_confirmation(console: Console, confirmation: Confirmation) -> None:
    """The answer first, then every candidate, then where the gain comes from."""
    n, done = len(confirmation.candidates), f"{confirmation.n_trained} of {confirmation.n_members}"
    console.rule(f"{confirmation.study}: the best {n} trained again, {done}")
    lines(console, confirmation_verdict(confirmation), *confirmation_details(confirmation))
    if any(each.verdict for each in confirmation.candidates):
        show(console, *confirmation_tables(confirmation))


# --- status, evaluation -----------------------------------------------------------------------------------------------


def print_status(console: Console, statuses: Sequence[StudyStatus]) -> None:
    """One line per study, and below one per trial that is under way or was left unfinished."""
    rows = []
    for status in statuses:
        best, crashed = status.best, sum(lease.failures for lease in status.unfinished)
        failed = {**status.failed, **({"crashed or hung": crashed} if crashed else {})}
        done = status.finished >= status.n_trials
        rows.append(
            (status.name, f"{status.finished}/{status.n_trials}",
             "running" if status.running else "done" if done else "stopped",
             ", ".join(f"{n} {outcome}" for outcome, n in failed.items()) or "0",
             f"{status.metric} {number(best.value)}" if best else "–", best.best.get("skill") if best else None,
             to_beat(status.comparison), standing(status.comparison),
             f"{shape_words(best.config.shape)} ({count(best.param_count)})" if best else "–",
             None if done else status.eta, status.confirmation, status.test_openings)
        )  # fmt: skip
    columns: list[Column] = [
        "study", "finished", "state", "failed", "best", ("skill", "percent"), "to beat", "best trial", "best shape",
        ("to go", "seconds"), "confirmed", ("test opened", "whole"),
    ]  # fmt: skip
    show(console, make("status", "", columns, rows))
    for status in statuses:
        if status.doubt:
            lines(console, f"WARNING: {status.name}: {status.doubt}")
        if status.note:
            lines(console, f"Note: {status.name}: {status.note}.")
    unfinished = [
        (status.name, str(lease.number), _lease_state(status, lease), lease.step, lease.attempt,
         f"{lease.host}, process {lease.pid}" if lease.pid else lease.host, shape_words(lease.shape), lease.detail)
        for status in statuses
        for lease in status.unfinished
    ]  # fmt: skip
    if unfinished:
        columns = ["study", "trial", "state", ("step", "whole"), ("attempt", "whole"), "on", "shape", "note"]
        show(console, make("unfinished", "Unfinished trials", columns, unfinished))


def _lease_state(status: StudyStatus, lease: Lease) -> str:
    """A lease that says running, of a study that nobody runs here, was cut off: the next run takes it up."""
    here = lease.host == socket.gethostname()
    return "cut off" if lease.state == "running" and here and not status.running else lease.state


def print_evaluation(console: Console, result: Evaluation) -> None:
    """Every metric, beside the recorded one where there is one."""
    console.rule(f"{result.title}: {result.first_date} … {result.last_date}")
    lines(console, f"{result.checkpoint}   {result.param_count:,} parameters")
    lines(console, *(f"Note: {note}" for note in result.notes))
    columns: list[Column] = ["metric", "value", *(["recorded", ""] if result.recorded else [])]
    rows: list[tuple[str, ...]] = []
    for key, value in result.metrics.items():
        recorded = (result.recorded or {}).get(key)
        beside = (number(recorded, 6), "equal" if recorded == value else "DIFFERS") if result.recorded else ()
        rows.append((key, number(value, 6), *beside))
    show(console, make("metrics", "", columns, rows))
    if result.baselines:
        of = "validation rows" if result.recorded else "rows"
        show(console, _beside_baselines("this model", result.metrics, result.baselines, of))
    if len(result.per_asset) > 1:
        show(console, scores("per_asset", "Per asset", [Score(name, each) for name, each in result.per_asset.items()]))


def print_opening(console: Console, opening: TestOpening) -> None:
    """What the sealed test part says."""
    console.rule(f"{opening.study}: the sealed test part, {opening.first_date} … {opening.last_date}")
    lines(console, *(f"Note: {note}" for note in opening.notes))
    for each in opening.models:
        if (doubt := significance.leakage_warning(each.metrics)) is not None:
            lines(console, f"WARNING: {each.name}: {doubt}")
    show(console, opening_table(opening))
    last = opening.models[-1]
    if len(last.per_asset) > 1:
        rows = [Score(asset, scored) for asset, scored in last.per_asset.items()]
        show(console, scores("per_asset", f"{last.name}, per asset", rows, metric=opening.loss))


# --- data, shapes -----------------------------------------------------------------------------------------------------


def print_ingest(console: Console, result: Imported) -> None:
    """What an import kept, dropped and repaired."""
    entry = result.entry
    kept = "kept as a new version" if result.is_new else "is known already; nothing written"
    lines(console, f"{entry.name}: {entry.rows:,} bars {entry.first_date} … {entry.last_date}, {kept}")
    lines(console, f"version {entry.version[:16]}", *(f"  {note}" for note in result.notes))


def print_data(console: Console, raw: Sequence[Snapshot], processed: Sequence[Snapshot]) -> None:
    """What is ingested, oldest first."""
    columns: list[Column] = ["name", "version", ("rows", "whole"), "first", "last", "created"]
    for title, entries in (("Raw bars", raw), ("Processed features", processed)):
        if entries:
            rows = [(e.name, e.version[:12], e.rows, e.first_date, e.last_date, e.created) for e in entries]
            show(console, make("data", title, columns, rows))
        else:
            lines(console, f"{title}: none")


def print_params(console: Console, answer: ShapeCount | FittingDepths) -> None:
    """Counts of one shape, or the depths that fit a budget."""
    from fintx.study.plan import FittingDepths

    budget = answer.budget
    if isinstance(answer, FittingDepths):
        title = f"Depths inside {answer.budget.low:,} … {answer.budget.high:,} parameters"
        columns: list[Column] = ["d_model", "d_ff / d_model", "d_ff", "n_layers", "parameters", "heads"]
        rows = [
            (row.d_model, f"{row.d_ff_ratio:g}", round(row.d_model * row.d_ff_ratio),
             f"{row.fewest[0]} … {row.most[0]}", f"{row.fewest[1]:,} … {row.most[1]:,}",
             " ".join(map(str, row.head_counts)))
            for row in answer.rows
        ]  # fmt: skip
        show(console, make("depths", title, columns, rows))
        return
    counted, flops = answer.count, answer.flops
    lines(console, shape_words(answer.shape))
    parts = {**counted.parts, "total": counted.total}
    show(console, make("parameters", "", ["part", ("parameters", "whole")], parts.items()))
    lines(
        console,
        f"FLOPs per sample: {flops.forward:.3g} forward, {flops.backward:.3g} backward (multiply-add = 2)",
        f"Training state (parameters, gradients, AdamW): {size(answer.state_bytes)}",
        f"Head counts that divide d_model: {' '.join(map(str, answer.head_counts))}",
    )
    if budget is not None:
        fits = "fits" if budget.low <= counted.total <= budget.high else "is OUTSIDE"
        lines(console, f"{count(counted.total)} {fits} the budget {budget.low:,} … {budget.high:,}")


# --- the plan ---------------------------------------------------------------------------------------------------------


def print_plan(console: Console, plan: StudyPlan) -> None:
    """Everything that a sweep file would run, and on what."""
    console.rule(f"{plan.spec.study.name}: the plan (nothing is run, nothing is written)")
    console.print(plan.resolved, highlight=False, markup=False, soft_wrap=True, style="dim")
    show_data(console, plan.prepared)
    if plan.power:
        show(console, _power_table(plan))
    show(console, _drift_table(plan.prepared.drift), _shapes_table(plan))
    n_trials, queued = plan.spec.study.n_trials, len(plan.queue)
    sampled = f"{max(n_trials - queued, 0)} from the sampler"
    lines(console, f"\n{n_trials} trials: {min(queued, n_trials)} queued, {sampled}")
    if queued > n_trials:
        lines(console, f"WARNING: {queued - n_trials} of {queued} queue entries find no room; raise study.n_trials")
    if plan.queue:
        rows = [(row.identity, shape_words(row.shape), row.param_count, row.training, row.note) for row in plan.queue]
        show(console, make("queue", "Queue", ["id", "shape", ("parameters", "whole"), "training", "note"], rows))
    _print_estimate(console, plan)


def show_data(console: Console, prepared: PreparedData) -> None:
    """Data range, label in words, and the split with its base rates and what its validation part can show."""
    ranges, split = data_tables(prepared)
    show(console, ranges)
    dropped = "; ".join(f"{n:,} {reason}" for reason, n in prepared.dropped.items())
    lines(console, f"{len(prepared.data.features)} features per bar; dropped rows: {dropped}\n")
    lines(console, f"Label: {prepared.label_description}")
    show(console, split)


def _power_table(plan: StudyPlan) -> Table:
    """What the validation rows can show at all, before anything is trained."""
    n_trials, (_, whole) = plan.spec.study.n_trials, plan.power[-1]
    return make(
        "power", "What the validation rows can show, in nats of log loss",
        ["rows", ("n", "whole"), ("effective n", "whole"), ("SE of a difference", "number"),
         ("smallest seen", "number"), (f"luck of the best of {n_trials}", "number")],
        [(name, p.n, p.n_effective, p.paired_se, p.detectable, p.luck_nats) for name, p in plan.power],
        note=f"Two models on the same rows, their logits {significance.LOGIT_GAP:g} apart (SD): a true gain below "
        f"{number(whole.detectable)} stays unseen in most studies, and of {n_trials} equal trials the best looks "
        f"{number(whole.luck_nats)} better than it is.",
    )  # fmt: skip


def _drift_table(drifts: Sequence[Drift]) -> Table:
    moved = sorted(drifts, key=lambda d: (not d.left_the_range, -d.outside, -abs(d.shift)))
    warned = sum(d.left_the_range for d in drifts)
    return make(
        "drift", f"Drift, train to validation: {warned} of {len(drifts)} inputs have left their training range",
        ["feature", ("train mean", "number"), ("SD", "number"), ("validation mean", "number"), ("SD", "number"),
         ("shift (SDs)", "number"), ("outside", "percent"), ""],
        [
            (d.feature, f"{d.train_mean:.4g}", f"{d.train_std:.3g}", f"{d.validation_mean:.4g}",
             f"{d.validation_std:.3g}", f"{d.shift:+.2f}", d.outside, "LEFT ITS RANGE" if d.left_the_range else "")
            for d in moved
        ],
    )  # fmt: skip


def _shapes_table(plan: StudyPlan) -> Table:
    """Widths and ratios with their depths; exact counts at both ends."""
    groups: dict[tuple[int, int], list[tuple[Shape, int]]] = {}
    for shape, total in plan.shapes:
        groups.setdefault((shape.d_model, shape.d_ff), []).append((shape, total))
    rows = []
    for (d_model, d_ff), members in groups.items():
        depths = sorted({shape.n_layers for shape, _ in members})
        totals = [total for _, total in members]
        heads = sorted({shape.n_heads for shape, _ in members})
        depth, parameters = str(depths[0]), f"{totals[0]:,}"
        if len(depths) > 1:
            depth, parameters = f"{depths[0]} … {depths[-1]}", f"{min(totals):,} … {max(totals):,}"
        rows.append((d_model, d_ff, depth, " ".join(map(str, heads)), parameters, len(members)))
    budget = plan.spec.budget
    title = f"{len(plan.shapes):,} feasible shapes inside {budget.low:,} … {budget.high:,} parameters"
    columns: list[Column] = ["d_model", "d_ff", "n_layers", "heads", "parameters", ("shapes", "whole")]
    return make("shapes", title, columns, rows)


def _print_estimate(console: Console, plan: StudyPlan) -> None:
    guess, memory = plan.estimate, plan.estimate.memory
    low, middle, high = map(duration, guess.trial_s)
    lines(
        console,
        f"\nOn this machine ({guess.matmul_gflops:,.0f} GFLOP/s in matrix products), at most, all epochs run:",
        f"  a trial {low} (smallest shape), {middle} (median), {high} (largest)",
        f"  the study {duration(guess.study_s)}; early stopping often halves it",
    )
    show(console, _memory_table(memory))
    if any(row.fitting is None for row in memory[:2]):
        lines(console, "WARNING: the largest shapes don't fit: they will be recorded as out of memory")
    n = memory[0].layout.n_devices
    if n > 1 and memory[0].footprint.total < memory[0].device_bytes / 4:
        lines(console, f"Small trials: --workers {n} trains {n} at once, one on each device, which is faster")


def _memory_table(memory: Sequence[MemoryRow]) -> Table:
    rows = []
    for row in memory:
        relief = "DOESN'T FIT"
        if row.fitting is not None:
            again = "layers computed again" if row.fitting.remat else ""
            smaller = f"micro-batch {row.fitting.micro_batch}" if row.fitting.micro_batch < row.batch_size else ""
            relief = ", ".join(filter(None, (again, smaller))) or "fits"
        need = row.footprint
        rows.append(
            (row.machine, f"{shape_words(row.shape)} ({count(row.param_count)})", str(row.layout), need.parameters,
             need.gradients, need.moments, need.activations, row.recomputed_bytes, need.total, row.device_bytes, relief)
        )  # fmt: skip
    sizes = ("parameters", "gradients", "AdamW", "activations", "again", "all", "usable")
    return make(
        "memory", "Memory on each device, estimated (again: activations where layers are computed again)",
        ["on", "shape", "mesh", *((head, "bytes") for head in sizes), ""], rows,
    )  # fmt: skip


# --- the queue --------------------------------------------------------------------------------------------------------


def print_queue(console: Console, listings: Sequence[QueueListing]) -> None:
    """Every entry of every study's queue: how far it is, on which trial, and with which training values."""
    for listing in listings:
        if not listing.rows:
            lines(console, f"{listing.study}: the queue is empty")
            continue
        rows = []
        for row in listing.rows:
            state, entry = row.state, row.state.entry
            # Where an entry's open values come from, or will come from, and those that it names itself.
            source = entry.training if state.number is None else state.training
            training = [*([source] if source else []), *(f"{path} = {value}" for path, value in entry.values.items())]
            outcome = f" ({row.outcome.replace('_', ' ')})" if row.failed else ""
            rows.append(
                (state.identity, f"{state.state}{outcome}", state.number, shape_words(entry.shape), row.param_count,
                 ", ".join(training), entry.note)
            )  # fmt: skip
        states = Counter(row.state.state.partition(" ")[0] for row in listing.rows)
        title = f"{listing.study}: {', '.join(f'{n} {state}' for state, n in states.items())}"
        columns: list[Column] = [
            "id",
            "state",
            ("trial", "whole"),
            "shape",
            ("parameters", "whole"),
            "training",
            "note",
        ]
        show(console, make("queue", title, columns, rows))


def print_edit(console: Console, edit: QueueEdit, verb: str) -> None:
    """What was added to a file's queue, or cancelled in it."""
    lines(console, f"{verb} {edit.identity} of {edit.study}: {shape_words(edit.entry.shape)}")


# --- several studies --------------------------------------------------------------------------------------------------


def print_tables(console: Console, before: Sequence[str], tables: Sequence[Table], after: Sequence[str] = ()) -> None:
    """Tables of a page, with what is said before and after them."""
    lines(console, *before)
    show(console, *tables)
    lines(console, *after)


def sentence(comparison: BaselineComparison, n_trials: int) -> str:
    """Whether the winner beats the best baseline by more than noise, and why even that isn't yet proof."""
    gain, baseline = comparison.difference, comparison.baseline
    figures = (
        f"{comparison.metric} {number(abs(gain.mean))} {'better' if gain.mean > 0 else 'worse'}; "
        f"gain 95 %: {number(gain.low)} … {number(gain.high)}"
    )
    if comparison.standing == "behind":
        return f"NO SKILL beyond {baseline}: it is better than the best of {n_trials} trials ({figures})."
    if comparison.standing == "can't be told apart":
        return f"NO SKILL beyond {baseline}: the best of {n_trials} trials can't be told apart from it ({figures})."
    return (
        f"The best trial is ahead of {baseline} ({figures}), "
        f"but it is the best of {n_trials}, chosen on these very rows: expect less on new days."
    )


def standing(comparison: BaselineComparison | None) -> str:
    """ahead, behind, can't be told apart; "–" where nothing can be compared."""
    return "–" if comparison is None else comparison.standing


def to_beat(comparison: BaselineComparison | None) -> str:
    """The best baseline and its score."""
    return "–" if comparison is None else f"{comparison.baseline} {number(comparison.baseline_value)}"
