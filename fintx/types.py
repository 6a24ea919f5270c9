"""Types: the letters of array axes and a few aliases, shared by all modules.

Axis letters, used in jaxtyping signatures and as suffixes of array names:

    B batch        T time steps   F features   N patches   P patch length
    D d_model      H heads        K head size  M d_ff      L layers
    R replicas (members of a population)      S samples (rows of a split)

Modules that use JAX arrays import `jaxtyping` themselves: it loads JAX, which nothing upstream of a dataset may.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Params = dict[str, Any]
"""Model parameters: a nested dict of arrays (or of abstract shapes). Stacked layers have a leading axis L."""

Floats = np.ndarray
"""A NumPy array of float32 or float64."""

Ints = np.ndarray
"""A NumPy array of integers."""
