"""Over which devices is a trial spread, and what does each of them hold? Counted from abstract shapes; nothing is made.

Windows are few and short here: a step of 64 windows of 11 patches is 704 tokens, and a layer's weights outweigh what
flows through it. So one device is best wherever the trial fits (the others can train other trials), and where it
doesn't, sharing out heads and d_ff comes before cutting the weights over the batch's devices. Per layer and step the
first moves 4 all-reduces of tokens × d numbers, the second brings 4d² + 2·d·d_ff weights together twice and scatters
their gradients: less only from about 4.5·d tokens a device on (d_ff = 4d, counting an all-reduce twice).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fintx.config.schema import MeshConfig, ModelConfig, Shape
from fintx.model import family
from fintx.train import sharding
from fintx.train.sharding import Layout
from fintx.train.state import Arrangement


@dataclass(frozen=True)
class Footprint:
    """Bytes that a trial holds on each of its devices while it trains, estimated; the data's few MB are left out."""

    parameters: int
    gradients: int
    moments: int
    """AdamW's two."""
    activations: int
    """What the backward pass keeps, and what is at work; with fsdp also the layer's weights brought together."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.moments + self.activations


def footprint(model: ModelConfig, shape: Shape, n_features: int, arrangement: Arrangement) -> Footprint:
    """What a trial holds on each device; exact but for the activations."""
    layout, kind = arrangement.layout, family.of(model)
    params = kind.abstract_params(model, shape, n_features)
    part = sharding.part_bytes(kind, layout, params)
    working = kind.activation_bytes(
        model, shape, windows=-(-arrangement.micro_batch // layout.data), remat=arrangement.remat, parts=layout.model
    )
    if layout.fsdp:
        gathered = params if kind.stacked is None else params[kind.stacked]
        at_once = 1 if kind.stacked is None else kind.depth(shape)
        # and its gradients, before they are scattered
        working += 2 * (sharding.part_bytes(kind, Layout(model=layout.model), gathered) // at_once)
    return Footprint(parameters=part, gradients=part, moments=2 * part, activations=working)


def relieved(arrangement: Arrangement) -> Arrangement | None:
    """What takes less memory at the least cost; none: nothing does.

    Computing layers again costs a third of a pass more. Halving a micro-batch brings all weights in once more, which
    costs these models of few tokens more than that, and draws other dropout masks.
    """
    if not arrangement.remat:
        return replace(arrangement, remat=True)
    least = arrangement.layout.data  # below it devices have nothing to do, and hold as much
    if arrangement.micro_batch <= least:
        return None
    return replace(arrangement, micro_batch=max(least, arrangement.micro_batch // 2))


def choose(
    mesh: MeshConfig,
    model: ModelConfig,
    shape: Shape,
    n_features: int,
    *,
    batch_size: int,
    n_devices: int,
    device_bytes: int,
) -> Layout:
    """The layout that a sweep file's [mesh] means for a shape on so many devices: the first of `layouts` that fits.

    It fits if its footprint does with layers computed again; a smaller micro-batch is the last resort, and none of its
    business. Where nothing fits, the layout that holds the least.
    """
    possible = list(layouts(mesh, model, shape, batch_size=batch_size, n_devices=n_devices))

    def held(layout: Layout) -> int:
        return footprint(model, shape, n_features, Arrangement(batch_size, remat=True, layout=layout)).total

    fitting = (layout for layout in possible if held(layout) <= device_bytes)
    return next(fitting, None) or min(possible, key=held)


def fewest(
    mesh: MeshConfig,
    model: ModelConfig,
    shape: Shape,
    n_features: int,
    *,
    batch_size: int,
    n_devices: int,
    device_bytes: int,
) -> int:
    """Devices that a trial needs, so that the others can train other trials: a divisor of all; all, if nothing fits."""
    for n in (n for n in range(1, n_devices) if n_devices % n == 0):
        layout = choose(
            mesh, model, shape, n_features, batch_size=batch_size, n_devices=n, device_bytes=device_bytes
        )  # fmt: skip
        held = footprint(model, shape, n_features, Arrangement(batch_size, remat=True, layout=layout)).total
        if layout.n_devices <= n and held <= device_bytes:
            return n
    return n_devices


def layouts(mesh: MeshConfig, model: ModelConfig, shape: Shape, *, batch_size: int, n_devices: int) -> Iterator[Layout]:
    """What [mesh] leaves open, in order of preference: one device, then without fsdp, then fewer parts of the model."""
    fixed = mesh.data if isinstance(mesh.data, int) and mesh.data > 0 else None
    common, most = family.of(model).model_parts(shape), n_devices if mesh.model == "auto" else mesh.model
    dividing = [parts for parts in range(1, most + 1) if common % parts == 0]
    if mesh.model == "auto":
        dividing = [parts for parts in dividing if n_devices % (parts * (fixed or 1)) == 0] or [1]
    else:
        dividing = dividing[-1:]
    if mesh.data == "auto":
        yield Layout(model=dividing[0])
    for fsdp in (False, True) if mesh.fsdp == "auto" else (mesh.fsdp,):
        for parts in dividing:
            data = fixed or max(1, min(n_devices // parts, batch_size))
            yield Layout(data=data, model=parts, fsdp=fsdp and data > 1)
