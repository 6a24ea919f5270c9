"""The bench's own arithmetic: what counts as a kernel, epochs of whole turns, and a rival that is late."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "tools" / "bench"

SEGMENT = """
HloModule segment

%layer (l: f32[8]) -> f32[8] {
  %l = f32[8] parameter(0)
  ROOT %twice = f32[8] fusion(%l), kind=kLoop, calls=%double
}

%step (s: f32[8]) -> f32[8] {
  %s = f32[8] parameter(0)
  %room = f32[8] custom-call(), custom_call_target="AllocateBuffer"
  %product = f32[8] custom-call(%s, %room), custom_call_target="__cublas$gemm"
  ROOT %layers = f32[8] while(%product), condition=%more, body=%layer, backend_config={"known_trip_count":{"n":"3"}}
}

ENTRY %segment (x: f32[8]) -> f32[8] {
  %x = f32[8] parameter(0)
  ROOT %steps = f32[8] while(%x), condition=%left, body=%step
}
"""


@pytest.fixture
def bench(monkeypatch):
    """Modules of the bench by their names, which lie in a folder of scripts."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCH)):
            del sys.modules[name]


def test_a_product_and_three_layers_are_kernels_and_memory_is_none(bench):
    assert bench("ahead").per_step(SEGMENT) == (4, {})


def test_an_epoch_holds_whole_turns(bench):
    cases, gpu = bench("cases"), bench("gpu")
    of_batches = [gpu._of_batch(case, n) for case in gpu.LARGE.values() for n in gpu.BATCHES[case.name]]
    stepped = (*cases.STEPS, *cases.POPULATIONS, *gpu.BESIDE, *of_batches)
    for case in (*stepped, *map(cases.tiny, stepped)):
        assert case.n_windows % (case.steps * case.batch_size) == 0, case


def test_a_contestant_that_is_late_ends_and_says_so(bench, tmp_path):
    slow = tmp_path / "slow.py"
    slow.write_text("import time\ninput()\ntime.sleep(60)\n")
    contestant = bench("turns").Contestant(sys.executable, slow, cores=[0])
    with contestant.limited(0.2), pytest.raises(RuntimeError, match="setup: the contestant died"):
        contestant.ask("setup")
    contestant.close()
