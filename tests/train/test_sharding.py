"""One trial over eight simulated devices: the same numbers, in the places that the table says, with no more traffic."""

from __future__ import annotations

import json
import re
import runpy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fintx.config.schema import MeshConfig, ModelConfig, Shape, TaskConfig, TrialConfig
from fintx.data.datasets import Dataset
from fintx.errors import FintxError
from fintx.model import encoder
from fintx.model.family import FAMILIES
from fintx.train import checkpoint, sharding, train_step, trainer
from fintx.train.resume import CheckpointManager, CheckpointPolicy, TrainingState
from fintx.train.sharding import DATA, MODEL, ONE, Layout
from fintx.train.train_state import (
    BatchLayout,
    FitInputs,
    Hyperparameters,
    Progress,
    TargetScale,
    Timing,
    TrainState,
    abstract_hyperparameters,
    abstract_state,
    hyperparameters,
    init_state,
    static_config,
)

Trials = Callable[..., TrialConfig]
Datasets = Callable[..., Dataset]
ROOT = Path(__file__).parents[2]
ENCODER = FAMILIES["encoder"]
LAYOUTS = {
    "data 8": Layout(data=8),
    "data 8, fsdp": Layout(data=8, fsdp=True),
    "model 4 x data 2": Layout(data=2, model=4),
    "model 2 x data 4, fsdp": Layout(data=4, model=2, fsdp=True),
}
# Every axis can be cut by eight, and no two are equal, so that no spec is right by accident.
SHAPE = {"shape.d_model": 16, "shape.n_layers": 3, "shape.n_heads": 4, "shape.d_ff": 64, "model.dropout": 0.3}


@dataclass(frozen=True)
class Compiled:
    """A trial's start, and the loss and gradients of a batch, compiled for one layout."""

    layout: Layout
    start: Any
    gradient: Any

    @property
    def collectives(self) -> Counter[str]:
        """Kind → how many stand in the compiled program; a loop's body counts once."""
        kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
        return Counter(re.findall(rf" ({kinds})(?:-start)?\(", self.gradient.as_text()))


Compile = Callable[[Layout], Compiled]


@pytest.fixture(scope="module")
def batch(make_trial: Trials) -> train_step.Batch:
    rng = np.random.default_rng(0)
    x, targets = rng.standard_normal((16, 12, 3)), rng.random(16) > 0.5
    weights = np.arange(16) < 13  # the last batch of an epoch
    return train_step.Batch(*(each.astype(np.float32) for each in (x, targets, weights)))


@pytest.fixture(scope="module")
def values(make_trial: Trials, make_dataset: Datasets) -> Hyperparameters:
    return hyperparameters(make_trial(SHAPE), labels=make_dataset().train.labels, scale=TargetScale(mean=0.0, sd=1.0))


@pytest.fixture(scope="module")
def compiled(make_trial: Trials, batch: train_step.Batch) -> Compile:
    programs: dict[Layout, Compiled] = {}

    def compile_for(layout: Layout) -> Compiled:
        if layout not in programs:
            static = static_config(make_trial(SHAPE), layout=layout)
            state = abstract_state(static, n_features=3)
            whole, cut = None, None
            if layout != ONE:
                whole, cut = sharding.everywhere(layout), sharding.shardings(ENCODER, layout, state)
            start = jax.jit(partial(init_state, static, n_features=3), in_shardings=whole, out_shardings=cut)
            gradient = jax.jit(
                partial(train_step.loss_and_grads, static),
                in_shardings=None if cut is None else (whole, cut, whole),
                out_shardings=None if cut is None else (whole, cut.params),
            )
            programs[layout] = Compiled(
                layout,
                start.lower(abstract_hyperparameters()).compile(),
                gradient.lower(abstract_hyperparameters(), state, batch).compile(),
            )
        return programs[layout]

    return compile_for


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_start_is_bit_equal_and_each_device_holds_its_part(
    layout: Layout, compiled: Compile, values: Hyperparameters
) -> None:
    alone, spread = compiled(ONE).start(values), compiled(layout).start(values)
    jax.tree.map(np.testing.assert_array_equal, sharding.to_host(spread), sharding.to_host(alone))
    bytes_on = {
        device: sum(shard.data.nbytes for leaf in jax.tree.leaves(spread) for shard in leaf.addressable_shards
                    if shard.device == device)
        for device in jax.devices()
    }  # fmt: skip
    assert len(set(bytes_on.values())) == 1, "no device holds more than another"
    assert bytes_on[jax.devices()[0]] == sharding.part_bytes(ENCODER, layout, alone)
    # Parameters and both moments alike: the state is three times the parameters, and three counters.
    assert sharding.part_bytes(ENCODER, layout, alone) == 3 * sharding.part_bytes(ENCODER, layout, alone.params) + 12


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_loss_and_gradients_equal_those_of_one_device(
    layout: Layout, compiled: Compile, values: Hyperparameters, batch: train_step.Batch
) -> None:
    """With dropout, so the masks are equal too. Sums in another order: some roundings of 6e-8, of numbers up to one."""
    (loss, gradients), (wanted_loss, wanted) = (
        each.gradient(values, each.start(values), batch) for each in (compiled(layout), compiled(ONE))
    )
    assert float(loss) == pytest.approx(float(wanted_loss), rel=2e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    jax.tree.map(
        lambda got, leaf: np.testing.assert_allclose(got, leaf, rtol=2e-5, atol=2e-6 * largest),
        sharding.to_host(gradients),
        sharding.to_host(wanted),
    )
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted)) > 0


# The loops over layers are two, forward and backward; each body stands once in the program.
MATRICES = 4
EDGES = 3
"""Of the weights outside of the blocks, that fsdp cuts: embedding, positions, head."""


def test_one_device_talks_to_nobody(compiled: Compile) -> None:
    assert compiled(ONE).collectives == {}


def test_over_data_gradients_are_added_up_and_nothing_else_moves(compiled: Compile) -> None:
    assert compiled(LAYOUTS["data 8"]).collectives.keys() == {"all-reduce"}


def test_fsdp_brings_each_layers_weights_together_and_never_the_stream(compiled: Compile) -> None:
    """Once forward and once backward. A CPU has no reduce-scatter: gradients are added up, then cut."""
    program = compiled(LAYOUTS["data 8, fsdp"])
    assert program.collectives["all-gather"] == 2 * MATRICES + EDGES
    assert program.collectives.keys() <= {"all-gather", "all-reduce", "reduce-scatter"}
    gathered = re.findall(r"= f32\[([\d,]*)\]\S* all-gather", program.gradient.as_text())
    assert {math_product(dims) for dims in gathered} <= {16 * 48, 16 * 16, 16 * 64, 12 * 16, 3 * 16}


def math_product(dims: str) -> int:
    return int(np.prod([int(each) for each in dims.split(",")]))


def test_tensor_parallelism_adds_up_twice_a_layer_each_way(compiled: Compile) -> None:
    """After the heads and after the feed-forward, as in Megatron-LM; queries, keys and values are never regrouped."""
    program = compiled(LAYOUTS["model 4 x data 2"])
    assert program.collectives.keys() == {"all-reduce"}
    # (B, N, D) over 2 data devices: 8 windows of 3 patches.
    streams = re.findall(r"= f32\[24,16\]\S* all-reduce", program.gradient.as_text())
    assert len(streams) == 4


def test_fsdp_and_tensor_parallelism_together(compiled: Compile) -> None:
    program = compiled(LAYOUTS["model 2 x data 4, fsdp"])
    assert program.collectives["all-gather"] == 2 * MATRICES + EDGES
    assert program.collectives.keys() <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert len(re.findall(r"= f32\[12,16\]\S* all-reduce", program.gradient.as_text())) == 4


def test_the_compiled_program_holds_less_where_more_is_cut(compiled: Compile) -> None:
    """State and gradients are cut alike; of temporaries, so small a model has as many as of parameters."""
    memory = {name: compiled(layout).gradient.memory_analysis() for name, layout in LAYOUTS.items()}
    whole, cut = memory["data 8"], memory["data 8, fsdp"]
    assert cut.argument_size_in_bytes < whole.argument_size_in_bytes / 4
    assert cut.output_size_in_bytes < whole.output_size_in_bytes / 4
    totals = [sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
              for sizes in memory.values()]  # fmt: skip
    assert max(totals) == totals[0] and min(totals) == totals[3]


# --- where things lie -------------------------------------------------------------------------------------------------


def test_every_parameter_lies_as_the_golden_file_says() -> None:
    """Its own file says how it is made."""
    specs = runpy.run_path(str(ROOT / "tools" / "golden_specs.py"))["specs"]()
    assert specs == json.loads((ROOT / "tests" / "golden" / "partition_specs.json").read_text())["specs"]
    assert specs.keys() == {str(layout) for layout in LAYOUTS.values()}


def test_every_path_of_the_rules_is_a_parameter() -> None:
    params = encoder.abstract_params(ModelConfig(), Shape(d_model=8, n_layers=1, n_heads=1, d_ff=8), 2)
    paths = {"/".join(part.key for part in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert ENCODER.partition_rules.keys() <= paths


def test_a_spec_that_uses_an_axis_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="blocks/qkv/kernel.*twice"):
        twice = replace(ENCODER, partition_rules={"blocks/qkv/kernel": PartitionSpec(None, MODEL, MODEL)})
        sharding.spec_of(twice, Layout(model=2), ("blocks", "qkv", "kernel"), (2, 4, 4))


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((2, 16, 48), PartitionSpec(None, None, DATA)),
        ((2, 64, 24), PartitionSpec(None, DATA)),
        ((2, 16, 33), PartitionSpec(None, DATA)),
        ((8, 3, 5), PartitionSpec()),
        ((2, 64), PartitionSpec()),
    ],
    ids=["the largest axis", "the other", "that eight divides", "never the layers'", "no vector"],
)
def test_fsdp_cuts_the_largest_axis_that_it_can(shape: tuple[int, ...], wanted: PartitionSpec) -> None:
    layout = Layout(data=8, fsdp=True)
    assert sharding.spec_of(ENCODER, layout, ("blocks", "qkv", "kernel"), shape) == wanted
    population = sharding.spec_of(ENCODER, layout, ("blocks", "qkv", "kernel"), (7, *shape), leading=1)
    assert population == (PartitionSpec(None, *wanted) if wanted else wanted)


def test_an_optimisers_moments_lie_like_their_parameters(make_trial: Trials) -> None:
    static = static_config(make_trial(SHAPE))
    state = sharding.specs(ENCODER, Layout(data=4, model=2, fsdp=True), abstract_state(static, n_features=3))
    (adam,) = (part for part in state.optimizer if hasattr(part, "mu"))
    assert adam.mu == adam.nu == state.params
    assert state.step == adam.count == PartitionSpec()


@pytest.mark.parametrize("layout", [Layout(data=9), Layout(data=4, model=4)], ids=str)
def test_too_few_devices_are_reported(layout: Layout) -> None:
    with pytest.raises(FintxError, match=r"needs (9|16) devices, and there are 8"):
        sharding.mesh_of(layout)


# --- populations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [LAYOUTS["data 8, fsdp"], LAYOUTS["model 2 x data 4, fsdp"]], ids=str)
def test_a_population_lies_on_a_mesh(
    layout: Layout, compiled: Compile, make_trial: Trials, values: Hyperparameters, batch: train_step.Batch
) -> None:
    """Two members under vmap, each with its own seed and dropout, the leading axis whole everywhere."""
    other = replace(values, seed=np.uint32(7), dropout=np.float32(0.1))
    together = jax.tree.map(lambda *leaves: np.stack(leaves), values, other)
    static = static_config(make_trial(SHAPE), layout=layout)
    start = jax.vmap(partial(init_state, static, n_features=3))
    abstract = jax.eval_shape(start, together)
    cut, whole = sharding.shardings(ENCODER, layout, abstract, leading=1), sharding.everywhere(layout)
    states = jax.jit(start, in_shardings=whole, out_shardings=cut)(together)
    gradient = jax.jit(
        jax.vmap(partial(train_step.loss_and_grads, static), in_axes=(0, 0, None)),
        in_shardings=(whole, cut, whole),
        out_shardings=(whole, cut.params),
    )
    losses, gradients = gradient(together, states, batch)
    for member, each in enumerate((values, other)):
        alone = compiled(ONE).start(each)
        jax.tree.map(
            lambda got, leaf, member=member: np.testing.assert_array_equal(got[member], leaf),
            sharding.to_host(states),
            sharding.to_host(alone),
        )
        loss, wanted = compiled(ONE).gradient(each, alone, batch)
        assert float(losses[member]) == pytest.approx(float(loss), rel=2e-6)
        jax.tree.map(
            lambda got, leaf, member=member: np.testing.assert_allclose(got[member], leaf, rtol=2e-5, atol=1e-6),
            sharding.to_host(gradients),
            sharding.to_host(wanted),
        )
    parts = [shard.data.nbytes for leaf in jax.tree.leaves(states) for shard in leaf.addressable_shards]
    assert sum(parts) == 8 * sharding.part_bytes(ENCODER, layout, abstract, leading=1)


# --- on the disk and back ---------------------------------------------------------------------------------------------


def placed(layout: Layout, state: TrainState) -> TrainState:
    """On the layout's devices, and checked that it lies there as it should."""
    on_devices = sharding.put(ENCODER, layout, state)
    if layout != ONE:
        for leaf, wanted in zip(
            jax.tree.leaves(on_devices), jax.tree.leaves(sharding.shardings(ENCODER, layout, state)), strict=True
        ):
            assert isinstance(wanted, NamedSharding) and leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
    return on_devices


@pytest.mark.parametrize("name", ["data 8", "model 2 x data 4, fsdp"])
def test_a_state_saved_on_eight_devices_restores_on_one_and_on_four_and_back(
    name: str, compiled: Compile, make_trial: Trials, make_dataset: Datasets, values: Hyperparameters, tmp_path: Path
) -> None:
    """Bit for bit, moments and all."""
    inputs = FitInputs(make_trial(SHAPE), make_dataset(), "log_loss")
    rng = np.random.default_rng(1)
    state = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype) if leaf.ndim else np.array(leaf),
        sharding.to_host(compiled(LAYOUTS[name]).start(values)),
    )
    wanted = state
    for index, layout in enumerate((LAYOUTS[name], ONE, Layout(data=4, fsdp=True), LAYOUTS[name])):
        saves = CheckpointPolicy(tmp_path / str(index), 1e9, lambda: None)
        batch_layout = BatchLayout(16, layout=layout)
        CheckpointManager(saves, inputs).save(
            TrainingState(
                sharding.to_host(placed(layout, state)),
                train_step.EpochSums(),
                Progress(),
                batch_layout,
                timing=Timing(),
            )  # fmt: skip
        )
        saved = CheckpointManager(saves, inputs).newest(pytest.fail)
        assert saved is not None and saved.batch_layout == batch_layout
        state = saved.state
        jax.tree.map(np.testing.assert_array_equal, state, wanted)


def test_a_trained_model_saved_on_eight_devices_is_the_same_on_four(
    compiled: Compile, make_trial: Trials, values: Hyperparameters, tmp_path: Path
) -> None:
    config = make_trial(SHAPE)
    params = compiled(LAYOUTS["data 8, fsdp"]).start(values).params
    checkpoint.save(tmp_path / "model", sharding.to_host(params), config=config, meta={})
    placed = sharding.put(ENCODER, Layout(data=4, fsdp=True), checkpoint.load(tmp_path / "model").params)
    jax.tree.map(np.testing.assert_array_equal, sharding.to_host(placed), sharding.to_host(params))


# --- whole trials -----------------------------------------------------------------------------------------------------

WHOLE = {**SHAPE, "train.batch_size": 12, "optim.eps": 1e-3, "train.max_epochs": 2}
"""Twelve windows over eight devices; and an eps that keeps Adam from turning roundings into steps."""


@pytest.mark.slow
def test_a_trial_on_a_mesh_is_the_trial(make_trial: Trials, make_dataset: Datasets) -> None:
    """Regression, whose parameters are rescaled between training and evaluation."""
    task = TaskConfig(kind="regression", horizon=1)
    config = make_trial({**WHOLE, "task": task, "train.loss": "mse"})
    data = make_dataset(kind="regression")
    alone = trainer.fit(config, data, metric="mse")
    spread = trainer.fit(config, data, metric="mse", mesh=MeshConfig(data=4, model=2, fsdp=True))
    assert spread.batch_layout == BatchLayout(12, layout=Layout(data=4, model=2, fsdp=True))
    assert alone.batch_layout == BatchLayout(12)
    for got, wanted in zip(spread.curve, alone.curve, strict=True):
        assert got == pytest.approx(wanted, rel=1e-4)
    assert spread.params is not None and spread.outputs is not None
    features, rows = data.features, data.validation.rows
    same = trainer.predict(config, spread.params, features, rows, layout=spread.batch_layout.layout)
    np.testing.assert_array_equal(same, spread.outputs)
    np.testing.assert_allclose(trainer.predict(config, spread.params, features, rows), same, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_trial_goes_on_where_there_are_fewer_devices(
    make_trial: Trials, make_dataset: Datasets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "dispatch_size", lambda left, step_s: 1)
    config, data, saves = make_trial(WHOLE), make_dataset(), CheckpointPolicy(tmp_path, 1e9, lambda: None)
    taken = [0]
    stopped = trainer.fit(
        config, data, metric="log_loss", saves=saves, mesh=MeshConfig(fsdp=True),
        on_progress=taken.append, should_stop=lambda: taken[-1] >= 9,
    )  # fmt: skip
    assert (stopped.outcome, stopped.batch_layout.layout) == ("interrupted", Layout(data=8, fsdp=True))
    result = trainer.fit(config, data, metric="log_loss", saves=saves)
    assert (result.outcome, result.resumed_step, result.batch_layout) == ("completed", 9, BatchLayout(12))
    assert ["data 8 × model 1, fsdp" in line and "last digits" in line for line in result.warnings] == [True]
    alone = trainer.fit(config, data, metric="log_loss")
    for got, wanted in zip(result.curve, alone.curve, strict=True):
        assert got == pytest.approx(wanted, rel=1e-4)
