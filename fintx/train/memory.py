"""Does a trial fit, and with what relief: layers computed again, then smaller micro-batches?

What a program holds while it runs is known once it is compiled, before anything is allocated: arguments, outputs and
temporaries, from XLA's own buffer assignment. To it comes what lies beside it on the same memory. All figures are sums
over the trial's devices of this host: simulated ones share its memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax

from fintx.config.schema import TrialConfig
from fintx.model import family, sizes
from fintx.train import hosts, placement, sharding, step
from fintx.train.sharding import ONE, Layout
from fintx.train.state import Arrangement, for_program, program

OF_A_GPU = 0.75
"""Share of a GPU's memory that JAX takes (XLA_PYTHON_CLIENT_MEM_FRACTION unless it is set)."""


@dataclass(frozen=True)
class Beside:
    """What lies on the devices beside the programs' own arrays."""

    n_devices: int
    """Of this host; what follows is for each, but for `n_params`."""
    n_params: int
    part_bytes: int
    """Of the parameters, as they are cut."""
    n_features: int
    n_rows: int
    """Rows of features, samples to train on and to validate on: as `step.place` pads them."""
    n_train: int
    n_validation: int
    host_is_device: bool
    """Copies on the host lie there too."""
    saves: bool
    """Training states are saved: copied to the host first."""
    n_members: int = 1
    """Of a population: each has a state and a best step."""

    def in_segment(self, training: step.Training) -> int:
        """Bytes while training."""
        return self.n_devices * (training.n_bytes + self._validation) + self._best

    def in_evaluation(self, forward: step.Forward) -> int:
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
class Plan:
    """How a trial runs within its memory."""

    arrangement: Arrangement
    n_bytes: int
    """At its peak, estimated."""
    training: step.Training
    forward: step.Forward


@dataclass(frozen=True)
class TooBig:
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
    n = sizes.count(config.model, config.shape, n_features).total
    part = 4 * n
    if layout.n_devices > 1:
        kind = family.of(config.model)
        part = sharding.part_bytes(kind, layout, kind.abstract_params(config.model, config.shape, n_features))
    return 4 * part * sharding.n_local(layout) + (4 * n if host_is_device else 0)


def upper_guess(config: TrialConfig) -> int:
    """Bytes that a trial on the CPU hardly exceeds in small micro-batches: to share a machine out before compiling.

    Saving a state takes the most, 40 bytes per parameter (`Beside.in_evaluation`); data and activations are guessed.
    """
    n = sizes.count(config.model, config.shape, len(config.data.features)).total
    return 48 * n + 2**26


def plan(
    config: TrialConfig,
    train: step.Windows,
    validation: step.Windows,
    *,
    limit: int,
    arrangement: Arrangement,
    saves: bool,
    n_members: int = 1,
) -> Plan | TooBig:
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
    beside = Beside(
        n_devices=sharding.n_local(layout),
        n_params=sizes.count(config.model, config.shape, n_features).total,
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
    forward = step.compile_logits(
        for_program(config.model), config.shape, **common, n_samples=n_validation, layout=layout
    )  # fmt: skip
    evaluating = beside.in_evaluation(forward)
    if evaluating > limit:
        return TooBig(n_bytes=evaluating, limit=limit)
    members = {} if n_members == 1 else {"n_members": n_members}
    while True:
        try:
            static = program(
                config, micro_batch=arrangement.micro_batch, remat=arrangement.remat, layout=arrangement.layout
            )
            training = step.compile_training(static, **common, n_samples=n_train, **members)
            needed = hosts.most(max(evaluating, beside.in_segment(training)))
        except jax.errors.JaxRuntimeError as error:  # a GPU's compiler tries kernels out, on memory of its own
            if not is_out_of_memory(error):
                raise
            needed = limit + 1
        if needed <= limit:
            return Plan(arrangement=arrangement, n_bytes=needed, training=training, forward=forward)
        relief = placement.relieved(arrangement) if n_members == 1 else None
        if relief is None:
            return TooBig(n_bytes=needed, limit=limit)
        arrangement = relief


def too_big(config: TrialConfig, *, limit: int, layout: Layout = ONE) -> TooBig | None:
    """Is the limit too small for the parameters alone? Nothing is compiled or allocated to tell."""
    least = lower_bound(config, host_is_device=_host_is_device(), layout=layout)
    return TooBig(n_bytes=least, limit=limit) if least > limit else None


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
