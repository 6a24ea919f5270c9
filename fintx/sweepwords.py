"""How is a mistake in a sweep file said? What was wanted, what was got, and the nearest valid name: no jargon."""

from __future__ import annotations

import difflib
import json
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from fintx.config import ENCODER, FAMILIES, Choices, FloatRange, LayerRange, QueueEntry, StudySpec
from fintx.toml_lines import Path as KeyPath
from fintx.types import without_passwords

_LONGEST = 60

_PLAIN = {
    "int_type": "a whole number", "int_from_float": "a whole number", "int_parsing": "a whole number",
    "float_type": "a number", "float_parsing": "a number", "finite_number": "a finite number",
    "string_type": "text in quotes", "bool_type": "true or false", "bool_parsing": "true or false",
    "tuple_type": "a list", "list_type": "a list", "dict_type": "a table", "model_type": "a table",
    "model_attributes_type": "a table", "date_type": "a date like 2024-01-31", "date_parsing":
    "a date like 2024-01-31", "date_from_datetime_parsing": "a date like 2024-01-31",
    "date_from_datetime_inexact": "a date without a time", "too_short": "a list with an entry at least",
    "union_tag_not_found": "a table with low and high, or with choices",
}  # fmt: skip
_SECTIONS = tuple(name for name in StudySpec.model_fields if name not in ("space", "queue"))
_BOUNDS = {"greater_than": ">", "greater_than_equal": "≥", "less_than": "<", "less_than_equal": "≤"}
_PATTERNS = {
    ("execution", "storage"): '"journal" or "postgresql://USER@HOST/DATABASE"',
    ("queue", "id"): 'a name of letters, digits, ".", "_" and "-" (a letter or digit first, 64 at most)',
    ("study", "name"): 'a folder name of letters, digits, ".", "_" and "-" (a letter or digit first, 64 at most)',
    ("data", "assets"): "a symbol such as SPY or ^VIX",
    ("data", "context"): "a symbol such as SPY or ^VIX",
}


def say(error: Mapping[str, Any], tree: Mapping[str, Any]) -> tuple[KeyPath, str] | None:
    """A pydantic error as (key path, plain words); None for an echo of another one.

    Args:
        error: one of `ValidationError.errors()`.
        tree: what was validated.
    """
    kind, given, context = error["type"], error.get("input"), error.get("ctx", {})
    location = tuple(error["loc"])
    if location[:1] == ("space",):  # the third part is the union's tag, which stands in no file
        location = location[:2] + location[3:]
    path = _real_path(location, tree, keep_last=kind in ("missing", "extra_forbidden"))
    if kind == "too_short" and given:
        return None  # its entries are wrong, and told one by one
    if kind == "extra_forbidden":
        return path, _unknown(path, tree)
    if kind == "missing":
        return path, f"is missing; wanted {f'a [{path[0]}] section' if len(path) == 1 else 'a value'}"
    if kind == "value_error":
        words = str(context.get("error", error["msg"]))
        return path, words if isinstance(given, dict | list | BaseModel) else f"{words}, got {got(given)}"
    if location[-1] in ("bool", "int", "float", "str") and path != location:
        return path, f"wanted true, false, a number or text, got {got(given)}"
    hint = nearest(given, _literals(context)) if kind == "literal_error" and isinstance(given, str) else ""
    shown = _unlike_a_secret(given) if path[:2] == ("execution", "storage") else got(given)
    return path, f"wanted {expectation(kind, context, path)}, got {shown}{hint}"


def expectation(kind: str, context: Mapping[str, Any], path: KeyPath) -> str:
    """What a pydantic error type wanted, such as "a value ≥ 1"."""
    if kind in _PLAIN:
        return _PLAIN[kind]
    if kind in _BOUNDS:
        limit = next(iter(context.values()))
        return f"a value {_BOUNDS[kind]} {limit:g}" if isinstance(limit, float) else f"a value {_BOUNDS[kind]} {limit}"
    if kind == "literal_error":
        return str(context["expected"]).replace("'", '"')
    if kind == "string_pattern_mismatch":
        return next(
            (words for key, words in _PATTERNS.items() if key in (path[:2], (path[0], path[-1]))),
            f"text like {context['pattern']}",
        )
    return kind.replace("_", " ")


def nearest(given: str, valid: Sequence[str]) -> str:
    """'; did you mean "x"?', or what there is, or nothing where nothing is known."""
    near = difflib.get_close_matches(given, valid, n=1, cutoff=0.5)
    if near:
        return f'; did you mean "{near[0]}"?'
    return f"; known: {', '.join(valid)}" if valid else ""


def got(given: Any) -> str:
    """A value as TOML would write it, cut where it is long."""
    if isinstance(given, dict):
        text = f"a table ({', '.join(map(str, given)) or 'empty'})"
    else:
        text = str(given) if isinstance(given, float) else json.dumps(given, default=str, ensure_ascii=False)
    return shortened(text)


def _unlike_a_secret(given: Any) -> str:
    """A storage's value, which may hold a password in any spelling: no more of it than tells what is wrong."""
    if not isinstance(given, str):
        return {bool: "true or false", int: "a number", float: "a number", dict: "a table"}.get(type(given), "a list")
    kind, url, _ = given.partition("://")
    if url:
        return got(f"{kind[:20]}://…")
    return got(given) if re.fullmatch(r"[\w-]{0,20}", given) else "another text"


def shortened(text: str) -> str:
    """The text, or its beginning and an ellipsis; a password is hidden first, since a cut URL is no URL any more."""
    text = without_passwords(text)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def one_line(text: str) -> str:
    """The text with every character that is no plain one escaped, so that a file can't write to the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _unknown(path: KeyPath, tree: Mapping[str, Any]) -> str:
    valid = _valid_keys(path[:-1], tree)
    if path[0] == "queue" and path[2:] == ("sweep",):
        return "belongs into a manual file, whose entries name their sweep files; take it out"
    if path[0] == "space" and valid == list(Choices.model_fields) and path[-1] in FloatRange.model_fields:
        return "can't stand beside choices; wanted either low and high, or choices"
    elsewhere = [f"{section}.{path[-1]}" for section in _SECTIONS if path[-1] in _valid_keys((section,), tree)]
    hint = f'; did you mean "{elsewhere[0]}"?' if elsewhere and len(path) <= 2 else nearest(str(path[-1]), valid)
    return f"unknown {'section' if len(path) == 1 else 'key'}{hint}"


def _literals(context: Mapping[str, Any]) -> list[str]:
    return re.findall(r"'([^']*)'", str(context.get("expected", "")))


def _real_path(location: Sequence[int | str], tree: Any, *, keep_last: bool) -> KeyPath:
    """A pydantic location without the names of a union's types, which stand in no file."""
    path: list[int | str] = []
    parts = list(location)
    last = parts.pop() if keep_last else None
    for part in parts:
        inside = (isinstance(tree, dict) and part in tree) or (
            isinstance(tree, list) and isinstance(part, int) and part < len(tree)
        )
        if inside:
            path.append(part)
            tree = tree[part]
    return (*path, last) if last is not None else tuple(path)


def _valid_keys(parent: KeyPath, tree: Mapping[str, Any]) -> list[str]:
    if not parent:
        return [*StudySpec.model_fields, "extends"]
    if parent[0] == "queue":
        return list(QueueEntry.model_fields)
    if parent[0] == "space":
        held = tree["space"].get(parent[1], {}) if len(parent) > 1 else {}
        return list((Choices if "choices" in held else FloatRange).model_fields)
    if parent == ("architecture", "n_layers"):
        return list(LayerRange.model_fields)
    if parent == ("architecture",):
        model = tree.get("model")
        named = model.get("family", ENCODER) if isinstance(model, dict) else ENCODER
        return list(FAMILIES[named if named in FAMILIES else ENCODER].architecture.model_fields)
    annotation = StudySpec.model_fields[str(parent[0])].annotation
    for section in typing.get_args(annotation) or (annotation,):  # a section that may be left out is one or None
        if isinstance(section, type) and issubclass(section, BaseModel):
            return list(section.model_fields)
    return []
