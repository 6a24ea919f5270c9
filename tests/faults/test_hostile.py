"""Names and files that no well-meaning user writes: one line, exit code 2, within seconds, and nothing is written."""

from __future__ import annotations

import json
import time

import pytest

from tests.helpers.command import mistake

NAMES = {
    "path": "../../x",
    "empty": "",
    "newline": "a\nb",
    "long": "x" * 600,
    "hidden": ".hidden",
    "escape": "a\x1b[2J",
}
FILES = {
    "nested": "x = " + "[" * 5000 + "]" * 5000,
    "long key": ".".join(["a"] * 20_000) + " = 1",
    "20 MB": "#" * (20 * 2**20),
    "true": '[train]\nbatch_size = true\n[study]\nname = "x"\n',
    "nan": '[optim]\nlearning_rate = nan\n[study]\nname = "x"\n',
    "nan in a range": '[study]\nname = "x"\n[space]\n"optim.learning_rate" = { low = nan, high = 1e-2 }\n',
    "inf": '[execution]\nhang_s = inf\nmemory = "lots"\n[study]\nname = "x"\n',
    "bytes": "\0\1\2",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_a_hostile_study_name_is_refused(name, fault_file, tmp_path):
    output = mistake("sweep", fault_file, "--set", f"study.name={json.dumps(name)}", cwd=tmp_path)
    assert "study.name" in output and "\x1b" not in output
    assert list(tmp_path.iterdir()) == [] and not (tmp_path.parent / "x").exists()


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
@pytest.mark.parametrize("command", ["stop", "fork"])
def test_a_hostile_name_on_the_command_line_is_refused(command, name, fault_file, tmp_path):
    arguments = ["stop", name] if command == "stop" else ["sweep", fault_file, "--fork", name]
    output = mistake(*arguments, cwd=tmp_path)
    assert output.startswith("fintx: ") and "\x1b[2J" not in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", FILES.values(), ids=FILES.keys())
def test_a_hostile_file_is_refused_within_seconds(text, tmp_path):
    file = tmp_path / "hostile.toml"
    file.write_text(text)
    begin = time.monotonic()
    assert "hostile.toml" in mistake("sweep", file, cwd=tmp_path)
    assert time.monotonic() - begin < 30
    assert list(tmp_path.iterdir()) == [file]
