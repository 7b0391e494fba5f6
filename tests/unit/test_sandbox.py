"""What becomes of a line of a unit's sandbox that does not hold."""

from __future__ import annotations

import pytest

from nanoclawd.errors import ConfigError
from nanoclawd.sandbox import Try, require, run_checks


def refuse() -> tuple[bool, str]:
    raise PermissionError(13, "Permission denied")


TABLE: dict[str, Try] = {
    "good": lambda: (True, "refused"),
    "bad": lambda: (False, "it was made"),
    "unclear": refuse,
}


def test_what_does_not_hold_or_cannot_be_tried_is_not_active() -> None:
    checks = run_checks(TABLE)

    assert {check.name: check.active for check in checks} == {"good": True, "bad": False, "unclear": False}


def test_a_required_sandbox_must_hold_as_a_whole() -> None:
    require(run_checks({"good": TABLE["good"]}))

    with pytest.raises(ConfigError, match="not active: bad, unclear") as refused:
        require(run_checks(TABLE))

    assert "require_sandbox" in refused.value.hint
