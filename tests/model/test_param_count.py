"""Counts against closed formulas and real leaves, FLOPs against the traced program, feasibility against brute force."""

from __future__ import annotations

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from fintx.config.bounds import parse_parameters
from fintx.config.families import LayerRange
from fintx.config.schema import ArchitectureConfig, BudgetConfig, ModelConfig, Shape
from fintx.errors import FintxError
from fintx.model import encoder, param_count

MODEL = ModelConfig()  # context 60, patch 10, stride 5: 11 patches


def shape(d_model: int, n_layers: int, n_heads: int, d_ff: int) -> Shape:
    return Shape(d_model=d_model, n_layers=n_layers, n_heads=n_heads, d_ff=d_ff)


def leaves_of(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def formula(model: ModelConfig, dimensions: Shape, F: int) -> int:
    """The closed form: embedding, positions, L blocks, final norm, head, RevIN."""
    N, P = (model.context_length - model.patch_length) // model.stride + 1, model.patch_length
    d, ff, L = dimensions.d_model, dimensions.d_ff, dimensions.n_layers
    blocks = L * (4 * d * d + 2 * d * ff + 9 * d + ff)
    return (P * F * d + d) + N * d + blocks + 2 * d + (N * d + 1) + 2 * F * model.revin


# --- counts -----------------------------------------------------------------------------------------------------------

PYTORCH = {  # the study that fintx replaces; its model had 10 unused position rows
    (768, 24, 16, 3072): 170_327_809,
    (768, 28, 12, 3072): 198_679_297,
    (768, 30, 12, 3072): 212_855_041,
    (1024, 20, 16, 2048): 168_289_281,
    (1024, 12, 16, 4096): 151_446_529,
    (384, 96, 8, 1536): 170_457_985,
}


@pytest.mark.parametrize("dimensions", PYTORCH, ids=str)
def test_counts_are_the_pytorch_studys_less_its_unused_positions(dimensions: tuple[int, int, int, int]) -> None:
    assert param_count.count_params(MODEL, shape(*dimensions), 25).total == PYTORCH[dimensions] - 10 * dimensions[0]


GEOMETRIES = {
    "default": (MODEL, shape(16, 3, 4, 32), 25),
    "revin": (ModelConfig(revin=True), shape(12, 2, 3, 24), 7),
    "odd ratio": (ModelConfig(context_length=13, patch_length=5, stride=3), shape(10, 4, 5, 33), 1),
    "tiny": (ModelConfig(context_length=1, patch_length=1, stride=1), shape(1, 1, 1, 1), 1),
    "bfloat16": (ModelConfig(compute_dtype="bfloat16", dropout=0.5), shape(8, 1, 2, 8), 3),
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_count_is_the_sum_of_real_leaves_part_by_part_and_the_closed_formula(geometry: Any) -> None:
    model, dimensions, F = geometry
    params = jax.jit(lambda key: encoder.init(model, dimensions, F, key))(jax.random.key(0))
    counted = param_count.count_params(model, dimensions, F)
    assert counted.total == leaves_of(params) == sum(counted.parts.values())
    assert counted.parts["embedding"] == leaves_of([params["embedding"], params.get("revin", {})])
    assert counted.parts["positions"] == leaves_of(params["positions"])
    assert counted.parts["blocks"] == leaves_of(params["blocks"])
    assert counted.parts["head"] == leaves_of([params["norm"], params["head"]])
    assert counted.total == formula(model, dimensions, F)


def test_heads_do_not_change_a_count() -> None:
    assert (
        len({str(param_count.count_params(MODEL, shape(48, 2, heads, 96), 25)) for heads in encoder.head_counts(48)})
        == 1
    )


def test_a_2b_shape_is_counted_in_no_time_and_allocates_nothing() -> None:
    param_count.count_params(MODEL, shape(64, 2, 2, 128), 25)
    before = len(jax.live_arrays())
    began = time.process_time()
    giant = shape(2048, 40, 16, 8192)
    params = encoder.abstract_params(MODEL, giant, 25)
    total = param_count.count_params(MODEL, giant, 25).total
    assert time.process_time() - began < 0.5  # some 10 ms on an idle machine
    assert total == leaves_of(params) > 2e9
    assert len(jax.live_arrays()) == before
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))


def test_head_counts_are_the_divisors() -> None:
    assert encoder.head_counts(12) == (1, 2, 3, 4, 6, 12)


# --- FLOPs and memory -------------------------------------------------------------------------------------------------


def matmul_flops(jaxpr: Any) -> int:
    """2 × multiply-adds of every matmul in a traced program, but for the norms' means (marked by their precision)."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            if equation.params["precision"] is None:
                (contracted, _), _ = equation.params["dimension_numbers"]
                inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
                total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        for inner_jaxpr in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            if hasattr(inner_jaxpr, "eqns"):
                total += equation.params.get("length", 1) * matmul_flops(inner_jaxpr)
    return total


@pytest.mark.parametrize("geometry", [GEOMETRIES["default"], GEOMETRIES["odd ratio"]], ids=["default", "odd ratio"])
def test_forward_flops_are_those_of_the_traced_program(geometry: Any) -> None:
    model, dimensions, F = geometry
    x = jax.ShapeDtypeStruct((6, model.context_length, F), jnp.float32)
    params = encoder.abstract_params(model, dimensions, F)
    traced = jax.make_jaxpr(lambda params, x: encoder.apply(model, dimensions, params, x))(params, x)
    flops = param_count.flops(model, dimensions, F)
    assert 6 * flops.forward == matmul_flops(traced.jaxpr)
    assert flops.backward == 2 * flops.forward


def test_state_is_sixteen_bytes_a_parameter() -> None:
    dimensions = shape(64, 2, 2, 128)
    assert param_count.state_bytes(MODEL, dimensions, 25) == 16 * param_count.count_params(MODEL, dimensions, 25).total


def test_activations_grow_with_the_batch_and_shrink_with_parts() -> None:
    dimensions = shape(64, 2, 2, 128)
    small, large = (encoder.activation_bytes(MODEL, dimensions, windows=windows) for windows in (8, 16))
    assert large == 2 * small > 0
    assert small / 2 < encoder.activation_bytes(MODEL, dimensions, windows=8, parts=2) < small


@pytest.mark.parametrize("remat", [False, True], ids=["products kept", "computed again"])
def test_activations_are_near_the_compiled_steps(remat: bool) -> None:
    dimensions, batch_size = shape(32, 24, 2, 128), 32
    params = encoder.abstract_params(MODEL, dimensions, 25)
    x = jax.ShapeDtypeStruct((batch_size, 60, 25), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    gradient = jax.grad(lambda params, x, key: encoder.apply(MODEL, dimensions, params, x, key=key, remat=remat).sum())
    measured = jax.jit(gradient).lower(params, x, key).compile().memory_analysis()
    activations = encoder.activation_bytes(MODEL, dimensions, windows=batch_size, remat=remat)
    assert activations == pytest.approx(measured.temp_size_in_bytes, rel=0.35)


def test_bfloat16_keeps_fewer_bytes_but_the_residual_streams() -> None:
    dimensions = shape(32, 24, 2, 128)
    half = ModelConfig(compute_dtype="bfloat16")
    full, less = (encoder.activation_bytes(model, dimensions, windows=512) for model in (MODEL, half))
    assert 0.5 < less / full < 0.7


# --- feasible shapes --------------------------------------------------------------------------------------------------

ARCHITECTURE = ArchitectureConfig(
    d_model=(16, 24, 40), n_layers=LayerRange(low=2, high=30), n_heads=(2, 3, 4, 7), d_ff_ratio=(1.3, 4.0)
)
BUDGET = BudgetConfig(parameters=100_000, tolerance=0.25)
VARIANTS = (MODEL, ModelConfig(context_length=600), ModelConfig(revin=True))


def brute_force(budget: BudgetConfig, models: tuple[ModelConfig, ...]) -> list[tuple[int, int, int, int]]:
    shapes = []
    for d_model in ARCHITECTURE.d_model:
        for ratio in ARCHITECTURE.d_ff_ratio:
            for n_layers in range(2, 31):
                one = shape(d_model, n_layers, 1, round(ratio * d_model))
                totals = [formula(model, one, 25) for model in models]
                if all(abs(total / budget.parameters - 1) <= budget.tolerance for total in totals):
                    shapes += [(d_model, one.d_ff, n_layers, heads) for heads in (2, 3, 4, 7) if d_model % heads == 0]
    return sorted(shapes)


@pytest.mark.parametrize("models", [VARIANTS[:1], VARIANTS], ids=["one model", "three variants"])
def test_feasible_shapes_are_all_those_inside_for_every_variant(models: tuple[ModelConfig, ...]) -> None:
    shapes = param_count.feasible_shapes(ARCHITECTURE, BUDGET, models, 25)
    assert [(s.d_model, s.d_ff, s.n_layers, s.n_heads) for s in shapes] == brute_force(BUDGET, models)
    assert shapes, "an empty set proves nothing"
    assert shapes[0] == shape(shapes[0].d_model, shapes[0].n_layers, shapes[0].n_heads, shapes[0].d_ff)
    assert len(set(shapes)) == len(shapes)


@pytest.mark.parametrize("parameters", ["2M", "20M", "200M", "2B"])
def test_every_budget_of_the_shipped_sweeps_has_shapes_and_only_shapes_inside(parameters: str) -> None:
    budget = BudgetConfig(parameters=parse_parameters(parameters))
    candidates = ArchitectureConfig(d_model=(64, 128, *ArchitectureConfig().d_model))
    shapes = param_count.feasible_shapes(candidates, budget, (MODEL,), 25)
    assert len(shapes) > 10
    outside = [s for s in shapes if abs(formula(MODEL, s, 25) / budget.parameters - 1) > 0.25]
    assert not outside


def test_a_variant_that_counts_more_takes_shapes_away() -> None:
    alone, jointly = (
        param_count.feasible_shapes(ARCHITECTURE, BUDGET, models, 25) for models in (VARIANTS[:1], VARIANTS)
    )
    assert set(jointly) < set(alone)


@pytest.mark.parametrize(
    ("changes", "parameters", "words"),
    [
        ({}, 1000, ["smallest candidate holds", "lower architecture.d_model or n_layers.low", "budget.parameters"]),
        ({}, 10**9, ["largest candidate holds", "raise architecture.n_layers.high or d_model"]),
        ({"n_heads": (7, 11)}, 100_000, ["no architecture.n_heads divides"]),
        ({"d_model": (16, 400), "n_layers": LayerRange(low=2, high=4)}, 300_000, ["none lies inside", "tolerance"]),
    ],
    ids=["too big", "too small", "heads", "steps over"],
)
def test_an_empty_set_says_which_bound_to_change(changes: dict[str, Any], parameters: int, words: list[str]) -> None:
    architecture = ARCHITECTURE.model_copy(update=changes)
    with pytest.raises(param_count.InfeasibleBudget) as caught:
        param_count.feasible_shapes(architecture, BudgetConfig(parameters=parameters, tolerance=0.1), (MODEL,), 25)
    assert isinstance(caught.value, FintxError)
    assert "\n" not in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


def test_variants_too_far_apart_are_named() -> None:
    models = (ModelConfig(context_length=10), ModelConfig(context_length=2000))
    narrow = ARCHITECTURE.model_copy(update={"d_model": (16,)})
    with pytest.raises(param_count.InfeasibleBudget, match="each of the 2 searched model variants"):
        param_count.feasible_shapes(narrow, BudgetConfig(parameters=20_000, tolerance=0.1), models, 25)


def test_a_ratio_that_leaves_no_feed_forward_makes_no_candidate() -> None:
    architecture = ARCHITECTURE.model_copy(update={"d_ff_ratio": (0.01, 4.0)})
    assert {s.d_ff / s.d_model for s in param_count.feasible_shapes(architecture, BUDGET, (MODEL,), 25)} == {4.0}


def test_depths_for_a_width_are_the_interval_that_fits() -> None:
    budget = BudgetConfig(parameters=200_000_000, tolerance=0.25)
    depths = encoder.depths_for(budget, (MODEL,), 25, d_model=1024, d_ff=4096)
    totals = [param_count.count_params(MODEL, shape(1024, n, 1, 4096), 25).total for n in range(1, 40)]
    assert list(depths) == [n for n, total in enumerate(totals, start=1) if budget.low <= total <= budget.high]
    assert 12 in depths  # 151 M
    assert not encoder.depths_for(budget, (MODEL,), 25, d_model=16384, d_ff=65536)


def test_ten_thousand_shapes_cost_a_few_abstract_evaluations() -> None:
    architecture = ArchitectureConfig(
        d_model=tuple(range(64, 2048, 16)),
        n_layers=LayerRange(low=1, high=240),
        n_heads=(1, 2, 4, 8),
        d_ff_ratio=(1.0, 2.0, 3.0, 4.0),
    )
    before = encoder._count_coefficients.cache_info().misses
    shapes = param_count.feasible_shapes(architecture, BudgetConfig(parameters=20_000_000), VARIANTS[:2], 25)
    counts = [param_count.count_params(MODEL, candidate, 25).total for candidate in shapes]
    assert len(shapes) > 10_000
    assert all(15_000_000 <= total <= 25_000_000 for total in counts)
    assert encoder._count_coefficients.cache_info().misses - before <= len(VARIANTS[:2]) + 1
