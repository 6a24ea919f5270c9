"""A sweep file loads to what it says, or to every mistake at once: file, line, key, wanted, got, nearest name."""

from __future__ import annotations

import copy
import json
import re
import runpy
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fintx.config import load, toml
from fintx.config.schema import Choices, FloatRange, MeshConfig, StudySpec
from fintx.config.toml import SweepFileError, locate
from fintx.errors import FintxError

SWEEPS = Path(__file__).resolve().parents[2] / "sweeps"
SHIPPED = sorted(path.name for path in SWEEPS.glob("*.toml") if path.name != "manual.toml")
TWELVE = [f"{budget}_h{h}.toml" for budget in ("2M", "20M", "200M", "2B") for h in (1, 3, 5)]

GOOD = """
[study]
name = "x"

[task]
kind = "threshold"
price = "high"
threshold = 0.01
horizon = 3

[budget]
parameters = "2M"

[space]
"optim.learning_rate" = { low = 1e-4, high = 1e-3, log = true }
"train.batch_size" = { choices = [32, 64] }

[[queue]]
d_model = 64
n_layers = 48
n_heads = 2
d_ff = 256
note = "deep"
"optim.learning_rate" = 3e-4
"""


def write(tmp_path: Path, text: str, name: str = "x.toml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(SweepFileError) as caught:
        load.study(path, overrides=overrides)
    return str(caught.value).splitlines()


# --- what ships -------------------------------------------------------------------------------------------------------


def test_twelve_files_differ_in_nothing_but_name_question_horizon_and_budget():
    assert set(TWELVE) <= set(SHIPPED)
    trees = []
    for name in TWELVE:
        spec = load.study(SWEEPS / name)
        assert spec.study.name == name.removesuffix(".toml")
        assert f"_h{spec.task.horizon}" in name
        assert spec.budget.parameters == int(name.split("_")[0].replace("M", "000000").replace("B", "000000000"))
        tree = spec.model_dump()
        del tree["study"]["name"], tree["study"]["question"], tree["task"]["horizon"], tree["budget"]["parameters"]
        trees.append(tree)
    assert all(tree == trees[0] for tree in trees)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_file_loads_and_survives_a_round_trip(name, tmp_path):
    spec = load.study(SWEEPS / name)
    assert load.study(write(tmp_path, load.dump(spec))) == spec


def test_what_defines_the_studies_of_shipped_files_never_changes():
    """Else studies that were begun by them could not go on; the tool says what to do."""
    root = SWEEPS.parent
    hashes = runpy.run_path(str(root / "tools" / "golden_definitions.py"))["hashes"]()
    assert hashes == json.loads((root / "tests" / "golden" / "definition_hashes.json").read_text())["hashes"]
    assert {name.partition(":")[0] for name in hashes} == {path.name for path in SWEEPS.glob("*.toml")}


# --- every key of every shipped file, mutated -------------------------------------------------------------------------


def leaves(tree: Any, path: tuple = ()) -> list[tuple]:
    if isinstance(tree, dict):
        own = [path] if path else []
        return own + [leaf for key, value in tree.items() for leaf in leaves(value, (*path, key))]
    return [path]


def inside(tree: dict, path: tuple) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def typo(table: dict, key: str) -> None:
    wrong = f"{key[:-1]}{'x' if key[-1] != 'x' else 'y'}" if len(key) > 4 else f"{key}x"
    table[wrong] = table.pop(key)


def wrong_type(table: dict, key: str) -> None:
    # a string where a table, list or number stands; a number where text stands
    table[key] = 17.5 if isinstance(table[key], str) and key != "parameters" else "not this"


def out_of_range(table: dict, key: str) -> None:
    table[key] = -(10**12)


def bool_for_number(table: dict, key: str) -> None:
    table[key] = True


def nan_for_number(table: dict, key: str) -> None:
    table[key] = float("nan")


def as_toml(tree: dict) -> str:
    lines = toml.pairs({key: value for key, value in tree.items() if not isinstance(value, dict)})
    for key, value in tree.items():
        if isinstance(value, dict):
            lines += ["", f"[{toml.key(key)}]", *toml.pairs(value)]
    return "\n".join(lines).replace("NaN", "nan") + "\n"


def cases():
    for name in SHIPPED:
        tree = tomllib.loads((SWEEPS / name).read_text())
        for path in leaves(tree):
            number = isinstance(inside(tree, path), int | float) and not isinstance(inside(tree, path), bool)
            for change in (typo, wrong_type, out_of_range, *((bool_for_number, nan_for_number) if number else ())):
                yield pytest.param(name, path, change, id=f"{name}:{'.'.join(path)}:{change.__name__}")


@pytest.fixture(scope="module")
def sweeps_copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweeps")
    for name in SHIPPED:
        (folder / name).write_text((SWEEPS / name).read_text())
    return folder


@pytest.mark.parametrize(("name", "path", "change"), list(cases()))
def test_a_mutated_key_is_named_with_file_line_and_fix(name, path, change, sweeps_copy):
    tree = tomllib.loads((SWEEPS / name).read_text())
    broken = copy.deepcopy(tree)
    change(inside(broken, path[:-1]), path[-1])
    text = as_toml(broken)
    file = write(sweeps_copy, text, f"mutated_{name}")
    messages = problems(file)
    key = path[-1]
    if change is typo:
        key = next(iter(inside(broken, path[:-1]).keys() - inside(tree, path[:-1]).keys()))
    line = locate(text)[(*path[:-1], key)]
    own = [message for message in messages if message.startswith(f"{file}:{line}: ") and key in message]
    assert own, (line, messages)
    wanted = f'did you mean "{path[-1]}"?' if change is typo else "got "
    assert any(wanted in message for message in own), own
    assert all(re.match(r".+?(:\d+)?: \S.*", message) and "Input should" not in message for message in messages)


# --- single mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ('name = "x"', "", 2, "study.name: is missing"),
        ('name = "x"', 'name = "../../x"', 3, "study.name: wanted a folder name of letters"),
        ('name = "x"', 'name = ""', 3, "study.name: wanted a folder name of letters"),
        ('name = "x"', f'name = "{"x" * 600}"', 3, "study.name: wanted a folder name of letters"),
        ('name = "x"', 'name = "a\\nb"', 3, "study.name: wanted a folder name of letters"),
        ("horizon = 3", "horizon = true", 9, "task.horizon: wanted a whole number, got true"),
        ("horizon = 3", "horizon = 3.0", 9, "task.horizon: wanted a whole number, got 3.0"),
        ("horizon = 3", "horizon = 0", 9, "task.horizon: wanted a value ≥ 1, got 0"),
        ("threshold = 0.01", "threshold = nan", 8, "task.threshold: wanted a finite number"),
        ("threshold = 0.01", "threshold = inf", 8, "task.threshold: wanted a finite number"),
        ('kind = "threshold"', 'kind = "treshold"', 6, 'did you mean "threshold"?'),
        ('price = "high"\n', "", 5, "needs `price`"),
        ('parameters = "2M"', 'parameters = "2Mio"', 12, "write a count like"),
        ("low = 1e-4", "low = 1e-2", 15, "wanted low below high, got low = 0.01"),
        ("low = 1e-4", "low = -1.0", 15, "wanted low above 0 with log = true"),
        ('"optim.learning_rate" = {', '"optim.learningrate" = {', 15, 'did you mean "optim.learning_rate"?'),
        ("choices = [32, 64]", "choices = [32, 0]", 16, "space.train.batch_size.choices[1]: wanted"),
        ("choices = [32, 64]", "low = 1.5, high = 3", 16, "wanted whole numbers"),
        ("n_heads = 2", "n_heads = 3", 21, "3 heads don't divide d_model = 64"),
        ('rate" = 3e-4', 'rate" = 3e-2', 24, "wanted a number in 0.0001 … 0.001, got 0.03"),
        ('"optim.learning_rate" = 3e-4', '"optim.learning_rat" = 3e-4', 24, 'did you mean "optim.learning_rate"?'),
        ('note = "deep"', 'nota = "deep"', 23, 'did you mean "note"?'),
        ("[budget]", "[budgets]", 11, 'did you mean "budget"?'),
        ("horizon = 3", "horizon = 0x" + "F" * 9000, 9, "task.horizon: wanted a whole number of 64 bits"),
        ("horizon = 3", f"horizon = {'[' * 60}{']' * 60}", 9, "task.horizon[0][0]: is nested too deeply"),
        ('parameters = "2M"', f'parameters = "{"9" * 400}"', 12, "write a count like"),
        ('parameters = "2M"', "parameters = true", 12, "wanted a whole number, got true"),
        ('parameters = "2M"', 'parameter = "2M"', 12, 'unknown key; did you mean "parameters"?'),
        ("horizon = 3", "horizon = 3\nn_trials = 9", 10, 'unknown key; did you mean "study.n_trials"?'),
        ("log = true", "log = 1", 15, "space.optim.learning_rate.log: wanted true or false, got 1"),
        ("log = true", "choices = [1.0]", 15, "wanted either low and high, or choices"),
        ("low = 1e-4", "low = true", 15, "space.optim.learning_rate.low: wanted a number, got true"),
        ("low = 1e-4", "low = inf", 15, "space.optim.learning_rate.low: wanted a finite number, got inf"),
        ("{ low = 1e-4, high = 1e-3, log = true }", "{}", 15, "space.optim.learning_rate.low: is missing"),
        ("{ low = 1e-4, high = 1e-3, log = true }", "3e-4", 15, "wanted a table, got 0.0003"),
        ("[32, 64]", "[32, 32]", 16, "space.train.batch_size.choices: 32 stands twice"),
        ("[32, 64]", "[32, true]", 16, "space.train.batch_size.choices[1]: wanted a whole number, got true"),
        ("[32, 64]", "[32, [64]]", 16, "choices[1]: wanted true, false, a number or text, got [64]"),
        ("[32, 64]", "[]", 16, "wanted a list with an entry at least, got []"),
        (
            '"train.batch_size" = { choices = [32',
            '"model.context_length" = { choices = [8',
            16,
            "patch_length = 10 is longer than context_length = 8",
        ),
        ('"train.batch_size" = { choices = [32, 64] }', '"model.stride" = { low = 2, high = 9 }', 16, "wanted choices"),
        ('rate" = 3e-4', 'rate" = true', 24, "queue[0].optim.learning_rate: wanted a number in 0.0001 … 0.001"),
        ('"optim.learning_rate" = 3e-4', '"train.batch_size" = 48', 24, "wanted one of 32, 64, got 48"),
        ('"optim.learning_rate" = 3e-4', '"train.batch_size" = true', 24, "wanted one of 32, 64, got true"),
        ("d_ff = 256", "", 18, "queue[0].d_ff: is missing"),
        ("d_ff = 256", 'd_ff = 256\nsweep = "200M_h3.toml"', 23, "queue[0].sweep: belongs into a manual file"),
        ("d_ff = 256", 'd_ff = 256\nid = "../x"', 23, "queue[0].id: wanted a name of letters, digits"),
        ("d_ff = 256", 'd_ff = 256\ntraining = "bst"', 23, 'queue[0].training: wanted "best", "defaults" or "sampler"'),
        ("d_ff = 256", 'd_ff = 256\ncancelled = 1', 23, "queue[0].cancelled: wanted true or false, got 1"),
        ("d_ff = 256", "d_ff = 256\nd_fff = 1", 23, 'unknown key; did you mean "d_ff"?'),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_at_its_place(old, new, line, words, tmp_path):
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new, 1))
    messages = problems(path)
    assert any(message.startswith(f"{path}:{line}: ") and words in message for message in messages), messages


def test_a_whole_number_is_asked_of_a_queued_whole_number(tmp_path):
    text = GOOD.replace('"train.batch_size" = { choices = [32, 64] }', '"train.patience" = { low = 2, high = 9 }')
    for value, words in (("4.5", "got 4.5"), ("nan", "got nan"), ('"4"', 'got "4"'), ("10", "got 10")):
        messages = problems(
            write(tmp_path, text.replace('"optim.learning_rate" = 3e-4', f'"train.patience" = {value}'))
        )
        assert messages == [f"{tmp_path}/x.toml:24: queue[0].train.patience: wanted a whole number in 2 … 9, {words}"]
    spec = load.study(write(tmp_path, text.replace('"optim.learning_rate" = 3e-4', '"train.patience" = 4.0')))
    assert spec.queue[0].values == {"train.patience": 4.0}


@pytest.mark.parametrize(
    ("key", "wrong", "words"),
    [
        ("storage", "true", "got true or false"),
        ("storage", "3", "got a number"),
        ("storage", '"sqlite"', 'wanted "journal" or "postgresql://USER@HOST/DATABASE", got "sqlite"'),
        ("storage", '"sqlite:///x"', 'got "sqlite://…"'),
        ("checkpoint_s", "nan", "wanted a"),
        ("checkpoint_s", "-1.0", "wanted a value > 0, got -1.0"),
        ("checkpoint_s", "true", "wanted a number, got true"),
        ("hang_s", "0", "wanted a value ≥ 1, got 0"),
        ("hang_s", "inf", "wanted a finite number, got inf"),
        ("hang_s", '"900"', 'wanted a number, got "900"'),
        ("max_attempts", "true", "wanted a whole number, got true"),
        ("max_attempts", "0", "wanted a value ≥ 1, got 0"),
        ("max_attempts", "2.5", "wanted a whole number, got 2.5"),
        ("max_failures", "-3", "wanted a value ≥ 1, got -3"),
        ("max_failures", "nan", "wanted a whole number, got nan"),
        ("memory", '"12"', 'write an amount like "12GB" or "500MiB", got "12"'),
        ("memory", '"0GB"', "wanted a value ≥ 1, got"),
        ("memory", "true", "wanted a whole number, got true"),
        ("memory", "-5", "wanted a value ≥ 1, got -5"),
        ("storag", '"journal"', 'unknown key; did you mean "storage"?'),
        ("hang", "900", 'unknown key; did you mean "hang_s"?'),
    ],
)  # fmt: skip
def test_a_mistake_in_how_it_is_run_is_named(key, wrong, words, tmp_path):
    (message,) = problems(write(tmp_path, f"[execution]\n{key} = {wrong}\n{GOOD}"))
    assert message.startswith(f"{tmp_path}/x.toml:2: execution.{key}: ") and words in message, message


@pytest.mark.parametrize(
    ("key", "wrong", "words"),
    [
        ("data", "0", 'wanted a number of devices, -1 for all that are left, or "auto", got 0'),
        ("data", "true", "wanted a number of devices, -1 for all"),
        ("data", '"all"', 'wanted a number of devices, -1 for all that are left, or "auto", got "all"'),
        ("model", "-1", 'wanted a number of devices, or "auto", got -1'),
        ("model", "1.5", 'wanted a number of devices, or "auto", got 1.5'),
        ("fsdp", "1", 'wanted true, false or "auto", got 1'),
        ("fsdp", '"yes"', 'wanted true, false or "auto", got "yes"'),
        ("hosts", '"no"', 'wanted true or false, got "no"'),
        ("dat", "1", 'unknown key; did you mean "data"?'),
    ],
)
def test_a_mistake_in_the_mesh_is_named(key, wrong, words, tmp_path):
    (message,) = problems(write(tmp_path, f"[mesh]\n{key} = {wrong}\n{GOOD}"))
    assert message.startswith(f"{tmp_path}/x.toml:2: mesh.{key}: ") and words in message, message


def test_a_mesh_survives_a_round_trip(tmp_path):
    assert load.study(write(tmp_path, GOOD)).mesh == MeshConfig(data=-1, model=1, fsdp="auto", hosts=True)
    text = '[mesh]\ndata = "auto"\nmodel = 4\nfsdp = true\nhosts = false\n'
    spec = load.study(write(tmp_path, text + GOOD))
    assert spec.mesh == MeshConfig(data="auto", model=4, fsdp=True, hosts=False)
    assert load.study(write(tmp_path, load.dump(spec))) == spec


def test_how_it_is_run_survives_a_round_trip_and_its_section_is_found_by_its_nearest_name(tmp_path):
    text = '[execution]\nstorage = "postgresql://u@h:5/d"\nmemory = "1.5GB"\nhang_s = 60\ncheckpoint_s = 2.5\n'
    spec = load.study(write(tmp_path, text + GOOD))
    assert (spec.execution.memory, spec.execution.hang_s) == (1_500_000_000, 60.0)
    assert load.study(write(tmp_path, load.dump(spec))) == spec
    (message,) = problems(write(tmp_path, text.replace("[execution]", "[executon]") + GOOD))
    assert 'unknown section; did you mean "execution"?' in message
    assert 'did you mean "execution.hang_s"?' in problems(write(tmp_path, GOOD), "hang_s=3")[0]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("top_k = 0", "confirm.top_k: wanted a value ≥ 1, got 0"),
        ("n_seeds = 1", "confirm.n_seeds: wanted a value ≥ 2, got 1"),
        ("n_seeds = true", "confirm.n_seeds: wanted a whole number, got true"),
        ("n_seed = 3", 'confirm.n_seed: unknown key; did you mean "n_seeds"?'),
    ],
)
def test_a_mistake_in_how_it_is_confirmed_is_named(lines, words, tmp_path):
    (message,) = problems(write(tmp_path, f"[confirm]\n{lines}\n{GOOD}"))
    assert message == f"{tmp_path}/x.toml:2: {words}"


def test_a_confirmation_is_asked_for_by_its_section_and_defines_no_study(tmp_path):
    from fintx.study import study_file

    without = load.study(write(tmp_path, GOOD))
    assert without.confirm is None
    asked = load.study(write(tmp_path, "[confirm]\n" + GOOD))
    assert (asked.confirm.top_k, asked.confirm.n_seeds) == (5, 5)
    more = load.study(write(tmp_path, GOOD), overrides=["confirm.n_seeds=8"])
    assert (more.confirm.top_k, more.confirm.n_seeds) == (5, 8)
    assert load.study(write(tmp_path, load.dump(more))) == more
    definitions = [study_file.definition(spec) for spec in (without, asked, more)]
    assert definitions[0] == definitions[1] == definitions[2]


@pytest.mark.parametrize("place", ["file", "override"])
@pytest.mark.parametrize(
    "value",
    [
        '"postgres://me:SECRET@host/db"',
        '"postgresql://me:SECRET two@host/db"',
        '"postgresql://me:a\'SECRET@host/db"',
        r'"postgresql://me:a\"SECRET@host/db"',
        r'"postgresql://me:12345 SECRET@host/db"',
        r'"postgresql://me:a\nSECRET@host/db"',
        f'"mysql://me:SECRET@{"h" * 300}/db"',
        f'"postgres://{"m" * 100}:SECRET@host/db"',
        '["postgresql://me:SECRET@host/db"]',
        '{ url = "postgresql://me:SECRET@host/db" }',
        '"postgresql:me:SECRET@host/db"',
        "'postgresql://me:SECRET@host/db",
    ],
)  # fmt: skip
def test_no_message_holds_a_databases_password(value, place, tmp_path):
    if place == "file":
        path, overrides = write(tmp_path, f"[execution]\nstorage = {value}\n{GOOD}"), []
    else:
        path, overrides = write(tmp_path, GOOD), [f"execution.storage={value}"]
    with pytest.raises(SweepFileError) as caught:
        load.study(path, overrides=overrides)
    assert "SECRET" not in str(caught.value), str(caught.value)
    assert len(str(caught.value)) < 400


def test_no_dump_holds_a_databases_password(tmp_path):
    spec = load.study(write(tmp_path, GOOD), overrides=["execution.storage=postgresql://me:SECRET@host/db"])
    assert spec.execution.storage == "postgresql://me:SECRET@host/db"
    assert "SECRET" not in load.dump(spec) and "postgresql://me:***@host/db" in load.dump(spec)


def test_whole_numbers_of_a_shape_may_be_written_with_a_point(tmp_path):
    spec = load.study(write(tmp_path, GOOD.replace("d_model = 64", "d_model = 64.0")))
    assert spec.queue[0].d_model == 64 and type(spec.queue[0].d_model) is int
    for wrong in ("64.5", "true", "nan", "1e300"):
        (message,) = problems(write(tmp_path, GOOD.replace("d_model = 64", f"d_model = {wrong}")))
        assert "queue[0].d_model: wanted a whole number, got" in message


def test_more_queue_entries_than_trials_are_refused(tmp_path):
    messages = problems(write(tmp_path, GOOD + GOOD[GOOD.index("[[queue]]") :].replace("48", "40")), "study.n_trials=1")
    assert len(messages) == 1 and messages[0].startswith(
        "--set study.n_trials=1: study.n_trials: 1 is fewer than the 2"
    )
    cancelled = GOOD[GOOD.index("[[queue]]") :].replace("48", "40") + "cancelled = true\n"
    assert len(load.study(write(tmp_path, GOOD + cancelled), overrides=["study.n_trials=1"]).queue) == 2


def test_repeated_symbols_and_dates_in_reverse_are_refused(tmp_path):
    data = '[data]\nassets = ["SPX", "SPX"]\nstart = 2020-01-02\nend = 2020-01-01\n'
    first, second = problems(write(tmp_path, data + GOOD))
    assert first.endswith(":2: data.assets: SPX stands twice; take one out")
    assert second.endswith(":3: data.start: wanted a date up to data.end = 2020-01-01, got 2020-01-02")


@pytest.mark.parametrize(
    "dates", ["2008-01-31", '"2008-01-31"'], ids=["a TOML date", "a date in quotes"]
)  # fmt: skip
def test_dates_may_be_written_either_way(dates, tmp_path):
    spec = load.study(write(tmp_path, f"[data]\nstart = {dates}\n{GOOD}"))
    assert spec.data.start.isoformat() == "2008-01-31"
    assert load.study(write(tmp_path, load.dump(spec))) == spec


@pytest.mark.parametrize("wrong", ["07:30:00", "2008-01-31T07:30:00", "20080131", '"31.1.2008"', "true"])
def test_no_date_is_refused(wrong, tmp_path):
    messages = problems(write(tmp_path, f"[data]\nstart = {wrong}\n{GOOD}"))
    assert len(messages) == 1 and ":2: data.start: wanted a date like 2024-01-31, got" in messages[0]


def test_mistakes_of_type_hide_none_between_parts(tmp_path):
    text = GOOD.replace("horizon = 3", "horizon = -3").replace('"train.batch_size"', '"train.batchsize"')
    text = text.replace("n_heads = 2", "n_heads = 3") + "[data]\nassets = ['SPX', 'SPX']\n"
    messages = problems(write(tmp_path, text))
    assert [int(re.match(r".*?:(\d+): ", message)[1]) for message in messages] == [9, 26, 16, 21]


def test_nothing_is_reported_of_what_depends_on_a_broken_part(tmp_path):
    """A misspelt [space] entry makes no queue entry wrong, nor a misspelt metric the task."""
    text = GOOD.replace("log = true }", "log = 3 }").replace('name = "x"', 'name = "x"\nmetric = "auk"')
    messages = problems(write(tmp_path, text))
    assert len(messages) == 2 and 'did you mean "auc"?' in messages[0] and "learning_rate.log" in messages[1]


def test_a_thousand_mistakes_are_counted_not_shown(tmp_path):
    messages = problems(write(tmp_path, GOOD + "[train]\n" + "\n".join(f"wrong_{i} = 1" for i in range(1000))))
    assert len(messages) == 101 and messages[-1] == "… and 900 problems more"
    assert all("unknown key" in message for message in messages[:-1])


def test_a_key_cannot_write_to_the_terminal(tmp_path):
    messages = problems(write(tmp_path, GOOD + '[train]\n"a\\nb\\u001b[31m" = 1\n'))
    assert len(messages) == 1 and messages[0].isprintable() and "a\\nb\\x1b[31m: unknown key" in messages[0]


def test_all_mistakes_are_reported_at_once(tmp_path):
    text = (
        GOOD.replace("horizon = 3", "horizon = -3")
        .replace('note = "deep"', "note = 3")
        .replace("high = 1e-3", "hig = 1e-3")
    )
    messages = problems(write(tmp_path, text))
    assert {int(re.match(r".*?:(\d+): ", message)[1]) for message in messages} == {9, 15, 23}


def test_metric_and_loss_must_fit_the_task(tmp_path):
    text = GOOD.replace('name = "x"', 'name = "x"\nmetric = "mse"')
    assert any('study.metric: "mse" does not fit' in message for message in problems(write(tmp_path, text)))
    regression = 'kind = "regression"\nhorizon = 3'
    text = re.sub(r'kind = "threshold".*?horizon = 3', regression, GOOD, flags=re.DOTALL)
    messages = problems(write(tmp_path, text))
    assert any("study.metric" in message for message in messages) and any(
        "train.loss" in message for message in messages
    )


@pytest.mark.parametrize(
    "searched", ["label_smoothing = { low = 0.0, high = 0.2 }", 'class_weight = { choices = ["none", "balanced"] }',
                 'loss = { choices = ["mse", "bce"] }'],
)  # fmt: skip
def test_what_regression_takes_no_search_may_give_it(searched, tmp_path):
    key = searched.partition(" ")[0]
    text = f"""[study]
name = "x"
metric = "mse"
[task]
kind = "regression"
horizon = 3
[budget]
parameters = "2M"
[train]
loss = "huber"
[space]
train.{searched}
"""
    if key == "loss":
        text = text.replace('[train]\nloss = "huber"\n', "\n\n")
    (message,) = problems(write(tmp_path, text))
    assert message.startswith(f"{tmp_path}/x.toml:12: space.train.{key}: train.{key}")


# --- inheritance and overrides ----------------------------------------------------------------------------------------


def test_a_mistake_in_the_base_is_placed_in_the_base(tmp_path):
    base = write(tmp_path, GOOD.replace("horizon = 3", "horizon = -3"), "base.toml")
    child = write(tmp_path, 'extends = "base.toml"\n[study]\nname = "child"\n')
    assert any(message.startswith(f"{base}:9: task.horizon") for message in problems(child))
    fixed = write(tmp_path, 'extends = "base.toml"\n[task]\nhorizon = 2\n')
    spec = load.study(fixed)
    assert (spec.task.horizon, spec.task.threshold, spec.study.name) == (2, 0.01, "x")


@pytest.mark.parametrize(
    ("own", "where"),
    [
        ('[space]\n"optim.learning_rate" = { low = 1e-2 }', "x.toml:3: space.optim.learning_rate.high: is missing"),
        ('[task]\nkind = "direction"', "x.toml:2: task.horizon: is missing"),
        ("[task]\nprice = 3", "x.toml:3: task.price: wanted"),
        ('[budget]\nparameters = "2M"', "base.toml:9: task.horizon: wanted"),
        ("[space]\noptim.learning_rate.low = 1.0", "x.toml:3: space.optim.learning_rate.high: is missing"),
    ],
    ids=["replaced value", "replaced table", "own value", "inherited value", "dotted"],
)
def test_a_mistake_is_placed_in_the_file_that_makes_it(own, where, tmp_path):
    write(tmp_path, GOOD.replace("horizon = 3", "horizon = -3"), "base.toml")
    messages = problems(write(tmp_path, f'extends = "base.toml"\n{own}\n'))
    assert any(message.startswith(f"{tmp_path}/{where}") for message in messages), messages


def test_dotted_paths_without_quotes_merge_like_quoted_ones(tmp_path):
    unquoted = GOOD.replace('"optim.learning_rate" =', "optim.learning_rate =").replace('"train.', "train.")
    base = write(tmp_path, unquoted.replace('batch_size"', "batch_size"), "base.toml")
    assert load.study(base) == load.study(write(tmp_path, GOOD))
    child = 'extends = "base.toml"\n[space]\noptim.weight_decay = { low = 0.0, high = 0.1 }\n'
    assert set(load.study(write(tmp_path, child)).space) == {
        "optim.learning_rate", "optim.weight_decay", "train.batch_size"
    }  # fmt: skip
    messages = problems(write(tmp_path, child.replace("optim", "optimm")))
    assert messages == [
        f'{tmp_path}/x.toml:3: space.optimm.weight_decay: unknown path; did you mean "optim.weight_decay"?'
    ]


def test_a_value_that_is_also_searched_is_never_silently_without_effect(tmp_path):
    both = write(tmp_path, GOOD + "[optim]\nlearning_rate = 2e-4\n")
    assert problems(both) == [
        f"{both}:26: optim.learning_rate: is searched ({both}:15), so a value here has no effect; "
        "take one of the two out"
    ]
    plain = write(tmp_path, GOOD)
    (message,) = problems(plain, "optim.learning_rate=2e-4")
    assert (
        message.startswith("--set optim.learning_rate=2e-4: optim.learning_rate: is searched") and "choices" in message
    )
    fixed = load.study(plain, overrides=['space."optim.learning_rate"={choices=[3e-4]}', "queue=[]"])
    assert fixed.space["optim.learning_rate"] == Choices(choices=(3e-4,))


def test_a_search_wins_over_the_bases_value(tmp_path):
    write(tmp_path, GOOD + "[model]\ndropout = 0.33\n", "base.toml")
    child = write(tmp_path, 'extends = "base.toml"\n[space]\n"model.dropout" = { low = 0.0, high = 0.5 }\n')
    spec = load.study(child)
    assert "model.dropout" in spec.space and spec.model.dropout == 0.1
    assert load.study(write(tmp_path, load.dump(spec), "dumped.toml")) == spec
    assert "dropout = 0.33" not in load.dump(spec)


def test_values_replace_and_another_kind_replaces_its_table(tmp_path):
    write(tmp_path, GOOD, "base.toml")
    text = """extends = "base.toml"
[space]
"optim.learning_rate" = { choices = [1e-4, 2e-4] }
[task]
kind = "direction"
horizon = 1
"""
    spec = load.study(write(tmp_path, text), overrides=["queue=[]"])
    assert spec.space["optim.learning_rate"].choices == (1e-4, 2e-4)
    assert spec.task.threshold is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('extends = "nowhere.toml"', "is not there"),
        ("extends = 3", "wanted the name of a file"),
        ('extends = "middle.toml"', "a base can't extend another"),
    ],
)
def test_a_bad_base_is_one_line(text, words, tmp_path):
    write(tmp_path, 'extends = "x.toml"', "middle.toml")
    messages = problems(write(tmp_path, text + "\n"))
    assert len(messages) == 1 and words in messages[0]


def test_overrides_win_and_their_mistakes_are_theirs(tmp_path):
    path = write(tmp_path, GOOD)
    overrides = ["study.n_trials=7", 'data.assets=["SPY"]', "study.name=other", "architecture.n_layers.high=64"]
    spec = load.study(path, overrides=overrides)
    assert (spec.study.n_trials, spec.data.assets, spec.study.name) == (7, ("SPY",), "other")
    assert spec.architecture.n_layers.high == 64 and spec.architecture.n_layers.low == 2
    searched = load.study(path, overrides=['space."model.dropout"={low=0.0, high=0.3}']).space["model.dropout"]
    assert searched == FloatRange(low=0.0, high=0.3)
    assert problems(path, "study.n_trials=many")[0].startswith("--set study.n_trials=many: study.n_trials: wanted")


@pytest.mark.parametrize("spelled", ['space."optim.learning_rate".low=2e-4', "space.optim.learning_rate.low=2e-4"])
def test_an_override_enters_tables_and_replaces_one_value(spelled, tmp_path):
    spec = load.study(write(tmp_path, GOOD), overrides=[spelled])
    assert spec.space["optim.learning_rate"] == FloatRange(low=2e-4, high=1e-3, log=True)
    assert "train.batch_size" in spec.space


def test_an_override_of_half_a_path_sets_the_paths_in_it(tmp_path):
    override = "space.optim={learning_rate={low=2e-4, high=1e-3}, weight_decay={low=0.0, high=0.1}}"
    spec = load.study(write(tmp_path, GOOD), overrides=[override])
    assert set(spec.space) == {"optim.learning_rate", "optim.weight_decay", "train.batch_size"}
    assert spec.space["optim.learning_rate"].low == 2e-4


def test_an_override_of_a_table_replaces_it(tmp_path):
    file = write(tmp_path, GOOD + '[split]\nkind = "fractions"\ntrain = 0.5\nvalidation = 0.2\n')
    dates = 'split={kind="dates", validation_start=2010-01-01, test_start=2015-01-01}'
    assert load.study(file, overrides=[dates]).split.train is None
    assert load.study(file, overrides=["space={}", "queue=[]"]).space == {}
    again = load.study(file, overrides=["split.train=0.6", "split.train=0.7"])
    assert (again.split.train, again.split.validation) == (0.7, 0.2)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("nonsense", "wanted section.key=value"),
        ("=3", "wanted section.key=value"),
        ("[study]=3", "wanted section.key=value"),
        ("a=1,b=2", "a: unknown section"),
        ("study.n_trials=3\n[train]\nseed=1", "study.n_trials: wanted a whole number"),
        ("x." * 20_000 + "y=1", "wanted section.key=value"),
        ("study.n_trials=" + "9" * 6000, "study.n_trials: wanted"),
        ('extends="base.toml"', "extends: a base is named in the file alone"),
        ("n_trials=3", 'unknown section; did you mean "study.n_trials"?'),
        ("study.name.x=3", "study.name: wanted text in quotes, got a table (x)"),
        ("queue.d_model=3", "queue: wanted a list, got a table (d_model)"),
        ("space.optim.learning_rate={low=5.0,high=1.0}", "space.optim.learning_rate: wanted low below high"),
        ('split.kind="walk_forward"', "split: kind"),
        ('data.versions={"^VIX"=3}', "data.versions.^VIX: wanted text in quotes"),
        ("model.dropout=1e999", "model.dropout: wanted a finite number, got inf"),
    ],
)
def test_a_mistaken_override_is_shown_itself(override, words, tmp_path):
    begin = time.monotonic()
    messages = problems(write(tmp_path, GOOD), override)
    assert len(messages) == 1 and messages[0].startswith("--set ") and len(messages[0]) < 400
    assert words in messages[0], messages
    assert time.monotonic() - begin < 2


# --- hostile texts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 100_000 + "]" * 100_000,
        "x." * 20_000 + "y = 1",
        "a = {" * 5_000,
        "[study\nname = 1",
        "a = 1\na = 2",
        "d = 2024-13-45",
        "n = " + "9" * 5_000,
        "\x00",
        '"!" . ' * 20_000 + "y = 1",
        "[" + "'a b'." * 20_000 + "y]",
        "q = 0x" + "F" * 100_000,
        "a = " + "[" * 200 + "]" * 200,
        'extends = "' + "x" * 5000 + '"',
        'extends = "\\u0000"',
        '[queue]\n"\\u0061" = { x = 1 }',
    ],
    ids=[
        "deep arrays",
        "20,000-part key",
        "deep tables",
        "torn header",
        "twice",
        "no date",
        "5,000 digits",
        "nul",
        "20,000 quoted parts",
        "20,000-part header",
        "100,000 hex digits",
        "200 arrays",
        "long base",
        "nul in base",
        "escaped key in a table that is no list",
    ],
)
def test_hostile_toml_is_refused_in_one_line_and_soon(text, tmp_path):
    begin = time.monotonic()
    messages = problems(write(tmp_path, text))
    assert len(messages) <= 4 and all(len(message) < 600 for message in messages)
    assert time.monotonic() - begin < 2


def test_large_binary_missing_and_folder_are_refused(tmp_path):
    big = tmp_path / "big.toml"
    big.write_bytes(b"#" * (20 * 2**20))
    assert "larger than 1 MiB" in problems(big)[0]
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b'a = 1\nb = "\xff"')
    assert f"{binary}:2: is not UTF-8" in problems(binary)[0]
    (tmp_path / "demo.toml").write_text("")
    assert "did you mean" in problems(tmp_path / "dmo.toml")[0]
    assert "can't be read" in problems(tmp_path)[0]
    assert "can't be read" in problems(tmp_path / ("x" * 5000))[0]
    assert "larger than 1 MiB" in problems(Path("/dev/zero"))[0]


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "windows.toml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load.study(path) == load.study(write(tmp_path, GOOD))


@given(st.text(max_size=60).flatmap(lambda text: st.sampled_from([text, GOOD[:200] + text + GOOD[200:], GOOD + text])))
def test_any_text_gives_a_spec_or_a_plain_error(text):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.toml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            assert isinstance(load.study(path), StudySpec)
        except FintxError as error:
            assert str(error)


_wild = st.one_of(
    st.sampled_from(["", "SPX", "2M", "high", "bce", "optim.eps", "2020-01-01", "x.toml", "../y", True, False]),
    st.integers(-3, 70),
    st.integers(),
    st.floats(),
    st.lists(st.integers(0, 99), max_size=3),
    st.fixed_dictionaries({"low": st.floats(), "high": st.integers()}),
    st.fixed_dictionaries({"choices": st.lists(st.sampled_from([1, 1.0, True, "bce", "none", 64]), max_size=3)}),
    st.just({"a": {"b": {"c": 1}}}),
)
_spots = st.sampled_from(
    [(section, key) for section in StudySpec.model_fields for key in (
        "name", "kind", "horizon", "price", "threshold", "metric", "n_trials", "parameters", "tolerance", "d_model",
        "n_layers", "d_ff_ratio", "assets", "start", "end", "features", "train", "validation", "test_start", "loss",
        "context_length", "patch_length", "revin", "dropout", "learning_rate", "label_smoothing", "low", "",
        "optim.learning_rate", "train.loss", "train.patience", "model.patch_length", "model.revin", "model",
    )]
)  # fmt: skip


@given(st.lists(st.tuples(_spots, _wild), max_size=4), st.booleans())
def test_wild_values_give_a_spec_that_round_trips_or_placed_errors(tmp_path_factory, changes, by_override):
    folder = tmp_path_factory.mktemp("wild")
    tree = tomllib.loads(GOOD)
    overrides = []
    for (section, key), value in changes:
        text = _toml(value)
        if by_override:
            overrides.append(f"{section}.{toml.key(key)}={text}")
        elif isinstance(tree.setdefault(section, {}), dict):
            tree[section][key] = tomllib.loads(f"x = {text}")["x"]
        else:
            tree[section] = [{**tree[section][0], key: tomllib.loads(f"x = {text}")["x"]}]
    lines = [*as_lines({k: v for k, v in tree.items() if k != "queue"})]
    for entry in tree["queue"]:
        lines += ["[[queue]]", *map(_finite, toml.pairs(entry))]
    file = write(folder, "\n".join(lines) if not by_override else GOOD)
    try:
        spec = load.study(file, overrides=overrides)
    except SweepFileError as error:
        assert all(re.match(rf"({re.escape(str(file))}(:\d+)?|--set .+): \S", line) for line in str(error).splitlines())
    else:
        assert load.study(write(folder, load.dump(spec), "again.toml")) == spec


def as_lines(tree: dict) -> list[str]:
    return as_toml(tree).replace("-Infinity", "-inf").replace("Infinity", "inf").splitlines()


def _finite(text: str) -> str:
    return text.replace("NaN", "nan").replace("Infinity", "inf")


def _toml(value: Any) -> str:
    return _finite(toml.value(value))


@given(
    question=st.text(max_size=40),
    note=st.text(max_size=40),
    rate=st.floats(1.2e-38, 3e38),
    eps=st.floats(1e-16, 1),
    seed=st.integers(0, 2**31 - 1),
    versions=st.dictionaries(st.just("SPX"), st.text(max_size=6)),
)
def test_a_dumped_spec_loads_back_equal(tmp_path_factory, question, note, rate, eps, seed, versions):
    folder = tmp_path_factory.mktemp("dumped")
    tree = load.study(write(folder, GOOD)).model_dump(mode="json")
    tree["study"] |= {"question": question, "seed": seed}
    tree["data"]["versions"] = versions
    tree["optim"]["eps"] = eps
    tree["queue"][0] |= {"note": note, "values": {"optim.learning_rate": rate}}
    tree["space"]["optim.learning_rate"] = {"low": 1.2e-38, "high": 3e38, "log": True}
    spec = StudySpec.model_validate_json(json.dumps(tree))
    assert load.study(write(folder, load.dump(spec), "again.toml")) == spec
