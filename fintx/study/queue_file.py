"""Queue file: the queue of a sweep file or a manual file, listed and edited.

An edit changes text: comments and everything else stay byte for byte. What is added or cancelled is checked as a whole
first, the budget too; then the file is replaced in one step, so that a running study reads the old file or the new one.
"""

from __future__ import annotations

import contextlib
import copy
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


def listings(path: Path, *, outputs: Path, data_root: Path) -> tuple[QueueListing, ...]:
    """The queue of every study of a file, extremes included if `queue_extremes` is set.

    Raises:
        FintxError: the file is wrong, or its data are missing.
    """
    result = []
    for spec in _studies(path, load.is_manual(path)).values():
        folder, n_features = outputs / spec.study.name, _n_features(spec, data_root)
        entries = (*spec.queue, *_extremes(spec, n_features))
        trial_records = records.read_all(folder)
        leases = trial_table.read(folder, url=spec.execution.storage)
        outcomes = {record.trial_number: record.outcome for record in trial_records}
        rows = tuple(
            ListedEntry(
                state=state,
                outcome=outcomes.get(state.number, "") if state.number is not None else "",
                param_count=param_count.count_params(spec.model, state.entry.shape, n_features).total,
            )
            for state in queue.states(entries, leases, trial_records)
        )
        result.append(QueueListing(spec.study.name, spec.study.n_trials, rows))
    return tuple(result)


def _extremes(spec: StudySpec, n_features: int) -> tuple[QueueEntry, ...]:
    """The study's extremes that its file doesn't list."""
    if not spec.study.queue_extremes:
        return ()  # without solving the budget
    return queue.unlisted_extremes(spec, SearchSpace.build(spec, n_features=n_features))


def _n_features(spec: StudySpec, data_root: Path) -> int:
    return len(datasets.build(spec, data_root).data.features)


def _studies(path: Path, manual: bool, text: str | None = None, *, counted: bool = False) -> dict[Path, StudySpec]:
    """Sweep file → study; a sweep file's own is its only one."""
    return load.manual(path, text=text) if manual else {path: load.study(path, text=text, counted=counted)}


# --- adding to a file -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QueueEdit:
    """What was added or cancelled."""

    study: str
    identity: str
    entry: QueueEntry


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


def add(path: Path, fields: Mapping[str, Any], *, data_root: Path) -> QueueEdit:
    """Append a [[queue]] block.

    Args:
        fields: its keys as the file would hold them: d_model …, note, id, training, dotted paths, `sweep` in a manual
            file.

    Raises:
        SweepFileError, QueueError: the file would be wrong with the entry; it stays as it is.
        QueueFileError: the entry is there already, or the file's queue can't be added to.
    """
    with _locked(path) as real:
        text = toml.read_text(path)
        _refuse_unlike_blocks(path, text)
        changed = appended(text, ["[[queue]]", *toml.pairs(fields)])
        try:
            changed.encode("utf-8")
        except UnicodeEncodeError as error:
            raise QueueFileError(f"the new entry: holds no UTF-8 text ({changed[error.start]!r})") from None
        try:
            manual = not load.is_study(toml.parse(path, changed).tree)
            studies = _studies(path, manual, changed, counted=True)
        except SweepFileError as error:
            first_line = toml.plain(changed).count("\n") - len(fields)
            raise SweepFileError(_of_new_entry(str(error), path, first_line)) from None
        sweep = load.sweep_path(path, str(fields["sweep"])) if manual else path
        spec = studies[sweep]
        entry = spec.queue[-1]
        identity = queue.entry_id(entry)
        for other in spec.queue[:-1]:
            if queue.entry_id(other) == identity:
                fix = "; it is cancelled: take that line out of the file" if other.cancelled else ""
                raise QueueFileError(f"{path}: holds the entry {identity} of {spec.study.name} already{fix}")
        where, last = load.where(path, sweep=sweep if manual else None), ("queue", len(spec.queue) - 1)
        queue.check(
            spec,
            n_features=_n_features(spec, data_root),
            where=lambda key_path: "the new entry" if key_path == last else where(key_path),
        )
        _replace(real, changed)
    return QueueEdit(spec.study.name, identity, entry)


def appended(text: str, lines: Sequence[str]) -> str:
    """The text with a block of lines after it, behind a blank line, in the text's own line ends."""
    end = "\r\n" if 2 * text.count("\r\n") > text.count("\n") else "\n"
    content = toml.plain(text)
    gap = "" if not content or content.endswith("\n\n") else end if content.endswith("\n") else 2 * end
    return text + gap + "".join(line + end for line in lines)


def _of_new_entry(message: str, path: Path, first_line: int) -> str:
    """The message without lines of the file that aren't in it yet: those of the new block."""
    lines = []
    for line in message.split("\n"):
        match = re.match(rf"{re.escape(str(path))}:(\d+): (?:queue\[\d+\](?:\.|: )?)?", line)
        lines.append(f"the new entry: {line[match.end() :]}" if match and int(match[1]) >= first_line else line)
    return "\n".join(lines)


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


# --- cancelling in a file ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _FileEntry:
    """An entry of a file's studies."""

    sweep: Path
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
    with _locked(path) as real:
        text = toml.read_text(path)
        _refuse_unlike_blocks(path, text)
        target = _find(path, identity, sweep, data_root)
        spec, entry, name = target.spec, target.entry, target.spec.study.name
        leases = trial_table.read(outputs / name, url=spec.execution.storage)
        (state,) = queue.states([entry], leases, records.read_all(outputs / name))
        fix = {"running": "stop the study first", "done": "there is nothing left to cancel"}.get(state.state)
        if fix is not None:
            raise QueueFileError(f"{path}: {identity} is {state.state} (trial {state.number} of {name}); {fix}")
        if entry.cancelled:
            raise QueueFileError(f"{path}: {identity} is cancelled already")
        if target.index is None:
            fields = {**entry.model_dump(exclude_defaults=True), "cancelled": True}
            changed = appended(text, ["[[queue]]", *toml.pairs(fields)])
        else:
            changed = with_cancelled(path, text, target.index)
        _replace(real, changed)
    return QueueEdit(name, identity, entry)


def _find(path: Path, identity: str, sweep: str | None, data_root: Path) -> _FileEntry:
    manual = load.is_manual(path)
    if sweep is not None and not manual:
        raise QueueFileError(f"{path}: is no manual file, so --sweep has no place here")
    only = None if sweep is None else load.sweep_path(path, sweep)
    file_entries: list[_FileEntry] = []
    for at, spec in _studies(path, manual).items():
        blocks: Sequence[int] = load.blocks_of(path, at) if manual else range(len(spec.queue))
        file_entries += [_FileEntry(at, spec, *pair) for pair in zip(spec.queue, blocks, strict=True)]
        if spec.study.queue_extremes:
            extremes = _extremes(spec, _n_features(spec, data_root))
            file_entries += [_FileEntry(at, spec, entry, None) for entry in extremes]
    matches = [item for item in file_entries if queue.entry_id(item.entry) == identity and only in (None, item.sweep)]
    if not matches:
        identities = list(dict.fromkeys(queue.entry_id(item.entry) for item in file_entries))
        near = difflib.get_close_matches(identity, identities, n=1, cutoff=0.5)
        there = f"there are {', '.join(identities)}" if identities else "it has none at all"
        hint = f"did you mean {near[0]}?" if near else there
        raise QueueFileError(f"{path}: has no queue entry {one_line(shortened(identity))}; {hint}")
    if len(sweeps := {match.sweep for match in matches}) > 1:
        names = " and ".join(sorted(at.name for at in sweeps))
        raise QueueFileError(f"{path}: {identity} stands there for {names}; name one with --sweep")
    return matches[0]


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
    expected = copy.deepcopy(toml.parse(path, text).tree)
    expected["queue"][index]["cancelled"] = True
    with contextlib.suppress(SweepFileError):
        if toml.parse(path, changed).tree == expected:
            return changed
    raise QueueFileError(f"{path}:{at}: can't be edited safely; write cancelled = true into that entry yourself")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """The file itself, links followed, locked against other edits of its queue."""
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
