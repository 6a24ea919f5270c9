"""A whole trial: its outcomes, its best step, its numbers again by `predict`, and what compiles when."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import jax
import numpy as np
import pytest

from fintx.config.schema import TaskConfig, TrialConfig
from fintx.data.datasets import Dataset
from fintx.errors import FintxError
from fintx.evaluate import metrics
from fintx.train import train_step, trainer
from fintx.train.member_run import EpochReport, FitResult
from fintx.train.train_state import static_config, static_model

Trials = Callable[..., TrialConfig]
Datasets = Callable[..., Dataset]
Compilations = Callable[[], AbstractContextManager[list[str]]]
# A rate that drops nothing in any test here, in the program that drops: 0 would compile another.
NEXT_TO_NONE = 1e-9
REGRESSION = {"task": TaskConfig(kind="regression", horizon=1), "train.loss": "mse"}


@pytest.fixture(scope="module")
def fitted(make_trial: Trials, make_dataset: Datasets) -> FitResult:
    return trainer.fit(make_trial({"train.max_epochs": 8}), make_dataset(), metric="log_loss")


def test_completed_trial_reports_itself(fitted: FitResult) -> None:
    assert fitted.outcome == "completed"
    assert (fitted.epochs, fitted.steps) == (8, 40)
    assert [entry["epoch"] for entry in fitted.curve] == list(range(1, 9))
    assert fitted.curve[-1]["step"] == 40
    assert fitted.last == {k: v for k, v in fitted.curve[-1].items() if k not in ("epoch", "step", "train_loss")}
    assert fitted.timing.wall_s > fitted.timing.compile_s >= 0


def test_it_learns_what_can_be_learnt(fitted: FitResult) -> None:
    assert fitted.curve[-1]["train_loss"] < 0.95 * fitted.curve[0]["train_loss"]


def test_best_is_the_best_of_the_curve(fitted: FitResult) -> None:
    curve = [entry["log_loss"] for entry in fitted.curve]
    assert fitted.best["log_loss"] == min(curve)
    assert fitted.best_epoch == 1 + curve.index(min(curve))
    assert fitted.best_step == 5 * fitted.best_epoch


def test_param_count_is_that_of_the_leaves(fitted: FitResult) -> None:
    assert fitted.param_count == sum(leaf.size for leaf in jax.tree.leaves(fitted.params))


def test_predict_repeats_the_record_exactly(fitted: FitResult, make_trial: Trials, make_dataset: Datasets) -> None:
    config, data = make_trial(), make_dataset()
    outputs = trainer.predict(config, fitted.params, data.features, data.validation.rows)
    np.testing.assert_array_equal(outputs, fitted.outputs)
    prior = float(data.train.labels.mean(dtype=np.float64))
    assert metrics.evaluate("probability", outputs, data.validation.labels, prior=prior) == fitted.best


@pytest.mark.slow
def test_predict_repeats_the_record_exactly_from_optimised_programs(make_trial: Trials, make_dataset: Datasets) -> None:
    """As above, but compiled as users compile: other tests here switch XLA's optimisations off."""
    config, data = make_trial({"shape.d_ff": 28, "train.max_epochs": 2}), make_dataset()
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        result = trainer.fit(config, data, metric="log_loss")
        outputs = trainer.predict(config, result.params, data.features, data.validation.rows)
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    np.testing.assert_array_equal(outputs, result.outputs)


def test_predict_on_more_bars_gives_the_same_outputs(
    fitted: FitResult, make_trial: Trials, make_dataset: Datasets
) -> None:
    data = make_dataset()
    longer = np.concatenate([data.features, np.ones((400, 3), np.float32)])
    outputs = trainer.predict(make_trial(), fitted.params, longer, data.validation.rows)
    np.testing.assert_allclose(outputs, fitted.outputs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("row", [10, 145], ids=["window starts before the first bar", "row after the last bar"])
def test_predict_refuses_rows_without_a_window(
    fitted: FitResult, make_trial: Trials, make_dataset: Datasets, row: int
) -> None:
    with pytest.raises(ValueError, match="rows must lie in"):
        trainer.predict(make_trial(), fitted.params, make_dataset().features, np.array([20, row], np.int32))


def test_predict_of_nothing_is_nothing(fitted: FitResult, make_trial: Trials, make_dataset: Datasets) -> None:
    assert trainer.predict(make_trial(), fitted.params, make_dataset().features, np.array([], np.int32)).shape == (0,)


def test_same_trial_twice_is_the_same_trial(fitted: FitResult, make_trial: Trials, make_dataset: Datasets) -> None:
    again = trainer.fit(make_trial({"train.max_epochs": 8}), make_dataset(), metric="log_loss")
    assert again.curve == fitted.curve
    jax.tree.map(np.testing.assert_array_equal, again.params, fitted.params)


def test_epochs_are_reported_as_they_come(make_trial: Trials, make_dataset: Datasets) -> None:
    seen: list[EpochReport] = []
    result = trainer.fit(make_trial(), make_dataset(), metric="auc", on_epoch=seen.append)
    assert [(e.epoch, e.max_epochs, e.step, e.max_steps) for e in seen] == [
        (1, 3, 5, 15),
        (2, 3, 10, 15),
        (3, 3, 15, 15),
    ]
    assert [e.train_loss for e in seen] == [entry["train_loss"] for entry in result.curve]
    aucs = [entry["auc"] for entry in result.curve]
    assert [e.best for e in seen] == [max(aucs[: i + 1]) for i in range(3)]
    assert result.best["auc"] == max(aucs)
    assert seen[0].seconds <= seen[-1].seconds <= result.timing.wall_s


def test_early_stop_restores_the_best_step(make_trial: Trials, make_dataset: Datasets) -> None:
    config = make_trial({"train.max_epochs": 50, "train.patience": 2, "optim.learning_rate": 0.03})
    data = make_dataset(learnable=False)
    result = trainer.fit(config, data, metric="log_loss")
    assert result.outcome == "early_stopped"
    assert result.epochs == result.best_epoch + 2 < 50
    assert result.best["log_loss"] < result.last["log_loss"]
    outputs = trainer.predict(config, result.params, data.features, data.validation.rows)
    np.testing.assert_array_equal(outputs, result.outputs)


def test_diverged_by_a_mad_learning_rate(make_trial: Trials, make_dataset: Datasets) -> None:
    config = make_trial({"optim.learning_rate": 1e6, "optim.warmup_fraction": 0.0, "train.max_epochs": 20})
    result = trainer.fit(config, make_dataset(), metric="log_loss")
    assert result.outcome == "diverged"
    assert result.epochs < 20
    assert result.curve[-1]["train_loss"] is None
    assert (result.params is None) == (result.outputs is None) == (result.best_epoch == 0)


def test_diverged_by_infinite_inputs_names_the_step(make_trial: Trials, make_dataset: Datasets) -> None:
    data = make_dataset()
    data.features[data.train.rows] = np.inf
    result = trainer.fit(make_trial(), data, metric="log_loss")
    assert (result.outcome, result.params, result.outputs, result.best) == ("diverged", None, None, {})
    assert "not finite at step 1" in result.detail


def test_collapsed_when_the_output_does_not_depend_on_the_input(make_trial: Trials, make_dataset: Datasets) -> None:
    data = make_dataset()
    data.features[:] = 0
    config = make_trial({"train.collapse_spread": 0.0, "train.collapse_patience": 2, "train.max_epochs": 9})
    result = trainer.fit(config, data, metric="log_loss")
    assert (result.outcome, result.epochs) == ("collapsed", 2)
    assert "2 epochs in a row" in result.detail


def test_collapsed_by_weight_decay(make_trial: Trials, make_dataset: Datasets) -> None:
    """Decay that takes most of every matrix at every step: spread falls below the floor, though never to 0."""
    config = make_trial(
        {"optim.weight_decay": 150.0, "optim.schedule": "constant", "train.max_epochs": 40, "train.patience": 40}
    )
    result = trainer.fit(config, make_dataset(learnable=False), metric="log_loss")
    assert result.outcome == "collapsed"
    assert result.epochs < 40


def test_a_constant_best_step_is_collapsed_however_the_trial_ended(make_trial: Trials, make_dataset: Datasets) -> None:
    config = make_trial({"train.collapse_spread": 10.0, "train.collapse_patience": 50})
    result = trainer.fit(config, make_dataset(), metric="log_loss")
    assert (result.outcome, result.epochs) == ("collapsed", 3)
    assert "at the best step" in result.detail


@pytest.mark.parametrize("after", [0, 2], ids=["before the first epoch", "after two epochs"])
def test_interrupted_between_epochs(make_trial: Trials, make_dataset: Datasets, after: int) -> None:
    seen: list[EpochReport] = []
    result = trainer.fit(
        make_trial(),
        make_dataset(),
        metric="log_loss",
        on_epoch=seen.append,
        should_stop=lambda: len(seen) >= after,
    )
    assert (result.outcome, result.epochs) == ("interrupted", after)
    assert (result.params is None) == (after == 0)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS binds on Linux only")
def test_out_of_memory_for_real(make_trial: Trials, make_dataset: Datasets) -> None:
    """A state of 2.4 GB where the kernel grants 0.5 GB more; compiled before, for a compiler out of memory aborts."""
    config = make_trial({"shape.d_model": 4096, "shape.d_ff": 16384, "shape.n_layers": 1})
    train_step.compile_training(static_config(config), n_features=3, n_rows=256, n_samples=256)
    train_step.compile_logits(static_model(config.model), config.shape, n_features=3, n_rows=256, n_samples=256)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**29, hard))
    try:
        result = trainer.fit(config, make_dataset(), metric="log_loss", memory_limit=2**40)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert result.outcome == "out_of_memory"
    assert "out of memory" in result.detail.lower()
    assert result.params is None and result.epochs == 0
    assert result.param_count > 2 * 10**8


def test_other_errors_are_not_swallowed(make_trial: Trials, make_dataset: Datasets) -> None:
    def broken(_: EpochReport) -> None:
        raise RuntimeError("a bug in the caller")

    with pytest.raises(RuntimeError, match="a bug in the caller"):
        trainer.fit(make_trial(), make_dataset(), metric="log_loss", on_epoch=broken)


@pytest.mark.parametrize(
    ("metric", "one_class", "message"),
    [
        ("accuracy", False, "is unknown; use one of"),
        ("mse", False, 'does not fit task.kind = "threshold"; use one of .*log_loss'),
        ("auc", True, "is undefined on this validation part"),
    ],
)
def test_a_metric_that_cannot_decide_is_an_error(
    make_trial: Trials, make_dataset: Datasets, metric: str, one_class: bool, message: str
) -> None:
    data = make_dataset()
    if one_class:
        data.validation.labels[:] = 0
    with pytest.raises(FintxError, match=message):
        trainer.fit(make_trial(), data, metric=metric)


def test_regression_outputs_are_log_returns(make_trial: Trials, make_dataset: Datasets) -> None:
    data = make_dataset(kind="regression")
    config = make_trial(REGRESSION | {"train.max_epochs": 25, "train.patience": 25, "optim.learning_rate": 0.02})
    result = trainer.fit(config, data, metric="mse")
    labels = data.validation.labels
    assert result.best["mse"] < 0.7 * np.var(labels)
    assert np.std(result.outputs) < 2 * np.std(labels)
    np.testing.assert_array_equal(
        trainer.predict(config, result.params, data.features, data.validation.rows), result.outputs
    )


def test_regression_train_loss_is_in_squared_log_returns(make_trial: Trials, make_dataset: Datasets) -> None:
    """With a rate of nearly 0 the epoch's loss is the error of the first parameters on every training sample."""
    data = make_dataset(kind="regression")
    config = make_trial(
        REGRESSION | {"optim.learning_rate": 1e-20, "model.dropout": NEXT_TO_NONE, "train.max_epochs": 1}
    )
    result = trainer.fit(config, data, metric="mse")
    outputs = trainer.predict(config, result.params, data.features, data.train.rows)
    assert result.curve[0]["train_loss"] == pytest.approx(np.mean((outputs - data.train.labels) ** 2), rel=1e-4)


def test_trials_that_differ_in_values_compile_nothing(
    make_trial: Trials, make_dataset: Datasets, compilations: Compilations
) -> None:
    trainer.fit(make_trial(), make_dataset(), metric="log_loss")
    with compilations() as seen:
        result = trainer.fit(
            make_trial(
                {
                    "optim.learning_rate": 1e-3, "optim.weight_decay": 0.5, "optim.warmup_fraction": 0.3,
                    "optim.final_fraction": 0.1, "optim.clip_norm": 0.1, "optim.b1": 0.8, "optim.b2": 0.95,
                    "optim.eps": 1e-6, "model.dropout": 0.3, "train.max_epochs": 2, "train.label_smoothing": 0.1,
                    "train.class_weight": "balanced", "seed": 5,
                }
            ),
            make_dataset(n_train=110, n_validation=35, seed=3),
            metric="auc",
        )  # fmt: skip
    assert result.outcome == "completed"
    assert seen == []
    assert result.timing.compile_s < 0.1


def test_compilations_are_counted(compilations: Compilations) -> None:
    """So that the empty list above means something."""
    with compilations() as seen:
        jax.jit(lambda x: x + 1)(np.float32(1))
    assert len(seen) == 1
