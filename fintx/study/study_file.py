"""Study file: study.json, the definition that a study keeps; studies by name; openings of the sealed test part."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fintx.config.schema import StudySpec
from fintx.errors import FintxError
from fintx.study import environment
from fintx.study.records import DamagedRecord, RecordModel, write_atomically

# --- the study's own file ---------------------------------------------------------------------------------------------

FREE_TO_CHANGE = {"name", "n_trials", "question", "keep_checkpoints", "queue_extremes"}
"""Keys of [study] that define nothing."""
_SOFTWARE = ("fintx", "jax", "jaxlib", "flax", "optax", "optuna", "numpy", "TA-Lib")
"""Libraries whose version can change a result or what the sampler proposes."""


class StudyFile(RecordModel):
    """study.json: what the study asks, with its data pinned by content hash."""

    spec: StudySpec
    definition: dict[str, Any]
    """Dotted key → value of all that defines the study (`definition`)."""
    definition_hash: str
    created: str
    fintx_version: str
    git_commit: str | None


def write_study(study_folder: Path, study: StudyFile) -> None:
    """Write study.json: at the start, and again when what may change (n_trials, wording, queue) has changed.

    Raises:
        FintxError: it can't be written.
    """
    write_atomically(study_folder / "study.json", study.model_dump_json(indent=1))


def read_study(study_folder: Path) -> StudyFile | None:
    """study.json, or none where the folder holds no study.

    Raises:
        DamagedRecord: the file is there but is not fintx's.
    """
    path = study_folder / "study.json"
    if not path.is_file():
        return None
    try:
        return StudyFile.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        raise DamagedRecord(f"{path}: is not a study of this fintx ({reason}); choose another study.name") from None


def definition(spec: StudySpec) -> dict[str, Any]:
    """What defines a study, flat (dotted key → value).

    All but its name, trial count, wording, queue, mesh, execution and confirmation; the versions of the libraries that
    can change a result belong to it.
    """
    tree = spec.model_dump(mode="json", exclude={"queue", "mesh", "execution", "confirm"})
    tree["study"] = {key: value for key, value in tree["study"].items() if key not in FREE_TO_CHANGE}
    if spec.study.replicates == 1:  # as studies that began before there were any say it
        del tree["study"]["replicates"]
    tree["software"] = {name: environment.libraries()[name] for name in _SOFTWARE}
    return dict(_flatten(tree))


def differences(one: StudySpec, other: StudySpec) -> tuple[str, ...]:
    """The dotted keys in which two specs differ."""
    a, b = (dict(_flatten(spec.model_dump(mode="json"))) for spec in (one, other))
    return tuple(key for key in {**a, **b} if a.get(key) != b.get(key))


def definition_hash(defined: dict[str, Any]) -> str:
    """sha256 (hex) of a definition's canonical JSON."""
    return hashlib.sha256(json.dumps(defined, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# --- studies by name --------------------------------------------------------------------------------------------------


def find_study(study: str, *, outputs: Path) -> Path:
    """The folder of a study, given its name or the folder itself.

    Raises:
        FintxError: there is no such study.
    """
    folder = next((path for path in (Path(study), outputs / study) if _holds_study(path)), None)
    if folder is None:
        known = ", ".join(path.name for path in study_folders(outputs)) or "none"
        shown = ascii(study if len(study) <= 60 else f"{study[:60]}…")
        raise FintxError(f"{shown}: is no study under {outputs} (there: {known}); give a study's name or its folder")
    return folder


def _holds_study(folder: Path) -> bool:
    try:
        return read_study(folder) is not None
    except OSError:  # a name that no file can have
        return False


def study_folders(outputs: Path) -> list[Path]:
    """Folders under outputs/ that hold a study, by name."""
    return sorted(path.parent for path in outputs.glob("*/study.json"))


# --- the sealed test part's log ---------------------------------------------------------------------------------------


def log_opening(study_folder: Path, entry: dict[str, Any]) -> int:
    """Append an opening of the sealed test part; call it before any test label is cut.

    Returns:
        How many times it has been opened, this one included.

    Raises:
        FintxError: the log can't be written; then nothing may be opened.
    """
    path = study_folder / "openings.jsonl"
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"opened": environment.now(), **entry}) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise FintxError(f"{path}: the opening can't be logged ({error.strerror}), so the test stays sealed") from error
    return len(openings(study_folder))


def openings_note(study_folder: Path) -> str:
    """What every later result says of earlier openings; empty: there were none."""
    n = len(openings(study_folder))
    times = "once" if n == 1 else f"{n} times"
    return f"the sealed test part has been opened {times}; what came later may owe something to it" if n else ""


def openings(study_folder: Path) -> list[dict[str, Any]]:
    """Every logged opening of the test part, oldest first."""
    path = study_folder / "openings.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
