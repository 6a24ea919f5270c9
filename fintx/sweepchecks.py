"""Do a spec's parts fit each other? What types alone can't say: searched paths, bounds, queue entries, metric, loss."""

from __future__ import annotations

import difflib
import itertools
import typing
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from fintx.config import Choices, FloatRange, StudySpec, check_loss
from fintx.toml_lines import Path as KeyPath

SECTIONS = ("model", "optim", "train")
"""Sections of TrialConfig whose values a search may vary."""

_CLASSIFICATION = ("log_loss", "brier", "auc", "average_precision")
_REGRESSION = ("mse", "mae")


def cross_checks(spec: StudySpec) -> Iterator[tuple[KeyPath, str]]:
    """Every misfit between parts, as (key path, what is wrong and how to mend it)."""
    yield from _task(spec)
    for path, searched in spec.space.items():
        yield from _searched(spec, path, searched)
    yield from _geometry(spec)
    yield from _queue(spec)


def _task(spec: StudySpec) -> Iterator[tuple[KeyPath, str]]:
    fitting = _REGRESSION if spec.task.kind == "regression" else _CLASSIFICATION
    if spec.study.metric not in fitting:
        wanted = " or ".join(f'"{metric}"' for metric in fitting)
        yield ("study", "metric"), f'"{spec.study.metric}" does not fit task.kind = "{spec.task.kind}"; wanted {wanted}'
    searched = spec.space.get("train.loss")
    losses = searched.choices if isinstance(searched, Choices) else (spec.train.loss,)
    for loss in losses:
        try:
            check_loss(spec.task, spec.train.model_copy(update={"loss": loss}))
        except ValueError as error:
            yield ("space", "train.loss") if searched else ("train", "loss"), str(error)
            return


def _searched(spec: StudySpec, path: str, searched: FloatRange | Choices) -> Iterator[tuple[KeyPath, str]]:
    where: KeyPath = ("space", path)
    section_name, _, key = path.partition(".")
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
        own = [each for each in error.errors() if each["loc"] == (key,)]
        if own:
            message = own[0]["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            yield where, f"wanted {message.replace(chr(39), chr(34))}, got {value!r}".replace("'", '"')


def _geometry(spec: StudySpec) -> Iterator[tuple[KeyPath, str]]:
    """Every searched window must hold a patch."""
    keys = ("context_length", "patch_length")
    choices = []
    for key in keys:
        searched = spec.space.get(f"model.{key}")
        if isinstance(searched, FloatRange):
            message = "wanted choices: each window length is a dataset and a program of its own"
            yield ("space", f"model.{key}"), message
            return
        choices.append(searched.choices if searched else (getattr(spec.model, key),))
    for context_length, patch_length in itertools.product(*choices):
        if isinstance(context_length, int) and isinstance(patch_length, int) and patch_length > context_length:
            where = next(key for key in keys if f"model.{key}" in spec.space)
            words = f"patch_length = {patch_length} is longer than context_length = {context_length}"
            yield ("space", f"model.{where}"), f"{words}; every pair must fit"
            return
    for key in ("stride", "revin"):
        if isinstance(spec.space.get(f"model.{key}"), FloatRange):
            yield ("space", f"model.{key}"), "wanted choices: each value changes the model's parameters"


def _queue(spec: StudySpec) -> Iterator[tuple[KeyPath, str]]:
    if len(spec.queue) > spec.study.n_trials:
        words = f"{spec.study.n_trials} is fewer than the {len(spec.queue)} queue entries, which count toward it"
        yield ("study", "n_trials"), f"{words}; raise it"
    for index, entry in enumerate(spec.queue):
        if entry.d_model % entry.n_heads:
            yield ("queue", index, "n_heads"), f"{entry.n_heads} heads don't divide d_model = {entry.d_model}"
        for path, value in entry.values.items():
            yield from _queued_value(spec, ("queue", index, "values", path), path, value)


def _queued_value(spec: StudySpec, where: KeyPath, path: str, value: Any) -> Iterator[tuple[KeyPath, str]]:
    searched = spec.space.get(path)
    if searched is None:
        near = difflib.get_close_matches(path, list(spec.space), n=1, cutoff=0.5)
        hint = f'did you mean "{near[0]}"?' if near else f"searched: {', '.join(spec.space) or 'nothing'}"
        yield where, f"is not in [space], so an entry can't set it; {hint}"
    elif isinstance(searched, Choices):
        if not any(
            value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in searched.choices
        ):
            yield where, f"wanted one of {', '.join(map(repr, searched.choices))}, got {value!r}"
    elif isinstance(value, bool) or not isinstance(value, int | float):
        yield where, f"wanted a number in {searched.low:g} … {searched.high:g}, got {value!r}"
    elif not searched.low <= value <= searched.high:
        yield where, f"wanted a value in {searched.low:g} … {searched.high:g}, got {value:g}"
