"""Studies whose truth is known: folders as a finished search leaves them, with predictions made instead of trained.

A regression study predicts y = signal + noise. A model whose prediction is signal + √excess · e has the expected
squared error σ² + excess, so that any law of size can be planted exactly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from fintx.analysis.scaling_laws import SizedTrials
from fintx.config import load
from fintx.config.schema import StudySpec, TrialConfig, config_hash
from fintx.evaluate import metrics, significance
from fintx.model import param_count
from fintx.study import records, study_file
from fintx.study.records import FoldRecord, TrialRecord
from fintx.study.search_space import SearchSpace
from fintx.study.study_file import StudyFile

RETURN_SD = 0.01
FEATURES = ["log_return_1", "log_return_5", "realized_vol_21"]

SWEEP = """
[study]
name = "NAME"
question = "What is planted here?"
n_trials = 12
metric = "METRIC"

[data]
features = ["log_return_1", "log_return_5", "realized_vol_21"]

[task]
TASK

[split]
kind = "fractions"
train = 0.6
validation = 0.2

[budget]
parameters = "BUDGET"

[architecture]
d_model = [8, 16, 32, 64, 128]
n_layers = { low = 1, high = 60 }
n_heads = [1, 2]
d_ff_ratio = [2, 4]

[model]
context_length = 20
patch_length = 5
stride = 5

[train]
batch_size = 128
max_epochs = 3

[space]
"optim.learning_rate" = { low = 1e-3, high = 1e-2, log = true }
"model.dropout" = { low = 0.0, high = 0.5 }
"""

REGRESSION = 'kind = "regression"\nhorizon = 1'
THRESHOLD = 'kind = "threshold"\nprice = "high"\nthreshold = 0.01\nhorizon = 3'


def spec_of(
    folder: Path, name: str, *, budget: str = "10K", task: str = REGRESSION, metric: str = "", edit: str = ""
) -> StudySpec:
    """A resolved sweep file."""
    regression = "regression" in task
    text = SWEEP.replace("NAME", name).replace("TASK", task).replace("BUDGET", budget)
    if regression:
        text = text.replace("[train]", '[train]\nloss = "mse"')
    path = folder / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace("METRIC", metric or ("mse" if regression else "log_loss")) + edit)
    return load.study(path)


def days_of(n: int) -> np.ndarray:
    """(n,) weekdays from 2010 on."""
    return np.busday_offset("2010-01-04", np.arange(n)).astype("datetime64[D]")


def write_study(
    outputs: Path,
    spec: StudySpec,
    predict: Callable[[int, int], np.ndarray],
    *,
    labels: np.ndarray,
    baselines: dict[str, np.ndarray],
    n_trials: int = 12,
    dates: np.ndarray | None = None,
    assets: Sequence[str] | None = None,
    failed: Sequence[int] = (),
    label_hash: str = "l" * 64,
    data_hash: str = "d" * 64,
    n_train: int = 1000,
    seed: int = 0,
) -> Path:
    """Write a study's folder.

    Args:
        predict: (trial number, parameter count) → (S,) outputs.
        labels: (S,)
        baselines: name → (S,) outputs; `prior` among them.
        failed: numbers of trials that diverged.
    """
    rng = np.random.default_rng(seed)
    folder = outputs / spec.study.name
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"features": tuple(FEATURES)})})
    space = SearchSpace.build(spec, n_features=len(FEATURES))
    dates = days_of(len(labels)) if dates is None else dates
    assets = ["SPX"] * len(labels) if assets is None else assets
    defined = study_file.definition(spec)
    study = StudyFile(
        spec=spec, definition=defined, definition_hash=study_file.definition_hash(defined),
        created="2026-01-01T00:00:00+00:00", fintx_version="0.1.0", git_commit=None,
    )  # fmt: skip
    study_file.write_study(folder, study)
    records.write_atomically(folder / "resolved.toml", load.dump(spec))

    def table(outputs_: np.ndarray) -> pa.Table:
        columns = [np.zeros(len(labels), np.int32), dates, np.asarray(assets), labels.astype(np.float32),
                   outputs_.astype(np.float32)]  # fmt: skip
        return pa.table([pa.array(column) for column in columns], names=list(records.PREDICTION_COLUMNS))

    predicts, prior = spec.task.predicts, float(metrics_prior(spec, baselines["prior"]))

    def scored(outputs_: np.ndarray) -> dict:
        return metrics.evaluate(predicts, outputs_.astype(np.float32), labels.astype(np.float32), prior=prior)

    held = {name: {"words": name, "metrics": scored(each), "folds": [scored(each)]} for name, each in baselines.items()}
    records.write_atomically(folder / "baselines.json", json.dumps(held))
    parts = [table(each).append_column("baseline", pa.array([name] * len(labels))) for name, each in baselines.items()]
    records.write_predictions(folder, pa.concat_tables(parts), name="baselines.parquet")
    for number in range(n_trials):
        shape = space.shapes[int(rng.integers(len(space.shapes)))]
        params = {**space.encode(shape), "optim.learning_rate": float(np.exp(rng.uniform(np.log(1e-3), np.log(1e-2)))),
                  "model.dropout": float(rng.uniform(0, 0.5))}  # fmt: skip
        config = space.trial_config(params, shape, seed=int(rng.integers(2**31)))
        total = param_count.count_params(config.model, shape, len(FEATURES)).total
        bad = number in failed
        outputs_ = np.zeros(len(labels)) if bad else predict(number, total)
        record = _record(spec, config, number, total, params, scored(outputs_), bad, label_hash, data_hash, n_train)
        records.append(folder, record)
        if not bad:
            records.write_predictions(records.trial_folder(folder, number), table(outputs_))
    return folder


def metrics_prior(spec: StudySpec, outputs: np.ndarray) -> float:
    """The training mean that a constant prior stands for."""
    value = float(outputs[0])
    return value if spec.task.predicts == "value" else 1 / (1 + np.exp(-value))


def _record(
    spec: StudySpec, config: TrialConfig, number: int, total: int, params: dict, best: dict, bad: bool,
    label_hash: str, data_hash: str, n_train: int,
) -> TrialRecord:  # fmt: skip
    curve = tuple({**best, "epoch": i, "train_loss": 1 / (i + 1)} for i in range(3))
    outcome = "diverged" if bad else "completed"
    fold = FoldRecord(
        outcome=outcome, best=best, last=best, per_asset={}, best_epoch=2, best_step=16, epochs=3, steps=24,
        curve=curve, data_hash=data_hash, label_hash=label_hash, split_hash="s" * 64, n_train=n_train,
        n_validation=int(best["n"]), compile_s=1.0, wall_s=10.0 + number,
    )  # fmt: skip
    return TrialRecord(
        study=spec.study.name, trial_number=number, config=config, config_hash=config_hash(config),
        budget=spec.budget, source="sampler", params=params, **config.shape.model_dump(), param_count=total,
        seeds={"study": 0, "trial": config.seed}, metric=spec.study.metric,
        value=None if bad else float(best[spec.study.metric]), outcome=outcome,
        detail="the loss became NaN at step 3" if bad else "", host="planted", micro_batch=128, memory_bytes=None,
        folds=(fold,), libraries={"python": "3.11"}, device="cpu × 1", git_commit=None,
        started=f"2026-01-01T00:{number:02d}:00+00:00", finished=f"2026-01-01T00:{number + 1:02d}:00+00:00",
        compile_s=1.0, wall_s=10.0 + number,
    )  # fmt: skip


def event_study(
    outputs, name="events", *, skill=1.0, baseline_skill=0.8, n_rows=900, n_trials=6, seed=0, asset="SPX", **more
):
    """A threshold study: true logit z; models say skill · z and a little noise, a baseline baseline_skill · z."""
    rng = np.random.default_rng(seed)
    z = rng.normal(-0.3, 1.2, n_rows)
    labels = (rng.random(n_rows) < 1 / (1 + np.exp(-z))).astype(float)
    spec = spec_of(outputs / "files", name, task=THRESHOLD)
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"assets": (asset,)})})
    prior = np.full(n_rows, -0.3)
    beaten = {"prior": prior, "volatility_logistic": -0.3 + baseline_skill * (z + 0.3)}
    return write_study(
        outputs, spec, lambda i, n: -0.3 + skill * (z + 0.3) + 0.1 * rng.normal(size=n_rows), labels=labels,
        baselines=beaten, n_trials=n_trials, assets=[asset] * n_rows, **more,
    )  # fmt: skip


def return_study(outputs, name, *, excess=0.05, budget="10K", seed=0, shapes_seed=0, horizon=1, n_rows=600, **more):
    """A regression study with noise of variance σ²: trial i errs by (1 + i) · excess · σ² more than the signal."""
    rng = np.random.default_rng(seed)
    signal = rng.normal(0, RETURN_SD * np.sqrt(0.3), n_rows)
    target = signal + rng.normal(0, RETURN_SD, n_rows)
    task = REGRESSION.replace("horizon = 1", f"horizon = {horizon}")
    spec = spec_of(outputs / "files", name, budget=budget, task=task)
    return write_study(
        outputs, spec,
        lambda i, n: signal + RETURN_SD * np.sqrt(excess * (1 + i)) * rng.normal(size=n_rows),
        labels=target, seed=shapes_seed,
        baselines={"prior": np.zeros(n_rows), "volatility_linear": signal * 0.1}, **more,
    )  # fmt: skip


def noise_study(outputs, name, *, budget="10K", edit="", task=REGRESSION, n_rows=60, n_trials=3, seed=0, **more):
    """A study of a few rows in which nothing can be known."""
    rng = np.random.default_rng(seed)
    target = rng.normal(0, 0.01, n_rows)
    spec = spec_of(outputs / "files", name, budget=budget, edit=edit, task=task)
    outputs_ = {"prior": np.zeros(n_rows), "volatility_linear": rng.normal(0, 0.001, n_rows)}
    return write_study(
        outputs, spec, lambda i, n: rng.normal(0, 0.001, n_rows), labels=target, baselines=outputs_, n_trials=n_trials,
        **more,
    )  # fmt: skip


def field_of(
    law: Callable[[float], float], *, sizes_: Sequence[float], n: int = 12, n_days: int = 1500, spread: float = 0.1,
    baseline: float = 0.05, seed: int = 0,
) -> SizedTrials:  # fmt: skip
    """Trials of several sizes without folders: squared errors of a noise of 1 plus an excess that the law gives.

    Args:
        law: size → excess.
        spread: SD of ln excess between the trials of a size.
    """
    rng = np.random.default_rng(seed)
    cell = np.repeat(np.arange(len(sizes_)), n)
    size = np.asarray(sizes_, float)[cell] * rng.uniform(0.75, 1.25, len(cell))
    noise = rng.normal(size=n_days)
    errors = [np.sqrt(law(s) * np.exp(rng.normal(0, spread))) * rng.normal(size=n_days) for s in size]
    days = np.square(noise - np.array(errors))
    beaten = np.square(noise - np.sqrt(baseline) * rng.normal(size=n_days))
    block = significance.block_length((beaten - days).T, horizon=1)
    return SizedTrials(
        over="parameters", studies=(), cells=tuple(map(int, sizes_)), cell=cell, study=cell,
        number=np.tile(np.arange(n), len(sizes_)), size=size, flops=size, loss=days.mean(axis=1) / beaten.mean(),
        days=days, baseline="volatility_linear", baseline_days=beaten, prior_loss=1.2, baseline_loss=1.05,
        n_rows=n_days, resamples=significance.resample(n_days, block, reps=400, seed=seed), notes=(),
    )  # fmt: skip
