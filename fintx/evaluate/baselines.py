"""Baselines: what a model must beat, forecast from labels, volatility, touch probabilities and the last bar's features.

Each is one `Recipe` in `BASELINES`: words, inputs and fit. `for_dataset` fits them on a fold's training rows and scores
them on its validation rows.
"""

from __future__ import annotations

import datetime
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fintx import tasks
from fintx.config.schema import TaskConfig
from fintx.data import features
from fintx.data.bars import Bars
from fintx.data.datasets import Dataset
from fintx.evaluate import metrics
from fintx.evaluate.metrics import Metrics
from fintx.tasks import Prediction, Task, Threshold
from fintx.types import Floats, Ints

# Every command imports this module and few fit baselines: scikit-learn, SciPy and arch take seconds to load, and are
# imported where they are used.

VERSION = 2
"""Of all baselines: kept forecasts of another version are fitted anew."""

VOLATILITIES = ("realized_vol_5", "realized_vol_21", "realized_vol_63")
"""A week, a month and a quarter: the cascade of horizons of HAR models (Corsi 2009)."""
RETURNS = ("log_return_1", "log_return_5", "log_return_21")
"""The same cascade, of returns."""
TRADING_DAYS = 252
"""A year's, which VIX annualises over."""
_CLIP = 1e-6
"""Distance of probabilities from 0 and 1."""

Fit = Callable[[Floats, Floats, Floats], Floats]
"""(training inputs (S, K), labels (S,), validation inputs (S', K)) → outputs (S',) float64.

Inputs are finite, labels of both classes: logits come out of labels of 0 or 1, values of values.
"""


@dataclass(frozen=True, eq=False)
class Baseline:
    """A forecaster's outputs on the validation rows, and their metrics."""

    name: str
    words: str
    outputs: Floats
    """(S,) float32 logits, or values."""
    metrics: Metrics


def for_dataset(
    dataset: Dataset,
    task: TaskConfig,
    bars: Mapping[str, Bars],
    context: Mapping[str, Bars],
    *,
    pause: Callable[[], None] = lambda: None,
) -> tuple[Baseline, ...]:
    """All baselines of a fold, the prior first.

    Each learns from the training rows alone and forecasts a validation row from what is known at its close. Volatility
    is VIX where the context holds it, else the assets' own realised volatilities; one model serves all assets. Every
    row gets a forecast: where an input is missing (VIX on that day, a warm-up), that of the next best input, at last
    the prior.

    Args:
        dataset: one fold; its training rows fit, its validation rows score.
        bars: of its assets, by symbol; later days than the dataset's are ignored.
        context: of the context symbols.
        pause: called before each fit; an exception that it raises ends the fits.

    Raises:
        ValueError: a classification fold whose training labels are all alike; bars without the dataset's days.
    """
    import sklearn.ensemble  # type: ignore[import-untyped]  # noqa: F401  (only what is loaded can be limited)
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    prior = float(np.mean(dataset.train.labels, dtype=np.float64))
    constant = metrics.prior_output(task.predicts, prior)
    inputs = BaselineInputs.build(dataset, task.rule, bars, context)
    baselines = []
    # A few thousand rows don't pay for several threads, which wait long for one another beside a busy process: 22 folds
    # of SPY took 42 s by one thread or by two, but 250 s by two beside another process.
    with threadpool_limits(limits=1):
        for name, recipe in BASELINES[task.predicts].items():
            if not recipe.applies(inputs):
                continue
            pause()
            words, outputs = _forecast(recipe, inputs, constant)
            scores = metrics.evaluate(task.predicts, outputs, dataset.validation.labels, prior=prior)
            baselines.append(Baseline(name, words, outputs, scores))
    return tuple(baselines)


def _forecast(recipe: Recipe, inputs: BaselineInputs, constant: np.float32) -> tuple[str, Floats]:
    """Words and (S',) outputs: from the first input where it is known, else from the next, at last the constant."""
    train, validation = inputs.dataset.train, inputs.dataset.validation
    outputs = np.full(len(validation.rows), constant, np.float64)
    available = [(entry.words, values) for entry in recipe.inputs if (values := entry.values(inputs)) is not None]
    for _, values in reversed(available):  # a better input overwrites a worse one
        is_known = np.isfinite(values).all(axis=1)
        can_fit, can_predict = is_known[train.rows], is_known[validation.rows]
        to_predict = values[validation.rows[can_predict]]
        if recipe.fit is None:
            outputs[can_predict] = to_predict[:, 0]
        elif can_predict.any() and can_fit.any() and np.ptp(train.labels[can_fit]) > 0:
            fit = recipe.fit(inputs.task)
            outputs[can_predict] = fit(values[train.rows[can_fit]], train.labels[can_fit], to_predict)
    # float32, as models' outputs are kept: a baseline scored again from disk has the same figures.
    return recipe.words.format(available[0][0] if available else ""), outputs.astype(np.float32)


# --- inputs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BaselineInputs:
    """What is known at each row's close, as (rows, K) columns that baselines look at."""

    dataset: Dataset
    task: Task
    bars: Mapping[str, Bars]
    """Of the assets, cut off after the dataset's last day."""
    context: Mapping[str, Bars]
    places: tuple[tuple[Ints, Ints], ...]
    """Per asset: its rows, and their places among its bars."""

    @staticmethod
    def build(dataset: Dataset, task: Task, bars: Mapping[str, Bars], context: Mapping[str, Bars]) -> BaselineInputs:
        """Raises ValueError: bars without the dataset's days."""
        last = dataset.dates.max().astype(datetime.date)
        past = {symbol: bars[symbol].between(None, last) for symbol in dataset.assets}
        places = []
        for index, (symbol, asset_bars) in enumerate(past.items()):
            rows = np.flatnonzero(dataset.asset_ids == index)
            days, row_days = asset_bars.dates, dataset.dates[rows]
            place = np.minimum(np.searchsorted(days, row_days), len(days) - 1)
            if len(missing := row_days[days[place] != row_days]):
                raise ValueError(
                    f"{symbol}: the bars lack {len(missing)} days of the dataset, the first is {missing[0]}"
                )
            places.append((rows, place))
        return BaselineInputs(dataset, task, past, context, tuple(places))

    def features(self, names: Sequence[str]) -> Floats:
        """(rows, K) features by name; NaN in their warm-up."""
        return self._by_asset(lambda bars: features.compute(tuple(names), bars, self.context))

    @functools.cached_property
    def vix(self) -> Floats | None:
        """(rows, 1) ln VIX; None: the context doesn't hold it."""
        return self.features(("vix_log",)) if features.VIX in self.context else None

    @functools.cached_property
    def volatilities(self) -> Floats:
        """(rows, 3) ln realised volatility per day."""
        # Of a price that stands still for a week it is 0, whose logarithm is infinite.
        return np.log(np.maximum(self.features(VOLATILITIES), 1e-4))

    def vix_and_volatilities(self) -> Floats | None:
        """(rows, 4)."""
        return None if self.vix is None else np.concatenate([self.vix, self.volatilities], axis=1)

    def implied_sd(self) -> Floats | None:
        """(rows, 1) SD of the log return over the horizon, by VIX."""
        return None if self.vix is None else np.exp(self.vix) / 100 * np.sqrt(self.task.horizon / TRADING_DAYS)

    def realised_sd(self) -> Floats:
        """(rows, 1) the same, by the realised volatility of 21 days."""
        return np.exp(self.volatilities[:, 1:2]) * np.sqrt(self.task.horizon)

    def garch_sd(self) -> Floats:
        """(rows, 1) the same, by a GARCH model fitted per asset to the closes of the training days."""
        last = self.dataset.dates[self.dataset.train.rows].max()

        def forecast(bars: Bars) -> Floats:
            n_train = int(np.searchsorted(bars.dates, last, side="right"))
            return garch_sd(bars.close, n_train=n_train, horizon=self.task.horizon)[:, None]

        return self._by_asset(forecast)

    def climatology(self) -> Floats:
        """(rows, 1) logit of the base rate of all labels that are known by then, of all bars."""
        labels = np.concatenate([tasks.labels(self.task, bars) for bars in self.bars.values()])
        ends = np.concatenate([tasks.label_ends(self.task, bars) for bars in self.bars.values()])
        rate = climatology(labels, ends, self.dataset.dates)[:, None]
        with np.errstate(divide="ignore"):
            return np.log(rate) - np.log1p(-rate)

    def last_label(self) -> Floats:
        """(rows, 1): the last known label of the same asset, h bars old."""

        def shifted(bars: Bars) -> Floats:
            labels = tasks.labels(self.task, bars)
            return np.concatenate([np.full(self.task.horizon, np.nan), labels])[: len(labels), None]

        return self._by_asset(shifted)

    def _by_asset(self, compute: Callable[[Bars], Floats]) -> Floats:
        """(rows, K) from a function of an asset's bars to (bars, K)."""
        columns = [compute(bars) for bars in self.bars.values()]
        values = np.full((len(self.dataset.dates), columns[0].shape[1]), np.nan)
        for (rows, place), column in zip(self.places, columns, strict=True):
            values[rows] = column[place]
        return values


# --- from labels alone ------------------------------------------------------------------------------------------------


def climatology(labels: Floats, known_from: np.ndarray, days: np.ndarray) -> Floats:
    """An expanding base rate: the mean of all labels that are known by a day, over all assets.

    Args:
        labels: (N,) of any days.
        known_from: (N,) datetime64[D]: when each label's last bar closed, h bars later; NaT: never.
        days: (S,) datetime64[D] of the forecasts.

    Returns:
        (S,) float64; NaN before any label is known.
    """
    has_end = ~np.isnat(known_from)
    labels, known_from = labels[has_end], known_from[has_end]
    order = np.argsort(known_from, kind="stable")
    sums = np.concatenate([[0.0], np.cumsum(labels[order], dtype=np.float64)])
    count = np.searchsorted(known_from[order], days, side="right")
    return np.divide(sums[count], count, out=np.full(len(days), np.nan), where=count > 0)


def persistence(train: Floats, labels: Floats, validation: Floats) -> Floats:
    """Logits of P(label | last known label), both frequencies from training, with half a case added to each class."""
    last = train[:, 0]
    rates = [(labels[last == value].sum() + 0.5) / ((last == value).sum() + 1) for value in (0, 1)]
    probability = np.where(validation[:, 0] > 0.5, rates[1], rates[0])
    return np.log(probability) - np.log1p(-probability)


# --- fitted models ----------------------------------------------------------------------------------------------------


def volatility_logistic(train: Floats, labels: Floats, validation: Floats) -> Floats:
    """Logits of a logistic regression on standardised inputs; deterministic."""
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    inputs, to_predict = _standardised(train, validation)
    # C = 1 is next to no penalty for thousands of rows, and still fits few separable ones.
    model = LogisticRegression(C=1.0, tol=1e-8, max_iter=1000)
    return model.fit(inputs, labels > 0.5).decision_function(to_predict)


def volatility_linear(train: Floats, targets: Floats, validation: Floats) -> Floats:
    """Least-squares forecast from standardised inputs."""
    inputs, to_predict = _standardised(train, validation)
    targets = np.asarray(targets, np.float64)
    slopes = np.linalg.lstsq(inputs, targets - targets.mean())[0]
    return to_predict @ slopes + targets.mean()


def _standardised(train: Floats, validation: Floats) -> tuple[Floats, Floats]:
    """Both on the scale where training inputs have mean 0 and SD 1; a constant input becomes 0."""
    mean, std = train.mean(axis=0), train.std(axis=0)
    std = np.where(std > 1e-12 * np.abs(mean), std, 1.0)
    return (train - mean) / std, (validation - mean) / std


def bar_logistic(train: Floats, labels: Floats, validation: Floats) -> Floats:
    """Logits of an L2-penalised logistic regression on the last bar's features, which are standardised already."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=0.01, tol=1e-6, max_iter=1000).fit(train, labels > 0.5).decision_function(validation)


def bar_boosting(train: Floats, labels: Floats, validation: Floats) -> Floats:
    """Logits of gradient boosted trees (scikit-learn's histogram boosting)."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    model = HistGradientBoostingClassifier(
        max_iter=150, learning_rate=0.03, max_leaf_nodes=8, min_samples_leaf=100, l2_regularization=1.0,
        early_stopping=False, random_state=0,
    )  # fmt: skip
    return model.fit(train, labels > 0.5).decision_function(validation)


def bar_mlp(train: Floats, labels: Floats, validation: Floats) -> Floats:
    """Logits of the mean probability of five networks with one layer of 32 units."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    total, n_seeds = np.zeros(len(validation)), 5
    for seed in range(n_seeds):
        model = MLPClassifier(
            (32,), alpha=0.01, batch_size=min(256, len(train)), learning_rate_init=1e-3, max_iter=20, random_state=seed
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # twenty epochs are the setting, not a failure
            model.fit(train, labels > 0.5)
        total += model.predict_proba(validation)[:, 1]
    probability = np.clip(total / n_seeds, _CLIP, 1 - _CLIP)
    return np.log(probability) - np.log1p(-probability)


# --- touch probabilities ----------------------------------------------------------------------------------------------
# A driftless diffusion with s the forecast SD of the log return over the h days, and one fitted scale k (Karatzas &
# Shreve 1991, Brownian Motion and Stochastic Calculus, § 2.8):
#     price high:  P(max ≥ (1 + θ) · close) = 2 · (1 − Φ(ln(1 + θ) / (k · s)))      θ > 0, the reflection principle
#     price close: P(close[t+h] ≥ (1 + θ) · close) = 1 − Φ(ln(1 + θ) / (k · s))
# k takes up that implied volatility exceeds what follows, that prices are observed once a day, and fat tails.


def touch_applies(level: Threshold | None) -> bool:
    """Whether the formula has an answer: a level other than the close itself, and for highs one above it."""
    return level is not None and (level.threshold > 0 or (level.price == "close" and level.threshold != 0))


def touch(level: Threshold, train: Floats, labels: Floats, validation: Floats) -> Floats:
    """Logits of the touch probability, k fitted by the mean log loss of the training rows.

    Inputs are forecast SDs of the log return over the horizon, positive; in any one unit, which k takes up.
    """
    from scipy import optimize

    sd = train[:, 0]

    def loss(log_k: float) -> float:
        outputs = touch_logits(level, math.exp(log_k) * sd)
        return float(metrics.per_sample_loss("probability", outputs, labels).mean())

    typical_sd = abs(math.log1p(level.threshold))  # where neither outcome is certain
    bounds = [math.log(k * typical_sd / float(np.median(sd))) for k in (0.01, 40.0)]
    best = optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return touch_logits(level, math.exp(best.x) * validation[:, 0])


def touch_logits(level: Threshold, sd: Floats) -> Floats:
    """(S,) the formula, for (S,) sd = k · s."""
    from scipy.special import ndtr

    tail = ndtr(-math.log1p(level.threshold) / np.maximum(sd, 1e-9))
    probability = np.clip(2 * tail if level.price == "high" else tail, _CLIP, 1 - _CLIP)
    return np.log(probability) - np.log1p(-probability)


def garch_sd(close: Floats, *, n_train: int, horizon: int) -> Floats:
    """Forecast SD of each day's next `horizon` log returns by a GJR-GARCH(1, 1) (Glosten, Jagannathan & Runkle 1993).

    σ²[t+1] = ω + (α + γ·[e[t] < 0]) · e[t]² + β · σ²[t], fitted by `arch` to the first `n_train` closes with normal
    errors; later days only run through the recursion. E σ² further ahead follows from symmetric errors.

    Returns:
        (T,) float64, known at each close; NaN throughout where there are too few returns, or the fit failed.
    """
    from arch import arch_model

    percent = 100 * np.diff(np.log(close))
    if n_train - 1 < 250 or np.ptp(percent[: n_train - 1]) == 0:  # less than a year, or a price that never moved
        return np.full(len(close), np.nan)
    model = arch_model(percent[: n_train - 1], mean="Constant", vol="GARCH", p=1, o=1, q=1, rescale=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about convergence, which is checked below
        result = model.fit(disp="off", show_warning=False)
    mu, omega, alpha, gamma, beta = (float(value) for value in result.params)
    decay = alpha + gamma / 2 + beta
    if result.convergence_flag != 0 or not 0 <= decay < 1:
        return np.full(len(close), np.nan)
    variance = np.empty(len(close))  # σ² of the next day, known at each close
    variance[0] = np.var(percent[: n_train - 1])
    for t, shock in enumerate(percent - mu, start=1):
        variance[t] = omega + (alpha + gamma * (shock < 0)) * shock**2 + beta * variance[t - 1]
    total, ahead = np.zeros(len(close)), variance
    for _ in range(horizon):
        total, ahead = total + ahead, omega + decay * ahead
    return np.sqrt(total) / 100


# --- the baselines ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Input:
    """What a baseline looks at."""

    words: str
    values: Callable[[BaselineInputs], Floats | None]
    """(rows, K); NaN where it is not known. None: the study's context doesn't hold it."""


@dataclass(frozen=True)
class Recipe:
    """How a baseline forecasts."""

    words: str
    """{} stands for the words of the first available input."""
    inputs: tuple[Input, ...] = ()
    """The best first; a row that lacks it is forecast from the next, at last by the prior."""
    fit: Callable[[Task], Fit] | None = None
    """None: nothing is fitted, the input is the forecast."""
    applies: Callable[[BaselineInputs], bool] = lambda inputs: True
    """Whether the baseline can be fitted at all; else it is left out."""


def _fit_touch(task: Task) -> Fit:
    assert task.level is not None
    return functools.partial(touch, task.level)


_REALISED = "ln realised volatility of 5, 21 and 63 days"
_VOLATILITY = (Input("ln VIX", lambda inputs: inputs.vix), Input(_REALISED, lambda inputs: inputs.volatilities))
_REALISED_SD = Input("21-day volatility", BaselineInputs.realised_sd)
_LAST_BAR = (Input("the last bar's features", lambda inputs: inputs.dataset.features.astype(np.float64)),)

BASELINES: dict[Prediction, dict[str, Recipe]] = {
    "probability": {
        "prior": Recipe("the base rate in training"),
        "climatology": Recipe(
            "the base rate of all labels known by then", (Input("labels known by then", BaselineInputs.climatology),)
        ),
        "last_label": Recipe(
            "how often a 1 followed the last known label, 0 or 1, in training",
            (Input("the last known label", BaselineInputs.last_label),),
            lambda _: persistence,
        ),
        "volatility_logistic": Recipe("logistic regression on {}", _VOLATILITY, lambda _: volatility_logistic),
        "vix_har_logistic": Recipe(
            "logistic regression on {}",
            (Input(f"ln VIX and {_REALISED}", BaselineInputs.vix_and_volatilities), *_VOLATILITY),
            lambda _: volatility_logistic,
            applies=lambda inputs: inputs.vix is not None,
        ),
        "volatility_touch": Recipe(
            "chance that a driftless diffusion of k × {} touches the level",
            (Input("VIX", BaselineInputs.implied_sd), _REALISED_SD),
            _fit_touch,
            applies=lambda inputs: touch_applies(inputs.task.level),
        ),
        "garch_touch": Recipe(
            "chance that a driftless diffusion of k × {} touches the level",
            (Input("the SD forecast by a GJR-GARCH(1, 1)", BaselineInputs.garch_sd), _REALISED_SD),
            _fit_touch,
            applies=lambda inputs: touch_applies(inputs.task.level),
        ),
        "bar_logistic": Recipe("L2 logistic regression on {}", _LAST_BAR, lambda _: bar_logistic),
        "bar_boosting": Recipe("gradient boosted trees on {}", _LAST_BAR, lambda _: bar_boosting),
        "bar_mlp": Recipe("five small networks on {}", _LAST_BAR, lambda _: bar_mlp),
    },
    "value": {
        "prior": Recipe("the mean training return"),
        "zero": Recipe("no move", (Input("nothing", lambda inputs: np.zeros((len(inputs.dataset.dates), 1))),)),
        "har_linear": Recipe(
            "linear regression on {}",
            (Input("the log return of the last 1, 5 and 21 days", lambda inputs: inputs.features(RETURNS)),),
            lambda _: volatility_linear,
        ),
        "volatility_linear": Recipe("linear regression on {}", _VOLATILITY, lambda _: volatility_linear),
    },
}
"""By what is predicted, in the order in which they are shown. If you add one, raise VERSION."""
