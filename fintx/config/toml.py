"""TOML text: a file over its base and `--set` as one tree, the line of every key, and values written as TOML.

This is the only module that uses `tomllib`, which gives no lines. A file may extend one base: its tables merge over
the base's key by key, values are replaced whole, and a table that names another `kind` replaces the base's.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fintx.config.validate import BASE, OWN, SECTIONS, KeyPath, Place, Problems, got, one_line, shortened
from fintx.errors import FintxError

_LARGEST_FILE = 2**20
_DEEPEST = 16
# tomllib's time grows with the square of the number of a key's parts.
_LONG_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"(?:[^"\\\n]|\\.){0,200}+"|'[^'\n]{0,200}+')[ \t]*+\.[ \t]*+){32}""")


class SweepFileError(FintxError):
    """Everything that is wrong with a sweep file, one line per problem."""

    def __init__(self, text: str):
        super().__init__("\n".join(one_line(line) for line in text.split("\n")))


@dataclass(frozen=True)
class Source:
    """A parsed text: its tree, with the dotted paths of [space] and [[queue]] joined, and where each key stands."""

    tree: dict[str, Any]
    places: dict[KeyPath, Place]


def resolved(path: Path, *, overrides: Sequence[str] = (), text: str | None = None) -> Source:
    """A file over its base, and the command line's `--set key=value` over both.

    Args:
        text: what to read in place of the file's own content.

    Raises:
        SweepFileError: a file that can't be read or is not TOML, or a wrong base or override.
    """
    source = parse(path, text)
    if "extends" in source.tree:
        base = _base(path, source)
        del source.tree["extends"]
        source = _merge(base, source)
    for rank, override in enumerate(overrides, start=OWN + 1):
        source = _override(source, override, rank=rank)
    return source


# --- one file ---------------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """A file's text as it is, line ends and all.

    Raises:
        SweepFileError: it is missing, unreadable, too large or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise SweepFileError(f"{path}: is larger than 1 MiB; a sweep file holds one study")
        return content.decode("utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=2)
        hint = f"; did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else ""
        raise SweepFileError(f"{path}: is not there{hint}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise SweepFileError(f"{path}:{line}: is not UTF-8 text (byte {error.start})") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SweepFileError(f"{shortened(str(path))}: can't be read: {reason}") from None


def plain(text: str) -> str:
    """The text without byte-order mark and carriage returns, as lines are counted in it."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def parse(path: Path, text: str | None = None, *, rank: int = OWN) -> Source:
    """A file by itself, without its base; `text` stands for its content where given.

    Raises:
        SweepFileError: it can't be read, is not TOML, or holds what no sweep file can hold.
    """
    tree, lines = _parse_text(str(path), plain(read_text(path) if text is None else text))
    tree, moved = _joined(tree)
    places = {_joined_path(key_path, moved): Place(rank, f"{path}:{line}") for key_path, line in lines.items()}
    _check_extremes(tree, places, default=str(path))
    return Source(tree, places)


def _parse_text(name: str, text: str) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """The tree and the line of every key."""
    if match := _LONG_KEY.search(text):
        line = text.count("\n", 0, match.start()) + 1
        raise SweepFileError(f"{name}:{line}: a key of more than 32 parts; keys have two, such as optim.learning_rate")
    try:
        return tomllib.loads(text), locate(text)
    except tomllib.TOMLDecodeError as error:
        match = re.search(r" \(at line (\d+), column \d+\)$", str(error))
        line = int(match[1]) if match else text.count("\n") + 1
        reason = str(error)[: match.start()] if match else str(error).removesuffix(" (at end of document)")
        raise SweepFileError(f"{name}:{line}: is not valid TOML: {reason[:1].lower()}{reason[1:200]}") from None
    except RecursionError:
        raise SweepFileError(f"{name}: is nested too deeply; a sweep file has sections of keys") from None
    except ValueError as error:  # an integer of more digits than Python reads
        number = re.search(r"\d[\d_]{4000,}", text)
        place = f"{name}:{text.count(chr(10), 0, number.start()) + 1}" if number else name
        raise SweepFileError(f"{place}: is not valid TOML: {shortened(str(error))}") from None


def _check_extremes(tree: dict[str, Any], places: dict[KeyPath, Place], *, default: str) -> None:
    """Refuse deep nesting and integers beyond TOML's 64 bits, so that later steps need not expect them."""
    pending: list[tuple[KeyPath, Any]] = [((), tree)]
    problems = Problems(places, default=default)
    while pending:
        path, value = pending.pop()
        if len(path) > _DEEPEST:
            problems.add(path[:4], "is nested too deeply; a sweep file has sections of keys")
        elif isinstance(value, dict | list):
            children = value.items() if isinstance(value, dict) else enumerate(value)
            pending += [((*path, key), child) for key, child in children]
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            problems.add(path, "wanted a whole number of 64 bits, got a larger one")
    if problems.lines:
        raise SweepFileError(problems.text())


# --- dotted paths -----------------------------------------------------------------------------------------------------


def _joined(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[KeyPath, KeyPath]]:
    """Make optim.learning_rate one key of [space] and of a [[queue]] entry's values, in quotes or not.

    Returns:
        The tree, and where each key that moved stands in it.
    """
    tree = dict(tree)
    moved: dict[KeyPath, KeyPath] = {}
    if isinstance(tree.get("space"), dict):
        keys = [*_dotted(tree["space"], ("space",))]
        tree["space"] = {key: content for _, key, content in keys}
        moved |= {path: ("space", key) for path, key, _ in keys}
    if isinstance(tree.get("queue"), list):
        tree["queue"] = queue = list(tree["queue"])
        for index, entry in enumerate(queue):
            if isinstance(entry, dict):
                queue[index] = _joined_entry(entry, ("queue", index), moved)
    return tree, moved


def _joined_entry(entry: dict[str, Any], at: KeyPath, moved: dict[KeyPath, KeyPath]) -> dict[str, Any]:
    joined, values = {}, {}
    for path, key, content in _dotted({key: content for key, content in entry.items() if key != "values"}, at):
        if "." in key:
            values[key], moved[path] = content, (*at, "values", key)
        else:
            joined[key] = content
    explicit = entry.get("values", {})
    if not isinstance(explicit, dict):  # an error, to be reported as it stands
        return {**joined, "values": explicit}
    for path, key, content in _dotted(explicit, (*at, "values")):
        values.setdefault(key, content)
        moved[path] = (*at, "values", key)
    return {**joined, "values": values} if values or "values" in entry else joined


def _dotted(table: dict[str, Any], at: KeyPath) -> Iterator[tuple[KeyPath, str, Any]]:
    """Each key with its path in the text and its content; optim.learning_rate is a table in a table there."""
    for key, content in table.items():
        inner = content if isinstance(content, dict) else {}
        if inner and (key in SECTIONS or all(isinstance(value, dict) for value in inner.values())):
            yield from (((*at, key, last), f"{key}.{last}", value) for last, value in inner.items())
        else:
            yield (*at, key), key, content


def _joined_path(path: KeyPath, moved: dict[KeyPath, KeyPath]) -> KeyPath:
    head = next((path[:length] for length in range(len(path), 0, -1) if path[:length] in moved), ())
    return (*moved[head], *path[len(head) :]) if head else path


# --- bases and overrides ----------------------------------------------------------------------------------------------


def _base(path: Path, own: Source) -> Source:
    place, name = own.places[("extends",)].words, own.tree["extends"]
    if not isinstance(name, str) or not name:
        raise SweepFileError(f"{place}: extends: wanted the name of a file beside this one, got {got(name)}")
    if not os.path.isfile(path.parent / name):  # false also for a name that no file can have
        raise SweepFileError(f"{place}: extends: {path.parent / shortened(name)} is not there")
    base = parse(path.parent / name, rank=BASE)
    if "extends" in base.tree:
        place = base.places[("extends",)].words
        raise SweepFileError(f"{place}: extends: a base can't extend another; one level is all")
    return base


def _merge(base: Source, own: Source) -> Source:
    """The file over its base; a replaced value takes its places along."""
    tree = dict(base.tree)
    replaced: set[KeyPath] = set()
    for section, content in own.tree.items():
        below = base.tree.get(section)
        are_tables = isinstance(content, dict) and isinstance(below, dict)
        if are_tables and ("kind" not in content or content["kind"] == below.get("kind")):  # type: ignore[union-attr]
            tree[section] = {**below, **content}  # type: ignore[dict-item]
            replaced |= {(section, key) for key in content}
        else:
            tree[section] = content
            replaced.add((section,))
    below_places = {
        path: place for path, place in base.places.items() if path[:1] not in replaced and path[:2] not in replaced
    }
    return Source(tree, {**below_places, **own.places})


def _override(source: Source, text: str, *, rank: int) -> Source:
    """One --set key=value over all before it: tables are entered along the key's dots, the value replaces the old one.

    Raises:
        SweepFileError: no key, no value, or more than one.
    """
    shown = f"--set {one_line(shortened(_without_secret(text)))}"
    path, tree = assignment(text, shown=shown, example="section.key=value, such as study.n_trials=3")
    if path == ("extends",):
        raise SweepFileError(f"{shown}: extends: a base is named in the file alone")
    place = Place(rank, shown)
    tree, moved = _joined(tree)
    path = _joined_path(path, moved)
    _check_extremes(tree, {path[:1]: place}, default=shown)
    try:
        content: Any = tree
        for part in path:
            content = content[part]
        values = {path: content}
    except KeyError:  # the first part of dotted paths, space.optim={…}: each path in it is set
        values = {("space", key): searched for key, searched in tree["space"].items()}
    for key_path, value in values.items():
        source = _set(source, key_path, value, place)
    return source


def _without_secret(text: str) -> str:
    """A database's URL may hold a password in any spelling; no more of it is shown than its kind."""
    key, _, content = text.partition("=")
    kind, url, _ = content.partition("://")
    if url:
        return f"{key}={kind}://…"
    return f"{key}=…" if "storage" in key and ":" in content else text


def assignment(text: str, *, shown: str, example: str) -> tuple[KeyPath, dict[str, Any]]:
    """The one key path of a text like key=value, and its tree; the value is TOML, a bare word is text.

    Raises:
        SweepFileError: no key, no value, or more than one.
    """
    key, equals, content = text.partition("=")
    for attempt in (content, json.dumps(content.strip())) if equals else ():
        try:
            keys, _ = _parse_text(shown, f"{key.strip()} = 0")
            tree, _ = _parse_text(shown, f"{key.strip()} = {attempt}")
        except SweepFileError:
            continue
        if path := _only_path(keys, tree):
            return path, tree
    raise SweepFileError(f"{shown}: wanted {example}")


def _only_path(keys: Any, tree: Any) -> KeyPath:
    """The path that is the only one in `keys`; empty if there are more, or if the tree has others beside it."""
    path: KeyPath = ()
    while isinstance(keys, dict):
        if len(keys) != 1 or not isinstance(tree, dict) or tree.keys() != keys.keys():
            return ()
        ((key, keys),) = keys.items()
        path, tree = (*path, key), tree[key]
    return path


def _set(source: Source, path: KeyPath, content: Any, place: Place) -> Source:
    tree = dict(source.tree)
    table, changed = tree, path
    for depth, part in enumerate(map(str, path[:-1]), start=1):
        inner = table.get(part)
        if not isinstance(inner, dict):  # the table is the command line's too
            changed = min(changed, path[:depth], key=len)
        table[part] = dict(inner) if isinstance(inner, dict) else {}
        table = table[part]
    table[str(path[-1])] = content
    others = {key_path: at for key_path, at in source.places.items() if key_path[: len(changed)] != changed}
    return Source(tree, {**others, changed: place, path: place})


# --- lines ------------------------------------------------------------------------------------------------------------


def locate(text: str) -> dict[KeyPath, int]:
    """Key path → line, from 1, for every key and array element of a text that `tomllib` has parsed.

    Array tables count their elements: the second [[queue]]'s d_model is ("queue", 1, "d_model"). Escapes in quoted keys
    are not decoded.
    """
    return _Locator(text).lines


_TOKEN = re.compile(
    r'''
    \#[^\n]* | [ \t\r\n]+                            # skipped
  | (?P<token> """(?:[^"\\]|\\.|"(?!""))*+"{3,5}     # up to two quotes may stand right before the closing three
             | \'\'\'(?:[^']|'(?!''))*+'{3,5}
             | "(?:[^"\\]|\\.)*+" | '[^']*+'
             | [][{},.=] | [^][{},.="'\#\s]+ )
    ''',
    re.VERBOSE | re.DOTALL,
)


class _Locator:
    """A walk over the tokens of valid TOML that notes the line of each key."""

    def __init__(self, text: str):
        self.lines: dict[KeyPath, int] = {}
        self._last_element: dict[KeyPath, int] = {}
        self._stream = self._tokens(text)
        self._token, self._line = next(self._stream)
        table: KeyPath = ()
        while self._token:
            if self._token == "[":
                table = self._header()
            else:
                self._pair(table)

    @staticmethod
    def _tokens(text: str) -> Iterator[tuple[str, int]]:
        """Each token and its line; an empty one at the end."""
        line = 1
        for match in _TOKEN.finditer(text):
            if match["token"]:
                yield match["token"], line
            line += match[0].count("\n")
        yield "", line

    def _next(self) -> str:
        """The current token; steps on to the one after it."""
        token = self._token
        self._token, self._line = next(self._stream, ("", self._line))
        return token

    def _note(self, path: KeyPath, n_new: int, line: int) -> None:
        """The line of a path and of the tables that its last `n_new` parts make, unless they stand further up."""
        for length in range(len(path) - n_new + 1, len(path) + 1):
            self.lines.setdefault(path[:length], line)

    def _header(self) -> KeyPath:
        """[table] or [[array]]."""
        line = self._line
        self._next()
        is_array = self._token == "["
        if is_array:
            self._next()
        keys = self._key()
        table: KeyPath = ()
        for depth, key in enumerate(keys, start=1):
            table = (*table, key)
            if is_array and depth == len(keys):
                self._last_element[table] = self._last_element.get(table, -1) + 1
            if table in self._last_element:
                table = (*table, self._last_element[table])
        self.lines.pop(table, None)  # its own header tells more than that of a table inside it
        self._note(table, len(table), line)
        for _ in range(1 + is_array):
            self._next()
        return table

    def _key(self) -> list[str]:
        keys = [self._next()]
        while self._token == ".":
            self._next()
            keys.append(self._next())
        return [key[1:-1] if key[0] in "\"'" else key for key in keys]

    def _pair(self, table: KeyPath) -> None:
        line, keys = self._line, self._key()
        path = (*table, *keys)
        self._note(path, len(keys), line)
        self._next()  # the "="
        self._value(path)

    def _value(self, path: KeyPath) -> None:
        line, opening = self._line, self._next()
        if opening == "[":
            index = 0
            while self._token != "]":
                self._note((*path, index), 1, self._line)
                self._value((*path, index))
                index += 1
                if self._token == ",":
                    self._next()
            self._next()
        elif opening == "{":
            while self._token != "}":
                self._pair(path)
                if self._token == ",":
                    self._next()
            self._next()
        elif opening[0] not in "\"'":  # a number or date, whose parts stand on one line
            while self._line == line and self._token not in ",]}":
                self._next()


# --- writing ----------------------------------------------------------------------------------------------------------


def pairs(table: Mapping[str, Any]) -> list[str]:
    """A table's lines, key = value; tables inside it are written inline."""
    return [f"{key(name)} = {value(content)}" for name, content in table.items()]


def key(name: str) -> str:
    """A key, in quotes where it needs them: a dotted path is one key here."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _text(name)


def value(content: Any) -> str:
    """A value of JSON's types, without null."""
    if isinstance(content, dict):
        return "{ " + ", ".join(pairs(content)) + " }" if content else "{}"
    if isinstance(content, list):
        return "[" + ", ".join(map(value, content)) + "]"
    return _text(content) if isinstance(content, str) else json.dumps(content)


def _text(content: str) -> str:
    """A basic string: JSON's escapes, and DEL, which TOML forbids and JSON lets through."""
    return json.dumps(content, ensure_ascii=False).replace("\x7f", "\\u007f")
