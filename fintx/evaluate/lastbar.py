"""What do usual learners make of the last bar alone? A line, trees and a small network on the model's own inputs.

Their settings are fixed and modest: none is tuned, on these rows or elsewhere.
"""

from __future__ import annotations

import numpy as np

from fintx.types import Floats

LOGISTIC_C = 0.01
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
        LogisticRegression(C=LOGISTIC_C, tol=1e-6, max_iter=1000).fit(train, labels > 0.5).decision_function(validation)
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
