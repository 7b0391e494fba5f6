"""Policies as a person asks for them: what gets into the agent's file, and what would be decided."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import cast

import pytest

from nanoclawd import agents, paths
from nanoclawd.errors import ConfigError, NanoclawError, NotFound, Refused
from nanoclawd.gateway_link import GatewayLink
from nanoclawd.idl import read_interface
from nanoclawd.policy import Rule, to_json
from nanoclawd.policy_control import PolicyControl
from nanoclawd.registry import Registry
from nanoclawd.server import Call
from nanoclawd.settings import parse_settings
from nanoclawd.wire import Json
from tests.unit.router.test_gateway_link import NoUsage, take_over
from tests.unit.test_registry import BERTA, Host, host, with_registry

assert host  # a fixture
WRITTEN = """# mine
provider = "echo"  # for now

[[policy]]
host = "pypi.org" # packages

[[policy]]
host = "*.example.com"
"""
INTERFACE = read_interface(paths.INTERFACES / "io.nanoclaw.Control.varlink")


class Person:
    """Calls the methods, each call and answer checked against the interface."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._methods = PolicyControl(
            registry=registry,
            policy_of=registry.policy,
            changed=GatewayLink(registry.policy, take_over, NoUsage()).refresh,
        ).methods

    async def call(self, name: str, /, **parameters: object) -> Json:
        given = INTERFACE.check_parameters(name, {"name": "berta", **parameters})
        reply = await self._methods[name].handler(cast(Call, SimpleNamespace(parameters=given)))
        return INTERFACE.check_reply(name, reply)

    async def add(self, rule: Rule) -> None:
        await self.call("AddRule", rule=to_json(rule))

    async def test(self, url: str, method: str = "GET") -> tuple[bool, int | None, str]:
        reply = await self.call("TestPolicy", url=url, method=method)
        return reply["allowed"], reply["rule"], reply["reason"]


def with_berta(host: Host, work: Callable[[Person], Awaitable[None]], written: str = WRITTEN) -> None:
    (paths.agents() / "berta.toml").write_text(written)

    async def run(registry: Registry) -> None:
        registry.settings = parse_settings(
            '[[routes]]\nname = "github"\nendpoint = "https://api.github.com/repos"\n'
        )
        await registry.load()
        await work(Person(registry))

    with_registry(host, run)


def test_rules_are_added_where_they_count_and_the_rest_of_the_file_stays(host: Host) -> None:
    async def work(person: Person) -> None:
        await person.add(Rule(host="a.example", max_up_bytes=1000))
        await person.add(Rule(host="bad.example.com", deny=True))
        await person.add(Rule(host="pypi.org", per_minute=7))
        assert person.registry.policy(BERTA).rules == (
            Rule(host="bad.example.com", deny=True),
            Rule(host="pypi.org", per_minute=7),
            Rule(host="*.example.com"),
            Rule(host="a.example", max_up_bytes=1000),
            Rule(route="echo"),
        )

    with_berta(host, work)

    text = (paths.agents() / "berta.toml").read_text()
    assert text.startswith('# mine\nprovider = "echo"  # for now\n')
    assert agents.parse_agent(text, paths.agents() / "berta.toml").policy[1].per_minute == 7


def test_comments_of_rules_stay(host: Host) -> None:
    async def work(person: Person) -> None:
        await person.add(Rule(host="a.example"))

    with_berta(host, work)

    assert (paths.agents() / "berta.toml").read_text() == WRITTEN + '\n[[policy]]\nhost = "a.example"\n'


COMMENTED = """# mine
provider = "echo"

# all that packages need
[[policy]]
host = "pypi.org" # packages
methods = [ "GET" ] # no more
port = 80
per_minute = 7 # they are few
max_up_bytes = 9 # and small

# pictures
[[policy]]
host = "*.example.com"
"""


def test_comments_of_a_rule_go_where_it_goes(host: Host) -> None:
    async def work(person: Person) -> None:
        await person.add(Rule(host="bad.example.com", deny=True))
        await person.add(Rule(host="pypi.org", port=80, methods=("GET",), per_minute=8))

    with_berta(host, work, COMMENTED)

    denied = '[[policy]]\nhost = "bad.example.com"\ndeny = true\n\n'
    written = COMMENTED.replace("# all that", f"{denied}# all that").replace("= 7 #", "= 8 #")
    written = written.replace("max_up_bytes = 9 # and small\n", "")
    assert (paths.agents() / "berta.toml").read_text() == written


def test_unit_is_left_alone(host: Host) -> None:
    async def work(person: Person) -> None:
        reloads = host.reloads
        await person.add(Rule(host="a.example"))
        assert host.reloads == reloads

    with_berta(host, work)


@pytest.mark.parametrize(
    "rule", [Rule(host="a b"), Rule(), Rule(host="a.example", route="x"), Rule(host="a.example", path="x")]
)
def test_rule_that_is_none_changes_nothing(host: Host, rule: Rule) -> None:
    async def work(person: Person) -> None:
        with pytest.raises(ConfigError):
            await person.add(rule)

    with_berta(host, work)

    assert (paths.agents() / "berta.toml").read_text() == WRITTEN


def test_rule_for_a_broken_file_changes_nothing(host: Host) -> None:
    async def work(person: Person) -> None:
        assert (await person.call("ShowPolicy"))["rules"] == []
        with pytest.raises(ConfigError, match="nonsense"):
            await person.add(Rule(host="a.example"))

    with_berta(host, work, WRITTEN + "nonsense = 1\n")


def test_policy_of_a_file_that_breaks_allows_nothing(host: Host) -> None:
    async def work(person: Person) -> None:
        assert len(person.registry.policy(BERTA).rules) == 3
        (paths.agents() / "berta.toml").write_text("[[policy]]\nhost = 7\n")
        await person.registry.load()
        assert person.registry.policy(BERTA).rules == ()
        assert await person.test("https://pypi.org") == (False, None, "no-rule")
        reply = await person.call("TestPolicy", url="https://pypi.org", method="GET")
        assert "cannot be read" in reply["message"] and "berta.toml:2" in reply["message"]

    with_berta(host, work)


def test_test_says_which_rule_decides(host: Host) -> None:
    async def work(person: Person) -> None:
        await person.add(Rule(route="github", path="/ada"))
        assert await person.test("https://pypi.org/simple/") == (True, 1, "allowed")
        assert await person.test("https://www.example.com") == (True, 2, "allowed")
        assert await person.test("https://example.com") == (False, None, "no-rule")
        assert await person.test("http://pypi.org/") == (False, None, "no-rule")
        assert await person.test("/r/github/ada/x") == (True, 3, "allowed")
        assert await person.test("/r/github/ada/x", "POST") == (False, 3, "method")
        reply = await person.call("TestPolicy", url="/r/github/ada/x", method="POST")
        assert "rule 3" in reply["message"] and "forwards only GET, HEAD" in reply["message"]
        assert await person.test("/r/github/eve/x") == (False, None, "no-rule")

    with_berta(host, work)


@pytest.mark.parametrize(
    ("url", "error"),
    [("https://user@pypi.org/", Refused), ("pypi.org", Refused), ("/r/echo/", NotFound)],
)
def test_url_that_is_none_is_an_error(host: Host, url: str, error: type[NanoclawError]) -> None:
    async def work(person: Person) -> None:
        with pytest.raises(error):
            await person.test(url)

    with_berta(host, work)
