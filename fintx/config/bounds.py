"""Value types: numbers, each with a finite bound and its reason, names, and text that stands for a number.

Bounds keep a typing mistake cheap: what becomes memory, a loop or a time is at most as large as anybody could use, and
a floating-point number of training must be the same kind of number in float32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError, PydanticKnownError


class StrictModel(BaseModel):
    """A frozen value: a wrong type, an edit or an unknown key is an error."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", validate_default=True)


def _in_float32(value: float) -> float:
    """Training computes in float32, whose smallest numbers XLA takes for 0: a rate of 1e-46 would be no rate at all."""
    smallest, largest = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    if value and not smallest <= abs(value) <= largest:
        raise ValueError(f"wanted a number that float32 can hold ({smallest:.2g} … {largest:.2g})")
    return value


def _below_one_in_float32(value: float) -> float:
    """Adam divides by 1 − b2, dropout by 1 − rate: where either is 1 in float32, every parameter becomes NaN."""
    if np.float32(value) >= 1:
        raise ValueError("wanted a number that float32 can tell from 1 (at most 0.9999999)")
    return value


Float32 = AfterValidator(_in_float32)
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False), Float32]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False), Float32]
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), Float32, AfterValidator(_below_one_in_float32)]
Fraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Ratio = Annotated[float, Field(gt=0, le=64, allow_inf_nan=False)]
"""d_ff / d_model; models use 1 to 8."""
Seconds = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
"""Up to 11 days: an operating system's timers end at 24."""
PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
"""Trials, epochs, samples: more would outlast any study."""
Days = Annotated[int, Field(ge=1, le=10_000)]
"""Trading days or bars: 10,000 are 40 years."""
Width = Annotated[int, Field(ge=1, le=2**16)]
"""Of a layer or a batch: the widest models have some 20,000."""
Depth = Annotated[int, Field(ge=1, le=1024)]
"""Layers: every depth in a range is a candidate shape."""
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Symbol = Annotated[str, Field(pattern=r"^[A-Za-z0-9^][A-Za-z0-9^._=-]{0,31}$")]


def _whole(value: Any) -> Any:
    """768.0 → 768: the same number, however it is written. (From 2⁵³ on, a float is no longer any one integer.)"""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


ShapeNumber = Annotated[int, Field(ge=1, le=2**22), BeforeValidator(_whole)]
"""Of a queued shape, whose d_ff may be a width times the largest ratio."""


def _scalar(value: Any) -> Any:
    if not isinstance(value, bool | int | float | str):
        raise PydanticCustomError("scalar_type", "not true, false, a number or text")
    return value


Scalar = Annotated[bool | int | float | str, PlainValidator(_scalar)]
"""Of a setting whose type is checked later; one message, where the parts of a union would give four."""


def one_of(wanted: str, *constants: bool | int | str, most: int = 0) -> BeforeValidator:
    """A few constants, or a whole number from 1 to `most`; one message, where the parts of a union would give three."""

    def check(value: Any) -> Any:
        is_constant = any(type(value) is type(constant) and value == constant for constant in constants)
        if is_constant or (type(value) is int and 1 <= value <= most):
            return value
        raise ValueError(f"wanted {wanted}")

    return BeforeValidator(check)


def name_in(table: Mapping[str, Any]) -> AfterValidator:
    """A name in a table, refused like one that is no choice of a Literal."""

    def check(name: str) -> str:
        if name not in table:
            *others, last = (f"'{known}'" for known in table)
            expected = f"{', '.join(others)} or {last}" if others else last
            raise PydanticKnownError("literal_error", {"expected": expected})
        return name

    return AfterValidator(check)


def _parse_amount(value: Any, units: Mapping[str, int], wanted: str) -> Any:
    """Text as a whole number; anything else is left for the type check to refuse."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) ?([A-Z]*)", value.strip().upper())
    if match is None or match[2] not in units:
        raise ValueError(wanted)
    return round(float(match[1]) * units[match[2]])


def parse_parameters(value: Any) -> Any:
    """'200M' → 200_000_000; an int passes. Suffixes K, M, B."""
    units = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
    return _parse_amount(value, units, 'write a count like "200M", "1.5B" or 2000000')


def _parse_bytes(value: Any) -> Any:
    """'12GB' → 12_000_000_000; an int passes. Units MB, GB, MiB, GiB."""
    units = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
    return _parse_amount(value, units, 'write an amount like "12GB" or "500MiB"')


Parameters = Annotated[int, Field(ge=1, le=10**13), BeforeValidator(parse_parameters)]
"""10 trillion: more than any model has."""
Bytes = Annotated[int, Field(ge=1, le=2**50), BeforeValidator(_parse_bytes)]
"""1 PiB: more than any machine has."""
