"""Write docs/guide/sweep-file.md from the schema: every section and key with its type, default and meaning.

Run: python tools/sweep_reference.py [--check]      (--check: exit 1 if the page is not current)
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
import typing
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fintx.config import families, schema
from fintx.data.features import FEATURES, SETS
from fintx.tasks import TASKS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "guide" / "sweep-file.md"

_HEAD = """# The sweep file

One TOML file asks one question. `extends = "base.toml"` takes over another file beside it: tables merge key by key,
values are replaced whole, and a table that names another `kind` replaces the base's. Unknown keys are errors.
`just plan FILE` prints the resolved whole.

Any value can be set on the command line, and wins: `--set study.n_trials=3`, `--set 'data.assets=["SPY"]'`,
`--set architecture.n_layers.high=64`. The value is TOML; a bare word is text. It replaces what the key held, a table
too.

This page is made from the schema by `tools/sweep_reference.py`.
"""

_QUEUE = """\
The file's entries run first, in order, and count toward `n_trials`. What an entry is called is its `id`, or without
one a hash of its shape, values and training (so 1 and 1.0 are the same, and the note may change). An entry that is done
is never run again; a study that runs takes up what is added to its file.

`just queue list FILE` shows every entry with its state: queued, running, interrupted, done, failed n (attempts that
crashed or hung), cancelled. `just queue add FILE --d-model 768 --n-layers 28 --n-heads 12 --d-ff 3072 --note "…"` and
`just queue cancel FILE ID` edit the file: comments stay, and an entry that is wrong or leaves the budget is refused.

### Manual files

A file like `sweeps/manual.toml` holds `[[queue]]` entries alone, each of which names its study:

```toml
[[queue]]
sweep = "200M_h3.toml"            # a sweep file beside this one
d_model = 768
n_layers = 28
n_heads = 12
d_ff = 3072
note = "push depth beyond L=24"
```

`just manual` runs what of it is not done yet, each entry inside the study of its sweep file, also beyond `n_trials`.
"""

_SECTIONS: dict[str, type[BaseModel]] = {
    "[study]": schema.StudyConfig,
    "[data]": schema.DataConfig,
    "[task]": schema.TaskConfig,
    "[split]": schema.SplitConfig,
    "[budget]": schema.BudgetConfig,
    "[architecture]": families.ArchitectureConfig,
    "[model]": schema.ModelConfig,
    "[optim]": schema.OptimConfig,
    "[train]": schema.TrainConfig,
    "[mesh]": schema.MeshConfig,
    "[execution]": schema.ExecutionConfig,
    "[confirm]": schema.ConfirmConfig,
    "[[queue]]": families.EncoderEntry,
}


def page() -> str:
    """The whole page as Markdown."""
    parts = [_HEAD]
    for title, model in _SECTIONS.items():
        parts += [f"## {title}\n", f"{_first_line(model)}\n", _table(model)]
    parts += [_QUEUE]
    parts += [_space(), _features()]
    return "\n".join(parts).rstrip() + "\n"


def _first_line(model: type[BaseModel]) -> str:
    return inspect.cleandoc(model.__doc__ or "").partition("\n")[0]


def _table(model: type[BaseModel]) -> str:
    words = _field_docs(model) | (_field_docs(families.QueueEntry) if issubclass(model, families.QueueEntry) else {})
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    own_first = sorted(model.model_fields.items(), key=lambda item: item[0] not in model.__annotations__)
    for name, field in own_first:
        default = "required" if field.default is PydanticUndefined else _toml(field.default)
        bounds = "".join(_bound(each) for each in field.metadata)
        meaning = words.get(name, "").replace("|", "\\|")
        kind = Literal[tuple(TASKS)] if (model, name) == (schema.TaskConfig, "kind") else field.annotation
        rows.append(f"| `{name}` | {_type(kind)}{bounds} | {default} | {meaning} |")
    return "\n".join(rows) + "\n"


def _field_docs(model: type[BaseModel]) -> dict[str, str]:
    """The string below each field."""
    body = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        is_doc = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_doc:
            found[field.target.id] = " ".join(str(below.value.value).split())  # type: ignore[attr-defined]
    return found


def _bound(constraint: Any) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    if isinstance(constraint, FieldInfo):  # in front of `| None`, a Field stands for its constraints
        return "".join(map(_bound, constraint.metadata))
    return "".join(f", {sign} {getattr(constraint, key)}" for key, sign in signs.items() if hasattr(constraint, key))


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " \\| ".join(f'`"{each}"`' for each in arguments)
    if origin is typing.Annotated:
        return _type(arguments[0]) + "".join(_bound(each) for each in arguments[1:])
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return "table"
    if arguments:
        return " or ".join(_type(each) for each in arguments if each is not type(None))
    names = {int: "whole number", float: "number", str: "text", bool: "true / false"}
    return names.get(annotation, "date" if getattr(annotation, "__name__", "") == "date" else "table")


def _toml(default: Any) -> str:
    if default is None:
        return "–"
    if isinstance(default, BaseModel):
        return f"`{{ {', '.join(f'{k} = {v}' for k, v in default.model_dump().items())} }}`"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple):
        return f"`[{', '.join(_plain(each) for each in default)}]`"
    if isinstance(default, dict):
        return "`{}`"
    return f"`{_plain(default)}`"


def _plain(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def _space() -> str:
    paths = [
        f"`{name}.{key}`"
        for name, model in (("model", schema.ModelConfig), ("optim", schema.OptimConfig), ("train", schema.TrainConfig))
        for key in model.model_fields
        if key != "family"  # it says what [architecture] holds, so it can't be searched
    ]
    return (
        "## [space]\n\nWhat the sampler varies beside the shape: a dotted path in quotes, and a range or a list.\n\n"
        "```toml\n[space]\n"
        '"optim.learning_rate" = { low = 1e-4, high = 1e-3, log = true }\n'
        '"train.batch_size" = { choices = [32, 64, 128] }\n```\n\n'
        "A setting is either searched or fixed: beside its search, a value in its own section is an error (a base's "
        "value gives way).\n\n"
        f"Paths: {', '.join(paths)}.\n\nA `[[queue]]` entry may fix searched values in the same way: "
        '`"optim.learning_rate" = 3e-4`.\n'
    )


def _features() -> str:
    rows = ["| feature | meaning | in sets |", "|---|---|---|"]
    for name, feature in FEATURES.items():
        sets = ", ".join(f"`{each}`" for each, members in SETS.items() if name in members)
        rows.append(f"| `{name}` | {feature.description} | {sets} |")
    return (
        "## Features\n\n`data.features` lists features or sets, in order. `SYM:feature` computes a feature on the bars "
        "of a context symbol, as known on each of the asset's days. `stationary` takes `stationary_vix` along where "
        "VIX is in the context.\n\n" + "\n".join(rows) + "\n"
    )


def main() -> None:
    """Write the page, or check it."""
    text = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text() != text:
            sys.exit(f"{PAGE.name} is not current; run: python tools/sweep_reference.py")
        return
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
