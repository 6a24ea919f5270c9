"""Which options a trial's programs are compiled with, and who may say otherwise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from fintx.train import compiling

LEVEL = "xla_backend_optimization_level"


@pytest.fixture
def unhurried():
    """As outside the tests, which ask JAX to compile in a hurry."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def test_the_level_reaches_the_compiler(unhurried, monkeypatch):
    lowered = jax.jit(lambda x: jnp.sin(x) @ x.T).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32))
    assert compiling.options() == {LEVEL: "2"}
    x = jnp.arange(64, dtype=jnp.float32).reshape(8, 8)
    assert jnp.allclose(compiling.compiled(lowered)(x), jnp.sin(x) @ x.T, rtol=1e-5, atol=1e-4)
    monkeypatch.setattr(compiling, "_LEVEL", "xla_no_such_option")
    with pytest.raises(Exception, match="xla_no_such_option"):
        compiling.compiled(lowered)


def test_who_is_in_a_hurry_stays_so():
    assert compiling.options() == {}


def test_a_gpu_has_its_own_default(unhurried, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compiling.options() == {}
