"""Commands of fintx as a user gives them: in this process or in one of their own, with their exit code and output."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from fintx.cli import main

ROOT = Path(__file__).resolve().parents[2]
FINTX = Path(sys.executable).with_name("fintx")
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}  # without simulated devices


@dataclass(frozen=True)
class Done:
    """What a command printed."""

    stdout: str
    stderr: str


def fintx(*arguments: object, cwd: Path = ROOT, code: int = 0) -> Done:
    """Run `fintx …` as its entry point does, in this process: a new one would import JAX for each of a hundred."""
    out, err, exit_code = io.StringIO(), io.StringIO(), 0
    argv, sys.argv = sys.argv, ["fintx", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(cwd):
            main.main()
    except SystemExit as exit_:
        exit_code = exit_.code or 0
    finally:
        sys.argv = argv
    assert exit_code == code, (exit_code, out.getvalue()[-2000:], err.getvalue()[-2000:])
    return Done(out.getvalue(), err.getvalue())


def process(*arguments: object, cwd: Path = ROOT, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `fintx …` as a user's shell does."""
    done = subprocess.run(
        [FINTX, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )
    assert done.returncode == code, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    return done


def mistake(*arguments: object, cwd: Path = ROOT) -> str:
    """What a user's mistake prints: to stderr, with exit code 2 and no traceback."""
    done = fintx(*arguments, cwd=cwd, code=2)
    assert "Traceback" not in done.stderr and "bug of fintx" not in done.stderr
    return done.stderr
