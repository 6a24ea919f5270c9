"""Every key is found on the line where it stands, however TOML lets it be written."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fintx.config import toml
from fintx.config.toml import locate

# --- texts made line by line, so that every line is known -------------------------------------------------------------

_names = st.sampled_from(["a", "b-1", "c_2", "3", '"d e"', "'f.g'", '"h#"', "'[i]'"])
_keys = st.lists(_names, min_size=1, max_size=3)
_values = st.sampled_from(
    [
        ("1", ()),
        ("1.5e-3 # = [x]", ()),
        ("2020-01-01 00:00:00", ()),
        ('"a # \\" b = ["', ()),
        ("'c:\\'", ()),
        ('"""x"""', ()),
        ('"""\n[x]\ny = 1\n\\"""" """""', ()),
        ("'''\n[[x]]\n''''", ()),
        ("[]", ()),
        ("[1, 2]", (((0,), 0), ((1,), 0))),
        ('[ # one\n 1,\n\n ["]", 2], # three\n]', (((0,), 1), ((1,), 3), ((1, 0), 3), ((1, 1), 3))),
        ("{ x = 1, y.z = '}' }", ((("x",), 0), (("y",), 0), (("y", "z"), 0))),
        ("[\n{ x = [\n1] },\n{}]", (((0,), 1), ((0, "x"), 1), ((0, "x", 0), 2), ((1,), 3))),
    ]
)
_tables = st.lists(
    st.tuples(st.booleans(), _keys, st.lists(st.tuples(_keys, _values), max_size=4)), min_size=1, max_size=5
)


def bare(names: list[str]) -> tuple[str, ...]:
    return tuple(name.strip("\"'") for name in names)


def paths(tree: Any, path: tuple = ()) -> set[tuple]:
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return {path} - {()} | {inner for key, value in children for inner in paths(value, (*path, key))}


@given(_tables)
def test_every_key_and_element_is_found_on_its_line(tables):
    lines, expected, counts = ["# [not] a = table"], {}, {}
    for double, header, content in tables:
        names = bare(header)
        lines += ["", f" [{'[' if double else ''} {' . '.join(header)} ]{']' if double else ''}  # {{"]
        counts[names] = counts.get(names, -1) + 1
        table = (*names, counts[names]) if double else names
        expected[table] = "\n".join(lines).count("\n") + 1
        for keys, (value, inside) in content:
            first = "\n".join(lines).count("\n") + 2
            lines.append(f"\t{'.'.join(keys)}={value}")
            expected[(*table, *bare(keys))] = first
            expected |= {(*table, *bare(keys), *path): first + offset for path, offset in inside}
    text = "\n".join(lines)
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError:  # a key stands twice
        assume(False)
    # Tables below an array of tables go to its last element; those cases are the next test's.
    assume(not any(double for double, header, _ in tables) or len(tables) == 1 or expected.keys() <= paths(tree))
    located = locate(text)
    assert {path: located.get(path) for path in expected} == expected
    assert located.keys() == paths(tree)


_tokens = st.lists(
    st.sampled_from(
        ["a", "b", ".", " = ", "[", "]", "[[", "]]", "{", "}", ",", "\n", "1", "'", '"', '"""', "'''", "#", "\\",
         "a = ", "\n[a]\n", "\n[[a]]\n", "b = 1\n", "'x'", '"y"', "é", "\\u0061", "[1,\n2]", "{a=1}", " "]
    ),
    max_size=14,
).map("".join)  # fmt: skip


@settings(max_examples=1000)  # most texts are no TOML
@given(_tokens)
def test_whatever_tomllib_reads_is_located(text):
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    located = locate(text)
    assert all(1 <= line <= text.count("\n") + 1 for line in located.values())
    if "\\" not in text:  # escapes in keys are not decoded
        assert located.keys() == paths(tree)


_scalars = st.one_of(
    st.integers(), st.booleans(), st.text(max_size=8), st.floats(allow_nan=False, allow_infinity=False)
)
_trees = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=6), st.dictionaries(st.text(max_size=6), _trees, max_size=4), max_size=4))
def test_what_the_writer_writes_is_read_back_and_located(tree):
    lines, expected = [], {}
    for section, content in tree.items():
        lines += ["", "# [comment]", f"[{toml.key(section)}]"]
        expected[(spelled(section),)] = len(lines)
        for key, value in content.items():
            lines.append(f"{toml.key(key)} = {toml.value(value)}  # x = 1")
            expected[(spelled(section), spelled(key))] = len(lines)
    text = "\n".join(lines) + "\n"
    assert tomllib.loads(text) == tree
    located = locate(text)
    assert {path: located.get(path) for path in expected} == expected


def spelled(key: str) -> str:
    """A key as it stands in the text, without quotes: the locator decodes no escapes."""
    written = toml.key(key)
    return written[1:-1] if written != key else key


@pytest.mark.parametrize(
    ("text", "path", "line"),
    [
        ("[[queue]]\nd = 1\n[[queue]]\nd = 2\n", ("queue", 1, "d"), 4),
        ("[[queue]]\n[queue.values]\nd = 1\n[[queue]]\n[queue.values]\nd = 2\n", ("queue", 1, "values", "d"), 6),
        ("[[a]]\n[[a.b]]\n[[a.b]]\n[[a]]\n[[a.b]]\nx = 1\n", ("a", 1, "b", 0, "x"), 6),
        ('[a]\nb = """\n[x]\n"""\nc = 1\n', ("a", "c"), 5),
        ("[space]\noptim.eps.low = 1\noptim.eps.high = 2\n", ("space", "optim", "eps", "high"), 3),
        ("[a.b]\nx = 1\n[a]\ny = 1\n", ("a", "y"), 4),
        ("[a.b]\nx = 1\n[a]\ny = 1\n", ("a",), 3),
        ("x = 1\r\ny = 2\r\n", ("y",), 2),
    ],
    ids=[
        "second entry",
        "table of an entry",
        "arrays in arrays",
        "long string",
        "dotted",
        "parent later",
        "parent's header",
        "CRLF",
    ],
)
def test_special_cases(text, path, line):
    assert locate(text)[path] == line
    assert locate(text).keys() == paths(tomllib.loads(text))
