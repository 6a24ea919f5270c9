"""What must a model beat? Small forecasters, fitted on the same training rows, scored on the same validation rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fintx.config import TaskConfig
from fintx.data import features
from fintx.data.bars import Bars
from fintx.data.windows import Dataset
from fintx.evaluate import metrics
from fintx.evaluate.metrics import Metrics
from fintx.types import Floats

VIX = ("vix_log",)
VOLATILITIES = ("realized_vol_5", "realized_vol_21", "realized_vol_63")
"""A week, a month and a quarter: the cascade of horizons of HAR models (Corsi 2009)."""

LOGISTIC_C = 1.0
"""Inverse L2 penalty on standardised inputs: next to none for thousands of rows, and few separable rows still fit."""

_LEAST_VOL = 1e-4
"""Per day. A price that stands still for a week has a realised volatility of 0, whose logarithm no line can take."""


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
    """The prior, and a forecast from volatility alone; for regression also "no move".

    Volatility is ln VIX where the context holds it, else the logarithms of the asset's own realised volatilities; one
    model serves all assets. Every validation row gets a forecast: a day without VIX that of the realised volatilities,
    and a day in their warm-up the prior.

    Args:
        dataset: one fold; its training rows fit, its validation rows score.
        bars: of its assets, by symbol; as many as were used or more. Inputs are causal, so that later bars are not
            seen.
        context: of the context symbols.

    Raises:
        ValueError: a classification fold whose training labels are all alike; bars without the dataset's days.
    """
    train, validation = dataset.train, dataset.validation
    prior = float(np.mean(train.labels, dtype=np.float64))
    constant: Floats = np.full(len(validation.rows), metrics.prior_output(task.kind, prior))
    choices = _volatility_choices(context)
    forecast = constant.astype(np.float64)
    for names in reversed(choices):  # a better choice overwrites a worse one where it is known
        _forecast_known(forecast, volatility_inputs(names, dataset, bars, context), dataset, task)
    said = "ln VIX" if choices[0] == VIX else "ln realised volatility of 5, 21 and 63 days"
    if task.kind == "regression":
        forecasts = [
            ("prior", "the mean training return", constant),
            ("zero", "no move", np.zeros_like(constant)),
            ("volatility_linear", f"linear regression on {said}", forecast),
        ]
    else:
        forecasts = [
            ("prior", "the base rate in training", constant),
            ("volatility_logistic", f"logistic regression on {said}", forecast),
        ]
    return tuple(_scored(name, words, outputs, dataset, task, prior) for name, words, outputs in forecasts)


def _forecast_known(forecast: Floats, inputs: Floats, dataset: Dataset, task: TaskConfig) -> None:
    """Fill in the validation rows whose inputs are known, if training has such rows to learn from."""
    known = np.isfinite(inputs).all(axis=1)
    train, validation = dataset.train, dataset.validation
    learn, say = known[train.rows], known[validation.rows]
    if say.any() and len(np.unique(train.labels[learn])) > 1:
        fit = volatility_linear if task.kind == "regression" else volatility_logistic
        forecast[say] = fit(inputs[train.rows[learn]], train.labels[learn], inputs[validation.rows[say]])


def _scored(name: str, words: str, outputs: Floats, dataset: Dataset, task: TaskConfig, prior: float) -> Baseline:
    # float32, as models' outputs are kept: a baseline scored again from disk has the same figures.
    kept = outputs.astype(np.float32)
    return Baseline(name, words, kept, metrics.evaluate(task.kind, kept, dataset.validation.labels, prior=prior))


# --- inputs -----------------------------------------------------------------------------------------------------------


def _volatility_choices(context: Mapping[str, Bars]) -> tuple[tuple[str, ...], ...]:
    """Names of inputs, the preferred ones first."""
    return (VIX, VOLATILITIES) if features.VIX in context else (VOLATILITIES,)


def volatility_inputs(
    names: Sequence[str], dataset: Dataset, bars: Mapping[str, Bars], context: Mapping[str, Bars]
) -> Floats:
    """Volatilities known at each row's close, in logarithms.

    Args:
        names: VIX or VOLATILITIES.

    Returns:
        (rows, K) float64 aligned with the dataset's rows; NaN in warm-up and where VIX is missing.

    Raises:
        ValueError: bars without the dataset's days.
    """
    inputs = np.full((len(dataset.dates), len(names)), np.nan)
    for i, symbol in enumerate(dataset.assets):
        own = np.flatnonzero(dataset.asset_ids == i)
        days, wanted = bars[symbol].dates, dataset.dates[own]
        place = np.minimum(np.searchsorted(days, wanted), len(days) - 1)
        if not np.array_equal(days[place], wanted):
            missing = wanted[days[place] != wanted]
            raise ValueError(f"{symbol}: the bars lack {len(missing)} days of the dataset, the first is {missing[0]}")
        inputs[own] = features.compute(tuple(names), bars[symbol], context)[place]
    if tuple(names) == VIX:
        return inputs
    return np.log(np.maximum(inputs, _LEAST_VOL))


# --- models -----------------------------------------------------------------------------------------------------------


def volatility_logistic(train: Floats, labels: Floats, validation: Floats) -> Floats:
    """Logits of a logistic regression on standardised inputs (L2, C = 1); deterministic.

    Args:
        train: (S, K), finite.
        labels: (S,) 0 or 1; both classes present.
        validation: (S', K), finite.

    Returns:
        (S',) float64.
    """
    # Here, not above: every command imports this module, few fit baselines, and scikit-learn takes seconds to load.
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    inputs, to_predict = _standardised(train, validation)
    model = LogisticRegression(C=LOGISTIC_C, tol=1e-8, max_iter=1000)
    return model.fit(inputs, labels > 0.5).decision_function(to_predict)


def volatility_linear(train: Floats, targets: Floats, validation: Floats) -> Floats:
    """Least-squares forecast from standardised inputs; arguments and result as in `volatility_logistic`."""
    inputs, to_predict = _standardised(train, validation)
    wanted = np.asarray(targets, np.float64)
    slopes = np.linalg.lstsq(inputs, wanted - wanted.mean())[0]
    return to_predict @ slopes + wanted.mean()


def _standardised(train: Floats, validation: Floats) -> tuple[Floats, Floats]:
    """Both on the scale where training inputs have mean 0 and SD 1; a constant input becomes 0."""
    mean, std = train.mean(axis=0), train.std(axis=0)
    std = np.where(std > 1e-12 * np.abs(mean), std, 1.0)
    return (train - mean) / std, (validation - mean) / std
