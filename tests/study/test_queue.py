"""What the user queues is what runs, once, or is refused by name before anything runs."""

from __future__ import annotations

import json

import optuna
import pytest

from fintx.config import ArchitectureConfig, BudgetConfig, Choices, FloatRange, QueueEntry, StudySpec, TaskConfig
from fintx.model import sizes
from fintx.study import queue
from fintx.study.space import SearchSpace

N_FEATURES = 25
ENTRY = QueueEntry(
    d_model=80,
    n_layers=30,
    n_heads=5,
    d_ff=240,
    values={"train.batch_size": 64.0, "train.patience": 4.0, "optim.learning_rate": 1, "model.revin": True},
)
"""Of a shape that the candidates don't hold, its values in other types than the space's."""


def make_spec(*entries: QueueEntry, **changes) -> StudySpec:
    base = dict(
        study={"name": "s"},
        task=TaskConfig(kind="threshold", horizon=3, price="high", threshold=0.01),
        budget=BudgetConfig(parameters="2M"),
        architecture=ArchitectureConfig(d_model=(32, 64, 96, 128)),
        space={
            "optim.learning_rate": FloatRange(low=1e-4, high=1.0, log=True),
            "train.batch_size": Choices(choices=(32, 64)),
            "train.patience": FloatRange(low=2, high=9),
            "model.revin": Choices(choices=(False, True)),
        },
        queue=entries,
    )
    return StudySpec(**{**base, **changes})


@pytest.fixture(scope="module")
def space():
    return SearchSpace.build(make_spec(ENTRY), n_features=N_FEATURES)


# --- what runs --------------------------------------------------------------------------------------------------------


def test_a_queued_shape_and_its_values_are_what_runs_in_their_own_types(space):
    study = optuna.create_study()
    study.enqueue_trial(queue.params_for(ENTRY, space))
    trial = study.ask(space.distributions)
    config = space.trial_config(space.spec, trial.params, seed=0)
    assert config.shape == ENTRY.shape
    found = (config.train.batch_size, config.train.patience, config.optim.learning_rate, config.model.revin)
    assert found == (64, 4, 1.0, True)
    assert [type(each) for each in found] == [int, int, float, bool]
    json.dumps(trial.params)


@pytest.mark.filterwarnings("error")
def test_every_value_of_an_entry_is_told_and_no_other(space):
    params = queue.params_for(ENTRY, space)
    assert params.keys() == space.distributions.keys()
    for name, value in params.items():
        assert space.distributions[name]._contains(space.distributions[name].to_internal_repr(value))
    bare = ENTRY.model_copy(update={"values": {}})
    assert set(queue.params_for(bare, space)) == {"shape.aspect", "shape.d_ff_ratio", "shape.heads"}


def test_what_an_entry_leaves_open_is_sampled(space):
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=1))
    study.enqueue_trial(queue.params_for(ENTRY.model_copy(update={"values": {}}), space))
    params = study.ask(space.distributions).params
    assert space.decode(params) == ENTRY.shape
    assert params.keys() == space.distributions.keys()


# --- identity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"note": "again"}, True),
        ({"values": dict(reversed(ENTRY.values.items()))}, True),
        ({"values": {**ENTRY.values, "train.batch_size": 64, "optim.learning_rate": 1.0}}, True),
        ({"values": {**ENTRY.values, "train.batch_size": 32}}, False),
        ({"values": {**ENTRY.values, "model.revin": False}}, False),
        ({"values": {}}, False),
        ({"n_heads": 10}, False),
        ({"n_layers": 240, "d_ff": 30}, False),
    ],
    ids=["note", "order", "1 is 1.0", "value", "flag", "no values", "heads", "swapped numbers"],
)
def test_an_entrys_identity_is_its_content(change, same):
    assert (queue.identity(ENTRY.model_copy(update=change)) == queue.identity(ENTRY)) is same


def test_true_is_not_one():
    flags = [ENTRY.model_copy(update={"values": {"x": value}}) for value in (True, 1, "1")]
    assert len({queue.identity(entry) for entry in flags}) == 3


def test_an_identity_is_the_same_in_another_process():
    """It is stored in the journal: a change would run every queued entry again."""
    assert queue.identity(QueueEntry(d_model=64, n_layers=2, n_heads=4, d_ff=256)) == "d0c061c0a9bf"


# --- validation -------------------------------------------------------------------------------------------------------


def test_all_bad_entries_are_named_at_once():
    big = ENTRY.model_copy(update={"n_layers": 90})
    small = ENTRY.model_copy(update={"n_layers": 1})
    with pytest.raises(queue.QueueError) as caught:
        queue.validate(make_spec(big, ENTRY, small, ENTRY), n_features=N_FEATURES)
    first, second, third = str(caught.value).splitlines()
    assert first.startswith("queue[0]: d_model 80, n_layers 90, n_heads 5, d_ff 240 holds ")
    assert "outside the budget 1,500,000 … 2,500,000" in first
    assert second.startswith("queue[2]: d_model 80, n_layers 1,")
    assert third == "queue[3]: is the same as queue[1]; take one out"


def test_good_entries_pass():
    queue.validate(make_spec(ENTRY, ENTRY.model_copy(update={"n_heads": 10})), n_features=N_FEATURES)
    assert ENTRY.shape in SearchSpace.build(make_spec(ENTRY), n_features=N_FEATURES).shapes


def test_an_entry_must_fit_the_budget_with_every_searched_geometry():
    """Its geometry is left to the sampler, so one that is too big counts."""
    spec = make_spec(ENTRY)
    fitting = sizes.count(spec.model, ENTRY.shape, N_FEATURES).total
    narrow = BudgetConfig(parameters=fitting, tolerance=1e-4)
    fixed = make_spec(ENTRY, budget=narrow, space={})
    queue.validate(fixed, n_features=N_FEATURES)
    searched = make_spec(ENTRY, budget=narrow, space={"model.patch_length": Choices(choices=(10, 20))})
    with pytest.raises(queue.QueueError, match=r"queue\[0\]: .* outside the budget"):
        queue.validate(searched, n_features=N_FEATURES)
