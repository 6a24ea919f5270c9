"""TOML text: read, the line of every key, and values written. The only door to `tomllib`, which tells no lines."""

from __future__ import annotations

import bisect
import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fintx.types import FintxError, without_passwords

KeyPath = tuple[str | int, ...]
"""Where a value stands in a tree: ("queue", 1, "d_model")."""

_LARGEST = 2**20
_LONGEST = 60
_LONG_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"(?:[^"\\\n]|\\.){0,200}+"|'[^'\n]{0,200}+')[ \t]*+\.[ \t]*+){32}""")


class SweepFileError(FintxError):
    """Everything that is wrong with a sweep file, one line per problem."""

    def __init__(self, text: str):
        super().__init__("\n".join(one_line(line) for line in text.split("\n")))


def shortened(text: str) -> str:
    """The text, or its beginning and an ellipsis; a password is hidden first, since a cut URL is no URL any more."""
    text = without_passwords(text)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def one_line(text: str) -> str:
    """The text with every character that is no plain one escaped, so that a file can't write to the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


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


def parse(name: str, text: str) -> tuple[dict[str, Any], dict[KeyPath, int]]:
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
        self._found: dict[KeyPath, int] = {}
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
        return self._found

    def _skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        assert match is not None
        self._at = match.end()
        return match.group()

    def _note(self, path: KeyPath, parts: int) -> None:
        line = bisect.bisect_left(self._newlines, self._at) + 1
        for length in range(len(path) - parts + 1, len(path) + 1):
            self._found.setdefault(path[:length], line)

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
        self._found.pop(table, None)  # its own header tells more than that of a table inside it
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
