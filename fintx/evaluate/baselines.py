"""What must a model beat? Small forecasters, fitted on the same training rows and scored on the very same validation
rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fintx.config import TaskConfig
from fintx.data import features
from fintx.data.bars import Bars
from fintx.data.windows import Dataset
from fintx.evaluate import metrics
from fintx.evaluate.metrics import Metrics
from fintx.types import Floats

VOLATILITIES = ("realized_vol_5", "realized_vol_21", "realized_vol_63")
"""A week, a month and a quarter: the cascade of horizons of HAR models (Corsi 2009)."""


@dataclass(frozen=True, eq=False)
class Baseline:
    """A forecaster's outputs on the validation rows, and their metrics."""

    name: str
    words: str
    outputs: Floats
    """(S,) float32 logits, or log returns for regression."""
    metrics: Metrics


def for_dataset(
    dataset: Dataset, task: TaskConfig, bars: Mapping[str, Bars], context: Mapping[str, Bars]
) -> tuple[Baseline, ...]:
    """The prior, and a forecast from volatility alone: ln VIX where the context has it, else realised volatilities.

    Args:
        dataset: one fold; its training rows fit, its validation rows score.
        bars: of its assets, by symbol; as many as were used or more.
    """
    train, validation = dataset.train, dataset.validation
    rate = float(np.mean(train.labels, dtype=np.float64))
    inputs, words = volatility_inputs(dataset, bars, context)
    n = len(validation.rows)
    if task.kind == "regression":
        forecasts = {
            "prior": ("the mean training return", np.full(n, rate)),
            "zero": ("no move", np.zeros(n)),
            "volatility_linear": (
                f"linear regression on {words}",
                _linear(inputs[train.rows], train.labels, inputs[validation.rows]),
            ),
        }
    else:
        forecasts = {
            "prior": ("the base rate in training", np.full(n, np.log(rate / (1 - rate)))),
            "volatility_logistic": (
                f"logistic regression on {words}",
                volatility_logistic(inputs[train.rows], train.labels, inputs[validation.rows]),
            ),
        }
    # float32, as models' outputs are kept: a baseline scored again from disk has the same figures.
    return tuple(
        Baseline(name, said, kept, metrics.evaluate(task.kind, kept, validation.labels, prior=rate))
        for name, (said, outputs) in forecasts.items()
        for kept in [outputs.astype(np.float32)]
    )


def volatility_inputs(
    dataset: Dataset, bars: Mapping[str, Bars], context: Mapping[str, Bars]
) -> tuple[Floats, str]:  # fmt: skip
    """The volatility known at each row's close.

    Returns:
        (rows, K) float64 aligned with the dataset's rows, and what it holds in words.
    """
    use_vix = features.VIX in context
    names = ("vix_log",) if use_vix else VOLATILITIES
    inputs = np.full((len(dataset.dates), len(names)), np.nan)
    for i, symbol in enumerate(dataset.assets):
        own = np.flatnonzero(dataset.asset_ids == i)
        values = features.compute(names, bars[symbol], context)
        inputs[own] = values[np.searchsorted(bars[symbol].dates, dataset.dates[own])]
    if use_vix:
        return inputs, "ln VIX"
    return np.log(np.maximum(inputs, 1e-6)), "ln realised volatility of 5, 21 and 63 days"


def volatility_logistic(train: Floats, labels: Floats, validation: Floats) -> Floats:
    """Logits of a logistic regression on standardised inputs, all but unpenalised (C = 10⁴).

    Args:
        train: (S, K).
        labels: (S,) 0 or 1; both classes present.
        validation: (S', K).
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1e4, max_iter=1000))
    model.fit(train, labels.astype(int))
    return model.decision_function(validation)


def _linear(train: Floats, targets: Floats, validation: Floats) -> Floats:
    model = make_pipeline(StandardScaler(), LinearRegression())
    model.fit(train, np.asarray(targets, np.float64))
    return model.predict(validation)
