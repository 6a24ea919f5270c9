"""Where an epoch is cut: short enough to stop and save, and never more often than that asks for."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from fintx.train.trainer import DISPATCH_S, dispatch_size


def cuts(n: int, *, step_s: float, first_step_s: float = math.inf) -> list[int]:
    """The segments of an epoch of n steps, each of which takes step_s; before them a step took first_step_s."""
    segments: list[int] = []
    while sum(segments) < n:
        segments.append(dispatch_size(n - sum(segments), step_s if segments else first_step_s))
    return segments


def test_a_small_model_measures_one_step_and_then_runs_whole_epochs() -> None:
    assert cuts(50, step_s=0.005) == [1, 49]
    assert cuts(50, step_s=0.005, first_step_s=0.005) == [50]


def test_an_epoch_of_a_large_model_is_cut_into_equal_parts() -> None:
    assert cuts(50, step_s=0.1) == [1, 13, 12, 12, 12]


def test_steps_longer_than_a_dispatch_should_be_go_one_by_one() -> None:
    assert cuts(3, step_s=10.0) == [1, 1, 1]


def test_a_machine_that_slept_is_forgotten_after_one_dispatch() -> None:
    assert cuts(50, step_s=0.001, first_step_s=3600.0 / 50) == [1, 49]


@given(left=st.integers(1, 10**6), step_s=st.floats(0, 1e6) | st.just(math.inf))
def test_a_segment_is_never_empty_never_too_long_and_ends_with_the_epoch(left: int, step_s: float) -> None:
    steps = dispatch_size(left, step_s)
    assert 1 <= steps <= left
    assert steps == 1 or (steps - 1) * step_s <= DISPATCH_S * (1 + 1e-9)
    assert steps == left or left * step_s > DISPATCH_S
