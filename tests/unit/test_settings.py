"""nanoclaw.toml: what it may say, and what is said about the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from nanoclawd.errors import ConfigError
from nanoclawd.mounts import AllowedMount
from nanoclawd.settings import SETTINGS, parse_settings, read_settings


def test_missing_file_gives_the_defaults(tmp_path: Path) -> None:
    settings = read_settings(tmp_path / "nanoclaw.toml")

    assert (settings.max_sessions, settings.idle_exit) == (32, 0)
    assert (settings.attempts, settings.retention_days) == (4, 30)
    assert not settings.require_sandbox
    assert settings.mounts == ()
    assert str(settings.routes["anthropic"].endpoint) == "https://api.anthropic.com"
    assert settings.routes["anthropic"].credential == "anthropic"


def test_every_setting_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/claw")

    settings = parse_settings(
        """
        max_sessions = 5
        idle_exit = 60
        attempts = 1
        retention_days = 0
        require_sandbox = true
        [mounts]
        allow = [ {path = "~/src"}, {path = "/srv/data", read_only = false} ]
        [providers.anthropic]
        endpoint = "https://models.example:8443/proxy/"
        credential = "work-key"
        """
    )

    assert (settings.max_sessions, settings.idle_exit) == (5, 60)
    assert (settings.attempts, settings.retention_days) == (1, 0)
    assert settings.require_sandbox
    assert settings.mounts == (
        AllowedMount(path=Path("/home/claw/src"), read_only=True),
        AllowedMount(path=Path("/srv/data"), read_only=False),
    )
    provider = settings.routes["anthropic"]
    assert str(provider.endpoint) == "https://models.example:8443/proxy"
    assert provider.endpoint.authority == "models.example:8443"
    assert provider.credential == "work-key"


def test_route_serves_what_it_names() -> None:
    settings = parse_settings(
        """
        [[routes]]
        name = "github"
        endpoint = "https://api.github.com/repos/"
        credential = "work"
        scheme = "basic"
        methods = ["GET", "POST"]
        headers = ["X-Version"]
        """
    )

    route = settings.routes["github"]
    assert (str(route.endpoint), route.credential) == ("https://api.github.com/repos", "work")
    assert (route.header, route.scheme.value_of(b"u:p")) == ("authorization", b"Basic dTpw")
    assert (route.operations[0].methods, route.headers) == (("GET", "POST"), ("x-version",))
    assert set(settings.routes) == {"anthropic", "github"}


@pytest.mark.parametrize("key", SETTINGS)
def test_the_default_of_each_setting_may_be_written(key: str) -> None:
    table = dict[str, Any]()
    *tables, last = key.split(".")
    inner = table
    for name in tables:
        inner = inner.setdefault(name, {})
    inner[last] = SETTINGS[key][1]

    assert parse_settings(tomli_w.dumps(table)) == parse_settings("")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_session = 3", "t.toml:1: there is no key 'max_session' (did you mean 'max_sessions'?)"),
        ("# x\nmax_sessions = '3'", "t.toml:2: max_sessions must be a whole number: '3'"),
        ("max_sessions = true", "must be a whole number: true"),
        ("max_sessions = 0", "t.toml:1: max_sessions must be from 1 to 256: 0"),
        ("max_sessions = 3.5", "must be a whole number: 3.5"),
        ("attempts = 0", "t.toml:1: attempts must be from 1 to 100: 0"),
        ("attempts = 101", "must be from 1 to 100: 101"),
        ("retention_days = -1", "t.toml:1: retention_days must be from 0 to 36500: -1"),
        ("mounts = 3", "t.toml:1: mounts must be a table: 3"),
        ("[mounts]\nallow = '/srv'", "t.toml:2: mounts.allow must be tables: '/srv'"),
        ("[mounts]\nallow = ['/srv']", "must be tables: ['/srv']"),
        ("[mounts]\nallow = [{path = 'src'}]", "begin with / or ~/"),
        ("[mounts]\nallow = [{path = '/srv/../etc'}]", "no '..'"),
        ("[mounts]\nallow = [{path = '~nobody-here/x'}]", "unknown"),
        ("[mounts]\nallow = [{read_only = true}]", "t.toml:2: mounts.allow: path is missing"),
        ("[[mounts.allow]]\npath = '/a'\n[[mounts.allow]]\npath = 'b'", "t.toml:4: mounts.allow: path must"),
        ("[mounts]\nallow = [{path = '/srv', readonly = true}]", "did you mean 'read_only'?"),
        ("[mounts]\nallow = [{path = '/srv', read_only = 1}]", "read_only must be true or false: 1"),
        ("[mounts]\ndeny = []", "t.toml:2: there is no key 'mounts.deny'"),
        ("[providers.openai]\nendpoint = 'https://x'", "t.toml:1: there is no key 'providers.openai'"),
        ("[providers.anthropic]\nkey = 'sk-1'", "t.toml:2: there is no key 'providers.anthropic.key'"),
        ("[providers.anthropic]\ncredential = '../x'", "t.toml:2: providers.anthropic.credential is not"),
        ("[[routes]]\nname = 'x'", "t.toml:1: routes: endpoint is missing"),
        ("[[routes]]\nname = 'r'\nendpoint = 'https://x'", "t.toml:2: routes: name is taken"),
        ("[[routes]]\nname = 'anthropic'\nendpoint = 'https://x'", "routes: name is taken"),
        ("[[routes]]\nname = 'A'\nendpoint = 'https://x'", "is not a route's name"),
        (
            "[[routes]]\nname = 'x'\nendpoint = 'http://x'",
            "t.toml:3: routes: endpoint must begin with https",
        ),
        (2 * "[[routes]]\nname = 'x'\nendpoint = 'https://x'\n", "t.toml: two routes have the same name"),
        ("[[routes]]\nheader = 'Host'", "t.toml:2: routes: header is a header that only the gateway sets"),
        ("[[routes]]\nheader = 'a b'", "is not a header's name"),
        ("[[routes]]\nheaders = ['TE']", "is a header that only the gateway sets"),
        ("[[routes]]\nscheme = 'digest'", "must be bearer, basic or plain"),
        ("[[routes]]\nmethods = ['TRACE']", "must be a list of GET"),
        ("[[routes]]\ntoken = 'ghp-1'", "t.toml:2: routes: there is no key 'token'"),
        ("max_sessions = ", "t.toml:1: is not TOML"),
        ("[" * 5000, "t.toml:1: is not TOML"),
        ("max_sessions = " + "[" * 5000, "t.toml: is not TOML that can be read"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings(text, "t.toml")

    assert message in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    "url",
    [
        "https://api.anthropic.com",
        "https://[2001:db8::1]:8443",
        "https://10.0.0.1/v",
        "https://xn--bcher-kva.example",
        "http://127.0.0.1:8080",
        "http://127.9.9.9",
        "http://[::1]:80",
        "http://localhost:1",
    ],
)
def test_endpoint_passes(url: str) -> None:
    parse_settings(f"[providers.anthropic]\nendpoint = '{url}'")


@pytest.mark.parametrize(
    "url",
    [
        "http://api.anthropic.com",
        "http://10.0.0.1",
        "http://[fe80::1]",
        "http://localhost.evil.example",
        "http://127.0.0.1.evil.example",
        "http://2130706433",
        "http://0.0.0.0",
        "ftp://127.0.0.1",
        "https://",
        "https://user:pw@host",
        "https://host?x",
        "https://host#x",
        "https://host/../x",
        "https://host/%2e",
        "https://host:0",
        "https://host:99999",
        "https://ho st",
        "https://host\\@evil",
        "api.anthropic.com",
        "",
        "https://[fe80::1%eth0]",
        "https://höst",
        "https://host/a//b",
    ],
)
def test_endpoint_is_refused(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings(f'[providers.anthropic]\nendpoint = "{url}"'.replace("\\", "\\\\"))

    assert "providers.anthropic.endpoint " in caught.value.message
    assert "pw" not in caught.value.message


@given(st.text(max_size=200))
def test_any_text_is_settings_or_an_error(text: str) -> None:
    try:
        parse_settings(text)
    except ConfigError as exc:
        assert exc.message


def test_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "nanoclaw.toml"
    path.write_bytes(b"max_sessions = 3 # \xff")

    with pytest.raises(ConfigError, match="UTF-8"):
        read_settings(path)
