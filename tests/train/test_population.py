"""Trials trained side by side have the results of each alone, whatever happens to one of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fintx.config.schema import MeshConfig, TrialConfig
from fintx.data.datasets import Dataset
from fintx.errors import FintxError
from fintx.train import memory, train_step, trainer
from fintx.train.compilation import locked_cache
from fintx.train.member_run import FitResult, Member
from fintx.train.resume import CheckpointPolicy
from fintx.train.train_state import static_config
from fintx.train.trainer import fit_population

Trials = Callable[..., TrialConfig]
Datasets = Callable[..., Dataset]
Compilations = Callable[[], AbstractContextManager[list[str]]]
TOLERANCE = 2e-4
"""Of losses and outputs, relative and absolute: some 40 steps multiply rounding (1e-7) by Adam's divisions."""
# All in one program: they differ in values alone. The last three end before the others, each in its own way.
CHANGES: list[dict[str, Any]] = [
    {"train.max_epochs": 4},
    {"seed": 7, "optim.learning_rate": 1e-3, "optim.weight_decay": 0.2, "model.dropout": 0.4, "train.max_epochs": 6},
    {"seed": 1, "optim.warmup_fraction": 0.5, "train.max_epochs": 2},
    {"seed": 2, "optim.learning_rate": 0.03, "train.max_epochs": 50, "train.patience": 2},
    {"optim.learning_rate": 1e30, "optim.warmup_fraction": 0.0},
]
ENDS = ["completed", "completed", "completed", "early_stopped", "diverged"]


class Superseded(Exception):
    """What a guard raises."""


def allow() -> None:
    """The guard of a worker that still has its trial."""


def saves(folder: Path, *, every_s: float = 1e9) -> CheckpointPolicy:
    return CheckpointPolicy(folder, every_s=every_s, guard=allow)


@pytest.fixture(scope="module")
def data(make_dataset: Datasets) -> Dataset:
    return make_dataset(learnable=False)


@pytest.fixture(scope="module")
def configs(make_trial: Trials) -> list[TrialConfig]:
    return [make_trial(changes) for changes in CHANGES]


@pytest.fixture(scope="module")
def alone(configs: list[TrialConfig], data: Dataset) -> list[FitResult]:
    return [trainer.fit(config, data, metric="log_loss") for config in configs]


def together(members: list[Member], data: Dataset, **options: Any) -> list[FitResult]:
    results = fit_population(members, data, **{"metric": "log_loss"} | options)
    assert all(isinstance(result, FitResult) for result in results), results
    return results  # type: ignore[return-value]


@pytest.fixture(scope="module")
def population_of_all(configs: list[TrialConfig], data: Dataset) -> list[FitResult]:
    return together([Member(config) for config in configs], data)


def assert_close(result: FitResult, reference: FitResult) -> None:
    for name in ("outcome", "detail", "best_epoch", "best_step", "epochs", "steps", "param_count"):
        assert getattr(result, name) == getattr(reference, name), name
    assert result.batch_layout.micro_batch == reference.batch_layout.micro_batch
    assert len(result.curve) == len(reference.curve)
    for ours, theirs in zip(result.curve, reference.curve, strict=True):
        numbers = {key: value for key, value in theirs.items() if value is not None}
        assert {key: ours[key] for key in numbers} == pytest.approx(numbers, rel=TOLERANCE, abs=TOLERANCE)
        assert ours.keys() == theirs.keys() and all(ours[key] is None for key in theirs.keys() - numbers.keys())
    if reference.outputs is None:
        assert result.outputs is None and result.params is None
        return
    np.testing.assert_allclose(result.outputs, reference.outputs, rtol=TOLERANCE, atol=TOLERANCE)
    assert result.best == {key: result.curve[result.best_epoch - 1][key] for key in result.best}


def assert_same(result: FitResult, reference: FitResult) -> None:
    for name in ("outcome", "detail", "best", "last", "best_epoch", "best_step", "epochs", "steps", "curve"):
        assert getattr(result, name) == getattr(reference, name), name
    np.testing.assert_array_equal(result.outputs, reference.outputs)
    jax.tree.map(np.testing.assert_array_equal, result.params, reference.params)


def test_each_member_comes_to_what_it_comes_to_alone(
    population_of_all: list[FitResult], alone: list[FitResult]
) -> None:
    """Whoever diverges, stops early or has fewer epochs ends by itself, and the others go on."""
    assert [result.outcome for result in alone] == ENDS
    for result, reference in zip(population_of_all, alone, strict=True):
        assert_close(result, reference)


def test_a_members_record_is_repeated_exactly_by_the_evaluation_program(
    population_of_all: list[FitResult], configs: list[TrialConfig], data: Dataset
) -> None:
    for config, result in zip(configs[:4], population_of_all, strict=False):
        outputs = trainer.predict(config, result.params, data.features, data.validation.rows)
        np.testing.assert_array_equal(outputs, result.outputs)


def test_time_is_shared_out(population_of_all: list[FitResult]) -> None:
    """Every member's share of compiling is the same; who trains longer has more of the rest."""
    assert len({result.timing.compile_s for result in population_of_all}) == 1
    assert population_of_all[2].timing.wall_s < population_of_all[0].timing.wall_s < population_of_all[1].timing.wall_s


def test_an_interrupted_population_goes_on_bit_for_bit(
    configs: list[TrialConfig], data: Dataset, tmp_path: Path, population_of_all: list[FitResult],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Stopped in the second epoch, where one member has diverged, and in the fourth, where two more have ended."""
    monkeypatch.setattr(trainer, "dispatch_size", lambda left, step_s: 1)
    members = [Member(config, saves=saves(tmp_path / str(i))) for i, config in enumerate(configs)]
    for stop in (7, 16):
        steps: list[int] = [0]
        noisy = [*members]
        noisy[1] = Member(configs[1], on_progress=steps.append, saves=members[1].saves)
        stopped = together(noisy, data, should_stop=lambda steps=steps, stop=stop: steps[-1] >= stop)
        assert stopped[1].outcome == "interrupted" and stopped[1].steps == stop
    results = together(members, data)
    for result, reference in zip(results[:2], population_of_all[:2], strict=True):
        assert result.resumed_step == 16
        assert_same(result, reference)


@pytest.mark.slow
def test_members_go_on_alone_and_in_other_company(
    configs: list[TrialConfig], data: Dataset, tmp_path: Path, alone: list[FitResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state is a trial's own: one member trains on by itself, then joins again, steps ahead of the others."""
    monkeypatch.setattr(trainer, "dispatch_size", lambda left, step_s: 1)
    members = [Member(config, saves=saves(tmp_path / str(i))) for i, config in enumerate(configs[:2])]
    taken = [0]
    noisy = [Member(configs[0], on_progress=taken.append, saves=members[0].saves), members[1]]
    together(noisy, data, should_stop=lambda: taken[-1] >= 7)
    ahead = trainer.fit(
        configs[0], data, metric="log_loss", saves=members[0].saves, on_progress=taken.append,
        should_stop=lambda: taken[-1] >= 13,
    )  # fmt: skip
    assert (ahead.resumed_step, ahead.steps) == (7, 13)
    results = together(members, data)
    assert [result.resumed_step for result in results] == [13, 7]
    for result, reference in zip(results, alone, strict=False):
        assert_close(result, reference)


def test_what_one_members_hooks_raise_ends_it_alone(
    configs: list[TrialConfig], data: Dataset, tmp_path: Path, alone: list[FitResult]
) -> None:
    """Superseded at its first save; the others are saved, and go on."""

    def refuse() -> None:
        raise Superseded("taken over")

    members = [
        Member(configs[0], saves=CheckpointPolicy(tmp_path / "0", every_s=0.0, guard=refuse)),
        Member(configs[1], saves=saves(tmp_path / "1", every_s=0.0)),
    ]
    lost, kept = fit_population(members, data, metric="log_loss")
    assert isinstance(lost, Superseded) and isinstance(kept, FitResult)
    assert_close(kept, alone[1])
    assert not list((tmp_path / "0").glob("step_*")) and len(list((tmp_path / "1").glob("step_*"))) == 2


def test_too_many_for_the_memory_train_in_halves(
    configs: list[TrialConfig], data: Dataset, alone: list[FitResult]
) -> None:
    """Two of which only one fits at a time: each is then the single run, to the bit."""
    members = [Member(config) for config in configs[:2]]
    pair = together(members, data)
    single = alone[0].memory_bytes
    assert single is not None and pair[0].memory_bytes is not None
    limit = (single + 2 * pair[0].memory_bytes) // 2
    for result, reference in zip(together(members, data, memory_limit=limit), alone, strict=False):
        assert_same(result, reference)


def test_a_limit_for_none_of_them(configs: list[TrialConfig], data: Dataset, compilations: Compilations) -> None:
    with compilations() as compiled:
        results = together([Member(config) for config in configs], data, memory_limit=1000)
    assert compiled == [] and [result.outcome for result in results] == ["out_of_memory"] * 5


def test_out_of_memory_while_several_train_is_nobodys_outcome(
    configs: list[TrialConfig], data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them alone might have fitted; its worker fails, and each is tried again."""

    def exhausted(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")

    monkeypatch.setattr(trainer, "dispatch_size", exhausted)
    with pytest.raises(jax.errors.JaxRuntimeError):
        fit_population([Member(config) for config in configs[:2]], data, metric="log_loss")
    (single,) = together([Member(configs[0])], data)
    assert single.outcome == "out_of_memory"


def test_members_of_two_programs_are_refused(make_trial: Trials, data: Dataset) -> None:
    members = [Member(make_trial()), Member(make_trial({"shape.d_ff": 32}))]
    with pytest.raises(ValueError, match="share one program"):
        fit_population(members, data, metric="log_loss")


def test_an_unknown_metric_is_an_error_of_all(configs: list[TrialConfig], data: Dataset) -> None:
    with pytest.raises(FintxError, match="is unknown"):
        fit_population([Member(configs[0])], data, metric="luck")


def test_a_metric_that_is_undefined_here_ends_each(configs: list[TrialConfig], make_dataset: Datasets) -> None:
    data = make_dataset()
    data.validation.labels[:] = 1
    results = fit_population([Member(config) for config in configs[:2]], data, metric="auc")
    assert all(isinstance(result, FintxError) and "undefined" in str(result) for result in results)


@pytest.mark.slow
def test_a_population_on_a_mesh_comes_to_the_same(
    configs: list[TrialConfig], data: Dataset, tmp_path: Path, alone: list[FitResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows shared out over 4 devices, heads over 2, every matrix cut; stopped there, and gone on with on one."""
    monkeypatch.setattr(trainer, "dispatch_size", lambda left, step_s: 1)
    mesh, taken = MeshConfig(data=4, model=2, fsdp=True), [0]
    members = [Member(config, saves=saves(tmp_path / str(i))) for i, config in enumerate(configs[:2])]
    noisy = [Member(configs[0], on_progress=taken.append, saves=members[0].saves), members[1]]
    stopped = together(noisy, data, mesh=mesh, should_stop=lambda: taken[-1] >= 7)
    assert [str(result.batch_layout.layout) for result in stopped] == ["data 4 × model 2, fsdp"] * 2
    for result, reference in zip(together(members, data, mesh=mesh), alone, strict=False):
        assert result.resumed_step == 7
        assert_close(result, reference)
    joined = together([Member(config, saves=saves(tmp_path / str(i))) for i, config in enumerate(configs[:2])], data)
    assert all("goes on in" in result.warnings[0] for result in joined)


# --- compiled ahead, from another thread ------------------------------------------------------------------------------


@pytest.mark.parametrize("n_members", [1, 2])
@pytest.mark.slow
def test_what_was_prepared_is_not_compiled_again(
    make_trial: Trials, data: Dataset, compilations: Compilations, n_members: int
) -> None:
    config = make_trial({"shape.d_ff": 20 + 4 * n_members, "train.max_epochs": 1})
    thread = threading.Thread(target=trainer.compile_ahead, args=(config, data), kwargs={"n_members": n_members})
    thread.start()
    thread.join()
    with compilations() as compiled:
        results = together([Member(config)] * n_members, data)
    assert compiled == [] and all(result.outcome == "completed" for result in results)


def test_two_threads_that_want_the_same_make_it_once() -> None:
    compiled: list[int] = []
    both_ask = threading.Barrier(2)

    @locked_cache(kept=2)
    def square(n: int) -> int:
        compiled.append(n)
        return n * n

    def ask(_: int) -> int:
        both_ask.wait()
        return square(3)

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(ask, range(2))) == [9, 9]
    assert compiled == [3]


def test_one_that_waits_for_another_thing_is_not_held_up() -> None:
    """A program that is there already is not waited for while another one is made."""
    making, go_on = threading.Event(), threading.Event()

    @locked_cache(kept=2)
    def make(name: str) -> str:
        if name == "slow":
            making.set()
            assert go_on.wait(30)
        return name

    assert make("quick") == "quick"
    slow = threading.Thread(target=make, args=("slow",))
    slow.start()
    assert making.wait(30)
    assert make("quick") == "quick"
    go_on.set()
    slow.join()


def test_a_populations_memory_is_that_of_all_members(configs: list[TrialConfig]) -> None:
    sizes = {"n_features": 3, "n_rows": 256, "n_samples": 256}
    one, five = (train_step.compile_training(static_config(configs[0]), **sizes, n_members=n).n_bytes for n in (1, 5))
    assert five - one > 4 * 3 * 4 * 100 and memory.lower_bound(configs[0]) < one
