"""Bounds: no number of a sweep file costs time or memory, or becomes another one in float32, before it is refused."""

from __future__ import annotations

import math
import time
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from fintx.config import load
from fintx.config.schema import ArchitectureConfig, StudySpec
from fintx.errors import FintxError
from fintx.study import plan

FILE = """
[study]
name = "x"
[task]
kind = "threshold"
price = "high"
threshold = 0.01
horizon = 3
[split]
kind = "fractions"
train = 0.65
validation = 0.2
[budget]
parameters = "6K"
tolerance = 0.6
[architecture]
d_model = [4, 8, 12]
n_layers = { low = 1, high = 6 }
n_heads = [1, 2]
d_ff_ratio = [1, 2]
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bounds") / "x.toml"
    path.write_text(FILE)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(FintxError) as refused:
        load.study(path, overrides=overrides)
    return str(refused.value)


HUGE = [
    ("architecture.n_layers.high=1000000000", "≤ 1024"),
    ("architecture.n_layers.low=1000000000", "≤ 1024"),
    ("architecture.d_ff_ratio=[1e308]", "d_ff_ratio[0]: wanted a value ≤ 64"),
    ("architecture={n_layers={low=1,high=1024}, d_ff_ratio=[" + "1.0," * 1000 + "]}", "candidate shapes"),
    ("architecture.d_model=[" + "8," * 1001 + "]", "1,000 entries at most"),
    ("train.batch_size=9223372036854775807", "≤ 65536"),
    ('space."train.batch_size"={choices=[32, 9223372036854775807]}', "choices[1]: wanted a value ≤ 65536"),
    ('space."train.batch_size"={low=1, high=1e300}', "high: wanted a value ≤ 65536"),
    ("optim.learning_rate=1e-46", "float32 can hold"),
    ('space."optim.learning_rate"={low=1e-46, high=1e-3, log=true}', "low: wanted a number that float32 can hold"),
    ("optim.clip_norm=1e39", "float32 can hold"),
    ("optim.b2=0.999999999", "tell from 1"),
    ("model.dropout=0.99999999", "tell from 1"),
    ("optim.eps=1e-30", "≥ 1e-16"),
    ("budget.parameters='999999999999999B'", "≤ 10000000000000"),
    ("execution.hang_s=1e9", "≤ 1e+06"),
    ("execution.hang_s=1e-9", "≥ 1"),
    ("train.focal_gamma=1e30", "≤ 100"),
    ("execution.population=5000", "from 1 to 4096"),
    ("mesh.data=65537", "a number of devices"),
]
FOLDS = "split={kind='walk_forward', validation_start=2005-01-01, window='rolling', n_folds=%d}"


@pytest.mark.parametrize(("override", "words"), [*HUGE, (FOLDS % 10**9, "≤ 100"), (FOLDS % 1000, "≤ 100")])
def test_a_number_beyond_sense_is_refused_at_once(file, override, words):
    begin = time.monotonic()
    message = refusal(file, override)
    assert words in message and message.count("\n") == 0 and time.monotonic() - begin < 1
    assert message.startswith("--set ")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model={patch_length=4, stride=5}"], "model.stride: stride = 5 is longer than patch_length = 4"),
        (
            ["space.'model.stride'={choices=[4, 11]}"],
            "space.model.stride: stride = 11 is longer than patch_length = 10",
        ),
        (["space.'model.patch_length'={choices=[4, 10]}"], "space.model.patch_length: stride = 5 is longer than"),
    ],
)
def test_patches_leave_no_bar_unseen(file, overrides, words):
    message = refusal(file, *overrides)
    assert words in message and "never be seen" in message


def test_a_searched_stride_needs_no_fixed_one_that_fits(file):
    spec = load.study(file, overrides=["model.patch_length=4", "space.'model.stride'={choices=[2, 4]}"])
    assert spec.model.patch_length == 4


@pytest.mark.parametrize("name", ["experiment_results.csv", "Experiment_Results.CSV", "con", "NUL.x", "com1", "x."])
def test_a_name_that_is_taken_in_the_outputs_folder_is_refused(file, name):
    assert "study.name: wanted another name" in refusal(file, f"study.name='{name}'")


def test_a_name_that_only_begins_like_a_taken_one_is_fine(file):
    for name in ("console", "com", "experiment_results", "nul-x"):
        assert load.study(file, overrides=[f"study.name='{name}'"]).study.name == name


def test_a_version_is_of_a_symbol_in_use(file):
    assert "data.versions.XYZ: is a version of a symbol that isn't used" in refusal(file, "data.versions.XYZ='a'")
    assert load.study(file, overrides=["data.versions.SPX='a'"]).data.versions == {"SPX": "a"}


# --- every number of the schema ---------------------------------------------------------------------------------------


def is_number(annotation: Any) -> bool:
    return annotation in (int, float) or any(map(is_number, typing.get_args(annotation)))


def numbers() -> list[str]:
    """Every key of the schema that takes a number, as --set writes it; a list's as that of its entries."""
    keys = []
    for section, field in StudySpec.model_fields.items():
        for model in typing.get_args(field.annotation) or (field.annotation,):
            model = ArchitectureConfig if section == "architecture" else model
            if isinstance(model, type) and issubclass(model, BaseModel) and section not in ("space", "queue"):
                for key, inner in model.model_fields.items():
                    if is_number(inner.annotation):
                        keys.append(f"{section}.{key}" + ("[]" if typing.get_origin(inner.annotation) is tuple else ""))
    return [*keys, "architecture.n_layers.low", "architecture.n_layers.high"]


EXTREMES = [
    "0", "1", "-1", "-0.0", "1.0", "1e-300", "5e-324", "1e-46", "1e-38", "1e-9", "0.5", "0.999999999", "0.99999999999",
    "1e9", "1e38", "1e39", "1e308", "nan", "inf", "-inf", "100", "1000", "10000", "65536", "1000000", "2147483647",
    "2147483648", "4294967296", "9223372036854775807", "-9223372036854775808", "9223372036854775808",
]  # fmt: skip
FLOAT32 = ("model", "optim", "train")
NEEDED = {"split.n_folds": FOLDS % 2, "confirm.top_k": "confirm.n_seeds=2", "confirm.n_seeds": "confirm.top_k=2"}


def test_the_schema_has_numbers_everywhere():
    assert len(numbers()) > 45
    assert {"train.batch_size", "architecture.d_ff_ratio[]", "mesh.data", "execution.memory"} <= {*numbers()}


@given(key=st.sampled_from(numbers()), value=st.sampled_from(EXTREMES))
def test_an_extreme_number_loads_or_is_refused_by_its_key_within_a_second(file, key, value):
    path = key.removesuffix("[]")
    overrides = [NEEDED[path]] if path in NEEDED else []
    begin = time.monotonic()
    try:
        text = f"[{value}]" if key.endswith("[]") else value
        spec = load.study(file, overrides=[*overrides, f"{path}={text}"])
    except FintxError as error:
        assert path.split(".")[-1] in str(error).partition(": ")[2]  # behind what was asked
    else:
        section, _, name = path.partition(".")
        number = getattr(getattr(spec, section), name) if section in FLOAT32 else 0
        if isinstance(number, float):
            assert math.isfinite(np.float32(number)) and (number == 0) == (np.float32(number) == 0)
            assert np.float32(number) < 1 or name not in ("b1", "b2", "dropout", "warmup_fraction")
    assert time.monotonic() - begin < 1


LARGEST = [
    "train.batch_size=65536", "study.n_trials=1000000", "study.replicates=1000", "train.max_epochs=1000000",
    "confirm={top_k=1000, n_seeds=1000}", "execution.population=4096", "mesh={data=65536, model=65536}",
    "architecture={n_layers={low=1, high=1024}, d_model=[4, 8, 12, 16, 20, 24, 28]}",
    "budget.parameters=10000000000000", "task.horizon=10000", "split.embargo=10000", "model.context_length=10000",
    "split.train=1e-300", FOLDS % 100,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("override", LARGEST)
def test_a_plan_of_the_largest_numbers_answers(file, tmp_path, override):
    spec = load.study(file, overrides=[override])
    begin = time.monotonic()
    try:
        plan.plan_study(spec, data_root=tmp_path, on=plan.machine(None, None))
    except FintxError:
        pass  # the data are too few, or no shape fits, which one line says
    assert time.monotonic() - begin < 10  # a second or two on a quiet machine
