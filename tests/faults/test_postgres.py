"""Machines that share nothing but a database: the total is exact, an outage loses nothing, and no password leaks."""

from __future__ import annotations

import signal
from pathlib import Path

import optuna
import pytest

from fintx.study import storage, trial_table
from fintx.study.trial_table import Lease
from tests.helpers import postgres
from tests.helpers.machine import SHORT, wait_for


@pytest.fixture
def url(server: postgres.Server, request: pytest.FixtureRequest) -> str:
    """An empty database."""
    return server.create(request.node.name[:60].lower())


def sharing(url: str) -> tuple[str, ...]:
    return ("--storage", url)


def held(url: str, folder: Path) -> dict[int, Lease]:
    return {lease.number: lease for lease in trial_table.read(folder, url=url)}


def leaks(folder: Path) -> list[str]:
    """Files that hold the password: logs, records, journals, tracebacks, whatever lies there."""
    secret = postgres.PASSWORD.encode()
    return [str(path) for path in folder.rglob("*") if path.is_file() and secret in path.read_bytes()]


def test_two_machines_share_a_study_and_know_all_its_records(machine, url, tmp_path):
    here, there = machine("here"), machine("there")
    both = [each.start(*SHORT, "study.n_trials=5", options=sharing(url)) for each in (here, there)]
    for running in both:
        assert "5 of 5 trials finished" in running.end(code=0)
    assert [record.trial_number for record in here.records()] == [0, 1, 2, 3, 4]
    assert here.numbers() == there.numbers()
    assert len({record.config_hash for record in here.records()}) == 5
    trained = [len(list(each.folder.glob("trials/*/predictions.parquet"))) for each in (here, there)]
    assert sum(trained) == 5
    assert all(lease.finished for lease in held(url, here.folder).values())
    assert leaks(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"password": "wrong-pass"}, "the password is wrong"),
        ({"database": "nowhere"}, "there is no such database"),
        ({"port": 1}, "does not answer; is the database running"),
    ],
    ids=["password", "database", "server"],
)
def test_a_storage_that_cannot_be_opened_is_one_line_without_the_password(change, words, machine, server, tmp_path):
    address = server.url(change.get("database", "postgres"), password=change.get("password", postgres.PASSWORD))
    if "port" in change:
        address = address.replace(f":{server.port}/", f":{change['port']}/")
    output = machine().run(code=2, options=sharing(address))
    assert words in output.replace("\n", " ") and "wrong-pass" not in output
    assert not list(machine().folder.glob("trials/*"))
    assert leaks(tmp_path) == []


@pytest.mark.parametrize("how", ["option", "set", "file", "quoted"])
def test_a_planted_password_is_in_no_output_whatever_goes_wrong(how, machine, server, tmp_path, tiny_file):
    address = server.url()
    here = machine()
    if how == "option":
        output = here.run("study.n_trial=3", code=2, options=sharing(address))
    elif how == "set":
        output = here.run(f"execution.storage=[{address!r}]", code=2)
    elif how == "file":
        file = tmp_path / "mine.toml"
        file.write_text(f'{tiny_file.read_text()}\n[execution]\nstorage = "{address}"\nhang_s = -1\n')
        output = machine("mine", file=file).run(code=2)
        file.unlink()
    else:
        output = here.run(code=2, options=sharing(address + " and more"))
    assert "fintx:" in output and postgres.PASSWORD not in output
    assert leaks(tmp_path) == []


def test_another_definition_under_the_same_name_is_refused_on_another_machine(machine, url):
    machine("here").run(*SHORT, "study.n_trials=1", options=sharing(url))
    output = machine("there").run(*SHORT, "study.n_trials=1", "task.horizon=2", code=2, options=sharing(url))
    assert "task.horizon: 3 there, 2 here" in output and "--fork" in output
    assert machine("there").records() == []


def test_a_result_earned_while_the_database_is_away_is_reported_when_it_is_back(machine, server, url):
    here = machine()
    running = here.start("study.n_trials=2", "train.max_epochs=400", "train.patience=400", options=sharing(url))
    wait_for(lambda: list(here.folder.glob("trials/0000/attempts.jsonl")), running=running)
    server.stop()
    try:
        wait_for(lambda: "does not answer; waiting for it" in running.output, running=running)
        wait_for(lambda: here.records(), running=running)
        running.everyone(signal.SIGKILL)
        running.process.wait()
    finally:
        server.start()
    assert not held(url, here.folder)[0].finished
    before = (here.folder / "trials" / "0000" / "record.json").read_bytes()
    output = here.run("study.n_trials=2", "train.max_epochs=400", "train.patience=400", options=sharing(url))
    assert "\ntrial 0 (" not in output and "\ntrial 1 (" in output
    assert (here.folder / "trials" / "0000" / "record.json").read_bytes() == before
    assert [lease.finished for lease in held(url, here.folder).values()] == [True, True]


def test_a_database_that_is_restarted_three_times_costs_nothing_but_time(machine, server, url):
    here = machine()
    long = ("study.n_trials=6", "train.max_epochs=150", "train.patience=150")
    running = here.start(*long, options=(*sharing(url), "--workers", "2"))
    for outage in range(3):
        wait_for(lambda outage=outage: len(here.records()) > outage, running=running)
        server.stop()
        try:
            wait_for(lambda outage=outage: running.output.count("waiting for it") > outage, running=running)
        finally:
            server.start()
        wait_for(lambda outage=outage: running.output.count("the storage is back") > outage, running=running)
    assert "6 of 6 trials finished" in running.end(code=0)
    assert [record.trial_number for record in here.records()] == list(range(6))
    assert all(record.attempt == 1 for record in here.records())
    assert [lease.finished for lease in held(url, here.folder).values()] == [True] * 6


@pytest.mark.long
def test_eight_machines_start_on_an_empty_database_at_once(machine, url):
    eight = [machine(f"machine{index}") for index in range(8)]
    started = [each.start(*SHORT, "study.n_trials=9", options=sharing(url)) for each in eight]
    for running in started:
        assert "9 of 9 trials finished" in running.end(code=0, timeout_s=400)
    assert all(each.numbers() == eight[0].numbers() for each in eight)
    assert [record.trial_number for record in eight[0].records()] == list(range(9))
    assert len({record.config_hash for record in eight[0].records()}) == 9


def test_a_frozen_machine_that_wakes_up_superseded_can_neither_save_nor_report(machine, url):
    frozen, other = machine("frozen"), machine("other")
    changes = ("study.n_trials=1", "train.max_epochs=600", "train.patience=600", "execution.hang_s=40")
    first = frozen.start(*changes, "execution.checkpoint_s=0.2", options=sharing(url))
    wait_for(frozen.steps, running=first)
    first.everyone(signal.SIGSTOP)
    second = other.start(*changes, options=sharing(url))
    assert "1 of 1 trials finished" in second.end(code=0)
    states = frozen.steps()
    first.everyone(signal.SIGCONT)
    output = first.end(code=0)
    assert "taken over by another attempt" in output
    assert frozen.numbers() == other.numbers()
    assert frozen.records()[0].attempt >= 2
    assert not list(frozen.folder.glob("trials/0000/predictions.parquet"))
    assert set(frozen.steps()) <= set(states)


def test_a_lock_that_was_lost_is_noticed_before_anything_is_written(server, url, tmp_path):
    """The server ends a silent holder's transaction; what it would write then must not be written."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with storage.open_storage(url, tmp_path, "x", minimize=True, warn=lambda words: None) as opened:
        with pytest.raises(storage.StorageAway), opened.exclusive() as check:
            check()
            server.query("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'", "postgres")
            check()
        with opened.exclusive() as check:
            check()
