"""The table [matrix] of a channel's file."""

from __future__ import annotations

import pytest

from nanoclaw_matrix.settings import Devices, Names, SettingsError, parse_settings

GOOD = 'kind = "matrix"\n[matrix]\nhomeserver = "https://m.example.org/"\nuser = "@claw:example.org"\n'


def test_what_is_not_said_has_a_default() -> None:
    settings = parse_settings(GOOD, "x.toml")

    assert settings.homeserver == "https://m.example.org"
    assert (settings.devices, settings.names, settings.token) == (Devices.ALL, Names.AUTO, False)
    assert settings.verifiers == frozenset()


def test_what_is_said_counts() -> None:
    more = 'login = "token"\nverifiers = ["@ada:x"]\ntrusted = ["AB CD"]\n'
    more += 'devices = "verified"\nmax_file_mib = 1\n'
    settings = parse_settings(GOOD + more, "x.toml")

    assert (settings.token, settings.verifiers, settings.trusted) == (True, {"@ada:x"}, {"ABCD"})
    assert (settings.devices, settings.max_file_bytes) == (Devices.VERIFIED, 1 << 20)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "there is no table [matrix]"),
        ("x =", "x.toml: "),
        (GOOD.replace("https", "http"), "homeserver= must begin with https://"),
        (GOOD.replace("https://m.example.org/", "example.org"), "homeserver= must be a URL"),
        (GOOD.replace("@claw:example.org", ""), "user= must not be empty"),
        (GOOD + "devices = 3\n", "devices= must be a line of text"),
        (GOOD + 'devices = "some"\n', "devices= must be one of all, verified"),
        (GOOD + 'verifiers = "@ada:x"\n', "verifiers= must be a list of texts"),
        (GOOD + 'avatar = "https://x"\n', "avatar= must begin with mxc://"),
        (GOOD + "max_file_mib = true\n", "max_file_mib= must be a whole number"),
        (GOOD + "colour = 3\n", "colour= is no setting of this adapter"),
    ],
)
def test_what_is_wrong_is_named(text: str, said: str) -> None:
    with pytest.raises(SettingsError, match=r"x\.toml") as raised:
        parse_settings(text, "x.toml")
    assert said in str(raised.value)
