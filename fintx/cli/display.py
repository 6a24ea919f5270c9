"""Display: what each command prints, as lines and `Table`s."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from fintx.analysis.predictions import BaselineComparison
from fintx.cli.terminal import print_lines, print_tables
from fintx.config.schema import Shape
from fintx.evaluate import significance
from fintx.evaluate.metrics import Metrics
from fintx.report import format
from fintx.report.format import count, duration, number, shape_words, size
from fintx.report.table import Column, Score, Table, confirmation_tables, data_tables, opening_table, score_table
from fintx.study import records, study_file

if TYPE_CHECKING:  # importing what made the values takes seconds, and is done by now
    from fintx.analysis.confirmation import Confirmation
    from fintx.analysis.evaluation import Evaluation
    from fintx.analysis.status import StudyStatus
    from fintx.analysis.test_set import TestOpening
    from fintx.data.datasets import PreparedData
    from fintx.data.snapshots import Snapshot
    from fintx.data.sources import Imported
    from fintx.report.page import Page
    from fintx.run.confirm import ConfirmationSummary
    from fintx.run.scheduler import StudyFailure
    from fintx.run.search import StudySummary
    from fintx.study.plan import FittingDepths, MemoryRow, ShapeCount, StudyPlan
    from fintx.study.queue_file import QueueEdit, QueueListing

    Result = StudySummary | ConfirmationSummary | StudyFailure


def write_page(console: Console, page: Page) -> None:
    """Print the answer of a page, its warnings, tables and commands; write it, and print where."""
    from fintx.report.page import Prose

    print_lines(console, page.answer, *page.warnings)
    for section in page.sections:
        for block in section.blocks:
            if isinstance(block, Table):
                print_tables(console, block)
            elif isinstance(block, Prose) and block.kind == "command":
                print_lines(console, *block.points)
    print(page.write())


# --- the end of a run -------------------------------------------------------------------------------------------------


def print_result(console: Console, result: Result) -> None:
    """What a run of a study or a confirmation came to, and what is left to do."""
    from fintx.run.confirm import ConfirmationSummary
    from fintx.run.scheduler import StudyFailure

    if isinstance(result, StudyFailure):
        return
    if not isinstance(result, ConfirmationSummary) and (result.records or result.problem is None):
        _print_summary(console, result)
    print_lines(console, *(f"given up  {line}" for line in result.given_up))
    if result.given_up:
        print_lines(console, "Give the same command again to try them again.")
    if not isinstance(result, ConfirmationSummary):
        if result.waiting and not result.interrupted:
            full = f"All {result.spec.study.n_trials} trials are taken; raise study.n_trials."
            print_lines(console, f"Still queued: {', '.join(result.waiting)}. {full}")
    elif result.confirmation is not None:
        _print_confirmation(console, result.confirmation)
        print_lines(console, f"Stored in  {result.folder}/confirmation.json")
        if result.confirmation.complete and result.confirmation.confirmed:
            command = f"just eval {result.folder} --test"
            print_lines(console, f"Next       {command}     (opens the sealed test part; the opening is logged)")


def _print_summary(console: Console, summary: StudySummary) -> None:
    """The end of a sweep: the best trial beside the baselines, and where the files are."""
    spec, best, folder, n = summary.spec, summary.best, summary.folder, len(summary.records)
    failed = Counter(record.outcome for record in summary.records if record.value is None)
    outcomes = "".join(f", {n} {outcome.replace('_', ' ')}" for outcome, n in failed.items())
    console.rule(f"{spec.study.name}: {n} of {spec.study.n_trials} trials finished{outcomes}")
    lines = []
    if best is None:
        lines.append("No trial succeeded yet: see each record's `outcome` and `detail`.")
    elif summary.comparison is not None:
        comparison, trial = summary.comparison, format.best_trial_words(n, best)
        lines.append(format.comparison_verdict(comparison, trial, spec.study.name)[0])
    elif summary.predictions_here:
        lines.append(f"No baseline has a {spec.study.metric}.")
    else:
        lines.append(f"The best trial's predictions are on {best.host}: compare it with the baselines there.")
    if best is not None and (doubt := significance.leakage_warning(best.best)) is not None:
        lines.append(f"WARNING: {doubt}")
    if openings := study_file.openings_note(folder):
        lines.append(f"Note: {openings}.")
    print_lines(console, *lines, *filter(None, [spec.study.question]))
    records_line = f"Records    {folder}/trials/*/record.json   (tables: {folder.name}_all_trials.json, …_best.json)"
    trials_line = f"All trials {folder.parent}/experiment_results.csv"
    if best is None:
        return print_lines(console, records_line, trials_line)
    baselines = {name: scores["metrics"] for name, scores in summary.baselines.items()}
    title = f"best trial ({best.trial_number})"
    print_tables(console, _score_table(title, best.best, baselines, "validation rows"))
    if best.value_se is not None:
        value = f"{number(best.value)} is the mean over {1 + len(best.replicates)} seeds, ± {number(best.value_se)}"
        print_lines(console, f"Its {best.metric} {value}")
    print_lines(
        console, f"Best shape: {shape_words(best.config.shape)} = {best.param_count:,} parameters", records_line
    )
    if not summary.predictions_here:
        return print_lines(console, trials_line)
    print_lines(
        console,
        f"Checkpoint {records.trial_folder(folder, best.trial_number)}/checkpoint",
        trials_line,
        f"Next       just confirm {folder}",
        f"           just eval {folder}",
        f"           just report {folder}",
    )


def _score_table(name: str, model: Metrics, baselines: Mapping[str, Metrics], rows: str) -> Table:
    """A model above the baselines, on identical rows."""
    models = [Score(name, model), *(Score(baseline, scores) for baseline, scores in baselines.items())]
    return score_table("baselines", f"On the same {number(model.get('n'))} {rows}", models, marked=(0,))


def print_overview(console: Console, results: Sequence[Result]) -> None:
    """One line per study of a run of several."""
    from fintx.run.search import StudySummary

    rows = []
    for result in results:
        note = "" if result.problem is None else str(result.problem).partition("\n")[0]
        study, finished, state, value = result.spec.study, "–", "failed", "–"
        if isinstance(result, StudySummary):
            finished = f"{len(result.records)}/{study.n_trials}"
            state = "failed" if result.problem else "stopped" if result.interrupted else "done"
            value = f"{study.metric} {number(result.best.value)}" if result.best else "–"
        rows.append((study.name, finished, state, value, note))
    print_tables(console, Table("results", "All studies", ["study", "finished", "state", "best", "note"], rows))


def _print_confirmation(console: Console, confirmation: Confirmation) -> None:
    """The verdict first, then every candidate, then where the gain comes from."""
    n, done = len(confirmation.candidates), f"{confirmation.n_trained} of {confirmation.n_members} trainings done"
    console.rule(f"{confirmation.study}: the best {n} trained again, {done}")
    print_lines(console, format.confirmation_verdict(confirmation), *format.confirmation_details(confirmation))
    if any(candidate.verdict for candidate in confirmation.candidates):
        print_tables(console, *confirmation_tables(confirmation))


# --- status, evaluation -----------------------------------------------------------------------------------------------


def print_status(console: Console, statuses: Sequence[StudyStatus]) -> None:
    """One line per study, then one per trial that is running or unfinished."""
    rows, unfinished = [], []
    for status in statuses:
        best, crashed = status.best, sum(lease.failures for lease in status.unfinished)
        failed = {**status.failed, **({"crashed or hung": crashed} if crashed else {})}
        done = status.finished >= status.n_trials
        rows.append(
            (status.name, f"{status.finished}/{status.n_trials}",
             "running" if status.running else "done" if done else "stopped",
             ", ".join(f"{n} {outcome}" for outcome, n in failed.items()) or "0",
             f"{status.metric} {number(best.value)}" if best else "–", best.best.get("skill") if best else None,
             *baseline_cells(status.comparison),
             f"{shape_words(best.config.shape)} ({count(best.param_count)})" if best else "–",
             None if done else status.eta, status.confirmation, status.test_openings)
        )  # fmt: skip
        for lease in status.unfinished:
            # Here a lease that says running, of a study that nobody runs, was cut off: the next run continues it.
            cut_off = lease.state == "running" and lease.host == socket.gethostname() and not status.running
            where = f"{lease.host}, process {lease.pid}" if lease.pid else lease.host
            unfinished.append(
                (status.name, str(lease.number), "cut off" if cut_off else lease.state, lease.step, lease.attempt,
                 where, shape_words(lease.shape), lease.detail)
            )  # fmt: skip
    columns: list[Column] = [
        "study", "finished", "state", "failed", "best", ("skill", "percent"), "to beat", "best trial", "best shape",
        ("to go", "seconds"), "confirmed", ("test opened", "whole"),
    ]  # fmt: skip
    print_tables(console, Table("status", "", columns, rows))
    for status in statuses:
        if status.doubt:
            print_lines(console, f"WARNING: {status.name}: {status.doubt}")
        if status.note:
            print_lines(console, f"Note: {status.name}: {status.note}.")
    if unfinished:
        columns = ["study", "trial", "state", ("step", "whole"), ("attempt", "whole"), "on", "shape", "note"]
        print_tables(console, Table("unfinished", "Unfinished trials", columns, unfinished))


def baseline_cells(comparison: BaselineComparison | None) -> tuple[str | None, str | None]:
    """Two cells: the best baseline with its score, and how the best trial stands against it."""
    if comparison is None:
        return None, None
    return f"{comparison.baseline} {number(comparison.baseline_value)}", comparison.standing


def print_evaluation(console: Console, result: Evaluation) -> None:
    """Every metric, beside the recorded one if there is one."""
    console.rule(f"{result.title}: {result.first_date} … {result.last_date}")
    print_lines(console, f"{result.checkpoint}   {result.param_count:,} parameters")
    print_lines(console, *(f"Note: {note}" for note in result.notes))
    columns: list[Column] = ["metric", "value", *(["recorded", ""] if result.recorded else [])]
    rows: list[tuple[str, ...]] = []
    for key, value in result.metrics.items():
        recorded = (result.recorded or {}).get(key)
        check = (number(recorded, 6), "equal" if recorded == value else "DIFFERS") if result.recorded else ()
        rows.append((key, number(value, 6), *check))
    print_tables(console, Table("metrics", "", columns, rows))
    if result.baselines:
        kind = "validation rows" if result.recorded else "rows"
        print_tables(console, _score_table("this model", result.metrics, result.baselines, kind))
    _print_per_asset(console, "Per asset", result.per_asset)


def print_opening(console: Console, opening: TestOpening) -> None:
    """What the sealed test part says."""
    console.rule(f"{opening.study}: the sealed test part, {opening.first_date} … {opening.last_date}")
    print_lines(console, *(f"Note: {note}" for note in opening.notes))
    for model in opening.models:
        if (doubt := significance.leakage_warning(model.metrics)) is not None:
            print_lines(console, f"WARNING: {model.name}: {doubt}")
    print_tables(console, opening_table(opening))
    last = opening.models[-1]
    _print_per_asset(console, f"{last.name}, per asset", last.per_asset, metric=opening.loss)


def _print_per_asset(
    console: Console, title: str, per_asset: Mapping[str, Metrics], *, metric: str | None = None
) -> None:
    if len(per_asset) > 1:
        rows = [Score(asset, scores) for asset, scores in per_asset.items()]
        print_tables(console, score_table("per_asset", title, rows, metric=metric))


# --- data, shapes -----------------------------------------------------------------------------------------------------


def print_ingest(console: Console, result: Imported) -> None:
    """What an import stored, dropped and repaired."""
    entry = result.entry
    outcome = "stored as a new version" if result.is_new else "already imported; nothing written"
    print_lines(console, f"{entry.name}: {entry.rows:,} bars {entry.first_date} … {entry.last_date}, {outcome}")
    print_lines(console, f"version {entry.version[:16]}", *(f"  {note}" for note in result.notes))


def print_data(console: Console, raw: Sequence[Snapshot], processed: Sequence[Snapshot]) -> None:
    """The imported data, oldest first."""
    columns: list[Column] = ["name", "version", ("rows", "whole"), "first", "last", "created"]
    for title, entries in (("Raw bars", raw), ("Processed features", processed)):
        if entries:
            rows = [(e.name, e.version[:12], e.rows, e.first_date, e.last_date, e.created) for e in entries]
            print_tables(console, Table("data", title, columns, rows))
        else:
            print_lines(console, f"{title}: none")


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
        return print_tables(console, Table("depths", title, columns, rows))
    counts, flops = answer.count, answer.flops
    print_lines(console, shape_words(answer.shape))
    parts = {**counts.parts, "total": counts.total}
    print_tables(console, Table("parameters", "", ["part", ("parameters", "whole")], list(parts.items())))
    print_lines(
        console,
        f"FLOPs per sample: {flops.forward:.3g} forward, {flops.backward:.3g} backward (multiply-add = 2)",
        f"Training state (parameters, gradients, AdamW): {size(answer.state_bytes)}",
        f"Head counts that divide d_model: {' '.join(map(str, answer.head_counts))}",
    )
    if budget is not None:
        fits = "fits" if budget.low <= counts.total <= budget.high else "is OUTSIDE"
        print_lines(console, f"{count(counts.total)} {fits} the budget {budget.low:,} … {budget.high:,}")


# --- the plan ---------------------------------------------------------------------------------------------------------


def print_plan(console: Console, plan: StudyPlan) -> None:
    """What a sweep file would run, on which data, and what it takes."""
    console.rule(f"{plan.spec.study.name}: the plan (nothing is run, nothing is written)")
    console.print(plan.resolved, highlight=False, markup=False, soft_wrap=True, style="dim")
    print_prepared(console, plan.prepared)
    if plan.power:
        print_tables(console, _power_table(plan))
    print_tables(console, _drift_table(plan), _shapes_table(plan))
    n_trials, queued = plan.spec.study.n_trials, len(plan.queue)
    sampled = f"{max(n_trials - queued, 0)} from the sampler"
    print_lines(console, f"\n{n_trials} trials: {min(queued, n_trials)} queued, {sampled}")
    if queued > n_trials:
        print_lines(
            console, f"WARNING: {queued - n_trials} of {queued} queue entries find no room; raise study.n_trials"
        )
    if plan.queue:
        rows = [(row.identity, shape_words(row.shape), row.param_count, row.training, row.note) for row in plan.queue]
        columns: list[Column] = ["id", "shape", ("parameters", "whole"), "training", "note"]
        print_tables(console, Table("queue", "Queue", columns, rows))
    _print_estimate(console, plan)


def print_prepared(console: Console, prepared: PreparedData) -> None:
    """Data range, label in words, and the split with its base rates and standard errors."""
    ranges, split = data_tables(prepared)
    print_tables(console, ranges)
    dropped = "; ".join(f"{n:,} {reason}" for reason, n in prepared.dropped.items())
    print_lines(console, f"{len(prepared.data.features)} features per bar; dropped rows: {dropped}\n")
    print_lines(console, f"Label: {prepared.label_description}")
    print_tables(console, split)


def _power_table(plan: StudyPlan) -> Table:
    n_trials, (_, whole) = plan.spec.study.n_trials, plan.power[-1]
    return Table(
        "power", "What the validation rows can show, in nats of log loss",
        ["rows", ("n", "whole"), ("effective n", "whole"), ("SE of a difference", "number"),
         ("smallest seen", "number"), (f"luck of the best of {n_trials}", "number")],
        [(name, p.n, p.n_effective, p.paired_se, p.detectable, p.luck_nats) for name, p in plan.power],
        note=f"Two models on the same rows, their logits {significance.LOGIT_GAP:g} apart (SD): a true gain below "
        f"{number(whole.detectable)} stays unseen in most studies, and of {n_trials} equal trials the best looks "
        f"{number(whole.luck_nats)} better than it is.",
    )  # fmt: skip


def _drift_table(plan: StudyPlan) -> Table:
    drifts = sorted(plan.prepared.drift, key=lambda d: (not d.left_the_range, -d.outside, -abs(d.shift)))
    n_left = sum(d.left_the_range for d in drifts)
    return Table(
        "drift", f"Drift, train to validation: {n_left} of {len(drifts)} inputs have left their training range",
        ["feature", ("train mean", "number"), ("SD", "number"), ("validation mean", "number"), ("SD", "number"),
         ("shift (SDs)", "number"), ("outside", "percent"), ""],
        [
            (d.feature, f"{d.train_mean:.4g}", f"{d.train_std:.3g}", f"{d.validation_mean:.4g}",
             f"{d.validation_std:.3g}", f"{d.shift:+.2f}", d.outside, "LEFT ITS RANGE" if d.left_the_range else "")
            for d in drifts
        ],
    )  # fmt: skip


def _shapes_table(plan: StudyPlan) -> Table:
    """Widths and ratios with their depths and exact counts."""
    groups: dict[tuple[int, int], list[tuple[Shape, int]]] = {}
    for shape, n_params in plan.shapes:
        groups.setdefault((shape.d_model, shape.d_ff), []).append((shape, n_params))

    def ends(values: Sequence[int]) -> str:
        low, high = min(values), max(values)
        return f"{low:,}" if low == high else f"{low:,} … {high:,}"

    rows = [
        (d_model, d_ff, ends([shape.n_layers for shape, _ in members]),
         " ".join(map(str, sorted({shape.n_heads for shape, _ in members}))),
         ends([n_params for _, n_params in members]), len(members))
        for (d_model, d_ff), members in groups.items()
    ]  # fmt: skip
    budget = plan.spec.budget
    title = f"{len(plan.shapes):,} feasible shapes inside {budget.low:,} … {budget.high:,} parameters"
    return Table("shapes", title, ["d_model", "d_ff", "n_layers", "heads", "parameters", ("shapes", "whole")], rows)


def _print_estimate(console: Console, plan: StudyPlan) -> None:
    estimate, memory = plan.estimate, plan.estimate.memory
    low, middle, high = map(duration, estimate.trial_s)
    print_lines(
        console,
        f"\nOn this machine ({estimate.matmul_gflops:,.0f} GFLOP/s in matrix products), at most, if all epochs run:",
        f"  a trial {low} (smallest shape), {middle} (median), {high} (largest)",
        f"  the study {duration(estimate.study_s)}; early stopping often halves it",
    )
    print_tables(console, _memory_table(memory))
    if any(row.fitting is None for row in memory[:2]):
        print_lines(console, "WARNING: the largest shapes don't fit: they will be recorded as out of memory")
    n = memory[0].layout.n_devices
    if n > 1 and memory[0].footprint.total < memory[0].device_bytes / 4:
        print_lines(console, f"Small trials: --workers {n} trains {n} at once, one on each device, which is faster")


def _memory_table(memory: Sequence[MemoryRow]) -> Table:
    rows = []
    for row in memory:
        verdict = "DOESN'T FIT"
        if row.fitting is not None:
            remat = "layers computed again" if row.fitting.remat else ""
            micro = f"micro-batch {row.fitting.micro_batch}" if row.fitting.micro_batch < row.batch_size else ""
            verdict = ", ".join(filter(None, (remat, micro))) or "fits"
        need = row.footprint
        rows.append(
            (row.machine, f"{shape_words(row.shape)} ({count(row.param_count)})", str(row.layout), need.parameters,
             need.gradients, need.moments, need.activations, row.recomputed_bytes, need.total, row.device_bytes,
             verdict)
        )  # fmt: skip
    columns: list[Column] = ["on", "shape", "mesh"]
    for head in ("parameters", "gradients", "AdamW", "activations", "recomputed", "total", "usable"):
        columns.append((head, "bytes"))
    title = "Memory on each device, estimated (recomputed: activations if layers are computed again)"
    return Table("memory", title, [*columns, ""], rows)


# --- the queue --------------------------------------------------------------------------------------------------------


def print_queue(console: Console, listings: Sequence[QueueListing]) -> None:
    """Every entry of every study's queue: its state, its trial and its training values."""
    for listing in listings:
        if not listing.rows:
            print_lines(console, f"{listing.study}: the queue is empty")
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
            "id", "state", ("trial", "whole"), "shape", ("parameters", "whole"), "training", "note",
        ]  # fmt: skip
        print_tables(console, Table("queue", title, columns, rows))


def print_edit(console: Console, edit: QueueEdit, verb: str) -> None:
    """What was added to a file's queue, or cancelled in it."""
    print_lines(console, f"{verb} {edit.identity} of {edit.study}: {shape_words(edit.entry.shape)}")
