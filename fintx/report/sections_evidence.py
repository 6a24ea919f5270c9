"""What does a report say for and against the best trial? Beside its baselines, confirmed, by year."""

from __future__ import annotations

import numpy as np

from fintx.data.bars import Bars
from fintx.evaluate import direction, metrics
from fintx.evaluate.direction import Mirror
from fintx.report import answer, figures_evidence, setting, sheet
from fintx.report import confirmation as told
from fintx.report.answer import percent_interval, skill_interval
from fintx.report.evidence import Evidence
from fintx.report.figures_evidence import Row
from fintx.report.page import Block, Prose, Section
from fintx.report.sheet import Format, Sheet
from fintx.report.words import metric_words, number, percent, shape_words, span
from fintx.study import lead
from fintx.study.confirmation import Candidate, Confirmation
from fintx.study.records import TrialRecord
from fintx.tasks import Prediction
from fintx.types import Floats

_SHOWN: dict[Prediction, tuple[str, ...]] = {
    "probability": ("log_loss", "auc", "brier", "average_precision", "calibration_error"),
    "value": ("mse", "mae", "correlation", "sign_accuracy"),
}
_VOLATILITY = ("volatility_", "vix_", "garch_")
_FOREST = 8


def beside_baselines(evidence: Evidence) -> Section:
    """The best trial and every baseline on the same rows; gains with intervals."""
    best = evidence.best
    first, *others = _SHOWN[evidence.spec.task.predicts]
    columns: list[tuple[str, Format]] = [
        ("", "text"), (_head(first), "number"), ("skill", "percent"), ("the trial gains", "number"),
        ("95 % interval", "text"), *((_head(key), "number") for key in others), ("what it is", "text"),
    ]  # fmt: skip
    rows: list[tuple[object, ...]] = []
    if best is not None:
        held = best.best
        rows.append((f"best trial ({best.trial_number})", held.get(first), evidence.skill(held), None, None,
                     *(held.get(key) for key in others), shape_words(best.config.shape)))  # fmt: skip
    sign = 1 if evidence.minimize else -1
    for name, baseline in sorted(
        evidence.baselines.items(), key=lambda pair: sign * (pair[1]["metrics"].get(evidence.metric) or 0.0)
    ):
        held, gain = baseline["metrics"], answer.gain(evidence, name)
        rows.append((name, held.get(first), evidence.skill(held), gain.mean if gain else None,
                     span(gain.low, gain.high) if gain else None, *(held.get(key) for key in others),
                     baseline["words"]))  # fmt: skip
    n = best.best.get("n") if best is not None else None
    made = sheet.of(
        "baselines", f"On the same {number(n)} validation rows", columns, rows, marked=(0,) if best is not None else (),
        note=f"What the trial gains is in {metric_words(evidence.metric)}; days are resampled in blocks. The best "
        "trial was chosen on these rows; the baselines were not.",
    )  # fmt: skip
    return Section("baselines", "The best trial and what it must beat", (made,))


def _head(key: str) -> str:
    return {"auc": "AUC", "brier": "Brier"}.get(key, key.replace("_", " "))


# --- confirmation -----------------------------------------------------------------------------------------------------


def confirmation_section(evidence: Evidence, found: Confirmation | None) -> Section:
    """The best trials trained again, or what the search alone says of them."""
    if found is not None and any(each.verdict for each in found.candidates):
        words = [
            told.answer(found),
            *(each[0].upper() + each[1:] for each in (told.alike(found), told.luck(found)) if each),
        ]
        words += [note[0].upper() + note[1:] for note in found.notes]
        if not found.complete:
            words.append(f"Unfinished: {found.n_trained} of {found.n_members} runs are trained.")
        return Section(
            "confirmation", "Confirmation",
            (Prose(tuple(words)), _confirmed_forest(found), _candidates(found), *_groups(found)),
        )  # fmt: skip
    blocks: list[Block] = [
        Prose(
            f"Nothing is confirmed yet: `just confirm {evidence.name}` trains the best trials again with fresh seeds. "
            "Below, the search's own figures: the luck of having been chosen is in them.",
            "note",
        )
    ]
    rows = []
    for record in evidence.ranked[:_FOREST]:
        gain = answer.gain(evidence, evidence.rival, record.trial_number) if evidence.rival else None
        if gain is not None:
            rows.append(Row(_who(record), gain.mean, gain.low, gain.high, gain.positive))
    if rows and evidence.rival is not None:
        blocks.append(
            figures_evidence.forest(
                rows, baseline=evidence.rival, unit=metric_words(evidence.metric), name="forest",
                title="The best trials against the best baseline, unconfirmed",
                caption="Mean gain with its 95 % interval over other days; green where it lies above zero.",
            )
        )  # fmt: skip
    return Section("confirmation", "Confirmation", tuple(blocks))


def _who(record: TrialRecord) -> str:
    return f"trial {record.trial_number} · {record.d_model} × {record.n_layers}"


def _confirmed_forest(found: Confirmation) -> Block:
    rows = []
    for each in found.candidates:
        if each.verdict is not None:
            gain = each.verdict.gain
            words = f"trial {each.trial} · {each.shape.d_model} × {each.shape.n_layers}"
            rows.append(Row(words, gain.mean, gain.low, gain.high, each.verdict.confirmed))
            if each.ensemble is not None:
                gain = each.ensemble.gain
                rows.append(Row("its ensemble", gain.mean, gain.low, gain.high, gain.positive))
    return figures_evidence.forest(
        rows, baseline=found.baseline, unit=metric_words(found.loss), name="forest", title="Confirmation",
        caption=f"Mean gain of each candidate, trained again with {len(found.seeds)} fresh seeds, with its "
        f"{told.level(found)} interval over other days and seeds; green: confirmed.",
    )  # fmt: skip


def _candidates(found: Confirmation) -> Sheet:
    columns: list[tuple[str, Format]] = [
        ("trial", "text"), ("shape", "text"), ("parameters", "size"), (f"search {found.metric}", "number"),
        ("fresh", "number"), ("gain", "number"), ("interval", "text"), ("behind the best", "number"),
        ("ensemble's gain", "number"), ("result", "text"),
    ]  # fmt: skip
    rows = [_candidate(each) for each in found.candidates]
    p = f" SPA p = {number(found.superior_p_value)} with {found.n_compared} trials." if found.superior_p_value else ""
    note = f"Gains in {metric_words(found.loss)} over {found.baseline}.{p}"
    return sheet.of("confirmation", "Candidates", columns, rows, note=note)


def _candidate(each: Candidate) -> tuple[object, ...]:
    verdict = each.verdict
    return (
        str(each.trial), shape_words(each.shape), each.param_count, each.search_value, each.mean_value,
        verdict.gain.mean if verdict else None,
        span(verdict.gain.low, verdict.gain.high) if verdict else None,
        verdict.behind.mean if verdict and verdict.behind else None,
        each.ensemble.gain.mean if each.ensemble else None, each.words,
    )  # fmt: skip


def _groups(found: Confirmation) -> list[Block]:
    """Where the best candidate's gain comes from."""
    best = found.best
    blocks: list[Block] = []
    if best is None:
        return blocks
    for kind, title in (("fold", "fold"), ("year", "year"), ("vix", "third of VIX")):
        groups = [group for group in best.groups if group.kind == kind]
        if len(groups) > 1:
            rows = [(g.name, g.n, g.gain.mean, span(g.gain.low, g.gain.high)) for g in groups]
            columns: list[tuple[str, Format]] = [
                (title, "text"),
                ("rows", "whole"),
                ("gain", "number"),
                ("interval", "text"),
            ]
            blocks.append(sheet.of(f"confirmed_by_{kind}", f"Gain of trial {best.trial} by {title}", columns, rows))
    return blocks


# --- volatility or direction ------------------------------------------------------------------------------------------


def direction_section(evidence: Evidence, bars: dict[str, Bars]) -> Section | None:
    """For threshold tasks: the mirror test, years, and the lead over volatility through time."""
    best, rows = evidence.best, evidence.rows
    if (
        evidence.spec.task.rule.level is None
        or best is None
        or rows is None
        or best.trial_number not in evidence.outputs
    ):
        return None
    outputs = evidence.outputs[best.trial_number]
    rival = volatility_rival(evidence)
    blocks: list[Block] = []
    mirrored = setting.opposite(evidence, bars)
    if mirrored is None:
        blocks.append(Prose("The mirror test needs the study's prices: give --data-dir.", "note"))
    else:
        names = {f"trial {best.trial_number}": outputs} | ({rival: rows.baselines[rival]} if rival else {})
        found = {
            name: direction.mirror_test(each, rows.labels, mirrored, horizon=evidence.spec.task.horizon)
            for name, each in names.items()
        }
        within = {name: direction.within_year_auc(each, rows.labels, rows.dates) for name, each in names.items()}
        blocks += [Prose(_mirror_words(next(iter(found.values())))), _mirror_sheet(found, within)]
    blocks.append(_years(evidence, outputs, rival))
    if rival is not None:
        mine, theirs = (
            metrics.per_sample_loss(rows.predicts, each, rows.labels) for each in (outputs, rows.baselines[rival])
        )
        sums = direction.cumulative_gain(mine, theirs, rows.dates)
        share = sums.best_year_share
        if share is not None:
            blocks.append(
                Prose(
                    f"Of the whole lead over {rival} ({number(sums.total, 2)} nats), the best year brought "
                    f"{percent(share)}; the deepest fall from a peak was {number(sums.deepest_fall, 2)} nats."
                )
            )  # fmt: skip
        blocks.append(
            figures_evidence.cumulative(
                sums.dates, {f"trial {best.trial_number}": sums.gain}, against=rival, unit="nats"
            )
        )
    return Section("direction", "Volatility or direction", tuple(blocks))


def volatility_rival(evidence: Evidence) -> str | None:
    """The best baseline that knows volatility alone; none without one."""
    if evidence.rows is None:
        return None
    best = lead.best_baseline(evidence.rows, among=[n for n in evidence.rows.baselines if n.startswith(_VOLATILITY)])
    return None if best is None else best[0]


def _mirror_words(found: Mirror) -> str:
    if found.auc is None or found.opposite_auc is None or found.direction_auc is None:
        return "One of the two events never came: nothing can be said of direction."
    se = found.direction_se
    told_apart = se is not None and found.direction_auc - 1.645 * se > 0.5
    side = "more than chance" if told_apart else "no knowledge of direction is shown"
    error = f" ± {1.96 * se:.3f}" if se is not None else ""
    return (
        f"The same probabilities score the opposite event at AUC {found.opposite_auc:.3f}, the event itself at "
        f"{found.auc:.3f}. On the {found.one_sided:,} rows where exactly one side was touched they say which at AUC "
        f"{found.direction_auc:.3f}{error} (.5 is chance): {side}."
    )


def _mirror_sheet(found: dict[str, Mirror], within: dict[str, float | None]) -> Sheet:
    columns: list[tuple[str, Format]] = [
        ("", "text"), ("event AUC", "number"), ("opposite AUC", "number"), ("base rate", "percent"),
        ("opposite rate", "percent"), ("one-sided rows", "whole"), ("which-side AUC", "number"), ("SE", "number"),
        ("within-year AUC", "number"),
    ]  # fmt: skip
    rows = [
        (name, m.auc, m.opposite_auc, m.base_rate, m.opposite_rate, m.one_sided, m.direction_auc, m.direction_se,
         within[name])
        for name, m in found.items()
    ]  # fmt: skip
    note = "Within-year AUC compares days of the same year alone: telling wild years from calm ones is no skill in it."
    return sheet.of("mirror", "Mirror test", columns, rows, note=note)


def _years(evidence: Evidence, outputs: Floats, rival: str | None) -> Sheet:
    rows = evidence.rows
    assert rows is not None
    prior = np.array([evidence.baselines["prior"]["folds"][int(f)]["prior"] for f in rows.fold])
    against = rows.baselines[rival] if rival else None
    found = direction.by_year(outputs, rows.labels, rows.dates, prior=prior, rival=against)
    columns: list[tuple[str, Format]] = [
        ("year", "text"), ("rows", "whole"), ("base rate", "percent"), ("log loss", "number"), ("skill", "percent"),
        ("AUC", "number"), (f"nats per row saved against {rival}", "number"),
    ]  # fmt: skip
    made = [(str(y.year), y.n, y.base_rate, y.log_loss, y.skill, y.auc, y.gain) for y in found]
    return sheet.of("by_year", "By year", columns, made)


def facts(evidence: Evidence) -> tuple[tuple[str, str], ...]:
    """The figures in a row below the answer."""
    best = evidence.best
    found = [("trials", f"{len(evidence.records)} of {evidence.spec.study.n_trials}")]
    if best is None:
        return tuple(found)
    found.append((f"best {_head(evidence.spec.study.metric)}", number(best.value)))
    measured = skill_interval(evidence, best.trial_number)
    found.append(
        ("its skill over the prior", percent_interval(measured) if measured else percent(evidence.skill(best.best)))
    )
    if evidence.rival is not None:
        held = evidence.baselines[evidence.rival]["metrics"]
        found.append(
            (
                f"best baseline, {evidence.rival}",
                f"{number(held.get(evidence.metric))} ({percent(evidence.skill(held))})",
            )
        )
    found += [
        ("best shape", f"{best.d_model} × {best.n_layers}, {best.n_heads} heads"),
        ("parameters", f"{best.param_count:,}"),
    ]
    return tuple(found)
