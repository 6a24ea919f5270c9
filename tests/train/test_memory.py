"""What fits, in what micro-batch, and how much the machine has: against limits made to force each answer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fintx.config.schema import TrialConfig
from fintx.data.datasets import Dataset
from fintx.train import memory, train_step, trainer
from fintx.train.memory import is_out_of_memory
from fintx.train.resume import CheckpointPolicy
from fintx.train.train_state import BatchLayout, abstract_state, static_config, static_model

Trials = Callable[..., TrialConfig]
Datasets = Callable[..., Dataset]
Compilations = Callable[[], AbstractContextManager[list[str]]]
# Larger than the evaluation's batch of 256, which is what it is: so it is training that must give way.
LARGE_BATCH = {"train.batch_size": 1024, "model.dropout": 0.3}


def needs(config: TrialConfig, micro_batch: int, *, remat: bool = False) -> int:
    """Bytes of the training program."""
    static = static_config(config, micro_batch=micro_batch, remat=remat)
    return train_step.compile_training(static, n_features=3, n_rows=256, n_samples=256).n_bytes


def test_lower_bound_is_state_gradients_and_a_copy(make_trial: Trials) -> None:
    config = make_trial()
    state = abstract_state(static_config(config), n_features=3)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert memory.lower_bound(config) == 20 * count
    assert memory.lower_bound(config, host_is_device=False) == 16 * count
    # Three counters of four bytes are all that a state holds beside parameters and moments.
    assert whole == 12 * count + 3 * 4


def test_what_compiled_programs_take_lies_between_bound_and_guess(make_trial: Trials, make_dataset: Datasets) -> None:
    config = make_trial()
    result = trainer.fit(config, make_dataset(), metric="log_loss")
    assert result.memory_bytes is not None
    assert memory.lower_bound(config) < result.memory_bytes < memory.upper_guess(config)
    assert result.memory_bytes > needs(config, 16)
    assert result.batch_layout.micro_batch == 16


def test_evaluation_is_counted(make_trial: Trials, make_dataset: Datasets, compilations: Compilations) -> None:
    """Its batch is 256 whatever the trial's; with 16 to train on, it is what the limit is for."""
    config = make_trial()
    forward = train_step.compile_logits(
        static_model(config.model), config.shape, n_features=3, n_rows=256, n_samples=256
    )
    assert forward.n_bytes > needs(config, 16)
    with compilations() as compiled:
        result = trainer.fit(config, make_dataset(), metric="log_loss", memory_limit=forward.n_bytes)
    assert (result.outcome, result.epochs) == ("out_of_memory", 0)
    assert compiled == []  # no micro-batch would help


def test_a_limit_below_the_state_is_out_of_memory_without_compiling(
    make_trial: Trials, make_dataset: Datasets, compilations: Compilations
) -> None:
    config = make_trial({"shape.d_model": 512, "shape.d_ff": 2048})
    with compilations() as compiled:
        result = trainer.fit(config, make_dataset(), metric="log_loss", memory_limit=10 * 2**20)
    assert compiled == []
    assert (result.outcome, result.epochs, result.params, result.timing.compile_s) == ("out_of_memory", 0, None, 0.0)
    assert "\n" not in result.detail
    assert "121 MiB" in result.detail and "10 MiB are available" in result.detail
    assert result.memory_bytes == memory.lower_bound(config)


def test_an_absurd_shape_on_this_very_machine(
    make_trial: Trials, make_dataset: Datasets, compilations: Compilations
) -> None:
    """The compiler dies of it."""
    config = make_trial({"shape.d_model": 2**18, "shape.d_ff": 2**20})
    with compilations() as compiled:
        result = trainer.fit(config, make_dataset(), metric="log_loss")
    assert compiled == []
    assert result.outcome == "out_of_memory"
    assert result.param_count > 10**12


@pytest.mark.slow
def test_relief_comes_only_where_memory_asks_for_it(make_trial: Trials, make_dataset: Datasets) -> None:
    """First layers are computed again, which changes no number but in its last digits; then the micro-batch is halved.

    The dropout rate drops nothing, in the program that drops: another micro-batch would draw other masks.
    """
    config, data = make_trial(LARGE_BATCH | {"model.dropout": 1e-9, "optim.eps": 1e-3}), make_dataset()
    free = trainer.fit(config, data, metric="log_loss")
    assert (free.batch_layout, free.memory_bytes) == (BatchLayout(1024), pytest.approx(needs(config, 1024), rel=0.05))
    steps = [needs(config, 1024), needs(config, 1024, remat=True), needs(config, 512, remat=True)]
    assert steps == sorted(steps, reverse=True)
    for (more, less), wanted in zip(pairwise(steps), (BatchLayout(1024, True), BatchLayout(512, True)), strict=True):
        limit = (more + less) // 2
        tight = trainer.fit(config, data, metric="log_loss", memory_limit=limit)
        assert (tight.outcome, tight.batch_layout, tight.epochs) == ("completed", wanted, 3)
        assert tight.memory_bytes is not None and tight.memory_bytes <= limit
        for got, free_entry in zip(tight.curve, free.curve, strict=True):
            assert got == pytest.approx(free_entry, rel=1e-5)


def test_if_no_micro_batch_fits_it_is_out_of_memory(
    make_trial: Trials, make_dataset: Datasets, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def greedy(static: Any, **_: Any) -> train_step.TrainPrograms:
        tried.append(static.micro_batch)
        return train_step.TrainPrograms(start=print, segment=print, n_bytes=2**30 + static.micro_batch)

    monkeypatch.setattr(train_step, "compile_training", greedy)
    result = trainer.fit(make_trial({"train.batch_size": 20}), make_dataset(), metric="log_loss", memory_limit=2**30)
    assert tried == [20, 20, 10, 5, 2, 1]
    assert (result.outcome, result.epochs, result.params) == ("out_of_memory", 0, None)
    assert "needs at least 1 GiB, and 1 GiB are available" in result.detail


def test_a_compiler_out_of_memory_counts_as_too_big(
    make_trial: Trials, make_dataset: Datasets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's tries kernels out while it compiles."""
    compiling = train_step.compile_training

    def picky(static: Any, **sizes: Any) -> train_step.TrainPrograms:
        if static.micro_batch > 8:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes.")
        return compiling(static, **sizes)

    monkeypatch.setattr(train_step, "compile_training", picky)
    assert trainer.fit(make_trial(), make_dataset(), metric="log_loss").batch_layout.micro_batch == 8


@pytest.mark.parametrize("then", ["more", "less"])
def test_a_trial_goes_on_in_the_micro_batch_that_it_began_with(
    make_trial: Trials, make_dataset: Datasets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """Also where more memory is free by now; where less is, in a smaller one, and it says so."""
    monkeypatch.setattr(trainer, "dispatch_size", lambda left, step_s: 1)
    config, data = make_trial(LARGE_BATCH), make_dataset()
    between = (needs(config, 1024, remat=True) + needs(config, 512, remat=True)) // 2
    first, second = (between, None) if then == "more" else (None, between)
    saves = CheckpointPolicy(tmp_path, 1e9, lambda: None)
    taken = [0]
    stopped = trainer.fit(
        config, data, metric="log_loss", saves=saves, memory_limit=first,
        on_progress=taken.append, should_stop=lambda: taken[-1] >= 2,
    )  # fmt: skip
    assert (stopped.outcome, stopped.batch_layout.micro_batch) == ("interrupted", 512 if then == "more" else 1024)
    result = trainer.fit(config, data, metric="log_loss", saves=saves, memory_limit=second)
    assert (result.outcome, result.resumed_step, result.batch_layout.micro_batch) == ("completed", 2, 512)
    if then == "more":
        reference = trainer.fit(config, data, metric="log_loss", memory_limit=between)
        assert (result.warnings, result.curve) == ((), reference.curve)
        jax.tree.map(np.testing.assert_array_equal, result.params, reference.params)
    else:
        (line,) = result.warnings
        assert "began in micro-batch 1024" in line and "goes on in micro-batch 512" in line and "masks" in line


# --- how much there is ------------------------------------------------------------------------------------------------

MIB = 2**20
MEMINFO = "MemTotal: 9999 kB\nMemFree: 5 kB\nMemAvailable:   102400 kB\n"
V2 = "0::/batch/job\n"
V1 = "9:name=systemd:/x\n4:cpu,memory:/job\n0::/\n"


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v2(group: str, limit: str, used: int, cached: int = 0) -> dict[str, str]:
    where = f"sys/fs/cgroup/{group}"
    stat = f"anon 7\ninactive_file {cached * MIB}\nactive_file 9\n"
    return {f"{where}memory.max": limit, f"{where}memory.current": f"{used * MIB}\n", f"{where}memory.stat": stat}


def v1(group: str, limit: str, used: int, cached: int = 0) -> dict[str, str]:
    where = f"sys/fs/cgroup/memory/{group}"
    stat = f"inactive_file 5\ntotal_inactive_file {cached * MIB}\n"
    files = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": f"{used * MIB}\n", "memory.stat": stat}
    return {f"{where}{name}": text for name, text in files.items()}


BASE = {"proc/meminfo": MEMINFO}
UNDER_V2 = BASE | {"proc/self/cgroup": V2}
UNDER_V1 = BASE | {"proc/self/cgroup": V1}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (BASE, 100),
        (UNDER_V2 | v2("batch/job/", f"{80 * MIB}\n", 30), 50),
        (UNDER_V2 | v2("batch/job/", f"{80 * MIB}\n", 30, cached=10), 60),
        (UNDER_V2 | v2("batch/job/", "max\n", 30), 100),
        (UNDER_V2 | v2("batch/job/", "max\n", 30) | v2("batch/", f"{60 * MIB}\n", 40), 20),
        (UNDER_V2 | v2("", f"{70 * MIB}\n", 40), 30),
        (UNDER_V2 | v2("batch/job/", f"{800 * MIB}\n", 30), 100),
        (UNDER_V2 | v2("batch/job/", f"{20 * MIB}\n", 30), 0),
        (UNDER_V2 | v2("batch/job/", "half a loaf\n", 30), 100),
        (UNDER_V1 | v1("job/", f"{80 * MIB}\n", 30, cached=5), 55),
        (UNDER_V1 | v1("", f"{80 * MIB}\n", 30), 50),
        (UNDER_V1 | v1("job/", "9223372036854771712\n", 30), 100),
        (BASE | {"proc/self/cgroup": "0::/../../elsewhere\n"} | v2("", f"{70 * MIB}\n", 40), 30),
        (BASE | {"proc/self/cgroup": "rubbish\n::\n"}, 100),
    ],
    ids=["kernel alone", "v2", "v2 cached files are free", "v2 no limit", "v2 the group around it",
         "v2 in a container", "v2 limit above what is free", "v2 over its limit", "v2 garbled", "v1",
         "v1 in a container", "v1 no limit", "v2 outside the namespace", "garbled groups"],
)  # fmt: skip
def test_what_the_host_still_grants(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert memory.host_available(machine(tmp_path, files)) == expected * MIB


@pytest.mark.parametrize("meminfo", [None, "MemAvailable: much\n", "MemAvailable:\n"])
def test_where_the_kernel_does_not_say_it_is_all_memory(tmp_path: Path, meminfo: str | None) -> None:
    found = memory.host_available(machine(tmp_path, {} if meminfo is None else {"proc/meminfo": meminfo}))
    assert 2**28 < found < 2**50


def test_available_on_this_machine() -> None:
    assert 2**26 < memory.available() < 2**50


@pytest.mark.slow
def test_a_lower_bound_starts_no_backend(make_trial: Trials) -> None:
    """So that a coordinator can turn trials away without taking a GPU."""
    script = """
import json, sys
from fintx.config.schema import TrialConfig
from fintx.train import memory
from jax._src import xla_bridge
config = TrialConfig.model_validate_json(sys.stdin.read())
print(json.dumps([memory.lower_bound(config), xla_bridge.backends_are_initialized()]))
"""
    config = make_trial()
    done = subprocess.run(
        [sys.executable, "-c", script], input=config.model_dump_json(), capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert json.loads(done.stdout) == [memory.lower_bound(config), False]


MEASURE = """
import sys, tempfile, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import conftest
import orbax.checkpoint
from fintx.train import train_step, trainer
from fintx.train.resume import CheckpointPolicy
from fintx.train.train_state import static_config, static_model

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def watch():
    while True:
        peak[0] = max(peak[0], resident())
        time.sleep(0.002)

shape = {"shape.d_model": 512, "shape.n_layers": 4, "shape.d_ff": 2048, "shape.n_heads": 8}
config = conftest.trial(shape | {"train.batch_size": 128, "train.max_epochs": 2})
data = conftest.dataset(n_train=200)
sizes = {"n_features": 3, "n_rows": 512, "n_samples": 256}
train_step.compile_training(static_config(config), **sizes)
train_step.compile_logits(static_model(config.model), config.shape, **sizes)
before = resident()
peak = [before]
threading.Thread(target=watch, daemon=True).start()
with tempfile.TemporaryDirectory() as folder:
    saves = CheckpointPolicy(Path(folder), 0.0, lambda: None) if sys.argv[2] == "saves" else None
    print(trainer.fit(config, data, metric="log_loss", saves=saves).memory_bytes, peak[0] - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("saves", ["saves", "no saves"])
def test_the_estimate_is_what_the_process_grows_by(saves: str) -> None:
    """13M parameters, on the CPU. The rest is the allocator's, and thread stacks: a tenth, or a twentieth of a GiB."""
    command = [sys.executable, "-c", MEASURE, str(Path(__file__).parent), saves]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    estimated, measured = map(int, done.stdout.split())
    print(estimated, measured)
    assert 0.75 * estimated < measured < 1.1 * estimated + 50 * MIB


# --- running out of it while it runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes."), True),
        (
            jax.errors.JaxRuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 9 bytes."),
            True,
        ),
        (jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"), True),
        (MemoryError("Unable to allocate 9 GiB"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: write failed: No space left on device"), False),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes"), False),
        (ValueError("out of memory"), False),
    ],
    ids=["xla", "xla on cpu", "cuda", "host", "disk full", "another xla error", "another type"],
)
def test_out_of_memory_is_recognised_by_type_and_text(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
