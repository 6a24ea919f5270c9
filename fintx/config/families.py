"""Model families: what a sweep file says of each, its candidate shapes and the shapes of its queue.

What a family computes stands in `fintx.model.family`. The two are apart because a file is checked before JAX is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fintx.config.bounds import Depth, Name, PositiveInt, Ratio, Scalar, ShapeNumber, StrictModel, Width


class Shape(StrictModel):
    """A model's shape: whole numbers by the names of its family (d_model, n_layers, n_heads, d_ff for the encoder).

    It is what a parameter budget is solved for. Its identity is its content.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, PositiveInt]

    if TYPE_CHECKING:  # names are the family's

        def __init__(self, **numbers: int): ...

        def __getattr__(self, name: str) -> int: ...

    def __hash__(self) -> int:
        return hash(frozenset(self.__pydantic_extra__.items()))


class LayerRange(StrictModel):
    """Every whole number from low to high."""

    low: Depth = 2
    high: Depth = 256

    @model_validator(mode="after")
    def _ordered(self) -> LayerRange:
        if self.low > self.high:
            raise ValueError(f"wanted low up to high, got low = {self.low} and high = {self.high}")
        return self


_LENGTH = Field(min_length=1, max_length=1000)


class ArchitectureConfig(StrictModel):
    """Candidate shapes of the encoder; `fintx plan` prints those inside the budget."""

    d_model: Annotated[tuple[Width, ...], _LENGTH] = (256, 384, 512, 768, 1024, 1536, 2048)
    """Widths of the residual stream."""
    n_layers: LayerRange = LayerRange()
    """Depths from low to high."""
    n_heads: Annotated[tuple[Width, ...], _LENGTH] = (2, 4, 8, 12, 16, 24, 32)
    """Attention heads; only numbers that divide d_model are combined with it."""
    d_ff_ratio: Annotated[tuple[Ratio, ...], _LENGTH] = (2.0, 4.0)
    """d_ff / d_model; the product is rounded to a whole number."""

    @model_validator(mode="after")
    def _few_enough(self) -> ArchitectureConfig:
        depths = self.n_layers.high - self.n_layers.low + 1
        n_shapes = len(self.d_model) * depths * len(self.n_heads) * len(self.d_ff_ratio)
        if n_shapes > 500_000:
            raise ValueError(f"holds {n_shapes:,} candidate shapes; wanted 500,000 at most: shorten a list or n_layers")
        return self


class QueueEntry(StrictModel):
    """What the queue entries of every family hold; the numbers of a shape are fields of the family's own class."""

    note: str = ""
    """Why it is tried; kept in the trial's record."""
    id: Name | None = None
    """A name by which the entry is known; none: it is known by its content."""
    values: dict[str, Scalar] = {}
    """Dotted path → value, for paths of [space]; `training` says where the rest comes from."""
    training: Literal["best", "defaults", "sampler"] = "best"
    """best: the study's best finished trial, or the file's defaults before there is one; sampler: its own proposal."""
    cancelled: bool = False
    """true: never run; the entry stays in the file for the record."""

    @property
    def shape(self) -> Shape:
        """The entry's shape."""
        return Shape(**{name: getattr(self, name) for name in shape_names(type(self))})


def shape_names(entry: type[QueueEntry]) -> tuple[str, ...]:
    """The fields that a family's queue entries add to those of all: the numbers of its shapes."""
    return tuple(name for name in entry.model_fields if name not in QueueEntry.model_fields)


class EncoderEntry(QueueEntry):
    """A hand-picked shape to run before the search, with any searched values that it fixes by dotted path."""

    d_model: ShapeNumber
    """Width of the residual stream."""
    n_layers: ShapeNumber
    """Number of layers."""
    n_heads: ShapeNumber
    """Attention heads; must divide d_model."""
    d_ff: ShapeNumber
    """Width of the feed-forward layers."""


def _encoder_misfit(shape: Shape) -> tuple[str, str] | None:
    if shape.d_model % shape.n_heads:
        return "n_heads", f"{shape.n_heads} heads don't divide d_model = {shape.d_model}"
    return None


@dataclass(frozen=True)
class FamilyConfig:
    """What a sweep file may say of a model family."""

    architecture: type[BaseModel]
    """The section [architecture]: candidates with defaults."""
    queue_entry: type[QueueEntry]
    """A [[queue]] entry: a field for each of a shape's numbers."""
    misfit: Callable[[Shape], tuple[str, str] | None] = lambda shape: None
    """The number of a shape that doesn't fit the others, and why; none: all fit."""


ENCODER = "encoder"
FAMILY_CONFIGS: dict[str, FamilyConfig] = {ENCODER: FamilyConfig(ArchitectureConfig, EncoderEntry, _encoder_misfit)}
"""By `model.family`; `fintx.model.family.FAMILIES` has the same names."""
