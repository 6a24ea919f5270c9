"""What does a sweep file ask for? TOML → StudySpec, with every error at once: file, line, key, wanted, got, nearest.

The only reader of TOML. A file may extend one base: its tables merge over the base's key by key, values are replaced
whole, and a table that names another `kind` than the base's replaces it.
"""

from __future__ import annotations

import datetime
import difflib
import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from fintx.config import Choices, FloatRange, LayerRange, QueueEntry, StudySpec
from fintx.sweepchecks import cross_checks
from fintx.toml_lines import Path as KeyPath
from fintx.toml_lines import locate
from fintx.types import FintxError

_LARGEST = 2**20
_LONG_KEY = re.compile(r"""(?<![\w"'-])(?:[\w"'-]++[ \t]*+\.[ \t]*+){32}""")


class SweepFileError(FintxError):
    """Everything that is wrong with a sweep file, one line per problem."""


@dataclass(frozen=True)
class _Source:
    """A parsed file: its tree, and where each key stands."""

    name: str
    tree: dict[str, Any]
    lines: dict[KeyPath, int]

    def place(self, path: KeyPath) -> str | None:
        """FILE:LINE of the key, if it stands here."""
        return f"{self.name}:{self.lines[path]}" if path in self.lines else None


def load(path: Path, *, overrides: Sequence[str] = ()) -> StudySpec:
    """Read a sweep file, its base, and the command line's `--set key=value`.

    Raises:
        SweepFileError: all problems, one line each: FILE:LINE: key: what is wrong.
    """
    own = _parse(path)
    sources = [own]
    tree = dict(own.tree)
    if "extends" in tree:
        base = _base(path, own, tree.pop("extends"))
        sources.append(base)
        tree = _merge(base.tree, tree)
    sources = [*(_override(text, tree) for text in overrides), *sources]
    problems = _Problems(sources, tree, default=str(path))
    _flatten_dotted(tree)
    try:
        spec = StudySpec.model_validate_json(json.dumps(tree, default=_plain))
    except ValidationError as error:
        for each in error.errors():
            problems.add(*_translate(each, tree))
        raise SweepFileError(problems.text()) from None
    for key_path, words in cross_checks(spec):
        problems.add(key_path, words)
    if problems.lines:
        raise SweepFileError(problems.text())
    return spec


def dump(spec: StudySpec) -> str:
    """A spec as TOML text that loads back equal."""
    tree = json.loads(spec.model_dump_json(exclude_none=True))
    lines = []
    for section, content in tree.items():
        if section == "queue":
            for entry in content:
                values = entry.pop("values", {})
                lines += ["", "[[queue]]", *_pairs({**entry, **values})]
        else:
            lines += ["", f"[{section}]", *_pairs(content)]
    return "\n".join(lines).strip() + "\n"


def _pairs(table: dict[str, Any]) -> list[str]:
    return [f"{_key(key)} = {_value(value)}" for key, value in table.items()]


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _text(key)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(_pairs(value)) + " }" if value else "{}"
    if isinstance(value, list):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return _text(value) if isinstance(value, str) else json.dumps(value)


def _text(value: str) -> str:
    """A TOML basic string: JSON's escapes, and DEL, which TOML forbids and JSON lets through."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


# --- reading ----------------------------------------------------------------------------------------------------------


def _parse(path: Path) -> _Source:
    try:
        if path.stat().st_size > _LARGEST:
            raise SweepFileError(f"{path}: is larger than 1 MiB; a sweep file holds one question")
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=2)
        hint = f"; did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else ""
        raise SweepFileError(f"{path}: is not there{hint}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise SweepFileError(f"{path}:{line}: is no UTF-8 text (byte {error.start})") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SweepFileError(f"{path}: can't be read: {reason}") from None
    return _parse_text(str(path), text)


def _parse_text(name: str, text: str) -> _Source:
    if match := _LONG_KEY.search(text):
        line = text.count("\n", 0, match.start()) + 1
        raise SweepFileError(f"{name}:{line}: a key of more than 32 parts; keys have two, such as optim.learning_rate")
    try:
        tree = tomllib.loads(text)
        return _Source(name, tree, locate(text))
    except tomllib.TOMLDecodeError as error:
        match = re.search(r" \(at line (\d+), column (\d+)\)$", str(error))
        where = f"{name}:{match[1]}" if match else f"{name}:{text.count(chr(10)) + 1}"
        words = str(error)[: match.start()] if match else str(error).removesuffix(" (at end of document)")
        raise SweepFileError(f"{where}: is not valid TOML: {words[:1].lower()}{words[1:200]}") from None
    except RecursionError:
        raise SweepFileError(f"{name}: is nested too deeply; a sweep file has sections of keys") from None
    except ValueError as error:  # such as an integer of 5,000 digits, or a date that does not exist
        raise SweepFileError(f"{name}: is not valid TOML: {str(error)[:200]}") from None


def _base(path: Path, own: _Source, given: Any) -> _Source:
    where = own.place(("extends",))
    if not isinstance(given, str) or not given:
        raise SweepFileError(f"{where}: extends: wanted the name of a file beside this one, got {_got(given)}")
    base_path = path.parent / given
    if not base_path.is_file():
        raise SweepFileError(f"{where}: extends: {base_path} is not there")
    base = _parse(base_path)
    if "extends" in base.tree:
        raise SweepFileError(f"{base.place(('extends',))}: extends: a base can't extend another; one level is all")
    return base


def _merge(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for section, content in own.items():
        below = base.get(section)
        both = isinstance(content, dict) and isinstance(below, dict)
        if both and ("kind" not in content or content["kind"] == below.get("kind")):  # type: ignore[union-attr]
            merged[section] = {**below, **content}  # type: ignore[dict-item]
        else:
            merged[section] = content
    return merged


def _override(text: str, tree: dict[str, Any]) -> _Source:
    """Apply one --set key=value to the tree."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise SweepFileError(f"--set {text}: wanted section.key=value, such as study.n_trials=3")
    try:
        parsed = tomllib.loads(f"{key} = {value}")
    except (tomllib.TOMLDecodeError, RecursionError, ValueError):
        try:  # a bare word is a string
            parsed = tomllib.loads(f"{key} = {json.dumps(value.strip())}")
        except (tomllib.TOMLDecodeError, RecursionError, ValueError):
            raise SweepFileError(f"--set {text}: {key.strip()} is no key; wanted section.key=value") from None
    lines: dict[KeyPath, int] = {}
    _graft(tree, parsed, (), lines)
    return _Source(f"--set {text}", parsed, lines)


def _graft(tree: dict[str, Any], parsed: dict[str, Any], path: KeyPath, lines: dict[KeyPath, int]) -> None:
    for key, value in parsed.items():
        lines[(*path, key)] = 1
        if isinstance(value, dict) and isinstance(tree.get(key), dict) and not {"low", "choices"} & value.keys():
            tree[key] = dict(tree[key])
            _graft(tree[key], value, (*path, key), lines)
        else:
            tree[key] = value


def _flatten_dotted(tree: dict[str, Any]) -> None:
    """In [space] and [[queue]] a dotted path may be written with or without quotes: both mean the path."""
    if isinstance(space := tree.get("space"), dict):
        tree["space"] = _joined(space)
    if isinstance(queue := tree.get("queue"), list):
        tree["queue"] = [_queue_entry(entry) if isinstance(entry, dict) else entry for entry in queue]


def _joined(table: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        nested = isinstance(value, dict) and key in ("model", "optim", "train")
        flat |= {f"{key}.{k}": v for k, v in value.items()} if nested else {key: value}
    return flat


def _queue_entry(entry: dict[str, Any]) -> dict[str, Any]:
    flat = _joined(entry)
    values = {key: value for key, value in flat.items() if "." in key}
    return {**{key: value for key, value in flat.items() if "." not in key}, **({"values": values} if values else {})}


def _plain(value: Any) -> str:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise TypeError(f"TOML gave a {type(value).__name__}")


# --- saying what is wrong ---------------------------------------------------------------------------------------------


class _Problems:
    """Collects lines, each with the place of the key or of the nearest table around it."""

    def __init__(self, sources: Sequence[_Source], tree: dict[str, Any], *, default: str):
        self._sources = sources
        self._tree = tree
        self._default = default
        self.lines: list[str] = []

    def add(self, path: KeyPath, words: str) -> None:
        shown = ".".join(f"[{part}]" if isinstance(part, int) else part for part in path).replace(".[", "[")
        line = f"{self._place(path)}: {shown + ': ' if shown else ''}{words}"
        if line not in self.lines:
            self.lines.append(line)

    def text(self) -> str:
        return "\n".join(self.lines)

    def _place(self, path: KeyPath) -> str:
        for length in range(len(path), 0, -1):
            for spelled in _spellings(path[:length]):
                for source in self._sources:
                    if place := source.place(spelled):
                        return place.removesuffix(":1") if place.startswith("--set ") else place
        return self._default


def _spellings(path: KeyPath) -> list[KeyPath]:
    """How a path may stand in the text: ("space", "optim.x") also as ("space", "optim", "x"); values without it."""
    written = tuple(part for part in path if part != "values") if path[:1] == ("queue",) else path
    split = tuple(piece for part in written for piece in (part.split(".") if isinstance(part, str) else (part,)))
    return [written, split]


def _translate(error: Any, tree: dict[str, Any]) -> tuple[KeyPath, str]:
    """A pydantic error as (key path, plain words)."""
    kind, given, context = error["type"], error.get("input"), error.get("ctx", {})
    path = _real_path(error["loc"], tree, keep_last=kind in ("missing", "extra_forbidden"))
    if kind == "extra_forbidden":
        valid = _valid_keys(path[:-1], tree)
        return path, f"unknown {'section' if len(path) == 1 else 'key'}{nearest(str(path[-1]), valid)}"
    if kind == "missing":
        return path, f"is missing; wanted {_wanted(path)}"
    if kind == "value_error":
        return path, f"{str(context.get('error', error['msg']))}, got {_got(given)}" if _is_scalar(given) else str(
            context.get("error", error["msg"])
        )
    hint = nearest(given, _literals(context)) if kind == "literal_error" and isinstance(given, str) else ""
    return path, f"wanted {_expectation(kind, context)}, got {_got(given)}{hint}"


def _expectation(kind: str, context: dict[str, Any]) -> str:
    plain = {
        "int_type": "a whole number", "int_from_float": "a whole number", "int_parsing": "a whole number",
        "float_type": "a number", "float_parsing": "a number", "finite_number": "a finite number",
        "string_type": "text in quotes", "bool_type": "true or false", "bool_parsing": "true or false",
        "tuple_type": "a list", "list_type": "a list", "dict_type": "a table", "model_type": "a table",
        "model_attributes_type": "a table", "date_type": "a date like 2024-01-31", "date_parsing":
        "a date like 2024-01-31", "date_from_datetime_parsing": "a date like 2024-01-31",
        "date_from_datetime_inexact": "a date without a time", "too_short": "a list with an entry at least",
        "union_tag_not_found": "a table with low and high, or with choices",
    }  # fmt: skip
    if kind in plain:
        return plain[kind]
    bounds = {"greater_than": ">", "greater_than_equal": "≥", "less_than": "<", "less_than_equal": "≤"}
    if kind in bounds:
        limit = next(iter(context.values()))
        return f"a value {bounds[kind]} {limit:g}"
    if kind == "literal_error":
        return str(context["expected"]).replace("'", '"')
    if kind == "string_pattern_mismatch":
        return f"text of the form {context['pattern']}"
    return kind.replace("_", " ")


def _literals(context: dict[str, Any]) -> list[str]:
    return re.findall(r"'([^']*)'", str(context.get("expected", "")))


def nearest(given: str, valid: Sequence[str]) -> str:
    """'; did you mean "x"?', or what there is, or nothing where nothing is known."""
    near = difflib.get_close_matches(given, valid, n=1, cutoff=0.5)
    if near:
        return f'; did you mean "{near[0]}"?'
    return f"; known: {', '.join(valid)}" if valid else ""


def _got(given: Any) -> str:
    if isinstance(given, dict):
        return f"a table ({', '.join(map(str, given)) or 'empty'})"
    text = json.dumps(given, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def _is_scalar(given: Any) -> bool:
    return not isinstance(given, dict | list | BaseModel)


def _wanted(path: KeyPath) -> str:
    return f"a [{path[0]}] section" if len(path) == 1 else "a value"


def _real_path(location: Sequence[int | str], tree: Any, *, keep_last: bool) -> KeyPath:
    """A pydantic location without what stands in no file: union tags and type names."""
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


def _valid_keys(parent: KeyPath, tree: dict[str, Any]) -> list[str]:
    if not parent:
        return [*StudySpec.model_fields, "extends"]
    if parent[0] == "queue":
        return list(QueueEntry.model_fields)
    if parent[0] == "space":
        held = tree["space"].get(parent[1], {}) if len(parent) > 1 else {}
        return list((Choices if "choices" in held else FloatRange).model_fields)
    if parent == ("architecture", "n_layers"):
        return list(LayerRange.model_fields)
    section = StudySpec.model_fields[str(parent[0])].annotation
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []
