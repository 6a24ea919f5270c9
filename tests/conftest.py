"""What every test shares: strict JAX, simulated devices, run-time shape checks, and the way to the real data."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # the studies' workers compile far more than they train
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # nor should each of a hundred processes compile what it imports
if "FINTX_TEST_RUN" not in os.environ:  # what all of a run's processes share; xdist's workers inherit it
    os.environ["FINTX_TEST_RUN"] = tempfile.mkdtemp(prefix="fintx-tests-")
    atexit.register(shutil.rmtree, os.environ["FINTX_TEST_RUN"], ignore_errors=True)
# They compile the same programs, most of them small.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(os.environ["FINTX_TEST_RUN"], "programs"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

from tests.helpers import shared

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)  # tests compile far more than they run

install_import_hook(["fintx.model", "fintx.train"], "beartype.beartype")

# A few examples of each property with the quick tests; CI draws many more (--hypothesis-profile=thorough).
settings.register_profile("quick", max_examples=20, deadline=None)
settings.register_profile("thorough", max_examples=300, deadline=None)
settings.load_profile("quick")


def pytest_addoption(parser: pytest.Parser) -> None:
    """CI must not pass by skipping the tests that need a database server, or a browser."""
    parser.addoption("--require-postgres", action="store_true", help="fail where no PostgreSQL server is installed")
    parser.addoption("--require-chromium", action="store_true", help="fail where no Chromium is installed")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real market data that lies beside a checkout; it is not redistributed with the project."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "SPY.csv").is_file():
        pytest.skip("real market data (../shared/data/SPY.csv) are not on this machine")
    return folder


TINY = """
[study]
name = "tiny"
question = "Does the smallest model that trains in a second learn anything?"
n_trials = 3
n_startup_trials = 2
keep_checkpoints = 2

[data]
features = ["log_return_1", "log_return_5", "realized_vol_21"]
start = 2008-01-01

[task]
kind = "threshold"
price = "high"
threshold = 0.01
horizon = 3

[split]
kind = "fractions"
train = 0.6
validation = 0.2

[budget]
parameters = "1.2K"

[architecture]
d_model = [8]
n_layers = { low = 1, high = 3 }
n_heads = [1, 2]
d_ff_ratio = [2]

[model]
context_length = 20
patch_length = 5
stride = 5

[train]
batch_size = 128
max_epochs = 3
patience = 2

[space]
"optim.learning_rate" = { low = 1e-3, high = 1e-2, log = true }
"""


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep file whose whole study takes seconds, on the embedded data."""
    path = tmp_path_factory.mktemp("sweeps") / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def tiny_study(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that study, run to its end once for all processes, and copied for each; its data lie beside it."""
    from fintx.config import load
    from fintx.run import scheduler
    from fintx.study.events import RunContext

    def finish(root: Path) -> None:
        context = RunContext(root / "outputs", shared.data_root(root / "data"))
        summary = scheduler.run_study(load.study(tiny_file), context)
        assert not summary.interrupted

    root = tmp_path_factory.mktemp("tiny")
    shutil.copytree(shared.once("tiny", finish), root, symlinks=True, dirs_exist_ok=True)
    return root / "outputs" / "tiny"


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """A data folder of the test's own, but for baselines: those that any test fitted are there."""
    return shared.data_root(tmp_path / "data")
