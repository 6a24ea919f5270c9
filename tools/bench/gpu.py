"""What gpu.sh runs: each stage in a process of its own, for JAX keeps a GPU's memory; what is late is left out."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cases

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LARGE = {
    "200M": cases.Case("200M", 768, 28, 12, 3072, 64, dtype="bfloat16", steps=8),
    "2B": cases.Case("2B", 2048, 40, 16, 8192, 64, dtype="bfloat16", steps=2),
}
BATCHES = {"200M": (32, 64, 128, 256, 512, 1024), "2B": (32, 64, 128, 256)}
BESIDE = (
    cases.Case("2M", 64, 48, 2, 256, 64, dtype="bfloat16", steps=16),
    cases.Case("20M", 256, 32, 2, 512, 64, dtype="bfloat16", steps=16),
    LARGE["200M"],
)
RIVALS = ("eager", "sdpa", "graph", "compile")
"""The slowest to get ready last: it has what time the others leave."""
SHARES = {"peak": 0.04, "mfu": 0.26, "population": 0.1, "beside": 0.3, "study": 0.3}
"""Of the time, for each stage; what one leaves goes to the next."""


def main() -> None:
    """Every stage within its time, and one JSON."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("out", nargs="?", type=Path, default=Path("gpu.json"))
    arguments.add_argument("--dry", action="store_true")
    arguments.add_argument("--rivals", default=os.environ.get("RIVALS"))
    arguments.add_argument("--seconds", type=float, default=530.0)
    arguments.add_argument("--stage", choices=SHARES)
    given = arguments.parse_args()
    if given.stage:
        STAGES[given.stage](given)
        return
    began, found = time.monotonic(), {"when": _now(), "dry": given.dry, "seconds": given.seconds, "stages": {}}
    ahead = dict(SHARES)
    for stage in SHARES:
        left = given.seconds - (time.monotonic() - began)
        allowed = left * ahead[stage] / sum(ahead.values())
        del ahead[stage]
        found["stages"][stage] = _stage(stage, allowed, given)
        given.out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{stage} ended: {found['stages'][stage]['ended']}", flush=True)
    found["took_s"] = time.monotonic() - began
    given.out.write_text(json.dumps(found, indent=1) + "\n")


def _stage(stage: str, allowed_s: float, given: argparse.Namespace) -> dict[str, Any]:
    """The stage's lines of JSON, as many as it came to, printed as they come; it is ended when its time is over."""
    command = [sys.executable, __file__, "--stage", stage, "--seconds", str(allowed_s)]
    command += ["--dry"] * given.dry + (["--rivals", given.rivals] if given.rivals else [])
    began, told = time.monotonic(), []
    # A session of its own, so that all it started ends with it.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    timer = threading.Timer(allowed_s, _end, (process.pid,))
    timer.start()
    try:
        for line in process.stdout:
            print(f"{stage}: {line}", end="", flush=True)
            if line.startswith("{"):
                told.append(json.loads(line))
        code = process.wait()
    finally:
        timer.cancel()
        _end(process.pid)
    late = time.monotonic() - began >= allowed_s
    return {"ended": "out of time" if late else code, "took_s": time.monotonic() - began, "found": told}


def _end(session: int) -> None:
    try:
        os.killpg(session, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _tell(**values: Any) -> None:
    print(json.dumps(values), flush=True)


# --- stages -----------------------------------------------------------------------------------------------------------


def peak(given: argparse.Namespace) -> None:
    """FLOP/s of large matrix products, and bytes/s of a copy: what everything else is held against."""
    import jax

    size = 256 if given.dry else 8192
    _tell(
        device=jax.devices()[0].device_kind, **{dtype: _matmul_rate(size, dtype) for dtype in ("bfloat16", "float32")}
    )
    _tell(bytes_per_s=_copy_rate(2**20 if given.dry else 2**30))


def _matmul_rate(size: int, dtype: str) -> float:
    import jax
    import jax.numpy as jnp

    # Random numbers: products of ones switch fewer transistors, and run a tenth faster than training's.
    a, b = (jax.random.normal(jax.random.key(i), (size, size)).astype(dtype) for i in range(2))
    kept = jnp.asarray(size**-0.5, dtype)  # the numbers' size, from product to product
    product = jax.jit(lambda a, b: jax.lax.fori_loop(0, 10, lambda _, x: (a @ x) * kept, b))
    return 10 * 2 * size**3 / _best_of(lambda: product(a, b).block_until_ready())


def _copy_rate(n_bytes: int) -> float:
    import jax
    import jax.numpy as jnp

    a = jnp.ones(n_bytes // 4, jnp.float32)
    scale = jax.jit(lambda a: jax.lax.fori_loop(0, 10, lambda _, x: x * 1.0001, a))
    return 10 * 2 * n_bytes / _best_of(lambda: scale(a).block_until_ready())


def _best_of(work: Any, n: int = 5) -> float:
    work()
    seconds = []
    for _ in range(n):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def mfu(given: argparse.Namespace) -> None:
    """The train step's share of the matmul peak, by size and batch."""
    sys.argv[1:] = [",".join(map(str, range(os.cpu_count() or 1)))]
    import jax
    import ours

    rate = _matmul_rate(256 if given.dry else 8192, "bfloat16")
    for name, case in LARGE.items():
        for batch_size in BATCHES[name][: 2 if given.dry else None]:
            one = cases.tiny(case) if given.dry else _of_batch(case, batch_size)
            began = time.perf_counter()
            try:
                steps = ours.Steps(one)
                ready = time.perf_counter()
                seconds = _best_of(steps.turn, 3) / one.steps
            except jax.errors.JaxRuntimeError as error:
                _tell(case=name, batch_size=batch_size, error=str(error).partition("\n")[0][:200])
                break
            _tell(
                case=name, batch_size=one.batch_size, n_params=one.n_params, step_s=seconds,
                mfu=one.step_flops / seconds / rate, ready_s=ready - began, held_bytes=steps.training.n_bytes,
            )  # fmt: skip
            del steps
            ours.step.compile_training.cache_clear()


def _of_batch(case: cases.Case, batch_size: int) -> cases.Case:
    """The case at another batch, in epochs of four turns or as they were."""
    return replace(case, batch_size=batch_size, n_windows=max(case.n_windows, 4 * case.steps * batch_size))


def population(given: argparse.Namespace) -> None:
    """Members of one program against as many runs one after the other."""
    sys.argv[1:] = [",".join(map(str, range(os.cpu_count() or 1)))]
    import ours

    for case, members in ((cases.POPULATION, 8), (cases.POPULATION, 32), (cases.STEPS[0], 8)):
        case = cases.tiny(case) if given.dry else case
        together, single = ours.Population(case, members), ours.Steps(case)
        seconds, one = _best_of(together.turn, 3) / case.steps, _best_of(single.turn, 3) / case.steps
        _tell(case=case.name, members=members, step_s=seconds, single_step_s=one, gain=members * one / seconds)


def beside(given: argparse.Namespace) -> None:
    """The same step in PyTorch, turn by turn; who isn't ready in the case's share of the time is left out, alone."""
    if not given.rivals:
        _tell(left_out="no --rivals PYTHON")
        return
    import drive

    began, cores = time.monotonic(), range(os.cpu_count() or 1)
    # All hold the GPU: without this JAX takes most of its memory at once.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    ours, _ = drive.contestants(None, cores, environment=environment)
    for i, case in enumerate(BESIDE):
        one = replace(cases.tiny(case) if given.dry else case, dtype=case.dtype)
        # A tenth of the time is for the turns themselves.
        until = began + 0.9 * given.seconds * (i + 1) / len(BESIDE)
        ready = {"fintx": ours.ask("setup", case=one.to_json(), kind="fintx")}
        turns = {"fintx": drive.Turn(ours, "turn", "fintx", one.steps)}
        rivals = {}
        for kind in RIVALS:
            rivals[kind] = drive.rival(given.rivals, cores, environment=environment)
            try:
                with rivals[kind].limited(until - time.monotonic()):
                    ready[kind] = rivals[kind].ask("setup", case=one.to_json(), kind=kind)
            except (RuntimeError, BrokenPipeError) as error:
                _tell(case=one.name, left_out=kind, why=str(error)[:200])
            else:
                _tell(case=one.name, kind=kind, **ready[kind])
                turns[kind] = drive.Turn(rivals[kind], "turn", kind, one.steps)
        _tell(case=one.to_json(), setup=ready, **drive.interleaved(turns, rounds=3))
        drive.drop(ours, None)
        for rival in rivals.values():
            rival.close()
    ours.close()


def study(given: argparse.Namespace) -> None:
    """As many of 200M_h3's fifty trials as there is time for, run and stopped as a user would."""
    with tempfile.TemporaryDirectory() as folder:
        changes = ['model.compute_dtype="bfloat16"']
        if given.dry:
            changes += [
                "study.n_trials=2", "budget.parameters=\"20K\"", "train.max_epochs=1",
                "architecture.d_model=[16]", "architecture.n_heads=[2]", "study.n_startup_trials=1",
            ]  # fmt: skip
        command = [sys.executable, "-m", "fintx.cli.main", "sweep", str(ROOT / "sweeps" / "200M_h3.toml")]
        command += ["--outputs", folder, "--data-dir", folder]
        command += [part for change in changes for part in ("--set", change)]
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
        try:
            process.wait(timeout=max(5.0, given.seconds - 25))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=20)
        wall_s = time.perf_counter() - began
        from fintx.study import records

        kept = [json.loads(record.model_dump_json()) for record in records.read_all(Path(folder) / "200M_h3")]
    n_trials = 2 if given.dry else 50
    summed = {key: sum(each.get(key) or 0.0 for each in kept) for key in ("wall_s", "trace_s", "compile_s", "run_s")}
    _tell(
        n_finished=len(kept), n_trials=n_trials, study_s=wall_s, **summed,
        projected_s=wall_s / len(kept) * n_trials if kept else None,
        busy_share=summed["run_s"] / wall_s,
        outcomes=[each["outcome"] for each in kept], epochs=[sum(f["epochs"] for f in each["folds"]) for each in kept],
    )  # fmt: skip


STAGES = {"peak": peak, "mfu": mfu, "population": population, "beside": beside, "study": study}

if __name__ == "__main__":
    main()
