"""The GPUs of this machine, and how many workers fill them. Asked of the driver; nothing is allocated."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from fintx.config.schema import Choices, StudySpec
from fintx.data import features
from fintx.model import sizes
from fintx.study import runtime
from fintx.train import memory, placement


def gpus() -> tuple[int, ...]:
    """Bytes of each NVIDIA GPU that this process may use, asked of the driver: JAX would take their memory to tell."""
    ask = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    lines = done.stdout.split("\n") if done.returncode == 0 else []
    # A GPU that shares the host's memory tells none.
    every = tuple(2**20 * int(line) if line.strip().isdigit() else 0 for line in lines if line.strip())
    names = runtime.visible_gpus()
    if names is None or not every:
        return every
    by_index = {str(index): n_bytes for index, n_bytes in enumerate(every)}
    return tuple(by_index.get(name, min(every)) for name in names)  # by name: which of them it is doesn't matter


def filling(specs: Sequence[StudySpec], gpus: Sequence[int]) -> int:
    """Workers that fill a machine's GPUs (bytes of each): as many as the largest trial of any study leaves room for."""
    if len(gpus) < 2:
        return 1
    return min(len(gpus) // _of_a_trial(spec, gpus) for spec in specs)


def _of_a_trial(spec: StudySpec, gpus: Sequence[int]) -> int:
    n_features = len(features.resolve(spec.data.features, context=spec.data.context))
    shapes = sizes.feasible(spec.architecture, spec.budget, [spec.model], n_features)
    searched = spec.space.get("train.batch_size")
    batch_sizes = searched.choices if isinstance(searched, Choices) else (spec.train.batch_size,)
    if not shapes:  # said when the study begins
        return len(gpus)
    largest = max(shapes, key=lambda shape: sizes.count(spec.model, shape, n_features).total)
    return placement.fewest(
        spec.mesh, spec.model, largest, n_features,
        batch_size=max(int(each) for each in batch_sizes), n_devices=len(gpus),
        device_bytes=int(memory.OF_A_GPU * min(gpus)),
    )  # fmt: skip
