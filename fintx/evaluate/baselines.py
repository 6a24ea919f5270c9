"""What must a model beat? Small forecasters, fitted on the same training rows, scored on the same validation rows."""

from __future__ import annotations

import contextlib
import datetime
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fintx.config import TaskConfig
from fintx.data import features, labels
from fintx.data.bars import Bars
from fintx.data.windows import Dataset
from fintx.evaluate import history, lastbar, metrics, touch
from fintx.evaluate.metrics import Metrics
from fintx.types import Floats, Ints

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
    """(S,) float32 logits, or log returns for regression."""
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
    constant: Floats = np.full(len(dataset.validation.rows), metrics.prior_output(task.kind, prior))
    known = Known.at(dataset, bars, context)
    forecast = _Forecaster(dataset, constant, pause)
    with _one_thread():
        found = _of_returns(known, forecast) if task.kind == "regression" else _of_labels(known, forecast, task)
    return tuple(_scored(name, words, outputs, dataset, task, prior) for name, words, outputs in found)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Some thousand rows are no work to share out, and threads that wait for one another beside a busy process do it
    for long: 22 folds of SPY took 42 s by one thread or by two, but 250 s by two beside another process."""
    import sklearn.ensemble  # type: ignore[import-untyped]  # noqa: F401  (only what is loaded can be limited)
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(limits=1):
        yield


Said = list[tuple[str, str, Floats]]
"""Name, words, outputs."""


def _of_labels(known: Known, forecast: _Forecaster, task: TaskConfig) -> Said:
    """Probabilities, as logits."""
    vix, realised = known.vix, known.volatilities
    volatility = forecast(volatility_logistic, *([vix] if vix is not None else []), realised)
    said = "ln VIX" if vix is not None else "ln realised volatility of 5, 21 and 63 days"
    dataset = known.dataset
    rows = dataset.validation.rows
    cut, ends = known.labels(task)
    rate = history.climatology(cut, ends, dataset.dates[rows])
    with np.errstate(divide="ignore"):
        climate = np.log(rate) - np.log1p(-rate)
    found = [
        ("prior", "the base rate in training", forecast.constant),
        ("climatology", "the base rate of all labels known by then", np.where(np.isfinite(climate), climate,
         forecast.constant)),
        ("last_label", "how often it comes after the last known label was 0, or 1",
         forecast(_only(history.persistence), known.last_label(task))),
        ("volatility_logistic", f"logistic regression on {said}", volatility),
    ]  # fmt: skip
    if vix is not None:
        both = np.concatenate([vix, realised], axis=1)
        words = "logistic regression on ln VIX and ln realised volatility of 5, 21 and 63 days"
        found.append(("vix_har_logistic", words, forecast(volatility_logistic, both, vix, realised)))
    if touch.applies(task):
        fit = _only(functools.partial(touch.fitted, task))
        unit = np.sqrt(task.horizon / touch.TRADING_DAYS)
        implied = [np.exp(vix) / 100 * unit] if vix is not None else []
        own = np.exp(realised[:, 1:2]) * np.sqrt(task.horizon)
        words = f"a level is touched by a driftless diffusion of k × {'VIX' if implied else '21-day volatility'}"
        found.append(("volatility_touch", words, forecast(fit, *implied, own)))
        garch = forecast(fit, known.garch(task.horizon), own)
        found.append(("garch_touch", "the same, of k × the SD that a GJR-GARCH(1, 1) foresees", garch))
    inputs = dataset.features.astype(np.float64)
    found += [
        ("bar_logistic", "L2 logistic regression on the last bar's features", forecast(lastbar.logistic, inputs)),
        ("bar_boosting", "gradient boosted trees on the last bar's features", forecast(lastbar.boosting, inputs)),
        ("bar_mlp", "five small networks on the last bar's features", forecast(lastbar.mlp, inputs)),
    ]
    return found


def _of_returns(known: Known, forecast: _Forecaster) -> Said:
    """Log returns."""
    vix, realised, returns = known.vix, known.volatilities, known.inputs(RETURNS)
    said = "ln VIX" if vix is not None else "ln realised volatility of 5, 21 and 63 days"
    volatility = forecast(volatility_linear, *([vix] if vix is not None else []), realised)
    words = "linear regression on the log return of the last 1, 5 and 21 days"
    return [
        ("prior", "the mean training return", forecast.constant),
        ("zero", "no move", np.zeros_like(forecast.constant)),
        ("har_linear", words, forecast(volatility_linear, returns)),
        ("volatility_linear", f"linear regression on {said}", volatility),
    ]


Fit = Callable[[Floats, Floats, Floats], Floats]
"""(training inputs (S, K), labels (S,), validation inputs (S', K)) → outputs (S',)."""


def _only(fit: Fit) -> Fit:
    """Of a model of one input, which takes it as (S,)."""
    return lambda train, labels, validation: fit(train[:, 0], labels, validation[:, 0])


@dataclass(frozen=True, eq=False)
class _Forecaster:
    """Fits on training rows, and says something of every validation row."""

    dataset: Dataset
    constant: Floats
    """(S',): said of rows whose inputs are unknown."""
    pause: Callable[[], None]

    def __call__(self, fit: Fit, *choices: Floats) -> Floats:
        """Outputs from the first choice of inputs, (rows, K) each, where it is known; else from the next."""
        self.pause()
        outputs = self.constant.astype(np.float64)
        train, validation = self.dataset.train, self.dataset.validation
        for inputs in reversed(choices):  # a better choice overwrites a worse one
            known = np.isfinite(inputs).all(axis=1)
            learn, say = known[train.rows], known[validation.rows]
            if say.any() and learn.any() and np.ptp(train.labels[learn]) > 0:
                outputs[say] = fit(inputs[train.rows[learn]], train.labels[learn], inputs[validation.rows[say]])
        return outputs


def _scored(name: str, words: str, outputs: Floats, dataset: Dataset, task: TaskConfig, prior: float) -> Baseline:
    # float32, as models' outputs are kept: a baseline scored again from disk has the same figures.
    kept = outputs.astype(np.float32)
    return Baseline(name, words, kept, metrics.evaluate(task.kind, kept, dataset.validation.labels, prior=prior))


# --- inputs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Known:
    """What is known at each row's close."""

    dataset: Dataset
    bars: Mapping[str, Bars]
    """Of the assets, cut off after the dataset's last day."""
    context: Mapping[str, Bars]
    places: tuple[tuple[Ints, Ints], ...]
    """Per asset: its rows, and their places among its bars."""

    @staticmethod
    def at(dataset: Dataset, bars: Mapping[str, Bars], context: Mapping[str, Bars]) -> Known:
        """Raises ValueError: bars without the dataset's days."""
        last = dataset.dates.max().astype(datetime.date)
        cut = {symbol: bars[symbol].between(None, last) for symbol in dataset.assets}
        places = tuple(_places(dataset, i, cut[symbol]) for i, symbol in enumerate(dataset.assets))
        return Known(dataset, cut, context, places)

    def inputs(self, names: Sequence[str]) -> Floats:
        """(rows, K) features by name; NaN in their warm-up."""
        return self._gather(lambda bars: features.compute(tuple(names), bars, self.context), len(names))

    @property
    def vix(self) -> Floats | None:
        """(rows, 1) ln VIX; none: the context doesn't hold it."""
        return self.inputs(VIX) if features.VIX in self.context else None

    @property
    def volatilities(self) -> Floats:
        """(rows, 3) ln realised volatility per day."""
        return np.log(np.maximum(self.inputs(VOLATILITIES), _LEAST_VOL))

    def labels(self, task: TaskConfig) -> tuple[Floats, np.ndarray]:
        """(N,) the labels of all bars, and when each is known; before the dataset's last day."""
        each = self.bars.values()
        cut = [labels.cut(task, bars) for bars in each]
        return np.concatenate(cut), np.concatenate([labels.ends(task, bars) for bars in each])

    def last_label(self, task: TaskConfig) -> Floats:
        """(rows, 1): the last label of the same asset that is known, h bars old."""

        def shifted(bars: Bars) -> Floats:
            cut = labels.cut(task, bars)
            return np.concatenate([np.full(task.horizon, np.nan), cut])[: len(cut), None]

        return self._gather(shifted, 1)

    def garch(self, horizon: int) -> Floats:
        """(rows, 1) SD of the log return over the horizon, fitted per asset to its closes that training has seen."""
        last = self.dataset.dates[self.dataset.train.rows].max()

        def foreseen(bars: Bars) -> Floats:
            n_train = int(np.searchsorted(bars.dates, last, side="right"))
            return touch.garch_sd(bars.close, n_train=n_train, horizon=horizon)[:, None]

        return self._gather(foreseen, 1)

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
