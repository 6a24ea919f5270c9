"""What does `just scaling` write? One page on several studies that differ in size alone; also a study's own section."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np

from fintx.report import evidence, figures_evidence, page, scaling, sheet
from fintx.report.evidence import Evidence
from fintx.report.field import NotComparable, Over, gather
from fintx.report.figures import Picture
from fintx.report.figures_evidence import ScalingPlot
from fintx.report.page import Block, Page, Prose, Section
from fintx.report.powerlaw import BOUND
from fintx.report.scaling import Law, Reading, Scaling
from fintx.report.sheet import Format, Sheet
from fintx.report.words import count, number, percent
from fintx.study import records
from fintx.types import FintxError

FOLDER = "_scaling"
UNKNOWN = " (not determined)"
_REFITS = 100
"""Bootstrap fits in a study's own page; `just scaling` makes them all."""


def find(patterns: Sequence[str], *, outputs: Path) -> list[Path]:
    """The study folders that names, folders or patterns such as 'outputs/*_h3' mean; in order, each once.

    Raises:
        FintxError: a pattern that no study fits.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        matches = _studies(Path(), pattern) or _studies(outputs, pattern)
        if not matches:
            known = ", ".join(path.name for path in records.study_folders(outputs)) or "none"
            raise FintxError(
                f"{pattern}: fits no study under {outputs} (there: {known}); give names, folders or a pattern in quotes"
            )
        found.update(dict.fromkeys(matches))
    return list(found)


def _studies(root: Path, pattern: str) -> list[Path]:
    """The study folders under a root that a pattern, or a plain name, fits."""
    given = root / pattern
    start = Path(given.anchor) if given.is_absolute() else Path()
    inside = given.relative_to(start) if given.is_absolute() else given
    return [path for path in sorted(start.glob(str(inside))) if (path / "study.json").is_file()]


def read(folders: Sequence[Path], *, over: str, difference: float) -> Scaling:
    """Gather, fit and judge.

    Raises:
        FintxError: options that mean nothing, a study that holds nothing, or studies that differ in more than size.
    """
    if over not in ("parameters", "data"):
        raise FintxError(f'--over {over!r}: wanted "parameters" or "data"')
    if not 0 < difference < 1:
        raise FintxError(f"--difference {difference:g}: wanted a share between 0 and 1, such as 0.01 for one percent")
    field = gather([evidence.read(folder) for folder in folders], over=cast(Over, over))
    return scaling.read(field, difference=difference)


def write(found: Scaling, *, outputs: Path) -> Path:
    """Write outputs/_scaling/<studies>/index.html with its files."""
    name = "+".join(found.field.names)
    return page.write(build(found), outputs / FOLDER / (name if len(name) <= 120 else f"{name[:110]}+more"))


def build(found: Scaling) -> Page:
    """The page as a value."""
    field = found.field
    return Page(
        title=f"Does it scale? {field.cells[0]} to {field.cells[-1]}",
        kicker="fintx scaling",
        question=f"Does {field.loss_words} fall with {field.size_words}, against {field.baseline} on the same rows?",
        answer=found.sentence,
        tone={"scales": "good", "flat": "bad", "can't tell": "open"}[found.word],  # type: ignore[arg-type]
        warnings=field.notes,
        facts=(
            ("studies", str(len(field.studies))),
            ("successful trials", str(len(field.loss))),
            ("validation rows", f"{field.n_rows:,}"),
            ("block of days", str(field.resamples.block)),
            ("stated difference", percent(found.difference)),
        ),
        sections=(section(found, told=False),),
        footer=page.footer(),
    )


def section(found: Scaling, *, told: bool = True) -> Section:
    """Figure and tables; with the verdict before them where it isn't told already."""
    how = (
        f"Losses are divided by {found.field.baseline}'s on the same days, so that calm and wild times cancel. The "
        f"frontier is the best quarter of each size's first {found.effort} successful trials: as many for every "
        "size, since the best of more is luckier. Intervals: days resampled in blocks and runs resampled within each "
        "size, together."
    )
    blocks: list[Block] = [Prose(how, "note"), picture(found), *sheets(found)]
    if told:
        blocks.insert(0, Prose(found.sentence))
    return Section("scaling", "Scaling", tuple(blocks))


def scaling_of_siblings(found: Evidence) -> Section | None:
    """Of a study's page: where studies beside it differ from it in size alone, the scaling over all of them."""
    siblings = []
    for folder in records.study_folders(found.folder.resolve().parent):
        if folder.name == found.name:
            continue
        try:
            if not _may_be_sibling(folder, found):  # before its predictions are read
                continue
            other = evidence.read(folder)
        except FintxError:  # a study that can't be reported yet is none to compare with
            continue
        if _label_hash(other) == _label_hash(found):
            siblings.append(other)
    if not siblings:
        return None
    names = ", ".join(other.name for other in siblings)
    try:
        read_ = scaling.read(gather([found, *siblings]), refits=_REFITS)
    except NotComparable as error:
        reasons = tuple(str(error).splitlines())
        words = (
            f"Beside this study lie {names}, of the same label and other budgets; no line can be fitted through them:"
        )
        return Section("scaling", "Scaling", (Prose(words), Prose(reasons, "note")))
    return section(read_)


def _may_be_sibling(folder: Path, found: Evidence) -> bool:
    """Whether it has the same task under another budget."""
    study = records.read_study(folder)
    if study is None:
        return False
    return study.spec.task == found.spec.task and study.spec.budget.parameters != found.spec.budget.parameters


def _label_hash(found: Evidence) -> str:
    return found.records[0].folds[0].label_hash if found.records[0].folds else ""


def picture(found: Scaling) -> Picture:
    """Loss against size and compute."""
    field = found.field
    frontier = np.zeros(len(field.loss), bool)
    frontier[found.frontier.chosen] = True
    reading = found.frontier if found.frontier.laws else found.every
    law = next((each for each in reading.laws if each.fit.form == "power law"), None)
    return figures_evidence.scaling(
        ScalingPlot(
            size=field.size, flops=field.flops, loss=field.loss, frontier=frontier,
            size_words="parameters (counted)" if field.over == "parameters" else "training rows",
            baseline=field.baseline, loss_words=field.loss_words, grid=reading.grid,
            law=law.fit(reading.grid) if law else None, band=reading.band,
            staircase=scaling.envelope(field.flops, field.loss),
            skill_of=(1.0, -field.baseline_loss / field.prior_loss),
        )
    )  # fmt: skip


def sheets(found: Scaling) -> tuple[Sheet, ...]:
    """Sizes, gains, laws."""
    return _sizes(found), _gains(found), _laws(found)


def _sizes(found: Scaling) -> Sheet:
    field, rows = found.field, []
    for i, name in enumerate(field.cells):
        mine = field.cell == i
        rows.append(
            (
                name, " ".join(dict.fromkeys(field.names[s] for s in field.study[mine])), int(mine.sum()),
                f"{count(field.size[mine].min())} … {count(field.size[mine].max())}",
                float(np.median(field.flops[mine])), float(field.loss[mine].min()),
                found.frontier.by_cell[i], found.every.by_cell[i],
                1 - found.frontier.by_cell[i] * field.baseline_loss / field.prior_loss,
            )
        )  # fmt: skip
    columns: list[tuple[str, Format]] = [
        ("size", "text"), ("studies", "text"), ("trials", "whole"), (field.size_words, "text"),
        ("median FLOPs", "size"), ("least loss", "number"), ("frontier", "number"), ("all trials", "number"),
        ("frontier's skill", "percent"),
    ]  # fmt: skip
    note = f"Losses relative to {field.baseline}: 1 is as good, .98 saves two percent."
    return sheet.of("sizes", "By size", columns, rows, note=note)


def _gains(found: Scaling) -> Sheet:
    rows = [
        (each.which, 100 * each.gain.mean, f"{100 * each.gain.low:.2f} … {100 * each.gain.high:.2f}",
         100 * each.gain.by_days, 100 * each.gain.by_runs, scaling.verdict(each.gain, found.difference))
        for each in (found.frontier, found.every)
    ]  # fmt: skip
    columns: list[tuple[str, Format]] = [
        ("", "text"), ("gain (% of the baseline's loss)", "number"), ("90 % interval", "text"),
        ("SE from days", "number"), ("SE from runs", "number"), ("its interval says", "text"),
    ]  # fmt: skip
    note = (
        f"From the smallest size to the largest. Above 0 with its whole interval: scales. Below "
        f"{percent(found.difference)} with its whole interval: flat (two one-sided tests at 5 %)."
    )
    return sheet.of("gains", "Gain, and the test of flatness", columns, rows, note=note)


def _laws(found: Scaling) -> Sheet:
    rows: list[tuple[object, ...]] = []
    for reading in (found.frontier, found.every):
        if reading.no_law:
            rows.append((reading.which, reading.no_law, *[None] * 7))
        rows += [_law(reading, law) for law in reading.laws]
    columns: list[tuple[str, Format]] = [
        ("", "text"), ("form", "text"), ("E", "text"), ("A", "text"), ("α", "text"), ("B, β", "text"),
        ("AICc", "number"), ("weight", "percent"), ("off at the largest", "percent"),
    ]  # fmt: skip
    return sheet.of(
        "laws", "L(N) = E + A·N^(−α), relative losses", columns, rows,
        note="Σ Huber of ln loss (Hoffmann et al. 2022, approach 3), 95 % intervals over days and runs. Off at the "
        "largest: fitted to the smaller sizes alone, the error of its prediction for the largest.",
    )  # fmt: skip


def _law(reading: Reading, law: Law) -> tuple[object, ...]:
    fit = law.fit
    falls: tuple[str | None, str | None] = (None, None)
    rises = None
    if fit.exponents:
        loose = law.exponent is not None and law.exponent[0] <= BOUND[0] * 1.01 and law.exponent[1] >= BOUND[1] * 0.99
        height, exponent = (UNKNOWN, UNKNOWN) if loose else (_span(law.height), _span(law.exponent))
        falls = (f"{fit.coefficients[0]:.3g}{height}", f"{number(fit.exponents[0], 3)}{exponent}")
    if len(fit.exponents) > 1:
        rises = f"{fit.coefficients[1]:.3g}, {number(fit.exponents[1], 3)}"
    return (
        reading.which, fit.form, f"{number(fit.floor)}{_span(law.floor)}", *falls,
        rises, fit.aicc, law.weight, law.held_out,
    )  # fmt: skip


def _span(found: tuple[float, float] | None) -> str:
    return "" if found is None else f" ({found[0]:.3g} … {found[1]:.3g})"
