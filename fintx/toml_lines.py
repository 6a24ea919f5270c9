"""On which line of a TOML text does a key stand? `tomllib` doesn't say, and an error message must."""

from __future__ import annotations

import bisect
import re

Path = tuple[str | int, ...]

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SPACE = re.compile(r"[ \t]*")
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BARE_VALUE = re.compile(r"[^,\]}\n#]*")


def locate(text: str) -> dict[Path, int]:
    """Key path → line, from 1, for every key and array element of a text that `tomllib` has parsed.

    Array tables count their elements: the second [[queue]]'s d_model is ("queue", 1, "d_model").
    """
    return _Locator(text).run()


class _Locator:
    def __init__(self, text: str):
        self._text = text
        self._at = 0
        self._newlines = [match.start() for match in re.finditer("\n", text)]
        self._found: dict[Path, int] = {}
        self._elements: dict[Path, int] = {}

    def run(self) -> dict[Path, int]:
        table: Path = ()
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

    def _note(self, path: Path, parts: int) -> None:
        line = bisect.bisect_left(self._newlines, self._at) + 1
        for length in range(len(path) - parts + 1, len(path) + 1):
            self._found.setdefault(path[:length], line)

    def _header(self) -> Path:
        double = self._text.startswith("[[", self._at)
        self._at += 2 if double else 1
        self._skip(_SPACE)
        start = self._at
        keys = self._key()
        table: Path = ()
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

    def _pair(self, table: Path) -> None:
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

    def _value(self, path: Path) -> None:
        opening = self._text[self._at]
        if opening in "\"'":
            self._string()
        elif opening == "[":
            self._array(path)
        elif opening == "{":
            self._inline_table(path)
        else:
            self._skip(_BARE_VALUE)

    def _array(self, path: Path) -> None:
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

    def _inline_table(self, path: Path) -> None:
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
