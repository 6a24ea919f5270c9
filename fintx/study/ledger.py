"""Which trials does a study have, who holds each, and how far is it? What the storage knows, as plain values.

A trial enters the storage whole (number, parameters, shape, where it comes from) in one write. From then on its lease
says who works on it: a token per attempt, host, process, and the last step; a worker renews it by training. What the
storage doesn't hold is the result: that is the record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fintx.config import Shape


@dataclass(frozen=True)
class Claim:
    """A trial as the storage holds it."""

    number: int
    params: dict[str, Any]
    """What the sampler holds of it: coordinates and searched values."""
    shape: Shape
    entry: str | None
    """Identity of the queue entry that it comes from; none: the sampler's proposal."""
    note: str
    training: str
    """Where the values that a queue entry leaves open came from: "trial 7", "defaults", "sampler"; else empty."""
    finished: bool
    """Its record stands."""
    state: Literal["running", "interrupted", "failed"]
    """Of an unfinished one. interrupted: stopped on request; failed: its last attempt crashed or hung."""
    token: str
    """Of the attempt that holds it; who has another one is superseded."""
    attempt: int
    """From 1."""
    failures: int
    """Attempts that crashed or hung, in all."""
    host: str
    pid: int
    step: int
    """Last step that was reported."""
    detail: str
    """Why the last attempt ended, in a line; empty while all is well."""
