"""nanoclawctl policy: what becomes of what is typed."""

from __future__ import annotations

import json

import pytest

from nanoclawd.policy import Rule
from tests.unit.cli.conftest import Run
from tests.unit.cli.double import RouterDouble


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["pypi.org"], Rule(host="pypi.org")),
        (["PyPI.org:8443"], Rule(host="pypi.org", port=8443)),
        (["*.example.com"], Rule(host="*.example.com")),
        (["https://pypi.org/"], Rule(host="pypi.org")),
        (["[::1]:80", "--address", "::1"], Rule(host="::1", port=80, addresses=("::1",))),
        (
            ["http://nas.lan/pub", "--method", "GET"],
            Rule(host="nas.lan", port=80, path="/pub", methods=("GET",)),
        ),
        (["http://*.nas.lan:81/x"], Rule(host="*.nas.lan", port=81, path="/x")),
        (["http://nas.lan:81"], Rule(host="nas.lan", port=81)),
        (["/r/github"], Rule(route="github")),
        (
            ["/r/github/repos/", "--method", "GET", "--method", "POST"],
            Rule(route="github", path="/repos/", methods=("GET", "POST")),
        ),
        (
            ["pypi.org", "--max-up", "10K", "--max-down", "2G", "--per-minute", "3", "--time-limit", "4"],
            Rule(
                host="pypi.org",
                max_up_bytes=10 << 10,
                max_down_bytes=2 << 30,
                per_minute=3,
                timeout_seconds=4,
            ),
        ),
    ],
)
def test_allow_makes_a_rule(router: RouterDouble, run: Run, arguments: list[str], rule: Rule) -> None:
    done = run("policy", "allow", "berta", *arguments)

    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"Rule 1 of 'berta': {rule}.\n"
    assert router.rules == (rule,)


def test_deny_comes_first_and_test_says_so(router: RouterDouble, run: Run) -> None:
    run("policy", "allow", "berta", "*.example.com")
    assert run("policy", "test", "berta", "https://bad.example.com/x").returncode == 0

    run("policy", "deny", "berta", "bad.example.com")
    done = run("policy", "test", "berta", "https://bad.example.com/x")

    assert done.returncode == 5
    assert "rule 1" in done.stdout and "denies" in done.stdout
    assert [rule.deny for rule in router.rules] == [True, False]


def test_show_lists_the_rules_in_order(router: RouterDouble, run: Run) -> None:
    router.rules = (Rule(host="a.example", deny=True), Rule(route="github", methods=("GET",), path="/repos"))

    lines = run("policy", "show", "berta").stdout.splitlines()

    assert lines[1].split()[:3] == ["1", "deny", "a.example:443"]
    assert lines[2].split()[:5] == ["2", "allow", "/r/github", "GET", "/repos"]
    shown = json.loads(run("policy", "show", "berta", "--json").stdout)["rules"]
    assert [rule["number"] for rule in shown] == [1, 2]


def test_test_as_json(router: RouterDouble, run: Run) -> None:
    done = run("policy", "test", "berta", "http://a.example/", "--method", "POST", "--json")

    assert done.returncode == 5
    assert json.loads(done.stdout)["reason"] == "no-rule"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["allow", "berta"], 2),
        (["allow", "berta", "user@pypi.org"], 2),
        (["allow", "berta", "pypi.org."], 2),
        (["allow", "berta", "ftp://pypi.org"], 2),
        (["allow", "berta", "a*.example.com"], 2),
        (["allow", "berta", "*"], 2),
        (["allow", "berta", "http://nas.lan/x?y=z"], 2),
        (["allow", "berta", "pypi.org", "--method", "get"], 2),
        (["allow", "berta", "pypi.org", "--max-up", "lots"], 2),
        (["allow", "berta", "pypi.org/simple"], 5),  # a rule that no tunnel could be decided by
        (["allow", "berta", "https://pypi.org/simple"], 5),
        (["deny", "berta", "pypi.org", "--method", "POST"], 5),
        (["test", "berta", "https://pypi.org", "--method", "GET", "--method", "PUT"], 2),
    ],
)
def test_target_that_cannot_be_meant_is_refused(
    router: RouterDouble, run: Run, arguments: list[str], code: int
) -> None:
    done = run("policy", *arguments)

    assert (done.returncode, done.stdout, router.rules) == (code, "", ())
    assert "hint: " in done.stderr
