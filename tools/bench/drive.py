"""How fast is fintx beside its rivals? Turns one after the other, medians, ratios with their spread.

    python tools/bench/drive.py [steps trials populations profile compile overhead] --rivals PYTHON [--write]
    python tools/bench/drive.py ahead --cuda PYTHON [--write]

Every round gives each contestant one turn, so that whatever else the machine does falls on all alike; a ratio is taken
within a round. A round in which other processes took more than a tenth of the cores is told apart: such rounds count
only where there were too few quiet ones. README.md says how to install the rivals.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ahead
import cases
import compiling
import overhead
import tables
from turns import Contestant

from fintx.study.environment import WORKER_SETTINGS

HERE = Path(__file__).resolve().parent
RIVALS = ("eager", "sdpa", "compile", "huggingface")


def main() -> None:
    """Run the parts that are asked for, one line per figure, and write them all as JSON."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("parts", nargs="*", default=["steps", "trials", "populations"])
    arguments.add_argument("--rivals", help="Python of the environment that holds torch; none: fintx alone")
    arguments.add_argument("--cuda", help="for `ahead`: Python of the environment that holds the CUDA build of JAX")
    arguments.add_argument("--kinds", default=",".join(RIVALS), help="which rivals, with commas")
    arguments.add_argument("--cases", default="", help="names of cases, with commas; none: all")
    arguments.add_argument("--rounds", type=int, default=11)
    arguments.add_argument("--cores", default=",".join(map(str, range(os.cpu_count() or 1))))
    arguments.add_argument("--tiny", action="store_true", help="models that take no time, to see that all of it runs")
    arguments.add_argument("--out", type=Path, help="where the figures go as JSON")
    arguments.add_argument("--write", action="store_true", help="also into docs/performance.md")
    given = arguments.parse_args()
    given.kinds = given.kinds.split(",")
    if "ahead" in given.parts and not given.cuda:
        arguments.error("ahead: --cuda PYTHON is missing; README.md says what it needs")
    cores = [int(core) for core in given.cores.split(",")]
    os.sched_setaffinity(0, cores)
    ours, rivals = contestants(given.rivals, cores)
    result: dict[str, Any] = {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "cores": len(cores),
        "fintx": ours.ask("about"),
        "rivals": rivals.ask("about") if rivals else None,
        "results": [],
    }
    for found in measured(given, ours, rivals):
        result["results"].append(found)
        if given.out:
            given.out.write_text(json.dumps(result, indent=1) + "\n")
        if given.write:
            tables.write(result)
    ours.close()
    if rivals:
        rivals.close()


def contestants(
    rivals: str | None, cores: Sequence[int], *, environment: dict[str, str] | None = None
) -> tuple[Contestant, Contestant | None]:
    """Both sides, on the same cores, with the same allocator's settings."""
    python_path = {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])}
    both = WORKER_SETTINGS | (environment or {})
    ours = Contestant(sys.executable, HERE / "ours.py", cores=cores, environment=python_path | both)
    return ours, rival(rivals, cores, environment=environment) if rivals else None


def rival(python: str, cores: Sequence[int], *, environment: dict[str, str] | None = None) -> Contestant:
    """A process of PyTorch's, by the allocator's settings that fintx's workers start with."""
    settings = WORKER_SETTINGS | (environment or {})
    return Contestant(python, HERE / "rivals.py", cores=cores, environment=settings)


def measured(given: argparse.Namespace, ours: Contestant, rivals: Contestant | None) -> Iterator[dict[str, Any]]:
    """Figures, as they come."""
    only = [name for name in given.cases.split(",") if name]
    for part in given.parts:
        if part == "compile":
            yield from compiling.measure(given.rounds, tiny=given.tiny)
        elif part == "overhead":
            yield from overhead.measure(tiny=given.tiny)
        elif part == "ahead":
            yield from ahead.measure(given.cuda)
        else:
            for case in PARTS[part][0]:
                if not only or case.name in only:
                    case = cases.tiny(case) if given.tiny else case
                    found = PARTS[part][1](case, ours, rivals, given)
                    drop(ours, rivals)
                    entry = {"part": part, "case": case.to_json(), "n_params": case.n_params, **found}
                    print(told(entry), flush=True)
                    yield entry


def profile(case: cases.Case, ours: Contestant, rivals: Contestant | None, given: argparse.Namespace) -> dict[str, Any]:
    """Where fintx's train step spends its time."""
    return ours.ask("profile", case=case.to_json())


def steps(case: cases.Case, ours: Contestant, rivals: Contestant | None, given: argparse.Namespace) -> dict[str, Any]:
    """The train step alone."""
    setup = {"fintx": ours.ask("setup", case=case.to_json(), kind="fintx")}
    turns = {"fintx": Turn(ours, "turn", "fintx", case.steps)}
    for kind in given.kinds if rivals else ():
        if kind == "huggingface" and case.d_model >= 768:
            continue  # four models with their moments don't fit beside each other
        setup[kind] = rivals.ask("setup", case=case.to_json(), kind=kind)
        turns[kind] = Turn(rivals, "turn", kind, case.steps)
    return {"setup": setup, **interleaved(turns, given.rounds)}


def trials(case: cases.Case, ours: Contestant, rivals: Contestant | None, given: argparse.Namespace) -> dict[str, Any]:
    """An epoch of a whole trial: loader, training, validation, metrics, the best parameters kept."""
    setup = {"fintx": ours.ask("setup", case=case.to_json(), kind="trial")}
    turns = {"fintx": Turn(ours, "turn", "trial", 1)}
    for kind in set(given.kinds) & {"eager", "sdpa"} if rivals else ():
        setup[kind] = rivals.ask("setup", case=case.to_json(), kind=kind)
        turns[kind] = Turn(rivals, "epoch", kind, 1)
    return {"setup": setup, **interleaved(turns, max(1, given.rounds // 4))}


def populations(
    case: cases.Case, ours: Contestant, rivals: Contestant | None, given: argparse.Namespace
) -> dict[str, Any]:
    """Eight members one after the other, by a thread per core, and as one program; ratios to the threads."""
    setup = {kind: ours.ask("setup", case=case.to_json(), kind=kind) for kind in ("cores", "population", "eight")}
    return {"setup": setup, **interleaved({kind: Turn(ours, "turn", kind, case.steps) for kind in setup}, given.rounds)}


PARTS: dict[str, tuple[tuple[cases.Case, ...], Callable[..., dict[str, Any]]]] = {
    "steps": (cases.STEPS, steps),
    "profile": (cases.STEPS, profile),
    "trials": (cases.TRIALS, trials),
    "populations": (cases.POPULATIONS, populations),
}


@dataclass(frozen=True)
class Turn:
    """What a contestant does when it is its turn."""

    contestant: Contestant
    order: str
    kind: str
    n_steps: int

    def take(self) -> dict[str, float]:
        """Seconds of a step by the clock and of all its threads, and the share of the cores that others took."""
        before, began = busy_s(), time.perf_counter()
        answer = self.contestant.ask(self.order, kind=self.kind)
        others = busy_s() - before - answer["cpu_seconds"]
        share = max(0.0, others / (time.perf_counter() - began) / (os.cpu_count() or 1))
        seconds, cpu = answer["seconds"] / self.n_steps, answer["cpu_seconds"] / self.n_steps
        return {"seconds": seconds, "cpu_seconds": cpu, "others": share}


def interleaved(turns: dict[str, Turn], rounds: int) -> dict[str, Any]:
    """A turn each to warm up, then rounds in an order that is drawn anew, until enough were quiet; ratios per round."""
    first = next(iter(turns))
    shuffled = random.Random(0)
    for turn in turns.values():
        turn.take()
    took: list[dict[str, dict[str, float]]] = []
    while sum(map(is_quiet, took)) < rounds and len(took) < 2 * rounds:
        took.append({name: turns[name].take() for name in shuffled.sample(list(turns), len(turns))})
    quiet = [each for each in took if is_quiet(each)]
    counted = quiet if len(quiet) >= max(1, rounds // 2) else took
    found: dict[str, Any] = {"rounds": len(took), "quiet": len(quiet)}
    found["others"] = statistics.median(turn["others"] for each in counted for turn in each.values())
    for what in ("seconds", "cpu_seconds"):
        found[what] = {name: spread([each[name][what] for each in counted]) for name in turns}
        found[f"times_{what}"] = {
            name: spread([each[name][what] / each[first][what] for each in counted]) for name in turns if name != first
        }
    return found


def is_quiet(took: dict[str, dict[str, float]]) -> bool:
    """Had the contestants the machine for themselves?"""
    return all(turn["others"] < 0.1 for turn in took.values())


def busy_s() -> float:
    """Seconds that all cores together have worked since the machine started; 0 where Linux doesn't tell."""
    try:
        user, nice, system, _idle, _waiting, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    except OSError:
        return 0.0
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles and the least."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "q1": low, "q3": high, "min": min(values)}


def drop(ours: Contestant, rivals: Contestant | None) -> None:
    """Free what the case held."""
    ours.ask("drop")
    if rivals:
        rivals.ask("drop")


def machine() -> str:
    """The processor's name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def told(entry: dict[str, Any]) -> str:
    """A result in words."""
    if entry["part"] == "profile":
        return tables.profile([entry])
    case = cases.Case(**entry["case"])
    shape = f"({case.d_model}, {case.n_layers}, {case.n_heads}, {case.d_ff}) batch {case.batch_size}"
    rounds = f"{entry['quiet']} of {entry['rounds']} rounds quiet, others took {entry['others']:.0%}"
    lines = [f"{entry['part']} · {case.name} {shape}, {case.n_params:,} parameters; {rounds}"]
    for name, seconds in entry["seconds"].items():
        line = f"  {name:12} {1e3 * seconds['median']:9.1f} ms (min {1e3 * seconds['min']:.1f})"
        if name in entry["times_seconds"]:
            wall, cpu = entry["times_seconds"][name], entry["times_cpu_seconds"][name]
            line += f"  {wall['median']:.2f} × ({wall['q1']:.2f}–{wall['q3']:.2f}); CPU time {cpu['median']:.2f} ×"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
