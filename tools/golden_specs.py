"""Write tests/golden/partition_specs.json: where every parameter of the model is cut, for each layout that is tested.

Run: python tools/golden_specs.py      then read the difference with your own eyes: it is what the test holds.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
from jax.sharding import PartitionSpec

from fintx.config.schema import ModelConfig, Shape
from fintx.model.family import FAMILIES
from fintx.train import sharding
from fintx.train.sharding import Layout

FILE = Path(__file__).resolve().parents[1] / "tests" / "golden" / "partition_specs.json"
LAYOUTS = (
    Layout(data=8),
    Layout(data=8, fsdp=True),
    Layout(data=2, model=4),
    Layout(data=4, model=2, fsdp=True),
)
SHAPE = Shape(d_model=768, n_layers=28, n_heads=12, d_ff=3072)


def specs() -> dict[str, dict[str, str]]:
    """Layout → path → shape and spec, of a model with every parameter there is."""
    params = FAMILIES["encoder"].abstract_params(ModelConfig(revin=True), SHAPE, 25)
    shapes = jax.tree_util.tree_leaves_with_path(params)
    found = {}
    for layout in LAYOUTS:
        cut = jax.tree.leaves(
            sharding.specs(FAMILIES["encoder"], layout, params), is_leaf=lambda x: isinstance(x, PartitionSpec)
        )
        found[str(layout)] = {
            "/".join(part.key for part in path): f"{tuple(leaf.shape)} {tuple(spec)}"
            for (path, leaf), spec in zip(shapes, cut, strict=True)
        }
    return found


if __name__ == "__main__":
    made = "tools/golden_specs.py, from the family's partition rules: shape, then mesh axis by axis of it"
    FILE.write_text(json.dumps({"made by": made, "specs": specs()}, indent=1, ensure_ascii=False) + "\n")
