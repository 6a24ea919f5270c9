"""When trials are trained together by themselves: never on a CPU, and on a GPU the smaller the more."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fintx.config.schema import TrialConfig
from fintx.train import memory

Trials = Callable[..., TrialConfig]


def shaped(make_trial: Trials, d_model: int, n_layers: int, **changes: object) -> TrialConfig:
    shape = {"shape.d_model": d_model, "shape.n_layers": n_layers, "shape.d_ff": 4 * d_model}
    window = {"model.context_length": 60, "model.patch_length": 10, "model.stride": 5}
    return make_trial(shape | window | {"train.batch_size": 32} | changes)


@pytest.mark.parametrize(("d_model", "n_layers"), [(8, 2), (64, 6), (768, 28)])
def test_on_a_cpu_each_trial_is_alone(make_trial: Trials, d_model: int, n_layers: int) -> None:
    assert memory.population_size(shaped(make_trial, d_model, n_layers), "auto", on_gpu=False) == 1


@pytest.mark.parametrize(
    ("d_model", "n_layers", "wanted"),
    [(64, 6, 16), (128, 10, 4), (768, 28, 1)],
    ids=["0.3M: launches take 30 times as long as its work", "2M: six times", "200M: they take less"],
)
def test_on_a_gpu_as_many_as_the_launches_leave_time_for(
    make_trial: Trials, d_model: int, n_layers: int, wanted: int
) -> None:
    assert memory.population_size(shaped(make_trial, d_model, n_layers), "auto", on_gpu=True) == wanted


def test_a_larger_batch_leaves_less_room(make_trial: Trials) -> None:
    found = [
        memory.population_size(shaped(make_trial, 128, 10, **{"train.batch_size": size}), "auto", on_gpu=True)
        for size in (8, 32, 128, 512)
    ]
    assert found == sorted(found, reverse=True) and found[0] > found[-1] == 1


@pytest.mark.parametrize(
    ("setting", "on_gpu", "d_model", "wanted"),
    [("auto", False, 64, True), (True, False, 64, True), ("auto", False, 768, False), ("auto", True, 64, False),
     (False, False, 64, False), (4, False, 64, False)],
    ids=["auto", "true", "200M fill the cores", "on a GPU in one program", "switched off", "a number is one program"],
)  # fmt: skip
def test_replicates_of_small_models_use_the_cores(
    make_trial: Trials, setting: bool | int | str, on_gpu: bool, d_model: int, wanted: bool
) -> None:
    assert memory.on_cores(shaped(make_trial, d_model, 6), setting, on_gpu=on_gpu) is wanted
