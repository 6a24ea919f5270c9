"""A trial small enough to compile in two seconds; every test that can uses this one, so that it compiles once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import jax
import numpy as np
import pytest

from fintx.config.schema import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    Shape,
    SplitConfig,
    TaskConfig,
    TrainConfig,
    TrialConfig,
)
from fintx.data.datasets import Dataset, Part
from fintx.data.standardize import Standardizer

FEATURES = ("close_return_1", "range_1", "volume_ratio_20")
BASE: dict[str, Any] = {
    "model.context_length": 12,
    "model.patch_length": 4,
    "model.stride": 4,
    "optim.learning_rate": 3e-3,
    "train.batch_size": 16,
    "train.max_epochs": 3,
}


def trial(changes: dict[str, Any] | None = None) -> TrialConfig:
    """The small trial, with values changed by dotted path ("optim.learning_rate", "shape.d_ff", "seed", "task")."""
    values = BASE | (changes or {})
    sections: dict[str, dict[str, Any]] = {"model": {}, "optim": {}, "train": {}, "shape": {}}
    for path, value in values.items():
        section, _, key = path.partition(".")
        if key:
            sections[section][key] = value
    return TrialConfig(
        data=DataConfig(features=FEATURES),
        task=values.get("task", TaskConfig(kind="threshold", horizon=1, price="high", threshold=0.01)),
        split=SplitConfig(kind="fractions", train=0.6, validation=0.3),
        shape=Shape(**({"d_model": 8, "n_layers": 2, "n_heads": 2, "d_ff": 16} | sections["shape"])),
        model=ModelConfig(**sections["model"]),
        optim=OptimConfig(**sections["optim"]),
        train=TrainConfig(**sections["train"]),
        seed=values.get("seed", 0),
    )


def dataset(
    *, kind: str = "threshold", n_train: int = 75, n_validation: int = 40, seed: int = 0, learnable: bool = True
) -> Dataset:
    """Noise, and labels that are the sign (regression: a hundredth) of the newest bar's first feature, or chance."""
    rng = np.random.default_rng(seed)
    n_rows = 30 + n_train + n_validation
    features = rng.standard_normal((n_rows, len(FEATURES))).astype(np.float32)
    signal = features[:, 0] if learnable else rng.standard_normal(n_rows).astype(np.float32)
    labels = 0.01 * signal + 0.002 if kind == "regression" else (signal > 0.3)
    rows = np.arange(20, 20 + n_train + n_validation, dtype=np.int32)
    train, validation = rows[:n_train], rows[n_train:]
    return Dataset(
        features=features,
        feature_names=FEATURES,
        dates=np.datetime64("2001-01-01", "D") + np.arange(n_rows),
        asset_ids=np.zeros(n_rows, np.int32),
        assets=("SPX",),
        close=np.ones(n_rows),
        train=Part(rows=train, labels=labels[train].astype(np.float32)),
        validation=Part(rows=validation, labels=labels[validation].astype(np.float32)),
        scaling=Standardizer(mean={}, std={}, pooled_mean=np.zeros(3), pooled_std=np.ones(3)),
        data_hash="",
        label_hash="",
        split_hash="",
    )


@pytest.fixture(scope="session")
def make_trial() -> Callable[..., TrialConfig]:
    """`trial` above."""
    return trial


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., Dataset]:
    """`dataset` above."""
    return dataset


@contextmanager
def _compilations() -> Iterator[list[str]]:
    seen: list[str] = []

    def listen(event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="session")
def compilations() -> Callable[[], AbstractContextManager[list[str]]]:
    """What XLA compiles meanwhile: `with compilations() as seen`."""
    return _compilations
