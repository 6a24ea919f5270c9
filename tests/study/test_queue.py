"""What the user queues is what runs, once, or is refused by name before anything runs."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fintx.config.families import EncoderEntry, LayerRange
from fintx.config.schema import (
    ArchitectureConfig,
    BudgetConfig,
    Choices,
    FloatRange,
    QueueEntry,
    StudySpec,
    TaskConfig,
)
from fintx.model import param_count
from fintx.study import queue
from fintx.study.records import TrialRecord
from fintx.study.search_space import SearchSpace
from fintx.study.trial_table import Lease

N_FEATURES = 25
ENTRY = EncoderEntry(
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


def record(params: dict, number: int = 7) -> TrialRecord:
    """A finished trial, as far as the queue looks at one."""
    return TrialRecord.model_construct(trial_number=number, params=params)


# --- what runs --------------------------------------------------------------------------------------------------------


def test_a_queued_shape_and_its_values_are_what_runs_in_their_own_types(space):
    study = optuna.create_study()
    settled = queue.settle(ENTRY, space, best=None)
    study.enqueue_trial(settled.params)
    trial = study.ask(space.distributions)
    config = space.trial_config(trial.params, settled.shape, seed=0)
    assert config.shape == ENTRY.shape
    values = (config.train.batch_size, config.train.patience, config.optim.learning_rate, config.model.revin)
    assert values == (64, 4, 1.0, True)
    assert [type(value) for value in values] == [int, int, float, bool]
    json.dumps(trial.params)
    assert settled.training == ""


def test_what_an_entry_leaves_open_comes_from_the_best_trial(space):
    searched = {"optim.learning_rate": 0.02, "train.batch_size": 32, "train.patience": 9, "model.revin": True}
    best = record({"shape.aspect": 0.0, "shape.heads": 99.0, **searched})
    entry = ENTRY.model_copy(update={"values": {"train.patience": 4.0}})
    settled = queue.settle(entry, space, best=best)
    assert settled.params == {**space.encode(entry.shape), **searched, "train.patience": 4}
    assert settled.training == "trial 7"


@pytest.mark.parametrize(("training", "best"), [("best", None), ("defaults", record({"optim.learning_rate": 0.5}))])
def test_or_from_the_files_defaults_brought_into_the_searched_range(training, best):
    spec = make_spec(
        optim={"learning_rate": 3e-4, "weight_decay": 0.5},
        train={"batch_size": 48, "patience": 20},
        space={
            "optim.learning_rate": FloatRange(low=1e-4, high=1.0, log=True),
            "optim.weight_decay": FloatRange(low=0.0, high=0.25),
            "train.batch_size": Choices(choices=(32, 64)),
            "train.patience": FloatRange(low=2, high=9),
            "model.revin": Choices(choices=(True, False)),
        },
    )
    space = SearchSpace.build(spec, n_features=N_FEATURES)
    entry = ENTRY.model_copy(update={"values": {}, "training": training})
    settled = queue.settle(entry, space, best=best)
    values = {path: settled.params[path] for path in spec.space}
    assert values == {
        "optim.learning_rate": 3e-4, "optim.weight_decay": 0.25, "train.batch_size": 32, "train.patience": 9,
        "model.revin": False,
    }  # fmt: skip
    assert [type(value) for value in values.values()] == [float, float, int, int, bool]
    assert settled.training == "defaults"


def test_or_is_left_to_the_sampler(space):
    entry = ENTRY.model_copy(update={"values": {"train.patience": 4}, "training": "sampler"})
    settled = queue.settle(entry, space, best=record({"optim.learning_rate": 0.5}))
    assert settled.params == {**space.encode(entry.shape), "train.patience": 4}
    assert settled.training == "sampler"
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=1))
    study.enqueue_trial(settled.params)
    assert study.ask(space.distributions).params.keys() == space.distributions.keys()


values = st.fixed_dictionaries(
    {},
    optional={
        "train.batch_size": st.sampled_from([32, 64, 32.0, 64.0]),
        "train.patience": st.one_of(st.integers(2, 9), st.integers(2, 9).map(float)),
        "optim.learning_rate": st.one_of(st.floats(1e-4, 1.0), st.just(1)),
        "model.revin": st.booleans(),
    },
)
queued = st.builds(
    lambda heads, width, depth, d_ff, values, training: EncoderEntry(
        d_model=heads * width, n_layers=depth, n_heads=heads, d_ff=d_ff, values=values, training=training
    ),
    st.integers(1, 64), st.integers(1, 64), st.integers(1, 4096), st.integers(1, 10_000), values,
    st.sampled_from(["best", "defaults"]),
)  # fmt: skip


@given(queued, st.none() | values)
def test_what_is_settled_trains_the_entrys_very_shape_and_values(space, entry, best):
    settled = queue.settle(entry, space, best=None if best is None else record(best))
    assert settled.params.keys() == space.distributions.keys()
    for name, value in settled.params.items():
        distribution = space.distributions[name]
        assert distribution._contains(distribution.to_internal_repr(value))
    config = space.trial_config(settled.params, settled.shape, seed=0)
    assert config.shape == entry.shape
    for path, value in entry.values.items():
        section, _, key = path.partition(".")
        assert getattr(getattr(config, section), key) == value


# --- the extremes -----------------------------------------------------------------------------------------------------


def test_the_extremes_of_every_axis_are_entries_of_their_own():
    spec = make_spec(ENTRY, study={"name": "s", "queue_extremes": True})
    space = SearchSpace.build(spec, n_features=N_FEATURES)
    first, *edges = queue.entries(spec, space)
    assert first == ENTRY
    notes = [note for entry in edges for note in entry.note.split(", ")]
    assert sorted(notes) == sorted(
        f"{end} {axis}" for axis in ("d_model", "n_layers", "d_ff ratio", "n_heads") for end in ("smallest", "largest")
    )
    for axis in ("d_model", "n_layers", "n_heads"):
        sizes = [getattr(shape, axis) for shape in space.shapes]
        for word, end in (("smallest", min(sizes)), ("largest", max(sizes))):
            assert [getattr(e, axis) for e in edges if f"{word} {axis}" in e.note.split(", ")] == [end]
    assert len({entry.shape for entry in edges}) == len(edges)
    assert all(entry.shape in space.shapes for entry in edges)
    queue.check(make_spec(*edges), n_features=N_FEATURES)
    assert queue.entries(spec, space) == (first, *edges)


def test_an_extreme_is_ordinary_in_all_else():
    """One width, one ratio: the fewest layers go with the middle number of heads, not with whichever comes first."""
    architecture = ArchitectureConfig(d_model=(96,), n_heads=(2, 4, 8), d_ff_ratio=(4.0,))
    spec = make_spec(architecture=architecture)
    edges = queue.extremes(SearchSpace.build(spec, n_features=N_FEATURES))
    assert [(entry.note, entry.n_heads) for entry in edges[:2]] == [("smallest n_layers", 4), ("largest n_layers", 4)]
    depths = sorted({shape.n_layers for shape in SearchSpace.build(spec, n_features=N_FEATURES).shapes})
    assert edges[2].note == "smallest n_heads" and edges[2].n_layers in depths[1:-1]


def test_one_shape_may_be_the_extreme_of_two_axes_and_its_notes_merge():
    architecture = ArchitectureConfig(
        d_model=(64, 128), n_layers=LayerRange(low=12, high=30), n_heads=(4,), d_ff_ratio=(4.0,)
    )
    space = SearchSpace.build(make_spec(architecture=architecture), n_features=N_FEATURES)
    notes = {(entry.d_model, entry.n_layers): entry.note for entry in queue.extremes(space)}
    assert notes == {(64, 30): "smallest d_model, largest n_layers", (128, 12): "largest d_model, smallest n_layers"}


def test_an_extreme_that_the_file_holds_or_has_cancelled_is_not_queued_again():
    spec = make_spec(study={"name": "s", "queue_extremes": True})
    space = SearchSpace.build(spec, n_features=N_FEATURES)
    first, second, *rest = queue.entries(spec, space)
    own = first.model_copy(update={"note": "mine", "values": {"train.patience": 3}})
    changed = spec.model_copy(update={"queue": (own, second.model_copy(update={"cancelled": True}))})
    assert queue.entries(changed, space) == (own, *rest)


def test_a_cancelled_entry_is_not_among_those_to_run(space):
    cancelled = ENTRY.model_copy(update={"cancelled": True})
    other = ENTRY.model_copy(update={"n_heads": 10})
    assert queue.entries(make_spec(cancelled, other), space) == (other,)


# --- states -----------------------------------------------------------------------------------------------------------


def lease(entry: QueueEntry, number: int = 3, **changes) -> Lease:
    plain = Lease(
        number=number, params={}, shape=entry.shape, entry=queue.entry_id(entry), note="", training="trial 1",
        finished=False, state="running", token="t", attempt=1, failures=0, owner="h:o", host="h", pid=1, step=0,
        beat=0, detail="",
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


@pytest.mark.parametrize(
    ("changes", "cancelled", "expected"),
    [
        (None, False, "queued"),
        (None, True, "cancelled"),
        ({}, False, "running"),
        ({}, True, "running"),
        ({"state": "interrupted"}, False, "interrupted"),
        ({"state": "interrupted"}, True, "cancelled"),
        ({"state": "failed", "failures": 2}, False, "failed 2"),
        ({"state": "failed", "failures": 2}, True, "cancelled"),
        ({"state": "failed", "failures": 2, "finished": True}, False, "done"),
        ({"state": "running", "finished": True}, False, "done"),
        ({"finished": True}, True, "done"),
    ],
)
def test_an_entrys_state_is_that_of_its_trial(changes, cancelled, expected):
    entry = ENTRY.model_copy(update={"cancelled": cancelled})
    stranger = lease(ENTRY.model_copy(update={"n_heads": 10}), number=9)
    leases = [stranger, dataclasses.replace(stranger, number=10, entry=None)]
    leases += [] if changes is None else [lease(entry, **changes)]
    (state,) = queue.states([entry], leases)
    assert (state.state, state.identity, state.entry) == (expected, queue.entry_id(ENTRY), entry)
    assert (state.number, state.training) == ((None, "") if changes is None else (3, "trial 1"))


def test_of_two_trials_of_an_entry_the_later_one_counts():
    leases = [lease(ENTRY, number=8), lease(ENTRY, number=2, state="failed", failures=3)]
    assert queue.states([ENTRY], leases)[0].state == "running"


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
        ({"cancelled": True}, True),
        ({"training": "defaults"}, False),
        ({"training": "sampler"}, False),
        ({"id": "mine"}, False),
    ],
    ids=[
        "note",
        "order",
        "1 is 1.0",
        "value",
        "flag",
        "no values",
        "heads",
        "swapped numbers",
        "cancelled",
        "defaults",
        "sampler",
        "id",
    ],
)
def test_an_entrys_identity_is_its_content(change, same):
    assert (queue.entry_id(ENTRY.model_copy(update=change)) == queue.entry_id(ENTRY)) is same


def test_an_id_is_the_identity_whatever_the_content():
    named = ENTRY.model_copy(update={"id": "deep"})
    assert queue.entry_id(named) == queue.entry_id(named.model_copy(update={"n_layers": 3, "training": "sampler"}))
    assert queue.entry_id(named) == "deep"


def test_true_is_not_one():
    flags = [ENTRY.model_copy(update={"values": {"x": value}}) for value in (True, 1, "1")]
    assert len({queue.entry_id(entry) for entry in flags}) == 3


def test_an_identity_is_the_same_in_another_process():
    """It is stored in the journal: a change would run every queued entry again."""
    assert queue.entry_id(EncoderEntry(d_model=64, n_layers=2, n_heads=4, d_ff=256)) == "d0c061c0a9bf"


# --- validation -------------------------------------------------------------------------------------------------------


def test_all_bad_entries_are_named_at_once():
    big = ENTRY.model_copy(update={"n_layers": 90})
    small = ENTRY.model_copy(update={"n_layers": 1})
    with pytest.raises(queue.QueueError) as caught:
        queue.check(make_spec(big, ENTRY, small, ENTRY), n_features=N_FEATURES)
    first, second, third = str(caught.value).splitlines()
    assert first.startswith("queue[0]: d_model 80, n_layers 90, n_heads 5, d_ff 240 holds ")
    assert "outside the budget 1,500,000 … 2,500,000" in first
    assert second.startswith("queue[2]: d_model 80, n_layers 1,")
    assert third == "queue[3]: is the same as queue[1]; take one out"


def test_good_entries_pass_and_a_cancelled_one_may_be_of_any_size():
    good, huge = ENTRY.model_copy(update={"n_heads": 10}), ENTRY.model_copy(update={"n_layers": 9000})
    queue.check(make_spec(ENTRY, good, huge.model_copy(update={"cancelled": True})), n_features=N_FEATURES)
    with pytest.raises(queue.QueueError, match="outside the budget"):
        queue.check(make_spec(ENTRY, good, huge), n_features=N_FEATURES)


def test_two_entries_of_one_identity_are_refused():
    named = ENTRY.model_copy(update={"id": "deep"})
    again = ENTRY.model_copy(update={"id": "deep", "n_heads": 10})
    cancelled = ENTRY.model_copy(update={"cancelled": True})
    with pytest.raises(queue.QueueError) as caught:
        queue.check(make_spec(named, ENTRY, again, cancelled), n_features=N_FEATURES)
    assert str(caught.value).splitlines() == [
        'queue[2]: has the id "deep", which is that of queue[0]; take one out',
        "queue[3]: is the same as queue[1]; take one out",
    ]
    queue.check(make_spec(named, ENTRY), n_features=N_FEATURES)


def test_the_total_may_fall_below_a_queue_that_is_done(space):
    others = [ENTRY.model_copy(update={"id": name}) for name in "abc"]
    spec = make_spec(*others, study={"name": "s", "n_trials": 1})
    done = [lease(entry, number, finished=True, params=entry_params(space)) for number, entry in enumerate(others)]
    queue.check_against_trials(spec, space, done, counted=True)
    queue.check_against_trials(spec, space, done[:2], counted=True)
    with pytest.raises(queue.QueueError, match=r"study.n_trials: 1 is fewer than the 2 queue entries to run"):
        queue.check_against_trials(spec, space, done[:1], counted=True)
    queue.check_against_trials(spec, space, done[:1], counted=False)


def test_an_id_of_another_shape_is_no_state_of_the_entry(space):
    named = ENTRY.model_copy(update={"id": "deep"})
    other = named.model_copy(update={"n_heads": 10})
    (state,) = queue.states([other], [lease(named, finished=True)])
    assert state.state == "clash" and state.number == 3
    with pytest.raises(queue.QueueError, match=r"^queue\[0\]: its id deep is that of trial 3, which has another shape"):
        queue.check_against_trials(make_spec(other), space, [lease(named, params=entry_params(space))], counted=True)


def entry_params(space) -> dict:
    return queue.settle(ENTRY, space, best=None).params


def test_an_entry_must_fit_the_budget_with_every_geometry_that_it_may_run_with():
    """One that it leaves open may become any of the searched ones."""
    spec = make_spec(ENTRY)
    fitting = param_count.count_params(spec.model, ENTRY.shape, N_FEATURES).total
    narrow = BudgetConfig(parameters=fitting, tolerance=1e-4)
    fixed = make_spec(ENTRY, budget=narrow, space={})
    queue.check(fixed, n_features=N_FEATURES)
    searched = make_spec(ENTRY, budget=narrow, space={"model.patch_length": Choices(choices=(10, 20))})
    with pytest.raises(queue.QueueError, match=r"queue\[0\]: .* outside the budget"):
        queue.check(searched, n_features=N_FEATURES)
    for length, fits in ((10.0, True), (20, False)):
        chosen = ENTRY.model_copy(update={"values": {"model.patch_length": length}})
        with contextlib.nullcontext() if fits else pytest.raises(queue.QueueError, match="outside the budget"):
            queue.check(searched.model_copy(update={"queue": (chosen,)}), n_features=N_FEATURES)
