"""Files of a study beside its trials: study.json, the fitted baselines, the openings of the sealed test part.

study.json holds the definition, which never changes under a study's name. Baselines are fitted once per data, label and
split, kept beside the data, and copied into the folder of every study that needs them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from fintx.config.schema import StudySpec
from fintx.data import sources
from fintx.data.datasets import Dataset
from fintx.errors import FintxError
from fintx.evaluate import baselines
from fintx.study import environment, records
from fintx.study.records import DamagedRecord, RecordModel

FREE_TO_CHANGE = {"name", "n_trials", "question", "keep_checkpoints", "queue_extremes"}
"""Keys of [study] that define nothing."""
_SOFTWARE = ("fintx", "jax", "jaxlib", "flax", "optax", "optuna", "numpy", "TA-Lib")
"""Libraries whose version can change a result or what the sampler proposes."""


class StudyFile(RecordModel):
    """study.json: the study's spec and definition, with its data pinned by content hash."""

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
    records.write_atomically(study_folder / "study.json", study.model_dump_json(indent=1))


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
    if spec.study.replicates == 1:  # as in studies from before there were replicates
        del tree["study"]["replicates"]
    tree["software"] = {name: environment.libraries()[name] for name in _SOFTWARE}
    return dict(_flatten(tree))


def definition_hash(defined: dict[str, Any]) -> str:
    """sha256 (hex) of a definition's canonical JSON."""
    return hashlib.sha256(json.dumps(defined, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differences(one: StudySpec, other: StudySpec) -> tuple[str, ...]:
    """The dotted keys in which two specs differ."""
    a, b = (dict(_flatten(spec.model_dump(mode="json"))) for spec in (one, other))
    return tuple(key for key in {**a, **b} if a.get(key) != b.get(key))


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def find_study(study: str, *, outputs: Path) -> Path:
    """The folder of a study, given its name or the folder itself.

    Raises:
        FintxError: there is no such study.
    """
    for folder in (Path(study), outputs / study):
        with contextlib.suppress(OSError):  # a name that no file can have
            if read_study(folder) is not None:
                return folder
    names = ", ".join(path.name for path in study_folders(outputs)) or "none"
    shown = ascii(study if len(study) <= 60 else f"{study[:60]}…")
    raise FintxError(f"{shown}: is no study under {outputs} (there: {names}); give a study's name or its folder")


def study_folders(outputs: Path) -> list[Path]:
    """Folders under outputs/ that hold a study, by name."""
    return sorted(path.parent for path in outputs.glob("*/study.json"))


# --- baselines --------------------------------------------------------------------------------------------------------


def ensure_baselines(
    folder: Path,
    folds: tuple[Dataset, ...],
    spec: StudySpec,
    data_root: Path,
    *,
    notify: Callable[[str], None],
    check_stop: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Baselines on the very same rows, fitted once per data, label and split for all studies.

    Args:
        notify: called with a line of progress per fold.
        check_stop: called before each fit; what it raises ends them.

    Returns:
        name → {"words", "metrics" (mean over folds), "folds" (metrics of each)}.
    """
    path = folder / "baselines.json"
    if path.is_file() and (folder / "baselines.parquet").is_file():
        with contextlib.suppress(ValueError):  # damaged: made again
            return json.loads(path.read_text())
    # A key of all that a baseline depends on; the inputs' scaling and the context's bars are in `data`.
    hashes = [(fold.data_hash, fold.label_hash, fold.split_hash) for fold in folds]
    settings = [spec.data.model_dump(mode="json"), spec.task.model_dump(mode="json")]
    key = json.dumps([baselines.VERSION, hashes, settings], sort_keys=True)
    shared = data_root / "baselines" / hashlib.sha256(key.encode()).hexdigest()[:16]
    try:
        text, table = _read_baselines(shared)
    except (OSError, ValueError, pa.ArrowException):  # never fitted, or not whole
        _fit_baselines(shared, folds, spec, data_root, notify, check_stop)
        text, table = _read_baselines(shared)
    records.write_predictions(folder, table, name="baselines.parquet")
    records.write_atomically(path, text)  # last: with it the study has them
    return json.loads(text)


def _read_baselines(folder: Path) -> tuple[str, pa.Table]:
    text = (folder / "baselines.json").read_text()
    json.loads(text)
    return text, pq.read_table(folder / "baselines.parquet")


def _fit_baselines(
    target: Path,
    folds: tuple[Dataset, ...],
    spec: StudySpec,
    data_root: Path,
    notify: Callable[[str], None],
    check_stop: Callable[[], None],
) -> None:
    bars = sources.load_pinned(spec.data, spec.data.assets, data_root)
    context = sources.load_pinned(spec.data, spec.data.context, data_root)
    per_fold = []
    for index, fold in enumerate(folds):
        notify("fitting what must be beaten" + (f", fold {index + 1} of {len(folds)}" if len(folds) > 1 else ""))
        per_fold.append(baselines.for_dataset(fold, spec.task, bars, context, pause=check_stop))
    result = {
        first.name: {
            "words": first.words,
            "metrics": records.mean_metrics([fold[index].metrics for fold in per_fold]),
            "folds": [fold[index].metrics for fold in per_fold],
        }
        for index, first in enumerate(per_fold[0])
    }
    tables = [
        records.prediction_table(fold, index, baseline.outputs).append_column(
            "baseline", pa.array([baseline.name] * len(fold.validation.rows))
        )
        for index, fold in enumerate(folds)
        for baseline in per_fold[index]
    ]
    records.write_predictions(target, pa.concat_tables(tables), name="baselines.parquet")
    records.write_atomically(target / "baselines.json", json.dumps(result, indent=1) + "\n")


# --- openings of the sealed test part ---------------------------------------------------------------------------------


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


def openings(study_folder: Path) -> list[dict[str, Any]]:
    """Every logged opening of the test part, oldest first."""
    path = study_folder / "openings.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def openings_note(study_folder: Path) -> str:
    """What every later result says of earlier openings; empty: there were none."""
    n = len(openings(study_folder))
    times = "once" if n == 1 else f"{n} times"
    return f"the sealed test part has been opened {times}; what came later may owe something to it" if n else ""
