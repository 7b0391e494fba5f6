"""Names: what may be one."""

from __future__ import annotations

import pytest

from nanoclawd.errors import Refused
from nanoclawd.ids import RESERVED, parse_agent_name, parse_session_name


@pytest.mark.parametrize("name", ["a", "andy", "a_1", "a" * 32])
def test_good_name_is_taken(name: str) -> None:
    assert parse_agent_name(name) == name


@pytest.mark.parametrize("name", ["", "A", "1a", "a-b", "a.b", "ä", "a" * 33, "a\n", "a/b", *RESERVED])
def test_bad_name_is_refused(name: str) -> None:
    with pytest.raises(Refused):
        parse_agent_name(name)


@pytest.mark.parametrize("name", ["", "a-b", "../x", "a" * 49, "a\n"])
def test_bad_session_name_is_refused(name: str) -> None:
    with pytest.raises(Refused):
        parse_session_name(name)
