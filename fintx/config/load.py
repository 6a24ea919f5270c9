"""A sweep file as a StudySpec: its text over its base and --set, checked, every mistake reported at once.

A sweep file is one study. A manual file is a list of [[queue]] entries, each of which names the sweep file whose study
it belongs to: it becomes one StudySpec per sweep file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from fintx.config import toml
from fintx.config.families import FAMILY_CONFIGS, EncoderEntry, shape_names
from fintx.config.schema import StudySpec
from fintx.config.toml import SweepFileError
from fintx.config.validate import (
    MOST_PROBLEMS,
    OWN,
    SECTIONS,
    KeyPath,
    Problems,
    Where,
    cross_checks,
    describe,
    family_in,
    got,
    nearest,
)

T = TypeVar("T")


def study(path: Path, *, overrides: Sequence[str] = (), text: str | None = None, counted: bool = True) -> StudySpec:
    """Read a sweep file, its base, and the command line's `--set key=value`.

    Args:
        text: what to read in place of the file's own content.
        counted: whether the queue must fit into n_trials; a study that has run some of it judges that itself.

    Raises:
        SweepFileError: all problems, one line each: FILE:LINE: key: what is wrong.
    """
    source = toml.resolved(path, overrides=overrides, text=text)
    queue = source.tree.get("queue")
    entries = queue if isinstance(queue, list) else []
    if not is_study(source.tree) and any(isinstance(entry, dict) and "sweep" in entry for entry in entries):
        raise SweepFileError(
            f"{path}: is a manual file: its entries name the sweep files that they belong to; run it with: just manual"
        )
    problems = Problems(source.places, default=str(path))
    spec = _checked(source, problems, counted=counted)
    if problems.lines:
        raise SweepFileError(problems.text())
    return spec


def dump(spec: StudySpec) -> str:
    """A loaded spec as TOML text that loads back equal; what [space] searches is left out of its section."""
    tree = json.loads(spec.model_dump_json(exclude_none=True, exclude={"queue"}))
    for path in spec.space:
        section, _, key = path.partition(".")
        tree[section].pop(key, None)
    lines = []
    for section, content in tree.items():
        lines += ["", f"[{section}]", *toml.pairs(content)]
    for entry in spec.queue:
        fields = {**entry.shape.model_dump(), **entry.model_dump(exclude_defaults=True, exclude={"values"})}
        lines += ["", "[[queue]]", *toml.pairs({**fields, **entry.values})]
    return "\n".join(lines).strip() + "\n"


def where(path: Path, *, overrides: Sequence[str] = (), sweep: Path | None = None) -> Where:
    """Where the keys of a file's study stand, for mistakes that only the study can see; looked up when asked.

    Args:
        sweep: of a manual file: the sweep file whose study it is.
    """

    def at(key_path: KeyPath) -> str:
        if sweep is None:
            return Problems(toml.resolved(path, overrides=overrides).places, default=str(path)).at(key_path)
        manual_file, indices = toml.parse(path), blocks_of(path, sweep)
        source = _with_queue(toml.resolved(sweep, overrides=overrides), manual_file, indices)
        return Problems(source.places, default=str(sweep), entries=indices).at(key_path)

    return at


def file_and_base(path: Path) -> tuple[Path, ...]:
    """A sweep file and, if it has one, its base."""
    base = toml.parse(path).tree.get("extends")
    return (path, path.parent / base) if isinstance(base, str) else (path,)


def watch(paths: Sequence[Path], read: Callable[[], T]) -> Callable[[], T | None]:
    """A function that reads again if one of the files was edited since its last call, and else returns none."""
    last = [*map(_stamp, paths)]

    def read_if_edited() -> T | None:
        nonlocal last
        if (current := [*map(_stamp, paths)]) == last:
            return None
        last = current
        return read()

    return read_if_edited


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:  # an editor may be replacing it
        return None
    return stat.st_mtime_ns, stat.st_size


# --- manual files -----------------------------------------------------------------------------------------------------


def is_manual(path: Path) -> bool:
    """Whether a file holds nothing but queue entries for studies of other files.

    Raises:
        SweepFileError: it can't be read or is not TOML.
    """
    return not is_study(toml.parse(path).tree)


def is_study(tree: dict[str, Any]) -> bool:
    """Whether a tree has what every sweep file has and no manual file."""
    return any(section in tree for section in ("extends", "study", "task", "budget"))


def sweep_path(path: Path, name: str) -> Path:
    """The sweep file that a manual file's entry names."""
    return Path(os.path.normpath(path.parent / name))


def blocks_of(path: Path, sweep: Path) -> tuple[int, ...]:
    """Which of a manual file's entries, counted from 0, belong to a sweep file."""
    entries = toml.parse(path).tree["queue"]
    return tuple(index for index, entry in enumerate(entries) if sweep_path(path, entry["sweep"]) == sweep)


def manual(path: Path, *, overrides: Sequence[str] = (), text: str | None = None) -> dict[Path, StudySpec]:
    """Read a manual file and the sweep files that its entries name.

    Args:
        overrides: of the sweep files' keys.
        text: what to read in place of the manual file's own content.

    Returns:
        Sweep file → its spec, whose queue is exactly the manual file's entries for it (so no extremes are asked for);
        in order of first mention.

    Raises:
        SweepFileError: all problems of all entries, and of the files they name, one line each.
    """
    source = toml.parse(path, text)
    problems = Problems(source.places, default=str(path))
    for section in source.tree:
        if section != "queue":
            problems.add((section,), "a manual file holds [[queue]] entries alone; the sweep files hold the rest")
    entries = source.tree.get("queue", [])
    if not isinstance(entries, list):
        problems.add(("queue",), f"wanted [[queue]] entries, got {got(entries)}")
    elif not entries:
        problems.add((), 'holds no [[queue]] entry; each names its study, such as sweep = "200M_h3.toml", and a shape')
    groups: dict[Path, list[int]] = {}
    for index, entry in enumerate(entries if isinstance(entries, list) else []):
        sweep = _sweep_of(path, entry, index, problems)
        if sweep is not None:
            groups.setdefault(sweep, []).append(index)
        else:
            _check_alone(source.tree, index, problems)
    specs = {sweep: _study_of_entries(source, sweep, indices, overrides, problems) for sweep, indices in groups.items()}
    if problems.lines:
        raise SweepFileError(problems.text())
    return {sweep: spec for sweep, spec in specs.items() if spec is not None}


def _sweep_of(path: Path, entry: Any, index: int, problems: Problems) -> Path | None:
    """The sweep file that an entry names; none where it names none."""
    if not isinstance(entry, dict):
        return None
    where: KeyPath = ("queue", index, "sweep")
    if "sweep" not in entry:
        problems.add(where[:2], 'sweep: is missing; wanted a sweep file beside this one, like "200M_h3.toml"')
        return None
    name = entry["sweep"]
    if not isinstance(name, str) or not name:
        problems.add(where, f"wanted the name of a sweep file beside this one, got {got(name)}")
        return None
    sweep = sweep_path(path, name)
    if not os.path.isfile(sweep):  # false also for a name that no file can have
        names = sorted(file.name for file in path.parent.glob("*.toml") if file.name != path.name)
        problems.add(where, f"{got(name)} is not there{nearest(name, names)}")
        return None
    return sweep


def _check_alone(tree: dict[str, Any], index: int, problems: Problems) -> None:
    """The mistakes that show in an entry whose study isn't known."""
    entry = tree["queue"][index]
    try:
        EncoderEntry.model_validate_json(_json(_without_sweep(entry) if isinstance(entry, dict) else entry))
    except ValidationError as error:
        for problem in error.errors():
            if line := describe({**problem, "loc": ("queue", index, *problem["loc"])}, tree):
                problems.add(*line)


def _study_of_entries(
    manual_file: toml.Source, sweep: Path, indices: Sequence[int], overrides: Sequence[str], problems: Problems
) -> StudySpec | None:
    """The study of a sweep file, its queue replaced by some of a manual file's entries."""
    try:
        sweep_file = toml.resolved(sweep, overrides=overrides)
    except SweepFileError as error:
        problems.take(str(error).split("\n"))
        return None
    if not is_study(sweep_file.tree):
        problems.add(("queue", indices[0], "sweep"), f"{sweep} is no sweep file: it has no [study]")
        return None
    set_places = [place for key, place in sweep_file.places.items() if key[0] == "queue" and place.rank > OWN]
    problems.take(f"{place.words}: a manual file's queue is its own entries; edit them there" for place in set_places)
    source = _with_queue(sweep_file, manual_file, indices)
    own_problems = Problems(source.places, default=str(sweep), entries=indices)
    spec = _checked(source, own_problems, counted=False)
    problems.take(own_problems.lines, own_problems.uncounted)
    return spec.model_copy(update={"study": spec.study.model_copy(update={"queue_extremes": False})})


def _with_queue(sweep_file: toml.Source, manual_file: toml.Source, indices: Sequence[int]) -> toml.Source:
    """A sweep file's tree with some of a manual file's entries as its queue."""
    queue = [_without_sweep(manual_file.tree["queue"][index]) for index in indices]
    places = {path: place for path, place in sweep_file.places.items() if path[0] != "queue"}
    for path, place in manual_file.places.items():
        if path[0] == "queue" and len(path) > 1 and path[1] in indices:
            places["queue", indices.index(int(path[1])), *path[2:]] = place
    return toml.Source({**sweep_file.tree, "queue": queue}, places)


def _without_sweep(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "sweep"}


# --- checking ---------------------------------------------------------------------------------------------------------


def _checked(source: toml.Source, problems: Problems, *, counted: bool = True) -> StudySpec:
    """The spec of a tree, with every problem of it noted; stand-ins take the place of what is wrong.

    Args:
        counted: whether the queue counts toward n_trials; a manual file's entries run whatever the total.
    """
    tree = _without_searched(source, problems)
    spec, broken = _validated(tree, problems)
    for key_path, message in cross_checks(spec, broken=broken, counted=counted):
        problems.add(key_path, message)
    return spec


def _without_searched(source: toml.Source, problems: Problems) -> dict[str, Any]:
    """The tree without the base's values of what is searched; values of the same file or above have no effect."""
    tree, space = dict(source.tree), source.tree.get("space")
    for path in space if isinstance(space, dict) else ():
        section, _, key = path.partition(".")
        fixed = source.places.get((section, key))
        if section not in SECTIONS or fixed is None:
            continue
        searched = source.places.get(("space", path), source.places[("space",)])
        if fixed.rank >= searched.rank:
            fix = f'set space."{path}"={{choices=[…]}}' if fixed.rank > OWN else "take one of the two out"
            problems.add((section, key), f"is searched ({searched.words}), so a value here has no effect; {fix}")
        tree[section] = {name: value for name, value in tree[section].items() if name != key}
    return tree


def _validated(tree: dict[str, Any], problems: Problems) -> tuple[StudySpec, Container[str]]:
    """The spec, with broken sections and entries filled in so that the rest can be checked, and what was broken."""
    try:
        return StudySpec.model_validate_json(_json(tree)), ()
    except ValidationError as error:
        errors = error.errors()
    problems.uncounted = len(errors[MOST_PROBLEMS:])
    for problem in errors[:MOST_PROBLEMS]:
        if line := describe(problem, tree):
            problems.add(*line)
    assert problems.lines
    locations = [problem["loc"] for problem in errors]
    entries = {location[:2] for location in locations if location[0] in ("space", "queue") and len(location) > 1}
    sections = {str(location[0]) for location in locations if location[:2] not in entries}
    repaired = {section: content for section, content in tree.items() if section not in sections}
    repaired |= {section: content for section, content in _STAND_INS.items() if section in sections}
    if "space" in repaired:
        repaired["space"] = {
            path: searched for path, searched in repaired["space"].items() if ("space", path) not in entries
        }
    if "queue" in repaired:
        ones = dict.fromkeys(shape_names(FAMILY_CONFIGS[family_in(repaired)].queue_entry), 1)
        queue = enumerate(repaired["queue"])
        repaired["queue"] = [ones if ("queue", index) in entries else entry for index, entry in queue]
    broken = sections | {f"space.{path}" for section, path in entries if section == "space"}
    return StudySpec.model_validate_json(_json(repaired)), broken


_STAND_INS: dict[str, Any] = {
    "study": {"name": "x"},
    "task": {"kind": "threshold", "price": "high", "threshold": 0.01, "horizon": 1},
    "budget": {"parameters": 1},
}
"""For broken sections that have no default."""


def _json(tree: Any) -> str:
    return json.dumps(tree, default=str)  # dates and times
