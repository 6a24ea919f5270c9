"""What does `just report` write? One page on one study, as far as it is, for a person who didn't run it."""

from __future__ import annotations

from pathlib import Path

from fintx.evaluate import metrics, significance
from fintx.evaluate.backtest import Rules
from fintx.report import (
    answer,
    evidence,
    page,
    search,
    sections_decisions,
    sections_evidence,
    sections_search,
    setting,
    sheet,
)
from fintx.report.evidence import Evidence
from fintx.report.page import Block, Page, Prose, Section, Text
from fintx.report.scaling_report import scaling_of_siblings
from fintx.report.sheet import Format, Sheet
from fintx.report.words import listed, span
from fintx.study import confirmation, records, sealed
from fintx.study.sealed import Opening
from fintx.study.space import SearchSpace


def write(study_folder: Path, *, data_root: Path, rules: Rules | None = None) -> Path:
    """Write outputs/<study>/report/.

    Args:
        rules: of the backtest; none: the report holds no backtest.

    Returns:
        The page.

    Raises:
        FintxError: no study, no finished trial, different labels, a damaged file, or no room on the disk.
    """
    found = evidence.read(study_folder)
    return page.write(build(found, data_root=data_root, rules=rules), study_folder / "report")


def build(found: Evidence, *, data_root: Path, rules: Rules | None = None) -> Page:
    """The page as a value."""
    spec = found.spec
    confirmed = confirmation.read(found.folder)
    told = answer.of(found, confirmed)
    asked = setting.read(found, data_root=data_root)
    space = SearchSpace.build(spec, n_features=len(spec.data.features))
    sections = [
        _asked(asked),
        sections_evidence.beside_baselines(found),
        sections_evidence.confirmation_section(found, confirmed),
        sections_evidence.direction_section(found, asked.bars),
        sections_decisions.calibration_section(found),
        sections_decisions.interval_section(found),
        None if rules is None else sections_decisions.backtest_section(found, asked.bars, rules),
        sections_search.course(found, space),
        sections_search.pattern_section(found, space),
        scaling_of_siblings(found),
        sections_search.outcome_section(found, search.read(found, space)),
        _sealed(found),
        _origin(found),
    ]
    return Page(
        title=found.name,
        kicker=f"fintx report · {asked.label}",
        question=spec.study.question,
        answer=told.sentence,
        tone=told.tone,
        warnings=told.warnings,
        facts=sections_evidence.facts(found),
        sections=tuple(section for section in sections if section is not None),
        footer=page.footer(),
    )


def _asked(asked: setting.Setting) -> Section:
    blocks: list[Block] = [Prose(f"Label: {asked.label}")]
    if asked.note:
        blocks.append(Prose(asked.note, "note"))
    return Section("asked", "What was asked, on which days", (*blocks, *asked.sheets))


def _sealed(found: Evidence) -> Section:
    """Every opening of the sealed test part, and what each one said."""
    openings = records.openings(found.folder)
    if not openings:
        return Section("test", "The sealed test", (Prose("The sealed test part has never been opened."),))
    columns: list[tuple[str, Format]] = [("", "text"), ("opened", "text"), ("for", "text"), ("confirmed", "text")]
    rows = [
        (str(i + 1), each.get("opened"), ", ".join(each.get("models", [])) or None, _yes(each.get("confirmed")))
        for i, each in enumerate(openings)
    ]
    times = "once" if len(openings) == 1 else f"{len(openings)} times"
    words = f"The sealed test part was opened {times}."
    if len(openings) > 1:
        words += " From the second time on it is no test any more: whoever looks again chooses by it."
    said = [_opened(each) for each in sealed.read_openings(found.folder)]
    return Section("test", "The sealed test", (Prose(words), sheet.of("openings", "Openings", columns, rows), *said))


def _yes(value: object) -> str | None:
    return None if value is None else "yes" if value else "no"


def _opened(opening: Opening) -> Sheet:
    """One opening's figures."""
    loss = significance.skill_loss(opening.loss)
    columns: list[tuple[str, Format]] = [
        ("", "text"), (loss.replace("_", " "), "number"), ("skill", "percent"), ("AUC", "number"),
        (f"gains over {opening.baseline}", "number"), ("95 % interval", "text"),
    ]  # fmt: skip
    rows = [
        (
            each.name, each.metrics.get(loss), each.metrics.get(metrics.SKILLS[loss]),
            each.metrics.get("auc"), each.gain.mean if each.gain else None,
            span(each.gain.low, each.gain.high) if each.gain else None,
        )
        for each in (*opening.models, *opening.baselines)
    ]  # fmt: skip
    title = f"Opening {opening.number}: {opening.n_rows:,} test rows, {opening.first_date} … {opening.last_date}"
    return sheet.of(
        f"test_opening_{opening.number}", title, columns, rows, marked=tuple(range(len(opening.models))),
        note=" ".join(note[0].upper() + note[1:] + ("" if note.endswith(".") else ".") for note in opening.notes),
    )  # fmt: skip


def _origin(found: Evidence) -> Section:
    """The whole resolved file, the environment, and where the records lie."""
    resolved = found.folder / "resolved.toml"
    body = resolved.read_text() if resolved.is_file() else "resolved.toml is missing"
    blocks: list[Block] = [
        _environment(found),
        Text("The whole sweep file, resolved", body),
        Prose(
            f"Records: {found.folder}/trials/*/record.json. Definition hash {found.study.definition_hash[:16]}.", "note"
        ),
    ]
    return Section("origin", "File and environment", tuple(blocks))


def _environment(found: Evidence) -> Sheet:
    """Libraries, devices and commits; several where trials ran in several environments."""
    rows: list[tuple[str, str]] = []
    names = list(dict.fromkeys(name for record in found.records for name in record.libraries))
    for name in names:
        held = dict.fromkeys(record.libraries.get(name, "–") for record in found.records)
        rows.append((name, listed(list(held))))
    for what, values in (
        ("device", [record.device for record in found.records]),
        ("commit", [(record.git_commit or "not from a checkout")[:19] for record in found.records]),
    ):
        rows.append((what, listed(list(dict.fromkeys(values)))))
    return sheet.of("environment", "Environment", [("what", "text"), ("version", "text")], rows)
