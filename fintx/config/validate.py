"""Checks of a spec: what must fit together, and how a mistake is told: where, wanted, got, nearest valid name."""

from __future__ import annotations

import difflib
import json
import re
import typing
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ValidationError

from fintx.config.families import LayerRange
from fintx.config.schema import ENCODER, FAMILIES, LOSSES, METRICS, Choices, FloatRange, StudySpec, check_loss
from fintx.errors import without_passwords

KeyPath = tuple[str | int, ...]
"""Where a value stands in a tree: ("queue", 1, "d_model")."""
_LONGEST = 60

SECTIONS = ("model", "optim", "train")
"""Sections of TrialConfig whose values a search may vary."""


def cross_checks(
    spec: StudySpec, *, broken: Container[str] = (), counted: bool = True
) -> Iterator[tuple[KeyPath, str]]:
    """Every misfit between parts, as (key path, what is wrong and how to fix it).

    Args:
        broken: sections, and "space.PATH" entries, that are known to be wrong and were filled in: nothing is said of
            what depends on them.
        counted: whether the queue counts toward n_trials.
    """
    if "data" not in broken:
        yield from _data(spec)
    if not any(section in broken for section in ("study", "task", "train", *_LOSS_SPACE)):
        yield from _task(spec)
    for path, searched in spec.space.items():
        yield from _searched(spec, path, searched)
    if not any(part in broken for part in ("model", *(f"space.model.{key}" for key in _LENGTHS))):
        yield from _geometry(spec)
    if counted and "study" not in broken:
        yield from _total(spec)
    yield from _queue(spec, broken)


def _data(spec: StudySpec) -> Iterator[tuple[KeyPath, str]]:
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


def _repeated(values: Sequence[Any]) -> list[Any]:
    """Values that stand more than once; true is not 1."""
    counts = Counter((isinstance(value, bool), value) for value in values)
    return [value for (_, value), count in counts.items() if count > 1]


_LENGTHS = ("context_length", "patch_length", "stride")
_LOSS_KEYS = ("loss", "label_smoothing", "class_weight")
_LOSS_SPACE = tuple(f"space.train.{key}" for key in _LOSS_KEYS)


def _task(spec: StudySpec) -> Iterator[tuple[KeyPath, str]]:
    fitting = METRICS[spec.task.predicts]
    if spec.study.metric not in fitting:
        wanted = " or ".join(f'"{metric}"' for metric in fitting)
        yield ("study", "metric"), f'"{spec.study.metric}" does not fit task.kind = "{spec.task.kind}"; wanted {wanted}'
    for key in _LOSS_KEYS:
        searched = spec.space.get(f"train.{key}")
        fixed = (getattr(spec.train, key),)
        values = fixed if searched is None else getattr(searched, "choices", (getattr(searched, "high", None),))
        for value in values:
            # Beside the one key, everything fits: so each misfit is told once, at its own key.
            others = {"loss": LOSSES[spec.task.predicts][0], "label_smoothing": 0.0, "class_weight": "none"}
            try:
                check_loss(spec.task, spec.train.model_copy(update={**others, key: value}))
            except ValueError as error:
                yield ("space", f"train.{key}") if searched else ("train", key), str(error)
                break


def _searched(spec: StudySpec, path: str, searched: FloatRange | Choices) -> Iterator[tuple[KeyPath, str]]:
    where: KeyPath = ("space", path)
    section_name, _, key = path.partition(".")
    if path == "model.family":
        yield where, "can't be searched: it says what [architecture] holds; make a study of each family"
        return
    if section_name not in SECTIONS or key not in type(getattr(spec, section_name)).model_fields:
        every = [f"{name}.{field}" for name in SECTIONS for field in type(getattr(spec, name)).model_fields]
        near = difflib.get_close_matches(path, every, n=1, cutoff=0.5)
        hint = f'did you mean "{near[0]}"?' if near else f"known: {', '.join(every)}"
        yield where, f"unknown path; {hint}"
        return
    section = getattr(spec, section_name)
    kind = field_kind(type(section), key)
    if isinstance(searched, FloatRange):
        if kind == "choice":
            yield where, "wanted choices: this setting is no number"
            return
        if kind == "int" and not (searched.low.is_integer() and searched.high.is_integer()):
            yield where, f"wanted whole numbers for low and high, got {searched.low:g} and {searched.high:g}"
            return
        for end in ("low", "high"):
            value = getattr(searched, end)
            yield from _value(section, key, int(value) if kind == "int" else value, (*where, end))
    else:
        for index, value in enumerate(searched.choices):
            yield from _value(section, key, value, (*where, "choices", index))
        for value in _repeated(searched.choices):
            yield (*where, "choices"), f"{got(value)} stands twice; take one out"


def field_kind(section: type[BaseModel], key: str) -> Literal["int", "float", "choice"]:
    """Is a field a whole number, a number, or one of a few values?"""
    annotation = section.model_fields[key].annotation
    origin = typing.get_origin(annotation)
    if origin is Literal or annotation is bool or annotation is str:
        return "choice"
    return "int" if annotation is int else "float"


def _value(section: BaseModel, key: str, value: Any, where: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    """Whether the section's own type takes the value."""
    tree = {**section.model_dump(), key: value}
    try:
        type(section).model_validate(tree)
    except ValidationError as error:
        for each in error.errors():
            if each["loc"] == (key,):
                wanted = expectation(each["type"], each.get("ctx", {}), (type(section).__name__, key))
                yield where, f"wanted {wanted}, got {got(value)}"


def _geometry(spec: StudySpec) -> Iterator[tuple[KeyPath, str]]:
    """What shapes a window or the model is a list of choices; a patch fits its window, and patches leave no bar out."""
    reasons = dict.fromkeys(("context_length", "patch_length"), "each length is a dataset or a program of its own")
    reasons |= dict.fromkeys(("stride", "revin"), "each value changes the model's parameters")
    ranges = [key for key in reasons if isinstance(spec.space.get(f"model.{key}"), FloatRange)]
    for key in ranges:
        if key != "revin":  # no number: said already
            yield ("space", f"model.{key}"), f"wanted choices: {reasons[key]}"
    for longer, shorter, reason in (
        ("patch_length", "context_length", "every pair must fit"),
        ("stride", "patch_length", "bars between patches would never be seen"),
    ):
        if {longer, shorter} & set(ranges):
            continue
        values = {}
        for key in (longer, shorter):
            searched = spec.space.get(f"model.{key}")
            choices = searched.choices if isinstance(searched, Choices) else (getattr(spec.model, key),)
            values[key] = [value for value in choices if isinstance(value, int)]
        if not all(values.values()) or (most := max(values[longer])) <= (least := min(values[shorter])):
            continue
        place = next((key for key in (shorter, longer) if f"model.{key}" in spec.space), None)
        where = ("model", longer) if place is None else ("space", f"model.{place}")
        yield where, f"{longer} = {most} is longer than {shorter} = {least}; {reason}"


def _total(spec: StudySpec) -> Iterator[tuple[KeyPath, str]]:
    queued = sum(not entry.cancelled for entry in spec.queue)
    if queued > spec.study.n_trials:
        words = f"{spec.study.n_trials} is fewer than the {queued} queue entries, which count toward it"
        yield ("study", "n_trials"), f"{words}; raise it"


def _queue(spec: StudySpec, broken: Container[str]) -> Iterator[tuple[KeyPath, str]]:
    for index, entry in enumerate(spec.queue):
        if misfit := FAMILIES[spec.model.family].misfit(entry.shape):
            yield ("queue", index, misfit[0]), misfit[1]
        for path, value in entry.values.items():
            if "space" not in broken and f"space.{path}" not in broken:
                yield from _queued_value(spec, ("queue", index, "values", path), path, value)


def _queued_value(spec: StudySpec, where: KeyPath, path: str, value: Any) -> Iterator[tuple[KeyPath, str]]:
    searched = spec.space.get(path)
    if searched is None:
        near = difflib.get_close_matches(path, list(spec.space), n=1, cutoff=0.5)
        hint = f'did you mean "{near[0]}"?' if near else f"searched: {', '.join(spec.space) or 'nothing'}"
        yield where, f"is not in [space], so an entry can't set it; {hint}"
    elif isinstance(searched, Choices):
        if (isinstance(value, bool), value) not in [(isinstance(each, bool), each) for each in searched.choices]:
            yield where, f"wanted one of {', '.join(map(got, searched.choices))}, got {got(value)}"
    else:
        whole = _is_whole(spec, path)
        low, high = (int(end) if whole else f"{end:g}" for end in (searched.low, searched.high))
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not searched.low <= value <= searched.high or (whole and value != int(value)):
            kind = "a whole number" if whole else "a number"
            yield where, f"wanted {kind} in {low} … {high}, got {got(value)}"


def _is_whole(spec: StudySpec, path: str) -> bool:
    section, _, key = path.partition(".")
    fields = type(getattr(spec, section)).model_fields if section in SECTIONS else {}
    return key in fields and field_kind(type(getattr(spec, section)), key) == "int"


# --- words ------------------------------------------------------------------------------------------------------------

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
_FILE_SECTIONS = tuple(name for name in StudySpec.model_fields if name not in ("space", "queue"))
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
        return next(
            (words for key, words in _PATTERNS.items() if key in (path[:2], (path[0], path[-1]))),
            f"text like {context['pattern']}",
        )
    return kind.replace("_", " ")


def shortened(text: str) -> str:
    """The text, or its beginning and an ellipsis; a password is hidden first, since a cut URL is no URL any more."""
    text = without_passwords(text)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def one_line(text: str) -> str:
    """The text with every character that is no plain one escaped, so that a file can't write to the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


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


def _unknown(path: KeyPath, tree: Mapping[str, Any]) -> str:
    valid = _valid_keys(path[:-1], tree)
    if path[0] == "queue" and path[2:] == ("sweep",):
        return "belongs into a manual file, whose entries name their sweep files; take it out"
    if path[0] == "space" and valid == list(Choices.model_fields) and path[-1] in FloatRange.model_fields:
        return "can't stand beside choices; wanted either low and high, or choices"
    elsewhere = [f"{section}.{path[-1]}" for section in _FILE_SECTIONS if path[-1] in _valid_keys((section,), tree)]
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


def family_in(tree: Mapping[str, Any]) -> str:
    """The model family that a file's tree names, if there is one of that name."""
    model = tree.get("model")
    named = model.get("family") if isinstance(model, dict) else None
    return named if isinstance(named, str) and named in FAMILIES else ENCODER


def _valid_keys(parent: KeyPath, tree: Mapping[str, Any]) -> list[str]:
    if not parent:
        return [*StudySpec.model_fields, "extends"]
    if parent[0] == "queue":
        return list(FAMILIES[family_in(tree)].queue_entry.model_fields)
    if parent[0] == "space":
        held = tree["space"].get(parent[1], {}) if len(parent) > 1 else {}
        return list((Choices if "choices" in held else FloatRange).model_fields)
    if parent == ("architecture", "n_layers"):
        return list(LayerRange.model_fields)
    if parent == ("architecture",):
        return list(FAMILIES[family_in(tree)].architecture.model_fields)
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
    """0: the base; 1: the file; 2 and up: --set, in order."""
    words: str


def spelled(path: KeyPath) -> str:
    """A key path as a message writes it: queue[0].d_model."""
    parts = [f"[{part}]" if isinstance(part, int) else shortened(part) for part in path]
    return ".".join(parts).replace(".[", "[")


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
        self.lines: dict[str, None] = {}
        self.uncounted = 0

    def add(self, path: KeyPath, words: str) -> None:
        """A line on a key."""
        self.lines[one_line(f"{self.at(path)}: {words}")] = None

    def at(self, path: KeyPath) -> str:
        """Where a key stands and what it is called there: FILE:LINE: key."""
        written = tuple(part for part in path if part != "values") if path[:1] == ("queue",) else path
        if written != path[:1] and self._entries and path[:1] == ("queue",):
            written = ("queue", self._entries[int(written[1])], *written[2:])
        shown = spelled(written)
        return f"{self._place(path)}: {shown}" if shown else self._place(path)

    def take(self, other: Problems) -> None:
        """Add the lines of another part of the file."""
        self.lines |= other.lines
        self.uncounted += other.uncounted

    def take_text(self, text: str) -> None:
        """Add lines that were said elsewhere."""
        self.lines |= dict.fromkeys(text.split("\n"))

    def text(self) -> str:
        """All lines, or the first hundred and how many there are beside them."""
        lines = list(self.lines)
        more = max(0, len(lines) - MOST_PROBLEMS) + self.uncounted
        return "\n".join([*lines[:MOST_PROBLEMS], *([f"… and {more} problems more"] if more else [])])

    def _place(self, path: KeyPath) -> str:
        around = (path[:length] for length in range(len(path), 0, -1))
        return next((self._places[each].words for each in around if each in self._places), self._default)
