"""Standardization: the scale of a model's inputs, fitted per asset on training rows; and their drift since."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fintx.types import Floats, Ints

MIN_ROWS = 30
"""An asset with fewer training rows takes the pooled figures: the SD of a handful of rows may be next to nothing."""

OUTSIDE_SHARE, SHIFT = 0.05, 1.0
"""More than this share of validation rows beyond the training range, or a mean that moved by more training SDs."""


@dataclass(frozen=True, eq=False)
class Standardizer:
    """Per asset: what is subtracted from, and divides, each feature."""

    mean: dict[str, Floats]
    std: dict[str, Floats]
    """symbol → (F,) float64."""
    pooled_mean: Floats
    pooled_std: Floats
    """(F,) over all training rows: for a symbol that was not trained on."""

    def apply(self, features: Floats, asset_ids: Ints, assets: Sequence[str]) -> Floats:
        """Scale (rows, F) raw features to float32; rows that lack a feature become 0: no window touches them."""
        mean = np.stack([self.mean.get(symbol, self.pooled_mean) for symbol in assets])
        std = np.stack([self.std.get(symbol, self.pooled_std) for symbol in assets])
        scaled = (features - mean[asset_ids]) / std[asset_ids]
        whole = np.isfinite(scaled).all(axis=1)
        return np.where(whole[:, None], scaled, 0.0).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        """As plain lists; `from_json` gives equal numbers back."""
        return {
            "mean": {symbol: values.tolist() for symbol, values in self.mean.items()},
            "std": {symbol: values.tolist() for symbol, values in self.std.items()},
            "pooled_mean": self.pooled_mean.tolist(),
            "pooled_std": self.pooled_std.tolist(),
        }

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Standardizer:
        """The inverse of `to_json`."""
        mean, std = ({symbol: np.asarray(v) for symbol, v in fields[name].items()} for name in ("mean", "std"))
        return Standardizer(mean, std, np.asarray(fields["pooled_mean"]), np.asarray(fields["pooled_std"]))


def fit_standardizer(
    features: Floats, asset_ids: Ints, assets: Sequence[str], rows: np.ndarray, *, kind: Literal["standardize", "none"]
) -> Standardizer:
    """Mean and SD of the training rows, per asset and pooled; a constant feature is divided by 1.

    Args:
        features: (all rows, F) float64, raw.
        rows: the training rows; an asset with fewer than MIN_ROWS of them takes the pooled figures.
    """
    if kind == "none" or len(rows) == 0:
        zero, one = np.zeros(features.shape[1]), np.ones(features.shape[1])
        return Standardizer(dict.fromkeys(assets, zero), dict.fromkeys(assets, one), zero, one)
    mean, std = {}, {}
    for i, symbol in enumerate(assets):
        own = rows[asset_ids[rows] == i]
        if len(own) >= min(MIN_ROWS, len(rows)):
            mean[symbol], std[symbol] = _moments(features[own])
    return Standardizer(mean, std, *_moments(features[rows]))


def _moments(values: Floats) -> tuple[Floats, Floats]:
    std = values.std(axis=0)
    # Rounding leaves a constant an SD of about 1e-16 of its size: dividing by that would blow noise up to signal.
    constant = std <= 1e-12 * np.maximum(np.abs(values).max(axis=0), 1e-300)
    return values.mean(axis=0), np.where(constant, 1.0, std)


@dataclass(frozen=True)
class Drift:
    """How far one feature has moved from training to validation."""

    feature: str
    train_mean: float
    train_std: float
    validation_mean: float
    validation_std: float
    shift: float
    """Move of the mean, in training SDs, averaged over assets."""
    outside: float
    """Share of validation rows beyond the training minimum or maximum of their asset."""

    @property
    def left_the_range(self) -> bool:
        """Whether validation inputs lie where training had none or few."""
        return self.outside > OUTSIDE_SHARE or abs(self.shift) > SHIFT


def measure_drift(
    features: Floats, asset_ids: Ints, *, train: Ints, validation: Ints, names: Sequence[str]
) -> tuple[Drift, ...]:
    """Compare raw features of the train and the validation rows, within each asset."""
    if len(train) == 0 or len(validation) == 0:
        return ()
    shift, outside = np.zeros((2, features.shape[1]))
    for i in np.unique(asset_ids):
        before, after = (features[rows[asset_ids[rows] == i]] for rows in (train, validation))
        if len(before) and len(after):
            mean, std = _moments(before)
            shift += (after.mean(axis=0) - mean) / std * len(after) / len(validation)
            outside += ((after < before.min(axis=0)) | (after > before.max(axis=0))).sum(axis=0) / len(validation)
    before, after = features[train], features[validation]
    return tuple(
        Drift(
            feature=name,
            train_mean=float(before[:, i].mean()),
            train_std=float(before[:, i].std()),
            validation_mean=float(after[:, i].mean()),
            validation_std=float(after[:, i].std()),
            shift=float(shift[i]),
            outside=float(outside[i]),
        )
        for i, name in enumerate(names)
    )
