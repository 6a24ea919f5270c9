"""The contestant that is fintx: its own step, its own trial loop, run as a study's worker runs them.

fintx: `train_step.TrainPrograms.segment`, as `trainer.fit` calls it. eight, cores, population: eight seeds one after
the other, by a thread per core, and as one program by `jax.vmap` over state and hyperparameters.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

from turns import keep_to_cores, serve, timed

from fintx.config.schema import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    Shape,
    SplitConfig,
    TaskConfig,
    TrainConfig,
    TrialConfig,
)
from fintx.data.datasets import Dataset, Part
from fintx.data.standardize import Standardizer
from fintx.study import environment
from fintx.train import train_step, trainer
from fintx.train.compilation import compile_lowered
from fintx.train.train_state import TargetScale, hyperparameters, static_config

N_THREADS = keep_to_cores()

import cases  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import profiling  # noqa: E402

MEMBERS = 8


def trial(case: cases.Case, *, seed: int = 0) -> TrialConfig:
    """The case as a trial; patience and length so long that nothing stops it."""
    return TrialConfig(
        data=DataConfig(features=tuple(f"f{i}" for i in range(cases.N_FEATURES))),
        task=TaskConfig(kind="threshold", horizon=1, price="high", threshold=0.01),
        split=SplitConfig(kind="fractions", train=0.7, validation=0.15),
        shape=Shape(d_model=case.d_model, n_layers=case.n_layers, n_heads=case.n_heads, d_ff=case.d_ff),
        model=ModelConfig(
            context_length=cases.CONTEXT, patch_length=cases.PATCH, stride=cases.STRIDE, dropout=case.dropout,
            compute_dtype=case.dtype,
        ),
        optim=OptimConfig(
            learning_rate=cases.LEARNING_RATE, weight_decay=cases.WEIGHT_DECAY, clip_norm=cases.CLIP_NORM
        ),
        train=TrainConfig(batch_size=case.batch_size, max_epochs=1000, patience=1000, collapse_patience=1000),
        seed=seed,
    )  # fmt: skip


def dataset(case: cases.Case) -> Dataset:
    """Noise, and labels that a model can learn: the newest bar's first feature is positive."""
    rng = np.random.default_rng(0)
    n_rows = case.n_windows + cases.CONTEXT - 1
    features = rng.standard_normal((n_rows, cases.N_FEATURES)).astype(np.float32)
    rows = np.arange(cases.CONTEXT - 1, n_rows, dtype=np.int32)
    labels = (features[rows, 0] > 0).astype(np.float32)
    n_train = case.n_windows - case.n_validation
    return Dataset(
        features=features,
        feature_names=tuple(f"f{i}" for i in range(cases.N_FEATURES)),
        dates=np.datetime64("2001-01-01", "D") + np.arange(n_rows),
        asset_ids=np.zeros(n_rows, np.int32),
        assets=("SPX",),
        close=np.ones(n_rows),
        train=Part(rows=rows[:n_train], labels=labels[:n_train]),
        validation=Part(rows=rows[n_train:], labels=labels[n_train:]),
        scaling=Standardizer(mean={}, std={}, pooled_mean=np.zeros(25), pooled_std=np.ones(25)),
        data_hash="",
        label_hash="",
        split_hash="",
    )


class Steps:
    """A trial under training, a few steps a turn."""

    def __init__(self, case: cases.Case):
        # Beyond its end an epoch has no samples, and a loss over none is no number.
        assert case.n_windows % (case.steps * case.batch_size) == 0, f"{case.name}: a turn runs past its epoch's end"
        config, data = trial(case), dataset(case)
        scale = TargetScale(mean=0.0, sd=1.0)
        self.hyper = hyperparameters(config, labels=data.train.labels, scale=scale)
        self.windows = train_step.place(data.features, data.train.rows, data.train.labels)
        (n_rows, n_features), n_samples = self.windows.features.shape, len(self.windows.rows)
        sizes = {"n_features": n_features, "n_rows": n_rows, "n_samples": n_samples}
        self.training = train_step.compile_training(static_config(config), **sizes)
        self.state, self.tally, self.n = self.training.start(self.hyper), train_step.EpochSums(), np.int32(case.steps)

    def turn(self) -> None:
        self.state, self.tally = self.training.segment(self.hyper, self.state, self.tally, self.windows, self.n)
        jax.block_until_ready(self.state)


def hypers(case: cases.Case, n: int) -> list[Any]:
    """The values of n members that differ in their seed."""
    labels, scale = dataset(case).train.labels, TargetScale(mean=0.0, sd=1.0)
    return [hyperparameters(trial(case, seed=seed), labels=labels, scale=scale) for seed in range(n)]


class Eight:
    """Members one after the other: each turn, the steps of all."""

    def __init__(self, case: cases.Case, n: int = MEMBERS):
        self.one, self.hypers = Steps(case), hypers(case, n)
        self.members = [(self.one.training.start(values), train_step.EpochSums()) for values in self.hypers]

    def turn(self) -> None:
        for i in range(len(self.members)):
            self._steps(i)

    def _steps(self, i: int) -> None:
        segment = self.one.training.segment
        self.members[i] = segment(self.hypers[i], *self.members[i], self.one.windows, self.one.n)
        jax.block_until_ready(self.members[i])


class OnCores(Eight):
    """Members by as many threads as there are cores, each alone; as replicates of small models are trained."""

    def turn(self) -> None:
        with ThreadPoolExecutor(N_THREADS) as threads:
            list(threads.map(self._steps, range(len(self.members))))


class Population:
    """Members under vmap."""

    def __init__(self, case: cases.Case, n: int = MEMBERS):
        eight, static = Eight(case, n), static_config(trial(case))
        stack = lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves])  # noqa: E731
        self.hypers = jax.device_put(jax.tree.map(stack, *eight.hypers))
        self.state = jax.device_put(jax.tree.map(stack, *[state for state, _ in eight.members]))
        self.tally = jax.device_put(jax.tree.map(stack, *[tally for _, tally in eight.members]))
        self.windows, self.n = eight.one.windows, eight.one.n

        def segment(hypers: Any, state: Any, tally: Any, windows: Any, n: Any) -> Any:
            return jax.vmap(lambda h, s, t: train_step.train_segment(static, h, s, t, windows, n))(hypers, state, tally)

        arguments = (self.hypers, self.state, self.tally, self.windows, self.n)
        self.segment = compile_lowered(jax.jit(segment, donate_argnums=1).lower(*arguments), static.model, static.shape)

    def turn(self) -> None:
        self.state, self.tally = self.segment(self.hypers, self.state, self.tally, self.windows, self.n)
        jax.block_until_ready(self.state)


class Trial:
    """`trainer.fit`, held between epochs. The first is not measured: it compiles."""

    def __init__(self, case: cases.Case):
        self._go: SimpleQueue[None] = SimpleQueue()
        self._epochs: SimpleQueue[None] = SimpleQueue()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._fit, args=(case,), daemon=True)
        self._thread.start()
        self._epochs.get()

    def _fit(self, case: cases.Case) -> None:
        def hold(epoch: Any) -> None:
            self._epochs.put(None)
            self._go.get()

        trainer.fit(
            trial(case), dataset(case), metric="log_loss", on_epoch=hold, should_stop=self._ending.is_set,
        )  # fmt: skip

    def turn(self) -> None:
        self._go.put(None)
        self._epochs.get()

    def close(self) -> None:
        self._ending.set()
        self._go.put(None)
        self._thread.join()


KINDS: dict[str, Callable[[cases.Case], Any]] = {
    "fintx": Steps,
    "eight": Eight,
    "cores": OnCores,
    "population": Population,
    "trial": Trial,
}


class Ours:
    """The orders that drive.py gives."""

    def __init__(self) -> None:
        self.held: dict[str, Any] = {}

    def setup(self, case: dict[str, Any], kind: str) -> dict[str, Any]:
        began = time.perf_counter()
        self.held[kind] = KINDS[kind](cases.Case(**case))
        return {"setup_s": time.perf_counter() - began}

    def turn(self, kind: str) -> dict[str, Any]:
        return timed(self.held[kind].turn)

    def profile(self, case: dict[str, Any]) -> dict[str, Any]:
        self.setup(case, "fintx")
        steps = self.held["fintx"]
        steps.turn()
        return profiling.profiled(steps.turn, steps.training.segment.as_text(), n_steps=int(steps.n))

    def drop(self) -> dict[str, Any]:
        for held in self.held.values():
            if isinstance(held, Trial):
                held.close()
        self.held.clear()
        train_step.compile_training.cache_clear()
        train_step.compile_logits.cache_clear()
        return {}

    def about(self) -> dict[str, Any]:
        return {
            "versions": environment.libraries(),
            "threads": N_THREADS,
            "device": environment.device(),
            "commit": environment.git_commit(),
        }


if __name__ == "__main__":
    ours = Ours()
    serve({name: getattr(ours, name) for name in ("setup", "turn", "profile", "drop", "about")})
