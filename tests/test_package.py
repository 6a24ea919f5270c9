"""The project's own papers agree with each other: recipes, README, dependencies, reference, and no word too many."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fintx

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: no list of the project's own files")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[A-Za-z0-9-]+", each)[0].lower() for each in requirements}


def test_the_version_is_one():
    assert PYPROJECT["project"]["version"] == fintx.__version__
    assert f"## {fintx.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_recipe_has_a_line_of_help_and_calls_fintx_or_a_tool():
    blocks = (ROOT / "Justfile").read_text().split("\n\n")
    recipes = {}
    for block in blocks:
        match = re.search(r"^(\w+)(?: \*args)?:\n {4}@(.+)$", block, re.MULTILINE)
        if match and "[private]" not in block:
            recipes[match[1]] = (block.startswith("# "), match[2])
    fintx = "sweep manual confirm report compare scaling stop plan queue status eval data verify params".split()
    assert list(recipes) == [*fintx, "test", "check", "bench"]
    assert all(helped for helped, _ in recipes.values())
    assert all(recipes[name][1] == f'fintx {name} "$@"' for name in fintx)


def test_just_lists_the_recipes():
    done = subprocess.run([Path(sys.executable).parent / "just"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert len(re.findall(r"^    \w+.* # \w", done.stdout, re.MULTILINE)) == 17, done.stdout


def test_the_readmes_commands_are_recipes():
    commands = re.findall(r"uv run(?: --extra \w+)? just (\w+)", (ROOT / "README.md").read_text())
    recipes = set(re.findall(r"^(\w+)(?: \*args)?:", (ROOT / "Justfile").read_text(), re.MULTILINE))
    assert {"sweep", "test"} <= set(commands) <= recipes


def test_every_dependency_is_accounted_for_and_pinned():
    project = PYPROJECT["project"]
    direct = names(project["dependencies"]) | {"yfinance"}
    told = set(re.findall(r"^\| ([\w.-]+)", (ROOT / "docs" / "dependencies.md").read_text(), re.MULTILINE))
    assert direct <= {each.lower() for each in told}
    development = names(PYPROJECT["dependency-groups"]["dev"])
    assert all(name in (ROOT / "docs" / "dependencies.md").read_text() for name in development)
    pins = PYPROJECT["tool"]["uv"]["constraint-dependencies"]
    assert all("==" in pin for pin in pins)
    assert direct | development <= names(pins)
    ranges = [each for each in project["dependencies"] if not re.search(r">=.*,<", each)]
    assert ranges == []


def test_the_sweep_file_reference_is_current():
    done = subprocess.run(
        [sys.executable, "tools/sweep_reference.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_nothing_is_committed_that_must_not_be():
    addresses = re.compile(r"py" r"pi\.org|python" r"hosted\.org|registry\.npm" r"js")
    paths = re.compile(r"(?<![\w.])/(?:wo" r"rk|ro" r"ot|ho" r"me)/")
    for name in tracked():
        path = ROOT / name
        if not path.is_file():
            continue
        assert not name.startswith(("outputs/", "data/")) and not name.endswith((".lock", ".pyc"))
        assert path.stat().st_size < 2**20, name
        text = path.read_text(errors="ignore")
        assert not addresses.search(text), name
        assert not paths.search(text), name
