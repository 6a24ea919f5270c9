"""Where an epoch is cut: short enough to stop and save, and never more often than that asks for."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from fintx.train.train_step import DISPATCH_S, DispatchSize


def cuts(pace: DispatchSize, n: int, *, step_s: float) -> list[int]:
    """The segments of an epoch of n steps, each of which takes step_s."""
    found: list[int] = []
    while sum(found) < n:
        steps = pace.steps(n - sum(found))
        pace.note(steps, steps * step_s)
        found.append(steps)
    return found


def test_a_small_model_measures_one_step_and_then_runs_whole_epochs() -> None:
    pace = DispatchSize()
    assert cuts(pace, 50, step_s=0.005) == [1, 49]
    assert cuts(pace, 50, step_s=0.005) == [50]


def test_an_epoch_of_a_large_model_is_cut_into_equal_parts() -> None:
    pace = DispatchSize()
    assert cuts(pace, 50, step_s=0.1) == [1, 13, 12, 12, 12]


def test_steps_longer_than_a_dispatch_should_be_go_one_by_one() -> None:
    assert cuts(DispatchSize(), 3, step_s=10.0) == [1, 1, 1]


def test_a_machine_that_slept_is_forgotten_after_one_dispatch() -> None:
    pace = DispatchSize()
    cuts(pace, 50, step_s=0.001)
    pace.note(50, 3600.0)
    assert cuts(pace, 50, step_s=0.001) == [1, 49]


@given(left=st.integers(1, 10**6), step_s=st.floats(0, 1e6) | st.just(math.inf))
def test_a_segment_is_never_empty_never_too_long_and_ends_with_the_epoch(left: int, step_s: float) -> None:
    steps = DispatchSize(step_s).steps(left)
    assert 1 <= steps <= left
    assert steps == 1 or (steps - 1) * step_s <= DISPATCH_S * (1 + 1e-9)
    assert steps == left or left * step_s > DISPATCH_S
