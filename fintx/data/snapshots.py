"""Snapshots: the data folder's immutable Parquet files, their manifests, and whether they are unchanged.

    <root>/raw/manifest.jsonl         one line per snapshot of bars, named SPY.OHLCV.daily
    <root>/raw/SPY.OHLCV.daily/<version>.parquet
    <root>/processed/…                the same for features, whose parents are raw versions

A version is the hash of the content, so the same content is never kept twice and other content never replaces it.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import importlib.metadata
import os
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from fintx import files
from fintx.errors import FintxError

Kind = Literal["raw", "processed"]
KINDS: tuple[Kind, ...] = ("raw", "processed")


class DamagedManifest(FintxError):
    """A manifest holds a line that is not an entry."""


class Snapshot(BaseModel):
    """A manifest's entry: one immutable snapshot."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    """SPY.OHLCV.daily, SPY+VIX.stationary.daily, …"""
    version: str
    """sha256 of the content: the columns' values, independent of the file format."""
    sha256: str
    """sha256 of the file."""
    path: str
    """Relative to the data folder."""
    rows: int
    first_date: str
    last_date: str
    parents: tuple[str, ...] = ()
    """name@version of what it was made of."""
    source: str
    """Where the bars came from, or how the features were made."""
    repairs: tuple[str, ...] = ()
    """What was fixed, with dates."""
    columns: tuple[str, ...]
    created: str
    fintx_version: str


def store(
    root: Path, kind: Kind, name: str, table: pa.Table, *, version: str, source: str,
    parents: tuple[str, ...] = (), repairs: tuple[str, ...] = (),
) -> tuple[Snapshot, bool]:  # fmt: skip
    """Keep a table as an immutable snapshot.

    Args:
        table: with a `date` column (date32).
        version: hash of the content.

    Returns:
        The entry, and whether its file was written; content that is there already is not written again.

    Raises:
        FintxError: the disk is full or can't be written; nothing is half-written then.
    """
    folder, relative = root / kind, Path(kind) / name / f"{version[:16]}.parquet"
    path, dates = root / relative, table["date"]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            stored = [entry for entry in all_snapshots(root, kind) if (entry.name, entry.version) == (name, version)]
            if stored and (root / stored[-1].path).exists():
                return stored[-1], False
            with files.replacing(path) as temporary:  # a file without an entry is left from a write that was cut off
                pq.write_table(table, temporary, compression="zstd")
            entry = Snapshot(
                name=name, version=version, sha256=file_sha256(path), path=relative.as_posix(), rows=table.num_rows,
                first_date=str(pa.compute.min(dates).as_py()), last_date=str(pa.compute.max(dates).as_py()),
                parents=parents, source=source, repairs=repairs, columns=tuple(table.column_names),
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                fintx_version=importlib.metadata.version("fintx"),
            )  # fmt: skip
            if stored and stored[-1].sha256 == entry.sha256:
                return stored[-1], True  # a snapshot that went missing is back
            try:
                _append_line(folder / "manifest.jsonl", entry.model_dump_json())
            except OSError:
                path.unlink(missing_ok=True)
                raise
            return entry, True
    except OSError as error:
        reason = error.strerror or str(error)
        raise FintxError(f"{folder}: {name} can't be kept: {reason}; fix that and run the command again") from error


def all_snapshots(root: Path, kind: Kind) -> list[Snapshot]:
    """All snapshots of a kind, oldest first.

    Raises:
        DamagedManifest: a line does not parse.
    """
    path = root / kind / "manifest.jsonl"
    if not path.is_file():
        return []
    entries = []
    # What follows the last newline was cut off while it was written: its snapshot is not kept yet.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            entries.append(Snapshot.model_validate_json(line))
        except ValidationError:
            raise DamagedManifest(
                f"{path}:{number}: is no manifest entry; restore the file from a copy, or take the line out "
                "and import the data again"
            ) from None
    return entries


def verify(root: Path) -> list[str]:
    """Check every entry against its file.

    Returns:
        One line per problem: missing, changed and orphaned files by name, and unreadable manifests; empty if none.
    """
    problems = []
    for kind in KINDS:
        folder = root / kind
        try:
            newest = {entry.path: entry for entry in all_snapshots(root, kind)}
        except DamagedManifest as error:
            problems.append(f"damaged: {error}")
            continue
        for entry in newest.values():
            path = root / entry.path
            if not path.is_file():
                problems.append(f"missing: {entry.path} ({entry.name}, {entry.rows} rows)")
            elif file_sha256(path) != entry.sha256:
                problems.append(f"changed: {entry.path} ({entry.name}) is not the file that was kept")
        for path in sorted([*folder.rglob("*.parquet"), *folder.rglob("*.tmp")]):
            relative = path.relative_to(root).as_posix()
            if relative not in newest:
                problems.append(f"orphaned: {relative} is in no manifest")
    return problems


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _append_line(path: Path, line: str) -> None:
    """Append to a file whose last line may be torn, left by a writer that was cut off: that one is removed first."""
    with path.open("a+b") as file:
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
