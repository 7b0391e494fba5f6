"""Which rule decides about what, and how a request is understood."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nanoclawd import policy
from nanoclawd.agents import parse_agent
from nanoclawd.asking import Request
from nanoclawd.cli import table
from nanoclawd.errors import ConfigError
from nanoclawd.policy import Ask, Denied, Rule, Rules, Unknown, Way, decide, parse_ask, parse_url, with_rule


def rule(**values: object) -> Rule:
    return policy.make_rule(**values)


def decided(rules: Rules, method: str, target: str) -> tuple[bool, int, str]:
    found = decide(rules, parse_ask(method, target))
    return found.allowed, found.number, found.reason


GET = rule(host="a.example", port=80, methods=("GET",), path="/pub")
RULES: Rules = (
    rule(host="bad.example.com", deny=True),
    rule(host="*.example.com"),
    GET,
    rule(host="a.example", port=80, path="/pub/secret", deny=True),
    rule(host="a.example", port=80, methods=("POST",)),
    rule(route="github", methods=("GET",), path="/repos/"),
    rule(host="2001:db8::1", port=8443),
)


@pytest.mark.parametrize(
    ("method", "target", "expected"),
    [
        ("CONNECT", "www.example.com:443", (True, 2, "allowed")),
        ("CONNECT", "a.b.example.com:443", (True, 2, "allowed")),
        ("CONNECT", "WWW.Example.COM:443", (True, 2, "allowed")),
        ("CONNECT", "bad.example.com:443", (False, 1, "denied")),
        ("CONNECT", "BAD.example.com:443", (False, 1, "denied")),
        ("CONNECT", "example.com:443", (False, 0, "no-rule")),
        ("CONNECT", "badexample.com:443", (False, 0, "no-rule")),
        ("CONNECT", "www.example.com.evil.org:443", (False, 0, "no-rule")),
        ("CONNECT", "www.example.com:80", (False, 0, "no-rule")),
        ("CONNECT", "[2001:DB8:0::1]:8443", (True, 7, "allowed")),
        # Whatever later rules say: within a tunnel anything could be asked for.
        ("CONNECT", "a.example:80", (False, 3, "needs-route")),
        ("GET", "http://a.example/pub", (True, 3, "allowed")),
        ("GET", "http://A.EXAMPLE:80/pub/x?y=%2e", (True, 3, "allowed")),
        ("GET", "http://a.example/pub/secret", (True, 3, "allowed")),  # the first that matches
        ("GET", "http://a.example/public", (False, 0, "no-rule")),
        ("GET", "http://a.example/%70ub/x", (True, 3, "allowed")),
        ("POST", "http://a.example/pub/%73ecret", (False, 4, "denied")),
        ("POST", "http://a.example/pub/x", (True, 5, "allowed")),
        ("DELETE", "http://a.example/pub/x", (False, 0, "no-rule")),
        ("GET", "/r/github/repos/x", (True, 6, "allowed")),
        ("GET", "/r/github/repos", (False, 0, "no-rule")),
        ("POST", "/r/github/repos/x", (False, 0, "no-rule")),
        ("GET", "/r/gitlab/repos/x", (False, 0, "no-rule")),
        ("GET", "http://github/repos/x", (False, 0, "no-rule")),
    ],
)
def test_first_rule_that_matches_decides(method: str, target: str, expected: tuple[bool, int, str]) -> None:
    assert decided(RULES, method, target) == expected


def test_empty_policy_denies() -> None:
    found = decide((), parse_ask("CONNECT", "pypi.org:443"), Unknown.ASK)

    assert (found.allowed, found.reason) == (False, "no-rule")
    assert "empty or unreadable" in found.message


@pytest.mark.parametrize(
    ("method", "target", "reason"),
    [
        ("CONNECT", "c.example:443", "ask"),
        ("GET", "http://c.example/x", "ask"),
        ("CONNECT", "[2606:4700::1]:443", "ask"),
        ("CONNECT", "10.1.2.3:443", "no-rule"),
        ("CONNECT", "[::1]:443", "no-rule"),
        ("GET", "/r/gitlab/x", "no-rule"),
        ("GET", "/anthropic/v1/messages", "no-rule"),
    ],
)
def test_what_a_person_can_be_asked_about(method: str, target: str, reason: str) -> None:
    rules = (Rule(host="a.example"),)

    assert decide(rules, parse_ask(method, target), Unknown.ASK).reason == reason
    assert decide(rules, parse_ask(method, target)).reason == "no-rule"


def test_rule_with_an_end_has_no_say_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = (Rule(host="a.example", until=1000.0), Rule(host="a.example", deny=True))
    ask = parse_ask("CONNECT", "a.example:443")
    monkeypatch.setattr(policy.time, "time", lambda: 998.5)
    assert decide(rules, ask).allowed
    assert "until 1970-01-01 00:16 UTC" in decide(rules, ask).message
    assert rules[0].seconds_left == 1.5

    monkeypatch.setattr(policy.time, "time", lambda: 1000.0)

    assert decide(rules, ask).number == 2
    assert rules[1].seconds_left == 3600


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        # another form
        ("GET", "*", 400),
        ("GET", "a.example", 400),
        ("GET", "//a.example/x", 400),
        ("GET", "ftp://a.example/x", 400),
        ("GET", "https://a.example/x", 400),
        ("GET", "file:///etc/passwd", 400),
        ("CONNECT", "/r/github/x", 400),
        ("CONNECT", "http://a.example:443", 400),
        ("TRACE", "http://a.example/", 405),
        ("get", "http://a.example/", 405),
        ("PROPFIND", "http://a.example/", 405),
        # hosts
        ("CONNECT", "a.example", 400),
        ("CONNECT", "a.example:", 400),
        ("CONNECT", "a.example:0", 400),
        ("CONNECT", "a.example:65536", 400),
        ("CONNECT", "a.example:443:80", 400),
        ("CONNECT", "user@a.example:443", 400),
        ("CONNECT", "a.example.:443", 400),
        ("CONNECT", ".a.example:443", 400),
        ("CONNECT", "a..example:443", 400),
        ("CONNECT", "-a.example:443", 400),
        ("CONNECT", "a_b.example:443", 400),
        ("CONNECT", "127.1:443", 400),
        ("CONNECT", "0x7f000001:443", 400),
        ("CONNECT", "0x7f.1:443", 400),
        ("CONNECT", "2130706433:443", 400),
        ("CONNECT", "0177.0.0.1:443", 400),
        ("CONNECT", "127.0.0.1.:443", 400),
        ("CONNECT", "[::1%25lo]:443", 400),
        ("CONNECT", "[fe80::1%eth0]:443", 400),
        ("CONNECT", "::1:443", 400),
        ("CONNECT", "%61.example:443", 400),
        ("CONNECT", "a.example%00.evil.org:443", 400),
        ("CONNECT", "a" * 64 + ".example:443", 400),
        ("CONNECT", "a." * 127 + "example:443", 400),
        ("GET", "http://user:pw@a.example/", 400),
        ("GET", "http://a.example@evil.org/", 400),
        ("GET", "http://a.example\\@evil.org/", 400),
        ("GET", "http://a.example#@evil.org/", 400),
        ("GET", "http:///x", 400),
        ("GET", "http:a.example/x", 400),
        ("GET", "http://", 400),
        # paths
        ("GET", "http://a.example/x/../y", 400),
        ("GET", "http://a.example/..", 400),
        ("GET", "http://a.example/x/.", 400),
        ("GET", "http://a.example/x/./y", 400),
        ("GET", "http://a.example//x", 400),
        ("GET", "http://a.example/x//", 400),
        ("GET", "http://a.example/x/%2e%2e/y", 400),
        ("GET", "http://a.example/x/.%2E/y", 400),
        ("GET", "http://a.example/x%2fy", 400),
        ("GET", "http://a.example/x%5cy", 400),
        ("GET", "http://a.example/x\\y", 400),
        ("GET", "http://a.example/%252e%252e/", 400),
        ("GET", "http://a.example/%00", 400),
        ("GET", "http://a.example/%0d%0aX:%20y", 400),
        ("GET", "http://a.example/%c0%ae%c0%ae/", 400),
        ("GET", "http://a.example/%ff", 400),
        ("GET", "http://a.example/%", 400),
        ("GET", "http://a.example/%zz", 400),
        ("GET", "http://a.example/x;y", 400),
        ("GET", "http://a.example/x#y", 400),
        ("GET", "http://a.example/x?y#z", 400),
        ("GET", "http://a.example/é", 400),
        ("GET", "/r/github/../anthropic/x", 400),
        ("GET", "/r/../x", 400),
        ("GET", "/r//x", 400),
        ("GET", "/R/github/x", 400),
        ("GET", "http://a.example/" + "x" * 8192, 414),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(method: str, target: str, status: int) -> None:
    with pytest.raises(Denied) as caught:
        parse_ask(method, target)

    assert caught.value.status == status


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://pypi.org/simple/?x#y", ("CONNECT-like", "pypi.org", 443, "")),
        ("https://pypi.org", ("CONNECT-like", "pypi.org", 443, "")),
        ("https://[::1]:8443/x", ("CONNECT-like", "::1", 8443, "")),
        ("http://a.example", ("plain", "a.example", 80, "/")),
        ("/anthropic/v1/messages", ("route", "", 0, "/v1/messages")),
    ],
)
def test_url_is_understood_as_a_tool_would_ask(url: str, expected: tuple[str, str, int, str]) -> None:
    ask = parse_url("GET", url)

    assert ask.way == expected[0].replace("CONNECT-like", "tunnel")
    assert (ask.host, ask.port, ask.path) == expected[1:]


# --- properties -------------------------------------------------------------------------------------

HOSTS = st.sampled_from(["a.example", "b.example", "www.a.example", "127.0.0.1", "::1"])
PATHS = st.lists(st.sampled_from(["pub", "x", "%41", "a.b", "é"]), max_size=3).map(
    lambda p: "/" + "/".join(p)
)


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    narrow = {
        "methods": draw(st.lists(st.sampled_from(policy.METHODS), max_size=2, unique=True).map(tuple)),
        "path": draw(st.sampled_from(["", "/", "/pub", "/pub/", "/x/pub"])),
        "deny": draw(st.booleans()),
    }
    if draw(st.booleans()):
        return Rule(route=draw(st.sampled_from(["github", "anthropic"])), **narrow)
    host = draw(HOSTS | st.just("*.example"))
    return Rule(host=host, port=draw(st.sampled_from([80, 443])), **narrow)


@st.composite
def asks(draw: st.DrawFn) -> Ask:
    host, port = draw(HOSTS), draw(st.sampled_from([80, 443]))
    shown = policy.authority(host, port)
    method = draw(st.sampled_from(policy.METHODS))
    path = "".join(c if ord(c) < 128 else "%C3%A9" for c in draw(PATHS))
    return draw(
        st.sampled_from(
            [
                parse_ask("CONNECT", shown),
                parse_ask(method, f"http://{shown}{path}"),
                parse_ask(method, f"/r/github{path}"),
            ]
        )
    )


@given(st.lists(rules(), max_size=6).map(tuple), asks())
def test_what_is_allowed_is_allowed_by_the_first_match_and_by_all_that_it_says(
    found: Rules, ask: Ask
) -> None:
    decision = decide(found, ask)

    first = next((n for n, each in enumerate(found, 1) if each.matches(ask)), 0)
    assert decision.number == first
    if decision.allowed:
        assert decision.rule is found[first - 1]
        allowing = decision.rule
        assert not allowing.deny
        assert allowing.route == ask.route
        assert not (ask.way is Way.TUNNEL and allowing.is_narrow)
        if not ask.route:
            assert ask.port == allowing.port
            assert ask.host == allowing.host or ask.host.endswith(allowing.host.removeprefix("*"))
        assert not allowing.methods or ask.method in allowing.methods
        assert ask.path.startswith(allowing.path)


@given(st.lists(rules(), max_size=6).map(tuple), rules(), asks())
def test_new_rule_has_the_say_that_was_meant(found: Rules, new: Rule, ask: Ask) -> None:
    after = with_rule(found, new)

    assert sum(each.match == new.match for each in after) == 1 or len({each.match for each in found}) < len(
        found
    )
    if new.deny and new not in found and new.matches(ask) and not any(old.deny for old in found):
        assert not decide(after, ask).allowed
    if decide(found, ask).allowed and not new.deny:
        assert decide(after, ask).allowed  # one that allows takes nothing away


@given(st.sampled_from(["GET", "POST", "CONNECT"]), st.text(max_size=60) | st.binary(max_size=60).map(str))
def test_no_text_is_understood_as_more_than_it_says(method: str, text: str) -> None:
    for target in (text, f"http://{text}", f"http://a.example/{text}", f"/r/github/{text}", f"{text}:443"):
        try:
            ask = parse_ask(method, target)
        except Denied:
            continue
        assert not {"..", "."} & {*ask.path.split("/")}
        assert "//" not in ask.path and "\\" not in ask.path and "\0" not in ask.path
        assert target.isascii() and target.isprintable() and " " not in target
        assert ask.target == "" or target.endswith(ask.target) or ask.target.startswith("/")
        if target.startswith("http://a.example/"):
            assert (ask.host, ask.port) == ("a.example", 80)


# --- files ------------------------------------------------------------------------------------------


@given(st.lists(rules(), max_size=6).map(tuple), asks(), asks(), st.booleans())
def test_answer_decides_only_what_no_rule_had_decided(
    found: Rules, asked: Ask, other: Ask, deny: bool
) -> None:
    assume(decide(found, asked, Unknown.ASK).reason == "ask")
    shown = {name: getattr(asked, name) for name in ("way", "method", "host", "port", "path", "target")}
    rule = Request(agent="berta", session="s1", **shown).rule(deny=deny)

    after = with_rule(found, rule, last=True)

    before, now = decide(found, other), decide(after, other)
    if before.number:
        assert (now.number, now.allowed, now.reason) == (before.number, before.allowed, before.reason)
    elif now.allowed:
        assert (other.host, other.port) == (asked.host, asked.port) and not deny
        if asked.way is Way.PLAIN:
            assert other.method == asked.method and other.path.startswith(asked.path)
    assert decide(after, asked).reason == ("denied" if deny else "allowed")


def parsed(text: str) -> Rules:
    return parse_agent(text, Path("berta.toml")).policy


def test_policy_of_a_file() -> None:
    text = """
[[policy]]
host = "PyPI.org"

[[policy]]
host = "*.nas.lan"
port = 80
methods = ["GET", "HEAD"]
path = "/pub"
addresses = ["192.168.1.0/24", "fd00::1"]
max_up_bytes = 1_000
max_down_bytes = 2_000
per_minute = 3
timeout_seconds = 4

[[policy]]
route = "github"
deny = true
"""
    assert parsed(text) == (
        Rule(host="pypi.org"),
        Rule(
            host="*.nas.lan",
            port=80,
            methods=("GET", "HEAD"),
            path="/pub",
            addresses=("192.168.1.0/24", "fd00::1/128"),
            max_up_bytes=1000,
            max_down_bytes=2000,
            per_minute=3,
            timeout_seconds=4,
        ),
        Rule(route="github", deny=True),
    )


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("", "must name a host or a route"),
        ('host = "a.example"\nroute = "x"', "must name a host or a route"),
        ('route = "x"\nport = 80', "has a route"),
        ('host = "https://a.example"', "is not a host"),
        ('host = "a.example:443"', "is not a host"),
        ('host = "*"', "is not a host"),
        ('host = "*.127.0.0.1"', "is not a host"),
        ('host = "a.*.example"', "is not a host"),
        ('host = "127.1"', "is not a host"),
        ('host = "a.example."', "is not a host"),
        ('host = "a.example"\nport = 0', "must be from 1"),
        ('host = "a.example"\nmethods = []', "must be a list of"),
        ('host = "a.example"\nmethods = ["CONNECT"]', "must be a list of"),
        ('host = "a.example"\nmethods = "GET"', "must be a list of"),
        ('host = "a.example"\npath = "x"', "must begin with /"),
        ('host = "a.example"\npath = "/x/../y"', "must be a plain path"),
        ('host = "a.example"\npath = "/%78"', "must be a plain path"),
        ('host = "a.example"\naddresses = ["192.168.1.1/24"]', "must be a list of addresses"),
        ('host = "a.example"\naddresses = ["lan"]', "must be a list of addresses"),
        ('host = "a.example"\ndeny = "no"', "must be true or false"),
        ('host = "a.example"\nallow = true', "no key 'allow'"),
        ('route = "A"', "is not a route's name"),
    ],
)
def test_rule_that_is_wrong_is_an_error_with_its_line(row: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(f'model = "x"\n[[policy]]\nhost = "fine.example"\n[[policy]]\n{row}\n')

    assert complaint in caught.value.message
    assert int(caught.value.message.split(":")[1]) >= 4


@given(rules())
def test_rule_passes_the_interfaces_as_it_is(given_rule: Rule) -> None:
    assert policy.from_json(policy.to_json(given_rule)) == given_rule


def test_command_line_knows_the_methods_that_rules_know() -> None:
    assert table.METHODS == policy.METHODS
