"""Compiled programs: made once, for whatever trials, studies and processes want them; kept where nobody else writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fintx.config import load
from fintx.errors import FintxError
from fintx.run import scheduler
from fintx.study import records
from fintx.study.events import RunContext
from fintx.study.records import TrialRecord
from fintx.train import compilation
from tests.helpers import shared

ONE_SHAPE = ("architecture.n_heads=[1]", "architecture.n_layers={low=2, high=2}", "budget.tolerance=0.5")
VALUES = (
    'space."optim.learning_rate"={low=1e-4, high=1e-2, log=true}', 'space."optim.weight_decay"={low=1e-4, high=0.1}',
    'space."model.dropout"={low=0.05, high=0.3}', 'space."optim.warmup_fraction"={low=0.0, high=0.3}',
    'space."train.max_epochs"={low=1, high=3}',
)  # fmt: skip


def run(file: Path, root: Path, *changes: str) -> list[TrialRecord]:
    spec = load.study(file, overrides=[f'execution.program_cache="{root / "programs"}"', *ONE_SHAPE, *changes])
    return records.read_all(
        scheduler.run_study(spec, RunContext(root / "outputs", shared.data_root(root / "data"))).folder
    )


@pytest.mark.slow
def test_ten_trials_that_differ_in_values_compile_one_set_of_programs(tiny_file: Path, tmp_path: Path) -> None:
    """Start, segment and evaluation; and a later study of the shape, in other processes, compiles nothing."""
    ten = run(tiny_file, tmp_path, "study.n_trials=10", *VALUES)
    assert len({(r.config.optim.learning_rate, r.config.model.dropout) for r in ten}) == 10
    assert len({r.config.train.max_epochs for r in ten}) > 1 and len({r.config.seed for r in ten}) == 10
    assert [record.n_compiled for record in ten] == [3] + 9 * [0]
    assert ten[0].trace_s > 0 and ten[0].compile_s > 0 and all(record.compile_s == 0 for record in ten[1:])
    assert all(0 < r.run_s and r.trace_s + r.compile_s + r.run_s <= r.wall_s for r in ten)
    (later,) = run(tiny_file, tmp_path, 'study.name="later"', "study.n_trials=1")
    assert later.n_compiled == 0 and later.compile_s > 0
    assert (tmp_path / "programs").stat().st_mode & 0o777 == 0o700


SCRIPT = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from fintx.train import compilation
from fintx.train import compilation
compilation.keep_programs(sys.argv[1] or None, outputs=Path(sys.argv[2]))
with compilation.timed_compilation() as made:
    compiled = jax.jit(lambda x: jnp.sin(x) @ x.T).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32)).compile()
print(made.n_compiled, made.n_read, float(compiled(jnp.eye(8))[0, 0]))
"""


def compile_in_a_process(setting: str, outputs: Path, *, own: Path | None = None) -> tuple[int, int]:
    """Programs that were compiled, and read."""
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")}
    if own is not None:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(own)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, setting, str(outputs)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    n_compiled, n_read, value = done.stdout.split()
    assert float(value) == pytest.approx(0.8414710)
    return int(n_compiled), int(n_read)


def test_a_second_process_reads_what_the_first_compiled(tmp_path: Path) -> None:
    assert compile_in_a_process("", tmp_path) == (1, 0)
    assert compile_in_a_process("", tmp_path) == (0, 1)
    folder = tmp_path / compilation.PROGRAMS_FOLDER
    assert folder.stat().st_mode & 0o777 == 0o700 and (folder / compilation.processor()).is_dir()


def test_a_torn_program_is_compiled_again(tmp_path: Path) -> None:
    compile_in_a_process("", tmp_path)
    torn = [path for path in (tmp_path / compilation.PROGRAMS_FOLDER).rglob("*-cache") if path.is_file()]
    assert torn
    for path in torn:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert compile_in_a_process("", tmp_path)[0] == 1


def test_off_keeps_nothing_and_a_folder_of_jax_is_kept_to(tmp_path: Path) -> None:
    assert compile_in_a_process(compilation.OFF, tmp_path) == (1, 0)
    assert compile_in_a_process(compilation.OFF, tmp_path, own=tmp_path / "own") == (1, 0)
    assert list(tmp_path.iterdir()) == []
    assert compile_in_a_process("", tmp_path, own=tmp_path / "own")[0] == 1
    assert not (tmp_path / compilation.PROGRAMS_FOLDER).exists()


def test_a_folder_that_stands_keeps_its_mode_and_is_refused_where_others_write(tmp_path: Path) -> None:
    for mode, problem in (
        (0o755, None),
        (0o1777, None),
        (0o775, "written to by others"),
        (0o777, "written to by others"),
    ):
        folder = tmp_path / f"{mode:o}"
        folder.mkdir()
        folder.chmod(mode)
        if problem is None:
            assert compile_in_a_process(str(folder), tmp_path) == (1, 0)
            assert (folder / compilation.processor()).stat().st_mode & 0o777 == 0o700
        else:
            with pytest.raises(FintxError, match=problem):
                compilation.keep_programs(str(folder), outputs=tmp_path)
            assert list(folder.glob("*/*")) == []
        assert folder.stat().st_mode & 0o7777 == mode


def test_a_folder_that_can_not_be_made_is_reported_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FintxError, match=r"file/here: can't keep compiled programs here .*execution\.program_cache"):
        compilation.keep_programs(str(tmp_path / "file" / "here"), outputs=tmp_path)
