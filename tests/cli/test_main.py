"""The commands as a user gives them: real processes, exit codes, one line per mistake, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.command import ENVIRONMENT, FINTX, ROOT, fintx, mistake, process


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["sweep"], "Missing argument 'files' (see fintx sweep --help)"),
        (["sweep", "x.toml", "--workers", 0], "greater than or equal to 1 (see fintx sweep --help)"),
        (["sweep", "x.toml", "--worker", 2], "No such option: --worker"),
        (["swep", "x.toml"], "Did you mean 'sweep'? (see fintx --help)"),
        (["data", "imprt"], "Did you mean 'import'? (see fintx data --help)"),
    ],
)
def test_a_mistyped_command_is_a_line(arguments, words):
    message = mistake(*arguments)
    assert message.startswith("fintx: ") and words in message and message.count("\n") == 1


def test_without_a_command_the_commands_are_shown():
    shown = fintx(code=2)
    assert "sweep" in shown.stdout + shown.stderr and "fintx:" not in shown.stderr


def test_params_counts_a_shape():
    shown = fintx(
        "params", "--d-model", 768, "--n-layers", 28, "--n-heads", 12, "--d-ff", 3072, "--budget", "200M"
    ).stdout  # fmt: skip
    assert f"{198_679_297 - 7_680:,}" in shown
    assert "fits the budget 150,000,000 … 250,000,000" in shown
    assert re.search(r"Head counts that divide d_model: 1 2 3 4 6 8 12 16 24 32", shown)


def test_params_lists_depths_for_a_budget():
    shown = fintx("params", "--budget", "200M", "--d-model", 1024).stdout
    assert "12 … 19" in shown and "18 … 29" in shown
    assert "no depth of d_model 9999" in mistake("params", "--budget", "2M", "--d-model", 9999)
    assert "give a whole shape" in mistake("params", "--d-model", 9)
    assert "n_heads: 5 heads don't divide" in mistake(
        "params", "--d-model", 64, "--n-layers", 2, "--n-heads", 5, "--d-ff", 64
    )
    assert "write a count like" in mistake("params", "--budget", "lots")


def test_plan_says_what_a_trial_must_gain_to_be_seen(tmp_path):
    """Of 753 rows with a base rate of .22: 2.80 × .5 × √(E[p(1 − p)] / 753); pooled over folds."""
    file = ROOT / "sweeps" / "2M_h1.toml"
    output = " ".join(fintx("plan", file, cwd=tmp_path).stdout.split())
    assert "a true gain below 0.0187 stays unseen in most studies" in output
    assert "of 50 equal trials the best looks 0.0106 better" in output
    fold = "validation_start=2006-01-01, test_start=2016-01-01, n_folds=5"
    folds = f'split={{kind="walk_forward", window="expanding", {fold}}}'
    found = fintx("plan", file, "--set", folds, cwd=tmp_path).stdout
    smallest = {line.split("  ")[0]: float(line.split()[-2]) for line in found.splitlines()
                if re.match(r"(validation \d|all) +[\d,]+ +[\d,]+ +0\.", line) and "sealed" not in line}  # fmt: skip
    assert set(smallest) == {"all", *(f"validation {k}" for k in range(1, 6))}
    assert smallest["all"] == pytest.approx(smallest["validation 1"] / 5**0.5, rel=0.25)
    returns = fintx("plan", file, "--set", 'task={kind="regression", horizon=1}', "--set",
                    'study.metric="mse"', "--set", 'train.loss="mse"', cwd=tmp_path).stdout  # fmt: skip
    assert "What the validation rows can show" not in returns


@pytest.mark.parametrize("name", ["2M_h1", "200M_h3", "2B_h5", "demo"])
def test_plan_prints_everything_and_writes_nothing(name, tmp_path):
    shown = fintx("plan", ROOT / "sweeps" / f"{name}.toml", cwd=tmp_path).stdout
    for part in (
        "[study]",
        "Data",
        "Label: 1 if",
        "Split",
        "sealed",
        "What the validation rows can show",
        "Drift",
        "feasible shapes inside",
        "trials:",
        "GiB",
    ):
        assert part in shown, part
    assert list(tmp_path.iterdir()) == []


def test_the_installed_command_plans_and_refuses_like_any_program(tmp_path):
    assert "feasible shapes" in process("plan", ROOT / "sweeps" / "demo.toml", cwd=tmp_path).stdout
    refused = process("plan", tmp_path / "nowhere.toml", code=2)
    assert refused.stderr.startswith("fintx: ") and refused.stdout == ""


def test_status_of_the_finished_study(tiny_study):
    shown = fintx("status", "--outputs", tiny_study.parent).stdout
    assert re.search(r"tiny\s+3/3\s+done\s+0\s+log_loss 0\.\d{4}", shown)
    assert re.search(r"tiny .* 0\.\d{4} +(ahead|behind|can't be told apart)", shown), "what must be beaten"


def test_eval_repeats_the_recorded_metrics_exactly(tiny_study):
    data = tiny_study.parents[1] / "data"
    shown = fintx("eval", tiny_study, "--data-dir", data).stdout
    best = json.loads((tiny_study / "tiny_best.json").read_text())
    assert f"trial {best['trial_number']} of tiny" in shown
    assert "DIFFERS" not in shown and shown.count("equal") > 10
    assert re.search(r"this model +0\.\d{4}", shown) and re.search(r"volatility_logistic +0\.\d{4}", shown)
    one = tiny_study / "trials" / f"{best['trial_number']:04d}"
    for path in (one, one / "checkpoint", one / "checkpoint" / "fold_0"):
        assert "equal" in fintx("eval", path, "--data-dir", data).stdout


def test_the_test_part_stays_sealed_without_a_confirmation(tiny_study, tmp_path):
    study = Path(shutil.copytree(tiny_study, tmp_path / "outputs" / "tiny"))
    data = tiny_study.parents[1] / "data"
    message = mistake("eval", study, "--test", "--data-dir", data).replace("\n", " ")
    assert f"no trial is confirmed yet; run first: just confirm {study}" in message and "--unconfirmed" in message
    trial = study / "trials" / "0000"
    assert "is no study's folder" in mistake("eval", trial, "--test", "--data-dir", data).replace("\n", " ")
    assert "goes with --test" in mistake("eval", study, "--unconfirmed", "--data-dir", data)
    assert not (study / "openings.jsonl").exists()


def test_eval_test_opens_the_seal_unconfirmed_says_so_and_logs_it(tiny_study, tmp_path):
    study = Path(shutil.copytree(tiny_study, tmp_path / "outputs" / "tiny"))
    data = tiny_study.parents[1] / "data"
    opening = ("eval", study, "--test", "--unconfirmed", "--data-dir", data)
    first = fintx(*opening).stdout
    assert "the sealed test part was opened; opening number 1" in first and "is not confirmed" in first
    assert re.search(r"trial \d.*\nprior .*\n(.*\n)*volatility_logistic ", first)
    assert "opening number 2" in fintx(*opening).stdout
    assert "has been opened 2 times" in fintx("eval", study, "--data-dir", data).stdout
    assert len((study / "openings.jsonl").read_text().splitlines()) == 2
    assert re.search(r"tiny.*\s2$", fintx("status", "--outputs", study.parent).stdout.rstrip())


def csv_rows(bars) -> list[str]:
    columns = (bars.dates, bars.open, bars.high, bars.low, bars.close, bars.volume)
    return [",".join(map(str, row)) for row in zip(*columns, strict=True)]


def test_eval_on_another_file(tiny_study, tmp_path):
    from fintx.data import sources

    file = tmp_path / "later.csv"
    rows = csv_rows(sources.embedded())[-400:]
    file.write_text("Date,Open,High,Low,Close,Volume\n" + "\n".join(rows) + "\n")
    shown = fintx("eval", tiny_study, "--data", file, "--symbol", "NEW").stdout
    assert "NEW was not trained on" in shown and "log_loss" in shown
    beaten = [line.split() for line in shown.splitlines() if line.startswith(("this model", "volatility_touch"))]
    assert len(beaten) == 2 and 0.4 < float(beaten[1][1]) < 0.69, "fitted on older days, it is still better than a coin"
    same = fintx("eval", tiny_study, "--data", file, "--symbol", "SPX").stdout
    assert "not trained on" not in same
    short = tmp_path / "short.csv"
    short.write_text("Date,Open,High,Low,Close,Volume\n" + "\n".join(rows[:12]) + "\n")
    assert "no row has a window of 20 bars" in mistake("eval", tiny_study, "--data", short)
    mute = tmp_path / "mute.csv"
    mute.write_text("\n".join(row.rpartition(",")[0] for row in ["Date,Open,High,Low,Close,Volume", *rows]) + "\n")
    assert "log_loss" in fintx("eval", tiny_study, "--data", mute).stdout, "no input of this study needs volume"
    lacking = tmp_path / "lacking.csv"
    lacking.write_text("Date,Open,Close\n2020-01-02,1,1\n")
    assert "has no column high, low" in mistake("eval", tiny_study, "--data", lacking)
    assert "exclude each other" in mistake("eval", tiny_study, "--data", file, "--test")


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "foreign"])
def test_a_damaged_checkpoint_is_refused(damage, tiny_study, tmp_path):
    study = Path(shutil.copytree(tiny_study, tmp_path / "outputs" / "tiny"))
    best = json.loads((study / "tiny_best.json").read_text())["trial_number"]
    folder = study / "trials" / f"{best:04d}" / "checkpoint" / "fold_0"
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if damage == "flip":
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    elif damage == "truncate":
        largest.write_bytes(largest.read_bytes()[:-7])
    elif damage == "missing":
        largest.unlink()
    else:
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "model.pt").write_text("torch")
    message = mistake("eval", study, "--data-dir", tiny_study.parents[1] / "data")
    assert str(folder) in message.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sweep", "sweeps/nowhere.toml"), "is not there"),
        (("sweep", "sweeps/dem.toml"), "did you mean sweeps/demo.toml"),
        (("plan", "sweeps/demo.toml", "--set", "data.assets=['QQQ']"), "no bars of QQQ"),
        (("plan", "sweeps/demo.toml", "--set", "data.features=['rsi']"), 'did you mean rsi_14'),
        (("plan", "sweeps/demo.toml", "--set", "data.features=['vix8']"), "needs VIX"),
        (("plan", "sweeps/demo.toml", "--set", "task.horizon=6000"), "task.horizon = 6000 needs more than"),
        (("plan", "sweeps/demo.toml", "--set", "data.start=2018-11-01"), "no row has a window"),
        (("plan", "sweeps/demo.toml", "--set", "data.start=2016-06-01"), "below split.min_"),
        (("plan", "sweeps/demo.toml", "--set", "data.start=2030-01-01"), "no bar of SPX lies in"),
        (("plan", "sweeps/demo.toml", "--set", "budget.parameters=100"), "the smallest candidate holds"),
        (("eval", "outputs/nowhere"), "is not there"),
        (("eval", "sweeps"), "holds no checkpoint"),
        (("data", "import", "nowhere.csv", "--symbol", "X"), "is not there"),
        (("data", "import", "README.md", "--symbol", "../../x"), "wanted 1–32 letters"),
        (("status", "--outputs", "nowhere"), "holds no study yet"),
    ],
)  # fmt: skip
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, words, tmp_path):
    fixed = [ROOT / a if str(a).startswith(("sweeps", "README")) else a for a in arguments]
    message = mistake(*fixed, cwd=tmp_path).replace("\n", " ").replace(f"{ROOT}/", "")
    assert message.startswith("fintx: ") and words in message, message
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_budget_that_no_shape_meets_is_named_with_its_line(tiny_file, tmp_path):
    file = tmp_path / "huge.toml"
    file.write_text(tiny_file.read_text().replace("1.2K", "30B"))
    line = file.read_text().splitlines().index('parameters = "30B"') + 1
    for command in ("plan", "sweep"):
        output = mistake(command, file, "--data-dir", tmp_path / "data")
        assert output.startswith(f"fintx: {file}:{line}: budget.parameters: no candidate shape holds")


def test_a_queue_entry_outside_the_budget_is_named(tmp_path):
    file = tmp_path / "q.toml"
    text = (ROOT / "sweeps" / "demo.toml").read_text()
    file.write_text(text + "\n[[queue]]\nd_model = 64\nn_layers = 40\nn_heads = 2\nd_ff = 256\n")
    assert re.search(r"queue\[0\]: d_model 64, n_layers 40.*outside the budget 22,500", mistake("plan", file))


def test_a_second_run_learns_that_the_first_is_running(tiny_study):
    from fintx.study import locks

    with locks.hold(tiny_study):
        file = tiny_study.parents[1] / "again.toml"
        shutil.copy(next(iter(tiny_study.parents[1].parent.glob("sweeps*/tiny.toml"))), file)
        message = mistake("sweep", file, "--outputs", tiny_study.parent, "--data-dir", tiny_study.parents[1] / "data")
    assert f"is being run by process {os.getpid()}" in message


@pytest.mark.slow
def test_sigint_stops_cleanly_and_the_same_command_continues(tiny_file, tmp_path, data_root):
    outputs = tmp_path / "outputs"
    arguments = ["sweep", tiny_file, "--outputs", outputs, "--data-dir", data_root, "--set", "study.n_trials=1"]
    endless = ["--set", "train.max_epochs=1000000", "--set", "train.patience=1000000"]
    running = subprocess.Popen(
        [FINTX, *map(str, [*arguments, *endless])], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=ENVIRONMENT,
    )  # fmt: skip
    begun = outputs / "tiny" / "trials" / "0000" / "run"
    deadline = time.monotonic() + 120
    while not begun.is_dir():
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=120)
    assert running.returncode == 75, (out, err)
    assert "give the same command again" in out and "Traceback" not in err
    assert not list((outputs / "tiny" / "trials").glob("*/record.json"))
    assert re.search(
        r"tiny\s+0/1\s+stopped[^\n]*\n(?s:.*)tiny\s+0\s+interrupted", fintx("status", "--outputs", outputs).stdout
    )
    assert "holds another study" in mistake(*arguments)
    shown = fintx(*arguments, "--fork", "short").stdout
    assert "0 trials taken over from tiny" in shown and "1 of 1 trials finished" in shown


@pytest.mark.slow
def test_a_full_disk_is_reported_and_the_same_command_continues(tiny_file, tmp_path, data_root):
    """A file-size limit stands for a full disk: the kernel refuses every write beyond it."""
    outputs = tmp_path / "outputs"
    arguments = ["sweep", tiny_file, "--outputs", outputs, "--data-dir", data_root, "--set", "study.n_trials=1"]
    limited = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.getrlimit(resource.RLIMIT_FSIZE)[1])); "
        "sys.argv[0] = 'fintx'; from fintx.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "File too large" in done.stderr.replace("\n", " "), done.stderr
    assert not list(outputs.rglob("record.json"))
    assert "1 of 1 trials finished" in fintx(*arguments).stdout
    assert fintx("verify", "--data-dir", data_root)


def test_import_verify_and_list(tmp_path):
    from fintx.data import sources

    rows = csv_rows(sources.embedded())
    file = tmp_path / "a b.csv"
    file.write_text("Date,Open,High,Low,Close,Volume\n" + "\n".join(rows) + "\n")
    data = tmp_path / "data"
    first = fintx("data", "import", file, "--symbol", "ABC", "--data-dir", data).stdout
    assert "ABC.OHLCV.daily: 5,031 bars 1999-01-04 … 2018-12-31, stored as a new version" in first
    assert (
        "already imported; nothing written"
        in fintx("data", "import", file, "--symbol", "ABC", "--data-dir", data).stdout
    )
    assert "ABC.OHLCV.daily" in fintx("data", "list", "--data-dir", data).stdout
    assert "unchanged" in fintx("verify", "--data-dir", data).stdout
    snapshot = next((data / "raw").rglob("*.parquet"))
    snapshot.write_bytes(snapshot.read_bytes() + b"x")
    (snapshot.parent / "stranger.parquet").write_text("x")
    shown = fintx("verify", "--data-dir", data, code=1).stdout
    assert "changed: raw/ABC.OHLCV.daily/" in shown and "orphaned: raw/ABC.OHLCV.daily/stranger.parquet" in shown
    assert "is not there" in mistake("verify", "--data-dir", tmp_path / "dta")
