"""TOML text: a file over its base and `--set` as one tree, the place of every key, and values written.

The only door to `tomllib`, which tells no lines. A file may extend one base: its tables merge over the base's key by
key, values are replaced whole, and a table that names another `kind` than the base's replaces it.
"""

from __future__ import annotations

import bisect
import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fintx.config.validate import BASE, OWN, SECTIONS, KeyPath, Place, Problems, got, one_line, shortened
from fintx.errors import FintxError

_LARGEST = 2**20
_DEEPEST = 16
_LONG_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"(?:[^"\\\n]|\\.){0,200}+"|'[^'\n]{0,200}+')[ \t]*+\.[ \t]*+){32}""")


class SweepFileError(FintxError):
    """Everything that is wrong with a sweep file, one line per problem."""

    def __init__(self, text: str):
        super().__init__("\n".join(one_line(line) for line in text.split("\n")))


# --- reading ----------------------------------------------------------------------------------------------------------


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
    source = parse(path, read_text(path) if text is None else text)
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
    tree, lines = _parse_text(str(path), plain(text))
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
    if problems.lines:
        raise SweepFileError(problems.text())


def _base(path: Path, own: Source) -> Source:
    where, given = own.places[("extends",)].words, own.tree["extends"]
    if not isinstance(given, str) or not given:
        raise SweepFileError(f"{where}: extends: wanted the name of a file beside this one, got {got(given)}")
    base_path = path.parent / given
    try:
        exists = base_path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        exists = False
    if not exists:
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
            return _only_path(_parse_text(shown, f"{key.strip()} = 0")[0], parsed), parsed
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


# --- lines ------------------------------------------------------------------------------------------------------------

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SPACE = re.compile(r"[ \t]*")
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BARE_VALUE = re.compile(r"[^,\]}\n#]*")


def locate(text: str) -> dict[KeyPath, int]:
    """Key path → line, from 1, for every key and array element of a text that `tomllib` has parsed.

    Array tables count their elements: the second [[queue]]'s d_model is ("queue", 1, "d_model").
    """
    return _Locator(text).run()


class _Locator:
    def __init__(self, text: str):
        self._text = text
        self._at = 0
        self._newlines = [match.start() for match in re.finditer("\n", text)]
        self._lines: dict[KeyPath, int] = {}
        self._elements: dict[KeyPath, int] = {}

    def run(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        self._skip(_BLANK)
        while self._at < len(self._text):
            if self._text[self._at] == "[":
                table = self._header()
            else:
                self._pair(table)
            self._skip(_BLANK)
        return self._lines

    def _skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        assert match is not None
        self._at = match.end()
        return match.group()

    def _note(self, path: KeyPath, parts: int) -> None:
        line = bisect.bisect_left(self._newlines, self._at) + 1
        for length in range(len(path) - parts + 1, len(path) + 1):
            self._lines.setdefault(path[:length], line)

    def _header(self) -> KeyPath:
        double = self._text.startswith("[[", self._at)
        self._at += 2 if double else 1
        self._skip(_SPACE)
        start = self._at
        keys = self._key()
        table: KeyPath = ()
        for depth, key in enumerate(keys):
            table = (*table, key)
            if double and depth == len(keys) - 1:
                self._elements[table] = self._elements.get(table, -1) + 1
            if table in self._elements:
                table = (*table, self._elements[table])
        end, self._at = self._at, start
        self._lines.pop(table, None)  # its own header tells more than that of a table inside it
        self._note(table, len(table))
        self._at = end
        self._skip(_SPACE)
        self._at += 2 if double else 1
        return table

    def _pair(self, table: KeyPath) -> None:
        start = self._at
        keys = self._key()
        end, self._at = self._at, start
        path = (*table, *keys)
        self._note(path, len(keys))
        self._at = end + 1  # behind the "="
        self._skip(_SPACE)
        self._value(path)

    def _key(self) -> list[str]:
        """A dotted key; stops at what follows it."""
        keys = []
        while True:
            self._skip(_SPACE)
            keys.append(self._string() if self._text[self._at] in "\"'" else self._skip(_BARE_KEY))
            self._skip(_SPACE)
            if self._at >= len(self._text) or self._text[self._at] != ".":
                return keys
            self._at += 1

    def _value(self, path: KeyPath) -> None:
        opening = self._text[self._at]
        if opening in "\"'":
            self._string()
        elif opening == "[":
            self._array(path)
        elif opening == "{":
            self._inline_table(path)
        else:
            self._skip(_BARE_VALUE)

    def _array(self, path: KeyPath) -> None:
        self._at += 1
        index = 0
        self._skip(_BLANK)
        while self._text[self._at] != "]":
            self._note((*path, index), 1)
            self._value((*path, index))
            index += 1
            self._skip(_BLANK)
            if self._text[self._at] == ",":
                self._at += 1
                self._skip(_BLANK)
        self._at += 1

    def _inline_table(self, path: KeyPath) -> None:
        self._at += 1
        self._skip(_BLANK)
        while self._text[self._at] != "}":
            self._pair(path)
            self._skip(_BLANK)
            if self._text[self._at] == ",":
                self._at += 1
                self._skip(_BLANK)
        self._at += 1

    def _string(self) -> str:
        """A string of any of TOML's four kinds, undecoded but for plain ones; stops behind it."""
        quote = self._text[self._at]
        long = quote * 3
        closing = long if self._text.startswith(long, self._at) else quote
        start = self._at + len(closing)
        end = start
        while not self._text.startswith(closing, end):
            end += 2 if quote == '"' and self._text[end] == "\\" else 1
        if closing == long:  # up to two quotes may stand right before the closing three
            while end + 3 < len(self._text) and self._text[end + 3] == quote:
                end += 1
        self._at = end + len(closing)
        return self._text[start:end]


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
