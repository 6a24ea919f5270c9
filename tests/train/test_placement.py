"""Layouts: what [mesh] means for a size and a device count, and what each device then holds."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from fintx.config.schema import MeshConfig, ModelConfig, Shape
from fintx.model import param_count
from fintx.train import train_step
from fintx.train.memory import choose, footprint
from fintx.train.sharding import ONE, Layout
from fintx.train.train_state import BatchLayout, static_config

GB = 10**9
MODEL = ModelConfig()
TWO_B = Shape(d_model=2048, n_layers=40, n_heads=16, d_ff=8192)
AUTO: dict[str, Any] = {"data": "auto", "model": "auto"}


def chosen(
    mesh: dict[str, Any], *, device_bytes: int, n_devices: int = 8, shape: Shape = TWO_B, batch: int = 64
) -> Layout:
    return choose(
        MeshConfig(**mesh), MODEL, shape, 25, batch_size=batch, n_devices=n_devices, device_bytes=device_bytes
    )  # fmt: skip


@pytest.mark.parametrize(
    ("mesh", "device_bytes", "wanted"),
    [
        ({}, 141 * GB, Layout(data=8)),
        ({}, 24 * GB, Layout(data=8, fsdp=True)),
        ({"fsdp": True}, 141 * GB, Layout(data=8, fsdp=True)),
        ({"fsdp": False}, 24 * GB, Layout(data=8)),
        ({"data": 2}, 141 * GB, Layout(data=2)),
        ({"data": 2, "model": 4}, 141 * GB, Layout(data=2, model=4)),
        ({"model": 4}, 141 * GB, Layout(data=2, model=4)),
        ({"model": 8}, 141 * GB, Layout(data=1, model=8)),
        ({"model": 3}, 141 * GB, Layout(data=4, model=2)),
        ({"data": 1}, 24 * GB, ONE),
        ({"data": 1, "fsdp": True}, 24 * GB, ONE),
        ({"data": "auto"}, 141 * GB, ONE),
        ({"data": "auto"}, 24 * GB, Layout(data=8, fsdp=True)),
        (AUTO, 141 * GB, ONE),
        (AUTO, 24 * GB, Layout(data=4, model=2)),
        (AUTO, 10 * GB, Layout(data=2, model=4)),
        (AUTO | {"fsdp": True}, 24 * GB, Layout(data=8, fsdp=True)),
        (AUTO, 5 * GB, Layout(data=1, model=8)),
        (AUTO | {"data": 4}, 24 * GB, Layout(data=4, model=2)),
        ({"data": 4, "model": 2}, 1 * GB, Layout(data=4, model=2, fsdp=True)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict | Layout) else f"{value // GB} GB",
)
def test_what_a_mesh_means_for_2b_on_eight_devices(mesh: dict[str, Any], device_bytes: int, wanted: Layout) -> None:
    assert chosen(mesh, device_bytes=device_bytes) == wanted


def test_one_device_is_one_device() -> None:
    for mesh in ({}, AUTO, {"fsdp": True}):
        assert chosen(mesh, device_bytes=1, n_devices=1) == ONE


def test_the_model_axis_divides_heads_and_feed_forward() -> None:
    two_heads = Shape(d_model=2048, n_layers=40, n_heads=2, d_ff=8192)
    assert chosen({"model": 8}, device_bytes=141 * GB, shape=two_heads) == Layout(data=4, model=2)
    odd = Shape(d_model=2048, n_layers=40, n_heads=16, d_ff=8191)
    assert chosen(AUTO, device_bytes=24 * GB, shape=odd) == Layout(data=8, fsdp=True)


def test_no_device_is_without_a_window() -> None:
    assert chosen({}, device_bytes=141 * GB, batch=3) == Layout(data=3)


def test_2b_fits_one_gpu_of_141_gb_and_what_each_of_eight_holds() -> None:
    """16 bytes a parameter: 2.01B of them make 32 GB on one; eight that cut all matrices hold an eighth of that."""
    n = param_count.count_params(MODEL, TWO_B, 25).total
    one = footprint(MODEL, TWO_B, 25, BatchLayout(64))
    assert (one.parameters, one.gradients, one.moments) == (4 * n, 4 * n, 8 * n)
    assert 36 * GB > one.total > 32 * GB
    assert footprint(MODEL, TWO_B, 25, BatchLayout(64, remat=True)).activations < one.activations / 4
    eight = footprint(MODEL, TWO_B, 25, BatchLayout(64, layout=Layout(data=8, fsdp=True)))
    assert eight.parameters == pytest.approx(one.parameters / 8, rel=0.01)
    assert eight.total < 5 * GB
    both = footprint(MODEL, TWO_B, 25, BatchLayout(64, layout=Layout(data=2, model=4)))
    assert both.parameters == pytest.approx(one.parameters / 4, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True], ids=["products kept", "computed again"])
@pytest.mark.parametrize("layout", [ONE, Layout(data=8, fsdp=True), Layout(data=2, model=4)], ids=str)
def test_the_footprint_is_near_the_compiled_steps(make_trial: Any, layout: Layout, remat: bool) -> None:
    """At 13M parameters. XLA holds a little more: updates, and products that it computes twice at once."""
    shape = {"shape.d_model": 512, "shape.n_layers": 4, "shape.d_ff": 2048, "shape.n_heads": 8}
    config = make_trial({**shape, "train.batch_size": 512})
    static = static_config(config, remat=remat, layout=layout)
    needed = train_step.compile_training(static, n_features=3, n_rows=512, n_samples=256).n_bytes
    estimated = footprint(config.model, config.shape, 3, BatchLayout(512, remat, layout)).total
    print(layout, remat, estimated, needed, needed / estimated)
    assert needed == pytest.approx(estimated, rel=0.35)


def test_abstract_parameters_make_no_array() -> None:
    before = len(jax.live_arrays())
    footprint(MODEL, TWO_B, 25, BatchLayout(64, layout=Layout(data=64, model=8, fsdp=True)))
    assert len(jax.live_arrays()) == before
