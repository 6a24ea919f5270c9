"""The schedule against optax's and its corner values, the decay mask, and one update against AdamW by hand."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fintx.config.schema import TrialConfig
from fintx.model import encoder
from fintx.train import optimizer
from fintx.train.optimizer import OptimValues


def values(**changes: float) -> OptimValues:
    plain = dict(
        learning_rate=np.float32(0.1), weight_decay=np.float32(0.01), warmup_steps=np.int32(10),
        total_steps=np.int32(100), final_fraction=np.float32(0.2), clip_norm=np.float32(1e9),
        b1=np.float32(0.9), b2=np.float32(0.999), eps=np.float32(1e-8),
    )  # fmt: skip
    return OptimValues(**(plain | changes))


def rates(schedule: str, v: OptimValues, n: int = 100) -> np.ndarray:
    return np.asarray(jax.vmap(lambda step: optimizer.learning_rate(schedule, v, step))(jnp.arange(n)))


def test_cosine_is_optaxs_counted_from_one() -> None:
    # optax counts updates from 0 and would spend the first on a rate of 0.
    theirs = optax.warmup_cosine_decay_schedule(0.0, 0.1, warmup_steps=10, decay_steps=100, end_value=0.02)
    np.testing.assert_allclose(rates("cosine", values()), [theirs(t) for t in range(1, 101)], rtol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "inverse_sqrt"])
@pytest.mark.parametrize("warmup", [0, 1, 10, 99, 100])
def test_rates_climb_to_the_peak_and_never_rise_after_it(schedule: str, warmup: int) -> None:
    rate_of_step = rates(schedule, values(warmup_steps=np.int32(warmup)))
    np.testing.assert_allclose(rate_of_step[:warmup], 0.1 * np.arange(1, warmup + 1) / max(warmup, 1), rtol=1e-6)
    assert np.all(np.diff(rate_of_step[max(warmup - 1, 0) :]) <= 0)
    assert np.all(np.isfinite(rate_of_step)) and rate_of_step.max() <= 0.1 * (1 + 1e-6)


@pytest.mark.parametrize(
    ("schedule", "last"),
    [("cosine", 0.02), ("linear", 0.02), ("constant", 0.1), ("inverse_sqrt", 0.1 * (10 / 100) ** 0.5)],
)
def test_last_step_has_the_promised_rate(schedule: str, last: float) -> None:
    assert rates(schedule, values())[-1] == pytest.approx(last, rel=1e-5)


def test_linear_is_halfway_at_half_time() -> None:
    assert rates("linear", values())[54] == pytest.approx(0.1 * 0.6, rel=1e-5)


@pytest.mark.parametrize("revin", [False, True], ids=["plain", "revin"])
def test_only_matrices_decay(make_trial: Callable[..., TrialConfig], revin: bool) -> None:
    config = make_trial({"model.revin": revin})
    abstract = encoder.abstract_params(config.model, config.shape, 3)
    leaves = jax.tree_util.tree_flatten_with_path(abstract)[0]
    masks = jax.tree.leaves(encoder.weight_decay_mask(abstract))
    decayed = 0
    for (path, leaf), decays in zip(leaves, masks, strict=True):
        name = jax.tree_util.keystr(path).lower()
        logical = leaf.shape[1:] if "blocks" in name else leaf.shape
        vector = len(logical) < 2 or any(word in name for word in ("bias", "scale", "norm", "position", "revin"))
        assert decays == (not vector), f"{name} {leaf.shape}"
        decayed += leaf.size if decays else 0
    patches, (d, layers, ff) = 3, (config.shape.d_model, config.shape.n_layers, config.shape.d_ff)
    matrices = 4 * 3 * d + layers * (4 * d * d + 2 * d * ff) + patches * d
    assert decayed == matrices


def test_update_is_adamw_by_hand(make_trial: Callable[..., TrialConfig]) -> None:
    """Two steps in float64 NumPy: clip, moments with bias correction, decoupled decay of the matrix alone."""
    v = values(clip_norm=np.float32(0.5), weight_decay=np.float32(0.3))
    params = {"head": {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([0.5])}}
    gradients = [
        {"kernel": np.array([[3.0, 4.0]]), "bias": np.array([12.0])},
        {"kernel": np.array([[0.1, 0.0]]), "bias": np.array([-0.2])},
    ]
    with jax.numpy_dtype_promotion("standard"):
        transformation = optimizer.adamw(v, schedule="cosine", mask=encoder.weight_decay_mask)
        state = transformation.init(params)
        for gradient in gradients:
            tree = {"head": jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradient)}
            updates, state = transformation.update(tree, state, params)
            params = optax.apply_updates(params, updates)

    theta = {"kernel": np.array([[1.0, -2.0]]), "bias": np.array([0.5])}
    first, second = ({k: np.zeros_like(p) for k, p in theta.items()} for _ in range(2))
    for t, gradient in enumerate(gradients, start=1):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        for k in theta:
            g = gradient[k] * min(1, 0.5 / norm)
            first[k] = 0.9 * first[k] + 0.1 * g
            second[k] = 0.999 * second[k] + 0.001 * g**2
            step = first[k] / (1 - 0.9**t) / (np.sqrt(second[k] / (1 - 0.999**t)) + 1e-8)
            decay = 0.3 * theta[k] if k == "kernel" else 0
            theta[k] = theta[k] - 0.1 * t / 10 * (step + decay)
    for k in theta:
        # float32 bias correction of b2: 1 − .999 has 5 digits.
        np.testing.assert_allclose(params["head"][k], theta[k], rtol=2e-4)


def test_norm_covers_leaves_of_every_rank_and_members_apart() -> None:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"scalar": (), "vector": (7,), "matrix": (5, 3), "stacked": (4, 3, 6)}
    tree = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    by_hand = np.sqrt(sum((np.asarray(leaf, np.float64) ** 2).sum() for leaf in tree.values()))
    np.testing.assert_allclose(optimizer.global_norm(tree), by_hand, rtol=1e-6)
    population = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, jnp.zeros_like(leaf)]), tree)
    np.testing.assert_allclose(jax.vmap(optimizer.global_norm)(population), by_hand * np.array([1, 2, 0]), rtol=1e-6)


@pytest.mark.parametrize("limit", [1e-3, 1.0, 1e3, np.inf])
def test_gradients_are_clipped_as_by_optax(limit: float) -> None:
    rng = np.random.default_rng(1)
    gradients = {"a": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32), "b": jnp.zeros((3,), jnp.float32)}
    clip = optax.clip_by_global_norm(jnp.float32(limit))
    for grads in (gradients, jax.tree.map(jnp.zeros_like, gradients)):
        expected, _ = clip.update(grads, clip.init(grads))
        clipped = optimizer.clip_by_global_norm(grads, jnp.float32(limit))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), clipped, expected)
