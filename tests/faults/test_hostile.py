"""Names and files that no well-meaning user writes: one line, exit code 2, within seconds, and nothing is written."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.helpers.machine import ENVIRONMENT, FINTX

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
def test_a_hostile_study_name_is_refused(name, machine, tmp_path):
    here = machine()
    said = here.run(f"study.name={json.dumps(name)}", code=2)
    assert "study.name" in said and "bug of fintx" not in said and "\x1b" not in said
    assert not (here.root / "outputs").exists() and not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
@pytest.mark.parametrize("command", ["stop", "fork"])
def test_a_hostile_name_on_the_command_line_is_refused(command, name, fault_file, tmp_path):
    arguments = ["stop", name] if command == "stop" else ["sweep", fault_file, "--fork", name]
    outputs = ["--outputs", tmp_path / "outputs"]
    done = subprocess.run([FINTX, *arguments, *outputs], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("fintx: "), done.stderr
    assert "bug of fintx" not in done.stderr and "\x1b[2J" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", FILES.values(), ids=FILES.keys())
def test_a_hostile_file_is_refused_within_seconds(text, machine, tmp_path):
    file = tmp_path / "hostile.toml"
    file.write_text(text)
    said = machine("hostile", file=file).run(code=2, timeout_s=30)
    assert "hostile.toml" in said and "bug of fintx" not in said
    assert not (tmp_path / "hostile" / "outputs").exists()
