"""The model against a NumPy reimplementation, and the properties that training and populations lean on."""

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

MODEL = ModelConfig(context_length=12, patch_length=4, stride=4)
SHAPE = Shape(d_model=8, n_layers=2, n_heads=2, d_ff=16)
N_FEATURES = 3


def windows(model: ModelConfig = MODEL, *, n: int = 4, n_features: int = N_FEATURES, seed: int = 0) -> jax.Array:
    """Noise whose features differ in level and scale."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, model.context_length, n_features))
    return jnp.asarray(x * rng.uniform(0.5, 2, n_features) + rng.standard_normal(n_features), jnp.float32)


def drawn(model: ModelConfig = MODEL, shape: Shape = SHAPE, *, n_features: int = N_FEATURES, seed: int = 0) -> Any:
    """Parameters with no zeros or ones left of an init, so that every leaf matters, and logits of order one."""
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        sd = 1 / math.sqrt(leaf.shape[-2]) if leaf.ndim >= 2 else 0.5
        return jnp.asarray(sd * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree.map(draw, encoder.abstract_params(model, shape, n_features))


@functools.lru_cache
def compiled(model: ModelConfig = MODEL, shape: Shape = SHAPE) -> Any:
    """Evaluation, compiled once per geometry."""
    return jax.jit(lambda params, x: encoder.apply(model, shape, params, x))


@functools.lru_cache
def compiled_training(model: ModelConfig = MODEL, shape: Shape = SHAPE) -> Any:
    """The forward pass with dropout."""
    return jax.jit(lambda params, x, key, rate: encoder.apply(model, shape, params, x, key=key, dropout=rate))


# --- against NumPy ----------------------------------------------------------------------------------------------------

GEOMETRIES = {
    "plain": (MODEL, SHAPE),
    "one head": (MODEL, Shape(d_model=6, n_layers=1, n_heads=1, d_ff=9)),
    "as many heads as d_model": (MODEL, Shape(d_model=4, n_layers=2, n_heads=4, d_ff=4)),
    "overlap and remainder": (
        ModelConfig(context_length=13, patch_length=5, stride=3),
        Shape(d_model=6, n_layers=3, n_heads=3, d_ff=5),
    ),
    "revin": (ModelConfig(context_length=10, patch_length=4, stride=2, revin=True), SHAPE),
    "revin and remainder": (ModelConfig(context_length=11, patch_length=4, stride=2, revin=True), SHAPE),
    "gaps between patches": (ModelConfig(context_length=12, patch_length=2, stride=5), SHAPE),
    "bars as patches": (ModelConfig(context_length=5, patch_length=1, stride=1), SHAPE),
    "one patch": (ModelConfig(context_length=7, patch_length=7, stride=3), SHAPE),
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_logits_equal_a_numpy_reimplementation(geometry: Any, numpy_logits: Any) -> None:
    model, shape = geometry
    params, x = drawn(model, shape), windows(model)
    expected = numpy_logits(model, shape, params, x)
    assert expected.std() > 0.01, "logits that hardly differ prove nothing"
    # float32 against float64: some hundred roundings of 6e-8, on numbers of order one.
    np.testing.assert_allclose(compiled(model, shape)(params, x), expected, rtol=1e-5, atol=1e-5)


def test_every_leaf_reaches_the_logit() -> None:
    model = MODEL.model_copy(update={"revin": True})
    params, x = drawn(model), windows(model)
    gradients = jax.jit(jax.grad(lambda params: encoder.apply(model, SHAPE, params, x).sum()))(params)
    flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)}
    # A key's bias adds the same to all of a query's scores, which softmax does not see.
    bias_LH3K = np.asarray(flat["['blocks']['qkv']['bias']"]).reshape(SHAPE.n_layers, SHAPE.n_heads, 3, -1)
    np.testing.assert_allclose(bias_LH3K[:, :, 1], 0, atol=1e-5)
    assert np.abs(bias_LH3K[:, :, [0, 2]]).max() > 1e-3
    dead = [name for name, leaf in flat.items() if float(jnp.abs(leaf).max()) < 1e-4]
    assert not dead


# --- what the windows' bars do ----------------------------------------------------------------------------------------


def _generated() -> list[tuple[int, int, int]]:
    """(context_length, patch_length, stride): the ones in use, the traps, and some drawn at random."""
    rng = np.random.default_rng(1)
    geometries = [(60, 16, 8), (60, 10, 5), (80, 16, 8), (20, 5, 5), (13, 5, 3), (7, 7, 1), (5, 1, 1), (30, 4, 9)]
    geometries += [(20, 16, 16), (33, 4, 8), (60, 1, 16)]
    for _ in range(6):
        context_length = int(rng.integers(2, 90))
        geometries.append((context_length, int(rng.integers(1, context_length + 1)), int(rng.integers(1, 12))))
    return geometries


@pytest.mark.parametrize("geometry", _generated(), ids=lambda g: "/".join(map(str, g)))
def test_newest_bar_is_seen_and_a_remainder_is_cut_from_the_oldest_side(geometry: tuple[int, int, int]) -> None:
    model = ModelConfig(context_length=geometry[0], patch_length=geometry[1], stride=geometry[2])
    shape = Shape(d_model=4, n_layers=1, n_heads=1, d_ff=2)
    params, x = drawn(model, shape, n_features=2), windows(model, n=1, n_features=2)
    grad_TF = jax.jit(jax.grad(lambda x: encoder.apply(model, shape, params, x).sum()))(x)[0]
    covered = model.patch_length + (encoder.n_patches(model) - 1) * model.stride
    assert 0 <= model.context_length - covered < model.stride, "one more patch would have fitted"
    assert np.abs(grad_TF[-1]).min() > 0
    np.testing.assert_array_equal(grad_TF[: model.context_length - covered], 0)


def test_patches_hold_each_bars_features_in_order_of_time() -> None:
    model = ModelConfig(context_length=7, patch_length=3, stride=2)
    x_BTF = jnp.arange(7.0)[None, :, None] + jnp.array([0.0, 0.5])[None, None, :]
    expected_NPF = [[0, 0.5, 1, 1.5, 2, 2.5], [2, 2.5, 3, 3.5, 4, 4.5], [4, 4.5, 5, 5.5, 6, 6.5]]
    np.testing.assert_array_equal(encoder.patches(model, x_BTF)[0], expected_NPF)


def test_revin_is_blind_to_level_and_scale_of_a_window_and_plain_is_not() -> None:
    x = windows()
    moved = 3 * x + jnp.array([5.0, -2.0, 1.0])[None, None, :]
    model = MODEL.model_copy(update={"revin": True})
    blind, seeing = compiled(model), compiled()
    # eps = 1e-5 in the variance is the one thing that scale changes.
    np.testing.assert_allclose(blind(drawn(model), moved), blind(drawn(model), x), rtol=1e-4, atol=1e-4)
    assert np.abs(seeing(drawn(), moved) - seeing(drawn(), x)).max() > 0.1


def test_samples_of_a_batch_do_not_meet() -> None:
    params, x = drawn(), windows()
    np.testing.assert_allclose(compiled()(params, x)[2:3], compiled()(params, x[2:3]), rtol=1e-6, atol=1e-6)


# --- layers: stacked and scanned --------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "dropout"])
def test_a_scan_equals_a_python_loop(training: bool) -> None:
    key = jax.random.key(3) if training else None

    def looped(params: Any, x: jax.Array, key: jax.Array | None) -> jax.Array:
        declared = encoder._declare(MODEL, SHAPE, N_FEATURES)
        edges = encoder.nnx.merge(declared.edge_graph, {k: v for k, v in params.items() if k != "blocks"})
        embed_key, layer_key = (None, None) if key is None else jax.random.split(key)
        hidden = blocks.dropout(edges.embed(x), 0.3, embed_key)
        static = blocks.Static(SHAPE.n_heads, "float32", False, lambda hidden, block: (hidden, block))
        for layer in range(SHAPE.n_layers):
            block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
            keys = None if key is None else jax.random.split(jax.random.fold_in(layer_key, layer), 4)
            words = None if keys is None else jax.random.key_data(keys)
            hidden, _ = blocks._forward(static, hidden, block, words, jnp.float32(0.3))
        return edges.read_out(hidden)

    params, x = drawn(), windows()
    scanned = compiled_training()(params, x, key, 0.3)
    np.testing.assert_allclose(scanned, jax.jit(looped)(params, x, key), rtol=1e-5, atol=1e-6)


def test_program_does_not_grow_with_depth() -> None:
    def size(n_layers: int) -> int:
        shape = SHAPE.model_copy(update={"n_layers": n_layers})
        params = encoder.abstract_params(MODEL, shape, N_FEATURES)
        loss = jax.grad(lambda params, x, key: encoder.apply(MODEL, shape, params, x, key=key).sum())
        return len(jax.jit(loss).lower(params, windows(), jax.random.key(0)).as_text().splitlines())

    assert size(192) == size(3)


@pytest.mark.slow
def test_gradients_are_finite_at_depth_192() -> None:
    shape = SHAPE.model_copy(update={"n_layers": 192})
    params = jax.jit(lambda key: encoder.init(MODEL, shape, N_FEATURES, key))(jax.random.key(0))
    loss = lambda params, x, key: jnp.square(encoder.apply(MODEL, shape, params, x, key=key) - 1).mean()  # noqa: E731
    gradients = jax.jit(jax.grad(loss))(params, windows(), jax.random.key(1))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradients))
    first_and_last = [float(jnp.abs(gradients["blocks"]["qkv"]["kernel"][layer]).max()) for layer in (0, -1)]
    assert min(first_and_last) > 1e-8, "neither end of the stack has lost its gradient"


# --- beginnings -------------------------------------------------------------------------------------------------------


def test_init_has_the_declared_distributions() -> None:
    model, shape = ModelConfig(context_length=40), Shape(d_model=48, n_layers=8, n_heads=4, d_ff=96)
    params = jax.jit(lambda key: encoder.init(model, shape, 5, key))(jax.random.key(0))
    residual = 1 / math.sqrt(2 * shape.n_layers)
    sd = {
        "embedding": 1 / math.sqrt(5 * model.patch_length),
        "qkv": 1 / math.sqrt(48),
        "attention_out": residual / math.sqrt(48),
        "feed_forward_in": 1 / math.sqrt(48),
        "feed_forward_out": residual / math.sqrt(96),
        "head": 0.1 / math.sqrt(48 * encoder.n_patches(model)),
    }
    for name, expected_sd in sd.items():
        kernel = np.asarray((params["blocks"] | params)[name]["kernel"])
        assert abs(kernel.std() / expected_sd - 1) < 5 / math.sqrt(2 * kernel.size), name
        np.testing.assert_array_equal((params["blocks"] | params)[name]["bias"], 0, err_msg=name)
    positions = np.asarray(params["positions"])
    assert positions.shape == (encoder.n_patches(model), 48)
    assert abs(positions.std() / 0.02 - 1) < 5 / math.sqrt(2 * positions.size)
    for norm in (params["norm"], params["blocks"]["attention_norm"], params["blocks"]["feed_forward_norm"]):
        np.testing.assert_array_equal(norm["scale"], 1)
        np.testing.assert_array_equal(norm["bias"], 0)
    kernels_LDE = np.asarray(params["blocks"]["qkv"]["kernel"])
    assert abs(np.corrcoef(kernels_LDE[0].ravel(), kernels_LDE[1].ravel())[0, 1]) < 0.05, "layers start apart"


def test_first_logits_are_small_but_differ() -> None:
    x = windows(n=64)
    logits = compiled()(encoder.init(MODEL, SHAPE, N_FEATURES, jax.random.key(0)), x)
    assert 0.02 < float(logits.std()) < 0.3  # .1 by design


@pytest.mark.parametrize("revin", [False, True], ids=["plain", "revin"])
def test_abstract_params_are_those_of_init(revin: bool) -> None:
    model = MODEL.model_copy(update={"revin": revin})
    real = jax.eval_shape(lambda key: encoder.init(model, SHAPE, N_FEATURES, key), jax.random.key(0))
    abstract = encoder.abstract_params(model, SHAPE, N_FEATURES)
    assert jax.tree.structure(real) == jax.tree.structure(abstract)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), real) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), abstract
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract)} == {jnp.dtype("float32")}


def test_init_depends_on_nothing_but_the_key() -> None:
    start = jax.jit(lambda key: encoder.init(MODEL, SHAPE, N_FEATURES, key))
    first, again, other = (start(jax.random.key(seed)) for seed in (0, 0, 1))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), first, again)))
    assert not (first["positions"] == other["positions"]).any()


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_layers", [2, pytest.param(192, marks=pytest.mark.slow)])
def test_bfloat16_stays_close_to_float32_at_any_depth(n_layers: int) -> None:
    """Operands are rounded by 2⁻⁹ at most, .1 % rms; some such errors add up in the residual stream's float32 sum.

    A bfloat16 stream would fail at 192 layers: it is rounded 384 times, √384 × .1 % = 2 % and more.
    """
    shape, x = Shape(d_model=32, n_layers=n_layers, n_heads=2, d_ff=64), windows(n=64)
    params = jax.jit(lambda key: encoder.init(MODEL, shape, N_FEATURES, key))(jax.random.key(0))
    exact = compiled(MODEL, shape)(params, x)
    rough = compiled(MODEL.model_copy(update={"compute_dtype": "bfloat16"}), shape)(params, x)
    assert rough.dtype == jnp.float32
    error = float(jnp.sqrt(jnp.square(rough - exact).mean()) / exact.std())
    assert 1e-4 < error < 0.01, "no bfloat16 at all, or too much of it"


def test_bfloat16_gradients_are_float32_and_close() -> None:
    def loss_and_grad(model: ModelConfig) -> jax.Array:
        loss = jax.grad(lambda params, x: jnp.square(encoder.apply(model, SHAPE, params, x) - 1).mean())
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(jax.jit(loss)(drawn(), windows()))])

    exact, rough = loss_and_grad(MODEL), loss_and_grad(MODEL.model_copy(update={"compute_dtype": "bfloat16"}))
    assert rough.dtype == jnp.float32
    assert 1e-4 < float(jnp.linalg.norm(rough - exact) / jnp.linalg.norm(exact)) < 0.05


# --- dropout, programs, populations -----------------------------------------------------------------------------------


def test_without_key_or_rate_there_is_no_dropout() -> None:
    params, x = drawn(), windows()
    evaluated = compiled()(params, x)
    np.testing.assert_array_equal(evaluated, compiled()(params, x))
    at_rate_0 = compiled_training()(params, x, jax.random.key(0), 0.0)
    np.testing.assert_allclose(at_rate_0, evaluated, rtol=1e-5, atol=1e-6)


def test_dropout_follows_key_and_rate() -> None:
    params, x, run = drawn(), windows(), compiled_training()
    first, again = run(params, x, jax.random.key(0), 0.3), run(params, x, jax.random.key(0), 0.3)
    np.testing.assert_array_equal(first, again)
    assert np.abs(run(params, x, jax.random.key(1), 0.3) - first).min() > 0
    assert np.abs(run(params, x, jax.random.key(0), 0.4) - first).max() > 0


def test_default_rate_is_the_models() -> None:
    model, key = MODEL.model_copy(update={"dropout": 0.25}), jax.random.key(0)
    by_default = jax.jit(lambda params, x: encoder.apply(model, SHAPE, params, x, key=key))(drawn(), windows())
    explicit = compiled_training()(drawn(), windows(), key, 0.25)
    np.testing.assert_allclose(by_default, explicit, rtol=1e-5, atol=1e-6)


def test_trials_that_differ_in_values_share_one_program() -> None:
    run = jax.jit(encoder.apply, static_argnums=(0, 1))
    for seed in range(3):
        rate = jnp.float32(0.1 * seed)
        run(MODEL, SHAPE, drawn(seed=seed), windows(seed=seed), key=jax.random.key(seed), dropout=rate)
    assert run._cache_size() == 1


def test_members_of_a_population_equal_single_runs() -> None:
    members, x = [drawn(seed=seed) for seed in range(3)], windows()
    keys, rates = jax.random.split(jax.random.key(5), 3), jnp.array([0.0, 0.2, 0.5], jnp.float32)
    loss_and_grad = jax.value_and_grad(
        lambda params, key, rate: encoder.apply(MODEL, SHAPE, params, x, key=key, dropout=rate).sum()
    )
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    together, gradients = jax.jit(jax.vmap(loss_and_grad))(stacked, keys, rates)
    single = jax.jit(loss_and_grad)
    for member, params in enumerate(members):
        logit, gradient = single(params, keys[member], rates[member])
        # The same sums in another order.
        np.testing.assert_allclose(together[member], logit, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(ours[member], theirs, rtol=1e-4, atol=1e-5)
