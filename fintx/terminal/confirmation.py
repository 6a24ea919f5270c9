"""How is a confirmation told? Its answer in a sentence first, then every candidate, then where the gain comes from."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from fintx.evaluate import significance
from fintx.evaluate.significance import Estimate
from fintx.report.confirmation import alike, answer, luck, span
from fintx.report.words import count, metric_words, number, shape_words
from fintx.study.confirm import Confirmed
from fintx.study.confirmation import Candidate, Confirmation
from fintx.study.sealed import Opening
from fintx.terminal.tables import show, table

_KEYS = ("log_loss", "skill", "auc", "brier", "calibration_error", "mse", "mae", "correlation")
"""Those that a task's kind has."""


def print_confirmed(console: Console, result: Confirmed) -> None:
    """What a run of a confirmation came to, and what it leaves to do."""
    for aside in result.left_aside:
        _line(console, f"left aside  {aside}")
    if result.left_aside:
        _line(console, "Give the same command again to try them again.")
    if result.confirmation is not None:
        print_confirmation(console, result.confirmation)
        _line(console, f"Kept in    {result.folder}/confirmation.json")
        if result.confirmation.complete and result.confirmation.confirmed:
            _line(
                console, f"Next       just eval {result.folder} --test     (opens the sealed test part; it is logged)"
            )


def print_confirmation(console: Console, found: Confirmation) -> None:
    """The whole of it."""
    console.rule(
        f"{found.study}: the best {len(found.candidates)} trained again, {found.n_trained} of {found.n_members}"
    )
    _line(console, answer(found))
    for words in (alike(found), luck(found), *found.notes, *_unfinished(found)):
        if words:
            _line(console, words[0].upper() + words[1:] + ("" if words.endswith(".") else "."))
    if any(each.verdict for each in found.candidates):
        _print_candidates(console, found)
        _print_groups(console, found)


def _print_candidates(console: Console, found: Confirmation) -> None:
    heads = [
        "trial", "shape", "parameters", f"search {found.metric}", "fresh", "SD of seeds", f"gain over {found.baseline}",
        "behind the best", "ensemble's gain", "result",
    ]  # fmt: skip
    rows = []
    for each in found.candidates:
        verdict, ensemble = each.verdict, each.ensemble
        behind = verdict.behind if verdict else None
        rows.append(
            [
                str(each.trial), shape_words(each.shape), count(each.param_count), number(each.search_value),
                number(each.mean_value), number(_spread(each)), _estimate(verdict.gain if verdict else None),
                _estimate(behind), _estimate(ensemble.gain if ensemble else None), each.words,
            ]
        )  # fmt: skip
    _line(
        console,
        f"\nOn {found.n_rows:,} validation rows of {found.n_days:,} days (blocks of {found.block} days); "
        f"gains in {metric_words(found.loss)}",
    )
    show(console, table("", heads, rows, left=("shape", "result")))


def _print_groups(console: Console, found: Confirmation) -> None:
    """Where the best candidate's gain comes from: folds, years, and the thirds of VIX."""
    best = found.best
    if best is None:
        return
    for kind, title in (("fold", "fold"), ("year", "year"), ("vix", "days of VIX")):
        groups = [group for group in best.groups if group.kind == kind]
        if len(groups) < 2:
            continue
        gains = [group.gain.mean for group in groups]
        ahead = sum(gain > 0 for gain in gains)
        mean = sum(gains) / len(gains)
        spread = (sum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1)) ** 0.5
        rows = [[group.name, f"{group.n:,}", _estimate(group.gain)] for group in groups]
        _line(
            console,
            f"\nTrial {best.trial} by {title}: ahead in {ahead} of {len(groups)}, SD between them {number(spread)}",
        )
        show(console, table("", [title, "rows", f"gain over {found.baseline}"], rows))


def _unfinished(found: Confirmation) -> Sequence[str]:
    if found.complete:
        return ()
    return (
        f"{found.n_trained} of {found.n_members} trainings are done; compared are the {len(found.seeds)} of "
        f"{found.n_seeds} seeds that every candidate has; the same command continues",
    )


def _spread(candidate: Candidate) -> float | None:
    known = [value for value in candidate.values if value is not None]
    if len(known) < 2:
        return None
    mean = sum(known) / len(known)
    return (sum((value - mean) ** 2 for value in known) / (len(known) - 1)) ** 0.5


def print_opening(console: Console, opening: Opening) -> None:
    """What the sealed test part says."""
    title = f"{opening.study}: the sealed test part, {opening.first_date} … {opening.last_date}"
    console.rule(title)
    for note in opening.notes:
        _line(console, f"Note: {note}")
    for each in opening.models:
        if (doubt := significance.too_good(each.metrics)) is not None:
            _line(console, f"WARNING: {each.name}: {doubt}")
    keys = [key for key in _KEYS if key in opening.models[0].metrics]
    rows = [
        [each.name, *(number(each.metrics.get(key)) for key in keys), _estimate(each.gain)]
        for each in (*opening.models, *opening.baselines)
    ]
    heads = ["", *keys, f"gain over {opening.baseline}"]
    show(console, table(f"On the same {opening.n_rows:,} rows (blocks of {opening.block} days)", heads, rows))
    last = opening.models[-1]
    if len(last.per_asset) > 1:
        rows = [[asset, *(number(held.get(key)) for key in keys)] for asset, held in last.per_asset.items()]
        show(console, table(f"{last.name}, per asset", ["asset", *keys], rows))
    _line(
        console, f"{opening.baseline} was the best baseline on validation; gains are in {metric_words(opening.loss)}."
    )


def _estimate(each: Estimate | None) -> str:
    return "–" if each is None else f"{number(each.mean)} [{span(each)}]"


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
