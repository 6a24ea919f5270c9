"""How do figures get into docs/performance.md? Each part between its own two marks; the words around them stay."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
NAMES = {
    "eager": "PyTorch eager", "sdpa": "PyTorch eager, fused attention and AdamW", "compile": "torch.compile, fused",
    "huggingface": "Hugging Face PatchTST", "eight": "eight, one after the other",
    "cores": "eight, a thread per core", "population": "eight, one program (vmap)",
}  # fmt: skip


def write(result: dict[str, Any]) -> None:
    """Replace the tables of the parts that the result holds."""
    page = PAGE.read_text(encoding="utf-8")
    for part in dict.fromkeys(entry["part"] for entry in result["results"]):
        entries = [entry for entry in result["results"] if entry["part"] == part]
        text = f"{_where(result)}\n\n{TABLES[part](entries)}"
        pattern = rf"(<!-- bench:{part} -->\n).*?(<!-- /bench -->)"
        page, n = re.subn(pattern, lambda match, text=text: f"{match[1]}{text}\n{match[2]}", page, flags=re.DOTALL)
        assert n == 1, f"docs/performance.md has {n} places for {part}"
    PAGE.write_text(page, encoding="utf-8")


def _where(result: dict[str, Any]) -> str:
    ours, theirs = result["fintx"], result["rivals"]
    commit = (ours["commit"] or "no commit")[:12]
    rivals = "".join(f", {name} {version}" for name, version in theirs["versions"].items()) if theirs else ""
    jax = ours["versions"]["jax"]
    return f"{result['machine']}, {result['cores']} cores · {result['when'][:10]} · {commit} · jax {jax}{rivals}"


def _rows(head: str, rows: list[tuple[str, ...]]) -> str:
    columns = head.count("|") + 1
    lines = [f"| {head} |", "|" + "---|" * columns, *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def _shape(entry: dict[str, Any]) -> str:
    case = cases.Case(**entry["case"])
    return f"{case.name} ({case.d_model}, {case.n_layers}, {case.n_heads}, {case.d_ff}), batch {case.batch_size}"


def _timed(entries: list[dict[str, Any]]) -> str:
    rows = []
    for entry in entries:
        for name, seconds in entry["seconds"].items():
            wall, cpu = entry["times_seconds"].get(name), entry["times_cpu_seconds"].get(name)
            ratio = f"{wall['median']:.2f} ({wall['q1']:.2f}–{wall['q3']:.2f})" if wall else "1"
            cpu_ratio = f"{cpu['median']:.2f}" if cpu else "1"
            first = _shape(entry) if name == next(iter(entry["seconds"])) else ""
            rows.append((first, NAMES.get(name, name), f"{1e3 * seconds['median']:,.0f} ms", ratio, cpu_ratio))
    disturbed = max(entry["others"] for entry in entries)
    note = f"\n\nOther processes took up to {disturbed:.0%} of the cores meanwhile." if disturbed > 0.02 else ""
    return _rows("model | who | median | × the first (quartiles) | × its CPU time", rows) + note


def profile(entries: list[dict[str, Any]]) -> str:
    """The share of each kind; beside them the least that the products could take."""
    rows = []
    for entry in entries:
        floor_ms = 1e3 * cases.Case(**entry["case"]).step_flops / entry["peak_flop_s"]
        shares = (f"{share:.0%}" for share in entry["share"].values())
        rows.append((_shape(entry), f"{entry['clock_ms']:,.0f} ms", f"{floor_ms:,.0f} ms", *shares))
    head = "model | a step | products at peak | linear layers | attention | elementwise | copies | update | rest"
    return _rows(head, rows)


def _compile(entries: list[dict[str, Any]]) -> str:
    rows = [
        (
            f"{entry['budget']} {tuple(entry['shape'])}", f"{entry['trace_s']:.1f}", f"{entry['lower_s']:.1f}",
            f"{entry['compile_s']:.1f}", f"{entry['total_s']:.1f}", f"{entry['cpu_s']:.1f}",
            f"{entry['start_s']:.1f}", f"{entry['evaluation_s']:.1f}",
        )
        for entry in entries
    ]  # fmt: skip
    head = "shape | trace, s | lower | compile | the step | its CPU time | start | evaluation"
    return _rows(head, rows)


def _depth(entries: list[dict[str, Any]]) -> str:
    rows = [
        (str(e["d_model"]), f"{e['shallow_s']:.1f} s", f"{e['ratio']:.2f}", f"{e['cpu_ratio']:.2f}") for e in entries
    ]
    return _rows("d_model | 12 layers | 192 layers, × | × CPU time", rows)


def _ahead(entries: list[dict[str, Any]]) -> str:
    rows = []
    for entry in entries:
        case, members = f"{entry['budget']} {tuple(entry['shape'])}", entry["n_members"]
        where = entry["layout"] if members == 1 else f"{entry['layout']}, {members} members"
        held, estimated = entry["n_bytes"] / 1e9, entry["estimated_bytes"] / 1e9
        collectives = ", ".join(f"{n:,} {kind}" for kind, n in entry["collectives"].items()) or "none"
        rows.append((
            case, str(entry["batch_size"]), entry["dtype"], where, f"{held:.2f} GB", f"{estimated:.2f} GB",
            f"{entry['kernels']:,}", collectives,
        ))  # fmt: skip
    head = (
        "shape | batch | matmuls | devices | held on each | `plan`'s estimate | kernels a step | collectives among them"
    )
    return _rows(head, rows)


def _search(entries: list[dict[str, Any]]) -> str:
    (entry,) = entries
    return (
        f"A study of {entry['n_trials']} trials: {1e3 * entry['per_trial_s']:.0f} ms a trial beside its training; with "
        f"a 2M model's checkpoints {entry['share_of_trial']:.1%} of a trial of 30 s."
    )


def _saving(entries: list[dict[str, Any]]) -> str:
    (entry,) = entries
    return f"The best parameters: {1e3 * entry['best_s']:.0f} ms; a training state: {1e3 * entry['state_s']:.0f} ms."


def _counting(entries: list[dict[str, Any]]) -> str:
    (entry,) = entries
    return (
        f"{entry['n_shapes']:,} feasible shapes listed in {entry['enumerated_s']:.2f} s; "
        f"with {entry['n_counted']:,} of them counted, {entry['total_s']:.2f} s."
    )


TABLES: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "steps": _timed, "trials": _timed, "populations": _timed, "compile": _compile, "depth": _depth,
    "ahead": _ahead, "profile": profile, "search": _search, "saving": _saving, "counting": _counting,
}  # fmt: skip
