"""What does XLA's GPU compiler make of a train step, where there is no GPU? Compiled ahead of time for NVIDIA H200s.

PYTHON tools/bench/ahead.py       a line of JSON for each case; PYTHON's environment holds the CUDA build of fintx's JAX

Nothing runs. What is learnt: that the programs compile for one GPU and for eight, what they hold on each (the
compiler's own count, by which training decides, beside the estimate that `plan` prints), how many kernels a step
launches, and which collectives. Kernels are not tuned: that takes a GPU to try them on.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
N_GPUS = 8
# NVIDIA's H200 data sheet and the limits of compute capability 9.0 in the CUDA programming guide.
_H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
runtime_version { major: 12 minor: 9 }
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 141000000000
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""
_NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_ALLOCATION = 'custom_call_target="AllocateBuffer"'
"""A custom call that launches nothing: memory that a loop will fill."""
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def measure(python: str) -> Iterator[dict[str, Any]]:
    """Each case's figures, from a process of that Python."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with subprocess.Popen([python, __file__], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            found = {"part": "ahead", **json.loads(line)}
            print(found, flush=True)
            yield found
    assert process.returncode == 0, f"{python} could not compile ahead of time: README.md says what it needs"


def main() -> None:
    """Compile all cases."""
    # The first backend: its client is made, and there is no GPU to make one for. The versions' check asks the driver.
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    import jax
    from jax.experimental import topologies

    gpus = topologies.get_topology_desc(platform="cuda", target_config=_H200, topology=f"1x1x{N_GPUS}").devices
    jax.devices = lambda *_: gpus
    jax.default_backend = lambda: "gpu"

    from fintx.train.sharding import Layout

    with jax.default_device(gpus[0]):
        for case in (
            ("2M", (64, 48, 2, 256), 32, "float32"),
            ("2M", (64, 48, 2, 256), 32, "bfloat16"),
            ("2M", (64, 48, 2, 256), 32, "bfloat16", Layout(), 8),
            ("200M", (768, 28, 12, 3072), 64, "float32"),
            ("200M", (768, 28, 12, 3072), 64, "bfloat16"),
            ("200M", (768, 28, 12, 3072), 1024, "bfloat16"),
            ("200M", (768, 28, 12, 3072), 64, "bfloat16", Layout(data=8)),
            ("2B", (2048, 40, 16, 8192), 64, "float32"),
            ("2B", (2048, 40, 16, 8192), 64, "bfloat16"),
            ("2B", (2048, 40, 16, 8192), 1024, "bfloat16"),
            ("2B", (2048, 40, 16, 8192), 64, "bfloat16", Layout(data=8, fsdp=True)),
            ("2B", (2048, 40, 16, 8192), 64, "bfloat16", Layout(data=2, model=4)),
            ("2B", (2048, 40, 16, 8192), 64, "bfloat16", Layout(data=2, model=4, fsdp=True)),
        ):
            print(json.dumps(_compiled(*case)), flush=True)


def _compiled(
    budget: str, shape: tuple[int, ...], batch_size: int, dtype: Any, layout: Any = None, n_members: int = 1
) -> dict[str, Any]:
    from fintx.config.schema import ModelConfig, Shape
    from fintx.train import memory, train_step
    from fintx.train.sharding import ONE
    from fintx.train.train_state import BatchLayout, StaticConfig, static_model

    layout, whole = layout or ONE, Shape(**dict(zip(("d_model", "n_layers", "n_heads", "d_ff"), shape, strict=True)))
    static = StaticConfig(
        model=static_model(ModelConfig(compute_dtype=dtype)), shape=whole,
        batch_size=batch_size, micro_batch=batch_size, loss="bce", schedule="cosine", stochastic=True, layout=layout,
    )  # fmt: skip
    began = time.perf_counter()
    sizes = {"n_features": 25, "n_rows": 8192, "n_samples": 8192}
    training = train_step.compile_training(static, **sizes, n_members=n_members)
    evaluation = train_step.compile_logits(static.model, whole, **sizes, layout=layout)
    program: Any = training.segment
    text = program.as_text()
    kernels, collectives = per_step(text)
    estimate = memory.footprint(static.model, whole, 25, BatchLayout(batch_size, layout=layout)).total
    return {
        "budget": budget, "shape": shape, "batch_size": batch_size, "dtype": dtype, "layout": str(layout),
        "n_members": n_members, "compile_s": time.perf_counter() - began,
        "n_bytes": max(training.n_bytes, evaluation.n_bytes), "estimated_bytes": n_members * estimate,
        "kernels": kernels, "collectives": collectives,
    }  # fmt: skip


def per_step(program: str) -> tuple[int, dict[str, int]]:
    """Kernels that a step launches, and collectives among them, by the HLO of a segment: in the body of its loop."""
    bodies: dict[str, list[str]] = {}
    inside: list[str] = []
    for line in program.splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            inside = bodies.setdefault(opened[1], [])
        elif " = " in line:
            inside.append(line)

    def counted(name: str) -> Counter[str]:
        found: Counter[str] = Counter()
        for line in bodies[name]:
            operation = re.search(r" ([a-z][a-z\-]*)\(", line)
            kind = operation[1].removesuffix("-start") if operation else ""
            assert kind != "conditional", "which branch runs can't be told"
            if kind in ("while", "call"):
                inner, times = re.search(r"(?:body|to_apply)=%?([\w.\-]+)", line), 1
                if kind == "while":
                    times = int(re.search(r"known_trip_count\W+n\W+(\d+)", line)[1])  # type: ignore[index]
                for what, n in counted(inner[1]).items():  # type: ignore[index]
                    found[what] += n * times
            elif kind and kind not in _NO_KERNEL and not kind.endswith("-done") and _ALLOCATION not in line:
                found["kernels"] += 1
                found[kind] += kind in _COLLECTIVES
        return found

    # The loop over steps is the one that does not know how often it will run.
    loops = [
        line for lines in bodies.values() for line in lines if " while(" in line and "known_trip_count" not in line
    ]
    (body,) = {re.search(r"body=%?([\w.\-]+)", line)[1] for line in loops}  # type: ignore[index]
    found = counted(body)
    return found["kernels"], {kind: found[kind] for kind in _COLLECTIVES if found[kind]}


if __name__ == "__main__":
    main()
