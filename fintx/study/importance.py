"""Which of the searched values matter for a good trial? PED-ANOVA, beside what chance alone would give.

Watanabe, Bansal & Hutter 2023, "PED-ANOVA: Efficiently quantifying hyperparameter importance in arbitrary subspaces",
IJCAI, as Optuna implements it: how differently a coordinate is spread among the best trials than among all. With few
trials any coordinate looks important, so the values are shuffled among the trials and the same is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import create_trial

from fintx.evaluate import metrics
from fintx.study import ledger
from fintx.study.records import TrialRecord
from fintx.study.space import SearchSpace

LEAST_TRIALS = 10
_SHUFFLES = 60


@dataclass(frozen=True)
class Importance:
    """One searched coordinate or value."""

    name: str
    share: float
    """Of all importances, which sum to 1; 0 where the best trials are spread as all are."""
    by_chance: float
    """What 95 % of shuffled studies stay below."""


def ped_anova(found: Sequence[TrialRecord], space: SearchSpace, *, seed: int = 0) -> tuple[Importance, ...]:
    """Importance of every searched name, the largest first; empty for fewer than 10 trials or a single name.

    Args:
        found: finished trials; one that failed counts as a bad value, as it does for the sampler.
    """
    distributions = space.distributions
    usable = [record for record in found if record.params.keys() == distributions.keys()]
    if len(usable) < LEAST_TRIALS or len(distributions) < 2:
        return ()
    sign = 1.0 if metrics.MINIMIZE[space.spec.study.metric] else -1.0
    values = np.array([ledger.WORST if r.value is None else sign * r.value for r in usable])
    params = [dict(record.params) for record in usable]
    real = _shares(params, values, distributions)
    rng = np.random.default_rng(seed)
    shuffled = [_shares(params, rng.permutation(values), distributions) for _ in range(_SHUFFLES)]
    rows = [
        Importance(name, share, float(np.quantile([each[name] for each in shuffled], 0.95)))
        for name, share in real.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.share))


def _shares(
    params: Sequence[dict[str, bool | int | float | str]],
    values: np.ndarray,
    distributions: dict[str, BaseDistribution],
) -> dict[str, float]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize")
    study.add_trials(
        create_trial(params=dict(each), distributions=distributions, value=float(value))
        for each, value in zip(params, values, strict=True)
    )
    # At least five trials must count as the best ones, says Optuna's documentation.
    evaluator = PedAnovaImportanceEvaluator(target_quantile=min(max(0.1, 5 / len(values)), 0.5))
    return optuna.importance.get_param_importances(study, evaluator=evaluator)
