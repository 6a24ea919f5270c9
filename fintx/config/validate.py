"""Checks and messages: what must fit together in a spec, and every mistake as one line.

A line says where (file, line and key), what was wanted, what was got, and the nearest valid name.
"""

from __future__ import annotations

import difflib
import json
import re
import typing
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ValidationError

from fintx.config.families import ENCODER, FAMILY_CONFIGS, LayerRange
from fintx.config.schema import (
    LOSSES,
    METRICS,
    Choices,
    FloatRange,
    ModelConfig,
    OptimConfig,
    StudySpec,
    TrainConfig,
    check_loss,
)
from fintx.errors import without_passwords

KeyPath = tuple[str | int, ...]
"""Where a value stands in a tree: ("queue", 1, "d_model")."""
Misfits = Iterator[tuple[KeyPath, str]]
"""Key path, and what is wrong there and how to fix it."""

SECTIONS: dict[str, type[BaseModel]] = {"model": ModelConfig, "optim": OptimConfig, "train": TrainConfig}
"""Sections of TrialConfig whose values a search may vary."""
_LENGTHS = ("context_length", "patch_length", "stride")
_LOSS_KEYS = ("loss", "label_smoothing", "class_weight")


def cross_checks(spec: StudySpec, *, broken: Container[str] = (), counted: bool = True) -> Misfits:
    """Every misfit between parts, as (key path, what is wrong and how to fix it).

    Args:
        broken: sections and "space.PATH" entries that are wrong themselves and were filled in: what depends on them
            is not checked.
        counted: whether the queue counts toward n_trials.
    """
    if "data" not in broken:
        yield from _data(spec)
    if not any(part in broken for part in ("study", "task", "train", *(f"space.train.{key}" for key in _LOSS_KEYS))):
        yield from _task(spec)
    for path, searched in spec.space.items():
        yield from _searched(spec, path, searched)
    if not any(part in broken for part in ("model", *(f"space.model.{key}" for key in _LENGTHS))):
        yield from _geometry(spec)
    queued = sum(not entry.cancelled for entry in spec.queue)
    if counted and "study" not in broken and queued > spec.study.n_trials:
        message = f"{spec.study.n_trials} is fewer than the {queued} queue entries, which count toward it; raise it"
        yield ("study", "n_trials"), message
    for index, entry in enumerate(spec.queue):
        if misfit := FAMILY_CONFIGS[spec.model.family].misfit(entry.shape):
            yield ("queue", index, misfit[0]), misfit[1]
        for path, value in entry.values.items():
            if "space" not in broken and f"space.{path}" not in broken:
                message = _queued_value(path, value, spec.space)
                if message:
                    yield ("queue", index, "values", path), message


def _data(spec: StudySpec) -> Misfits:
    for key in ("assets", "context"):
        for symbol in _repeated(getattr(spec.data, key)):
            yield ("data", key), f"{symbol} stands twice; take one out"
    symbols = (*spec.data.assets, *spec.data.context)
    for symbol in spec.data.versions:
        if symbol not in symbols:
            yield ("data", "versions", symbol), f"is a version of a symbol that isn't used{nearest(symbol, symbols)}"
    start, end = spec.data.start, spec.data.end
    if start and end and start > end:
        yield ("data", "start"), f"wanted a date up to data.end = {end}, got {start}"


def _distinct(value: Any) -> tuple[bool, Any]:
    """A value by which true is not 1."""
    return isinstance(value, bool), value


def _repeated(values: Sequence[Any]) -> list[Any]:
    return [value for (_, value), count in Counter(map(_distinct, values)).items() if count > 1]


def _values(spec: StudySpec, path: str) -> tuple[KeyPath, tuple[Any, ...]]:
    """Where a setting stands, and what it may be: its choices, the ends of its range, or its fixed value."""
    section, _, key = path.partition(".")
    searched = spec.space.get(path)
    if searched is None:
        return (section, key), (getattr(getattr(spec, section), key),)
    return ("space", path), searched.choices if isinstance(searched, Choices) else (searched.low, searched.high)


def _task(spec: StudySpec) -> Misfits:
    fitting = METRICS[spec.task.predicts]
    if spec.study.metric not in fitting:
        metrics = " or ".join(f'"{metric}"' for metric in fitting)
        message = f'"{spec.study.metric}" does not fit task.kind = "{spec.task.kind}"; wanted {metrics}'
        yield ("study", "metric"), message
    for key in _LOSS_KEYS:
        where, values = _values(spec, f"train.{key}")
        for value in values:
            # Every other key is one that fits, so each misfit is reported once, at its own key.
            train = TrainConfig().model_copy(update={"loss": LOSSES[spec.task.predicts][0], key: value})
            try:
                check_loss(spec.task, train)
            except ValueError as error:
                yield where, str(error)
                break


def _searched(spec: StudySpec, path: str, searched: FloatRange | Choices) -> Misfits:
    where: KeyPath = ("space", path)
    kind = field_kind(path)
    section, _, key = path.partition(".")
    if path == "model.family":
        yield where, "can't be searched: it says what [architecture] holds; make a study of each family"
    elif kind is None:
        known = [f"{name}.{field}" for name, section_type in SECTIONS.items() for field in section_type.model_fields]
        yield where, f"unknown path{nearest(path, known)}"
    elif isinstance(searched, Choices):
        for index, value in enumerate(searched.choices):
            yield from _value(getattr(spec, section), key, value, (*where, "choices", index))
        for value in _repeated(searched.choices):
            yield (*where, "choices"), f"{got(value)} stands twice; take one out"
    elif kind == "choice":
        yield where, "wanted choices: this setting is no number"
    elif kind == "int" and not (searched.low.is_integer() and searched.high.is_integer()):
        yield where, f"wanted whole numbers for low and high, got {searched.low:g} and {searched.high:g}"
    else:
        for end, value in (("low", searched.low), ("high", searched.high)):
            yield from _value(getattr(spec, section), key, int(value) if kind == "int" else value, (*where, end))


def field_kind(path: str) -> Literal["int", "float", "choice"] | None:
    """Whether a setting is a whole number, a number or one of a few values; none: no search knows the path."""
    section, _, key = path.partition(".")
    if section not in SECTIONS or key not in SECTIONS[section].model_fields:
        return None
    annotation = SECTIONS[section].model_fields[key].annotation
    if typing.get_origin(annotation) is Literal or annotation in (bool, str):
        return "choice"
    return "int" if annotation is int else "float"


def _value(section: BaseModel, key: str, value: Any, where: KeyPath) -> Misfits:
    """Whether the section's own type takes the value."""
    try:
        type(section).model_validate({**section.model_dump(), key: value})
    except ValidationError as error:
        for problem in error.errors():
            if problem["loc"] == (key,):
                wanted = expectation(problem["type"], problem.get("ctx", {}), (type(section).__name__, key))
                yield where, f"wanted {wanted}, got {got(value)}"


def _geometry(spec: StudySpec) -> Misfits:
    """Settings that change the data or the parameters are lists; patches fit the window and leave no bar out."""
    reasons = dict.fromkeys(("context_length", "patch_length"), "each length is a dataset or a program of its own")
    reasons["stride"] = "each value changes the model's parameters"
    ranges = {key for key in reasons if isinstance(spec.space.get(f"model.{key}"), FloatRange)}
    for key in reasons:
        if key in ranges:
            yield ("space", f"model.{key}"), f"wanted choices: {reasons[key]}"
    for longer, shorter, reason in (
        ("patch_length", "context_length", "every pair must fit"),
        ("stride", "patch_length", "bars between patches would never be seen"),
    ):
        where, longs = _values(spec, f"model.{longer}")
        short_where, shorts = _values(spec, f"model.{shorter}")
        longest = max((value for value in longs if isinstance(value, int)), default=0)
        shortest = min((value for value in shorts if isinstance(value, int)), default=longest)
        if longest > shortest and not {longer, shorter} & ranges:
            message = f"{longer} = {longest} is longer than {shorter} = {shortest}; {reason}"
            yield short_where if short_where[0] == "space" else where, message


def _queued_value(path: str, value: Any, space: Mapping[str, FloatRange | Choices]) -> str:
    """What is wrong with a queue entry's value; empty: nothing."""
    searched = space.get(path)
    if searched is None:
        return f"is not in [space], so an entry can't set it{nearest(path, list(space))}"
    if isinstance(searched, Choices):
        fits = _distinct(value) in map(_distinct, searched.choices)
        return "" if fits else f"wanted one of {', '.join(map(got, searched.choices))}, got {got(value)}"
    is_whole = field_kind(path) == "int"
    fits = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and searched.low <= value <= searched.high
        and (not is_whole or value == int(value))
    )
    low, high = (int(end) if is_whole else f"{end:g}" for end in (searched.low, searched.high))
    return "" if fits else f"wanted {'a whole number' if is_whole else 'a number'} in {low} … {high}, got {got(value)}"


# --- messages ---------------------------------------------------------------------------------------------------------

_PLAIN = {
    "int_type": "a whole number", "int_from_float": "a whole number", "int_parsing": "a whole number",
    "float_type": "a number", "float_parsing": "a number", "finite_number": "a finite number",
    "string_type": "text in quotes", "bool_type": "true or false", "bool_parsing": "true or false",
    "tuple_type": "a list", "list_type": "a list", "dict_type": "a table", "model_type": "a table",
    "model_attributes_type": "a table", "date_type": "a date like 2024-01-31", "date_parsing":
    "a date like 2024-01-31", "date_from_datetime_parsing": "a date like 2024-01-31",
    "date_from_datetime_inexact": "a date without a time", "too_short": "a list with an entry at least",
    "scalar_type": "true, false, a number or text", "union_tag_not_found": "a table with low and high, or with choices",
}  # fmt: skip
_BOUNDS = {"greater_than": ">", "greater_than_equal": "≥", "less_than": "<", "less_than_equal": "≤"}
_PATTERNS: dict[KeyPath, str] = {
    ("execution", "storage"): '"journal" or "postgresql://USER@HOST/DATABASE"',
    ("queue", "id"): 'a name of letters, digits, ".", "_" and "-" (a letter or digit first, 64 at most)',
    ("study", "name"): 'a folder name of letters, digits, ".", "_" and "-" (a letter or digit first, 64 at most)',
    ("data", "assets"): "a symbol such as SPY or ^VIX",
    ("data", "context"): "a symbol such as SPY or ^VIX",
}


def describe(error: Mapping[str, Any], tree: Mapping[str, Any]) -> tuple[KeyPath, str] | None:
    """One of a ValidationError's `errors()` on a tree, as (key path, message); none where it repeats another."""
    kind, value, context = error["type"], error.get("input"), error.get("ctx", {})
    path = tuple(error["loc"])
    if path[:1] == ("space",):  # the third part is the union's tag, which stands in no file
        path = path[:2] + path[3:]
    if kind == "too_short" and value:
        return None  # its entries are wrong, and each is reported
    if kind == "extra_forbidden":
        return path, _unknown(path, tree)
    if kind == "missing":
        return path, f"is missing; wanted {f'a [{path[0]}] section' if len(path) == 1 else 'a value'}"
    if kind == "value_error":
        message = str(context.get("error", error["msg"]))
        return path, message if isinstance(value, dict | list | BaseModel) else f"{message}, got {got(value)}"
    hint = ""
    if kind == "literal_error" and isinstance(value, str):
        hint = nearest(value, re.findall(r"'([^']*)'", str(context["expected"])))
    shown = _without_secret(value) if path[:2] == ("execution", "storage") else got(value)
    return path, f"wanted {expectation(kind, context, path)}, got {shown}{hint}"


def expectation(kind: str, context: Mapping[str, Any], path: KeyPath) -> str:
    """What a pydantic error type wanted, such as "a value ≥ 1"."""
    if kind in _PLAIN:
        return _PLAIN[kind]
    if kind == "value_error":
        return str(context["error"]).removeprefix("wanted ")
    if kind == "too_long":
        return f"a list with {context['max_length']:,} entries at most"
    if kind in _BOUNDS:
        limit = next(iter(context.values()))
        return f"a value {_BOUNDS[kind]} {limit:g}" if isinstance(limit, float) else f"a value {_BOUNDS[kind]} {limit}"
    if kind == "literal_error":
        return str(context["expected"]).replace("'", '"')
    if kind == "string_pattern_mismatch":
        return _PATTERNS.get(path[:2]) or _PATTERNS.get((path[0], path[-1])) or f"text like {context['pattern']}"
    return kind.replace("_", " ")


def shortened(text: str) -> str:
    """The text, or its beginning and an ellipsis; a password is hidden first: a cut URL isn't recognised."""
    text = without_passwords(text)
    return text if len(text) <= 60 else text[:59] + "…"


def one_line(text: str) -> str:
    """The text with every character that is no plain one escaped, so that a file can't write to the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def nearest(name: str, valid: Sequence[str]) -> str:
    """'; did you mean "x"?', or a list of the valid names, or nothing if there are none."""
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if near:
        return f'; did you mean "{near[0]}"?'
    return f"; known: {', '.join(valid)}" if valid else ""


def got(value: Any) -> str:
    """A value as TOML would write it, cut where it is long."""
    if isinstance(value, dict):
        return shortened(f"a table ({', '.join(map(str, value)) or 'empty'})")
    return shortened(str(value) if isinstance(value, float) else json.dumps(value, default=str, ensure_ascii=False))


def _without_secret(value: Any) -> str:
    """A storage's value, which may hold a password in any spelling: no more of it than shows what is wrong."""
    if not isinstance(value, str):
        return {bool: "true or false", int: "a number", float: "a number", dict: "a table"}.get(type(value), "a list")
    kind, url, _ = value.partition("://")
    if url:
        return got(f"{kind[:20]}://…")
    return got(value) if re.fullmatch(r"[\w-]{0,20}", value) else "another text"


def _unknown(path: KeyPath, tree: Mapping[str, Any]) -> str:
    valid = _valid_keys(path[:-1], tree)
    if path[0] == "queue" and path[2:] == ("sweep",):
        return "belongs into a manual file, whose entries name their sweep files; take it out"
    if path[0] == "space" and valid == list(Choices.model_fields) and path[-1] in FloatRange.model_fields:
        return "can't stand beside choices; wanted either low and high, or choices"
    sections = [name for name in StudySpec.model_fields if name not in ("space", "queue")]
    elsewhere = [f"{section}.{path[-1]}" for section in sections if path[-1] in _valid_keys((section,), tree)]
    hint = f'; did you mean "{elsewhere[0]}"?' if elsewhere and len(path) <= 2 else nearest(str(path[-1]), valid)
    return f"unknown {'section' if len(path) == 1 else 'key'}{hint}"


def family_in(tree: Mapping[str, Any]) -> str:
    """The model family that a file's tree names; the encoder where it names none that there is."""
    model = tree.get("model")
    name = model.get("family") if isinstance(model, dict) else None
    return name if isinstance(name, str) and name in FAMILY_CONFIGS else ENCODER


def _valid_keys(parent: KeyPath, tree: Mapping[str, Any]) -> list[str]:
    """The keys that a table of the file may have."""
    if not parent:
        return [*StudySpec.model_fields, "extends"]
    if parent[0] == "queue":
        return list(FAMILY_CONFIGS[family_in(tree)].queue_entry.model_fields)
    if parent[0] == "space":
        searched = tree["space"].get(parent[1], {}) if len(parent) > 1 else {}
        return list((Choices if "choices" in searched else FloatRange).model_fields)
    if parent == ("architecture", "n_layers"):
        return list(LayerRange.model_fields)
    if parent == ("architecture",):
        return list(FAMILY_CONFIGS[family_in(tree)].architecture.model_fields)
    annotation = StudySpec.model_fields[str(parent[0])].annotation
    for section in typing.get_args(annotation) or (annotation,):  # a section that may be left out is one or None
        if isinstance(section, type) and issubclass(section, BaseModel):
            return list(section.model_fields)
    return []


# --- problems of a file -----------------------------------------------------------------------------------------------

BASE, OWN = 0, 1
MOST_PROBLEMS = 100

Where = Callable[[KeyPath], str]
"""What a message calls a key: with the file and the line where it stands, as far as that is known."""


class Place(NamedTuple):
    """Where a key was written."""

    rank: int
    """BASE, OWN (the file itself), and from 2 on --set, in order."""
    words: str


def spelled(path: KeyPath) -> str:
    """A key path as a message writes it: queue[0].d_model."""
    parts = [f"[{part}]" if isinstance(part, int) else shortened(part) for part in path]
    return ".".join(parts).replace(".[", "[")


class Problems:
    """The mistakes of a file, one line each, with the place of the key or of the nearest table around it."""

    def __init__(self, places: Mapping[KeyPath, Place], *, default: str, entries: Sequence[int] = ()):
        """
        Args:
            default: the place of a key whose place isn't known.
            entries: the numbers of the queue's entries in their file, where they are some of a manual file's.
        """
        self._places = places
        self._default = default
        self._entries = entries
        self.lines: dict[str, None] = {}
        self.uncounted = 0

    def add(self, path: KeyPath, message: str) -> None:
        """Add a message about a key."""
        self.lines[one_line(f"{self.at(path)}: {message}")] = None

    def at(self, path: KeyPath) -> str:
        """Where a key stands and how it is written there: FILE:LINE: key."""
        around = (path[:length] for length in range(len(path), 0, -1))
        place = next((self._places[table].words for table in around if table in self._places), self._default)
        if path[:1] == ("queue",):  # `values` holds dotted keys, which stand beside the others in the file
            path = tuple(part for part in path if part != "values")
            if self._entries and len(path) > 1:
                path = ("queue", self._entries[int(path[1])], *path[2:])
        return f"{place}: {spelled(path)}" if path else place

    def take(self, lines: Iterable[str], uncounted: int = 0) -> None:
        """Add lines of another part of the file."""
        self.lines |= dict.fromkeys(lines)
        self.uncounted += uncounted

    def text(self) -> str:
        """All lines, or the first hundred and the number of the others."""
        lines = list(self.lines)
        n_more = max(0, len(lines) - MOST_PROBLEMS) + self.uncounted
        return "\n".join([*lines[:MOST_PROBLEMS], *([f"… and {n_more} problems more"] if n_more else [])])
