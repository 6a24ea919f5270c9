"""Does it pay to train several trials of one program at once, and how many?

A population's step does R times the work of a trial's, in as many operations. So it pays where the operations wait for
something else than their work, and only there:

- On a GPU a small model waits for its kernels to be launched. The rule is a model, not yet a measurement: R members
  cost about what one costs while R times the work is done in the time of the launches.
- On a CPU an operation begins within a microsecond, and a population's arrays leave the caches that a trial's fit into.
  Measured in November 2026 on two cores of an AMD EPYC (1 MiB of L2), float32, 25 features, 11 patches, batch 32, all
  as time of R single steps over time of one step of R members (CPU seconds on one core; wall seconds on two):

      d_model, layers, d_ff     parameters     R = 4      R = 8      R = 8, wall
      8, 2, 16                       3,401      1.07       1.11             0.78
      48, 4, 192                   126,289      1.00       0.83             0.75
      64, 6, 256                   317,505      0.86       0.88             0.73

  (Of the smallest, windows of a single patch: 3.2. There it is the operations that are waited for; with eleven it is
  the gathering of windows.) So it never pays. What a small model doesn't fill are the cores: the same trials, each in
  its own program, by two threads at once took 1 / 1.8, 1 / 1.7 and 1 / 1.3 of the time. Their numbers are those of a
  trial alone to the bit. Replicates are trained so; different trials are by `--workers`.
"""

from __future__ import annotations

from typing import Literal

from fintx.config.schema import TrialConfig
from fintx.model import family, sizes

MOST = 16
"""Members at once: from there on, memory and the slowest member's epochs cost what launches save."""
SMALL = 1_000_000
"""Parameters up to which a step leaves most of a second core idle."""
_LAYER_S, _REST_S = 100e-6, 200e-6
"""Launching a layer's kernels, some 40 forward and backward at 2 to 3 µs; and what lies outside the layers, the
optimiser above all."""
_RATE = {"float32": 30e12, "bfloat16": 100e12}
"""FLOP/s of matmuls with a few hundred rows."""
_BANDWIDTH, _TRAFFIC = 1.5e12, 32
"""Bytes per second, and per parameter and step: weights forward and backward, gradients, AdamW's reads and writes."""


def at_once(config: TrialConfig, setting: Literal["auto"] | bool | int, *, on_gpu: bool) -> int:
    """Members that may train side by side under `execution.population`."""
    if setting is False:
        return 1
    return pays(config, on_gpu=on_gpu) if setting == "auto" or setting is True else setting


def on_cores(config: TrialConfig, setting: Literal["auto"] | bool | int, *, on_gpu: bool) -> bool:
    """Whether replicates are best trained by as many threads as there are cores, each alone."""
    if on_gpu or not (setting == "auto" or setting is True):
        return False
    return sizes.count(config.model, config.shape, len(config.data.features)).total <= SMALL


def pays(config: TrialConfig, *, on_gpu: bool) -> int:
    """How many trials of the config's program are best trained at once: a power of two; 1: each alone."""
    if not on_gpu:
        return 1
    n_features = len(config.data.features)
    flops = sizes.flops(config.model, config.shape, n_features)
    n_params = sizes.count(config.model, config.shape, n_features).total
    matmuls_s = config.train.batch_size * (flops.forward + flops.backward) / _RATE[config.model.compute_dtype]
    work_s = matmuls_s + n_params * _TRAFFIC / _BANDWIDTH
    launches_s = family.of(config.model).depth(config.shape) * _LAYER_S + _REST_S
    fitting = min(MOST, int(launches_s / work_s))
    return 1 << (fitting.bit_length() - 1) if fitting >= 2 else 1
