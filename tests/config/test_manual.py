"""A manual file becomes one study per sweep file that it names, or every mistake of every entry at its own line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fintx.config import load, toml
from fintx.config.toml import SweepFileError
from fintx.study import queue

SWEEPS = Path(__file__).resolve().parents[2] / "sweeps"

SWEEP = """
[study]
name = "NAME"
n_trials = 1

[task]
kind = "direction"
horizon = 3

[budget]
parameters = "2M"

[space]
"optim.learning_rate" = { low = 1e-4, high = 1e-3, log = true }

[[queue]]
d_model = 32
n_layers = 9
n_heads = 2
d_ff = 64
note = "the sweep file's own"
"""

MANUAL = """# why these
[[queue]]
sweep = "b.toml"
d_model = 64
n_layers = 40
n_heads = 2
d_ff = 256

[[queue]]
sweep = "a.toml"
d_model = 64
n_layers = 41
n_heads = 2
d_ff = 256
"optim.learning_rate" = 3e-4

[[queue]]
sweep = "b.toml"
d_model = 64
n_layers = 42
n_heads = 2
d_ff = 256
note = "last"
"""


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.toml").write_text(SWEEP.replace("NAME", name))
    (tmp_path / "manual.toml").write_text(MANUAL)
    return tmp_path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(SweepFileError) as caught:
        load.manual(path, overrides=overrides)
    return str(caught.value).splitlines()


def test_the_nine_that_ship_are_those_that_were_asked_for():
    """d_model, n_layers, n_heads, d_ff, note, exact parameters with the 28 features of the embedded data."""
    specs = {spec.study.name: spec for spec in load.manual(SWEEPS / "manual.toml").values()}
    messages = {
        name: [(e.d_model, e.n_layers, e.n_heads, e.d_ff, e.note, e.training) for e in spec.queue]
        for name, spec in specs.items()
    }
    deep, limit, tried = "push depth beyond L=24", "depth limit", "h3 winner, not tried on h1"
    assert messages == {
        "200M_h3": [
            *((768, 28, heads, 3072, deep, "best") for heads in (12, 16, 24)),
            *((768, 30, heads, 3072, limit, "best") for heads in (12, 16, 24)),
            (1024, 20, 16, 2048, "between L=12 and L=24", "best"),
        ],
        "200M_h1": [(768, 24, 16, 3072, tried, "best"), (1024, 20, 16, 2048, tried, "best")],
    }
    for name, spec in specs.items():
        queue.check(spec, n_features=28)
        plain = load.study(SWEEPS / f"{name}.toml")
        assert spec.model_copy(update={"queue": plain.queue}) == plain


def test_the_shape_that_leaves_the_budget_says_so_with_its_count():
    spec = load.manual(SWEEPS / "manual.toml")[SWEEPS / "200M_h3.toml"]
    wide = spec.queue[-1].model_copy(update={"d_ff": 4096})
    with pytest.raises(queue.QueueError, match=r"holds 252,236,801 parameters, outside the budget 150,000,000 … 250"):
        queue.check(spec.model_copy(update={"queue": (*spec.queue, wide)}), n_features=28)


def test_one_study_per_sweep_file_in_order_of_first_mention_whatever_the_total(folder):
    first, second = load.manual(folder / "manual.toml", overrides=["train.patience=9"]).values()
    assert (first.study.name, second.study.name) == ("b", "a")
    assert [entry.n_layers for entry in first.queue] == [40, 42]
    assert [entry.note for entry in first.queue] == ["", "last"]
    assert second.queue[0].values == {"optim.learning_rate": 3e-4}
    assert first.study.n_trials == 1 and first.train.patience == 9
    asking = load.manual(folder / "manual.toml", overrides=["study.queue_extremes=true"]).values()
    assert not any(spec.study.queue_extremes for spec in asking)
    assert load.is_manual(folder / "manual.toml") and not load.is_manual(folder / "a.toml")


def test_every_mistake_of_every_entry_is_reported_at_once_at_its_line(folder):
    text = MANUAL.replace("n_layers = 40", "n_layers = 0").replace("n_heads = 2\nd_ff = 256\nnote", "n_heads = 3\nnote")
    text = text.replace('rate" = 3e-4', 'rate" = 3e-2').replace("n_layers = 42", "n_layers = 42\nn_head = 2")
    path = folder / "manual.toml"
    path.write_text(text)
    assert set(problems(path)) == {
        f"{path}:5: queue[0].n_layers: wanted a value ≥ 1, got 0",
        f"{path}:15: queue[1].optim.learning_rate: wanted a number in 0.0001 … 0.001, got 0.03",
        f"{path}:17: queue[2].d_ff: is missing; wanted a value",
        f'{path}:21: queue[2].n_head: unknown key; did you mean "n_heads"?',
    }


def test_heads_that_do_not_divide_are_placed_in_the_manual_file(folder):
    path = folder / "manual.toml"
    path.write_text(MANUAL.replace("n_heads = 2\nd_ff = 256\nnote", "n_heads = 3\nd_ff = 256\nnote"))
    assert problems(path) == [f"{path}:21: queue[2].n_heads: 3 heads don't divide d_model = 64"]


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ('sweep = "b.toml"\n', "", 2, 'queue[0]: sweep: is missing; wanted a sweep file beside this one'),
        ('sweep = "b.toml"', 'sweep = ""', 3, "queue[0].sweep: wanted the name of a sweep file beside this one, got"),
        ('sweep = "b.toml"', "sweep = 3", 3, "queue[0].sweep: wanted the name of a sweep file beside this one, got 3"),
        ('sweep = "b.toml"', 'sweep = "bb.toml"', 3, '"bb.toml" is not there; did you mean "b.toml"?'),
        ('sweep = "b.toml"', 'sweep = "zzz"', 3, '"zzz" is not there; known: a.toml, b.toml'),
        ('sweep = "b.toml"', 'sweep = "\\u0000"', 3, "is not there"),
        ('sweep = "b.toml"', f'sweep = "{"x" * 5000}"', 3, "is not there"),
        ('sweep = "b.toml"', 'sweep = "."', 3, "is not there"),
        ('sweep = "b.toml"', 'sweep = "manual.toml"', 3, "manual.toml is no sweep file: it has no [study]"),
        ("# why these", "[train]", 1, "train: a manual file holds [[queue]] entries alone"),
        ("# why these", "n_trials = 3", 1, "n_trials: a manual file holds [[queue]] entries alone"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_at_its_place(old, new, line, words, folder):
    path = folder / "manual.toml"
    path.write_text(MANUAL.replace(old, new, 1))
    (message,) = problems(path)
    assert message.startswith(f"{path}:{line}: ") and words in message and len(message) < 400


def test_an_entry_without_a_study_is_still_checked_for_itself(folder):
    path = folder / "manual.toml"
    path.write_text(MANUAL.replace('sweep = "b.toml"', 'sweep = "c.toml"', 1).replace("n_layers = 40", "n_layers = -1"))
    first, second = problems(path)
    assert '"c.toml" is not there' in first and second == f"{path}:5: queue[0].n_layers: wanted a value ≥ 1, got -1"


@pytest.mark.parametrize("text", ["", "# nothing\n", "queue = []\n"])
def test_an_empty_manual_file_is_one_line(text, folder):
    path = folder / "manual.toml"
    path.write_text(text)
    (message,) = problems(path)
    assert message.startswith(f"{path}: holds no [[queue]] entry") and load.is_manual(path)


@pytest.mark.parametrize("text", ["queue = 3\n", "[queue]\nsweep = 'a.toml'\n", "queue = [1, 'a']\n"])
def test_a_queue_that_is_no_list_of_tables_is_refused(text, folder):
    path = folder / "manual.toml"
    path.write_text(text)
    assert all(message.startswith(f"{path}:1: queue") and "wanted" in message for message in problems(path))


def test_mistakes_of_a_sweep_file_are_reported_beside_those_of_the_entries(folder):
    (folder / "a.toml").write_text(SWEEP.replace("horizon = 3", "horizon = -3"))
    (folder / "b.toml").write_text("[study\n")
    path = folder / "manual.toml"
    path.write_text(MANUAL.replace("n_layers = 41", "n_layers = 0"))
    messages = problems(path)
    assert any(message.startswith(f"{folder}/b.toml:1: is not valid TOML") for message in messages)
    assert f"{folder}/a.toml:8: task.horizon: wanted a value ≥ 1, got -3" in messages
    assert f"{path}:12: queue[1].n_layers: wanted a value ≥ 1, got 0" in messages and len(messages) == 3


def test_overrides_are_of_the_sweep_files_alone(folder):
    path = folder / "manual.toml"
    (message,) = problems(path, "train.patience=0")
    assert message == "--set train.patience=0: train.patience: wanted a value ≥ 1, got 0"
    (message,) = problems(path, "queue=[]")
    assert message == "--set queue=[]: a manual file's queue is its own entries; edit them there"


def test_a_manual_file_is_no_sweep_file(folder):
    with pytest.raises(SweepFileError) as caught:
        load.study(folder / "manual.toml")
    assert str(caught.value).startswith(f"{folder}/manual.toml: is a manual file") and "\n" not in str(caught.value)


def test_two_names_of_one_file_are_one_study(folder):
    path = folder / "manual.toml"
    path.write_text(MANUAL.replace('sweep = "a.toml"', 'sweep = "./b.toml"'))
    (spec,) = load.manual(path).values()
    assert [entry.n_layers for entry in spec.queue] == [40, 41, 42]


_wild = st.one_of(
    st.sampled_from(["a.toml", "b.toml", "", "best", "x", 1, 0, -1, 64, 64.0, 2.5, True, 3e-4]),
    st.lists(st.integers(0, 3), max_size=2),
    st.just({"learning_rate": 3e-4}),
)
_keys = st.sampled_from(["sweep", "d_model", "n_heads", "d_ff", "n_layers", "note", "id", "training", "cancelled",
                         "optim.learning_rate", "optim", "values", "nope"])  # fmt: skip


@given(st.lists(st.dictionaries(_keys, _wild, max_size=4), min_size=1, max_size=3))
def test_wild_entries_give_studies_that_hold_them_or_lines_at_their_places(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("wild")
    for name in ("a", "b"):
        (folder / f"{name}.toml").write_text(SWEEP.replace("NAME", name))
    whole = {"sweep": "a.toml", "d_model": 64, "n_layers": 40, "n_heads": 2, "d_ff": 256}
    blocks = ["\n".join(["[[queue]]", *toml.pairs({**whole, **change})]) for change in changes]
    path = folder / "manual.toml"
    path.write_text("\n".join(blocks) + "\n")
    try:
        specs = load.manual(path).values()
    except SweepFileError as error:
        last = path.read_text().count("\n")
        for line in str(error).splitlines():
            match = re.match(rf"{re.escape(str(path))}:(\d+): queue\[(\d)\]\S*: \S", line)
            assert match and 1 <= int(match[1]) <= last and int(match[2]) < len(changes), line
    else:
        assert sum(len(spec.queue) for spec in specs) == len(changes)
