"""Memory: what a trial takes, what the devices have, and how it is made to fit; how many trials fit side by side.

A trial that doesn't fit is laid over more devices (as far as [mesh] allows), then computes its layers again in the
backward pass, then takes smaller micro-batches. First estimates come from abstract shapes and make nothing; the last
word is the compiled programs' own count.
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

OF_A_GPU = 0.75
"""Share of a GPU's memory that JAX takes (XLA_PYTHON_CLIENT_MEM_FRACTION unless it is set)."""

# --- estimates and layouts --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Footprint:
    """Bytes that a trial holds on each of its devices while it trains; estimated, without the data's few MB."""

    parameters: int
    gradients: int
    moments: int
    """AdamW's first and second moments."""
    activations: int
    """Kept for the backward pass, or at work; with fsdp also the gathered weights of a layer."""

    @property
    def total(self) -> int:
        """All bytes together."""
        return self.parameters + self.gradients + self.moments + self.activations


def footprint(model: ModelConfig, shape: Shape, n_features: int, batch_layout: BatchLayout) -> Footprint:
    """What a trial holds on each device; exact but for the activations."""
    layout, model_family = batch_layout.layout, family.of(model)
    params = model_family.abstract_params(model, shape, n_features)
    part = sharding.part_bytes(model_family, layout, params)
    activations = model_family.activation_bytes(
        model, shape, windows=-(-batch_layout.micro_batch // layout.data), remat=batch_layout.remat, parts=layout.model
    )
    if layout.fsdp:
        stacked = model_family.stacked
        gathered = sharding.part_bytes(
            model_family, Layout(model=layout.model), params if stacked is None else params[stacked]
        )
        n_layers = 1 if stacked is None else model_family.depth(shape)
        activations += 2 * (gathered // n_layers)  # and its gradients, before they are scattered
    return Footprint(parameters=part, gradients=part, moments=2 * part, activations=activations)


def relieved(batch_layout: BatchLayout) -> BatchLayout | None:
    """The next cheapest way to take less memory; none: there is none left.

    Computing layers again costs a third of a pass. Halving a micro-batch reads all weights once more, which costs more
    for models of few tokens, and draws other dropout masks.
    """
    if not batch_layout.remat:
        return replace(batch_layout, remat=True)
    smallest = batch_layout.layout.data  # below it devices are idle, and hold as much
    if batch_layout.micro_batch <= smallest:
        return None
    return replace(batch_layout, micro_batch=max(smallest, batch_layout.micro_batch // 2))


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
    """The layout that a sweep file's [mesh] means for a shape on so many devices.

    The first of `layouts` whose footprint fits with layers computed again and the whole batch at once; where none
    does, the one that holds the least.
    """
    candidates = list(layouts(mesh, model, shape, batch_size=batch_size, n_devices=n_devices))

    def n_bytes(layout: Layout) -> int:
        return footprint(model, shape, n_features, BatchLayout(batch_size, remat=True, layout=layout)).total

    fitting = (layout for layout in candidates if n_bytes(layout) <= device_bytes)
    return next(fitting, None) or min(candidates, key=n_bytes)


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
    """The fewest devices that a trial fits on, a divisor of all of them; all, if it fits on none."""
    for n in (n for n in range(1, n_devices) if n_devices % n == 0):
        layout = choose(mesh, model, shape, n_features, batch_size=batch_size, n_devices=n, device_bytes=device_bytes)
        n_bytes = footprint(model, shape, n_features, BatchLayout(batch_size, remat=True, layout=layout)).total
        if layout.n_devices <= n and n_bytes <= device_bytes:
            return n
    return n_devices


def layouts(mesh: MeshConfig, model: ModelConfig, shape: Shape, *, batch_size: int, n_devices: int) -> Iterator[Layout]:
    """What [mesh] allows, in order of preference: one device, then without fsdp, then fewer parts of the model."""
    fixed_data = mesh.data if isinstance(mesh.data, int) and mesh.data > 0 else None
    largest_cut = n_devices if mesh.model == "auto" else mesh.model
    model_cuts = [parts for parts in range(1, largest_cut + 1) if family.of(model).model_parts(shape) % parts == 0]
    if mesh.model == "auto":
        model_cuts = [parts for parts in model_cuts if n_devices % (parts * (fixed_data or 1)) == 0] or [1]
    else:
        model_cuts = model_cuts[-1:]
    if mesh.data == "auto":
        yield Layout(model=model_cuts[0])
    for fsdp in (False, True) if mesh.fsdp == "auto" else (mesh.fsdp,):
        for parts in model_cuts:
            data = fixed_data or max(1, min(n_devices // parts, batch_size))
            yield Layout(data=data, model=parts, fsdp=fsdp and data > 1)


# --- a trial within its limit -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryEstimate:
    """A trial's peak: its programs' own arrays, and what lies on the devices beside them."""

    n_devices: int
    """Of this host. Counts below are per device, but for `n_params`."""
    n_params: int
    part_bytes: int
    """Of the parameters' part on a device."""
    n_features: int
    n_rows: int
    """Rows of features; with `n_train` and `n_validation` as `train_step.place` pads them."""
    n_train: int
    n_validation: int
    host_is_device: bool
    """Copies on the host lie in the same memory."""
    saves: bool
    """Training states are saved, and copied to the host for it."""
    n_members: int = 1
    """Of a population: each has a state and a best step."""

    def in_segment(self, training: train_step.TrainPrograms) -> int:
        """Bytes while training."""
        return self.n_devices * (training.n_bytes + self._validation) + self._best

    def in_evaluation(self, forward: train_step.ForwardProgram) -> int:
        """Bytes while evaluating, or copying the result."""
        # A new best is copied, or the whole state, and once more by Orbax while it writes.
        copies = (12 + 12 * self.n_members) if self.saves else 4
        copying = self.n_devices * (self.part_bytes + self._validation)
        copying += copies * self.n_params if self.host_is_device else 0
        # A trial's forward pass reads the parameters in its state, a member's a copy of them.
        rest_of_state = (2 if self.n_members == 1 else 3 * self.n_members) * self.part_bytes
        evaluating = max(self.n_devices * forward.n_bytes, copying)
        return evaluating + self.n_devices * (rest_of_state + self._train) + self._best

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
    """How a trial runs within its limit."""

    batch_layout: BatchLayout
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
        return f"out of memory: needs at least {_in_words(self.n_bytes)}, and {_in_words(self.limit)} are available"


def lower_bound(config: TrialConfig, *, host_is_device: bool = True, layout: Layout = ONE) -> int:
    """Bytes a trial takes at least, in whatever micro-batch: training state, gradients, and the best parameters' copy.

    Args:
        host_is_device: False: that copy lies elsewhere, and is not counted.
    """
    n_features = len(config.data.features)
    n = param_count.count_params(config.model, config.shape, n_features).total
    part = 4 * n
    if layout.n_devices > 1:
        part = footprint(config.model, config.shape, n_features, BatchLayout(1, layout=layout)).parameters
    return 4 * part * sharding.n_local(layout) + (4 * n if host_is_device else 0)


def upper_guess(config: TrialConfig) -> int:
    """Bytes that a trial on the CPU hardly exceeds in small micro-batches: to share a machine out before compiling.

    Saving a state takes the most, 40 bytes per parameter (`MemoryEstimate.in_evaluation`); data and activations are a
    guess.
    """
    n = param_count.count_params(config.model, config.shape, len(config.data.features)).total
    return 48 * n + 2**26


def plan_memory(
    config: TrialConfig,
    train: train_step.Windows,
    validation: train_step.Windows,
    *,
    limit: int,
    batch_layout: BatchLayout,
    saves: bool,
    n_members: int = 1,
) -> MemoryPlan | OutOfMemory:
    """Compile the trial's programs with no more relief than the limit asks for.

    Call `too_big` first: the compiler itself fails on absurd shapes.

    Args:
        batch_layout: where to begin; its layout stays. A population tries no other.
        saves: training states will be saved.
        n_members: trials side by side, of which the config is one.
    """
    layout = batch_layout.layout
    n_rows, n_features = train.features.shape
    n_train, n_validation = len(train.rows), len(validation.rows)
    estimate = MemoryEstimate(
        n_devices=sharding.n_local(layout),
        n_params=param_count.count_params(config.model, config.shape, n_features).total,
        part_bytes=footprint(config.model, config.shape, n_features, batch_layout).parameters,
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
    evaluating = estimate.in_evaluation(forward)
    if evaluating > limit:
        return OutOfMemory(n_bytes=evaluating, limit=limit)
    members = {} if n_members == 1 else {"n_members": n_members}
    while True:
        try:
            static = static_config(
                config, micro_batch=batch_layout.micro_batch, remat=batch_layout.remat, layout=layout
            )
            training = train_step.compile_training(static, **common, n_samples=n_train, **members)
            needed = multihost.most(max(evaluating, estimate.in_segment(training)))
        except jax.errors.JaxRuntimeError as error:  # a GPU's compiler tries kernels out, on memory of its own
            if not is_out_of_memory(error):
                raise
            needed = limit + 1
        if needed <= limit:
            return MemoryPlan(batch_layout=batch_layout, n_bytes=needed, training=training, forward=forward)
        relief = relieved(batch_layout) if n_members == 1 else None
        if relief is None:
            return OutOfMemory(n_bytes=needed, limit=limit)
        batch_layout = relief


def too_big(config: TrialConfig, *, limit: int, layout: Layout = ONE) -> OutOfMemory | None:
    """Whether the limit is too small for the parameters alone; compiles and allocates nothing."""
    least = lower_bound(config, host_is_device=_host_is_device(), layout=layout)
    return OutOfMemory(n_bytes=least, limit=limit) if least > limit else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host ran out of memory.

    A full disk arrives under the same name (RESOURCE_EXHAUSTED), so the text decides as well as the type.
    """
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    named = any(mark in text for mark in ("resource_exhausted", "out of memory", "out_of_memory", "failed to allocate"))
    return isinstance(error, jax.errors.JaxRuntimeError) and named and "no space left" not in text


def _in_words(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.3g} GiB" if n_bytes >= 2**30 else f"{math.ceil(n_bytes / 2**20):,} MiB"


# --- what there is ----------------------------------------------------------------------------------------------------


def available(layout: Layout = ONE) -> int:
    """Bytes free for a trial on its devices of this host: GPUs' pools, or what the host can still give."""
    return sharding.n_local(layout) * _pool_bytes() if not _host_is_device() else host_available(Path("/"))


def device_bytes() -> int:
    """Bytes free for a trial on each device that this process sees; simulated devices share the host's."""
    return _pool_bytes() if not _host_is_device() else host_available(Path("/")) // jax.local_device_count()


def _host_is_device() -> bool:
    return jax.default_backend() == "cpu"


def _pool_bytes() -> int:
    stats = jax.local_devices()[0].memory_stats()
    return int(stats["bytes_limit"]) if stats and "bytes_limit" in stats else host_available(Path("/"))


def host_available(root: Path) -> int:
    """The least of what the kernel, and each control group that this process is in, still grants (Linux).

    Args:
        root: where /proc and /sys are mounted.
    """
    limits = []
    for line in _read(root / "proc/meminfo").splitlines():
        name, *amount = line.split() or [""]
        if name == "MemAvailable:" and amount and amount[0].isdigit():
            limits.append(1024 * int(amount[0]))
    groups = root / "sys/fs/cgroup"
    for folder in _control_groups(root, controller="", mount=groups):
        limits += _unused(folder, limit="memory.max", usage="memory.current", cache="inactive_file")
    for folder in _control_groups(root, controller="memory", mount=groups / "memory"):
        limits += _unused(
            folder, limit="memory.limit_in_bytes", usage="memory.usage_in_bytes", cache="total_inactive_file"
        )
    return min(limits) if limits else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _control_groups(root: Path, *, controller: str, mount: Path) -> Iterator[Path]:
    """This process's group and those around it; in a container the mount may show them under another path, or not."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if controller in names.split(","):
            group = Path(path.lstrip("/"))
            yield from (mount / part for part in (group, *group.parents) if ".." not in part.parts)


def _unused(folder: Path, *, limit: str, usage: str, cache: str) -> Iterator[int]:
    """A limit minus what is used. Cached files don't count as used: the kernel drops them when memory is needed."""
    most, used = _read(folder / limit).strip(), _read(folder / usage).strip()
    if most.isdigit() and used.isdigit():
        lines = [line.split() for line in _read(folder / "memory.stat").splitlines()]
        cached = sum(int(line[1]) for line in lines if len(line) == 2 and line[0] == cache and line[1].isdigit())
        yield max(0, int(most) - int(used) + cached)


def _read(path: Path) -> str:
    """A file of the kernel's; empty where it can't be read."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


# --- trials side by side ----------------------------------------------------------------------------------------------

MOST_MEMBERS = 16
"""Beyond it, memory and the slowest member's epochs cost what launches save."""
SMALL = 1_000_000
"""Parameters up to which a step leaves most of a second core idle."""
_LAYER_S, _REST_S = 100e-6, 200e-6
"""Launching a layer's kernels, forward and backward; and launching what lies outside the layers."""
_FLOPS_PER_S = {"float32": 30e12, "bfloat16": 100e12}
"""Of matmuls with a few hundred rows."""
_BYTES_PER_S, _TRAFFIC = 1.5e12, 32
"""Memory bandwidth; bytes per parameter and step: weights forward and backward, gradients, AdamW's reads and writes."""


def population_size(config: TrialConfig, setting: Literal["auto"] | bool | int, *, on_gpu: bool) -> int:
    """Trials of the config's program that train side by side, under `execution.population`; 1: each alone.

    One step of R members launches as many kernels as one trial's, for R times the work. So it pays where a small model
    waits for its launches: on GPUs, by the model of costs above. On CPUs it never does (docs/performance.md).
    """
    if setting is False:
        return 1
    if setting != "auto" and setting is not True:
        return setting
    if not on_gpu:
        return 1
    n_features = len(config.data.features)
    flops = param_count.flops(config.model, config.shape, n_features)
    n_params = param_count.count_params(config.model, config.shape, n_features).total
    matmuls_s = config.train.batch_size * (flops.forward + flops.backward) / _FLOPS_PER_S[config.model.compute_dtype]
    work_s = matmuls_s + n_params * _TRAFFIC / _BYTES_PER_S
    launches_s = family.of(config.model).depth(config.shape) * _LAYER_S + _REST_S
    fitting = min(MOST_MEMBERS, int(launches_s / work_s))
    return 1 << (fitting.bit_length() - 1) if fitting >= 2 else 1


def on_cores(config: TrialConfig, setting: Literal["auto"] | bool | int, *, on_gpu: bool) -> bool:
    """Whether replicates are best trained by as many threads as there are cores, each in a program of its own."""
    if on_gpu or not (setting == "auto" or setting is True):
        return False
    return param_count.count_params(config.model, config.shape, len(config.data.features)).total <= SMALL
