"""Dropout masks: the hash against plain Python, the rate, and independence wherever a mask is drawn again."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fintx.model.blocks import dropout, keep_mask

N = 100_000
HALF = jnp.float32(0.5)


def mask(key: jax.Array, *, rate: jax.Array = HALF, shape: tuple[int, ...] = (N,)) -> np.ndarray:
    return np.asarray(jax.jit(keep_mask, static_argnums=1)(key, shape, rate))


def test_masks_equal_the_hash_in_plain_python() -> None:
    key, rate, n = jax.random.key(42), 0.3, 64
    low, high = (int(word) for word in jax.random.key_data(key))

    def mixed(i: int) -> int:
        x = (((i * 0x9E3779B9 + low) % 2**32) ^ high) % 2**32
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    expected = [mixed(i) >= int(np.float32(rate) * np.float32(2**32)) for i in range(n)]
    np.testing.assert_array_equal(mask(key, rate=jnp.float32(rate), shape=(4, 16)).ravel(), expected)


def test_jax_still_draws_the_bits_that_results_rest_on() -> None:
    """JAX does not promise equal bits across versions. Expected: threefry-2x32 of Salmon et al. 2011, in plain Python.

    Element i is the xor of the two words of block (0, i), under key (0, 42).
    """

    def threefry(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
        schedule = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
        x, y = ((word + schedule[i]) % 2**32 for i, word in enumerate(counter))
        for group in range(5):
            for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
                x = (x + y) % 2**32
                y = ((y << rotation | y >> (32 - rotation)) % 2**32) ^ x
            x = (x + schedule[(group + 1) % 3]) % 2**32
            y = (y + schedule[(group + 2) % 3] + group + 1) % 2**32
        return x, y

    blocks = [threefry((0, 42), (0, i)) for i in range(4)]
    np.testing.assert_array_equal(jax.random.bits(jax.random.key(42), (4,), jnp.uint32), [x ^ y for x, y in blocks])


@pytest.mark.parametrize("rate", [0.0, 0.003, 0.1, 0.5, 0.9])
def test_rate_is_kept(rate: float) -> None:
    dropped = np.mean([1 - mask(jax.random.key(seed), rate=jnp.float32(rate)).mean() for seed in range(4)])
    assert abs(dropped - rate) <= 4.5 * math.sqrt(rate * (1 - rate) / (4 * N))  # binomial


def test_expectation_is_kept_and_the_rest_is_zero() -> None:
    x = jnp.full((N,), 3.0)
    out = np.asarray(dropout(x, 0.2, jax.random.key(0)))
    assert set(np.unique(out)) == {np.float32(0), np.float32(3) * (1 / (1 - np.float32(0.2)))}
    assert abs(out.mean() / 3 - 1) < 5 * math.sqrt(0.2 / 0.8 / N)


def test_no_key_and_rate_0_are_identities() -> None:
    x = jnp.arange(12.0).reshape(3, 4)
    assert dropout(x, 0.5, None) is x
    np.testing.assert_array_equal(dropout(x, 0.0, jax.random.key(0)), x)


def test_masks_of_layers_sites_steps_and_members_are_independent() -> None:
    """As keys are derived in `apply` and in the train step: by `fold_in` of small numbers and by `split`."""
    root = jax.random.key(0)
    keys = [jax.random.fold_in(root, i) for i in range(6)]  # steps, layers
    keys += list(jax.random.split(keys[0], 4))  # sites
    keys += [jax.random.key(seed) for seed in range(1, 5)]  # members
    signs = [2.0 * mask(key) - 1 for key in keys]
    for (i, a), (j, b) in itertools.combinations(enumerate(signs), 2):
        assert abs(np.mean(a * b)) < 5 / math.sqrt(N), (i, j)


@pytest.mark.parametrize("words", [(0, 1), (1, 0), (0, 0x9E3779B9)], ids=["low bit", "high word", "one index further"])
def test_even_keys_of_neighbouring_words_give_masks_that_differ_in_place(words: tuple[int, int]) -> None:
    """Threefry gives no such keys; the hash alone shall do no harm if it did."""
    zero, other = (jax.random.wrap_key_data(jnp.array(data, jnp.uint32)) for data in ((0, 0), words))
    a, b = (2.0 * mask(key) - 1 for key in (zero, other))
    assert abs(np.mean(a * b)) < 5 / math.sqrt(N)


def test_neighbours_within_a_mask_are_independent() -> None:
    signs = 2.0 * mask(jax.random.key(7), rate=jnp.float32(0.1)) - 1
    centred = signs - signs.mean()
    for lag in (1, 2, 3, 4, 8, 11, 16, 32, 64, 121, 256, 768, 1024, 4096):
        correlation = np.mean(centred[lag:] * centred[:-lag]) / centred.var()
        assert abs(correlation) < 5 / math.sqrt(N), lag


def test_counts_per_row_vary_as_chance_has_it() -> None:
    """Chi-square over rows of 250: a mask more even, or less, than a binomial's would show."""
    rows = mask(jax.random.key(11), rate=jnp.float32(0.3)).reshape(400, 250).sum(axis=1)
    chi2 = np.sum((rows - 175) ** 2 / (250 * 0.3 * 0.7))
    assert abs(chi2 - 400) < 5 * math.sqrt(2 * 400)


def test_vmapped_masks_are_those_of_single_keys() -> None:
    keys, rates = jax.random.split(jax.random.key(0), 3), jnp.array([0.1, 0.5, 0.9], jnp.float32)
    x = jnp.ones((3, 40))
    together = jax.vmap(dropout)(x, rates, keys)
    for member in range(3):
        np.testing.assert_array_equal(together[member], dropout(x[member], rates[member], keys[member]))
