"""A trial cut off anywhere ends as one never cut off, bit for bit, whatever happened to the states on its disk."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from fintx.config.schema import TaskConfig, TrialConfig
from fintx.data.datasets import Dataset
from fintx.errors import FintxError
from fintx.train import checkpoint, resume, trainer
from fintx.train.member_run import FitResult
from fintx.train.resume import CheckpointManager, CheckpointPolicy, TrainingState
from fintx.train.train_state import BatchLayout, FitInputs, Progress, Timing, TrainState
from fintx.train.train_step import EpochSums

Trials = Callable[..., TrialConfig]
Datasets = Callable[..., Dataset]
DROPOUT = {"model.dropout": 0.3, "train.max_epochs": 4}
REGRESSION = DROPOUT | {"task": TaskConfig(kind="regression", horizon=1), "train.loss": "mse"}
FIVE_STEPS = 5
"""An epoch of the small trial."""


class Superseded(Exception):
    """What a guard raises."""


def allow() -> None:
    """The guard of a worker that still has its trial."""


def always(folder: Path) -> CheckpointPolicy:
    return CheckpointPolicy(folder, every_s=0.0, guard=allow)


def never(folder: Path) -> CheckpointPolicy:
    return CheckpointPolicy(folder, every_s=1e9, guard=allow)


@pytest.fixture
def single_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of one step, so that a trial can be stopped at any."""
    monkeypatch.setattr(trainer, "dispatch_size", lambda left, step_s: 1)


def stopped_at(config: TrialConfig, data: Dataset, folder: Path, step: int, **options: Any) -> FitResult:
    """An attempt that is asked to stop once `step` steps are taken."""
    taken = [0]
    result = trainer.fit(
        config,
        data,
        **{"metric": "log_loss", "saves": never(folder)} | options,
        on_progress=taken.append,
        should_stop=lambda: taken[-1] >= step,
    )
    assert (result.outcome, result.steps) == ("interrupted", step)
    return result


def assert_same(result: FitResult, reference: FitResult) -> None:
    for name in ("outcome", "detail", "best", "last", "best_epoch", "best_step", "epochs", "steps", "curve"):
        assert getattr(result, name) == getattr(reference, name), name
    np.testing.assert_array_equal(result.outputs, reference.outputs, strict=True)
    jax.tree.map(np.testing.assert_array_equal, result.params, reference.params)


def states(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def reference(make_trial: Trials, make_dataset: Datasets) -> FitResult:
    """Never interrupted, and never saved."""
    return trainer.fit(make_trial(DROPOUT), make_dataset(), metric="log_loss")


@pytest.mark.parametrize(
    "stops",
    [[0], [1], [7], [5], [10], [19], [2, 5, 6, 13], list(range(0, 20))],
    ids=["before the first step", "first step", "mid-epoch", "epoch's end", "epoch's end again", "last step",
         "several times", "at every step"],
)  # fmt: skip
def test_interrupted_is_never_interrupted(
    single_steps: None, reference: FitResult, make_trial: Trials, make_dataset: Datasets, tmp_path: Path, stops: list
) -> None:
    config, data = make_trial(DROPOUT), make_dataset()
    for before, step in itertools.pairwise([0, *stops]):
        stopped = stopped_at(config, data, tmp_path, step)
        assert stopped.resumed_step == before
    result = trainer.fit(config, data, metric="log_loss", saves=never(tmp_path))
    assert (result.resumed_step, result.warnings) == (stops[-1], ())
    assert_same(result, reference)


@pytest.mark.slow
def test_interrupted_is_never_interrupted_in_optimised_programs(
    single_steps: None, make_trial: Trials, make_dataset: Datasets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, but compiled as users compile, and against whole epochs: other tests switch XLA's optimisations off."""
    config, data = make_trial(DROPOUT | {"shape.d_ff": 28}), make_dataset()
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        for step in (3, 12):
            stopped_at(config, data, tmp_path, step)
        result = trainer.fit(config, data, metric="log_loss", saves=never(tmp_path))
        monkeypatch.setattr(trainer, "dispatch_size", lambda left, step_s: left)
        assert_same(result, trainer.fit(config, data, metric="log_loss"))
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


def test_a_killed_process_goes_on_from_its_last_regular_save(
    single_steps: None, reference: FitResult, make_trial: Trials, make_dataset: Datasets, tmp_path: Path
) -> None:
    """Not asked to stop: an exception ends it, after a state that is saved at each step."""
    config, data = make_trial(DROPOUT), make_dataset()

    def power_cut(step: int) -> None:
        if step == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.fit(config, data, metric="log_loss", on_progress=power_cut, saves=always(tmp_path))
    assert states(tmp_path) == ["step_00000010", "step_00000011"]
    result = trainer.fit(config, data, metric="log_loss", saves=always(tmp_path))
    assert result.resumed_step == 11
    assert_same(result, reference)


def test_regression_goes_on_in_the_target_units(
    single_steps: None, make_trial: Trials, make_dataset: Datasets, tmp_path: Path
) -> None:
    config, data = make_trial(REGRESSION), make_dataset(kind="regression")
    reference = trainer.fit(config, data, metric="mse")
    for step in (7, 15):
        stopped_at(config, data, tmp_path, step, metric="mse")
    assert_same(trainer.fit(config, data, metric="mse", saves=never(tmp_path)), reference)


def test_interrupted_after_the_best_epoch(
    single_steps: None, make_trial: Trials, make_dataset: Datasets, tmp_path: Path
) -> None:
    """The best parameters are not the latest: they come through the disk, and patience goes on counting."""
    changes = {"train.max_epochs": 50, "train.patience": 3, "optim.learning_rate": 0.03, "model.dropout": 0.3}
    config, data = make_trial(changes), make_dataset(learnable=False)
    reference = trainer.fit(config, data, metric="log_loss")
    assert reference.outcome == "early_stopped"
    stopped_at(config, data, tmp_path, reference.best_step + FIVE_STEPS + 2)
    assert_same(trainer.fit(config, data, metric="log_loss", saves=never(tmp_path)), reference)


def test_interrupted_between_a_bad_step_and_its_epochs_end(
    single_steps: None, make_trial: Trials, make_dataset: Datasets, tmp_path: Path
) -> None:
    """The epoch's loss is NaN by then, which JSON can't say, and the step to blame is one of another attempt."""
    config, data = make_trial({"optim.learning_rate": 1e30, "optim.warmup_fraction": 0.0}), make_dataset()
    reference = trainer.fit(config, data, metric="log_loss")
    assert reference.outcome == "diverged"
    assert "not finite at step" in reference.detail and reference.steps == FIVE_STEPS
    stopped_at(config, data, tmp_path, 4)
    result = trainer.fit(config, data, metric="log_loss", saves=never(tmp_path))
    assert (result.outcome, result.detail, result.curve) == ("diverged", reference.detail, reference.curve)


def test_collapse_goes_on_counting(
    single_steps: None, make_trial: Trials, make_dataset: Datasets, tmp_path: Path
) -> None:
    config = make_trial({"train.collapse_spread": 10.0, "train.collapse_patience": 3, "train.max_epochs": 9})
    reference = trainer.fit(config, make_dataset(), metric="log_loss")
    assert (reference.outcome, reference.epochs) == ("collapsed", 3)
    stopped_at(config, make_dataset(), tmp_path, 12)
    assert_same(trainer.fit(config, make_dataset(), metric="log_loss", saves=never(tmp_path)), reference)


def test_a_saved_end_is_the_result_again_without_a_step(
    tmp_path: Path, make_trial: Trials, make_dataset: Datasets
) -> None:
    config, data = make_trial(DROPOUT), make_dataset()
    saves = dataclasses.replace(never(tmp_path), at_end=True)
    first = trainer.fit(config, data, metric="log_loss", saves=saves)
    taken: list[int] = []
    again = trainer.fit(config, data, metric="log_loss", saves=saves, on_progress=taken.append)
    assert taken == [] and again.resumed_step == first.steps
    assert_same(again, first)


def test_without_saves_a_trial_just_stops(single_steps: None, make_trial: Trials, make_dataset: Datasets) -> None:
    result = stopped_at(make_trial(DROPOUT), make_dataset(), Path("nowhere"), 7, saves=None)
    assert (result.epochs, result.resumed_step) == (1, 0)
    assert "step 7" in result.detail


def test_times_are_summed_over_attempts(
    single_steps: None, make_trial: Trials, make_dataset: Datasets, tmp_path: Path
) -> None:
    config, data = make_trial(DROPOUT), make_dataset()
    stopped_at(config, data, tmp_path, 7)
    saved = json.loads((tmp_path / "step_00000007" / "checkpoint.json").read_text())["meta"]
    result = trainer.fit(config, data, metric="log_loss", saves=never(tmp_path))
    for name in ("trace_s", "run_s", "wall_s"):  # compile_s is 0 where an earlier trial's programs serve
        assert getattr(result.timing, name) > saved[name] > 0
    assert saved["wall_s"] >= saved["trace_s"] + saved["compile_s"] + saved["run_s"]


# --- what befalls a state on the disk ---------------------------------------------------------------------------------


def flip(folder: Path) -> None:
    """One bit in the largest file: the arrays."""
    path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 4]) + whole[len(whole) // 2 + 1 :])


def truncate(folder: Path) -> None:
    path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(path, path.stat().st_size // 2)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def half_write(folder: Path) -> None:
    (folder / "SHA256SUMS").unlink()


def lose_a_file(folder: Path) -> None:
    (folder / "checkpoint.json").unlink()


def become_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


DAMAGES = [flip, truncate, empty, half_write, lose_a_file, become_a_file]


@pytest.fixture(scope="module")
def two_states(make_trial: Trials, make_dataset: Datasets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """States at steps 7 and 12; 12 is the newest."""
    folder = tmp_path_factory.mktemp("states")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "dispatch_size", lambda left, step_s: 1)
        for step in (7, 12):
            stopped_at(make_trial(DROPOUT), make_dataset(), folder, step)
    return folder


@pytest.fixture
def copy(two_states: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_states, tmp_path / "copy"))


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_state_is_set_aside_and_the_one_before_is_used(
    copy: Path, reference: FitResult, make_trial: Trials, make_dataset: Datasets, damage: Callable[[Path], None]
) -> None:
    damage(copy / "step_00000012")
    heard: list[str] = []
    result = trainer.fit(
        make_trial(DROPOUT), make_dataset(), metric="log_loss", saves=never(copy), on_warning=heard.append
    )
    assert result.resumed_step == 7
    assert states(copy) == ["step_00000007", "step_00000012.damaged"]
    (warning,) = result.warnings
    assert heard == [warning]
    assert "\n" not in warning
    assert "step_00000012" in warning and "set aside" in warning and "goes on from step 7" in warning
    assert_same(result, reference)


def test_no_good_state_left_begins_at_the_beginning(
    copy: Path, reference: FitResult, make_trial: Trials, make_dataset: Datasets
) -> None:
    flip(copy / "step_00000012")
    empty(copy / "step_00000007")
    result = trainer.fit(make_trial(DROPOUT), make_dataset(), metric="log_loss", saves=never(copy))
    assert result.resumed_step == 0
    assert len(result.warnings) == 2 and all("goes on from step 0" in line for line in result.warnings)
    assert states(copy) == ["step_00000007.damaged", "step_00000012.damaged"]
    assert_same(result, reference)


def test_damage_upon_damage(copy: Path, make_trial: Trials, make_dataset: Datasets) -> None:
    """The same step is saved and damaged again: neither is lost from sight."""
    (copy / "step_00000012.damaged").mkdir()
    flip(copy / "step_00000012")
    trainer.fit(make_trial(DROPOUT), make_dataset(), metric="log_loss", saves=never(copy))
    assert states(copy) == ["step_00000007", "step_00000012.damaged", "step_00000012.damaged-2"]


def test_a_state_of_other_items_is_damage(copy: Path, make_trial: Trials, make_dataset: Datasets) -> None:
    """Whole by its sums, but not what this fintx writes."""
    found = checkpoint.describe(copy / "step_00000012")
    checkpoint.write(found.folder, {"training": {"x": np.zeros(3)}}, config=found.config, meta=found.meta)
    result = trainer.fit(make_trial(DROPOUT), make_dataset(), metric="log_loss", saves=never(copy))
    assert result.resumed_step == 7
    assert "optimizer/1/count: wanted int32[], got nothing" in result.warnings[0]


FOREIGN: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "seed": ({"seed": 1}, {}, "log_loss", "another config"),
    "rate": ({"optim.learning_rate": 1e-3}, {}, "log_loss", "another config"),
    "metric": ({}, {}, "auc", "another metric"),
    "bars": ({}, {"data_hash": "b"}, "log_loss", "another data_hash"),
    "labels": ({}, {"label_hash": "b"}, "log_loss", "another label_hash"),
    "split": ({}, {"split_hash": "b"}, "log_loss", "another split_hash"),
}


@pytest.mark.parametrize(("changes", "hashes", "metric", "words"), FOREIGN.values(), ids=FOREIGN)
def test_a_state_of_another_trial_is_set_aside(
    copy: Path, make_trial: Trials, make_dataset: Datasets, changes: dict, hashes: dict, metric: str, words: str
) -> None:
    config, data = make_trial(DROPOUT | changes), dataclasses.replace(make_dataset(), **hashes)
    result = trainer.fit(config, data, metric=metric, saves=never(copy))
    assert result.resumed_step == 0
    assert states(copy) == ["step_00000007.foreign", "step_00000012.foreign"]
    assert all(words in warning for warning in result.warnings)
    assert_same(result, trainer.fit(config, data, metric=metric))


def test_what_killed_processes_left_is_removed(copy: Path, make_trial: Trials, make_dataset: Datasets) -> None:
    shutil.copytree(copy / "step_00000012", copy / ".step_00000013.partial-99-abcd")
    shutil.copytree(copy / "step_00000007", copy / ".step_00000001.removed")
    (copy / "notes.txt").write_text("someone else's")
    result = trainer.fit(make_trial(DROPOUT), make_dataset(), metric="log_loss", saves=never(copy))
    assert (result.resumed_step, result.warnings) == (12, ())
    assert states(copy) == ["notes.txt", "step_00000007", "step_00000012"]


# --- when a save fails ------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_full_disk_is_one_line_and_older_states_are_intact(
    copy: Path, reference: FitResult, make_trial: Trials, make_dataset: Datasets
) -> None:
    """The kernel refuses to write more than 4 KiB into a file."""
    before = contents(copy)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, hard))
    try:
        with pytest.raises(FintxError, match="could not save .*step_000000.*File too large") as error:
            trainer.fit(make_trial(DROPOUT), make_dataset(), metric="log_loss", saves=always(copy))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert contents(copy) == before
    assert_same(trainer.fit(make_trial(DROPOUT), make_dataset(), metric="log_loss", saves=never(copy)), reference)


def superseded() -> None:
    # As a database's driver may have it: a save must not take its cause for the disk's.
    raise Superseded("another worker has the trial") from ConnectionRefusedError(111, "Connection refused")


def test_a_superseded_worker_commits_nothing(
    copy: Path, single_steps: None, make_trial: Trials, make_dataset: Datasets
) -> None:
    before = contents(copy)
    with pytest.raises(Superseded):
        trainer.fit(
            make_trial(DROPOUT), make_dataset(), metric="log_loss", saves=CheckpointPolicy(copy, 0.0, superseded)
        )
    assert states(copy) == ["step_00000007", "step_00000012"]
    assert contents(copy) == before


def test_a_superseded_worker_neither_sweeps_nor_sets_aside(
    copy: Path, make_trial: Trials, make_dataset: Datasets
) -> None:
    """What looks like rubbish may be the new owner's save under way."""
    for spoil in (lambda: (copy / ".step_00000013.partial-99-abcd").mkdir(), lambda: flip(copy / "step_00000012")):
        spoil()
        before = states(copy)
        with pytest.raises(Superseded):
            trainer.fit(
                make_trial(DROPOUT), make_dataset(), metric="log_loss", saves=CheckpointPolicy(copy, 1e9, superseded)
            )
        assert states(copy) == before
        shutil.rmtree(copy / ".step_00000013.partial-99-abcd", ignore_errors=True)


def test_a_superseded_workers_failed_save_says_so(
    copy: Path, make_trial: Trials, make_dataset: Datasets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new owner swept its staging folder away: not the disk is to blame."""

    def swept(*_: Any, **__: Any) -> None:
        raise FintxError("could not save the checkpoint: No such file or directory")

    monkeypatch.setattr(checkpoint, "write", swept)
    with pytest.raises(Superseded):
        trainer.fit(
            make_trial(DROPOUT), make_dataset(), metric="log_loss", saves=CheckpointPolicy(copy, 0.0, superseded)
        )
    with pytest.raises(FintxError, match="No such file"):
        trainer.fit(make_trial(DROPOUT), make_dataset(), metric="log_loss", saves=always(copy))


# --- when, and how many -----------------------------------------------------------------------------------------------


def training_state(step: int) -> TrainingState:
    return TrainingState(
        state=TrainState(step=np.int32(step), params={}, optimizer=()),
        sums=EpochSums(),
        progress=Progress(),
        batch_layout=BatchLayout(16),
        timing=Timing(),
    )


@pytest.mark.parametrize(
    ("every_s", "save_s", "first", "then"),
    [(None, 0.3, 60, 60), (None, 3.0, 60, 150), (7.0, 3.0, 7, 7), (0.0, 3.0, 0, 0)],
    ids=["cheap", "dear: 50 times as long", "a number is honoured", "always"],
)
def test_when_a_save_is_due(
    make_trial: Trials,
    make_dataset: Datasets,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    every_s: float | None,
    save_s: float,
    first: float,
    then: float,
) -> None:
    now = [1000.0]
    monkeypatch.setattr(resume, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(checkpoint, "write", lambda *_, **__: now.__setitem__(0, now[0] + save_s))
    manager = CheckpointManager(
        CheckpointPolicy(tmp_path, every_s, allow), FitInputs(make_trial(), make_dataset(), "log_loss")
    )
    now[0] += 500  # compiling
    manager.start_clock()
    for step, after in ((1, first), (2, then), (3, then)):
        if after:
            now[0] += after - 0.5
            assert not manager.is_due()
            now[0] += 0.5
        assert manager.is_due()
        manager.save(training_state(step))


def test_a_step_on_the_disk_is_not_saved_again(copy: Path, make_trial: Trials, make_dataset: Datasets) -> None:
    before = (copy / "step_00000012").stat().st_ino
    result = trainer.fit(
        make_trial(DROPOUT), make_dataset(), metric="log_loss", saves=always(copy), should_stop=lambda: True
    )
    assert (result.outcome, result.steps) == ("interrupted", 12)
    assert (copy / "step_00000012").stat().st_ino == before
