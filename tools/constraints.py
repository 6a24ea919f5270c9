"""Pin the whole dependency tree by version in pyproject.toml, without the addresses that a lock file records.

Run: python tools/constraints.py [--upgrade]      (needs uv on PATH and the network; look at the diff, run the tests)
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
_BLOCK = re.compile(r"^constraint-dependencies = \[.*?^\]\n", re.MULTILINE | re.DOTALL)


def resolve(*, upgrade: bool) -> list[str]:
    """Every package of every extra, group, platform and Python version, as `name==version ; marker`."""
    if upgrade:  # let go of today's pins, keep the ranges
        PYPROJECT.write_text(_BLOCK.sub("constraint-dependencies = [\n]\n", PYPROJECT.read_text()))
    lock = ["uv", "lock", "--quiet", *(["--upgrade"] if upgrade else [])]
    subprocess.run(lock, cwd=PYPROJECT.parent, check=True)
    export = "uv export --all-extras --all-groups --no-hashes --no-emit-project --no-annotate --no-header --quiet"
    done = subprocess.run(export.split(), cwd=PYPROJECT.parent, check=True, capture_output=True, text=True)
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def main() -> None:
    """Rewrite the block in place."""
    pins = resolve(upgrade="--upgrade" in sys.argv[1:])
    lines = "".join(f'  "{pin}",\n' for pin in pins)
    text = PYPROJECT.read_text()
    assert _BLOCK.search(text), "pyproject.toml has no constraint-dependencies block"
    PYPROJECT.write_text(_BLOCK.sub(lambda _: f"constraint-dependencies = [\n{lines}]\n", text))
    print(f"{len(pins)} packages pinned")


if __name__ == "__main__":
    main()
