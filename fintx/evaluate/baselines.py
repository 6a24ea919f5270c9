"""What do labels alone foretell: how often it happened so far, and whether it happened the last time?

A label of horizon h is known h bars later; until then it teaches nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fintx import tasks
from fintx.config.schema import TaskConfig
from fintx.data import features
from fintx.data.bars import Bars
from fintx.data.datasets import Dataset
from fintx.evaluate import metrics, touch
from fintx.evaluate.metrics import Metrics
from fintx.tasks import Prediction, Task
from fintx.types import Floats, Ints


def climatology(labels: Floats, known: np.ndarray, asked: np.ndarray) -> Floats:
    """The mean of all labels that are known by then, over all assets: an expanding base rate.

    Args:
        labels: (N,) of any days.
        known: (N,) datetime64[D]: when each label's last bar closed; NaT: never.
        asked: (S,) datetime64[D].

    Returns:
        (S,) float64; NaN before any label is known.
    """
    certain = ~np.isnat(known)
    labels, known = labels[certain], known[certain]
    order = np.argsort(known, kind="stable")
    so_far = np.concatenate([[0.0], np.cumsum(labels[order], dtype=np.float64)])
    count = np.searchsorted(known[order], asked, side="right")
    return np.divide(so_far[count], count, out=np.full(len(asked), np.nan), where=count > 0)


def persistence(last_train: Floats, labels: Floats, last_validation: Floats) -> Floats:
    """P(label | the last label that is known), both frequencies from training, with half a case added to each side.

    Args:
        last_train: (S,) 0 or 1: the last known label of the same asset.
        labels: (S,) 0 or 1.
        last_validation: (S',) 0 or 1.

    Returns:
        (S',) float64 logits.
    """
    rates = [(labels[last_train == value].sum() + 0.5) / ((last_train == value).sum() + 1) for value in (0, 1)]
    probability = np.where(last_validation > 0.5, rates[1], rates[0])
    return np.log(probability) - np.log1p(-probability)


BAR_LOGISTIC_C = 0.01
"""Inverse L2 penalty on inputs of unit variance."""
MLP_SEEDS = 5


def logistic(train: Floats, labels: Floats, validation: Floats) -> Floats:
    """Logits of an L2-penalised logistic regression.

    Args:
        train: (S, F) scaled features of the decision bar.
        labels: (S,) 0 or 1; both classes present.
        validation: (S', F).

    Returns:
        (S',) float64.
    """
    from sklearn.linear_model import LogisticRegression

    return (
        LogisticRegression(C=BAR_LOGISTIC_C, tol=1e-6, max_iter=1000)
        .fit(train, labels > 0.5)
        .decision_function(validation)
    )


def boosting(train: Floats, labels: Floats, validation: Floats) -> Floats:
    """Logits of gradient boosted trees (scikit-learn's histogram boosting); arguments and result as in `logistic`."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    model = HistGradientBoostingClassifier(
        max_iter=150, learning_rate=0.03, max_leaf_nodes=8, min_samples_leaf=100, l2_regularization=1.0,
        early_stopping=False, random_state=0,
    )  # fmt: skip
    return model.fit(train, labels > 0.5).decision_function(validation)


def mlp(train: Floats, labels: Floats, validation: Floats) -> Floats:
    """Logits of the mean probability of five networks with one layer of 32 units; else as `logistic`."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    total = np.zeros(len(validation))
    for seed in range(MLP_SEEDS):
        model = MLPClassifier(
            (32,), alpha=0.01, batch_size=min(256, len(train)), learning_rate_init=1e-3, max_iter=20, random_state=seed
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # twenty epochs are the setting, not a failure
            model.fit(train, labels > 0.5)
        total += model.predict_proba(validation)[:, 1]
    probability = np.clip(total / MLP_SEEDS, 1e-6, 1 - 1e-6)
    return np.log(probability) - np.log1p(-probability)


VERSION = 2
"""Of all that follows: kept forecasts of another version are not taken for these."""
VIX = ("vix_log",)
VOLATILITIES = ("realized_vol_5", "realized_vol_21", "realized_vol_63")
"""A week, a month and a quarter: the cascade of horizons of HAR models (Corsi 2009)."""
RETURNS = ("log_return_1", "log_return_5", "log_return_21")
"""The same cascade, of returns."""

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
    """All that a model must beat, the prior first.

    Each learns from the training rows alone and says of a validation row what is known at its close. Volatility is VIX
    where the context holds it, else the assets' own realised volatilities; one model serves all assets. Every row gets
    a forecast: where an input is missing (VIX on that day, a warm-up), that of the next best, at last the prior.

    Args:
        dataset: one fold; its training rows fit, its validation rows score.
        bars: of its assets, by symbol; as many as were used or more. Later ones are not looked at.
        context: of the context symbols.
        pause: called before each fit; what it raises ends them.

    Raises:
        ValueError: a classification fold whose training labels are all alike; bars without the dataset's days.
    """
    prior = float(np.mean(dataset.train.labels, dtype=np.float64))
    constant = metrics.prior_output(task.predicts, prior)
    known = Known.at(dataset, task.rule, bars, context)
    fitted = []
    with _one_thread():
        for name, recipe in BASELINES[task.predicts].items():
            if not recipe.applies(known):
                continue
            pause()
            words, outputs = _forecast(recipe, known, constant)
            scores = metrics.evaluate(task.predicts, outputs, dataset.validation.labels, prior=prior)
            fitted.append(Baseline(name, words, outputs, scores))
    return tuple(fitted)


def _forecast(recipe: Recipe, known: Known, constant: np.float32) -> tuple[str, Floats]:
    """Words and (S',) outputs: from the first input where it is known, else from the next, at last the constant."""
    train, validation = known.dataset.train, known.dataset.validation
    outputs = np.full(len(validation.rows), constant, np.float64)
    there = [(each.words, values) for each in recipe.inputs if (values := each.values(known)) is not None]
    for _, values in reversed(there):  # a better input overwrites a worse one
        finite = np.isfinite(values).all(axis=1)
        learn, say = finite[train.rows], finite[validation.rows]
        to_predict = values[validation.rows[say]]
        if recipe.fit is None:
            outputs[say] = to_predict[:, 0]
        elif say.any() and learn.any() and np.ptp(train.labels[learn]) > 0:
            outputs[say] = recipe.fit(known.task)(values[train.rows[learn]], train.labels[learn], to_predict)
    # float32, as models' outputs are kept: a baseline scored again from disk has the same figures.
    return recipe.words.format(there[0][0] if there else ""), outputs.astype(np.float32)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Some thousand rows are no work to share out, and threads that wait for one another beside a busy process do it
    for long: 22 folds of SPY took 42 s by one thread or by two, but 250 s by two beside another process."""
    import sklearn.ensemble  # type: ignore[import-untyped]  # noqa: F401  (only what is loaded can be limited)
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(limits=1):
        yield


# --- inputs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Known:
    """What is known at each row's close."""

    dataset: Dataset
    task: Task
    bars: Mapping[str, Bars]
    """Of the assets, cut off after the dataset's last day."""
    context: Mapping[str, Bars]
    places: tuple[tuple[Ints, Ints], ...]
    """Per asset: its rows, and their places among its bars."""

    @staticmethod
    def at(dataset: Dataset, task: Task, bars: Mapping[str, Bars], context: Mapping[str, Bars]) -> Known:
        """Raises ValueError: bars without the dataset's days."""
        last = dataset.dates.max().astype(datetime.date)
        cut = {symbol: bars[symbol].between(None, last) for symbol in dataset.assets}
        places = tuple(_places(dataset, i, cut[symbol]) for i, symbol in enumerate(dataset.assets))
        return Known(dataset, task, cut, context, places)

    def inputs(self, names: Sequence[str]) -> Floats:
        """(rows, K) features by name; NaN in their warm-up."""
        return self._gather(lambda bars: features.compute(tuple(names), bars, self.context), len(names))

    @functools.cached_property
    def vix(self) -> Floats | None:
        """(rows, 1) ln VIX; none: the context doesn't hold it."""
        return self.inputs(VIX) if features.VIX in self.context else None

    @functools.cached_property
    def volatilities(self) -> Floats:
        """(rows, 3) ln realised volatility per day."""
        return np.log(np.maximum(self.inputs(VOLATILITIES), _LEAST_VOL))

    def implied_sd(self) -> Floats | None:
        """(rows, 1) SD of the log return over the horizon, by VIX."""
        if self.vix is None:
            return None
        return np.exp(self.vix) / 100 * np.sqrt(self.task.horizon / touch.TRADING_DAYS)

    def realised_sd(self) -> Floats:
        """(rows, 1) the same, by the realised volatility of 21 days."""
        return np.exp(self.volatilities[:, 1:2]) * np.sqrt(self.task.horizon)

    def garch_sd(self) -> Floats:
        """(rows, 1) the same, fitted per asset to its closes that training has seen."""
        last = self.dataset.dates[self.dataset.train.rows].max()

        def foreseen(bars: Bars) -> Floats:
            n_train = int(np.searchsorted(bars.dates, last, side="right"))
            return touch.garch_sd(bars.close, n_train=n_train, horizon=self.task.horizon)[:, None]

        return self._gather(foreseen, 1)

    def climatology(self) -> Floats:
        """(rows, 1) logit of the base rate of all labels that are known by then, of all bars."""
        each = self.bars.values()
        labels = np.concatenate([tasks.labels(self.task, bars) for bars in each])
        ends = np.concatenate([tasks.label_ends(self.task, bars) for bars in each])
        rate = climatology(labels, ends, self.dataset.dates)[:, None]
        with np.errstate(divide="ignore"):
            return np.log(rate) - np.log1p(-rate)

    def last_label(self) -> Floats:
        """(rows, 1): the last label of the same asset that is known, h bars old."""

        def shifted(bars: Bars) -> Floats:
            labels = tasks.labels(self.task, bars)
            return np.concatenate([np.full(self.task.horizon, np.nan), labels])[: len(labels), None]

        return self._gather(shifted, 1)

    def _gather(self, of: Callable[[Bars], Floats], width: int) -> Floats:
        found = np.full((len(self.dataset.dates), width), np.nan)
        for symbol, (own, place) in zip(self.dataset.assets, self.places, strict=True):
            found[own] = of(self.bars[symbol])[place]
        return found


def _places(dataset: Dataset, asset: int, bars: Bars) -> tuple[Ints, Ints]:
    own = np.flatnonzero(dataset.asset_ids == asset)
    days, wanted = bars.dates, dataset.dates[own]
    place = np.minimum(np.searchsorted(days, wanted), len(days) - 1)
    if not np.array_equal(days[place], wanted):
        missing = wanted[days[place] != wanted]
        raise ValueError(f"{bars.symbol}: the bars lack {len(missing)} days of the dataset, the first is {missing[0]}")
    return own, place


# --- models -----------------------------------------------------------------------------------------------------------


def volatility_logistic(train: Floats, answers: Floats, validation: Floats) -> Floats:
    """Logits of a logistic regression on standardised inputs (L2, C = 1); deterministic.

    Args:
        train: (S, K), finite.
        answers: (S,) 0 or 1; both classes present.
        validation: (S', K), finite.

    Returns:
        (S',) float64.
    """
    # Here, not above: every command imports this module, few fit baselines, and scikit-learn takes seconds to load.
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    inputs, to_predict = _standardised(train, validation)
    model = LogisticRegression(C=LOGISTIC_C, tol=1e-8, max_iter=1000)
    return model.fit(inputs, answers > 0.5).decision_function(to_predict)


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


# --- what there is ----------------------------------------------------------------------------------------------------

Fit = Callable[[Floats, Floats, Floats], Floats]
"""(training inputs (S, K), labels (S,), validation inputs (S', K)) → outputs (S',)."""


@dataclass(frozen=True)
class Input:
    """What a baseline looks at."""

    words: str
    values: Callable[[Known], Floats | None]
    """(rows, K); NaN where it is not known. None: the study's context doesn't hold it."""


@dataclass(frozen=True)
class Recipe:
    """How a baseline forecasts."""

    words: str
    """{} stands for the words of the first input that is there."""
    inputs: tuple[Input, ...] = ()
    """The best first; a row that lacks it is forecast from the next, at last by the prior."""
    fit: Callable[[Task], Fit] | None = None
    """None: nothing is fitted, the input is the forecast."""
    applies: Callable[[Known], bool] = lambda known: True
    """Whether it can say anything; else it is left out."""


def _with_vix(known: Known) -> Floats | None:
    return None if known.vix is None else np.concatenate([known.vix, known.volatilities], axis=1)


def _touchable(known: Known) -> bool:
    return touch.applies(known.task.level)


def _touch(task: Task) -> Fit:
    assert task.level is not None
    return _only(functools.partial(touch.fitted, task.level))


def _only(fit: Fit) -> Fit:
    """Of a model of one input, which takes it as (S,)."""
    return lambda train, labels, validation: fit(train[:, 0], labels, validation[:, 0])


_REALISED = "ln realised volatility of 5, 21 and 63 days"
_VOLATILITY = (Input("ln VIX", lambda known: known.vix), Input(_REALISED, lambda known: known.volatilities))
_REALISED_SD = Input("21-day volatility", Known.realised_sd)
_LAST_BAR = (Input("the last bar's features", lambda known: known.dataset.features.astype(np.float64)),)

BASELINES: dict[Prediction, dict[str, Recipe]] = {
    "probability": {
        "prior": Recipe("the base rate in training"),
        "climatology": Recipe(
            "the base rate of all labels known by then", (Input("labels known by then", Known.climatology),)
        ),
        "last_label": Recipe(
            "how often it comes after the last known label was 0, or 1",
            (Input("the last known label", Known.last_label),),
            lambda _: _only(persistence),
        ),
        "volatility_logistic": Recipe("logistic regression on {}", _VOLATILITY, lambda _: volatility_logistic),
        "vix_har_logistic": Recipe(
            "logistic regression on {}",
            (Input(f"ln VIX and {_REALISED}", _with_vix), *_VOLATILITY),
            lambda _: volatility_logistic,
            applies=lambda known: known.vix is not None,
        ),
        "volatility_touch": Recipe(
            "a level is touched by a driftless diffusion of k × {}",
            (Input("VIX", Known.implied_sd), _REALISED_SD),
            _touch,
            applies=_touchable,
        ),
        "garch_touch": Recipe(
            "the same, of k × {}",
            (Input("the SD that a GJR-GARCH(1, 1) foresees", Known.garch_sd), _REALISED_SD),
            _touch,
            applies=_touchable,
        ),
        "bar_logistic": Recipe("L2 logistic regression on {}", _LAST_BAR, lambda _: logistic),
        "bar_boosting": Recipe("gradient boosted trees on {}", _LAST_BAR, lambda _: boosting),
        "bar_mlp": Recipe("five small networks on {}", _LAST_BAR, lambda _: mlp),
    },
    "value": {
        "prior": Recipe("the mean training return"),
        "zero": Recipe("no move", (Input("nothing", lambda known: np.zeros((len(known.dataset.dates), 1))),)),
        "har_linear": Recipe(
            "linear regression on {}",
            (Input("the log return of the last 1, 5 and 21 days", lambda known: known.inputs(RETURNS)),),
            lambda _: volatility_linear,
        ),
        "volatility_linear": Recipe("linear regression on {}", _VOLATILITY, lambda _: volatility_linear),
    },
}
"""By what is predicted, in the order in which they are told. Whoever adds one raises VERSION."""
