"""Where does a train step's time go? By JAX's own profiler, per kind of operation.

A kind's share is of the time by the clock in which at least one operation of it is under way. Operations run at once
where nothing forbids it, so that shares may add up to more than 1.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

KINDS = ("linear", "attention", "elementwise", "moving", "update", "rest")
"""Products of linear layers, and of attention; what else a layer computes; copies; clip and AdamW; all else."""


def profiled(turn: Callable[[], None], program: str, *, n_steps: int) -> dict[str, Any]:
    """Milliseconds of a step by the clock, undisturbed, and the share of each kind.

    Args:
        turn: `n_steps` steps, in one dispatch.
        program: its HLO, as compiled.
    """
    clock = min(_seconds(turn) for _ in range(5))
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level, options.python_tracer_level = 3, 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            traced = _seconds(turn)
        (found,) = Path(folder).rglob("*.xplane.pb")
        by_kind = _by_kind(jax.profiler.ProfileData.from_file(str(found)), _kinds(program))
    return {
        "clock_ms": 1e3 * clock / n_steps,
        "share": {kind: by_kind[kind] / 1e9 / traced for kind in KINDS},
        "peak_flop_s": _peak(),
    }


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _peak(side: int = 1024) -> float:
    """FLOP per second of one large product, the best of twenty."""
    product, x = jax.jit(lambda x: x @ x), jnp.ones((side, side), jnp.float32)
    product(x).block_until_ready()
    return 2 * side**3 / min(_seconds(lambda: product(x).block_until_ready()) for _ in range(20))


def _kinds(program: str) -> dict[str, str]:
    """Name of an operation → its kind, by what it computes and by the loops that it lies in."""
    bodies = {found[1]: found[2] for found in re.finditer(r"^%?([\w.\-]+) \(.*?\{\n(.*?)^\}", program, re.M | re.S)}
    kinds = {}
    for line in program.splitlines():
        found = re.match(r"\s*(?:ROOT )?%([\w.\-]+) = \w+\[([\d,]*)\]\S* (dot|fusion|copy|reduce\S*)\(", line)
        if found is None:
            continue
        name, shape, opcode = found.groups()
        called, source = re.search(r"calls=%?([\w.\-]+)", line), re.search(r'op_name="([^"]*)"', line)
        inside, path = bodies.get(called[1], "") if called else "", source[1] if source else ""
        if opcode == "dot" or " dot(" in inside:
            kinds[name] = "attention" if shape.count(",") == 3 else "linear"
        elif re.search(r"copy|transpose|slice|broadcast\b|wrapped_broadcast", name):
            kinds[name] = "moving"
        elif path.count("while/body") >= 2:  # the steps, and within them the layers
            kinds[name] = "elementwise"
        else:
            kinds[name] = "update" if "while/body" in path and "jvp" not in path else "rest"
    return kinds


def _by_kind(profile: Any, kinds: dict[str, str]) -> dict[str, int]:
    """Nanoseconds. Some operations return at once and are worked at by other threads: they last until their "end"."""
    began: dict[str, list[int]] = defaultdict(list)
    ended: dict[str, list[int]] = defaultdict(list)
    marks: dict[str, list[int]] = defaultdict(list)
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in kinds:
                    began[event.name].append(event.start_ns)
                    ended[event.name].append(event.start_ns + event.duration_ns)
                elif event.name.removeprefix("end: ") in kinds:
                    marks[event.name.removeprefix("end: ")].append(event.start_ns)
    spans: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for name, starts in began.items():
        ends = sorted(ended[name])
        if len(marks[name]) == len(starts):  # an operation follows itself, never overlaps: the i-th end is the i-th's
            ends = [max(pair) for pair in zip(ends, sorted(marks[name]), strict=True)]
        spans[kinds[name]] += zip(sorted(starts), ends, strict=True)
    return {kind: _covered(spans[kind]) for kind in KINDS}


def _covered(spans: list[tuple[int, int]]) -> int:
    """How long at least one of them lasts."""
    total, until = 0, 0
    for start, end in sorted(spans):
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total
