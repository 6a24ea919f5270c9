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

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax

from fintx.config.schema import MeshConfig, ModelConfig, Shape, TrialConfig
from fintx.model import family, param_count
from fintx.train import multihost, sharding, train_step
from fintx.train.sharding import ONE, Layout
from fintx.train.train_state import BatchLayout, static_config, static_model

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


def population_size(config: TrialConfig, setting: Literal["auto"] | bool | int, *, on_gpu: bool) -> int:
    """Members that may train side by side under `execution.population`."""
    if setting is False:
        return 1
    return pays(config, on_gpu=on_gpu) if setting == "auto" or setting is True else setting


def on_cores(config: TrialConfig, setting: Literal["auto"] | bool | int, *, on_gpu: bool) -> bool:
    """Whether replicates are best trained by as many threads as there are cores, each alone."""
    if on_gpu or not (setting == "auto" or setting is True):
        return False
    return param_count.count_params(config.model, config.shape, len(config.data.features)).total <= SMALL


def pays(config: TrialConfig, *, on_gpu: bool) -> int:
    """How many trials of the config's program are best trained at once: a power of two; 1: each alone."""
    if not on_gpu:
        return 1
    n_features = len(config.data.features)
    flops = param_count.flops(config.model, config.shape, n_features)
    n_params = param_count.count_params(config.model, config.shape, n_features).total
    matmuls_s = config.train.batch_size * (flops.forward + flops.backward) / _RATE[config.model.compute_dtype]
    work_s = matmuls_s + n_params * _TRAFFIC / _BANDWIDTH
    launches_s = family.of(config.model).depth(config.shape) * _LAYER_S + _REST_S
    fitting = min(MOST, int(launches_s / work_s))
    return 1 << (fitting.bit_length() - 1) if fitting >= 2 else 1


@dataclass(frozen=True)
class Footprint:
    """Bytes that a trial holds on each of its devices while it trains, estimated; the data's few MB are left out."""

    parameters: int
    gradients: int
    moments: int
    """AdamW's two."""
    activations: int
    """What the backward pass keeps, and what is at work; with fsdp also the layer's weights brought together."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.moments + self.activations


def footprint(model: ModelConfig, shape: Shape, n_features: int, arrangement: BatchLayout) -> Footprint:
    """What a trial holds on each device; exact but for the activations."""
    layout, kind = arrangement.layout, family.of(model)
    params = kind.abstract_params(model, shape, n_features)
    part = sharding.part_bytes(kind, layout, params)
    working = kind.activation_bytes(
        model, shape, windows=-(-arrangement.micro_batch // layout.data), remat=arrangement.remat, parts=layout.model
    )
    if layout.fsdp:
        gathered = params if kind.stacked is None else params[kind.stacked]
        at_once = 1 if kind.stacked is None else kind.depth(shape)
        # and its gradients, before they are scattered
        working += 2 * (sharding.part_bytes(kind, Layout(model=layout.model), gathered) // at_once)
    return Footprint(parameters=part, gradients=part, moments=2 * part, activations=working)


def relieved(arrangement: BatchLayout) -> BatchLayout | None:
    """What takes less memory at the least cost; none: nothing does.

    Computing layers again costs a third of a pass more. Halving a micro-batch brings all weights in once more, which
    costs these models of few tokens more than that, and draws other dropout masks.
    """
    if not arrangement.remat:
        return replace(arrangement, remat=True)
    least = arrangement.layout.data  # below it devices have nothing to do, and hold as much
    if arrangement.micro_batch <= least:
        return None
    return replace(arrangement, micro_batch=max(least, arrangement.micro_batch // 2))


def choose(
    mesh: MeshConfig,
    model: ModelConfig,
    shape: Shape,
    n_features: int,
    *,
    batch_size: int,
    n_devices: int,
    device_bytes: int,
) -> Layout:
    """The layout that a sweep file's [mesh] means for a shape on so many devices: the first of `layouts` that fits.

    It fits if its footprint does with layers computed again; a smaller micro-batch is the last resort, and none of its
    business. Where nothing fits, the layout that holds the least.
    """
    possible = list(layouts(mesh, model, shape, batch_size=batch_size, n_devices=n_devices))

    def held(layout: Layout) -> int:
        return footprint(model, shape, n_features, BatchLayout(batch_size, remat=True, layout=layout)).total

    fitting = (layout for layout in possible if held(layout) <= device_bytes)
    return next(fitting, None) or min(possible, key=held)


def fewest(
    mesh: MeshConfig,
    model: ModelConfig,
    shape: Shape,
    n_features: int,
    *,
    batch_size: int,
    n_devices: int,
    device_bytes: int,
) -> int:
    """Devices that a trial needs, so that the others can train other trials: a divisor of all; all, if nothing fits."""
    for n in (n for n in range(1, n_devices) if n_devices % n == 0):
        layout = choose(
            mesh, model, shape, n_features, batch_size=batch_size, n_devices=n, device_bytes=device_bytes
        )  # fmt: skip
        held = footprint(model, shape, n_features, BatchLayout(batch_size, remat=True, layout=layout)).total
        if layout.n_devices <= n and held <= device_bytes:
            return n
    return n_devices


def layouts(mesh: MeshConfig, model: ModelConfig, shape: Shape, *, batch_size: int, n_devices: int) -> Iterator[Layout]:
    """What [mesh] leaves open, in order of preference: one device, then without fsdp, then fewer parts of the model."""
    fixed = mesh.data if isinstance(mesh.data, int) and mesh.data > 0 else None
    common, most = family.of(model).model_parts(shape), n_devices if mesh.model == "auto" else mesh.model
    dividing = [parts for parts in range(1, most + 1) if common % parts == 0]
    if mesh.model == "auto":
        dividing = [parts for parts in dividing if n_devices % (parts * (fixed or 1)) == 0] or [1]
    else:
        dividing = dividing[-1:]
    if mesh.data == "auto":
        yield Layout(model=dividing[0])
    for fsdp in (False, True) if mesh.fsdp == "auto" else (mesh.fsdp,):
        for parts in dividing:
            data = fixed or max(1, min(n_devices // parts, batch_size))
            yield Layout(data=data, model=parts, fsdp=fsdp and data > 1)


OF_A_GPU = 0.75
"""Share of a GPU's memory that JAX takes (XLA_PYTHON_CLIENT_MEM_FRACTION unless it is set)."""


@dataclass(frozen=True)
class MemoryEstimate:
    """What lies on the devices beside the programs' own arrays."""

    n_devices: int
    """Of this host; what follows is for each, but for `n_params`."""
    n_params: int
    part_bytes: int
    """Of the parameters, as they are cut."""
    n_features: int
    n_rows: int
    """Rows of features, samples to train on and to validate on: as `train_step.place` pads them."""
    n_train: int
    n_validation: int
    host_is_device: bool
    """Copies on the host lie there too."""
    saves: bool
    """Training states are saved: copied to the host first."""
    n_members: int = 1
    """Of a population: each has a state and a best step."""

    def in_segment(self, training: train_step.TrainPrograms) -> int:
        """Bytes while training."""
        return self.n_devices * (training.n_bytes + self._validation) + self._best

    def in_evaluation(self, forward: train_step.ForwardProgram) -> int:
        """Bytes while evaluating, or copying what comes of it.

        A trial's forward pass reads the parameters in its state, a member's a copy of them.
        """
        # A new best is copied, or the whole state, and once more by Orbax while it writes.
        copies = (12 + 12 * self.n_members) if self.saves else 4
        copied = copies * self.n_params if self.host_is_device else 0
        copying = self.n_devices * (self.part_bytes + self._validation) + copied
        rest_of_state = (2 if self.n_members == 1 else 3 * self.n_members) * self.part_bytes
        return (
            max(self.n_devices * forward.n_bytes, copying) + self.n_devices * (rest_of_state + self._train) + self._best
        )

    @property
    def _best(self) -> int:
        return 4 * self.n_params * self.n_members if self.host_is_device else 0

    @property
    def _train(self) -> int:
        return 4 * self.n_rows * self.n_features + 8 * self.n_train

    @property
    def _validation(self) -> int:
        return 4 * self.n_rows * self.n_features + 8 * self.n_validation


@dataclass(frozen=True)
class MemoryPlan:
    """How a trial runs within its memory."""

    arrangement: BatchLayout
    n_bytes: int
    """At its peak, estimated."""
    training: train_step.TrainPrograms
    forward: train_step.ForwardProgram


@dataclass(frozen=True)
class OutOfMemory:
    """No relief makes the trial fit."""

    n_bytes: int
    """What it takes at least."""
    limit: int

    def __str__(self) -> str:
        return f"out of memory: needs at least {_words(self.n_bytes)}, and {_words(self.limit)} are available"


def lower_bound(config: TrialConfig, *, host_is_device: bool = True, layout: Layout = ONE) -> int:
    """Bytes a trial takes at least, in whatever micro-batch: training state, gradients, and the best parameters' copy.

    Args:
        host_is_device: False: that copy lies elsewhere, and is not counted.
    """
    n_features = len(config.data.features)
    n = param_count.count_params(config.model, config.shape, n_features).total
    part = 4 * n
    if layout.n_devices > 1:
        kind = family.of(config.model)
        part = sharding.part_bytes(kind, layout, kind.abstract_params(config.model, config.shape, n_features))
    return 4 * part * sharding.n_local(layout) + (4 * n if host_is_device else 0)


def upper_guess(config: TrialConfig) -> int:
    """Bytes that a trial on the CPU hardly exceeds in small micro-batches: to share a machine out before compiling.

    Saving a state takes the most, 40 bytes per parameter (`Beside.in_evaluation`); data and activations are guessed.
    """
    n = param_count.count_params(config.model, config.shape, len(config.data.features)).total
    return 48 * n + 2**26


def plan_memory(
    config: TrialConfig,
    train: train_step.Windows,
    validation: train_step.Windows,
    *,
    limit: int,
    arrangement: BatchLayout,
    saves: bool,
    n_members: int = 1,
) -> MemoryPlan | OutOfMemory:
    """Compile the trial's programs with no more relief than the limit asks for.

    Call `too_big` first: the compiler itself dies of absurd shapes.

    Args:
        arrangement: where to begin; its layout stays. A population tries no other.
        saves: training states will be saved.
        n_members: trials side by side, of which the config is one.
    """
    layout = arrangement.layout
    n_rows, n_features = train.features.shape
    n_train, n_validation = len(train.rows), len(validation.rows)
    kind = family.of(config.model)
    params = kind.abstract_params(config.model, config.shape, n_features)
    beside = MemoryEstimate(
        n_devices=sharding.n_local(layout),
        n_params=param_count.count_params(config.model, config.shape, n_features).total,
        part_bytes=sharding.part_bytes(kind, layout, params),
        n_features=n_features,
        n_rows=n_rows,
        n_train=n_train,
        n_validation=n_validation,
        host_is_device=_host_is_device(),
        saves=saves,
        n_members=n_members,
    )
    common = {"n_features": n_features, "n_rows": n_rows}
    forward = train_step.compile_logits(
        static_model(config.model), config.shape, **common, n_samples=n_validation, layout=layout
    )  # fmt: skip
    evaluating = beside.in_evaluation(forward)
    if evaluating > limit:
        return OutOfMemory(n_bytes=evaluating, limit=limit)
    members = {} if n_members == 1 else {"n_members": n_members}
    while True:
        try:
            static = static_config(
                config, micro_batch=arrangement.micro_batch, remat=arrangement.remat, layout=arrangement.layout
            )
            training = train_step.compile_training(static, **common, n_samples=n_train, **members)
            needed = multihost.most(max(evaluating, beside.in_segment(training)))
        except jax.errors.JaxRuntimeError as error:  # a GPU's compiler tries kernels out, on memory of its own
            if not is_out_of_memory(error):
                raise
            needed = limit + 1
        if needed <= limit:
            return MemoryPlan(arrangement=arrangement, n_bytes=needed, training=training, forward=forward)
        relief = relieved(arrangement) if n_members == 1 else None
        if relief is None:
            return OutOfMemory(n_bytes=needed, limit=limit)
        arrangement = relief


def too_big(config: TrialConfig, *, limit: int, layout: Layout = ONE) -> OutOfMemory | None:
    """Is the limit too small for the parameters alone? Nothing is compiled or allocated to tell."""
    least = lower_bound(config, host_is_device=_host_is_device(), layout=layout)
    return OutOfMemory(n_bytes=least, limit=limit) if least > limit else None


def _host_is_device() -> bool:
    return jax.default_backend() == "cpu"


def available(layout: Layout = ONE) -> int:
    """Bytes free for a trial on its devices of this host: GPUs' pools, or what the host can still give."""
    return sharding.n_local(layout) * _of_device() if not _host_is_device() else host_available(Path("/"))


def device_bytes() -> int:
    """Bytes free for a trial on each device that this process sees; simulated devices share the host's."""
    return _of_device() if not _host_is_device() else host_available(Path("/")) // jax.local_device_count()


def _of_device() -> int:
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return host_available(Path("/"))


def host_available(root: Path) -> int:
    """The least of what the kernel, and each control group that this process is in, still grants; Linux's files.

    Args:
        root: where /proc and /sys hang.
    """
    limits = [*_kernel(root), *_groups_v2(root), *_groups_v1(root)]
    return min(limits) if limits else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _kernel(root: Path) -> Iterator[int]:
    for line in _text(root / "proc/meminfo").splitlines():
        name, *amount = line.split() or [""]
        if name == "MemAvailable:" and amount and amount[0].isdigit():
            yield 1024 * int(amount[0])


def _groups_v2(root: Path) -> Iterator[int]:
    for group in _groups(root, controller="", mount=root / "sys/fs/cgroup"):
        yield from _left(group, limit="memory.max", usage="memory.current", cache="inactive_file")


def _groups_v1(root: Path) -> Iterator[int]:
    for group in _groups(root, controller="memory", mount=root / "sys/fs/cgroup/memory"):
        yield from _left(
            group, limit="memory.limit_in_bytes", usage="memory.usage_in_bytes", cache="total_inactive_file"
        )


def _groups(root: Path, *, controller: str, mount: Path) -> Iterator[Path]:
    """This process's group and those around it; in a container the mount may show them under another path, or not."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if controller in names.split(","):
            group = Path(path.lstrip("/"))
            yield from (mount / part for part in (group, *group.parents) if ".." not in part.parts)


def _left(group: Path, *, limit: str, usage: str, cache: str) -> Iterator[int]:
    """A limit minus what is used; cached files don't count as used, for they go when memory is wanted."""
    most, used = _text(group / limit).strip(), _text(group / usage).strip()
    if most.isdigit() and used.isdigit():
        lines = [line.split() for line in _text(group / "memory.stat").splitlines()]
        cached = sum(int(line[1]) for line in lines if len(line) == 2 and line[0] == cache and line[1].isdigit())
        yield max(0, int(most) - int(used) + cached)


def _text(path: Path) -> str:
    """A file of the kernel's; empty where it can't be read."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Did the device or the host run out of memory?

    A full disk arrives under the same name (RESOURCE_EXHAUSTED), so the text decides as well as the type.
    """
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    named = any(mark in text for mark in ("resource_exhausted", "out of memory", "out_of_memory", "failed to allocate"))
    return isinstance(error, jax.errors.JaxRuntimeError) and named and "no space left" not in text


def _words(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.3g} GiB" if n_bytes >= 2**30 else f"{math.ceil(n_bytes / 2**20):,} MiB"
