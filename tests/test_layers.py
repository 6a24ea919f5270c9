"""The house stands: a module imports only from rooms below its own, and each library has one door."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fintx"

FLOORS = [
    {"cli"},
    {"report"},
    {"run"},
    {"analysis"},
    {"study"},
    {"train"},
    {"evaluate"},
    {"model", "data"},
    {"config"},
    {"tasks"},
    {"errors", "types", "files"},
]
"""Rooms from the roof down; two on one floor don't import each other."""

DOORS = {
    "flax": ("fintx/model/encoder.py",),
    "orbax": ("fintx/train/checkpoint.py",),
    "optuna": ("fintx/study/", "fintx/analysis/patterns.py"),
    "tomllib": ("fintx/config/toml.py",),
    "optax": ("fintx/train/",),
    "matplotlib": ("fintx/report/figures",),
    "typer": ("fintx/cli/",),
    "rich": ("fintx/cli/",),
    "talib": ("fintx/data/",),
    "yfinance": ("fintx/data/sources.py",),
}

ENVIRONMENT = ("fintx/train/multihost.py", "fintx/study/environment.py")
"""Where the environment is read: that of a launcher of several processes; and what a worker inherits."""

NO_JAX = (
    "fintx/errors.py",
    "fintx/types.py",
    "fintx/tasks.py",
    "fintx/config/",
    "fintx/data/",
    "fintx/evaluate/",
)


def modules() -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py"))


def imports(source: str) -> set[str]:
    """Dotted names a module imports anywhere; `from a import b` counts as a.b and as a."""
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return imported


def floor(room: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def room_of(path: str) -> str:
    return path.removeprefix("fintx/").partition("/")[0].removesuffix(".py")


def broken_rules(path: str, source: str) -> list[str]:
    """Every rule that a module breaks."""
    room, problems = room_of(path), []
    for name in sorted(imports(source)):
        package, _, rest = name.partition(".")
        if package == "fintx" and rest and room != "__init__":
            other = rest.partition(".")[0]
            if other in set().union(*FLOORS) and other != room:
                if floor(other) <= floor(room):
                    problems.append(f"{path}: imports from {other}, a room that is not below its own")
        doors = DOORS.get(package)
        if doors and not path.startswith(doors):
            problems.append(f"{path}: imports {package}, whose door is {doors[0]}")
        if package in ("jax", "jaxtyping") and path.startswith(NO_JAX):
            problems.append(f"{path}: imports {package} upstream of a dataset")
    tree = ast.parse(source)
    reads = any(isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv") for n in ast.walk(tree))
    if reads and path not in ENVIRONMENT:
        problems.append(f"{path}: reads the environment")
    return list(dict.fromkeys(problems))


@pytest.mark.parametrize("path", modules())
def test_a_module_keeps_to_its_room(path):
    assert broken_rules(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("fintx/data/x.py", "from fintx.model import encoder"),
        ("fintx/data/x.py", "import jax.numpy as jnp"),
        ("fintx/model/x.py", "from fintx.run.scheduler import run_study"),
        ("fintx/config/x.py", "from fintx.data import bars"),
        ("fintx/study/x.py", "def f():\n    import flax"),
        ("fintx/model/x.py", "import optuna"),
        ("fintx/train/x.py", "import os\nos.environ['A']"),
    ],
)
def test_a_planted_violation_is_seen(path, source):
    assert len(broken_rules(path, source)) == 1


def test_no_cycles_within_a_room():
    graph = {
        path.removesuffix(".py").replace("/", "."): imports((ROOT / path).read_text()) for path in modules()
    }  # fmt: skip
    graph = {name: {other for other in used if other in graph and other != name} for name, used in graph.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " → ".join((*above, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_map_names_every_module_once() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    listed = re.findall(r"^\| `([\w/]+\.py)` \|", text, flags=re.MULTILINE)
    assert sorted(listed) == [path.removeprefix("fintx/") for path in modules() if not path.endswith("__init__.py")]


def test_sub_packages_export_nothing():
    inits = [path for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE]
    assert len(inits) >= 7
    assert all(path.read_text() == "" for path in inits)


def test_reading_a_sweep_file_loads_neither_jax_nor_optuna():
    code = (
        "import sys; from pathlib import Path; from fintx.config import load; "
        "load.study(Path('sweeps/demo.toml')); from fintx.data import datasets; "
        "print(*({'jax', 'optuna', 'flax'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "" and done.returncode == 0, (done.stdout, done.stderr)


@pytest.mark.parametrize("command", ["plan", "sweep", "manual"])
def test_a_typo_is_reported_before_jax_is_loaded(tmp_path, command):
    file = tmp_path / "typo.toml"
    file.write_text('[study]\nnme = "x"\n' if command != "manual" else "[[queue]]\nd_modl = 8\n")
    code = (
        "import atexit, sys; from fintx.cli import main; sys.argv[0] = 'fintx'; "
        "atexit.register(lambda: print(*({'jax', 'optuna', 'flax', 'pyarrow', 'sklearn'} & {*sys.modules}))); "
        "main.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, command, str(file)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and f"{file}:2: " in done.stderr, (done.stdout, done.stderr)
    assert done.stdout.strip() == ""


def test_what_tests_share_lies_in_helpers() -> None:
    """A test module that others import runs its own fixtures and marks in their place, and can't be moved alone."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        names = {name for name in imports(path.read_text()) if name.startswith("tests.")}
        assert all(name.startswith("tests.helpers") for name in names), (path, names)
