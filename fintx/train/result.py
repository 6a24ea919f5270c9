"""A training's epochs, times and result, as they are told."""

from __future__ import annotations

from dataclasses import dataclass

from fintx.train.progress import Metrics, Outcome
from fintx.train.state import Arrangement
from fintx.types import Floats, Params


@dataclass(frozen=True)
class Timing:
    """Where a training's time went, in all attempts up to their last save; of a population, its share."""

    trace_s: float = 0.0
    """Python's part of making the programs, tracing and lowering; next to nothing where an earlier trial's programs
    served. Waiting for a thread that makes them ahead counts here."""
    compile_s: float = 0.0
    """XLA's part, or reading from the program cache what it once made; 0 where an earlier trial's programs served."""
    n_compiled: int = 0
    """Programs that XLA compiled; those of the cache or of an earlier trial don't count."""
    run_s: float = 0.0
    """Training and evaluating on the devices."""
    wall_s: float = 0.0
    """All of it."""

    def __add__(self, other: Timing) -> Timing:
        return Timing(
            self.trace_s + other.trace_s,
            self.compile_s + other.compile_s,
            self.n_compiled + other.n_compiled,
            self.run_s + other.run_s,
            self.wall_s + other.wall_s,
        )

    def share(self, n: int) -> Timing:
        """Of one of n that trained side by side; the programs are everybody's."""
        return Timing(self.trace_s / n, self.compile_s / n, self.n_compiled, self.run_s / n, self.wall_s / n)


@dataclass(frozen=True)
class Epoch:
    """What is known after an epoch; for the live view."""

    epoch: int
    """From 1."""
    max_epochs: int
    step: int
    """Steps taken so far."""
    max_steps: int
    train_loss: float
    metrics: Metrics
    """Of the validation part."""
    best: float
    """The study's metric at the best epoch so far."""
    best_epoch: int
    seconds: float
    """Since the trial began, in all attempts."""


@dataclass(frozen=True, eq=False)
class FitResult:
    """What a trial came to."""

    outcome: Outcome
    detail: str
    """One line: why it stopped."""
    best: Metrics
    """Validation metrics at the restored best step; empty where no epoch came to an end."""
    last: Metrics
    """Validation metrics at the last step that was evaluated."""
    best_epoch: int
    """From 1; 0: none."""
    best_step: int
    epochs: int
    """Epochs trained."""
    steps: int
    curve: list[dict[str, float | int | None]]
    """Per epoch: epoch, step, train_loss, and the validation metrics; the losses of a diverged epoch are None."""
    outputs: Floats | None
    """float32 (S,): validation logits (regression: log returns) at the best step."""
    params: Params | None
    """At the best step, on the host."""
    param_count: int
    timing: Timing
    warnings: tuple[str, ...]
    """One line each: what was wrong with saved states."""
    resumed_step: int
    """Where an earlier attempt's state was taken up; 0: at the beginning."""
    arrangement: Arrangement
    """Micro-batch, remat and devices, as memory asked for; below train.batch_size, a step is several passes."""
    memory_bytes: int | None
    """Estimated peak, over the trial's devices of this host; none: failed before it was known."""

    @property
    def micro_batch(self) -> int:
        """Samples in a pass."""
        return self.arrangement.micro_batch
