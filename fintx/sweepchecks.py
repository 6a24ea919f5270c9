"""Do a spec's parts fit each other? What types alone can't say: searched paths, bounds, queue entries, metric, loss."""

from __future__ import annotations

import difflib
import itertools
import typing
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from fintx.config import LOSSES, METRICS, Choices, FloatRange, StudySpec, check_loss
from fintx.sweepwords import expectation, got
from fintx.toml_lines import Path as KeyPath

SECTIONS = ("model", "optim", "train")
"""Sections of TrialConfig whose values a search may vary."""


def cross_checks(
    spec: StudySpec, *, broken: Container[str] = (), counted: bool = True
) -> Iterator[tuple[KeyPath, str]]:
    """Every misfit between parts, as (key path, what is wrong and how to mend it).

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
    if not any(part in broken for part in ("model", "space.model.context_length", "space.model.patch_length")):
        yield from _geometry(spec)
    if counted and "study" not in broken:
        yield from _total(spec)
    yield from _queue(spec, broken)


def _data(spec: StudySpec) -> Iterator[tuple[KeyPath, str]]:
    for key in ("assets", "context"):
        for symbol in _repeated(getattr(spec.data, key)):
            yield ("data", key), f"{symbol} stands twice; take one out"
    start, end = spec.data.start, spec.data.end
    if start and end and start > end:
        yield ("data", "start"), f"wanted a date up to data.end = {end}, got {start}"


def _repeated(values: Sequence[Any]) -> list[Any]:
    """Values that stand more than once; true is not 1."""
    counts = Counter((isinstance(value, bool), value) for value in values)
    return [value for (_, value), count in counts.items() if count > 1]


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
    """What shapes a window or the model is a list of choices, and every searched window holds a patch."""
    reasons = dict.fromkeys(("context_length", "patch_length"), "each length is a dataset or a program of its own")
    reasons |= dict.fromkeys(("stride", "revin"), "each value changes the model's parameters")
    ranges = [key for key in reasons if isinstance(spec.space.get(f"model.{key}"), FloatRange)]
    for key in ranges:
        if key != "revin":  # no number: said already
            yield ("space", f"model.{key}"), f"wanted choices: {reasons[key]}"
    keys = ("context_length", "patch_length")
    if set(keys) & set(ranges):
        return
    choices = [
        searched.choices if isinstance(searched := spec.space.get(f"model.{key}"), Choices) else (fixed,)
        for key, fixed in ((key, getattr(spec.model, key)) for key in keys)
    ]
    for context_length, patch_length in itertools.product(*choices):
        if isinstance(context_length, int) and isinstance(patch_length, int) and patch_length > context_length:
            where = next(key for key in keys if f"model.{key}" in spec.space)
            words = f"patch_length = {patch_length} is longer than context_length = {context_length}"
            yield ("space", f"model.{where}"), f"{words}; every pair must fit"
            return


def _total(spec: StudySpec) -> Iterator[tuple[KeyPath, str]]:
    queued = sum(not entry.cancelled for entry in spec.queue)
    if queued > spec.study.n_trials:
        words = f"{spec.study.n_trials} is fewer than the {queued} queue entries, which count toward it"
        yield ("study", "n_trials"), f"{words}; raise it"


def _queue(spec: StudySpec, broken: Container[str]) -> Iterator[tuple[KeyPath, str]]:
    for index, entry in enumerate(spec.queue):
        if entry.d_model % entry.n_heads:
            yield ("queue", index, "n_heads"), f"{entry.n_heads} heads don't divide d_model = {entry.d_model}"
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
