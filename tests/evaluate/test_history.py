"""Climatology and persistence against counting by hand; a label teaches nothing before it is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fintx.evaluate import baselines

DAY = np.datetime64("2020-01-01")


@given(st.lists(st.tuples(st.integers(0, 1), st.one_of(st.none(), st.integers(0, 30))), max_size=40))
def test_climatology_is_the_mean_of_what_is_known(cases):
    labels = np.array([label for label, _ in cases], float)
    known = np.array([np.datetime64("NaT") if day is None else DAY + day for _, day in cases], "datetime64[D]")
    asked = DAY + np.arange(35)
    found = baselines.climatology(labels, known, asked)
    for value, day in zip(found, range(35), strict=True):
        seen = [label for label, when in cases if when is not None and when <= day]
        assert value == pytest.approx(np.mean(seen)) if seen else np.isnan(value)


def test_persistence_counts():
    last, labels = np.array([0.0, 0, 0, 1, 1]), np.array([0.0, 1, 0, 1, 1])
    found = 1 / (1 + np.exp(-baselines.persistence(last, labels, np.array([0.0, 1.0]))))
    np.testing.assert_allclose(found, [1.5 / 4, 2.5 / 3])
