"""How a machine's GPUs are counted and filled; no GPU is needed to know."""

from __future__ import annotations

from pathlib import Path

import pytest

from fintx.config import load
from fintx.config.schema import Shape, StudySpec
from fintx.data import features
from fintx.model import param_count
from fintx.run import workers as machine

GIB = 2**30
ROOT = Path(__file__).resolve().parents[2]


def spec(budget: str, *changes: str) -> StudySpec:
    return load.study(ROOT / "sweeps" / f"{budget}_h3.toml", overrides=list(changes))


@pytest.mark.parametrize(
    ("budgets", "gpus", "expected"),
    [
        (["200M"], [], 1),
        (["200M"], [80 * GIB], 1),
        (["200M"], 8 * [80 * GIB], 8),
        (["2B"], 8 * [80 * GIB], 8),  # 40 GB of state, with layers computed again
        (["2B"], 8 * [24 * GIB], 2),
        (["2B"], 8 * [10 * GIB], 1),
        (["200M", "2B"], 8 * [24 * GIB], 2),
    ],
)
def test_a_worker_gets_as_many_gpus_as_its_largest_trial_needs(
    budgets: list[str], gpus: list[int], expected: int
) -> None:
    assert machine.workers_that_fit([spec(budget) for budget in budgets], gpus) == expected


def test_a_mesh_that_is_asked_for_is_one_workers(tmp_path: Path) -> None:
    assert machine.workers_that_fit([spec("2M", "mesh.data=4")], 8 * [80 * GIB]) == 2


def test_a_set_of_features_counts_as_all_that_it_holds() -> None:
    """A budget so tight that it holds the shape with its 28 inputs alone."""
    one = ("architecture.d_model=[16]", "architecture.n_layers={low=1, high=1}", "architecture.n_heads=[2]",
           "architecture.d_ff_ratio=[2]")  # fmt: skip
    asked = spec("2M", *one)
    shape = Shape(d_model=16, n_layers=1, n_heads=2, d_ff=32)
    names = features.resolve(asked.data.features, context=asked.data.context)
    assert len(names) > len(asked.data.features)
    n_params = param_count.count_params(asked.model, shape, len(names)).total
    tight = spec("2M", *one, f"budget.parameters={n_params}", "budget.tolerance=0.01")
    assert machine.workers_that_fit([tight], 8 * [80 * GIB]) == 8


@pytest.mark.parametrize(
    ("says", "visible", "expected"),
    [
        ("81559\\n81559\\n", None, [81559, 81559]),
        ("81559\\n40960\\n24576\\n", "2,0", [24576, 81559]),
        ("81559\\n40960\\n", "GPU-2f", [40960]),
        ("81559\\n", "", []),
        ("[N/A]\\n", None, [0]),
    ],
)
def test_gpus_are_those_that_cuda_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, visible: str | None, expected: list[int]
) -> None:
    """A driver's tool of the same name, that answers as the real one does."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{says}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert list(machine.gpu_bytes()) == [2**20 * mebibytes for mebibytes in expected]


def test_without_a_driver_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.gpu_bytes() == ()
