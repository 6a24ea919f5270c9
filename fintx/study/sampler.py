"""What does the sampler propose next? A point that no trial of the study has been trained at, and goes on from all.

The sampler works on a copy of the study in memory: what it proposes there and is refused (a config that was trained
already) leaves no trace. It is made anew for each trial, seeded by the trial's number: a stopped study proposes what
an uninterrupted one would have, instead of replaying its first samples. Trials that are under way count as bad ones
(constant liar), so that workers don't crowd together.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from fintx.config.schema import Shape, StudySpec, TrialConfig, config_hash
from fintx.errors import FintxError
from fintx.evaluate import metrics
from fintx.study.search_space import SearchSpace

_TRIES = 20
_ENUMERABLE = 200_000


class SpaceExhausted(FintxError):
    """Every config of a finite space has been trained, or is being."""


def trial_identity(config: TrialConfig) -> str:
    """What a config is apart from its seed: two trials of one identity would answer the same question."""
    return config_hash(config.model_copy(update={"seed": 0}))


def propose(
    spec: StudySpec,
    space: SearchSpace,
    trials: Sequence[FrozenTrial],
    *,
    number: int,
    fixed: Mapping[str, Any],
    shape: Shape | None,
    trained: Container[str],
) -> dict[str, Any]:
    """Parameters of the number-th trial.

    Args:
        trials: of the study so far, in whatever state.
        fixed: parameters that a queue entry has settled.
        shape: the entry's; none: the parameters' own.
        trained: identities of configs that must not come again.

    Raises:
        SpaceExhausted: there is no other config.
    """
    finite: Sequence[dict[str, Any]] | None = None
    for attempt in itertools.count():
        params = _ask(spec, space, trials, number=number, attempt=attempt, fixed=fixed)
        if _fresh(spec, space, params, shape, trained):
            return params
        if attempt == _TRIES and (finite := _everything(space, fixed, shape)) is not None:
            break
    rest = [params for params in finite or () if _fresh(spec, space, params, shape, trained)]
    if not rest:
        raise SpaceExhausted(
            f"{spec.study.name}: every config of its space is trained already, before study.n_trials = "
            f"{spec.study.n_trials}; lower n_trials, or widen [space] or [architecture] in a study of another name"
        )
    return rest[derive_seed(spec.study.seed, SAMPLER, number) % len(rest)]


def _ask(
    spec: StudySpec,
    space: SearchSpace,
    trials: Sequence[FrozenTrial],
    *,
    number: int,
    attempt: int,
    fixed: Mapping[str, Any],
) -> dict[str, Any]:
    seed = derive_seed(spec.study.seed, SAMPLER, number)
    direction = StudyDirection.MINIMIZE if metrics.MINIMIZE[spec.study.metric] else StudyDirection.MAXIMIZE
    sampler = optuna.samplers.TPESampler(
        seed=seed if attempt == 0 else derive_seed(seed, SAMPLER, attempt),
        n_startup_trials=spec.study.n_startup_trials,
    )
    copy = optuna.create_study(sampler=sampler, direction=direction)
    copy.add_trials(trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.RUNNING))
    if fixed:
        copy.enqueue_trial(dict(fixed))
    return dict(copy.ask(space.distributions).params)


def _fresh(
    spec: StudySpec, space: SearchSpace, params: Mapping[str, Any], shape: Shape | None, trained: Container[str]
) -> bool:
    config = space.trial_config(spec, params, shape or space.decode(params), seed=0)
    return trial_identity(config) not in trained


def _everything(space: SearchSpace, fixed: Mapping[str, Any], shape: Shape | None) -> Sequence[dict[str, Any]] | None:
    """Every point of a finite space; none where it is endless, or too large to be walked through."""
    free = {name: each for name, each in space.distributions.items() if name not in space.axes and name not in fixed}
    values: list[Sequence[Any]] = []
    for distribution in free.values():
        if isinstance(distribution, CategoricalDistribution):
            values.append(distribution.choices)
        elif isinstance(distribution, IntDistribution):
            values.append(range(distribution.low, distribution.high + 1, distribution.step))
        else:
            return None
    pinned = {name: fixed[name] for name in space.axes if name in fixed}
    places = [pinned] if shape else [space.encode(candidate) for candidate in space.shapes]
    if len(places) * np.prod([len(each) for each in values], dtype=float) > _ENUMERABLE:
        return None
    combinations = [dict(zip(free, each, strict=True)) for each in itertools.product(*values)]
    return [{**fixed, **place, **rest} for place, rest in itertools.product(places, combinations)]


SAMPLER, TRIAL, CONFIRM, REPLICATE = 0, 1, 2, 3
"""Streams: of a study's seed, the sampler's, the trials' and the confirmation's; of a trial's seed, its replicates'."""


def derive_seed(seed: int, stream: int, number: int) -> int:
    """The number-th seed of one of a seed's streams: 31 bits, spread by NumPy's SeedSequence."""
    return int(np.random.SeedSequence([seed, stream, number]).generate_state(1)[0] >> 1)


def replicate_seed(trial_seed: int, replicate: int) -> int:
    """The seed of a trial's replicate; the first is the trial's own."""
    return trial_seed if replicate == 0 else derive_seed(trial_seed, REPLICATE, replicate)
