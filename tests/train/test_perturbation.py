"""No setting without effect: each of shape, model, optim and train that a sweep file can set, and the seed, counts.

The keys are read off the config classes, so that a new one fails here until it says how it shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from fintx.config.families import shape_names
from fintx.config.schema import FAMILY_CONFIGS, ModelConfig, OptimConfig, TaskConfig, TrainConfig, TrialConfig
from fintx.data.datasets import Dataset
from fintx.train import trainer

SECTIONS = {
    "shape": shape_names(FAMILY_CONFIGS["encoder"].queue_entry),
    "model": [key for key in ModelConfig.model_fields if key != "family"],
    "optim": OptimConfig.model_fields,
    "train": TrainConfig.model_fields,
}
KEYS = [f"{name}.{key}" for name, keys in SECTIONS.items() for key in keys] + ["seed"]
REGRESSION = TaskConfig(kind="regression", horizon=1)


@dataclass(frozen=True)
class Change:
    """Another value for a key, and what has to hold for it to matter."""

    value: Any
    under: dict[str, Any] = field(default_factory=dict)
    stops_elsewhere: bool = False
    """The key decides when the trial stops, not what a step does."""


SPREAD = {"train.collapse_spread": 10.0, "train.collapse_patience": 2}
CHANGES = {
    "shape.d_model": Change(12),
    "shape.n_layers": Change(3),
    "shape.n_heads": Change(4),
    "shape.d_ff": Change(24),
    "model.context_length": Change(16),
    "model.patch_length": Change(6),
    "model.stride": Change(2),
    "model.dropout": Change(0.3),
    "model.revin": Change(True),
    "model.compute_dtype": Change("bfloat16"),
    "optim.learning_rate": Change(2e-3),
    "optim.weight_decay": Change(0.5),
    "optim.schedule": Change("linear"),
    "optim.warmup_fraction": Change(0.5),
    "optim.final_fraction": Change(0.5),
    "optim.clip_norm": Change(0.05),
    "optim.b1": Change(0.5),
    "optim.b2": Change(0.9),
    "optim.eps": Change(1e-3),
    "train.batch_size": Change(32),
    "train.max_epochs": Change(2, stops_elsewhere=True),
    "train.patience": Change(
        2, under={"train.max_epochs": 12, "train.patience": 1, "optim.learning_rate": 0.03}, stops_elsewhere=True
    ),
    "train.loss": Change("focal"),
    "train.focal_gamma": Change(1.0, under={"train.loss": "focal"}),
    "train.huber_delta": Change(0.001, under={"train.loss": "huber", "task": REGRESSION}),
    "train.label_smoothing": Change(0.2),
    "train.class_weight": Change("balanced"),
    "train.collapse_spread": Change(1e-4, under=SPREAD, stops_elsewhere=True),
    "train.collapse_patience": Change(1, under=SPREAD, stops_elsewhere=True),
    "seed": Change(1),
}


@pytest.fixture(scope="module")
def run(make_trial: Callable[..., TrialConfig], make_dataset: Callable[..., Dataset]) -> Callable[..., tuple]:
    """Config changes → (training losses, validation outputs' metrics, epochs); equal changes run once."""
    seen: dict[str, tuple] = {}

    def trajectory(changes: dict[str, Any]) -> tuple:
        if str(changes) not in seen:
            config = make_trial(changes)
            data = make_dataset(kind=config.task.kind, learnable=False)
            result = trainer.fit(config, data, metric="mse" if config.task.kind == "regression" else "log_loss")
            seen[str(changes)] = ([entry["train_loss"] for entry in result.curve], result.last, result.epochs)
        return seen[str(changes)]

    return trajectory


def test_every_key_has_its_change() -> None:
    assert sorted(CHANGES) == sorted(KEYS)


def test_the_same_config_gives_the_same_trajectory(run: Callable[..., tuple]) -> None:
    """So that a difference below is the key's doing."""
    assert run({}) == run({"seed": 0})


OTHER_PROGRAMS = ("shape.", "model.", "optim.schedule", "train.batch_size", "train.loss", "train.huber", "train.focal")


def _quick_or_slow(key: str) -> Any:
    """A key that makes another program compiles for seconds; quick tests beside these hold what each of them does."""
    makes_another = key.startswith(OTHER_PROGRAMS) and key != "model.dropout"
    return pytest.param(key, marks=pytest.mark.slow) if makes_another else key


@pytest.mark.parametrize("key", [_quick_or_slow(key) for key in KEYS])
def test_key_changes_the_trajectory(run: Callable[..., tuple], key: str) -> None:
    change = CHANGES[key]
    losses, last, epochs = run(change.under)
    changed_losses, changed_last, changed_epochs = run(change.under | {key: change.value})
    assert losses != changed_losses
    assert last != changed_last
    assert (epochs != changed_epochs) == change.stops_elsewhere
