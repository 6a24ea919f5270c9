"""A queue's file is edited as text: what was there stays byte for byte, and nothing wrong ever gets in."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fintx.cli import main
from fintx.config import load
from fintx.config.schema import TrialConfig
from fintx.errors import FintxError
from fintx.study import queue, queue_file, records, trial_table
from fintx.study.records import TrialRecord
from fintx.study.trial_table import Lease

HEAD = """# Question: which?
[study]
name = "small"                    # the name
n_trials = 9

[data]
features = ["log_return_1", "log_return_5"]

[task]
kind = "direction"
horizon = 3

[budget]
parameters = "30K"

[architecture]
d_model = [16, 24, 32]
n_layers = { low = 1, high = 12 }
n_heads = [2, 4]

[space]
"optim.learning_rate" = { low = 1e-4, high = 1e-2, log = true }
"train.batch_size" = { choices = [32, 64] }
"""
FIRST = """
[[queue]]                         # the first
d_model = 32
n_layers = 3
n_heads = 4
d_ff = 64
note = '''two
lines'''
"optim.learning_rate" = 1e-3
"""
SHAPE = {"d_model": 24, "n_layers": 6, "n_heads": 2, "d_ff": 48}
MANUAL = "# by hand\n" + FIRST.replace("d_model", 'sweep = "small.toml"\nd_model', 1)


def write(folder: Path, text: str, name: str = "small.toml") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def add(path: Path, fields: dict | None = None, **changes) -> queue_file.QueueEdit:
    return queue_file.add(path, {**(SHAPE if fields is None else fields), **changes}, data_root=path.parent / "data")


def cancel(path: Path, identity: str, **arguments) -> queue_file.QueueEdit:
    folder = path.parent
    return queue_file.cancel(path, identity, outputs=folder / "outputs", data_root=folder / "data", **arguments)


def refused(path: Path, act, *arguments, **named) -> str:
    """What an edit that can't be made says; the file stays as it is, with nothing beside it."""
    before, beside = path.read_bytes(), sorted(path.parent.iterdir())
    with pytest.raises(FintxError) as caught:
        act(path, *arguments, **named)
    assert path.read_bytes() == before and sorted(path.parent.iterdir()) == beside
    return str(caught.value)


# --- adding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize(
    "text",
    [
        HEAD,
        HEAD.rstrip("\n"),
        HEAD + "\n\n",
        HEAD + FIRST,
        HEAD + FIRST + "# a last word",
        HEAD + FIRST + "\n[train]\npatience = 3\n# end\n",
        HEAD.replace("[space]", FIRST + "[space]"),
        "\ufeff" + HEAD + FIRST,
    ],
    ids=["none yet", "no last line end", "blank lines", "one", "comment after", "tables after", "middle", "BOM"],
)
def test_an_entry_is_added_behind_all_there_is(text, end, tmp_path):
    path = write(tmp_path, text.replace("\n", end))
    before = path.read_bytes()
    edit = add(path, note='say "why"\n\x7f', **{"optim.learning_rate": 3e-4})
    after = path.read_bytes()
    assert after.startswith(before) and after.endswith(end.encode())
    assert (b"\n" in after.replace(b"\r\n", b"")) == (end == "\n")
    spec = load.study(path)
    entry = spec.queue[-1]
    assert (entry.shape.model_dump(), entry.values) == (SHAPE, {"optim.learning_rate": 3e-4})
    assert entry.note == 'say "why"\n\x7f' and edit == queue_file.QueueEdit("small", queue.entry_id(entry), entry)
    assert f"{end}{end}[[queue]]{end}d_model".encode() in after


def test_a_second_entry_of_the_same_content_is_refused(tmp_path):
    path = write(tmp_path, HEAD)
    identity = add(path).identity
    message = refused(path, add, note="another note")
    assert message == f"{path}: holds the entry {identity} of small already"
    add(path, id="again")
    assert "holds the entry again of small already" in refused(path, add, id="again", n_layers=7)
    cancel(path, identity)
    assert refused(path, add).endswith("it is cancelled: take that line out of the file")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_heads": 5}, "the new entry: n_heads: 5 heads don't divide d_model = 24"),
        ({"n_layers": 0}, "the new entry: n_layers: wanted a value ≥ 1, got 0"),
        ({"n_layers": 10**30}, "the new entry: n_layers: wanted a whole number of 64 bits"),
        ({"optim.lr": 3}, "the new entry: optim.lr: is not in [space], so an entry can't set it; "),
        ({"optim.learning_rate": 3.0}, "the new entry: optim.learning_rate: wanted a number in 0.0001 … 0.01, got 3.0"),
        ({"id": "../x"}, 'the new entry: id: wanted a name of letters, digits, ".", "_" and "-"'),
        ({"training": "bst"}, 'the new entry: training: wanted "best", "defaults" or "sampler", got "bst"'),
        ({"sweep": "small.toml"}, "the new entry: sweep: belongs into a manual file, whose entries name their sweep"),
        ({"n_layers": 60}, "the new entry: d_model 24, n_layers 60, n_heads 2, d_ff 48 holds "),
        ({"note": "\udcff"}, "the new entry: holds no UTF-8 text"),
    ],
)
def test_a_wrong_entry_is_refused_in_one_line(changes, words, tmp_path):
    path = write(tmp_path, HEAD + FIRST)
    message = refused(path, add, **changes)
    assert message.startswith(words) and "\n" not in message


def test_a_queue_that_would_outgrow_the_total_is_refused_where_the_total_stands(tmp_path):
    path = write(tmp_path, HEAD.replace("n_trials = 9", "n_trials = 1") + FIRST)
    assert refused(path, add).startswith(f"{path}:4: study.n_trials: 1 is fewer than the 2 queue entries")


def test_a_total_below_a_queue_that_may_be_done_hides_no_queue(tmp_path):
    two = FIRST + FIRST.replace("n_layers = 3", "n_layers = 2")
    path = write(tmp_path, HEAD.replace("n_trials = 9", "n_trials = 1") + two)
    (listing,) = queue_file.listings(path, outputs=tmp_path / "outputs", data_root=tmp_path / "data")
    assert (listing.n_trials, len(listing.rows)) == (1, 2)


def test_mistakes_that_the_file_has_already_keep_their_lines(tmp_path):
    path = write(tmp_path, HEAD.replace("horizon = 3", "horizon = 0") + FIRST)
    assert refused(path, add) == f"{path}:11: task.horizon: wanted a value ≥ 1, got 0"
    broken = write(tmp_path, HEAD + "[[queue]\n", "broken.toml")
    assert refused(broken, add).startswith(f"{broken}:24: is not valid TOML")


@pytest.mark.parametrize("inline", ["queue = [{ d_model = 32, n_layers = 3, n_heads = 4, d_ff = 64 }]", "queue = []"])
def test_an_inline_queue_is_refused(inline, tmp_path):
    path = write(tmp_path, f"{inline}\n{HEAD}")
    for act, arguments in ((add, ()), (cancel, ("x",))):
        message = refused(path, act, *arguments)
        assert message == f"{path}:1: the queue is written inline; write each entry as a [[queue]] block"


def test_a_bases_queue_is_edited_in_the_base(tmp_path):
    """A block of the file's own would silently take the place of all of them."""
    base = write(tmp_path, HEAD + FIRST, "base.toml")
    path = write(tmp_path, 'extends = "base.toml"\n[study]\nname = "child"\n')
    for act, arguments in ((add, ()), (cancel, (queue.entry_id(load.study(base).queue[0]),))):
        assert refused(path, act, *arguments) == f"{path}: its queue is that of the base ({base}:25); edit it there"
    write(tmp_path, HEAD, "base.toml")
    assert add(path).study == "child" and len(load.study(path).queue) == 1


def test_mode_and_link_are_kept_and_nothing_is_left_beside(tmp_path):
    real = write(tmp_path, HEAD, "real.toml")
    real.chmod(0o640)
    link = tmp_path / "small.toml"
    link.symlink_to("real.toml")
    add(link)
    assert link.is_symlink() and real.stat().st_mode & 0o777 == 0o640 and b"[[queue]]" in real.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["real.toml", "small.toml"]


def test_a_file_that_cannot_be_replaced_stays_whole(tmp_path, monkeypatch):
    path = write(tmp_path, HEAD)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert refused(path, add) == f"{path}: can't be written: No space left on device; it is as it was"


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(FintxError, match="is not there"):
        add(tmp_path / "nowhere.toml")


def test_entries_added_at_the_same_time_all_get_in(tmp_path):
    path = write(tmp_path, HEAD)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda i: add(path, id=f"e{i}"), range(6)))
    assert {entry.id for entry in load.study(path).queue} == {f"e{i}" for i in range(6)}


def test_an_entry_of_a_manual_file_names_its_study(tmp_path):
    write(tmp_path, HEAD)
    path = write(tmp_path, MANUAL, "manual.toml")
    assert refused(path, add).startswith("the new entry: sweep: is missing")
    message = refused(path, add, sweep="smal.toml")
    assert message == 'the new entry: sweep: "smal.toml" is not there; did you mean "small.toml"?'
    assert "holds the entry" in refused(path, add, {"sweep": "small.toml", "d_model": 32, "n_layers": 3, "n_heads": 4,
                                                   "d_ff": 64, "optim.learning_rate": 1e-3})  # fmt: skip
    assert add(path, sweep="small.toml").study == "small"
    assert "outside the budget" in refused(path, add, sweep="small.toml", n_layers=60)
    empty = write(tmp_path, "# nothing yet\n", "empty.toml")
    add(empty, sweep="./small.toml")
    assert empty.read_text().startswith("# nothing yet\n\n[[queue]]\n")


# --- cancelling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_cancelling_adds_one_line_below_the_blocks_head(end, tmp_path):
    text = HEAD + FIRST + "\n  [[ 'queue' ]]\n  d_model = 24\nn_layers=6\nn_heads=2\nd_ff=48 # end"
    path = write(tmp_path, text.replace("\n", end))
    first, second = map(queue.entry_id, load.study(path).queue)
    cancel(path, first)
    cancel(path, second)
    expected = text.replace("# the first\n", "# the first\ncancelled = true\n")
    expected = expected.replace("[[ 'queue' ]]\n", "[[ 'queue' ]]\n  cancelled = true\n")
    assert path.read_bytes() == expected.replace("\n", end).encode()
    assert [entry.cancelled for entry in load.study(path).queue] == [True, True]
    assert refused(path, cancel, first) == f"{path}: {first} is cancelled already"


@pytest.mark.parametrize("key", ["cancelled", '"cancelled"', "'cancelled'"])
def test_a_false_is_turned_into_true(key, tmp_path):
    path = write(tmp_path, HEAD + FIRST + f"  {key}  =  false  # false so far\n")
    cancel(path, queue.entry_id(load.study(path).queue[0]))
    assert path.read_text() == HEAD + FIRST + f"  {key}  =  true  # false so far\n"


def test_what_an_edit_of_lines_would_spoil_is_left_to_the_user(tmp_path):
    path = write(tmp_path, HEAD + FIRST + '"can\\u0063elled" = false\n')
    identity = queue.entry_id(load.study(path).queue[0])
    message = refused(path, cancel, identity)
    assert re.fullmatch(
        rf"{path}:\d+: can't be edited safely; write cancelled = true into that entry yourself", message
    )


def test_an_unknown_entry_is_reported_with_the_nearest(tmp_path):
    path = write(tmp_path, HEAD + FIRST)
    identity = queue.entry_id(load.study(path).queue[0])
    assert refused(path, cancel, identity[:-1]).endswith(f"; did you mean {identity}?")
    assert refused(path, cancel, "qqq") == f"{path}: has no queue entry qqq; there are {identity}"
    assert "has no queue entry a\\nb\\x1b[31m;" in refused(path, cancel, "a\nb\x1b[31m")
    assert refused(path, cancel, identity, sweep="x.toml").endswith("--sweep has no place here")
    assert refused(write(tmp_path, HEAD), cancel, "x").endswith("has no queue entry x; it has none at all")


def test_an_identity_of_two_studies_needs_the_sweep_file(tmp_path):
    write(tmp_path, HEAD)
    write(tmp_path, HEAD.replace('"small"', '"other"'), "other.toml")
    path = write(tmp_path, MANUAL + MANUAL.replace("small.toml", "other.toml"), "manual.toml")
    identity = queue.entry_id(next(iter(load.manual(path).values())).queue[0])
    message = refused(path, cancel, identity)
    assert message.endswith(f"{identity} stands there for other.toml and small.toml; name one with --sweep")
    assert cancel(path, identity, sweep="./other.toml").study == "other"
    small, other = load.manual(path).values()
    assert (small.queue[0].cancelled, other.queue[0].cancelled) == (False, True)
    assert "has no queue entry" in refused(path, cancel, identity, sweep="third.toml")


def lease(entry, **changes) -> Lease:
    plain = Lease(
        number=3, params={}, shape=entry.shape, entry=queue.entry_id(entry), note="", training="trial 1",
        finished=False, state="running", token="t", attempt=1, failures=0, owner="h:o", host="h", pid=1, step=0,
        beat=0, detail="",
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "is running (trial 3 of small); stop the study first"),
        ({"finished": True}, "is done (trial 3 of small); there is nothing left to cancel"),
        ({"state": "interrupted"}, None),
        ({"state": "failed", "failures": 2}, None),
    ],
    ids=["running", "done", "interrupted", "failed"],
)
def test_what_runs_or_is_done_is_not_cancelled(changes, words, tmp_path, monkeypatch):
    path = write(tmp_path, HEAD + FIRST)
    (entry,) = load.study(path).queue
    leases = {tmp_path / "outputs" / "small": (lease(entry, **changes),)}
    monkeypatch.setattr(trial_table, "read", lambda folder, url: leases[folder])
    if words is None:
        cancel(path, queue.entry_id(entry))
        assert load.study(path).queue[0].cancelled
    else:
        assert refused(path, cancel, queue.entry_id(entry)) == f"{path}: {queue.entry_id(entry)} {words}"


def test_an_extreme_is_cancelled_by_a_block_of_its_own(tmp_path):
    path = write(tmp_path, HEAD.replace("n_trials = 9", "n_trials = 9\nqueue_extremes = true"))
    (listing,) = queue_file.listings(path, outputs=tmp_path / "outputs", data_root=tmp_path / "data")
    rows = {row.state.entry.note: row.state for row in listing.rows}
    first = next(state for note, state in rows.items() if "smallest d_model" in note)
    cancel(path, first.identity)
    assert refused(path, cancel, first.identity) == f"{path}: {first.identity} is cancelled already"
    (again,) = queue_file.listings(path, outputs=tmp_path / "outputs", data_root=tmp_path / "data")
    states = {row.state.identity: row.state.state for row in again.rows}
    assert states == {state.identity: "queued" for state in rows.values()} | {first.identity: "cancelled"}


# --- any file ---------------------------------------------------------------------------------------------------------

_keys = st.lists(
    st.sampled_from(
        [
            *("d_model = 32\n", "  n_heads=2\n", "\tnote = 'ü'  # [[queue]]\n", '"optim.learning_rate" = 1e-3\n', "\n"),
            *("a = '''\n[[queue]]\n'''\n", 'b = """\n[[queue]]\ncancelled = false\n"""\n', "c = [\n  1,\n]\n"),
        ]
    ),
    unique=True,
)
_blocks = st.builds(
    "{}{}{}{}\n{}{}".format,
    st.sampled_from(["", "\n", "# before\n\n"]),
    st.sampled_from(["", "  "]),
    st.sampled_from(["[[queue]]", "[[ queue ]]", '[["queue"]]']),
    st.sampled_from(["", "  # one"]),
    _keys.map("".join),
    st.sampled_from(["", "[queue.values]\nx = 1\n", "[other]\n"]),
)
_texts = st.builds(
    lambda head, blocks, tail, end: f"{head}{''.join(blocks)}{tail}".replace("\n", end),
    st.sampled_from(["", "\ufeff", HEAD, "\ufeff" + HEAD]),
    st.lists(_blocks, max_size=3).filter(lambda blocks: sum("[other" in block for block in blocks) < 2),
    st.sampled_from(["", "# end", "\n\n", "[train]\npatience = 3", "[train]\n"]),
    st.sampled_from(["\n", "\r\n"]),
)


def tree(text: str) -> dict:
    return tomllib.loads(text.removeprefix("\ufeff").replace("\r\n", "\n"))


@given(_texts)
def test_appending_keeps_every_byte_and_adds_one_entry(text):
    changed = queue_file.appended(text, ["[[queue]]", "d_model = 8"])
    assert changed.startswith(text)
    before = tree(text)
    assert tree(changed) == {**before, "queue": [*before.get("queue", []), {"d_model": 8}]}
    assert "\r" not in changed or "\n" not in changed.replace("\r\n", "")


@given(_texts.filter(lambda text: "queue" in tree(text)), st.data())
def test_cancelling_changes_one_entry_by_one_line(text, data):
    expected = tree(text)
    index = data.draw(st.integers(0, len(expected["queue"]) - 1))
    changed = queue_file.with_cancelled(Path("x.toml"), text, index)
    expected["queue"][index]["cancelled"] = True
    assert tree(changed) == expected
    lines, more = text.split("\n"), changed.split("\n")
    new = next(i for i, line in enumerate(more) if i == len(lines) or line != lines[i])
    assert [*more[:new], *more[new + 1 :]] == lines and more[new].strip() == "cancelled = true"
    assert "\r" not in changed or "\n" not in changed.replace("\r\n", "")


# --- showing, and the commands ----------------------------------------------------------------------------------------


def fintx(*arguments: object, code: int = 0) -> str:
    """What `fintx queue …` prints, on both streams."""
    out, status, argv = io.StringIO(), 0, sys.argv
    sys.argv = ["fintx", "queue", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            main.main()
    except SystemExit as exit_:
        status = exit_.code or 0
    finally:
        sys.argv = argv
    assert status == code, (status, out.getvalue())
    return out.getvalue()


def test_a_listing_shows_state_trial_outcome_and_training(tmp_path, monkeypatch):
    path = write(tmp_path, HEAD + FIRST)
    for name in ("second", "third"):
        add(path, id=name)
    first, second, third = load.study(path).queue
    leases = (
        lease(first, training="defaults", finished=True, number=0),
        lease(second, state="failed", failures=2, number=4),
    )
    monkeypatch.setattr(trial_table, "read", lambda _, url: leases)
    trained = TrialConfig.model_construct(shape=third.shape)
    trial_records = [
        TrialRecord.model_construct(trial_number=0, entry=None, outcome="diverged"),
        TrialRecord.model_construct(
            trial_number=6, entry="third", outcome="completed", training="trial 5", config=trained
        ),
    ]
    monkeypatch.setattr(records, "read_all", lambda _: trial_records)
    shown = fintx("list", path, "--outputs", tmp_path / "outputs", "--data-dir", tmp_path / "data")
    title, _, *lines = shown.lstrip().splitlines()
    assert title.strip() == "small: 2 done, 1 failed"
    assert re.match(
        rf"{queue.entry_id(first)} +done \(diverged\) +0 +d_model 32 · 3 layers · 4 heads · d_ff 64 +[\d,]+ +"
        r"defaults, optim.learning_rate = 0.001 +two", lines[0],
    )  # fmt: skip
    assert re.search(r"second +failed 2 +4 .* trial 1 ", shown)
    assert re.search(r"third +done +6 .* trial 5 ", shown), "its record tells, where the storage is out of sight"
    assert "is done (trial 6 of small)" in fintx("cancel", path, "third", "--outputs", tmp_path / "outputs", code=2)


def test_the_commands_add_show_and_cancel(tmp_path):
    path = write(tmp_path, HEAD)
    where = ("--data-dir", tmp_path / "data")
    shape = ("--d-model", 24, "--n-layers", 6, "--n-heads", 2, "--d-ff", 48)
    assert "the queue is empty" in fintx("list", path, *where)
    values = ("--value", "optim.learning_rate=3e-4", "--value", "train.batch_size=64")
    shown = fintx("add", path, *shape, "--note", "why", "--id", "mine", "--training", "defaults", *values, *where)
    assert shown == "added mine of small: d_model 24 · 6 layers · 2 heads · d_ff 48\n"
    (entry,) = load.study(path).queue
    assert (entry.training, entry.note, entry.values) == (
        "defaults", "why", {"optim.learning_rate": 3e-4, "train.batch_size": 64}
    )  # fmt: skip
    assert "did you mean mine?" in fintx("cancel", path, "min", *where, "--outputs", tmp_path, code=2)
    assert fintx("cancel", path, "mine", *where, "--outputs", tmp_path).startswith("cancelled mine of small: ")
    assert re.search(r"mine +cancelled +– ", fintx("list", path, *where, "--outputs", tmp_path))
    assert "is cancelled already" in fintx("cancel", path, "mine", *where, "--outputs", tmp_path, code=2)
    for wrong in ("x", "optim.learning_rate=nan", "a.b=[1]", "d_model=3", "a.b=2020-01-01", "=3"):
        message = fintx("add", path, *shape, "--value", wrong, *where, code=2)
        assert "wanted a path and a number, true, false or text" in message and len(message.splitlines()) == 1, message
    assert "outside the budget" in fintx("add", path, *shape[:2], "--n-layers", 60, *shape[4:], *where, code=2)
