"""How is a value written as TOML? `tomllib` only reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any


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
