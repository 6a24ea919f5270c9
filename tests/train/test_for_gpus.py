"""What a GPU is asked to do, read from the train step as it is lowered for one; there need be none."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from fintx.config.schema import ModelConfig, Shape
from fintx.train import train_state, train_step
from fintx.train.train_state import StaticConfig, static_model

SHAPE = Shape(d_model=16, n_layers=3, n_heads=2, d_ff=32)
N_FEATURES, N_MEMBERS = 5, 4
PRODUCT = re.compile(
    r"stablehlo\.dot_general .*precision = \[(\w+), \w+\] : \(tensor<(\S+)>, tensor<(\S+)>\) -> tensor<"
)


def lowered(dtype: str, *, n_members: int = 1, **batch_layout) -> str:
    """The program of a segment, for CUDA."""
    static = StaticConfig(
        model=static_model(ModelConfig(compute_dtype=dtype)), shape=SHAPE, batch_size=8, loss="bce", schedule="cosine",
        stochastic=True, **{"micro_batch": 8, **batch_layout},
    )  # fmt: skip
    values = (
        train_state.abstract_hyperparameters(),
        train_state.abstract_state(static, n_features=N_FEATURES),
        jax.eval_shape(train_step.EpochSums),
    )
    segment = partial(train_step.train_segment, static)
    if n_members > 1:
        segment = jax.vmap(segment, in_axes=(0, 0, 0, None, None))
        values = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((n_members, *leaf.shape), leaf.dtype), values)
    windows = train_step.abstract_windows(n_features=N_FEATURES, n_rows=256, n_samples=256)
    traced = jax.jit(segment).trace(*values, windows, jax.ShapeDtypeStruct((), jnp.int32))
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("n_members", [1, N_MEMBERS])
def test_in_bfloat16_all_products_but_the_heads_multiply_bfloat16(n_members):
    """Those of the highest precision are sums written as products, and stay float32."""
    products = PRODUCT.findall(lowered("bfloat16", n_members=n_members))
    exact = [sides for precision, *sides in products if precision == "HIGHEST"]
    assert exact and all(side.endswith("xf32") for sides in exact for side in sides)
    rough = [sides for precision, *sides in products if precision == "DEFAULT"]
    n_patches = 11
    wide = [sides for sides in rough if any(side.endswith("f32") for side in sides)]
    assert len(wide) == 3 and len(rough) > 20, "the head's output, and its gradients to both sides"
    assert all(any(f"{n_patches * SHAPE.d_model}x" in side for side in sides) for sides in wide)
    assert all(side.endswith("xbf16") for sides in rough if sides not in wide for side in sides)


def test_in_float32_nothing_is_bfloat16():
    assert "bf16" not in lowered("float32")


@pytest.mark.parametrize("batch_layout", [{}, {"n_members": N_MEMBERS}, {"micro_batch": 2}, {"remat": True}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_left_to_a_library_of_the_cpus(dtype, batch_layout):
    """Such as LAPACK: a call that no GPU knows shows when a trial starts there, and not before."""
    assert "custom_call" not in lowered(dtype, **batch_layout)
