"""Which options a trial's programs are compiled with, and who may say otherwise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from fintx.config.schema import ModelConfig, Shape
from fintx.train import compilation

NARROW = Shape(d_model=256, n_layers=2, n_heads=2, d_ff=512)
WIDE = Shape(d_model=512, n_layers=2, n_heads=2, d_ff=512)
ALWAYS = {"xla_backend_optimization_level": "2", "xla_cpu_multi_thread_eigen": False}


@pytest.fixture
def unhurried():
    """As outside the tests, which ask JAX to compile in a hurry."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def test_each_option_reaches_the_compiler(unhurried, monkeypatch):
    lowered = jax.jit(lambda x: jnp.sin(x) @ x.T).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32))
    x = jnp.arange(64, dtype=jnp.float32).reshape(8, 8)
    for shape in (NARROW, WIDE):
        assert jnp.allclose(
            compilation.compile_lowered(lowered, ModelConfig(), shape)(x), jnp.sin(x) @ x.T, rtol=1e-5, atol=1e-4
        )
    for name in ("_LEVEL", "_EIGEN", "_LIBRARY"):
        with monkeypatch.context() as patched:
            patched.setattr(compilation, name, "xla_no_such_option")
            with pytest.raises(Exception, match="xla_no_such_option"):
                compilation.compile_lowered(lowered, ModelConfig(), NARROW)


def test_a_narrow_model_leaves_its_products_to_eigen(unhurried):
    """On this kind of processor: nothing else shows that the option does what it is for."""
    lowered = jax.jit(lambda x, y: x @ y).lower(*[jax.ShapeDtypeStruct((256, 256), jnp.float32)] * 2)
    narrow, wide = (compilation.compile_lowered(lowered, ModelConfig(), shape).as_text() for shape in (NARROW, WIDE))
    assert "ynn_fusion" not in narrow
    assert wide != narrow, "YNNPACK's default has changed: is the option still of use?"
    assert (
        compilation.compiler_options(ModelConfig(), WIDE) == ALWAYS
        and compilation.compiler_options(ModelConfig(), NARROW).items() > ALWAYS.items()
    )


def test_who_is_in_a_hurry_stays_so():
    assert compilation.compiler_options(ModelConfig(), NARROW) == {}


def test_a_gpu_has_its_own_default(unhurried, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compilation.compiler_options(ModelConfig(), NARROW) == {}
