"""Sharding: a mesh of devices, how each parameter is cut over it by its family's rules, and arrays put there.

The mesh has two axes. `data` shares out a step's windows and, with fsdp, each matrix (Rajbhandari et al. 2020, ZeRO,
https://arxiv.org/abs/1910.02054): a layer's weights are gathered when the layer is reached, and freed after it. `model`
shares out heads and the feed-forward width (Shoeybi et al. 2019, Megatron-LM, https://arxiv.org/abs/1909.08053). The
rest is XLA's: jit with NamedSharding over Auto axes, no collective by hand. On one device no mesh is made.

A layout changes results by the rounding of sums taken in another order (losses by 1e-6), and by nothing else: initial
parameters, batches and dropout masks are functions of keys and positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from fintx.errors import FintxError
from fintx.model.family import Family
from fintx.types import Params

DATA, MODEL = "data", "model"


@dataclass(frozen=True)
class Layout:
    """Over how many devices a trial is spread, and how."""

    data: int = 1
    """Devices that share a step's windows …"""
    model: int = 1
    """… times devices that share heads and feed-forward width."""
    fsdp: bool = False
    """Each device of `data` keeps a part of every matrix instead of all of it."""

    @property
    def n_devices(self) -> int:
        """Devices in the mesh."""
        return self.data * self.model

    def __str__(self) -> str:
        if self.n_devices == 1:
            return "one device"
        return f"data {self.data} × model {self.model}{', fsdp' if self.fsdp else ''}"


ONE = Layout()


def spec_of(
    family: Family, layout: Layout, path: tuple[str, ...], shape: tuple[int, ...], *, leading: int = 0
) -> PartitionSpec:
    """Where a leaf is cut: by the family's rules, and with fsdp each matrix over `data` along its largest axis left.

    Args:
        path: keys on the way to a parameter, such as ("blocks", "qkv", "kernel"); empty for a counter.
        shape: the leaf's, its leading axes included. The axis of stacked layers is never cut: a loop runs over it.
        leading: axes in front of the parameter's own, such as a population's R; never cut.

    Raises:
        ValueError: the rules cut a parameter twice over a mesh axis; no array can be.
    """
    own = shape[leading:]
    rule = family.partition_rules.get("/".join(path), PartitionSpec()) if layout.model > 1 else PartitionSpec()
    axes: list[str | None] = [*rule, *[None] * (len(own) - len(rule))]
    first = 1 if path[:1] == (family.stacked,) else 0
    if layout.fsdp and len(own) - first >= 2:
        free = [i for i in range(first, len(own)) if axes[i] is None and own[i] % layout.data == 0]
        if free:
            axes[max(free, key=lambda i: own[i])] = DATA
    while axes and axes[-1] is None:
        axes.pop()
    used = [axis for axis in axes if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"{'/'.join(path)}: {PartitionSpec(*axes)} uses a mesh axis twice")
    return PartitionSpec(*[None] * leading, *axes) if axes else PartitionSpec()


def specs(family: Family, layout: Layout, tree: Any, *, leading: int = 0) -> Any:
    """`spec_of` for each leaf of a tree that holds parameters: themselves, an optimiser's state, a whole TrainState.

    Parameters are nested dicts and nothing else is, so the keys of dicts on the way to a leaf are its parameter's path:
    an optimiser's moments lie like what they are moments of.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: spec_of(family, layout, _keys(path), tuple(leaf.shape), leading=leading), tree
    )


def _keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey))


@lru_cache(maxsize=16)
def mesh_of(layout: Layout) -> Mesh:
    """The mesh over the first devices there are, those of all hosts together.

    Raises:
        FintxError: there are too few, or the mesh would leave all devices of some process out.
    """
    devices = jax.devices()
    if layout.n_devices > len(devices):
        raise FintxError(
            f"[mesh]: {layout} needs {layout.n_devices} devices, and there are {len(devices)}; lower mesh.data or "
            "mesh.model, or set data = -1"
        )
    taken = devices[: layout.n_devices]
    if len({device.process_index for device in taken}) != jax.process_count():
        raise FintxError(
            f"[mesh]: {layout} leaves some of the {jax.process_count()} hosts out; raise mesh.data, or set it to -1"
        )
    return jax.make_mesh(
        (layout.data, layout.model), (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto), devices=taken
    )


def shardings(family: Family, layout: Layout, tree: Any, *, leading: int = 0) -> Any:
    """`specs` on the mesh: what jit, device_put and a restore want."""
    mesh = mesh_of(layout)
    cut = specs(family, layout, tree, leading=leading)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), cut, is_leaf=lambda x: isinstance(x, PartitionSpec))


def n_local(layout: Layout) -> int:
    """How many of its devices belong to this process; asks JAX only where there are several."""
    return 1 if layout.n_devices == 1 else layout.n_devices // jax.process_count()


def everywhere(layout: Layout) -> NamedSharding:
    """The whole of an array on every device."""
    return NamedSharding(mesh_of(layout), PartitionSpec())


def put(family: Family, layout: Layout, tree: Any, *, leading: int = 0) -> Any:
    """Host arrays onto the devices, parameters cut as `specs` says, all else whole on each."""
    if layout.n_devices == 1:
        return jax.device_put(tree)
    return jax.device_put(tree, shardings(family, layout, tree, leading=leading))


def put_everywhere(layout: Layout, tree: Any) -> Any:
    """Host arrays onto the devices, whole on each."""
    return jax.device_put(tree) if layout.n_devices == 1 else jax.device_put(tree, everywhere(layout))


def to_host(tree: Any) -> Any:
    """Whole host arrays: copies, never views of what a device goes on writing to.

    Where several hosts share an array, all must call.
    """
    return jax.tree.map(_whole, tree)


def _whole(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return np.array(leaf)
    if leaf.is_fully_replicated:
        return np.array(leaf.addressable_data(0))
    assert isinstance(leaf.sharding, NamedSharding)
    return np.array(_gather(leaf.sharding.mesh)(leaf).addressable_data(0))


@lru_cache(maxsize=16)
def _gather(mesh: Mesh) -> Callable[[Array], Array]:
    return jax.jit(lambda leaf: leaf, out_shardings=NamedSharding(mesh, PartitionSpec()))


# --- inside a program -------------------------------------------------------------------------------------------------


def over_data(layout: Layout, tree: Any) -> Any:
    """Arrays of a program whose first axis is a batch: each device takes its share of it."""
    if layout.n_devices == 1:
        return tree
    sharding = NamedSharding(mesh_of(layout), PartitionSpec(DATA))
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, sharding), tree)


def before_pass(family: Family, layout: Layout, params: Params, batch: Any) -> tuple[Params, Any]:
    """Inputs of a pass over a batch: each device has its share of the windows, and all weights but stacked ones."""
    if layout.n_devices == 1:
        return params, batch
    stacked = {name: leaf for name, leaf in params.items() if name == family.stacked}
    rest = {name: leaf for name, leaf in params.items() if name not in stacked}
    return {**_gathered_weights(family, layout, rest), **stacked}, over_data(layout, batch)


def before_layer(family: Family, layout: Layout, hidden_BND: Array, block: Params) -> tuple[Array, Params]:
    """Inputs of a stacked layer: each device keeps its windows, and gathers the layer's weights.

    Left to itself, XLA may cut the residual stream along D as the weights are, and all-reduce every product.
    """
    if layout.n_devices == 1:
        return hidden_BND, block
    return over_data(layout, hidden_BND), _gathered_weights(family, layout, block, stacked=True)


def _gathered_weights(family: Family, layout: Layout, params: Params, *, stacked: bool = False) -> Params:
    """Parameters as without fsdp; their gradients are reduce-scattered, not all-reduced.

    Args:
        stacked: they are one layer's of the stacked ones.
    """
    if not layout.fsdp:
        return params
    mesh, axes = mesh_of(layout), (1,) if stacked else ()
    above = (family.stacked,) if stacked and family.stacked else ()

    def gather(path: tuple[Any, ...], leaf: Array) -> Array:
        cut, whole = (
            NamedSharding(
                mesh, PartitionSpec(*spec_of(family, target, above + _keys(path), axes + leaf.shape)[len(axes) :])
            )
            for target in (layout, dataclasses.replace(layout, fsdp=False))
        )
        return leaf if cut == whole else _cast(cut, whole, leaf)

    return jax.tree_util.tree_map_with_path(gather, params)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cast(cut: NamedSharding, whole: NamedSharding, leaf: Array) -> Array:
    return jax.lax.with_sharding_constraint(leaf, whole)


def _cast_forward(cut: NamedSharding, whole: NamedSharding, leaf: Array) -> tuple[Array, None]:
    return _cast(cut, whole, leaf), None


def _cast_backward(cut: NamedSharding, whole: NamedSharding, _: None, gradient: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(gradient, cut),)


_cast.defvjp(_cast_forward, _cast_backward)


# --- sizes, without devices -------------------------------------------------------------------------------------------


def part_bytes(family: Family, layout: Layout, tree: Any, *, leading: int = 0) -> int:
    """Bytes of a tree's leaves (abstract ones will do) that each device holds; needs no device."""
    sizes = {DATA: layout.data, MODEL: layout.model, None: 1}

    def n_bytes(path: tuple[Any, ...], leaf: Any) -> int:
        spec = spec_of(family, layout, _keys(path), tuple(leaf.shape), leading=leading)
        return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize // math.prod(sizes[axis] for axis in spec)

    return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(n_bytes, tree)))
