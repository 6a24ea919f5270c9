"""How long does the device wait between trials, with the next one compiled meanwhile and without?

Run: python tools/bench/waits.py [SWEEP_FILE] [--trials 6] [--rounds 2] [--set section.key=value …] [--out FILE.json]

The same study is run with `execution.pipeline` off and on, by turns, in folders that are thrown away; the persistent
compilation cache is off, so that every new shape has to be compiled. A wait is a record's `wait_s`: from the end of a
worker's last trial to the first step of this one. Busy is the share of the time from the first epoch to the end that
was no wait. On a CPU the compiler takes cores from the trial that trains: the waits fall, and the whole gains less than
they do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from fintx.config import load
from fintx.config.schema import StudySpec
from fintx.run import scheduler, workers
from fintx.study.events import EpochDone, Event, RunContext

os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # inherited by the workers


DEMO = ("train.max_epochs=40", "train.patience=40")
"""So that a trial of the demo trains for about as long as a shape takes to compile, on two cores."""


def main() -> None:
    """Take turns, print a line per run and the two sums."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("file", nargs="?", type=Path, default=Path("sweeps/demo.toml"))
    arguments.add_argument("--trials", type=int, default=6)
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--set", action="append", default=[], dest="changes", help="as of fintx sweep")
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    workers.keep_off_the_gpus()
    changes = [*(DEMO if given.file.name == "demo.toml" else ()), *given.changes, f"study.n_trials={given.trials}"]
    runs = []
    for number in range(given.rounds):
        for pipeline in (False, True) if number % 2 == 0 else (True, False):
            setting = f"execution.pipeline={str(pipeline).lower()}"
            spec = load.study(given.file, overrides=[*changes, setting])
            runs.append({"pipeline": pipeline, "round": number, **measure(spec)})
            print(words(runs[-1]), flush=True)
    for pipeline in (False, True):
        sums = sorted(run["waits_sum_s"] for run in runs if run["pipeline"] is pipeline)
        print(f"pipeline {pipeline}: sum of waits {', '.join(f'{each:.1f}' for each in sums)} s")
    if given.out is not None:
        given.out.write_text(json.dumps({"machine": platform.platform(), "runs": runs}, indent=1) + "\n")


def measure(spec: StudySpec) -> dict[str, Any]:
    """Run a study from nothing to its end."""
    first_epoch: list[float] = []

    def notify(event: Event) -> None:
        if isinstance(event, EpochDone) and not first_epoch:
            first_epoch.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as root:
        summary = scheduler.run_study(spec, RunContext(Path(root) / "outputs", Path(root) / "data", notify))
        ended = time.perf_counter()
    waits = [record.wait_s for record in summary.records if record.wait_s is not None]
    span_s = ended - first_epoch[0]
    return {
        "trials": len(summary.records),
        "shapes": len({record.config.shape for record in summary.records}),
        "device": summary.records[0].device,
        "waits_s": waits,
        "waits_sum_s": sum(waits),
        "compile_s": sum(record.trace_s + record.compile_s for record in summary.records),
        "from_first_epoch_s": span_s,
        "busy": 1 - sum(waits) / span_s,
    }


def words(run: dict[str, Any]) -> str:
    """One line."""
    return (
        f"round {run['round']}, pipeline {run['pipeline']!s:5}: {run['trials']} trials of {run['shapes']} shapes in "
        f"{run['from_first_epoch_s']:.1f} s after the first epoch; waits {run['waits_sum_s']:.1f} s, "
        f"busy {run['busy']:.0%} ({run['device']})"
    )


if __name__ == "__main__":
    main()
