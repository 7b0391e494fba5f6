"""Files of people: what they say, or ConfigError that names the file, in bounded time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from nanoclawd.agents import KEYS, AgentConfig, parse_agent, read_agent, write_agent
from nanoclawd.errors import ConfigError, NotFound
from nanoclawd.files import CONFIG_BYTES
from nanoclawd.ids import AgentName
from nanoclawd.settings import SETTINGS, parse_settings, read_settings
from tests.support.fuzz import bounded_time, damaged, fuzzed
from tests.unit.test_policy import rules

BERTA = Path("agents/berta.toml")
AGENT = """\
# What she is for
description = "Helps with the garden"
provider = "echo"
model = 'some-model-5'
idle_seconds = 60
memory_max = "2G"   # enough
[[mounts]]
source = "~/garden"
target = "/mnt/garden"
read_only = true
"""
NANOCLAW = """\
max_sessions = 32
attempts = 4
retention_days = 30
idle_exit = 600
[mounts]
allow = [ {path = "~/src", read_only = true} ]
[providers.anthropic]
endpoint = "https://api.anthropic.com"
credential = "anthropic"
"""
PIECES = [
    *(
        "[",
        "]",
        "[[",
        "]]",
        "{",
        "}",
        "=",
        ".",
        ",",
        "#",
        '"',
        "'",
        '"""',
        "'''",
        "\n",
        "\\",
        "\\u0000",
        "\0",
    ),
    *(
        "true",
        "9" * 30,
        "-1",
        "1e999",
        "nan",
        "0x",
        "1979-05-27T07:32:00Z",
        "[mounts]\n",
        "[[mounts]]\n",
        "a.b = 1\n",
    ),
    *(f"{key} = " for key in KEYS),
]
NESTED = st.recursive(
    st.booleans()
    | st.integers(-5, 5)
    | st.text(max_size=10)
    | st.sampled_from(["echo", "~/x", "/mnt/x", "/srv"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYS, "source", "path"]), inner)
    ),
    max_leaves=6,
)


def parsed(text: str) -> None:
    """Parse `text` as both kinds of file; anything but ConfigError fails the test."""
    for parse, name in (
        (lambda: parse_agent(text, BERTA), "agents/berta.toml"),
        (lambda: parse_settings(text), "nanoclaw.toml"),
    ):
        try:
            with bounded_time():
                parse()
        except ConfigError as exc:
            assert exc.message.startswith(f"{name}:") and exc.hint
            assert exc.message.isprintable() and len(exc.message) < 500


@fuzzed(150)
@given(damaged(AGENT, PIECES))
def test_damaged_agent_file_is_read_or_refused(text: str) -> None:
    parsed(text)


@fuzzed(150)
@given(damaged(NANOCLAW, PIECES))
def test_damaged_settings_are_read_or_refused(text: str) -> None:
    parsed(text)


@fuzzed(150)
@given(st.dictionaries(st.sampled_from([*KEYS, *SETTINGS, "x"]), NESTED, max_size=4))
def test_values_of_any_shape_are_read_or_refused(table: dict[str, Any]) -> None:
    parsed(tomli_w.dumps(table))


@fuzzed(60)
@given(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=3),
    st.sampled_from(["", AGENT, "description = ["]),
)
def test_as_much_of_anything_as_a_file_may_hold_takes_bounded_time(repeated: list[str], begin: str) -> None:
    piece = "".join(repeated)

    parsed(begin + piece * ((CONFIG_BYTES - len(begin)) // len(piece)))


@pytest.mark.parametrize(
    "text",
    [
        "description" + ".a" * 30_000 + " = 1",
        "description" + '."a"' * 300 + " = 1",
        "description = " + "[" * 30_000,
        "mounts = " + "{a." + "a." * 25 + "a = " * 150 + "1" + "}" * 150,
        "[mounts." + "a." * 3_000 + "a]",
        "idle_seconds = " + "9" * 5_000,
        "a" * 60_000 + " = 1",
        '"' * 60_000,
    ],
    ids=["dotted", "quoted", "arrays", "tables", "head", "number", "name", "quotes"],
)
def test_what_is_hard_to_read_is_refused_in_bounded_time(text: str) -> None:
    parsed(text)


@fuzzed(150)
@given(st.binary(max_size=40), st.integers(0, len(AGENT)))
def test_bytes_of_any_kind_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, at: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "berta.toml"
    path.write_bytes(AGENT[:at].encode() + data + AGENT[at:].encode())

    for read in (read_agent, read_settings):
        try:
            read(path)
        except ConfigError as exc:
            assert exc.message.startswith(f"{path}:")


LINES = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=30).filter(str.isprintable)
CONFIGS = st.builds(
    AgentConfig,
    name=st.just(AgentName("berta")),
    description=LINES,
    provider=st.sampled_from(["echo", "anthropic", "my_own-1"]),
    model=st.sampled_from(["", "some/model:5@x"]),
    idle_seconds=st.integers(0, 7 * 86_400),
    memory_max=st.sampled_from(["512M", "100%", "infinity"]),
    tasks_max=st.integers(16, 65_536),
    cpu_quota=st.sampled_from(["", "150%"]),
    policy=st.lists(rules(), max_size=3).map(tuple),
)


@fuzzed(60)
@given(CONFIGS)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, config: AgentConfig) -> None:
    path = tmp_path_factory.getbasetemp() / "written" / "berta.toml"
    try:
        read_agent(path)
        path.unlink()
    except NotFound:
        pass

    write_agent(path, config)

    assert read_agent(path) == config
