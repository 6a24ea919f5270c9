"""How long does a shape take to compile? Trace, lower and compile apart, in a fresh process without any cache.

python tools/bench/compiling.py D_MODEL N_LAYERS N_HEADS D_FF [BATCH]      one line of JSON
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = ("2M", "20M", "200M", "2B")
WIDTHS = (64, 128, 256, 384)
SHALLOW, DEEP = 12, 192


def measure(rounds: int, *, tiny: bool) -> list[dict[str, Any]]:
    """Every budget's smallest, middle, largest, deepest and widest shape; and depth 192 over 12, turn by turn."""
    found: list[dict[str, Any]] = []
    for budget in BUDGETS[:1] if tiny else BUDGETS:
        for shape in _extremes(budget):
            times = [in_a_fresh_process(shape) for _ in range(max(1, rounds // 4))]
            found.append({"part": "compile", "budget": budget, "shape": shape, **_medians(times)})
            print(_told(found[-1]), flush=True)
            if tiny:
                break
    for width in WIDTHS[:1] if tiny else WIDTHS:
        pairs = []
        for _ in range(max(2, rounds // 2)):
            shallow, deep = (in_a_fresh_process((width, depth, 2, 4 * width)) for depth in (SHALLOW, DEEP))
            pairs.append(
                {"shallow": shallow["total_s"], "deep": deep["total_s"], "cpu": deep["cpu_s"] / shallow["cpu_s"]}
            )
        ratios = [pair["deep"] / pair["shallow"] for pair in pairs]
        found.append({
            "part": "depth", "d_model": width, "depths": [SHALLOW, DEEP], "ratio": statistics.median(ratios),
            "ratios": ratios, "cpu_ratio": statistics.median(pair["cpu"] for pair in pairs),
            "shallow_s": statistics.median(pair["shallow"] for pair in pairs),
        })  # fmt: skip
        print(f"depth {DEEP} / {SHALLOW} at d_model {width}: {found[-1]['ratio']:.2f} ×", flush=True)
    return found


def in_a_fresh_process(shape: tuple[int, ...]) -> dict[str, float]:
    """Seconds of each phase of a trial's step, its start and its evaluation."""
    command = [sys.executable, __file__, *map(str, shape)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)


def _extremes(budget: str) -> list[tuple[int, int, int, int]]:
    from fintx.config import load
    from fintx.model import param_count

    spec = load.study(ROOT / "sweeps" / f"{budget}_h1.toml")
    shapes = param_count.feasible_shapes(spec.architecture, spec.budget, [spec.model], 25)
    by_size = sorted(shapes, key=lambda shape: param_count.count_params(spec.model, shape, 25).total)
    deepest = max(shapes, key=lambda shape: (shape.n_layers, shape.n_heads))
    widest = max(shapes, key=lambda shape: (shape.d_model, shape.d_ff))
    chosen = dict.fromkeys((by_size[0], by_size[len(by_size) // 2], by_size[-1], deepest, widest))
    return [(shape.d_model, shape.n_layers, shape.n_heads, shape.d_ff) for shape in chosen]


def _medians(times: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(each[key] for each in times) for key in times[0]}


def _told(entry: dict[str, Any]) -> str:
    return (
        f"{entry['budget']} {entry['shape']}: trace {entry['trace_s']:.1f} lower {entry['lower_s']:.1f} compile "
        f"{entry['compile_s']:.1f}, step {entry['total_s']:.1f} s (CPU {entry['cpu_s']:.1f}); start "
        f"{entry['start_s']:.1f}, evaluation {entry['evaluation_s']:.1f}"
    )


def main() -> None:
    """One shape, in this process."""
    sys.argv[1:], shape = ["0,1"], [int(each) for each in sys.argv[1:]]
    import cases
    import jax
    import ours

    from fintx.model import encoder
    from fintx.train import train_step
    from fintx.train.compilation import compile_lowered
    from fintx.train.train_state import (
        abstract_hyperparameters,
        abstract_state,
        init_state,
        static_config,
        static_model,
    )

    case = cases.Case("compile", *shape[:4], batch_size=shape[4] if len(shape) > 4 else 64)
    config = ours.trial(case)
    static, windows = (
        static_config(config),
        train_step.abstract_windows(n_features=cases.N_FEATURES, n_rows=4096, n_samples=4096),
    )
    model = static_model(config.model)

    def segment(*arguments: Any) -> Any:
        return train_step.train_segment(static, *arguments)

    jax.jit(lambda: 0)()  # the backend's own beginning
    began, cpu = time.perf_counter(), time.process_time()
    state, tally = abstract_state(static, n_features=cases.N_FEATURES), jax.eval_shape(train_step.EpochSums)
    count = jax.ShapeDtypeStruct((), "int32")
    traced = jax.jit(segment, donate_argnums=1).trace(abstract_hyperparameters(), state, tally, windows, count)
    at_trace = time.perf_counter()
    lowered = traced.lower()
    at_lower = time.perf_counter()
    segment_program = compile_lowered(lowered, config.model, config.shape)
    at_compile, cpu_s = time.perf_counter(), time.process_time() - cpu
    start = jax.jit(lambda values: init_state(static, values, n_features=cases.N_FEATURES))
    compile_lowered(start.lower(abstract_hyperparameters()), config.model, config.shape)
    at_start = time.perf_counter()
    params = encoder.abstract_params(model, config.shape, cases.N_FEATURES)
    evaluation = jax.jit(lambda params, windows: train_step.logits(model, config.shape, params, windows))
    compile_lowered(evaluation.lower(params, windows), config.model, config.shape)
    stats = segment_program.memory_analysis()
    print(json.dumps({
        "trace_s": at_trace - began, "lower_s": at_lower - at_trace, "compile_s": at_compile - at_lower,
        "total_s": at_compile - began, "cpu_s": cpu_s, "start_s": at_start - at_compile,
        "evaluation_s": time.perf_counter() - at_start, "temporary_bytes": stats.temp_size_in_bytes,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
