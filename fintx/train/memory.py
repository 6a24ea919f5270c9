"""Does a trial fit, and in what micro-batch?"""

from __future__ import annotations

from fintx.config import TrialConfig
from fintx.model import sizes


def lower_bound(config: TrialConfig, *, host_is_device: bool = True) -> int:
    """Bytes a trial takes at least, in whatever micro-batch: training state, gradients, and the best parameters' copy.

    Args:
        host_is_device: False: the copy lies elsewhere.
    """
    n = sizes.count(config.model, config.shape, len(config.data.features)).total
    return (16 + 4 * host_is_device) * n


def available() -> int:
    """Bytes free for trials on the default device."""
    return 2**62
