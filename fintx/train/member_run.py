"""What is known of one attempt at a trial while it runs, and what does it come to?"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import jax

from fintx.config.schema import TrialConfig
from fintx.model import param_count
from fintx.train.progress import End, Epoch, FitInputs, FitResult, Progress, Timing
from fintx.train.resume import CheckpointManager, CheckpointPolicy, TrainingState
from fintx.train.train_state import BatchLayout, TrainState, steps_per_epoch
from fintx.train.train_step import EpochSums, empty_sums


@dataclass(frozen=True)
class Member:
    """A trial that is trained, alone or beside others: what it is, whom it tells, where it is saved. See `trainer.fit`.

    What one of its hooks or its saves raises ends this member and no other.
    """

    config: TrialConfig
    on_begin: Callable[[], None] | None = None
    """Called once all is compiled and in place, right before the first step."""
    on_epoch: Callable[[Epoch], None] | None = None
    on_progress: Callable[[int], None] | None = None
    on_warning: Callable[[str], None] | None = None
    saves: CheckpointPolicy | None = None


@dataclass
class MemberRun:
    """One member under way."""

    member: Member
    question: FitInputs
    batch_layout: BatchLayout
    progress: Progress = field(default_factory=Progress)
    step: int = 0
    tally: EpochSums = field(default_factory=empty_sums)
    """Of the epoch under way, on the host."""
    slot: int = 0
    """Its place in the population."""
    resumed_step: int = 0
    memory_bytes: int | None = None
    timing: Timing = Timing()
    """Of this attempt and those before it; where several train at once, its share."""
    warnings: list[str] = field(default_factory=list)
    keeper: CheckpointManager | None = None
    ended: End | Exception | None = None

    @property
    def steps_per_epoch(self) -> int:
        """The same for all members of a population."""
        question = self.question
        return steps_per_epoch(len(question.dataset.train.rows), batch_size=question.config.train.batch_size)

    @property
    def steps_left(self) -> int:
        """To the epoch's end."""
        return self.steps_per_epoch - self.step % self.steps_per_epoch

    @property
    def at_epochs_end(self) -> bool:
        """Between two epochs, or at the very beginning."""
        return self.step % self.steps_per_epoch == 0

    @contextlib.contextmanager
    def own(self) -> Iterator[None]:
        """Whatever goes wrong within ends this attempt; a device's errors are everybody's."""
        try:
            yield
        except (jax.errors.JaxRuntimeError, MemoryError):
            raise
        except Exception as error:
            self.ended = error

    def warn(self, line: str) -> None:
        """A line for the result's warnings."""
        self.warnings.append(line)
        if self.member.on_warning is not None:
            self.member.on_warning(line)

    def adopt(self, saved: TrainingState) -> None:
        """Go on from what an earlier attempt saved, with the relief that it had, on the devices that there are now."""
        self.progress, self.step, self.resumed_step, self.tally = saved.progress, saved.step, saved.step, saved.tally
        self.batch_layout = replace(saved.batch_layout, layout=self.batch_layout.layout)
        self.timing = saved.timing

    def save(self, state: TrainState) -> None:
        """Commit the member's state.

        Args:
            state: as host arrays that nobody writes over.
        """
        assert self.keeper is not None
        self.keeper.save(
            TrainingState(
                state=state,
                tally=self.tally,
                progress=self.progress,
                batch_layout=self.batch_layout,
                timing=self.timing,
            )
        )

    def epoch(self) -> Epoch:
        """What is told after an epoch."""
        known, config = self.progress, self.question.config.train
        latest, best = known.curve[-1], known.best[self.question.metric]
        assert latest["train_loss"] is not None and best is not None
        return Epoch(
            epoch=known.epoch,
            max_epochs=config.max_epochs,
            step=self.step,
            max_steps=config.max_epochs * self.steps_per_epoch,
            train_loss=latest["train_loss"],
            metrics=known.last,
            best=best,
            best_epoch=known.best_epoch,
            seconds=self.timing.wall_s,
        )

    def result(self) -> FitResult | Exception:
        """What the attempt came to, once it has ended."""
        end, known, config = self.ended, self.progress, self.question.config
        if isinstance(end, Exception):
            return end
        assert end is not None
        return FitResult(
            outcome=end.outcome,
            detail=end.detail,
            best=known.best,
            last=known.last,
            best_epoch=known.best_epoch,
            best_step=known.best_epoch * self.steps_per_epoch,
            epochs=known.epoch,
            steps=self.step,
            curve=known.curve,
            outputs=known.outputs,
            params=known.params,
            param_count=param_count.count_params(
                config.model, config.shape, self.question.dataset.features.shape[1]
            ).total,
            timing=self.timing,
            warnings=tuple(self.warnings),
            resumed_step=self.resumed_step,
            batch_layout=self.batch_layout,
            memory_bytes=self.memory_bytes,
        )


class SharedClock:
    """Wall time, shared out among the attempts that were under way."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def charge(self, attempts: Sequence[MemberRun]) -> None:
        """The time since the last call, to these."""
        now = time.perf_counter()
        share = (now - self._since) / max(len(attempts), 1)
        self._since = now
        for attempt in attempts:
            attempt.timing += Timing(wall_s=share)
