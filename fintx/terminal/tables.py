"""How are results printed? One function per command; no computation beyond what a line of text needs."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from fintx.config.schema import Shape
from fintx.evaluate import power, significance
from fintx.report.sheet import Sheet
from fintx.report.words import count, duration, number, percent, shape_words, size
from fintx.study import records
from fintx.study.records import Metrics
from fintx.terminal import verdict
from fintx.types import FintxError

if TYPE_CHECKING:  # what is printed has been made by then; to import its makers takes seconds
    from fintx.data.scaling import Drift
    from fintx.data.splits import PartRow
    from fintx.data.windows import Prepared
    from fintx.study.evaluation import Evaluation
    from fintx.study.ledger import Claim
    from fintx.study.plan import DepthsAnswer, MemoryRow, Plan, ShapeAnswer
    from fintx.study.queue import QueueState
    from fintx.study.queuefile import Edit, Listing
    from fintx.study.runner import Failure, Summary
    from fintx.study.status import StudyStatus

_COMPARED = ("log_loss", "skill", "auc", "brier", "calibration_error")
_COMPARED_REGRESSION = ("mse", "skill", "mae", "correlation")


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], *, left: Sequence[str] = ()) -> Table:
    """A plain table: numbers to the right, the named columns to the left."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for head in heads:
        made.add_column(head, justify="left" if head in left or head == heads[0] else "right", no_wrap=head != "note")
    for row in rows:
        made.add_row(*row)
    return made


def show(console: Console, made: Table) -> None:
    """Print a table whole: a number cut off to fit a narrow terminal is worse than a line that wraps."""
    before = console.width
    needed = console.measure(made, options=console.options.update(max_width=1_000)).maximum
    console.width = max(before, needed)
    console.print(made)
    console.width = before


def print_sheets(
    console: Console, before: Sequence[str], sheets: Sequence[Sheet], after: Sequence[str] = ()
) -> None:  # fmt: skip
    """Tables of a report, with what is said before and after them."""
    for words in before:
        _line(console, words)
    for sheet in sheets:
        made = table(f"\n{sheet.title}", sheet.heads, sheet.cells)
        for column, left in zip(made.columns, sheet.left, strict=True):
            column.justify, column.no_wrap = "left" if left else "right", True
        show(console, made)
        if sheet.note:
            console.print(sheet.note, highlight=False, soft_wrap=True, markup=False, style="dim")
    for words in after:
        _line(console, words)


def print_summary(console: Console, summary: Summary) -> None:
    """The end of a sweep: the best trial beside what it must beat, and where everything lies."""
    spec, best = summary.spec, summary.best
    failed = Counter(record.outcome for record in summary.records if record.value is None)
    outcomes = "".join(f", {n} {outcome.replace('_', ' ')}" for outcome, n in failed.items())
    console.rule(f"{spec.study.name}: {len(summary.records)} of {spec.study.n_trials} trials finished{outcomes}")
    if best is not None:
        _line(console, _verdict(summary))
        if (doubt := significance.too_good(best.best)) is not None:
            _line(console, f"WARNING: {doubt}")
    if opened := records.openings_words(summary.folder):
        _line(console, f"Note: {opened}.")
    if spec.study.question:
        _line(console, spec.study.question)
    if best is None:
        _line(console, "No trial succeeded yet: see each record's `outcome` and `detail`.")
    else:
        beaten = {name: held["metrics"] for name, held in summary.baselines.items()}
        show(console, _beside_baselines(f"best trial ({best.trial_number})", best.best, beaten))
        if best.value_se is not None:
            value, n_seeds = number(best.value), 1 + len(best.replicates)
            _line(console, f"Its {best.metric} {value} is the mean over {n_seeds} seeds, ± {number(best.value_se)}")
        _line(console, f"Best shape: {shape_words(best.config.shape)} = {best.param_count:,} parameters")
    folder = summary.folder
    _line(console, f"Records    {folder}/trials/*/record.json   (tables: {folder.name}_all_trials.json, …_best.json)")
    if best is not None and summary.predictions_here:
        _line(console, f"Checkpoint {records.trial_folder(folder, best.trial_number)}/checkpoint")
    _line(console, f"All trials {folder.parent}/experiment_results.csv")
    if best is not None and summary.predictions_here:
        _line(console, f"Next       just confirm {folder}     just eval {folder}     just status")


def _beside_baselines(
    name: str, mine: Metrics, baselines: Mapping[str, Metrics], *, rows_words: str = "validation rows"
) -> Table:
    """A model's scores above those of all that must be beaten, on the identical rows."""
    keys = _COMPARED if "log_loss" in mine else _COMPARED_REGRESSION
    rows = [[each, *(number(held.get(key)) for key in keys)] for each, held in ((name, mine), *baselines.items())]
    return table(f"\nOn the same {number(mine.get('n'))} {rows_words}", ["", *keys], rows)


def _verdict(summary: Summary) -> str:
    """Whether the winner beats the best baseline by more than noise, or why that can't be said here."""
    comparison, best = summary.comparison, summary.best
    if best is not None and comparison is None and not summary.predictions_here:
        return f"The best trial's predictions lie on {best.host}: compare it with the baselines there."
    return (
        f"No baseline has a {summary.spec.study.metric}."
        if comparison is None
        else verdict.sentence(comparison, len(summary.records))
    )


def print_unfinished(console: Console, summary: Summary) -> None:
    """What a run leaves to do: trials whose attempts all failed, and queue entries without room."""
    for line in summary.left_aside:
        _line(console, f"left aside  {line}")
    if summary.left_aside:
        _line(console, "Give the same command again to try them again.")
    if summary.waiting and not summary.interrupted:
        ids = ", ".join(summary.waiting)
        _line(
            console,
            f"Still queued: {ids}. All {summary.spec.study.n_trials} trials are spoken for; raise study.n_trials.",
        )


def print_results(console: Console, results: Sequence[Summary | Failure]) -> None:
    """One line per study of a run of several."""
    from fintx.study.runner import Failure

    rows = []
    for result in results:
        if isinstance(result, Failure):
            rows.append([result.spec.study.name, "–", "failed", "–", _first_line(result.problem)])
            continue
        spec, best = result.spec, result.best
        state = "failed" if result.problem else "stopped" if result.interrupted else "done"
        done = f"{len(result.records)}/{spec.study.n_trials}"
        value = f"{spec.study.metric} {number(best.value)}" if best else "–"
        rows.append([spec.study.name, done, state, value, _first_line(result.problem) if result.problem else ""])
    heads = ["study", "finished", "state", "best", "note"]
    show(console, table("\nAll studies", heads, rows, left=("state", "best", "note")))


def _first_line(problem: FintxError) -> str:
    return str(problem).partition("\n")[0]


def print_status(console: Console, statuses: Sequence[StudyStatus]) -> None:
    """One line per study, and below one per trial that is under way or was left unfinished."""
    rows = []
    for status in statuses:
        best = status.best
        rows.append(
            [
                status.name,
                f"{status.finished}/{status.n_trials}",
                "running" if status.running else "done" if status.finished >= status.n_trials else "stopped",
                ", ".join(f"{n} {outcome}" for outcome, n in _failures(status).items()) or "0",
                f"{status.metric} {number(best.value)}" if best else "–",
                percent(best.best.get("skill")) if best else "–",  # type: ignore[arg-type]
                verdict.to_beat(status.comparison),
                verdict.standing(status.comparison),
                f"{shape_words(best.config.shape)} ({count(best.param_count)})" if best else "–",
                duration(status.eta) if status.finished < status.n_trials else "–",
                status.confirmation,
                str(status.test_openings),
            ]
        )
    heads = ["study", "finished", "state", "failed", "best", "skill", "to beat", "best trial", "best shape", "to go",
             "confirmed", "test opened"]  # fmt: skip
    show(console, table("", heads, rows, left=("state", "failed", "best", "to beat", "best trial", "best shape")))
    for status in statuses:
        if status.doubt:
            _line(console, f"WARNING: {status.name}: {status.doubt}")
        if status.note:
            _line(console, f"Note: {status.name}: {status.note}.")
    unfinished = [
        [
            status.name, str(claim.number), _claim_state(status, claim), f"{claim.step:,}", str(claim.attempt),
            f"{claim.host}, process {claim.pid}" if claim.pid else claim.host, shape_words(claim.shape), claim.detail,
        ]
        for status in statuses
        for claim in status.unfinished
    ]  # fmt: skip
    if unfinished:
        heads = ["study", "trial", "state", "step", "attempt", "on", "shape", "note"]
        show(console, table("\nUnfinished trials", heads, unfinished, left=("state", "on", "shape", "note")))


def _failures(status: StudyStatus) -> dict[str, int]:
    crashed = sum(claim.failures for claim in status.unfinished)
    return {**status.failed, **({"crashed or hung": crashed} if crashed else {})}


def _claim_state(status: StudyStatus, claim: Claim) -> str:
    """A lease that says running, of a study that nobody runs here, was cut off: the next run takes it up."""
    here = claim.host == socket.gethostname()
    return "cut off" if claim.state == "running" and here and not status.running else claim.state


def print_evaluation(console: Console, result: Evaluation) -> None:
    """Every metric, beside the recorded one where there is one."""
    console.rule(f"{result.title}: {result.first_date} … {result.last_date}")
    _line(console, f"{result.checkpoint}   {result.param_count:,} parameters")
    for note in result.notes:
        _line(console, f"Note: {note}")
    heads = ["metric", "value"] + (["recorded", ""] if result.recorded else [])
    rows = []
    for key, value in result.metrics.items():
        row = [key, number(value, 6)]
        if result.recorded:
            recorded = result.recorded.get(key)
            row += [number(recorded, 6), "equal" if recorded == value else "DIFFERS"]
        rows.append(row)
    show(console, table("", heads, rows))
    if result.baselines:
        rows_words = "validation rows" if result.recorded else "rows"
        show(console, _beside_baselines("this model", result.metrics, result.baselines, rows_words=rows_words))
    if len(result.per_asset) > 1:
        keys = [key for key in ("n", *_COMPARED, *_COMPARED_REGRESSION) if key in next(iter(result.per_asset.values()))]
        keys = list(dict.fromkeys(keys))
        rows = [[asset, *(number(held.get(key)) for key in keys)] for asset, held in result.per_asset.items()]
        show(console, table("Per asset", ["asset", *keys], rows))


def print_params(console: Console, answer: ShapeAnswer | DepthsAnswer) -> None:
    """Counts of one shape, or the depths that fit a budget."""
    from fintx.study.plan import DepthsAnswer

    if isinstance(answer, DepthsAnswer):
        budget = answer.budget
        title = f"Depths inside {budget.low:,} … {budget.high:,} parameters"
        heads = ["d_model", "d_ff / d_model", "d_ff", "n_layers", "parameters", "heads"]
        rows = [
            [str(width), f"{ratio:g}", str(round(width * ratio)), f"{low} … {high}", f"{n_low:,} … {n_high:,}",
             " ".join(map(str, answer.head_counts[width]))]
            for width, ratio, low, n_low, high, n_high in answer.rows
        ]  # fmt: skip
        show(console, table(title, heads, rows, left=("heads",)))
        return
    counted = answer.count
    _line(console, shape_words(answer.shape))
    rows = [[name, f"{n:,}"] for name, n in {**counted.parts, "total": counted.total}.items()]
    show(console, table("", ["part", "parameters"], rows))
    flops = answer.flops
    _line(console, f"FLOPs per sample: {flops.forward:.3g} forward, {flops.backward:.3g} backward (multiply-add = 2)")
    _line(console, f"Training state (parameters, gradients, AdamW): {size(answer.state_bytes)}")
    _line(console, f"Head counts that divide d_model: {' '.join(map(str, answer.head_counts))}")
    if answer.budget is not None:
        budget = answer.budget
        inside = budget.low <= counted.total <= budget.high
        verdict = "fits" if inside else "is OUTSIDE"
        _line(console, f"{count(counted.total)} {verdict} the budget {budget.low:,} … {budget.high:,}")


def print_ingest(console: Console, result: Any) -> None:
    """What an import kept, dropped and repaired."""
    entry = result.entry
    kept = "kept as a new version" if result.is_new else "is known already; nothing written"
    _line(console, f"{entry.name}: {entry.rows:,} bars {entry.first_date} … {entry.last_date}, {kept}")
    _line(console, f"version {entry.version[:16]}")
    for words in result.notes:
        _line(console, f"  {words}")


def print_data(console: Console, raw: Sequence[Any], processed: Sequence[Any]) -> None:
    """What is ingested, oldest first."""
    for title, entries in (("Raw bars", raw), ("Processed features", processed)):
        rows = [
            [e.name, e.version[:12], f"{e.rows:,}", str(e.first_date), str(e.last_date), e.created] for e in entries
        ]
        if rows:
            show(console, table(title, ["name", "version", "rows", "first", "last", "created"], rows))
        else:
            _line(console, f"{title}: none")


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def print_plan(console: Console, plan: Plan) -> None:
    """Everything that a sweep file would run, and on what."""
    spec, prepared = plan.spec, plan.prepared
    console.rule(f"{spec.study.name}: the plan (nothing is run, nothing is written)")
    console.print(plan.resolved, highlight=False, markup=False, soft_wrap=True, style="dim")
    show_data(console, prepared)
    _print_power(console, plan)
    show(console, _drift_table(prepared.drift))
    _print_shapes(console, plan)
    _print_queue(console, plan)
    _print_estimate(console, plan)


def show_data(console: Console, prepared: Prepared) -> None:
    """Data range, label in words, and the split with its base rates and what its validation part can show."""
    rows = [[r.symbol, f"{r.bars:,}", r.first, r.last, r.version[:12]] for r in prepared.ranges]
    show(console, table("Data", ["symbol", "bars", "first", "last", "version"], rows))
    n_features = len(prepared.data.features)
    _line(console, f"{n_features} features per bar; dropped rows: {_counts(prepared.dropped)}\n")
    _line(console, f"Label: {prepared.label_words}")
    show(console, _split_table(prepared.parts))
    _line(console, "effective n: overlapping labels counted by their average uniqueness; the SEs use it (AUC at .7)\n")


def _counts(held: dict[str, int]) -> str:
    return "; ".join(f"{n:,} {reason}" for reason, n in held.items())


def _split_table(parts: Sequence[PartRow]) -> Table:
    heads = ["part", "first", "last", "n", "positives", "base rate", "effective n", "SE log loss", "SE AUC"]
    rows = [
        [
            part.part, part.first, part.last, f"{part.n:,}",
            "sealed" if part.base_rate is None else number(part.positives),
            "sealed" if part.base_rate is None else number(part.base_rate),
            f"{part.n_effective:,.0f}", number(part.se_log_loss), number(part.se_auc, 3),
        ]
        for part in parts
    ]  # fmt: skip
    return table("Split", heads, rows)


def _print_power(console: Console, plan: Plan) -> None:
    """What the validation rows can show at all, before anything is trained."""
    if not plan.power:
        return
    rows = [
        [name, f"{p.n:,}", f"{p.n_effective:,.0f}", number(p.paired_se), number(p.detectable), number(p.luck_nats)]
        for name, p in plan.power
    ]
    n_trials, (_, whole) = plan.spec.study.n_trials, plan.power[-1]
    heads = ["rows", "n", "effective n", "SE of a difference", "smallest seen", f"luck of the best of {n_trials}"]
    show(console, table("What the validation rows can show, in nats of log loss", heads, rows))
    _line(
        console,
        f"Two models on the same rows, their logits {power.LOGIT_GAP:g} apart (SD): a true gain below "
        f"{number(whole.detectable)} stays unseen in most studies, and of {n_trials} equal trials the best looks "
        f"{number(whole.luck_nats)} better than it is.\n",
    )


def _drift_table(drifts: Sequence[Drift]) -> Table:
    moved = sorted(drifts, key=lambda d: (not d.left_the_range, -d.outside, -abs(d.shift)))
    warned = sum(d.left_the_range for d in drifts)
    title = f"Drift, train to validation: {warned} of {len(drifts)} inputs have left their training range"
    heads = ["feature", "train mean", "SD", "validation mean", "SD", "shift (SDs)", "outside", ""]
    rows = [
        [d.feature, f"{d.train_mean:.4g}", f"{d.train_std:.3g}", f"{d.validation_mean:.4g}", f"{d.validation_std:.3g}",
         f"{d.shift:+.2f}", percent(d.outside), "LEFT ITS RANGE" if d.left_the_range else ""]
        for d in moved
    ]  # fmt: skip
    return table(title, heads, rows)


def _print_shapes(console: Console, plan: Plan) -> None:
    """Widths and ratios with their depths; exact counts at both ends."""
    budget = plan.spec.budget
    groups: dict[tuple[int, int], list[tuple[Shape, int]]] = {}
    for shape, total in plan.shapes:
        groups.setdefault((shape.d_model, shape.d_ff), []).append((shape, total))
    rows = []
    for (d_model, d_ff), members in groups.items():
        depths = sorted({shape.n_layers for shape, _ in members})
        totals = [total for _, total in members]
        heads = sorted({shape.n_heads for shape, _ in members})
        span = f"{depths[0]} … {depths[-1]}" if len(depths) > 1 else str(depths[0])
        sizes = f"{min(totals):,} … {max(totals):,}" if len(depths) > 1 else f"{totals[0]:,}"
        rows.append([str(d_model), str(d_ff), span, " ".join(map(str, heads)), sizes, str(len(members))])
    title = f"\n{len(plan.shapes):,} feasible shapes inside {budget.low:,} … {budget.high:,} parameters"
    show(console, table(title, ["d_model", "d_ff", "n_layers", "heads", "parameters", "shapes"], rows, left=("heads",)))


def _print_queue(console: Console, plan: Plan) -> None:
    n_trials, queued = plan.spec.study.n_trials, len(plan.queue)
    _line(console, f"\n{n_trials} trials: {min(queued, n_trials)} queued, {max(n_trials - queued, 0)} from the sampler")
    if queued > n_trials:
        _line(console, f"WARNING: {queued - n_trials} of {queued} queue entries find no room; raise study.n_trials")
    rows = [
        [row.identity, shape_words(row.shape), f"{row.param_count:,}", row.training, row.note] for row in plan.queue
    ]
    if rows:
        heads = ["id", "shape", "parameters", "training", "note"]
        show(console, table("Queue", heads, rows, left=("shape", "training", "note")))


def print_queue(console: Console, listings: Sequence[Listing]) -> None:
    """Every entry of every study's queue: how far it is, on which trial, and with which training values."""
    for listing in listings:
        rows = [
            [
                row.state.identity,
                row.state.state + (f" ({row.outcome.replace('_', ' ')})" if row.failed else ""),
                "–" if row.state.number is None else str(row.state.number),
                shape_words(row.state.entry.shape),
                f"{row.param_count:,}",
                _training(row.state),
                row.state.entry.note,
            ]
            for row in listing.rows
        ]
        if rows:
            heads = ["id", "state", "trial", "shape", "parameters", "training", "note"]
            made = table(
                f"{listing.study}: {_states(listing)}", heads, rows, left=("state", "shape", "training", "note")
            )
            show(console, made)
        else:
            _line(console, f"{listing.study}: the queue is empty")


def _training(state: QueueState) -> str:
    """Where an entry's open values come from, or will come from, and those that it names itself."""
    source = state.entry.training if state.number is None else state.training
    named = [f"{path} = {value}" for path, value in state.entry.values.items()]
    return ", ".join([*([source] if source else []), *named])


def _states(listing: Listing) -> str:
    found = Counter(row.state.state.partition(" ")[0] for row in listing.rows)
    return ", ".join(f"{n} {state}" for state, n in found.items())


def print_edit(console: Console, edit: Edit, verb: str) -> None:
    """What was added to a file's queue, or cancelled in it."""
    _line(console, f"{verb} {edit.identity} of {edit.study}: {shape_words(edit.entry.shape)}")


def _print_estimate(console: Console, plan: Plan) -> None:
    guess = plan.estimate
    low, middle, high = map(duration, guess.trial_s)
    _line(
        console, f"\nOn this machine ({guess.matmul_gflops:,.0f} GFLOP/s in matrix products), at most, all epochs run:"
    )
    _line(console, f"  a trial {low} (smallest shape), {middle} (median), {high} (largest)")
    _line(console, f"  the study {duration(guess.study_s)}; early stopping often halves it")
    show(console, _memory_table(guess.memory))
    if any(row.fitting is None for row in guess.memory[:2]):
        _line(console, "WARNING: the largest shapes don't fit: they will be recorded as out of memory")
    if guess.memory[0].layout.n_devices > 1 and guess.memory[0].footprint.total < guess.memory[0].device_bytes / 4:
        n = guess.memory[0].layout.n_devices
        _line(console, f"Small trials: --workers {n} trains {n} at once, one on each device, which is faster")


def _memory_table(rows: Sequence[MemoryRow]) -> Table:
    title = "\nMemory on each device, estimated (again: activations where layers are computed again)"
    heads = ["on", "shape", "mesh", "parameters", "gradients", "AdamW", "activations", "again", "all", "usable", ""]
    lines = [
        [
            row.machine, f"{shape_words(row.shape)} ({count(row.param_count)})", str(row.layout),
            *map(size, (row.footprint.parameters, row.footprint.gradients, row.footprint.moments,
                        row.footprint.activations, row.recomputed_bytes, row.footprint.total, row.device_bytes)),
            _relief(row),
        ]
        for row in rows
    ]  # fmt: skip
    return table(title, heads, lines, left=("shape", "mesh", ""))


def _relief(row: MemoryRow) -> str:
    if row.fitting is None:
        return "DOESN'T FIT"
    again = "layers computed again" if row.fitting.remat else ""
    smaller = row.fitting.micro_batch < row.batch_size
    return ", ".join(filter(None, (again, f"micro-batch {row.fitting.micro_batch}" if smaller else ""))) or "fits"
