"""Snapshots: changes and losses are named, and a writer that is cut off leaves nothing half-written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fintx.data import snapshots
from fintx.data.snapshots import DamagedManifest, Snapshot
from fintx.errors import FintxError

TABLE = pa.table({"date": np.array(["2024-01-02", "2024-01-03"], "datetime64[D]"), "close": [1.0, 2.0]})


def store(root: Path, *, version: str = "a" * 64, table: pa.Table = TABLE, **changes) -> tuple[Snapshot, bool]:
    return snapshots.store(root, "raw", "SPY.OHLCV.daily", table, version=version, **{"source": "a test"} | changes)


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_an_entry_says_what_is_kept(tmp_path):
    entry, is_new = store(tmp_path, parents=("X@1",), repairs=("one day filled",))
    assert is_new
    assert (entry.rows, entry.first_date, entry.last_date) == (2, "2024-01-02", "2024-01-03")
    assert entry.path == f"raw/SPY.OHLCV.daily/{'a' * 16}.parquet"
    assert entry.sha256 == snapshots.file_sha256(tmp_path / entry.path)
    assert (entry.columns, entry.parents, entry.repairs) == (("date", "close"), ("X@1",), ("one day filled",))
    assert snapshots.all_snapshots(tmp_path, "raw") == [entry]
    assert snapshots.verify(tmp_path) == []


def test_the_same_content_again_changes_no_byte(tmp_path):
    first, _ = store(tmp_path)
    before = snapshot(tmp_path)
    again, is_new = store(tmp_path, source="elsewhere")
    assert (again, is_new) == (first, False)
    assert snapshot(tmp_path) == before


def test_another_version_stands_beside_the_first_and_is_the_latest(tmp_path):
    store(tmp_path)
    before = snapshot(tmp_path)
    second, is_new = store(tmp_path, version="b" * 64, table=TABLE.slice(0, 1))
    after = snapshot(tmp_path)
    assert is_new and snapshots.all_snapshots(tmp_path, "raw")[-1] == second
    assert all(after[path].startswith(content) for path, content in before.items())  # the manifest grew; no more
    assert after[f"raw/SPY.OHLCV.daily/{'a' * 16}.parquet"] == before[f"raw/SPY.OHLCV.daily/{'a' * 16}.parquet"]


def test_kinds_and_names_are_kept_apart(tmp_path):
    store(tmp_path)
    snapshots.store(tmp_path, "processed", "SPY.a20.daily", TABLE, version="a" * 64, source="s")
    assert [e.name for e in snapshots.all_snapshots(tmp_path, "raw")] == ["SPY.OHLCV.daily"]
    assert [e.name for e in snapshots.all_snapshots(tmp_path, "processed")] == ["SPY.a20.daily"]


def test_nothing_kept_is_nothing_wrong(tmp_path):
    assert snapshots.all_snapshots(tmp_path / "none", "raw") == []
    assert snapshots.verify(tmp_path / "none") == []


# --- verify -----------------------------------------------------------------------------------------------------------


def test_verify_names_missing_changed_and_orphaned_files(tmp_path):
    paths = [tmp_path / store(tmp_path, version=letter * 64)[0].path for letter in "abc"]
    paths[0].unlink()
    content = bytearray(paths[1].read_bytes())
    content[len(content) // 2] ^= 1
    paths[1].write_bytes(content)
    (tmp_path / "raw" / "stray.parquet").write_bytes(b"x")
    (tmp_path / "processed").mkdir()
    (tmp_path / "processed" / ".half.parquet.7.tmp").write_bytes(b"x")
    assert snapshots.verify(tmp_path) == [
        f"missing: raw/SPY.OHLCV.daily/{'a' * 16}.parquet (SPY.OHLCV.daily, 2 rows)",
        f"changed: raw/SPY.OHLCV.daily/{'b' * 16}.parquet (SPY.OHLCV.daily) is not the file that was kept",
        "orphaned: raw/stray.parquet is in no manifest",
        "orphaned: processed/.half.parquet.7.tmp is in no manifest",
    ]


@pytest.mark.parametrize("place", range(0, 700, 97))
def test_verify_finds_any_flipped_bit(place, tmp_path):
    path = tmp_path / store(tmp_path)[0].path
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << place % 8
    path.write_bytes(content)
    assert len(snapshots.verify(tmp_path)) == 1


def test_a_missing_snapshot_comes_back_by_storing_its_content_again(tmp_path):
    entry, _ = store(tmp_path)
    store(tmp_path, version="b" * 64)
    (tmp_path / entry.path).unlink()
    again, is_new = store(tmp_path)
    assert (again, is_new) == (entry, True)
    assert snapshots.verify(tmp_path) == []
    assert len(snapshots.all_snapshots(tmp_path, "raw")) == 2


def test_a_missing_snapshot_may_come_back_in_other_bytes(tmp_path):
    """Another pyarrow may write the same content otherwise: the newest entry of a file counts."""
    entry, _ = store(tmp_path)
    (tmp_path / entry.path).unlink()
    other = TABLE.replace_schema_metadata({"writer": "another"})
    again, is_new = store(tmp_path, table=other)
    assert is_new and again.sha256 != entry.sha256
    assert snapshots.verify(tmp_path) == []


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept_bytes", [1, 40, -1])
def test_a_torn_last_line_is_no_entry_yet_and_the_next_writer_takes_it_away(kept_bytes, tmp_path):
    first, _ = store(tmp_path)
    path = tmp_path / "raw" / "manifest.jsonl"
    line = path.read_bytes()
    path.write_bytes(line + line.replace(b"a" * 64, b"b" * 64)[:kept_bytes])
    assert snapshots.all_snapshots(tmp_path, "raw") == [first]
    third, _ = store(tmp_path, version="c" * 64)
    assert snapshots.all_snapshots(tmp_path, "raw") == [first, third]
    assert snapshots.verify(tmp_path) == []


def test_a_snapshot_whose_entry_was_torn_is_orphaned_until_it_is_stored_again(tmp_path):
    entry, _ = store(tmp_path)
    path = tmp_path / "raw" / "manifest.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    assert snapshots.verify(tmp_path) == [f"orphaned: {entry.path} is in no manifest"]
    assert store(tmp_path)[1]
    assert snapshots.verify(tmp_path) == []


@pytest.mark.parametrize(
    "line",
    [b"not json", b"{}", b"\xff\xfe\x00", b"", b"[1]", b'{"name": 1}'],
    ids=["text", "{}", "bytes", "blank", "list", "type"],
)
def test_a_damaged_line_is_reported_by_file_and_number(line, tmp_path):
    store(tmp_path)
    path = tmp_path / "raw" / "manifest.jsonl"
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(DamagedManifest, match=r"manifest.jsonl:2: is no manifest entry; restore the file"):
        snapshots.all_snapshots(tmp_path, "raw")
    (problem,) = snapshots.verify(tmp_path)
    assert problem.startswith("damaged: ") and "manifest.jsonl:2" in problem
    with pytest.raises(DamagedManifest):
        store(tmp_path, version="b" * 64)


@pytest.mark.parametrize("source", ["file a\u2028b.csv", "file a\x85b\x0b\x1c.csv", 'file "\n\r\\.csv', "file 株.csv"])
def test_a_source_of_odd_characters_is_one_line_of_the_manifest(source, tmp_path):
    entry, _ = store(tmp_path, source=source)
    assert snapshots.all_snapshots(tmp_path, "raw") == [entry]
    assert entry.source == source


def test_every_line_is_json_with_the_whole_hash(tmp_path):
    store(tmp_path)
    (line,) = (tmp_path / "raw" / "manifest.jsonl").read_text().splitlines()
    assert json.loads(line)["version"] == "a" * 64


# --- a full disk, and two writers -------------------------------------------------------------------------------------

STORE_BIG = """
    import resource, sys
    from pathlib import Path
    import numpy as np, pyarrow as pa
    from fintx.data import snapshots
    from fintx.errors import FintxError
    root, limit, rows = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    table = pa.table({"date": np.arange(rows).astype("datetime64[D]"), "x": np.random.default_rng(0).random(rows)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        snapshots.store(root, "raw", "BIG.OHLCV.daily", table, version="f" * 64, source="s")
    except FintxError as error:
        print(error)
        sys.exit(2)
"""


def run(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("full_at", ["snapshot", "manifest"])
def test_a_full_disk_leaves_nothing_half_written(full_at, tmp_path):
    """RLIMIT_FSIZE stands for the full disk: it cuts off the snapshot, or else the line about it."""
    store(tmp_path)
    path = tmp_path / "raw" / "manifest.jsonl"
    while full_at == "manifest" and path.stat().st_size < 30_000:
        path.write_bytes(path.read_bytes() * 2)
    before, size = snapshot(tmp_path), path.stat().st_size
    rows, limit = (50_000, 20_000) if full_at == "snapshot" else (10, size + 100)
    done = run(STORE_BIG, tmp_path, limit, rows)
    assert done.returncode == 2, done.stderr
    assert re.search("BIG.OHLCV.daily can't be kept: .*File too large; fix that and run the command", done.stdout)
    after = snapshot(tmp_path)
    assert after.pop("raw/manifest.jsonl").startswith(before.pop("raw/manifest.jsonl"))
    assert after == before
    assert not [name for name in after if "BIG" in name]
    assert snapshots.verify(tmp_path) == []
    assert run(STORE_BIG, tmp_path, 10**9, rows).returncode == 0  # there is room again
    assert [entry.name for entry in snapshots.all_snapshots(tmp_path, "raw")][-1] == "BIG.OHLCV.daily"
    assert snapshots.verify(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(FintxError, match="can't be kept: Permission denied"):
        store(tmp_path)


def test_a_file_where_the_folder_should_be_is_one_line(tmp_path):
    (tmp_path / "raw").write_text("")
    with pytest.raises(FintxError, match="SPY.OHLCV.daily can't be kept: "):
        store(tmp_path)


STORE_MANY = """
    import sys, time
    from pathlib import Path
    import numpy as np, pyarrow as pa
    from fintx.data import snapshots
    root, begin = Path(sys.argv[1]), Path(sys.argv[2])
    Path(sys.argv[3]).touch()
    while not begin.exists():
        time.sleep(0.001)
    new = 0
    for i in range(20):
        table = pa.table({"date": np.arange(9).astype("datetime64[D]"), "x": np.full(9, float(i))})
        version = f"{i:02d}" * 32
        new += snapshots.store(root, "raw", "SPY.OHLCV.daily", table, version=version, source="s")[1]
    print(new)
"""


def test_two_processes_that_store_the_same_at_once_keep_it_once(tmp_path):
    root, begin = tmp_path / "data", tmp_path / "begin"
    command = [sys.executable, "-c", textwrap.dedent(STORE_MANY), str(root), str(begin)]
    ready = [tmp_path / "ready 1", tmp_path / "ready 2"]
    both = [
        subprocess.Popen([*command, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for path in ready
    ]
    while not all(path.exists() for path in ready) and all(process.poll() is None for process in both):
        os.sched_yield()
    begin.touch()
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum(int(out) for out, _ in outputs) == 20
    assert sorted(e.version for e in snapshots.all_snapshots(root, "raw")) == [f"{i:02d}" * 32 for i in range(20)]
    assert snapshots.verify(root) == []
