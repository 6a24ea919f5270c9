"""The backward pass by hand against autodiff of the forward pass, wherever it could go another way."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fintx.config.schema import ModelConfig, Shape
from fintx.model import blocks, encoder

B, N, RATE = 3, 4, 0.3
MODEL = ModelConfig(context_length=12, patch_length=3, stride=3)


def plain(hidden: jax.Array, block: Any) -> tuple[jax.Array, Any]:
    return hidden, block


def static(shape: Shape, *, dtype: str = "float32", remat: bool = False, before_layer: Any = plain) -> blocks.Static:
    return blocks.Static(shape.n_heads, dtype, remat, before_layer)


def drawn(shape: Shape, *, seed: int = 0) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
    """Blocks without a zero or a one left of an init, a residual stream, masks' words, and a grad to pull back."""
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        sd = 1 / math.sqrt(leaf.shape[-2]) if leaf.ndim == 3 else 0.5
        return jnp.asarray(sd * rng.standard_normal(leaf.shape), jnp.float32)

    stacked = jax.tree.map(draw, encoder.abstract_params(MODEL, shape, 2)["blocks"])
    hidden, grad = (jnp.asarray(rng.standard_normal((B, N, shape.d_model)), jnp.float32) for _ in range(2))
    words = jnp.asarray(rng.integers(0, 2**32, (shape.n_layers, blocks.N_MASKS, 2)), jnp.uint32)
    return stacked, hidden, words, grad


def by_hand(how: blocks.Static, stacked: Any, hidden: jax.Array, words: jax.Array | None, grad: jax.Array) -> Any:
    """The gradients that training takes."""
    run = lambda stacked, hidden: blocks.run(how, hidden, stacked, words, jnp.float32(RATE))  # noqa: E731
    return jax.vjp(run, stacked, hidden)[1](grad)


def by_autodiff(how: blocks.Static, stacked: Any, hidden: jax.Array, words: jax.Array | None, grad: jax.Array) -> Any:
    """JAX's own, through a Python loop over the forward pass of a layer."""

    def run(stacked: Any, hidden: jax.Array) -> jax.Array:
        for layer in range(len(stacked["qkv"]["bias"])):
            block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked)
            masks = None if words is None else words[layer]
            hidden, _ = blocks._forward(how, hidden, block, masks, jnp.float32(RATE))
        return hidden

    return jax.vjp(run, stacked, hidden)[1](grad)


def assert_close(ours: Any, theirs: Any, *, tolerance: float) -> None:
    """Leaf by leaf, in the norm; a leaf that is zero but for rounding (a key's bias) against the largest grad."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        error, size = float(jnp.linalg.norm(a - b)), float(jnp.linalg.norm(b))
        assert error <= tolerance * max(size, 1.0), (jax.tree_util.keystr(path), error, size)


SHAPES = {
    "plain": Shape(d_model=8, n_layers=2, n_heads=2, d_ff=16),
    "one head, odd widths": Shape(d_model=5, n_layers=3, n_heads=1, d_ff=7),
    "as many heads as d_model": Shape(d_model=4, n_layers=1, n_heads=4, d_ff=4),
}


@pytest.mark.parametrize(
    ("shape", "dropped", "remat"),
    [
        ("plain", False, False), ("plain", True, True),
        ("one head, odd widths", False, True), ("one head, odd widths", True, False),
        ("as many heads as d_model", False, False), ("as many heads as d_model", True, True),
    ],
)  # fmt: skip
def test_the_backward_pass_by_hand_equals_autodiff(shape: str, dropped: bool, remat: bool) -> None:
    """Every pair of a shape, dropout or none, and products kept or computed again."""
    stacked, hidden, words, grad = drawn(SHAPES[shape])
    how = static(SHAPES[shape], remat=remat)
    words_or_none = words if dropped else None
    gradients = [
        jax.jit(functools.partial(each, how))(stacked, hidden, words_or_none, grad) for each in (by_hand, by_autodiff)
    ]
    assert_close(*gradients, tolerance=1e-5)  # the same sums in another order


def test_in_bfloat16_it_is_as_close_to_float32_as_autodiff_is() -> None:
    shape = Shape(d_model=32, n_layers=4, n_heads=2, d_ff=64)
    drawn_ones = drawn(shape)
    exact = jax.jit(functools.partial(by_hand, static(shape)))(*drawn_ones)
    rough = static(shape, dtype="bfloat16")
    ours, theirs = (jax.jit(functools.partial(each, rough))(*drawn_ones) for each in (by_hand, by_autodiff))
    distance = lambda gradients: math.sqrt(  # noqa: E731
        sum(
            float(jnp.sum(jnp.square(a - b)))
            for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(exact), strict=True)
        )
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {jnp.dtype("float32")}
    assert 0 < distance(ours) < 1.2 * distance(theirs)


def test_what_comes_before_a_layer_is_pulled_back_through() -> None:
    """A hook that doubles gradients and changes no value: each of three layers doubles the stream's once more."""
    shape = Shape(d_model=8, n_layers=3, n_heads=2, d_ff=16)

    @jax.custom_vjp
    def doubling(x: jax.Array) -> jax.Array:
        return x

    doubling.defvjp(lambda x: (x, None), lambda _, grad: (2 * grad,))
    how = static(shape, before_layer=lambda hidden, block: (doubling(hidden), jax.tree.map(doubling, block)))
    drawn_ones = drawn(shape)
    ours, theirs = (jax.jit(functools.partial(each, how))(*drawn_ones) for each in (by_hand, by_autodiff))
    assert_close(ours, theirs, tolerance=1e-5)


def test_what_is_kept_is_what_the_docstring_says() -> None:
    """Per layer and token: the input, the stream between, qkv and the inner products; with remat the input alone."""
    shape = Shape(d_model=8, n_layers=2, n_heads=2, d_ff=24)
    stacked, hidden, words, _ = drawn(shape)
    for remat, wanted in ((False, (1 + 1 + 3 + 3) * 8), (True, 8)):
        how = static(shape, remat=remat)
        kept = jax.eval_shape(lambda how=how: blocks._run_forward(how, hidden, stacked, words, jnp.float32(RATE))[1][0])
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(kept)) == wanted * B * N * shape.n_layers
