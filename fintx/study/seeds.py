"""Seeds of a study: each thing has a stream of its own, and a number in it, so that no seed is drawn twice."""

from __future__ import annotations

import numpy as np

SAMPLER, TRIAL, CONFIRM, REPLICATE = 0, 1, 2, 3
"""Streams: of a study's seed, the sampler's, the trials' and the confirmation's; of a trial's seed, its replicates'."""


def derive_seed(seed: int, stream: int, number: int) -> int:
    """The number-th seed of one of a seed's streams: 31 bits, spread by NumPy's SeedSequence."""
    return int(np.random.SeedSequence([seed, stream, number]).generate_state(1)[0] >> 1)


def replicate_seed(trial_seed: int, replicate: int) -> int:
    """The seed of a trial's replicate; the first is the trial's own."""
    return trial_seed if replicate == 0 else derive_seed(trial_seed, REPLICATE, replicate)
