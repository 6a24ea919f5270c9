"""What stands in a sweep file's text, and where? Its tree, merged over its base, every key with the place it is from.

The only reader of TOML. A file may extend one base: its tables merge over the base's key by key, values are replaced
whole, and a table that names another `kind` than the base's replaces it. Every key keeps the place where it was
written, through merging and `--set`.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fintx.sweepchecks import SECTIONS
from fintx.sweepwords import got, one_line, shortened
from fintx.toml_lines import Path as KeyPath
from fintx.toml_lines import locate
from fintx.types import FintxError

_LARGEST = 2**20
_DEEPEST = 16
MOST_PROBLEMS = 100
_LONG_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"(?:[^"\\\n]|\\.){0,200}+"|'[^'\n]{0,200}+')[ \t]*+\.[ \t]*+){32}""")

BASE, OWN = 0, 1


class SweepFileError(FintxError):
    """Everything that is wrong with a sweep file, one line per problem."""

    def __init__(self, text: str):
        super().__init__("\n".join(one_line(line) for line in text.split("\n")))


class Place(NamedTuple):
    """Where a key was written."""

    rank: int
    """0: the base; 1: the file; 2 and up: --set, in order."""
    words: str


@dataclass(frozen=True)
class Source:
    """A parsed text: its tree, with the dotted paths of [space] and [[queue]] joined, and where each key stands."""

    tree: dict[str, Any]
    places: dict[KeyPath, Place]


Where = Callable[[KeyPath], str]
"""What a message calls a key: with the file and the line where it stands, as far as that is known."""


def spelled(path: KeyPath) -> str:
    """A key path as a message writes it: queue[0].d_model."""
    parts = [f"[{part}]" if isinstance(part, int) else shortened(part) for part in path]
    return ".".join(parts).replace(".[", "[")


# --- mistakes ---------------------------------------------------------------------------------------------------------


class Problems:
    """Collects lines, each with the place of the key or of the nearest table around it."""

    def __init__(self, places: dict[KeyPath, Place], *, default: str, entries: Sequence[int] = ()):
        """
        Args:
            default: where a key without any place is said to be wrong.
            entries: what the queue's entries are called, where they are some of a file's.
        """
        self._places = places
        self._default = default
        self._entries = entries
        self.found: dict[str, None] = {}
        self.uncounted = 0

    def add(self, path: KeyPath, words: str) -> None:
        """A line on a key."""
        self.found[one_line(f"{self.at(path)}: {words}")] = None

    def at(self, path: KeyPath) -> str:
        """Where a key stands and what it is called there: FILE:LINE: key."""
        written = tuple(part for part in path if part != "values") if path[:1] == ("queue",) else path
        if written != path[:1] and self._entries and path[:1] == ("queue",):
            written = ("queue", self._entries[int(written[1])], *written[2:])
        shown = spelled(written)
        return f"{self._place(path)}: {shown}" if shown else self._place(path)

    def take(self, other: Problems) -> None:
        """Add the lines of another part of the file."""
        self.found |= other.found
        self.uncounted += other.uncounted

    def take_text(self, text: str) -> None:
        """Add lines that were said elsewhere."""
        self.found |= dict.fromkeys(text.split("\n"))

    def text(self) -> str:
        """All lines, or the first hundred and how many there are beside them."""
        lines = list(self.found)
        more = max(0, len(lines) - MOST_PROBLEMS) + self.uncounted
        return "\n".join([*lines[:MOST_PROBLEMS], *([f"… and {more} problems more"] if more else [])])

    def _place(self, path: KeyPath) -> str:
        around = (path[:length] for length in range(len(path), 0, -1))
        return next((self._places[each].words for each in around if each in self._places), self._default)


# --- reading ----------------------------------------------------------------------------------------------------------


def resolved(path: Path, *, overrides: Sequence[str] = (), text: str | None = None) -> Source:
    """A file over its base, and the command line's `--set key=value` over both.

    Args:
        text: what to read in place of the file's own content.

    Raises:
        SweepFileError: a file that can't be read or is no TOML, a mistaken base or override.
    """
    source = parse(path, read_text(path) if text is None else text)
    if "extends" in source.tree:
        base = _base(path, source)
        del source.tree["extends"]
        source = _merge(base, source)
    for rank, each in enumerate(overrides, start=OWN + 1):
        source = _override(source, each, rank=rank)
    return source


def read_text(path: Path) -> str:
    """A file's text as it is, line ends and all.

    Raises:
        SweepFileError: it is missing, unreadable, too large or no UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise SweepFileError(f"{path}: is larger than 1 MiB; a sweep file holds one question")
        return content.decode("utf-8")
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


def parse(path: Path, text: str, *, rank: int = OWN) -> Source:
    """A text of a file, alone: its base is not looked at.

    Raises:
        SweepFileError: it is no TOML, or none that a sweep file can hold.
    """
    tree, lines = _parse_text(str(path), plain(text))
    places = {_joined_path(key_path, tree): Place(rank, f"{path}:{line}") for key_path, line in lines.items()}
    _refuse_monsters(tree, places, default=str(path))
    return Source(_joined(tree), places)


def plain(text: str) -> str:
    """The text without byte-order mark and carriage returns, as lines are counted in it."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


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
    base = parse(base_path, read_text(base_path), rank=BASE)
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
            parsed, _ = _parse_text(shown, f"{key.strip()} = {attempt}")
            return _only_path(tomllib.loads(f"{key.strip()} = 0"), parsed), parsed
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
