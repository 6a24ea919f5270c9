"""Model families: the interface that training, the budget solver and the search use, and the table of families.

A family is a module of pure functions over a nested dict of arrays, an entry in `FAMILIES`, and its candidates' entry
in `config.families.FAMILY_CONFIGS` (a sweep file is checked before JAX is loaded). Training, sizes and the search don't
know how its shapes are named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jax.sharding import PartitionSpec

from fintx.config.schema import ModelConfig, Shape
from fintx.errors import FintxError
from fintx.model import encoder
from fintx.types import Params


@dataclass(frozen=True, eq=False)
class Family:
    """A kind of model. `model` and `shape` are static everywhere; parameters may be traced, vmapped or sharded."""

    init: Callable[..., Params]
    """(model, shape, n_features, key) → parameters, float32."""
    apply: Callable[..., Any]
    """(model, shape, params, x_BTF, *, key, dropout, remat, before_layer) → (B,) logits; without a key no dropout.
    before_layer(hidden_BND, parameters of the layer) is called before each stacked layer, and returns both."""
    abstract_params: Callable[[ModelConfig, Shape, int], Params]
    """(model, shape, n_features) → the tree of `init` as shapes and dtypes, without allocating anything."""
    rescale_output: Callable[[Params, float, float], Params]
    """(params, mean, sd) → the parameters of the model whose output is mean + sd · output."""

    param_count: Callable[[ModelConfig, Shape, int], dict[str, int]]
    """(model, shape, n_features) → exact number of parameters by part."""
    flops: Callable[[ModelConfig, Shape, int], float]
    """(model, shape, n_features) → FLOPs of one sample's forward pass: matmuls, a multiply-add is 2."""
    activation_bytes: Callable[..., int]
    """(model, shape, *, windows, remat, parts) → bytes that a pass forward and back holds beside parameters and
    gradients, roughly; parts: the devices that `partition_rules` cuts the model over."""

    weight_decay_mask: Callable[[Params], Params]
    """Whether each leaf is subject to weight decay."""
    partition_rules: Mapping[str, PartitionSpec]
    """Path of a parameter, such as "blocks/qkv/kernel" → which of its axes is cut over the mesh axis "model". All
    others lie whole on every device along that axis."""
    model_parts: Callable[[Shape], int]
    """The axis "model" may have as many devices as divide this number."""
    stacked: str | None
    """The parameters' key under which layers are stacked on a leading axis and applied by a loop; none: no key."""
    depth: Callable[[Shape], int]
    """Layers that run one after the other."""
    width: Callable[[Shape], int]
    """Width of the linear layers that do most of the work."""

    feasible: Callable[..., tuple[Shape, ...]]
    """(architecture, budget, models, n_features) → the candidates that fit with every model, in a fixed order."""
    why_infeasible: Callable[..., str]
    """The same arguments, where nothing fits → in one line, why, and which bound to change."""
    coordinates: Mapping[str, Callable[[Shape], float]]
    """Name → an ordered coordinate of a shape, which the sampler proposes: near shapes perform alike. Shapes that are
    equal in all coordinates are told apart by the first."""
    extents: Mapping[str, Callable[[Shape], float]]
    """Name → a number of a shape whose smallest and largest value are worth trying first (`study.queue_extremes`)."""


FAMILIES: dict[str, Family] = {
    "encoder": Family(
        init=encoder.init,
        apply=encoder.apply,
        abstract_params=encoder.abstract_params,
        rescale_output=encoder.rescale_output,
        param_count=encoder.param_count,
        flops=encoder.flops,
        activation_bytes=encoder.activation_bytes,
        weight_decay_mask=encoder.weight_decay_mask,
        partition_rules=encoder.PARTITION_RULES,
        model_parts=encoder.model_parts,
        stacked="blocks",
        depth=lambda shape: shape.n_layers,
        width=lambda shape: shape.d_model,
        feasible=encoder.feasible,
        why_infeasible=encoder.why_infeasible,
        coordinates=encoder.COORDINATES,
        extents=encoder.EXTENTS,
    ),
}


def of(model: ModelConfig) -> Family:
    """The family of a model.

    Raises:
        FintxError: there is none of that name.
    """
    if model.family not in FAMILIES:
        names = " or ".join(f'"{name}"' for name in FAMILIES)
        raise FintxError(f'model.family: wanted {names}, got "{model.family}"')
    return FAMILIES[model.family]
