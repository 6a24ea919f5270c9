"""Coordinates of shape and back: every shape that is proposed lies inside the budget, and none is out of reach."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fintx.config import load
from fintx.config.families import EncoderEntry, LayerRange
from fintx.config.schema import (
    ArchitectureConfig,
    BudgetConfig,
    Choices,
    FloatRange,
    StudySpec,
    TaskConfig,
    config_hash,
)
from fintx.model import encoder, param_count
from fintx.study.search_space import SearchSpace, SpaceExhausted, propose, trial_identity

AXES = tuple(encoder.COORDINATES)
TASK = TaskConfig(kind="threshold", horizon=3, price="high", threshold=0.01)
N_FEATURES = 25
SWEEPS = Path(__file__).resolve().parents[2] / "sweeps"


def make_spec(parameters="2M", **changes) -> StudySpec:
    base = dict(
        study={"name": "s"},
        task=TASK,
        budget=BudgetConfig(parameters=parameters),
        architecture=ArchitectureConfig(d_model=(32, 64, 96, 128, 192, 256)),
        space={
            "optim.learning_rate": FloatRange(low=1e-4, high=1e-3, log=True),
            "train.batch_size": Choices(choices=(32, 64)),
            "train.patience": FloatRange(low=2, high=9),
        },
    )
    return StudySpec(**{**base, **changes})


@pytest.fixture(scope="module")
def space():
    return SearchSpace.build(make_spec(), n_features=N_FEATURES)


def test_every_feasible_shape_decodes_from_its_own_coordinates(space):
    assert len(space.shapes) > 300
    assert all(space.decode(space.encode(shape)) == shape for shape in space.shapes)


def test_coordinates_lie_inside_their_distributions(space):
    for shape in space.shapes:
        for name, value in space.encode(shape).items():
            assert space.distributions[name].low <= value <= space.distributions[name].high


@given(st.tuples(*[st.floats(0, 1)] * 3))
def test_any_proposal_has_a_size_inside_the_budget(position):
    spec = make_spec()
    space = SearchSpace.build(spec, n_features=N_FEATURES)
    params = {
        name: space.distributions[name].low + x * (space.distributions[name].high - space.distributions[name].low)
        for name, x in zip(AXES, position, strict=True)
    }
    shape = space.decode(params)
    assert spec.budget.low <= param_count.count_params(spec.model, shape, N_FEATURES).total <= spec.budget.high
    assert shape.d_model % shape.n_heads == 0


def test_equal_coordinates_are_told_apart():
    """(64, L) and (72, L') of one aspect ratio can both fit; each must stay reachable."""
    architecture = ArchitectureConfig(
        d_model=(60, 64, 66, 72), n_layers=LayerRange(low=2, high=60), n_heads=(2,), d_ff_ratio=(4.0,)
    )
    space = SearchSpace.build(
        make_spec(architecture=architecture, budget=BudgetConfig(parameters="1M", tolerance=0.4)), n_features=N_FEATURES
    )
    ratios = [shape.d_model / shape.n_layers for shape in space.shapes]
    assert len(set(ratios)) < len(ratios), "the case holds no tie"
    assert all(space.decode(space.encode(shape)) == shape for shape in space.shapes)


def test_an_axis_of_one_value_is_dropped():
    architecture = ArchitectureConfig(d_model=(64, 128), n_heads=(4,), d_ff_ratio=(4.0,))
    space = SearchSpace.build(make_spec(architecture=architecture), n_features=N_FEATURES)
    assert [name for name in AXES if name in space.distributions] == ["shape.aspect"]
    assert all(space.decode(space.encode(shape)) == shape for shape in space.shapes)


def test_searched_values_reach_the_config_in_their_own_type(space):
    params = {
        **space.encode(space.shapes[7]), "optim.learning_rate": 5e-4, "train.batch_size": 64, "train.patience": 4
    }  # fmt: skip
    config = space.trial_config(params, space.shapes[7], seed=11)
    assert (config.optim.learning_rate, config.train.batch_size, config.train.patience) == (5e-4, 64, 4)
    assert config.shape == space.shapes[7] and config.seed == 11
    assert isinstance(space.distributions["train.patience"], optuna.distributions.IntDistribution)
    assert config == space.trial_config(dict(reversed(params.items())), space.shapes[7], seed=11)


def test_a_searched_geometry_keeps_every_combination_inside_the_budget():
    spec = make_spec(
        space={
            "model.context_length": Choices(choices=(40, 120)),
            "model.revin": Choices(choices=(True, False)),
        },
        budget=BudgetConfig(parameters="2M", tolerance=0.02),
    )
    space = SearchSpace.build(spec, n_features=N_FEATURES)
    for shape, length, revin in itertools.product(space.shapes[::7], (40, 120), (True, False)):
        model = spec.model.model_copy(update={"context_length": length, "revin": revin})
        assert spec.budget.low <= param_count.count_params(model, shape, N_FEATURES).total <= spec.budget.high


def test_the_sampler_can_drive_it(space):
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=5))
    for _ in range(12):
        trial = study.ask(space.distributions)
        config = space.trial_config(trial.params, space.decode(trial.params), seed=0)
        study.tell(trial, float(np.log2(config.shape.d_model)))
    assert len({tuple(trial.params.items()) for trial in study.trials}) == 12


sides = st.builds(
    lambda heads, width, depth, d_ff: EncoderEntry(d_model=heads * width, n_layers=depth, n_heads=heads, d_ff=d_ff),
    st.integers(1, 64), st.integers(1, 64), st.integers(1, 4096), st.integers(1, 100_000),
)  # fmt: skip


@given(st.lists(sides, max_size=4))
def test_the_queue_changes_nothing_of_the_space(space, entries):
    """Else an entry added to a running study would give its older trials' coordinates another meaning."""
    queued = SearchSpace.build(make_spec(queue=tuple(entries)), n_features=N_FEATURES)
    assert queued.shapes == space.shapes and queued.distributions == space.distributions
    assert (queued.coordinates == space.coordinates).all()


@given(sides)
def test_a_shape_off_the_grid_lies_where_it_is_or_at_the_nearest_bound(space, entry):
    true = np.log2([entry.d_model / entry.n_layers, entry.d_ff / entry.d_model, entry.n_heads])
    encoded = space.encode(entry.shape)
    assert encoded.keys() == set(AXES)
    for name, value in zip(AXES, true, strict=True):
        bounds = space.distributions[name]
        assert bounds.low <= encoded[name] <= bounds.high
        assert encoded[name] == pytest.approx(
            np.clip(value, bounds.low, bounds.high), abs=1e-5
        )  # ties are nudged apart


def test_a_queue_alone_makes_no_space():
    grid = ArchitectureConfig(d_model=(64,), n_layers=LayerRange(low=2, high=3), n_heads=(4,), d_ff_ratio=(4.0,))
    fitting = EncoderEntry(d_model=80, n_layers=30, n_heads=5, d_ff=240)
    with pytest.raises(param_count.InfeasibleBudget, match="the largest candidate holds"):
        SearchSpace.build(make_spec(architecture=grid, queue=(fitting,)), n_features=N_FEATURES)


def test_a_space_of_one_shape_has_no_axis():
    architecture = ArchitectureConfig(
        d_model=(128,), n_layers=LayerRange(low=10, high=10), n_heads=(4,), d_ff_ratio=(4.0,)
    )
    space = SearchSpace.build(make_spec(architecture=architecture), n_features=N_FEATURES)
    assert not set(AXES) & set(space.distributions)
    assert space.decode({}) == space.shapes[0] and space.encode(space.shapes[0]) == {}


def test_a_whole_number_for_a_number_is_the_same_config():
    spec = make_spec(space={"model.dropout": Choices(choices=(0, 0.5)), "optim.clip_norm": FloatRange(low=1, high=2)})
    space = SearchSpace.build(spec, n_features=N_FEATURES)
    configs = [
        space.trial_config({"model.dropout": zero, "optim.clip_norm": one}, space.shapes[0], seed=0)
        for zero, one in ((0, 1), (0.0, 1.0))
    ]
    assert config_hash(configs[0]) == config_hash(configs[1])


def test_a_finite_space_is_proposed_to_its_last_point():
    searched = {"model.dropout": Choices(choices=(0.0, 0.5)), "train.patience": FloatRange(low=2, high=4)}
    spec = make_spec(space=searched)
    space = SearchSpace.build(spec, n_features=N_FEATURES)
    shape = space.shapes[3]
    fixed = dict(space.encode(shape))
    points = space.points(fixed, shape)
    assert points is not None and len(points) == 6
    *others, last = (trial_identity(space.trial_config(params, shape, seed=0)) for params in points)

    def proposed(trained: set[str]) -> dict:
        return propose(spec, space, [], number=0, fixed=fixed, shape=shape, trained=trained)

    assert proposed(set(others)) == points[-1]
    with pytest.raises(SpaceExhausted, match="every config of its space is trained already"):
        proposed({*others, last})


@pytest.mark.parametrize(
    "file", [file for file in sorted(SWEEPS.glob("*.toml")) if file.name != "manual.toml"], ids=lambda path: path.name
)  # fmt: skip
def test_every_shipped_file_has_shapes_all_within_its_budget(file):
    spec = load.study(file)
    space = SearchSpace.build(spec, n_features=33)
    assert len(space.shapes) >= 30
    totals = [param_count.count_params(spec.model, shape, 33).total for shape in space.shapes]
    assert spec.budget.low <= min(totals) and max(totals) <= spec.budget.high
    assert all(name in space.distributions for name in AXES)
    assert all(space.decode(space.encode(shape)) == shape for shape in space.shapes[::37])
