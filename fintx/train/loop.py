"""How does a trial run from its config to its result? And what does a model say of windows it is shown?"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fintx.config.schema import MeshConfig, TrialConfig
from fintx.data.windows import Dataset
from fintx.model import family
from fintx.train import sharding, step
from fintx.train.attempt import Member
from fintx.train.population import fit_population
from fintx.train.result import Epoch, FitResult
from fintx.train.resume import Saves
from fintx.train.sharding import ONE, Layout
from fintx.train.state import for_program
from fintx.types import Floats, Ints, Params


def fit(
    config: TrialConfig,
    dataset: Dataset,
    *,
    metric: str,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    saves: Saves | None = None,
    memory_limit: int | None = None,
    mesh: MeshConfig | None = None,
) -> FitResult:
    """Train one trial, and restore the step whose validation metric is best.

    Args:
        metric: the validation metric that decides, a key of `metrics.MINIMIZE`.
        on_epoch: called after each epoch.
        on_progress: called after each segment of an epoch, of a second or two, with the steps taken so far.
        on_warning: called with each line of `FitResult.warnings`, as it comes.
        should_stop: asked between segments; True saves the training state and ends the attempt as interrupted.
        saves: where training states are kept, and found again: the trial goes on from the newest good one and ends
            with the numbers of one never interrupted. The caller removes them. None: the trial starts anew.
        memory_limit: bytes that the trial may take on this host, on all its devices; none: `memory.available()`.
        mesh: how it is spread over the devices that this process sees; none: on the first alone.

    Raises:
        FintxError: the metric is unknown, does not belong to the task's kind or is undefined on the validation part;
            or balanced classes are asked of a training part that holds one class; or a state can't be saved; or there
            are too few devices for the mesh. And whatever `saves.guard` raises.
    """
    member = Member(config, on_epoch=on_epoch, on_progress=on_progress, on_warning=on_warning, saves=saves)
    (result,) = fit_population(
        [member], dataset, metric=metric, should_stop=should_stop, memory_limit=memory_limit, mesh=mesh
    )  # fmt: skip
    if isinstance(result, Exception):
        raise result
    return result


def predict(config: TrialConfig, params: Params, features: Floats, rows: Ints, *, layout: Layout = ONE) -> Floats:
    """The model's outputs for the windows that end at `rows`: the numbers that records hold, here as in `fit`.

    Args:
        params: of `FitResult` or of a checkpoint.
        features: float32 (R, F), scaled as in training.
        rows: (S,) index of each sample's decision bar; its window is features[row − T + 1 : row + 1].
        layout: over which devices; that of the `fit` gives its very numbers, another one gives them up to rounding.

    Returns:
        float32 (S,): logits; for regression, log returns.
    """
    if len(rows) == 0:
        return np.zeros(0, np.float32)
    context_length = config.model.context_length
    if rows.min() < context_length - 1 or rows.max() >= len(features):
        raise ValueError(f"rows must lie in [{context_length - 1}, {len(features)}), got {rows.min()} … {rows.max()}")
    windows = step.place(features, rows, layout=layout)
    forward = step.compile_logits(
        for_program(config.model),
        config.shape,
        n_features=windows.features.shape[1],
        n_rows=windows.features.shape[0],
        n_samples=windows.rows.shape[0],
        layout=layout,
    )
    return sharding.to_host(forward.run(sharding.put(family.of(config.model), layout, params), windows))[
        : len(rows)
    ].copy()
