"""A sweep file as a StudySpec: its text over its base and --set, checked, every mistake told at once.

A sweep file is one study. A manual file is a list of [[queue]] entries, each of which names the sweep file whose study
it belongs to: it becomes one StudySpec per sweep file. A file may extend one base: its tables merge over the base's
key by key, values are replaced whole, and a table that names another `kind` than the base's replaces it. Every key
keeps the place where it was written, through merging and `--set`.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from fintx.config import toml
from fintx.config.schema import FAMILIES, EncoderEntry, StudySpec, shape_names
from fintx.config.toml import KeyPath, SweepFileError, one_line, shortened
from fintx.config.validate import (
    BASE,
    MOST_PROBLEMS,
    OWN,
    SECTIONS,
    Place,
    Problems,
    Where,
    cross_checks,
    family_in,
    got,
    nearest,
    say,
)

_DEEPEST = 16
T = TypeVar("T")


def study(path: Path, *, overrides: Sequence[str] = (), text: str | None = None, counted: bool = True) -> StudySpec:
    """Read a sweep file, its base, and the command line's `--set key=value`.

    Args:
        text: what to read in place of the file's own content.
        counted: whether the queue must fit into n_trials; a study that has run some of it judges that itself.

    Raises:
        SweepFileError: all problems, one line each: FILE:LINE: key: what is wrong.
    """
    source = resolved(path, overrides=overrides, text=text)
    if _names_sweeps(source.tree):
        raise SweepFileError(
            f"{path}: is a manual file: its entries name the sweep files that they belong to; run it with: just manual"
        )
    problems = Problems(source.places, default=str(path))
    spec = _checked(source, problems, counted=counted)
    if problems.found:
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
            return Problems(resolved(path, overrides=overrides).places, default=str(path)).at(key_path)
        manual, entries = parse(path, toml.read_text(path)), blocks_of(path, sweep)
        source = _with_queue(resolved(sweep, overrides=overrides), manual, entries)
        return Problems(source.places, default=str(sweep), entries=entries).at(key_path)

    return at


def files(path: Path) -> tuple[Path, ...]:
    """A sweep file and, if it has one, its base."""
    extends = parse(path, toml.read_text(path)).tree.get("extends")
    return (path, path.parent / extends) if isinstance(extends, str) else (path,)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:  # an editor may be replacing it
        return (0, 0)
    return (found.st_mtime_ns, found.st_size)


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
    return not is_study(parse(path, toml.read_text(path)).tree)


def is_study(tree: dict[str, Any]) -> bool:
    """Whether a tree has what a sweep file can't do without and a manual file doesn't hold."""
    return any(section in tree for section in ("extends", "study", "task", "budget"))


def sweep_path(path: Path, given: str) -> Path:
    """The sweep file that a manual file's entry names."""
    return Path(os.path.normpath(path.parent / given))


def blocks_of(path: Path, sweep: Path) -> tuple[int, ...]:
    """Which of a manual file's entries, counted from 0, belong to a sweep file."""
    entries = parse(path, toml.read_text(path)).tree["queue"]
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
    source = parse(path, toml.read_text(path) if text is None else text)
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
    if problems.found:
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
    found = sweep_path(path, given)
    try:
        there = found.is_file()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    if not there:
        beside = sorted(each.name for each in path.parent.glob("*.toml") if each.name != path.name)
        problems.add(where, f"{got(given)} is not there{nearest(given, beside)}")
        return None
    return found


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
    manual: Source, sweep: Path, indices: Sequence[int], overrides: Sequence[str], problems: Problems
) -> StudySpec | None:
    """The study of a sweep file, its queue replaced by some of a manual file's entries."""
    try:
        below = resolved(sweep, overrides=overrides)
    except SweepFileError as error:
        problems.take_text(str(error))
        return None
    if not is_study(below.tree):
        problems.add(("queue", indices[0], "sweep"), f"{sweep} is no sweep file: it has no [study]")
        return None
    set_here = Problems(below.places, default=str(sweep))
    for place in (below.places[at] for at in below.places if at[0] == "queue" and below.places[at].rank > OWN):
        set_here.found[f"{place.words}: a manual file's queue is its own entries; edit them there"] = None
    source = _with_queue(below, manual, indices)
    own = Problems(source.places, default=str(sweep), entries=indices)
    spec = _checked(source, own, counted=False)
    problems.take(set_here)
    problems.take(own)
    return spec.model_copy(update={"study": spec.study.model_copy(update={"queue_extremes": False})})


def _with_queue(below: Source, manual: Source, indices: Sequence[int]) -> Source:
    """A sweep file's tree with some of a manual file's entries for its queue."""
    tree = {**below.tree, "queue": [_without_sweep(manual.tree["queue"][index]) for index in indices]}
    places = {at: place for at, place in below.places.items() if at[0] != "queue"}
    for at, place in manual.places.items():
        if at[0] == "queue" and len(at) > 1 and at[1] in indices:
            places["queue", indices.index(int(at[1])), *at[2:]] = place
    return Source(tree, places)


def _without_sweep(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "sweep"}


# --- checking ---------------------------------------------------------------------------------------------------------


def _checked(source: Source, problems: Problems, *, counted: bool = True) -> StudySpec:
    """The spec of a tree, with every problem of it noted; mended by stand-ins where there is one.

    Args:
        counted: whether the queue counts toward n_trials; a manual file's entries run whatever the total.
    """
    _searched_and_fixed(source, problems)
    spec, broken = _validate(source.tree, problems)
    for key_path, words in cross_checks(spec, broken=broken, counted=counted):
        problems.add(key_path, words)
    return spec


def _searched_and_fixed(source: Source, problems: Problems) -> None:
    """A search wins over a value of the base's; beside or above it a value would be silently without effect."""
    space = source.tree.get("space")
    for path in space if isinstance(space, dict) else ():
        section, _, key = path.partition(".")
        fixed = source.places.get((section, key))
        if section not in SECTIONS or fixed is None:
            continue
        searched = source.places.get(("space", path), source.places[("space",)])
        if fixed.rank >= searched.rank:
            mend = f'set space."{path}"={{choices=[…]}}' if fixed.rank > OWN else "take one of the two out"
            problems.add((section, key), f"is searched ({searched.words}), so a value here has no effect; {mend}")
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
    assert problems.found
    entries = {each["loc"][:2] for each in errors if each["loc"][0] in ("space", "queue") and len(each["loc"]) > 1}
    sections = {str(each["loc"][0]) for each in errors if each["loc"][:2] not in entries}
    mended = {section: content for section, content in tree.items() if section not in sections}
    mended |= {section: content for section, content in _STAND_INS.items() if section in sections}
    if "space" in mended:
        kept = {path: searched for path, searched in mended["space"].items() if ("space", path) not in entries}
        mended["space"] = kept
    if "queue" in mended:
        queue = enumerate(mended["queue"])
        one = dict.fromkeys(shape_names(FAMILIES[family_in(mended)].queue_entry), 1)
        mended["queue"] = [one if ("queue", index) in entries else entry for index, entry in queue]
    return _spec(mended), sections | {f"space.{path}" for section, path in entries if section == "space"}


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


@dataclass(frozen=True)
class Source:
    """A parsed text: its tree, with the dotted paths of [space] and [[queue]] joined, and where each key stands."""

    tree: dict[str, Any]
    places: dict[KeyPath, Place]


# --- a file over its base ---------------------------------------------------------------------------------------------


def resolved(path: Path, *, overrides: Sequence[str] = (), text: str | None = None) -> Source:
    """A file over its base, and the command line's `--set key=value` over both.

    Args:
        text: what to read in place of the file's own content.

    Raises:
        SweepFileError: a file that can't be read or is no TOML, a mistaken base or override.
    """
    source = parse(path, toml.read_text(path) if text is None else text)
    if "extends" in source.tree:
        base = _base(path, source)
        del source.tree["extends"]
        source = _merge(base, source)
    for rank, each in enumerate(overrides, start=OWN + 1):
        source = _override(source, each, rank=rank)
    return source


def parse(path: Path, text: str, *, rank: int = OWN) -> Source:
    """A text of a file, alone: its base is not looked at.

    Raises:
        SweepFileError: it is no TOML, or none that a sweep file can hold.
    """
    tree, lines = toml.parse(str(path), toml.plain(text))
    places = {_joined_path(key_path, tree): Place(rank, f"{path}:{line}") for key_path, line in lines.items()}
    _refuse_monsters(tree, places, default=str(path))
    return Source(_joined(tree), places)


def _refuse_monsters(tree: dict[str, Any], places: dict[KeyPath, Place], *, default: str) -> None:
    """No sweep file is nested deeply or holds an integer of more than TOML's 64 bits; later steps may rely on it."""
    pending: list[tuple[KeyPath, Any]] = [((), tree)]
    problems = Problems(places, default=default)
    while pending:
        path, value = pending.pop()
        if len(path) > _DEEPEST:
            problems.add(_joined_path(path, tree)[:4], "is nested too deeply; a sweep file has sections of keys")
        elif isinstance(value, dict | list):
            children = value.items() if isinstance(value, dict) else enumerate(value)
            pending += [((*path, key), child) for key, child in children]
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            problems.add(_joined_path(path, tree), "wanted a whole number of 64 bits, got a larger one")
    if problems.found:
        raise SweepFileError(problems.text())


def _base(path: Path, own: Source) -> Source:
    where, given = own.places[("extends",)].words, own.tree["extends"]
    if not isinstance(given, str) or not given:
        raise SweepFileError(f"{where}: extends: wanted the name of a file beside this one, got {got(given)}")
    base_path = path.parent / given
    try:
        found = base_path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        found = False
    if not found:
        raise SweepFileError(f"{where}: extends: {path.parent / shortened(given)} is not there")
    base = parse(base_path, toml.read_text(base_path), rank=BASE)
    if "extends" in base.tree:
        raise SweepFileError(
            f"{base.places[('extends',)].words}: extends: a base can't extend another; one level is all"
        )
    return base


def _joined(tree: dict[str, Any]) -> dict[str, Any]:
    """In [space] and [[queue]] a dotted path may be written with or without quotes: both mean the path."""
    joined = dict(tree)
    if isinstance(space := tree.get("space"), dict):
        joined["space"] = _join_table(space)
    if isinstance(queue := tree.get("queue"), list):
        joined["queue"] = [_queue_entry(entry) if isinstance(entry, dict) else entry for entry in queue]
    return joined


def _join_table(table: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if _is_group(key, value) else {key: value}
    return flat


def _queue_entry(entry: dict[str, Any]) -> dict[str, Any]:
    explicit = entry.get("values")
    flat = _join_table({key: value for key, value in entry.items() if key != "values"})
    own = {key: value for key, value in flat.items() if "." not in key}
    values = {key: value for key, value in flat.items() if "." in key}
    if isinstance(explicit, dict):
        values = {**_join_table(explicit), **values}
    elif explicit is not None:
        values = explicit
    return {**own, "values": values} if values or explicit is not None else own


def _is_group(key: str | int, value: Any) -> bool:
    """Is it half of a dotted path, such as optim of optim.learning_rate?"""
    return isinstance(value, dict) and (
        key in SECTIONS or bool(value) and all(isinstance(v, dict) for v in value.values())
    )


def _joined_path(path: KeyPath, tree: dict[str, Any]) -> KeyPath:
    """A path as it stands in the text → as it stands in the joined tree."""
    head = {"space": 1, "queue": 2}.get(str(path[0]), 0) if path else 0
    if path[:1] == ("queue",) and path[2:3] == ("values",):
        head = 3
    start, rest = path[:head], path[head:]
    if not head or not rest:
        return path
    if len(rest) > 1 and _is_group(rest[0], _held(tree, (*start, rest[0]))):
        rest = (f"{rest[0]}.{rest[1]}", *rest[2:])
    if head == 2 and "." in str(rest[0]):
        start = (*start, "values")
    return (*start, *rest)


def _held(tree: Any, path: KeyPath) -> Any:
    """What stands at a path; None where the text spells a key in another way than the tree."""
    for part in path:
        inside = part in tree if isinstance(tree, dict) else isinstance(tree, list) and isinstance(part, int)
        tree = tree[part] if inside else None
    return tree


# --- merging ----------------------------------------------------------------------------------------------------------


def _merge(base: Source, own: Source) -> Source:
    """The file over its base; a replaced value takes its places along."""
    tree = dict(base.tree)
    replaced: set[KeyPath] = set()
    for section, content in own.tree.items():
        below = base.tree.get(section)
        both = isinstance(content, dict) and isinstance(below, dict)
        if both and ("kind" not in content or content["kind"] == below.get("kind")):  # type: ignore[union-attr]
            tree[section] = {**below, **content}  # type: ignore[dict-item]
            replaced |= {(section, key) for key in content}
        else:
            tree[section] = content
            replaced.add((section,))
    kept = {path: at for path, at in base.places.items() if path[:1] not in replaced and path[:2] not in replaced}
    return Source(tree, {**kept, **own.places})


def _override(source: Source, text: str, *, rank: int) -> Source:
    """One --set key=value over all before it: tables are entered along the key's dots, the value replaces the old one.

    Raises:
        SweepFileError: no key, no value, or more than one.
    """
    shown = f"--set {one_line(shortened(_without_secret(text)))}"
    path, parsed = assignment(text, shown=shown, example="section.key=value, such as study.n_trials=3")
    if path == ("extends",):
        raise SweepFileError(f"{shown}: extends: a base is named in the file alone")
    place = Place(rank, shown)
    _refuse_monsters(parsed, {path[:1]: place}, default=shown)
    path, parsed = _joined_path(path, parsed), _joined(parsed)
    values = {path: _held(parsed, path)}
    if values[path] is None:  # half a dotted path, space.optim={…}: each whole path in it is set
        values = {("space", key): searched for key, searched in parsed["space"].items()}
    for each, content in values.items():
        source = _set(source, each, content, place)
    return source


def assignment(text: str, *, shown: str, example: str) -> tuple[KeyPath, dict[str, Any]]:
    """The one key path of a text like key=value, and its tree; the value is TOML, a bare word is text.

    Raises:
        SweepFileError: no key, no value, or more than one.
    """
    key, equals, value = text.partition("=")
    for attempt in (value, json.dumps(value.strip())) if equals else ():
        try:
            parsed, _ = toml.parse(shown, f"{key.strip()} = {attempt}")
            return _only_path(toml.parse(shown, f"{key.strip()} = 0")[0], parsed), parsed
        except SweepFileError:
            continue
    raise SweepFileError(f"{shown}: wanted {example}")


def _without_secret(text: str) -> str:
    """A database's URL may hold a password in any spelling; no more of it is shown than its kind."""
    key, equals, value = text.partition("=")
    kind, url, _ = value.partition("://")
    if url:
        return f"{key}={kind}://…"
    return f"{key}=…" if "storage" in key and ":" in value else text


def _set(source: Source, path: KeyPath, content: Any, place: Place) -> Source:
    tree = dict(source.tree)
    inside, changed = tree, path
    for depth, part in enumerate(map(str, path[:-1]), start=1):
        below = inside.get(part)
        if not isinstance(below, dict):  # the table is the command line's too
            changed = min(changed, path[:depth], key=len)
        inside[part] = dict(below) if isinstance(below, dict) else {}
        inside = inside[part]
    inside[str(path[-1])] = content
    kept = {at: where for at, where in source.places.items() if at[: len(changed)] != changed}
    return Source(tree, {**kept, changed: place, path: place})


def _only_path(keys: dict[str, Any], parsed: dict[str, Any]) -> KeyPath:
    """The one key path of an override."""
    path: KeyPath = ()
    inside: Any = keys
    while isinstance(inside, dict):
        if len(inside) != 1 or not isinstance(parsed, dict) or parsed.keys() != inside.keys():
            raise SweepFileError("more than one key")
        key = next(iter(inside))
        path, inside, parsed = (*path, key), inside[key], parsed[key]
    return path
