"""Interface files and what passes them: every valid value, and no other."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanoclawd import idl, paths
from nanoclawd.idl import Type, parse_interface, read_interface
from nanoclawd.wire import WireError
from tests.support.fuzz import allowed

FILES = sorted(paths.INTERFACES.glob("*.varlink"))
ALL = """\
interface org.example.All
type Pair (left: int, right: ?Pair)
type Colour (red, green)
method Try(
  b: bool, i: int, f: float, s: string, o: object, e: (one, two), c: Colour, p: Pair,
  a: []string, m: [string]int, aa: [][]int, ma: ?[]Pair
) -> ()
"""
TRY = parse_interface(ALL)
GOOD: dict[str, Any] = {
    "b": True,
    "i": 1,
    "f": 1.5,
    "s": "text",
    "o": {"any": ["thing", None]},
    "e": "one",
    "c": "green",
    "p": {"left": 1, "right": {"left": 2, "right": None}},
    "a": ["x"],
    "m": {"k": 1},
    "aa": [[1], []],
    "ma": None,
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_our_files_name_only_types_that_they_have(path: Path) -> None:
    interface = read_interface(path)

    def names(of: Type) -> set[str]:
        inner = [*(of.fields or {}).values(), *([of.inner] if of.inner else [])]
        return {of.name} - {""} | {name for i in inner for name in names(i)}

    roots = [t for m in interface.methods.values() for t in (m.parameters, m.reply)]
    used = {name for root in [*roots, *interface.types.values()] for name in names(root)}
    assert interface.name == path.stem
    assert used == set(interface.types)


@pytest.mark.parametrize(
    "method", [f"{path.stem}.{name}" for path in FILES for name in read_interface(path).methods]
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_valid_parameters_pass_and_mutated_ones_do_not(method: str, data: st.DataObject) -> None:
    interface_name, _, name = method.rpartition(".")
    interface = read_interface(paths.INTERFACES / f"{interface_name}.varlink")
    expected = interface.methods[name].parameters
    value = data.draw(allowed(interface, expected))

    assert interface.check_parameters(name, value) == value

    with pytest.raises(WireError, match="is not a known field"):
        interface.check_parameters(name, value | {"stranger": 1})
    for field, inner in (expected.fields or {}).items():
        broken = data.draw(st.sampled_from([None, 5, 1.5, "\0", [object()], {"\0": 1}, True]))
        try:
            interface.check_parameters(name, value | {field: broken})
        except WireError as exc:
            assert exc.path.startswith(field)
        else:  # only where its type allows it
            kinds = {bool: "bool", int: "int float", float: "float", type(None): "maybe", dict: "object"}
            kind = idl._inner(inner).kind if inner.kind == "maybe" and broken is not None else inner.kind
            assert kind in kinds[type(broken)].split()


def test_each_kind_of_value_passes() -> None:
    assert TRY.check_parameters("Try", GOOD) == GOOD


@pytest.mark.parametrize(
    ("field", "value", "path"),
    [
        ("b", 1, "b"),
        ("i", True, "i"),
        ("i", 1.0, "i"),
        ("i", 1 << 63, "i"),
        ("f", True, "f"),
        ("f", "1", "f"),
        ("f", 10**400, "f"),
        ("f", float("inf"), "f"),  # how JSON's 1e999 arrives
        ("s", "a\0b", "s"),
        ("s", "\ud800", "s"),
        ("s", ["x"], "s"),
        ("o", [], "o"),
        ("e", "three", "e"),
        ("e", ["one"], "e"),
        ("e", None, "e"),
        ("c", "blue", "c"),
        ("p", {"left": "1", "right": None}, "p.left"),
        ("p", {"left": 1, "right": {"left": 1, "up": 2}}, "p.right.up"),
        ("p", {"left": 1, "right": {"left": None}}, "p.right.left"),
        ("p", [], "p"),
        ("a", "x", "a"),
        ("a", ["x", 1], "a[1]"),
        ("m", {"k": "v"}, "m.k"),
        ("m", [], "m"),
        ("aa", [[1], [None]], "aa[1][0]"),
        ("ma", [{"left": 1}, {}], "ma[1].left"),
        ("a", [5] * 1025, "a"),
        ("m", dict.fromkeys(map(str, range(1025)), "v"), "m"),
    ],
)
def test_wrong_value_is_named_by_its_path(field: str, value: Any, path: str) -> None:
    with pytest.raises(WireError) as caught:
        TRY.check_parameters("Try", GOOD | {field: value})

    assert caught.value.path == path


def test_absent_nullable_fields_become_none_and_others_are_missed() -> None:
    assert TRY.check_parameters("Try", {k: v for k, v in GOOD.items() if k != "ma"})["ma"] is None
    with pytest.raises(WireError, match="s: must be a string, not missing"):
        TRY.check_parameters("Try", {k: v for k, v in GOOD.items() if k != "s"})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "interface a.b\nmethod",
        "interface a.b\nmethod M(",
        "interface a.b\nmethod M( -> ()",
        "interface a.b\nmethod M()",
        "interface a.b\nsomething M ()",
        "interface a.b\ntype T (a: !)",
        "interface a.b\nmethod M(a: ) -> ()",
    ],
)
def test_damaged_interface_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_interface(text)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from([*ALL.split(), "(", ")", ":", "->", "?", "[]", "#", "\n"]), max_size=40))
def test_random_interface_is_parsed_or_refused(words: list[str]) -> None:
    with suppress(ValueError):
        parse_interface(" ".join(words))
