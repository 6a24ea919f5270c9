"""Checkpoints: arrays on disk that come back exactly as they were saved, or not at all.

    <folder>/<item>/           Orbax's own files; a trained model has one item, params
    <folder>/checkpoint.json   format, the whole resolved config, and what the caller adds (hashes, metrics, …)
    <folder>/SHA256SUMS        sha256 of every other file, and of itself; `sha256sum -c` reads it too

Orbax commits atomically but does not checksum arrays: a flipped bit loads as wrong weights without a warning. So a
folder is a checkpoint once it holds SHA256SUMS, and all of it is verified before any of it is used. It is written in a
hidden folder beside its place and renamed at the end. A trained model (`save`, `load`) and the state of a training
under way (`resume`) are folders of the same kind with other items.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pydantic import ValidationError

from fintx import files
from fintx.config.schema import TrialConfig
from fintx.errors import FintxError
from fintx.model import family
from fintx.types import Params

FORMAT = 2
_SUMS, _DESCRIPTION, _PARAMS = "SHA256SUMS", "checkpoint.json", "params"
_Leaf = tuple[tuple[int, ...], str]
"""Shape and dtype."""
_WRITING = threading.Lock()
"""Orbax saves from one thread at a time; trials may train on several."""
_FULL = ("no space left", "disk quota exceeded", "file too large")


class NotACheckpoint(FintxError):
    """The path holds no finished checkpoint of fintx."""


class CheckpointDamaged(FintxError):
    """The path holds a checkpoint that is not, byte for byte, what was saved."""


@dataclass(frozen=True, eq=False)
class Restored:
    """A checkpoint in memory."""

    params: Params
    """Host arrays, as they were saved."""
    config: TrialConfig
    meta: dict[str, Any]


@dataclass(frozen=True)
class Described:
    """A folder whose every file is what was saved; its arrays are still on the disk."""

    folder: Path
    config: TrialConfig
    meta: dict[str, Any]


def save(folder: Path, params: Params, *, config: TrialConfig, meta: dict[str, Any]) -> None:
    """Write a trained model, replacing an existing one; the folder appears whole or not at all.

    Args:
        params: the tree of the family's `abstract_params` for the config and its resolved features.
        meta: any JSON; NaN is none.

    Raises:
        FintxError: the disk is full or can't be written; the parameters are not those of the config.
    """
    if problem := _misfit(_shapes(params), _shapes(_abstract(config))):
        raise FintxError(f"the parameters to be saved in {folder} don't fit their config: {problem}")
    write(folder, {_PARAMS: params}, config=config, meta=meta)


def load(folder: Path) -> Restored:
    """Read a trained model back, on whatever device: verified first, host arrays, the saved bits.

    Raises:
        NotACheckpoint: nothing there, something else, a save that did not finish, or another format.
        CheckpointDamaged: a file is missing or changed.
    """
    described = describe(folder)
    params = read(described, {_PARAMS: _abstract(described.config)})[_PARAMS]
    return Restored(params=params, config=described.config, meta=described.meta)


def write(
    folder: Path,
    items: dict[str, Params],
    *,
    config: TrialConfig,
    meta: dict[str, Any],
    guard: Callable[[], None] = lambda: None,
) -> None:
    """Write named trees of arrays, replacing existing ones; the folder appears whole or not at all.

    Args:
        items: nested dicts of arrays by name.
        meta: any JSON; NaN is none.
        guard: called right before the folder appears; what it raises passes through, and nothing appears.

    Raises:
        FintxError: the disk is full or can't be written.
    """
    folder = Path(folder).absolute()
    description = {"format": FORMAT, "config": config.model_dump(mode="json"), "meta": meta}
    text = json.dumps(description, indent=1, allow_nan=False)
    # Workers in two containers may share a process id and, for a moment, a trial.
    staging = folder.with_name(f".{folder.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with _disk_errors(folder):
            staging.mkdir(parents=True)
            _reserve(staging, sum(leaf.nbytes for leaf in jax.tree.leaves(items)))
            with _WRITING:
                _write_arrays(staging, items=items)
            (staging / _DESCRIPTION).write_text(text, encoding="utf-8")
            (staging / _SUMS).write_text(_sums(staging), encoding="utf-8")
            for path in [*staging.rglob("*"), staging]:  # so that a power cut after the rename loses nothing
                files.sync(path)
        guard()
        with _disk_errors(folder):
            _put_in_place(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def describe(folder: Path) -> Described:
    """Verify a folder, and read what it holds but its arrays.

    Raises:
        NotACheckpoint, CheckpointDamaged: as `load`.
    """
    folder = Path(folder).absolute()
    _verify(folder)
    config, meta = _read_description(folder)
    return Described(folder=folder, config=config, meta=meta)


def read(described: Described, items: dict[str, Params]) -> dict[str, Params]:
    """The named trees of a folder, as host arrays, the saved bits.

    Args:
        items: name → the tree of abstract shapes that it must have.

    Raises:
        NotACheckpoint: an item is not there.
        CheckpointDamaged: an item is another tree.
    """
    for name, abstract in items.items():
        if not (described.folder / name).is_dir():
            raise NotACheckpoint(f"{described.folder} holds no {name}: it is another kind of checkpoint")
        if problem := _misfit(_stored_shapes(described.folder / name), _shapes(abstract)):
            raise CheckpointDamaged(f"{described.folder}: the {name} don't fit the config saved with them: {problem}")
    return {name: _read_arrays(described.folder / name, abstract) for name, abstract in items.items()}


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """File system errors, however deep, as one line."""
    try:
        yield
    except Exception as error:
        if reason := _disk_trouble(error):
            raise FintxError(f"could not save the checkpoint {folder}: {reason}; fix that and run again") from error
        raise


def _reserve(staging: Path, n_bytes: int) -> None:
    """Fail early, by an OSError, if the disk is too full: from Orbax's threads it comes with pages of tracebacks."""
    needed = n_bytes + 2**20
    if not hasattr(os, "posix_fallocate"):
        if shutil.disk_usage(staging).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return
    path = staging / "reserved"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, needed)
    path.unlink()


def _write_arrays(staging: Path, *, items: dict[str, Params]) -> None:
    import orbax.checkpoint as ocp  # 2 s: paid by those who save or load

    with _alone(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
        for name, tree in items.items():
            checkpointer.save(staging / name, args=ocp.args.PyTreeSave(jax.tree.map(np.asarray, tree)))


def _alone(handler: Any) -> Any:
    """A checkpointer that waits for no other process: arrays are whole, and of several hosts one writes."""
    import orbax.checkpoint as ocp

    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _read_arrays(folder: Path, abstract: Params) -> Params:
    import orbax.checkpoint as ocp

    as_saved = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract)
    with _alone(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(folder, args=ocp.args.PyTreeRestore(item=abstract, restore_args=as_saved))


def _stored_shapes(folder: Path) -> dict[str, _Leaf]:
    import orbax.checkpoint as ocp

    with _alone(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return _shapes(checkpointer.metadata(folder).item_metadata.tree)


def _abstract(config: TrialConfig) -> Params:
    return family.of(config.model).abstract_params(config.model, config.shape, len(config.data.features))


def _shapes(tree: Params) -> dict[str, _Leaf]:
    """Path → shape and dtype."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        "/".join(str(part.key) for part in path): (tuple(leaf.shape), str(np.dtype(leaf.dtype)))
        for path, leaf in leaves
    }


def _misfit(stored: dict[str, _Leaf], expected: dict[str, _Leaf]) -> str:
    """The first difference; empty: none. Orbax casts a wrong dtype silently."""

    def in_words(leaf: _Leaf | None) -> str:
        return "nothing" if leaf is None else f"{leaf[1]}{list(leaf[0])}"

    for path in sorted(expected.keys() | stored.keys()):
        if expected.get(path) != stored.get(path):
            return f"{path}: wanted {in_words(expected.get(path))}, got {in_words(stored.get(path))}"
    return ""


def _sums(staging: Path) -> str:
    """Lines as of `sha256sum`, then a comment that holds the sum of the lines above it."""
    paths = sorted(path for path in staging.rglob("*") if path.is_file())
    body = "".join(f"{_sha256(path)}  {path.relative_to(staging).as_posix()}\n" for path in paths)
    return f"{body}# {hashlib.sha256(body.encode()).hexdigest()}\n"


def _verify(folder: Path) -> None:
    if not folder.is_dir():
        what = "a file" if folder.exists() else "not there"
        raise NotACheckpoint(f"{folder} is {what}; wanted the folder of a checkpoint")
    if not (folder / _SUMS).is_file():
        raise NotACheckpoint(f"{folder} holds no {_SUMS}: it is no checkpoint of fintx, or its save did not finish")
    for name, digest in _read_sums(folder).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointDamaged(f"{folder}: {name} is missing; restore it from a copy, or train the trial again")
        if _sha256(path) != digest:
            raise CheckpointDamaged(f"{folder}: {name} has changed since it was saved; train the trial again")


def _read_sums(folder: Path) -> dict[str, str]:
    """File name → sha256."""
    body, mark, own = (folder / _SUMS).read_bytes().rpartition(b"# ")
    if not mark or own != hashlib.sha256(body).hexdigest().encode() + b"\n":
        raise CheckpointDamaged(f"{folder}: {_SUMS} has changed since it was saved; train the trial again")
    lines = [line.split("  ", 1) for line in body.decode().splitlines()]
    return {name: digest for digest, name in lines}


def _read_description(folder: Path) -> tuple[TrialConfig, dict[str, Any]]:
    try:
        description = json.loads((folder / _DESCRIPTION).read_bytes())
        if description["format"] != FORMAT:
            raise NotACheckpoint(f"{folder} has format {description['format']}; this fintx reads format {FORMAT}")
        config = TrialConfig.model_validate_json(json.dumps(description["config"]))
        return config, description["meta"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        # pydantic prints a paragraph per problem; one line has to do.
        problem = str(error.errors()[0]) if isinstance(error, ValidationError) else str(error)
        raise NotACheckpoint(f"{folder}: this fintx can't read its {_DESCRIPTION}: {problem}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _put_in_place(staging: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    if folder.exists():
        folder.rename(old)  # a rename can't land on a folder that is not empty
    staging.rename(folder)
    files.sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _disk_trouble(error: BaseException | None) -> str:
    """The file system's message behind an error or its causes; empty: the error is about something else.

    Orbax and tensorstore wrap it, so that the text may be all there is.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return os.strerror(error.errno)
        for text in _FULL:
            if text in str(error).lower():
                return text
        error = error.__cause__ or error.__context__
    return ""
