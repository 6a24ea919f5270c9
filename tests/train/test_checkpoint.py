"""A checkpoint comes back as it was saved, or not at all: every file damaged in turn, for real."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from fintx.config.schema import TrialConfig
from fintx.errors import FintxError
from fintx.model import encoder
from fintx.train import checkpoint
from fintx.train.checkpoint import CheckpointDamaged, NotACheckpoint
from fintx.types import Params

Trials = Callable[..., TrialConfig]
META = {"study": "demo", "best": {"log_loss": 0.1 + 0.2, "auc": None}, "features": ["a", "b"]}


def random_params(config: TrialConfig) -> Params:
    rng = np.random.default_rng(0)
    abstract = encoder.abstract_params(config.model, config.shape, len(config.data.features))
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), abstract)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def saved(make_trial: Trials, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trial") / "checkpoint" / "fold_0"
    config = make_trial()
    checkpoint.save(folder, random_params(config), config=config, meta=META)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_round_trip_is_bit_for_bit(saved: Path, make_trial: Trials) -> None:
    config = make_trial()
    restored = checkpoint.load(saved)
    assert restored.config == config
    assert restored.meta == META
    jax.tree.map(np.testing.assert_array_equal, restored.params, random_params(config))
    assert all(type(leaf) is np.ndarray and leaf.dtype == np.float32 for leaf in jax.tree.leaves(restored.params))


def test_a_moved_checkpoint_and_a_relative_path_load(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parent)
    assert checkpoint.load(Path("copy")).meta == META


def test_saving_by_a_relative_path(make_trial: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_trial()
    checkpoint.save(Path("a/b"), random_params(config), config=config, meta={})
    assert checkpoint.load(tmp_path / "a" / "b").config == config
    assert os.listdir(tmp_path / "a") == ["b"]


def test_saving_again_replaces(copy: Path, make_trial: Trials) -> None:
    config = make_trial({"seed": 3})
    checkpoint.save(copy, random_params(config), config=config, meta={"second": True})
    assert checkpoint.load(copy).meta == {"second": True}
    assert os.listdir(copy.parent) == ["copy"]


def test_sums_are_those_of_sha256sum(saved: Path) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("sha256sum is not on this machine")
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=saved, check=True)
    names = {line.split("  ", 1)[1] for line in (saved / "SHA256SUMS").read_text().splitlines()[:-1]}
    assert names | {"SHA256SUMS"} == {path.relative_to(saved).as_posix() for path in files(saved)}


@pytest.mark.parametrize("place", ["first byte", "middle", "last byte"])
def test_a_flipped_bit_in_any_file_is_damage(copy: Path, place: str) -> None:
    for path in files(copy):
        whole = path.read_bytes()
        index = {"first byte": 0, "middle": len(whole) // 2, "last byte": len(whole) - 1}[place]
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        with pytest.raises(CheckpointDamaged, match=f"{path.name}.* has changed") as error:
            checkpoint.load(copy)
        assert "\n" not in str(error.value)
        path.write_bytes(whole)
    assert checkpoint.load(copy).meta == META


def test_a_truncated_file_is_damage(copy: Path) -> None:
    for path in files(copy):
        whole = path.read_bytes()
        for length in (len(whole) // 2, 0):
            path.write_bytes(whole[:length])
            with pytest.raises(CheckpointDamaged, match=path.name):
                checkpoint.load(copy)
        path.write_bytes(whole)
    assert checkpoint.load(copy).meta == META


def test_a_missing_file_is_damage(copy: Path) -> None:
    for path in files(copy):
        if path.name == "SHA256SUMS":
            continue
        whole = path.read_bytes()
        path.unlink()
        with pytest.raises(CheckpointDamaged, match=f"{path.name} is missing"):
            checkpoint.load(copy)
        path.write_bytes(whole)
    assert checkpoint.load(copy).meta == META


def test_a_save_without_its_sums_is_no_checkpoint(copy: Path) -> None:
    (copy / "SHA256SUMS").unlink()
    with pytest.raises(NotACheckpoint, match="holds no SHA256SUMS.*did not finish"):
        checkpoint.load(copy)


def test_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / "empty").mkdir()
    for path, words in [
        ("nowhere", "not there"),
        ("model.pt", "is a file"),
        ("empty", "no checkpoint"),
        ("", "no check"),
    ]:
        with pytest.raises(NotACheckpoint, match=words) as error:
            checkpoint.load(tmp_path / path)
        assert "\n" not in str(error.value)


def redescribe(folder: Path, edit: Callable[[dict], None]) -> None:
    """Change checkpoint.json and sum it up anew: what another version of fintx might have written."""
    path = folder / "checkpoint.json"
    description = json.loads(path.read_text())
    edit(description)
    path.write_text(json.dumps(description))
    lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)[:-1]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    body = "".join(f"{digest}  checkpoint.json\n" if "checkpoint.json" in line else line for line in lines)
    (folder / "SHA256SUMS").write_text(f"{body}# {hashlib.sha256(body.encode()).hexdigest()}\n")


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda d: d.update(format=1), NotACheckpoint, "has format 1; this fintx reads format 2"),
        (lambda d: d["config"]["optim"].update(momentum=1), NotACheckpoint, "can't read its checkpoint.json.*momentum"),
        (lambda d: d.pop("config"), NotACheckpoint, "can't read its checkpoint.json.*config"),
        (lambda d: d["config"]["shape"].update(d_ff=20), CheckpointDamaged, "wanted float32.*20.*got float32.*16"),
        (lambda d: d["config"]["model"].update(revin=True), CheckpointDamaged, "wanted float32.*got nothing"),
    ],
    ids=["newer format", "unknown key", "no config", "another shape", "another tree"],
)
def test_a_description_that_does_not_fit(copy: Path, edit: Callable, error: type, message: str) -> None:
    redescribe(copy, edit)
    with pytest.raises(error, match=message) as raised:
        checkpoint.load(copy)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("change", [lambda a: a.astype(np.float16), lambda a: a[..., :1]], ids=["dtype", "shape"])
def test_params_of_another_config_are_not_saved(make_trial: Trials, tmp_path: Path, change: Callable) -> None:
    config = make_trial()
    params = jax.tree.map(change, random_params(config))
    with pytest.raises(FintxError, match="don't fit their config: .*wanted float32"):
        checkpoint.save(tmp_path / "x", params, config=config, meta={})
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(make_trial: Trials, tmp_path: Path) -> None:
    """The kernel refuses to write more than 64 KiB into a file."""
    config = make_trial({"shape.d_model": 64, "shape.d_ff": 512})
    params = random_params(config)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(FintxError, match="could not save the checkpoint .*File too large") as error:
            checkpoint.save(tmp_path / "x", params, config=config, meta={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_one_line(make_trial: Trials, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where a folder should be")
    config = make_trial()
    with pytest.raises(FintxError, match="could not save the checkpoint .*Not a directory|File exists"):
        checkpoint.save(tmp_path / "taken" / "x", random_params(config), config=config, meta={})


def test_meta_that_json_cannot_say_writes_nothing(make_trial: Trials, tmp_path: Path) -> None:
    config = make_trial()
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.save(tmp_path / "x", random_params(config), config=config, meta={"loss": float("nan")})
    assert os.listdir(tmp_path) == []
