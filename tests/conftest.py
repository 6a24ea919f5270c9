"""What every test shares: strict JAX, simulated devices, run-time shape checks, and the way to the real data."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

install_import_hook(["fintx.model", "fintx.train"], "beartype.beartype")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real market data that lies beside a checkout; it is not redistributed with the project."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "SPY.csv").is_file():
        pytest.skip("real market data (../shared/data/SPY.csv) are not on this machine")
    return folder
