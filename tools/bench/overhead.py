"""What does a search cost beside training? Asking, telling, records, tables, checkpoints; and counting shapes."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TRIAL_S = 30.0
"""The trial that the cost is held against."""
DEMO = ROOT / "sweeps" / "demo.toml"
SMALLEST = (
    'study.name="overhead"', 'budget.parameters="3K"', "architecture.d_model=[8]",
    "architecture.n_layers={low=2, high=2}", "architecture.n_heads=[1, 2]", "architecture.d_ff_ratio=[2]",
    "train.max_epochs=2",
)  # fmt: skip
"""So that next to nothing of a trial is training."""


def measure(*, tiny: bool) -> list[dict[str, Any]]:
    """A study of the smallest trials: what of its time is no trial's own. A 2M checkpoint's cost is added to it."""
    found = [_study(3 if tiny else 50), _saving(tiny), _counting()]
    per_trial = found[0]["per_trial_s"] + found[1]["best_s"] + found[1]["state_s"]
    found[0]["share_of_trial"] = per_trial / TRIAL_S
    for entry in found:
        print(entry, flush=True)
    return found


def _study(n_trials: int) -> dict[str, Any]:
    from fintx.study import records

    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "fintx.cli.main",
            "sweep",
            str(DEMO),
            "--outputs",
            folder,
            "--data-dir",
            folder,
        ]
        for change in (*SMALLEST, f"study.n_trials={n_trials}"):
            command += ["--set", change]
        began = time.perf_counter()
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        wall_s = time.perf_counter() - began
        kept = records.read_all(Path(folder) / "overhead")
    from datetime import datetime

    starts, ends = ([datetime.fromisoformat(getattr(each, at)) for each in kept] for at in ("started", "finished"))
    training_s = sum(each.wall_s for each in kept)
    span_s = (max(ends) - min(starts)).total_seconds()
    return {
        "part": "search", "n_trials": n_trials, "study_s": wall_s, "training_s": training_s, "trials_span_s": span_s,
        "per_trial_s": max(0.0, span_s - training_s) / max(1, n_trials - 1),
    }  # fmt: skip


def _saving(tiny: bool) -> dict[str, Any]:
    """Seconds to write the best parameters of a 2M model, and a whole training state."""
    sys.argv[1:] = [",".join(map(str, sorted(os.sched_getaffinity(0))))]  # where `ours` looks for its cores
    import cases
    import jax
    import numpy as np
    import ours

    from fintx.train import checkpoint
    from fintx.train.train_state import init_state, static_config

    case = cases.TINY if tiny else cases.STEPS[0]
    config = ours.trial(case)
    values = ours.hypers(case, 1)[0]
    state = jax.tree.map(np.array, init_state(static_config(config), values, n_features=cases.N_FEATURES))
    best, whole = [], []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(2 if tiny else 5):
            began = time.perf_counter()
            checkpoint.save(Path(folder) / f"best_{turn}", state.params, config=config, meta={})
            between = time.perf_counter()
            state_like = {"params": state.params, "a": state.params, "b": state.params}
            checkpoint.write(
                Path(folder) / f"all_{turn}", {"state": state_like}, config=config, meta={}, guard=lambda: None
            )
            best.append(between - began)
            whole.append(time.perf_counter() - between)
    return {"part": "saving", "best_s": statistics.median(best), "state_s": statistics.median(whole)}


def _counting() -> dict[str, Any]:
    """Enumerate shapes within budgets and count each exactly."""
    from fintx.config.families import LayerRange
    from fintx.config.schema import ArchitectureConfig, BudgetConfig, ModelConfig
    from fintx.model import param_count

    model = ModelConfig()
    architecture = ArchitectureConfig(
        d_model=tuple(range(16, 2049, 16)), n_layers=LayerRange(low=1, high=512), n_heads=(1, 2, 4, 8, 16),
        d_ff_ratio=(1.0, 2.0, 3.0, 4.0),
    )  # fmt: skip
    budget = BudgetConfig(parameters=20_000_000, tolerance=0.5)
    began = time.perf_counter()
    shapes = param_count.feasible_shapes(architecture, budget, [model], 25)
    enumerated_s = time.perf_counter() - began
    counted = [param_count.count_params(model, shape, 25).total for shape in shapes[:10_000]]
    seconds = time.perf_counter() - began
    assert all(budget.low <= n <= budget.high for n in counted)
    return {
        "part": "counting",
        "n_shapes": len(shapes),
        "n_counted": len(counted),
        "enumerated_s": enumerated_s,
        "total_s": seconds,
    }
