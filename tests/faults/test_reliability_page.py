"""docs/reliability.md names every fault test, and no test that isn't there."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_the_page_names_the_tests_of_this_folder():
    text = (HERE.parents[1] / "docs" / "reliability.md").read_text()
    named = re.findall(r"\| `(test_\w+)` \|$", text, flags=re.MULTILINE)
    there = {
        name
        for path in HERE.glob("test_*.py")
        if path.name != Path(__file__).name
        for name in re.findall(r"^def (test_\w+)", path.read_text(), flags=re.MULTILINE)
    }
    assert len(named) == len(set(named)) and set(named) == there
