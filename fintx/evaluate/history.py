"""What do labels alone foretell: how often it happened so far, and whether it happened the last time?

A label of horizon h is known h bars later; until then it teaches nothing.
"""

from __future__ import annotations

import numpy as np

from fintx.types import Floats


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
