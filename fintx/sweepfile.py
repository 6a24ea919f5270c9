"""What does a sweep file ask for? TOML → StudySpec, with every error at once: file, line, key, wanted, got, nearest.

The only reader of TOML. A file may extend one base: its tables merge over the base's key by key, values are replaced
whole, and a table that names another `kind` than the base's replaces it. Every key keeps the place where it was
written, through merging and `--set`.
"""

from __future__ import annotations

import datetime
import difflib
import json
import re
import tomllib
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from fintx import toml_writer
from fintx.config import StudySpec
from fintx.sweepchecks import SECTIONS, cross_checks
from fintx.sweepwords import got, one_line, say, shortened
from fintx.toml_lines import Path as KeyPath
from fintx.toml_lines import locate
from fintx.types import FintxError

_LARGEST = 2**20
_DEEPEST = 16
_MOST_PROBLEMS = 100
_LONG_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"(?:[^"\\\n]|\\.){0,200}+"|'[^'\n]{0,200}+')[ \t]*+\.[ \t]*+){32}""")

_BASE, _OWN = 0, 1


class SweepFileError(FintxError):
    """Everything that is wrong with a sweep file, one line per problem."""

    def __init__(self, text: str):
        super().__init__("\n".join(one_line(line) for line in text.split("\n")))


class _Place(NamedTuple):
    rank: int
    """0: the base; 1: the file; 2 and up: --set, in order."""
    words: str


@dataclass(frozen=True)
class _Source:
    """A parsed text: its tree, with the dotted paths of [space] and [[queue]] joined, and where each key stands."""

    tree: dict[str, Any]
    places: dict[KeyPath, _Place]


def load(path: Path, *, overrides: Sequence[str] = ()) -> StudySpec:
    """Read a sweep file, its base, and the command line's `--set key=value`.

    Raises:
        SweepFileError: all problems, one line each: FILE:LINE: key: what is wrong.
    """
    source = _parse(path, rank=_OWN)
    if "extends" in source.tree:
        base = _base(path, source)
        del source.tree["extends"]
        source = _merge(base, source)
    for rank, text in enumerate(overrides, start=_OWN + 1):
        source = _override(source, text, rank=rank)
    problems = _Problems(source.places, default=str(path))
    _searched_and_fixed(source, problems)
    spec, broken = _validate(source.tree, problems)
    for key_path, words in cross_checks(spec, broken=broken):
        problems.add(key_path, words)
    if problems.found:
        raise SweepFileError(problems.text())
    return spec


def dump(spec: StudySpec) -> str:
    """A loaded spec as TOML text that loads back equal; what [space] searches is left out of its section."""
    tree = json.loads(spec.model_dump_json(exclude_none=True))
    for path in spec.space:
        section, _, key = path.partition(".")
        tree[section].pop(key, None)
    lines = []
    for section, content in tree.items():
        if section == "queue":
            for entry in content:
                values = entry.pop("values", {})
                lines += ["", "[[queue]]", *toml_writer.pairs({**entry, **values})]
        else:
            lines += ["", f"[{section}]", *toml_writer.pairs(content)]
    return "\n".join(lines).strip() + "\n"


# --- reading ----------------------------------------------------------------------------------------------------------


def _parse(path: Path, *, rank: int) -> _Source:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise SweepFileError(f"{path}: is larger than 1 MiB; a sweep file holds one question")
        text = content.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=2)
        hint = f"; did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else ""
        raise SweepFileError(f"{path}: is not there{hint}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise SweepFileError(f"{path}:{line}: is no UTF-8 text (byte {error.start})") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SweepFileError(f"{shortened(str(path))}: can't be read: {reason}") from None
    tree, lines = _parse_text(str(path), text)
    places = {_joined_path(key_path, tree): _Place(rank, f"{path}:{line}") for key_path, line in lines.items()}
    _refuse_monsters(tree, places, default=str(path))
    return _Source(_joined(tree), places)


def _parse_text(name: str, text: str) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """The tree and the line of every key."""
    if match := _LONG_KEY.search(text):
        line = text.count("\n", 0, match.start()) + 1
        raise SweepFileError(f"{name}:{line}: a key of more than 32 parts; keys have two, such as optim.learning_rate")
    try:
        return tomllib.loads(text), locate(text)
    except tomllib.TOMLDecodeError as error:
        match = re.search(r" \(at line (\d+), column (\d+)\)$", str(error))
        where = f"{name}:{match[1]}" if match else f"{name}:{text.count(chr(10)) + 1}"
        words = str(error)[: match.start()] if match else str(error).removesuffix(" (at end of document)")
        raise SweepFileError(f"{where}: is not valid TOML: {words[:1].lower()}{words[1:200]}") from None
    except RecursionError:
        raise SweepFileError(f"{name}: is nested too deeply; a sweep file has sections of keys") from None
    except ValueError as error:  # an integer of more digits than Python reads
        number = re.search(r"\d[\d_]{4000,}", text)
        where = f"{name}:{text.count(chr(10), 0, number.start()) + 1}" if number else name
        raise SweepFileError(f"{where}: is not valid TOML: {shortened(str(error))}") from None


def _refuse_monsters(tree: dict[str, Any], places: dict[KeyPath, _Place], *, default: str) -> None:
    """No sweep file is nested deeply or holds an integer of more than TOML's 64 bits; later steps may rely on it."""
    pending: list[tuple[KeyPath, Any]] = [((), tree)]
    problems = _Problems(places, default=default)
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


def _base(path: Path, own: _Source) -> _Source:
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
    base = _parse(base_path, rank=_BASE)
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


def _merge(base: _Source, own: _Source) -> _Source:
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
    return _Source(tree, {**kept, **own.places})


def _override(source: _Source, text: str, *, rank: int) -> _Source:
    """One --set key=value over all before it: tables are entered along the key's dots, the value replaces the old one.

    Raises:
        SweepFileError: no key, no value, or more than one.
    """
    shown = f"--set {one_line(shortened(text))}"
    key, equals, value = text.partition("=")
    for attempt in (value, json.dumps(value.strip())) if equals else ():  # a bare word is a string
        try:
            parsed, _ = _parse_text(shown, f"{key.strip()} = {attempt}")
            path = _only_path(tomllib.loads(f"{key.strip()} = 0"), parsed)
            break
        except SweepFileError:
            continue
    else:
        raise SweepFileError(f"{shown}: wanted section.key=value, such as study.n_trials=3")
    if path == ("extends",):
        raise SweepFileError(f"{shown}: extends: a base is named in the file alone")
    place = _Place(rank, shown)
    _refuse_monsters(parsed, {path[:1]: place}, default=shown)
    path, parsed = _joined_path(path, parsed), _joined(parsed)
    values = {path: _held(parsed, path)}
    if values[path] is None:  # half a dotted path, space.optim={…}: each whole path in it is set
        values = {("space", key): searched for key, searched in parsed["space"].items()}
    for each, content in values.items():
        source = _set(source, each, content, place)
    return source


def _set(source: _Source, path: KeyPath, content: Any, place: _Place) -> _Source:
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
    return _Source(tree, {**kept, changed: place, path: place})


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


# --- checking ---------------------------------------------------------------------------------------------------------


class _Problems:
    """Collects lines, each with the place of the key or of the nearest table around it."""

    def __init__(self, places: dict[KeyPath, _Place], *, default: str):
        self._places = places
        self._default = default
        self.found: dict[str, None] = {}
        self.uncounted = 0

    def add(self, path: KeyPath, words: str) -> None:
        written = tuple(part for part in path if part != "values") if path[:1] == ("queue",) else path
        parts = [f"[{part}]" if isinstance(part, int) else shortened(part) for part in written]
        shown = ".".join(parts).replace(".[", "[")
        self.found[one_line(f"{self._place(path)}: {shown + ': ' if shown else ''}{words}")] = None

    def text(self) -> str:
        lines = list(self.found)
        more = max(0, len(lines) - _MOST_PROBLEMS) + self.uncounted
        return "\n".join([*lines[:_MOST_PROBLEMS], *([f"… and {more} problems more"] if more else [])])

    def _place(self, path: KeyPath) -> str:
        around = (path[:length] for length in range(len(path), 0, -1))
        return next((self._places[each].words for each in around if each in self._places), self._default)


def _searched_and_fixed(source: _Source, problems: _Problems) -> None:
    """A search wins over a value of the base's; beside or above it a value would be silently without effect."""
    space = source.tree.get("space")
    for path in space if isinstance(space, dict) else ():
        section, _, key = path.partition(".")
        fixed = source.places.get((section, key))
        if section not in SECTIONS or fixed is None:
            continue
        searched = source.places.get(("space", path), source.places[("space",)])
        if fixed.rank >= searched.rank:
            mend = f'set space."{path}"={{choices=[…]}}' if fixed.rank > _OWN else "take one of the two out"
            problems.add((section, key), f"is searched ({searched.words}), so a value here has no effect; {mend}")
        source.tree[section] = {name: value for name, value in source.tree[section].items() if name != key}


def _validate(tree: dict[str, Any], problems: _Problems) -> tuple[StudySpec, Container[str]]:
    """The spec, or one whose broken sections and entries are filled in so that the rest can be checked."""
    try:
        return _spec(tree), ()
    except ValidationError as error:
        errors = error.errors()
    problems.uncounted = len(errors[_MOST_PROBLEMS:])
    for each in errors[:_MOST_PROBLEMS]:
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
        mended["queue"] = [_ENTRY if ("queue", index) in entries else entry for index, entry in queue]
    return _spec(mended), sections | {f"space.{path}" for section, path in entries if section == "space"}


_STAND_INS: dict[str, Any] = {
    "study": {"name": "x"},
    "task": {"kind": "threshold", "price": "high", "threshold": 0.01, "horizon": 1},
    "budget": {"parameters": 1},
}
"""For broken sections that have no default."""
_ENTRY = {"d_model": 1, "n_layers": 1, "n_heads": 1, "d_ff": 1}


def _spec(tree: dict[str, Any]) -> StudySpec:
    return StudySpec.model_validate_json(json.dumps(tree, default=_plain))


def _plain(value: Any) -> str:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise TypeError(f"TOML gave a {type(value).__name__}")
