"""Standardization: fitted on training rows alone, constants stay constant, JSON keeps it; drift is reported."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fintx.data import standardize
from fintx.data.standardize import Standardizer

RNG = np.random.default_rng(0)
N, F = 400, 3
ASSETS = ("AAA", "BBB")
IDS = np.repeat([0, 1], N // 2).astype(np.int32)
FEATURES = RNG.normal([1, -50, 1e6], [0.01, 5, 1e5], (N, F)) * (1 + IDS[:, None])
TRAIN = np.concatenate([np.arange(0, 120), np.arange(200, 320)])
VALIDATION = np.concatenate([np.arange(120, 200), np.arange(320, 400)])


def fitted(features=FEATURES, *, rows=TRAIN, kind="standardize") -> Standardizer:
    return standardize.fit_standardizer(features, IDS, ASSETS, rows, kind=kind)


def test_each_asset_gets_its_own_training_mean_and_sd():
    scaled = fitted().apply(FEATURES, IDS, ASSETS)
    assert scaled.dtype == np.float32
    for i in (0, 1):
        own = scaled[TRAIN[IDS[TRAIN] == i]].astype(np.float64)
        np.testing.assert_allclose(own.mean(axis=0), 0, atol=1e-5)  # float32 of numbers of order one
        np.testing.assert_allclose(own.std(axis=0), 1, rtol=1e-5)


def test_no_row_outside_training_has_a_say():
    changed = FEATURES.copy()
    changed[VALIDATION] = 1e9
    assert fitted(changed).to_json() == fitted().to_json()
    changed[TRAIN[0]] += 1
    assert fitted(changed).to_json() != fitted().to_json()


@pytest.mark.parametrize("value", [0.0, 0.1, 1e9, -1e-12])
def test_a_constant_feature_becomes_zero_and_not_noise(value):
    features = FEATURES.copy()
    features[:, 1] = value
    scaled = fitted(features).apply(features, IDS, ASSETS)
    assert np.abs(scaled[:, 1]).max() <= 1e-6
    assert fitted(features).std["AAA"][1] == 1.0


def test_none_leaves_features_as_they_are():
    np.testing.assert_array_equal(
        fitted(kind="none").apply(FEATURES, IDS, ASSETS), FEATURES.astype(np.float32)
    )  # fmt: skip


def test_a_row_with_a_missing_feature_becomes_zeros():
    features = FEATURES.copy()
    features[7, 2], features[8, 0] = np.nan, np.inf
    scaled = fitted().apply(features, IDS, ASSETS)
    assert (scaled[7:9] == 0).all() and (scaled[9] != 0).all()


def test_an_unknown_symbol_takes_the_pooled_figures():
    scaling = fitted()
    scaled = scaling.apply(FEATURES[:5], np.zeros(5, np.int32), ("ZZZ",))
    expected = (FEATURES[:5] - FEATURES[TRAIN].mean(axis=0)) / FEATURES[TRAIN].std(axis=0)
    np.testing.assert_allclose(scaled, expected, rtol=1e-6)


def test_an_asset_with_a_handful_of_training_rows_takes_the_pooled_figures():
    few = np.concatenate([np.arange(0, 120), np.arange(200, 200 + standardize.MIN_ROWS - 1)])
    assert set(fitted(rows=few).mean) == {"AAA"}
    assert set(fitted(rows=np.append(few, 300)).mean) == {"AAA", "BBB"}


def test_json_gives_equal_numbers_back():
    scaling = fitted()
    back = Standardizer.from_json(json.loads(json.dumps(scaling.to_json())))
    np.testing.assert_array_equal(back.apply(FEATURES, IDS, ASSETS), scaling.apply(FEATURES, IDS, ASSETS))
    assert back.to_json() == scaling.to_json()


def drift_of(features, *, validation=VALIDATION) -> dict[str, standardize.Drift]:
    lines = standardize.measure_drift(features, IDS, train=TRAIN, validation=validation, names=("a", "b", "c"))
    return {line.feature: line for line in lines}


def test_no_drift_where_there_is_none():
    assert not any(line.left_the_range for line in drift_of(FEATURES).values())


def test_a_mean_that_moved_and_values_beyond_the_training_range_are_flagged():
    features = FEATURES.copy()
    features[VALIDATION, 0] += 1.5 * FEATURES[TRAIN, 0].std() * 2  # a move within the pooled range of both assets
    features[VALIDATION[::10], 1] = 1e3
    lines = drift_of(features)
    assert lines["a"].left_the_range and lines["a"].shift > standardize.SHIFT
    assert lines["b"].left_the_range and lines["b"].outside == pytest.approx(0.1, abs=0.02)
    assert not lines["c"].left_the_range


def test_assets_of_other_levels_are_no_drift():
    """BBB has twice AAA's level; with more of BBB in validation the pooled mean moves, no asset's does."""
    few = np.concatenate([np.arange(120, 130), np.arange(320, 400)])
    lines = drift_of(FEATURES, validation=few)
    assert abs(lines["a"].validation_mean - lines["a"].train_mean) > 0.3
    assert all(abs(line.shift) < 0.5 and line.outside < 0.05 for line in lines.values())
