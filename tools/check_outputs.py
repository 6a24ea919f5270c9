"""Is a study's output complete? Run: python tools/check_outputs.py OUTPUTS STUDY N_TRIALS (used by .ci/run)."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

KEYS = {"trial_number", "value", "d_model", "n_layers", "n_heads", "d_ff", "param_count"}


def main(outputs: Path, study: str, n_trials: int) -> None:
    """Exit with a message at the first thing that is missing."""
    folder = outputs / study
    trials = json.loads((folder / f"{study}_all_trials.json").read_text())["trials"]
    if [trial["trial_number"] for trial in trials] != list(range(n_trials)):
        sys.exit(f"wanted trials 0 … {n_trials - 1}, got {[trial['trial_number'] for trial in trials]}")
    for trial in trials:
        if missing := KEYS - trial.keys():
            sys.exit(f"trial {trial['trial_number']} lacks {', '.join(sorted(missing))}")
        record = json.loads((folder / "trials" / f"{trial['trial_number']:04d}" / "record.json").read_text())
        if record["value"] != trial["value"] or record["param_count"] != trial["param_count"]:
            sys.exit(f"trial {trial['trial_number']} differs from its record")
    best = json.loads((folder / f"{study}_best.json").read_text())
    if best["value"] != min(trial["value"] for trial in trials if trial["value"] is not None):
        sys.exit("the best trial is not the best")
    rows = list(csv.DictReader((outputs / "experiment_results.csv").read_text().splitlines()))
    if len(rows) != n_trials:
        sys.exit(f"experiment_results.csv has {len(rows)} rows, wanted {n_trials}")
    baselines = json.loads((folder / "baselines.json").read_text())
    if not {"prior", "volatility_logistic"} <= baselines.keys():
        sys.exit(f"baselines are {', '.join(baselines)}")
    print(f"{folder}: {n_trials} trials, tables, best and baselines are complete")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
