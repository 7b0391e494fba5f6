"""Interfaces and the parameters of their methods: what passes is what the contract says, nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoclawd import limits, paths
from nanoclawd.idl import Interface, parse_interface, read_interface
from nanoclawd.wire import WireError
from tests.support.fuzz import VALUES, allowed, bounded_time, damaged, fuzzed, mutated

INTERFACES = {path.stem: read_interface(path) for path in sorted(paths.INTERFACES.glob("*.varlink"))}
METHODS = [(interface, method) for interface in INTERFACES for method in INTERFACES[interface].methods]
PARTS = [
    "(",
    ")",
    ":",
    ",",
    "->",
    "?",
    "[]",
    "[string]",
    "method ",
    "type ",
    "error ",
    "#",
    "\n",
    "string",
    "int",
]


def leaves(value: Any) -> list[Any]:
    match value:
        case dict():
            return [leaf for inner in value.values() for leaf in leaves(inner)]
        case list():
            assert len(value) <= limits.JSON_ITEMS
            return [leaf for inner in value for leaf in leaves(inner)]
    return [value]


def check(interface: Interface, method: str, value: Any) -> Any:
    """Return the checked parameters, or None after a WireError; anything else fails the test."""
    try:
        with bounded_time():
            return interface.check_parameters(method, value)
    except WireError as exc:
        assert len(exc.path) < 500
        return None


@pytest.mark.parametrize(("name", "method"), METHODS)
@fuzzed(25)
@given(data=st.data())
def test_parameters_pass_as_the_contract_says_or_not_at_all(
    name: str, method: str, data: st.DataObject
) -> None:
    interface = INTERFACES[name]
    right = allowed(interface, interface.methods[method].parameters)
    value = data.draw(mutated(right) | VALUES)

    checked = check(interface, method, value)

    if checked is not None:
        assert set(checked) == set(interface.methods[method].parameters.fields or {})
        assert interface.check_parameters(method, checked) == checked
        for leaf in leaves(checked):
            assert not (isinstance(leaf, str) and ("\0" in leaf or leaf.encode() is None))
            assert not isinstance(leaf, float) or math.isfinite(leaf)
            assert not isinstance(leaf, int) or -(1 << 63) <= leaf < 1 << 63


@pytest.mark.parametrize("name", INTERFACES)
@fuzzed(40)
@given(data=st.data())
def test_a_damaged_interface_file_is_parsed_or_refused(name: str, data: st.DataObject) -> None:
    text = data.draw(damaged(INTERFACES[name].text, PARTS))

    with bounded_time():
        try:
            interface = parse_interface(text)
        except ValueError as exc:
            assert str(exc)
            return

    assert interface.text == text
    for method in interface.methods.values():
        assert {method.parameters.kind, method.reply.kind} <= {"struct", "enum"}


def test_comments_take_bounded_time() -> None:
    """Where a name is missing, each way to split them up would be tried."""
    with bounded_time(), pytest.raises(ValueError, match="cannot be read"):
        parse_interface("interface " + "#" * 100_000 + "\n!")
