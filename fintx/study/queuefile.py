"""How is a queue shown and edited in its file? Text edits: comments and everything else stay byte for byte.

FILE is a sweep file or a manual file. What is added or cancelled is checked as a whole first, the budget too; then the
file is replaced in one step, so that a study that runs at the time reads the old file or the new one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import fcntl
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fintx import files
from fintx.config import load, toml
from fintx.config.schema import QueueEntry, StudySpec
from fintx.config.toml import SweepFileError, locate
from fintx.config.validate import one_line, shortened
from fintx.data import datasets
from fintx.errors import FintxError
from fintx.model import param_count
from fintx.study import queue, records, trial_table
from fintx.study.queue import QueueState
from fintx.study.records import TrialRecord
from fintx.study.search_space import SearchSpace

_BLOCK = re.compile(r"""[ \t]*\[\[[ \t]*(queue|"queue"|'queue')[ \t]*\]\]""")
_CANCELLED = re.compile(r"""([ \t]*(?:cancelled|"cancelled"|'cancelled')[ \t]*=[ \t]*)false\b""")


class QueueFileError(FintxError):
    """An edit of a queue that can't be made."""


@dataclass(frozen=True)
class ListedEntry:
    """An entry, how far it is, and its exact size."""

    state: QueueState
    outcome: str
    """Of its trial, once that is done; else empty."""
    param_count: int

    @property
    def failed(self) -> bool:
        """Whether the trial is done, but gave no result."""
        return self.outcome not in ("", *records.SUCCESSES)


@dataclass(frozen=True)
class QueueListing:
    """The queue of one study."""

    study: str
    n_trials: int
    rows: tuple[ListedEntry, ...]


@dataclass(frozen=True)
class QueueEdit:
    """What was added or cancelled."""

    study: str
    identity: str
    entry: QueueEntry


# --- showing ----------------------------------------------------------------------------------------------------------


def listings(path: Path, *, outputs: Path, data_root: Path) -> tuple[QueueListing, ...]:
    """The queue of every study of a file, extremes included where the study asks for them.

    Raises:
        FintxError: the file is wrong, or its data are missing.
    """
    studies = _studies(path, load.is_manual(path))
    return tuple(_listing(spec, outputs / spec.study.name, data_root) for spec in studies.values())


def _listing(spec: StudySpec, folder: Path, data_root: Path) -> QueueListing:
    n_features = _n_features(spec, data_root)
    kept = records.read_all(folder)
    outcomes = {record.trial_number: record.outcome for record in kept}
    rows = [
        ListedEntry(
            state=state,
            outcome=outcomes.get(state.number, "") if state.number is not None else "",
            param_count=param_count.count_params(spec.model, state.entry.shape, n_features).total,
        )
        for state in _states((*spec.queue, *_extremes(spec, n_features)), folder, kept, url=spec.execution.storage)
    ]
    return QueueListing(spec.study.name, spec.study.n_trials, tuple(rows))


def _states(
    entries: Sequence[QueueEntry], folder: Path, kept: Sequence[TrialRecord], *, url: str
) -> tuple[QueueState, ...]:
    """What the study's storage says, and the records here, which it may not have been told of."""
    held = {record.entry: record for record in kept if record.entry is not None}

    def with_record(state: QueueState) -> QueueState:
        record = held.get(state.identity)
        if record is None or state.state == "done" or record.config.shape != state.entry.shape:
            return state
        return dataclasses.replace(state, state="done", number=record.trial_number, training=record.training)

    return tuple(map(with_record, queue.states(entries, trial_table.read(folder, url=url))))


def _extremes(spec: StudySpec, n_features: int) -> tuple[QueueEntry, ...]:
    """Entries that stand in no file, because the study asks for them."""
    if not spec.study.queue_extremes:
        return ()
    return queue.unlisted_extremes(spec, SearchSpace.build(spec, n_features=n_features))


def _n_features(spec: StudySpec, data_root: Path) -> int:
    prepared = datasets.build(spec, data_root)
    return len(prepared.data.features)


# --- adding -----------------------------------------------------------------------------------------------------------


def add(path: Path, fields: Mapping[str, Any], *, data_root: Path) -> QueueEdit:
    """Append a [[queue]] block.

    Args:
        fields: its keys as the file would hold them: d_model …, note, id, training, dotted paths, `sweep` in a manual
            file.

    Raises:
        SweepFileError, QueueError: the file would be wrong with the entry; it stays as it is.
        QueueFileError: the entry is there already, or the file's queue can't be added to.
    """
    with _held(path) as real:
        text = toml.read_text(path)
        _refuse_unlike_blocks(path, text)
        changed, edit = _with_entry(path, text, fields, data_root)
        _replace(real, changed)
    return edit


def value_of(text: str) -> tuple[str, bool | int | float | str]:
    """'optim.learning_rate=3e-4' → the path and its value.

    Raises:
        FintxError: it is written in another way.
    """
    shown = f"--value {one_line(shortened(text))}"
    example = "a path and a number, true, false or text, such as optim.learning_rate=3e-4"
    path, tree = toml.assignment(text, shown=shown, example=example)
    value: Any = tree
    for key in path:
        value = value[key]
    name = ".".join(map(str, path))
    plain = isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
    if "." not in name or not plain:
        raise QueueFileError(f"{shown}: wanted {example}")
    return name, value


def _with_entry(path: Path, text: str, fields: Mapping[str, Any], data_root: Path) -> tuple[str, QueueEdit]:
    changed = appended(text, ["[[queue]]", *toml.pairs(fields)])
    _refuse_surrogates(changed)
    first_line = toml.plain(changed).count("\n") - len(fields)
    manual = not load.is_study(toml.parse(path, text).tree)
    try:
        studies = _studies(path, manual, changed, counted=True)
    except SweepFileError as error:
        raise SweepFileError(_of_new_entry(str(error), path, first_line)) from None
    spec = studies[load.sweep_path(path, str(fields["sweep"]))] if manual else studies[path]
    entry = spec.queue[-1]
    identity = queue.entry_id(entry)
    known = {queue.entry_id(each): each for each in spec.queue[:-1]}
    if identity in known:
        fix = "; it is cancelled: take that line out of the file" if known[identity].cancelled else ""
        raise QueueFileError(f"{path}: holds the entry {identity} of {spec.study.name} already{fix}")
    there = load.where(path, sweep=load.sweep_path(path, str(fields["sweep"])) if manual else None)
    last = ("queue", len(spec.queue) - 1)
    queue.validate(
        spec,
        n_features=_n_features(spec, data_root),
        where=lambda key_path: "the new entry" if key_path == last else there(key_path),
    )
    return changed, QueueEdit(spec.study.name, identity, entry)


def appended(text: str, lines: Sequence[str]) -> str:
    """The text with a block of lines after it, behind a blank line, in the text's own line ends."""
    end = "\r\n" if 2 * text.count("\r\n") > text.count("\n") else "\n"
    content = toml.plain(text)
    gap = "" if not content or content.endswith("\n\n") else end if content.endswith("\n") else 2 * end
    return text + gap + "".join(line + end for line in lines)


def _of_new_entry(said: str, path: Path, first_line: int) -> str:
    """Lines about the block that isn't in the file yet name no line of it."""
    found = []
    for line in said.split("\n"):
        match = re.match(rf"{re.escape(str(path))}:(\d+): (?:queue\[\d+\](?:\.|: )?)?", line)
        found.append(f"the new entry: {line[match.end() :]}" if match and int(match[1]) >= first_line else line)
    return "\n".join(found)


def _refuse_unlike_blocks(path: Path, text: str) -> None:
    """A block can only be added to, or changed in, a queue that is written in blocks in this very file."""
    source = toml.parse(path, text)
    if "queue" in source.tree:
        line = locate(toml.plain(text))[("queue",)]
        if not _BLOCK.match(toml.plain(text).split("\n")[line - 1]):
            raise QueueFileError(f"{path}:{line}: the queue is written inline; write each entry as a [[queue]] block")
    elif "extends" in source.tree:
        resolved = toml.resolved(path, text=text)
        if resolved.tree.get("queue"):
            where = resolved.places["queue",].words
            raise QueueFileError(f"{path}: its queue is that of the base ({where}); edit it there")


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise QueueFileError(f"the new entry: holds no UTF-8 text ({text[error.start]!r})") from None


# --- cancelling -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """An entry of a file's studies."""

    spec: StudySpec
    entry: QueueEntry
    index: int | None
    """Among all blocks of the file; none: an extreme, which has no block."""


def cancel(path: Path, identity: str, *, sweep: str | None = None, outputs: Path, data_root: Path) -> QueueEdit:
    """Write `cancelled = true` into an entry's block; an extreme of the study gets a block for that.

    Args:
        sweep: in a manual file: the sweep file that the entry belongs to, where more than one has it.

    Raises:
        QueueFileError: no such entry, or it is cancelled, running or done already.
    """
    with _held(path) as real:
        text = toml.read_text(path)
        _refuse_unlike_blocks(path, text)
        found = _find(path, identity, sweep, data_root)
        _refuse_begun(path, found, outputs)
        if found.index is None:
            fields = {**found.entry.model_dump(exclude_defaults=True), "cancelled": True}
            changed = appended(text, ["[[queue]]", *toml.pairs(fields)])
        else:
            changed = with_cancelled(path, text, found.index)
        _replace(real, changed)
    return QueueEdit(found.spec.study.name, identity, found.entry)


def _find(path: Path, identity: str, sweep: str | None, data_root: Path) -> _Found:
    manual = load.is_manual(path)
    if sweep is not None and not manual:
        raise QueueFileError(f"{path}: is no manual file, so --sweep has no place here")
    wanted = None if sweep is None else load.sweep_path(path, sweep)
    known: list[tuple[Path, str, _Found]] = []
    for at, spec in _studies(path, manual).items():
        blocks: Sequence[int] = load.blocks_of(path, at) if manual else range(len(spec.queue))
        entries: list[tuple[QueueEntry, int | None]] = [*zip(spec.queue, blocks, strict=True)]
        if spec.study.queue_extremes:
            entries += [(entry, None) for entry in _extremes(spec, _n_features(spec, data_root))]
        known += [(at, queue.entry_id(entry), _Found(spec, entry, index)) for entry, index in entries]
    found = {at: each for at, name, each in reversed(known) if name == identity and wanted in (None, at)}
    if not found:
        near = _nearest(identity, [name for _, name, _ in known])
        raise QueueFileError(f"{path}: has no queue entry {one_line(shortened(identity))}{near}")
    if len(found) > 1:
        names = " and ".join(sorted(at.name for at in found))
        raise QueueFileError(f"{path}: {identity} stands there for {names}; name one with --sweep")
    return next(iter(found.values()))


def _nearest(identity: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(identity, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; there are {', '.join(dict.fromkeys(known))}" if known else "; it has none at all"


def _refuse_begun(path: Path, found: _Found, outputs: Path) -> None:
    name = found.spec.study.name
    folder = outputs / name
    url = found.spec.execution.storage
    (state,) = _states([found.entry], folder, records.read_all(folder), url=url)
    fix = {"running": "stop the study first", "done": "there is nothing left to cancel"}.get(state.state)
    if fix is not None:
        raise QueueFileError(f"{path}: {state.identity} is {state.state} (trial {state.number} of {name}); {fix}")
    if found.entry.cancelled:
        raise QueueFileError(f"{path}: {state.identity} is cancelled already")


def with_cancelled(path: Path, text: str, index: int) -> str:
    """The text with `cancelled = true` in a [[queue]] block, below its head or where `cancelled = false` stands.

    Raises:
        QueueFileError: the block is written in a way that an edit of lines would not change rightly.
    """
    places = locate(toml.plain(text))
    lines = text.split("\n")
    at = places.get(("queue", index, "cancelled"))
    if at is not None:
        lines[at - 1] = _CANCELLED.sub(r"\1true", lines[at - 1], count=1)
    else:
        at = places["queue", index]
        head = lines[at - 1]
        indent = head[: len(head) - len(head.lstrip(" \t"))]
        lines.insert(at, f"{indent}cancelled = true" + ("\r" if head.endswith("\r") else ""))
    changed = "\n".join(lines)
    wanted = copy.deepcopy(toml.parse(path, text).tree)
    wanted["queue"][index]["cancelled"] = True
    try:
        edited_well = toml.parse(path, changed).tree == wanted
    except SweepFileError:
        edited_well = False
    if not edited_well:
        raise QueueFileError(f"{path}:{at}: can't be edited safely; write cancelled = true into that entry yourself")
    return changed


# --- the file ---------------------------------------------------------------------------------------------------------


def _studies(path: Path, manual: bool, text: str | None = None, *, counted: bool = False) -> dict[Path, StudySpec]:
    """Sweep file → study; a sweep file's own is its only one."""
    return load.by_sweep(path, text=text) if manual else {path: load.study(path, text=text, counted=counted)}


@contextlib.contextmanager
def _held(path: Path) -> Iterator[Path]:
    """The file itself, links followed, while no other edit of a queue is at it."""
    toml.read_text(path)  # says in a line what is wrong with a file that can't be read
    real = path.resolve()
    while True:
        with real.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(file.fileno()), real.stat()):  # else another edit has replaced it meanwhile
                yield real
                return


def _replace(real: Path, text: str) -> None:
    """A whole new file in the place of the old one, with its mode; or the old one, whatever happens."""
    try:
        with files.replacing(real) as temporary, temporary.open("wb") as file:
            os.fchmod(file.fileno(), real.stat().st_mode & 0o7777)
            file.write(text.encode("utf-8"))
    except OSError as error:
        raise QueueFileError(f"{real}: can't be written: {error.strerror}; it is as it was") from error
