"""An epoch cut anywhere is the same epoch, and a batch in micro-batches is the same batch but for rounding."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fintx.config.schema import TrialConfig
from fintx.data.datasets import Dataset
from fintx.model import encoder
from fintx.train import losses, train_step, trainer
from fintx.train.train_state import (
    STEP,
    Hyperparameters,
    TargetScale,
    TrainState,
    hyperparameters,
    init_state,
    static_config,
)

Trials = Callable[..., TrialConfig]
Datasets = Callable[..., Dataset]
PLAIN = TargetScale(mean=0.0, sd=1.0)
DROPOUT = {"model.dropout": 0.3}
# Masks are drawn per micro-batch. A rate that drops nothing here, in the program that draws them.
NEXT_TO_NONE = {"model.dropout": 1e-9}
# With the usual 1e-8 Adam turns a gradient that is 0 but for rounding (that of a key's bias) into ± the rate.
LARGE_EPS = {"optim.eps": 1e-3}
N_STEPS = 5

Segments = Callable[[list[int]], tuple[TrainState, list[train_step.EpochSums]]]


@pytest.fixture(scope="module")
def run(make_trial: Trials, make_dataset: Datasets) -> Segments:
    """Two epochs in segments of the given lengths → the state, and the sums at each epoch's end."""
    config, data = make_trial(DROPOUT), make_dataset()
    values = hyperparameters(config, labels=data.train.labels, scale=PLAIN)
    windows = train_step.place(data.features, data.train.rows, data.train.labels)
    training = train_step.compile_training(static_config(config), n_features=3, n_rows=256, n_samples=256)

    def epochs(lengths: list[int]) -> tuple[TrainState, list[train_step.EpochSums]]:
        state, sums, epoch_sums = training.start(values), train_step.EpochSums(), []
        for n in lengths:
            state, sums = training.segment(values, state, sums, windows, np.int32(n))
            if int(state.step) % N_STEPS == 0:
                epoch_sums.append(jax.tree.map(float, sums))
                sums = train_step.EpochSums()
        return jax.tree.map(np.array, state), epoch_sums

    return epochs


def lengths(cuts: set[int]) -> list[int]:
    """Of the segments between cuts; an epoch's end is one always."""
    ends = sorted(cuts | {N_STEPS, 2 * N_STEPS})
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


@given(cuts=st.sets(st.integers(1, 2 * N_STEPS)))
def test_no_cut_shows(run: Segments, cuts: set[int]) -> None:
    whole, whole_sums = run([N_STEPS, N_STEPS])
    state, epoch_sums = run(lengths(cuts))
    assert epoch_sums == whole_sums
    jax.tree.map(np.testing.assert_array_equal, state, whole)


def test_an_overflow_in_an_epochs_last_update_is_seen_whatever_the_cuts(
    make_trial: Trials, make_dataset: Datasets
) -> None:
    """Parameters that an update takes to infinity at a cut are the next step's to find, not the cut's."""
    config = make_trial({"optim.learning_rate": 1e38, "optim.warmup_fraction": 0.0, "optim.weight_decay": 100.0})
    data = make_dataset()
    values = hyperparameters(config, labels=data.train.labels, scale=PLAIN)
    windows = train_step.place(data.features, data.train.rows, data.train.labels)
    training = train_step.compile_training(static_config(config), n_features=3, n_rows=256, n_samples=256)
    bad_steps = []
    for parts in ([5], [1, 4], [1, 1, 3]):
        state, sums = training.start(values), train_step.EpochSums()
        for n in parts:
            state, sums = training.segment(values, state, sums, windows, np.int32(n))
            if n == 1 and int(state.step) == 1:
                assert not bool(train_step.all_finite(state.params)) and int(sums.bad_step) == -1
        bad_steps.append(int(sums.bad_step))
    assert bad_steps == [1, 1, 1]


def test_segments_of_any_length_compile_nothing(
    make_trial: Trials,
    make_dataset: Datasets,
    compilations: Callable[[], AbstractContextManager[list[str]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, data = make_trial(DROPOUT), make_dataset()
    whole = trainer.fit(config, data, metric="log_loss")
    rng, seen = np.random.default_rng(0), []
    monkeypatch.setattr(trainer, "dispatch_size", lambda left, step_s: int(rng.integers(1, left + 1)))
    with compilations() as compiled:
        cut = trainer.fit(config, data, metric="log_loss", on_progress=seen.append)
    assert compiled == []
    assert cut.curve == whole.curve
    assert seen == sorted(set(seen)) and {5, 10, 15} <= set(seen) and len(seen) > 3


def test_stops_are_asked_for_and_progress_reported_between_segments(
    make_trial: Trials, make_dataset: Datasets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "dispatch_size", lambda left, step_s: min(left, 3))
    events: list[object] = []
    trainer.fit(
        make_trial({"train.max_epochs": 2}),
        make_dataset(),
        metric="log_loss",
        on_epoch=lambda epoch: events.append(f"epoch {epoch.epoch}"),
        on_progress=events.append,
        should_stop=lambda: bool(events.append("?")),
    )
    assert events == ["?", 3, "?", 5, "epoch 1", "?", 8, "?", 10, "epoch 2"]


# --- micro-batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "micro_batch",
    [
        pytest.param(8, id="halves", marks=pytest.mark.slow),
        pytest.param(5, id="the last is padded"),
        pytest.param(1, id="one by one", marks=pytest.mark.slow),
    ],
)
def test_micro_batches_make_the_same_update(make_trial: Trials, make_dataset: Datasets, micro_batch: int) -> None:
    """An epoch of 5 steps, the last on 11 samples of 16: losses to 1e-6, parameters to 2e-6 (sums in another order)."""
    config, data = make_trial(LARGE_EPS | NEXT_TO_NONE), make_dataset()
    values = hyperparameters(config, labels=data.train.labels, scale=PLAIN)
    windows = train_step.place(data.features, data.train.rows, data.train.labels)
    runs = []
    for size in (16, micro_batch):
        training = train_step.compile_training(
            static_config(config, micro_batch=size), n_features=3, n_rows=256, n_samples=256
        )
        runs.append(
            training.segment(values, training.start(values), train_step.EpochSums(), windows, np.int32(N_STEPS))
        )
    (whole, whole_sums), (parts, sums) = runs
    assert float(sums.loss_sum) == pytest.approx(float(whole_sums.loss_sum), rel=1e-6)
    assert int(sums.bad_step) == -1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), parts.params, whole.params)


def test_no_micro_batch_is_another_program_than_the_whole_batch(make_trial: Trials) -> None:
    assert static_config(make_trial()) == static_config(make_trial(), micro_batch=16)
    assert static_config(make_trial()) != static_config(make_trial(), micro_batch=8)


@pytest.fixture
def values(make_trial: Trials, make_dataset: Datasets) -> Hyperparameters:
    return hyperparameters(make_trial({"model.dropout": 0.5}), labels=make_dataset().train.labels, scale=PLAIN)


def test_every_micro_batch_draws_its_own_masks(make_trial: Trials, values: Hyperparameters) -> None:
    """One sample four times over, a micro-batch each: the losses are those of four keys."""
    static = static_config(make_trial({"model.dropout": 0.5, "train.batch_size": 4}), micro_batch=1)
    x_BTF = np.random.default_rng(0).standard_normal((1, 12, 3)).astype(np.float32)
    batch = train_step.Batch(
        x=np.repeat(x_BTF, 4, axis=0), targets=np.ones(4, np.float32), weights=np.ones(4, np.float32)
    )
    step_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), STEP), 0)

    @jax.jit
    def both(values: Hyperparameters, batch: train_step.Batch, x_BTF: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = init_state(static, values, n_features=3)
        _, sums = train_step.train_step(static, values, state, train_step.EpochSums(), batch)
        keys = jax.vmap(lambda i: jax.random.fold_in(step_key, i))(jnp.arange(4))
        logits = jax.lax.map(
            lambda key: encoder.apply(static.model, static.shape, state.params, x_BTF, key=key, dropout=0.5)[0],
            keys,
        )
        return sums.loss_sum, losses.binary_cross_entropy(logits, jnp.ones(4, jnp.float32))

    together, alone = both(values, batch, x_BTF)
    assert len(set(np.asarray(alone).tolist())) == 4
    assert float(together) == pytest.approx(float(alone.sum()), rel=1e-5)
