"""A sweep file as a StudySpec: its text over its base and --set, checked, every mistake told at once.

A sweep file is one study. A manual file is a list of [[queue]] entries, each of which names the sweep file whose study
it belongs to: it becomes one StudySpec per sweep file.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from fintx.config import toml
from fintx.config.families import FAMILIES, EncoderEntry, shape_names
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
    family_in,
    got,
    nearest,
    say,
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
    if _names_sweeps(source.tree):
        raise SweepFileError(
            f"{path}: is a manual file: its entries name the sweep files that they belong to; run it with: just manual"
        )
    problems = Problems(source.places, default=str(path))
    spec = _checked(source, problems, counted=counted)
    if problems.lines:
        raise SweepFileError(problems.text())
    return spec


def watch(paths: Sequence[Path], read: Callable[[], T]) -> Callable[[], T | None]:
    """A function that reads again when one of the files has been edited since the last look; none: none has."""
    seen = [*map(_stamp, paths)]

    def again() -> T | None:
        nonlocal seen
        if (now := [*map(_stamp, paths)]) == seen:
            return None
        seen = now
        return read()

    return again


def where(path: Path, *, overrides: Sequence[str] = (), sweep: Path | None = None) -> Where:
    """Where the keys of a file's study stand, for mistakes that only the study can see; looked up when asked.

    Args:
        sweep: of a manual file: the sweep file whose study it is.
    """

    def at(key_path: KeyPath) -> str:
        if sweep is None:
            return Problems(toml.resolved(path, overrides=overrides).places, default=str(path)).at(key_path)
        manual, entries = toml.parse(path, toml.read_text(path)), blocks_of(path, sweep)
        source = _with_queue(toml.resolved(sweep, overrides=overrides), manual, entries)
        return Problems(source.places, default=str(sweep), entries=entries).at(key_path)

    return at


def files(path: Path) -> tuple[Path, ...]:
    """A sweep file and, if it has one, its base."""
    extends = toml.parse(path, toml.read_text(path)).tree.get("extends")
    return (path, path.parent / extends) if isinstance(extends, str) else (path,)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:  # an editor may be replacing it
        return (0, 0)
    return (stat.st_mtime_ns, stat.st_size)


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


# --- manual files -----------------------------------------------------------------------------------------------------


def is_manual(path: Path) -> bool:
    """Whether a file holds nothing but queue entries for studies of other files.

    Raises:
        SweepFileError: it can't be read or is no TOML.
    """
    return not is_study(toml.parse(path, toml.read_text(path)).tree)


def is_study(tree: dict[str, Any]) -> bool:
    """Whether a tree has what a sweep file can't do without and a manual file doesn't hold."""
    return any(section in tree for section in ("extends", "study", "task", "budget"))


def sweep_path(path: Path, given: str) -> Path:
    """The sweep file that a manual file's entry names."""
    return Path(os.path.normpath(path.parent / given))


def blocks_of(path: Path, sweep: Path) -> tuple[int, ...]:
    """Which of a manual file's entries, counted from 0, belong to a sweep file."""
    entries = toml.parse(path, toml.read_text(path)).tree["queue"]
    return tuple(index for index, entry in enumerate(entries) if sweep_path(path, entry["sweep"]) == sweep)


def manual(path: Path, *, overrides: Sequence[str] = ()) -> tuple[StudySpec, ...]:
    """The studies of a manual file, in order of first mention; the queue of each is the file's entries for it.

    Raises:
        SweepFileError: as `by_sweep`.
    """
    return tuple(by_sweep(path, overrides=overrides).values())


def by_sweep(path: Path, *, overrides: Sequence[str] = (), text: str | None = None) -> dict[Path, StudySpec]:
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
    source = toml.parse(path, toml.read_text(path) if text is None else text)
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
    specs = {sweep: _group(source, sweep, indices, overrides, problems) for sweep, indices in groups.items()}
    if problems.lines:
        raise SweepFileError(problems.text())
    return {sweep: spec for sweep, spec in specs.items() if spec is not None}


def _names_sweeps(tree: dict[str, Any]) -> bool:
    """Is it a manual file's tree, and not an empty or broken one?"""
    queue = tree.get("queue")
    entries = queue if isinstance(queue, list) else []
    named = any(isinstance(entry, dict) and "sweep" in entry for entry in entries)
    return named and not is_study(tree)


def _sweep_of(path: Path, entry: Any, index: int, problems: Problems) -> Path | None:
    """The sweep file that an entry names; none where it names none."""
    if not isinstance(entry, dict):
        return None
    if "sweep" not in entry:
        problems.add(("queue", index), 'sweep: is missing; wanted a sweep file beside this one, like "200M_h3.toml"')
        return None
    where, given = ("queue", index, "sweep"), entry["sweep"]
    if not isinstance(given, str) or not given:
        problems.add(where, f"wanted the name of a sweep file beside this one, got {got(given)}")
        return None
    sweep = sweep_path(path, given)
    try:
        there = sweep.is_file()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    if not there:
        beside = sorted(each.name for each in path.parent.glob("*.toml") if each.name != path.name)
        problems.add(where, f"{got(given)} is not there{nearest(given, beside)}")
        return None
    return sweep


def _check_alone(tree: dict[str, Any], index: int, problems: Problems) -> None:
    """What can be said of an entry whose study isn't known."""
    entry = tree["queue"][index]
    try:
        EncoderEntry.model_validate_json(_json(_without_sweep(entry) if isinstance(entry, dict) else entry))
    except ValidationError as error:
        for each in error.errors():
            if said := say({**each, "loc": ("queue", index, *each["loc"])}, tree):
                problems.add(*said)


def _group(
    manual: toml.Source, sweep: Path, indices: Sequence[int], overrides: Sequence[str], problems: Problems
) -> StudySpec | None:
    """The study of a sweep file, its queue replaced by some of a manual file's entries."""
    try:
        below = toml.resolved(sweep, overrides=overrides)
    except SweepFileError as error:
        problems.take_text(str(error))
        return None
    if not is_study(below.tree):
        problems.add(("queue", indices[0], "sweep"), f"{sweep} is no sweep file: it has no [study]")
        return None
    set_here = Problems(below.places, default=str(sweep))
    for place in (below.places[at] for at in below.places if at[0] == "queue" and below.places[at].rank > OWN):
        set_here.lines[f"{place.words}: a manual file's queue is its own entries; edit them there"] = None
    source = _with_queue(below, manual, indices)
    own = Problems(source.places, default=str(sweep), entries=indices)
    spec = _checked(source, own, counted=False)
    problems.take(set_here)
    problems.take(own)
    return spec.model_copy(update={"study": spec.study.model_copy(update={"queue_extremes": False})})


def _with_queue(below: toml.Source, manual: toml.Source, indices: Sequence[int]) -> toml.Source:
    """A sweep file's tree with some of a manual file's entries for its queue."""
    tree = {**below.tree, "queue": [_without_sweep(manual.tree["queue"][index]) for index in indices]}
    places = {at: place for at, place in below.places.items() if at[0] != "queue"}
    for at, place in manual.places.items():
        if at[0] == "queue" and len(at) > 1 and at[1] in indices:
            places["queue", indices.index(int(at[1])), *at[2:]] = place
    return toml.Source(tree, places)


def _without_sweep(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "sweep"}


# --- checking ---------------------------------------------------------------------------------------------------------


def _checked(source: toml.Source, problems: Problems, *, counted: bool = True) -> StudySpec:
    """The spec of a tree, with every problem of it noted; stand-ins take the place of what is wrong.

    Args:
        counted: whether the queue counts toward n_trials; a manual file's entries run whatever the total.
    """
    _searched_and_fixed(source, problems)
    spec, broken = _validate(source.tree, problems)
    for key_path, words in cross_checks(spec, broken=broken, counted=counted):
        problems.add(key_path, words)
    return spec


def _searched_and_fixed(source: toml.Source, problems: Problems) -> None:
    """A search wins over a value of the base's; beside or above it a value would be silently without effect."""
    space = source.tree.get("space")
    for path in space if isinstance(space, dict) else ():
        section, _, key = path.partition(".")
        fixed = source.places.get((section, key))
        if section not in SECTIONS or fixed is None:
            continue
        searched = source.places.get(("space", path), source.places[("space",)])
        if fixed.rank >= searched.rank:
            fix = f'set space."{path}"={{choices=[…]}}' if fixed.rank > OWN else "take one of the two out"
            problems.add((section, key), f"is searched ({searched.words}), so a value here has no effect; {fix}")
        source.tree[section] = {name: value for name, value in source.tree[section].items() if name != key}


def _validate(tree: dict[str, Any], problems: Problems) -> tuple[StudySpec, Container[str]]:
    """The spec, or one whose broken sections and entries are filled in so that the rest can be checked."""
    try:
        return _spec(tree), ()
    except ValidationError as error:
        errors = error.errors()
    problems.uncounted = len(errors[MOST_PROBLEMS:])
    for each in errors[:MOST_PROBLEMS]:
        if said := say(each, tree):
            problems.add(*said)
    assert problems.lines
    entries = {each["loc"][:2] for each in errors if each["loc"][0] in ("space", "queue") and len(each["loc"]) > 1}
    sections = {str(each["loc"][0]) for each in errors if each["loc"][:2] not in entries}
    repaired = {section: content for section, content in tree.items() if section not in sections}
    repaired |= {section: content for section, content in _STAND_INS.items() if section in sections}
    if "space" in repaired:
        kept = {path: searched for path, searched in repaired["space"].items() if ("space", path) not in entries}
        repaired["space"] = kept
    if "queue" in repaired:
        queue = enumerate(repaired["queue"])
        one = dict.fromkeys(shape_names(FAMILIES[family_in(repaired)].queue_entry), 1)
        repaired["queue"] = [one if ("queue", index) in entries else entry for index, entry in queue]
    return _spec(repaired), sections | {f"space.{path}" for section, path in entries if section == "space"}


_STAND_INS: dict[str, Any] = {
    "study": {"name": "x"},
    "task": {"kind": "threshold", "price": "high", "threshold": 0.01, "horizon": 1},
    "budget": {"parameters": 1},
}
"""For broken sections that have no default."""


def _spec(tree: dict[str, Any]) -> StudySpec:
    return StudySpec.model_validate_json(_json(tree))


def _json(tree: Any) -> str:
    return json.dumps(tree, default=_plain)


def _plain(value: Any) -> str:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise TypeError(f"TOML gave a {type(value).__name__}")
