"""agents/NAME.toml: what is read, what is refused and how, what a change leaves alone."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanoclawd import agents, limits
from nanoclawd.agents import (
    AgentConfig,
    Mount,
    change_agent,
    parse_agent,
    read_agent,
    read_agents,
    write_agent,
)
from nanoclawd.budget import Budget
from nanoclawd.errors import ConfigError, NotFound, Refused
from nanoclawd.ids import AgentName
from nanoclawd.privileges import Privileges, Say

BERTA = AgentName("berta")
FULL = AgentConfig(
    name=BERTA,
    description="Helps with the garden",
    provider="echo",
    model="some-model-5",
    image="localhost/berta:2",
    idle_seconds=5,
    memory_max="512M",
    tasks_max=64,
    cpu_quota="150%",
    mounts=(
        Mount(source="~/garden", target="/mnt/garden", read_only=False),
        Mount(source="/srv/a", target="/mnt/a"),
    ),
    budget=Budget(tokens_per_day=1000, money_per_session=1_500_000),
    guard=Privileges(create_agent=Say.DENY, approvals=2),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "berta.toml"


def test_empty_file_is_an_agent_with_defaults(path: Path) -> None:
    path.write_text("")

    assert read_agent(path) == AgentConfig(name=BERTA)


def test_what_was_written_is_read(path: Path) -> None:
    write_agent(path, FULL)

    assert read_agent(path) == FULL
    assert path.stat().st_mode & 0o777 == 0o600


def test_missing_file_is_not_found(path: Path) -> None:
    with pytest.raises(NotFound, match=r"berta\.toml"):
        read_agent(path)


@pytest.mark.parametrize(
    ("text", "line", "says", "hint"),
    [
        ('\n\nmemory_max = "12 GB"\n', 3, "memory_max is not a size: '12 GB'", "512M"),
        ("idle_secs = 3\n", 1, "there is no key 'idle_secs'", "did you mean 'idle_seconds'?"),
        ("# x\nidle_seconds = true", 2, "idle_seconds must be a whole number: true", "without quotes"),
        ('idle_seconds = "5"', 1, "idle_seconds must be a whole number: '5'", "without quotes"),
        ("idle_seconds = -1", 1, "idle_seconds must be from 0 to", ""),
        ("tasks_max = 1", 1, "tasks_max must be from 16 to", ""),
        ("model = 5", 1, "model must be a string: 5", "quotes"),
        ('provider = "Echo"', 1, "provider is not a provider's name", "anthropic"),
        ('image = "x; rm -rf"', 1, "image is not an image's name", "localhost/nanoclaw-agent"),
        ('image = "agent.build"', 1, "image is not an image's name", ""),
        ('image = "--privileged"', 1, "image is not an image's name", ""),
        ('runtime = "runc"', 1, "runtime is no runtime", "krun"),
        ('cpu_quota = "much"', 1, "cpu_quota is not a percentage", "150%"),
        ('description = "a\\nb"', 1, "description has a line break", "one line"),
        ("mounts = 3", 1, "mounts must be tables", "[[mounts]]"),
        ('[[mounts]]\nsource = "/a"\n', 1, "mounts: target is missing", "add target"),
        (
            '[[mounts]]\nsource="/a"\ntarget="/mnt/a"\n[[mounts]]\nsource="/b"\ntarget=7',
            6,
            "target must be",
            "",
        ),
        ('[[mounts]]\nsource="/a"\ntarget="/mnt/a"\nreadonly=true', 4, "no key 'readonly'", "'read_only'"),
        (
            '[[mounts]]\nsource="/a"\ntarget="/mnt/a"\nread_only="yes"',
            4,
            "read_only must be true or false",
            "",
        ),
        ("[gateway]\nx = 1", 1, "there is no key 'gateway'", "the keys are"),
        ('ok = "\n', 1, "Illegal character", "TOML"),
        ("a = 1\nb\n", 2, "Expected '='", "TOML"),
        ("a = 1\nb = [", 2, "Invalid value", "TOML"),
    ],
)
def test_errors_name_file_line_key_and_a_way_out(
    path: Path, text: str, line: int, says: str, hint: str
) -> None:
    path.write_text(text)

    with pytest.raises(ConfigError) as caught:
        read_agent(path)

    assert caught.value.message.startswith(f"{path}:{line}: ")
    assert says in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("name", ["Berta", "a-b", "1a", "", "a" * 33, "ä"])
def test_file_names_that_are_no_agents_names_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.toml"
    path.write_text("")

    with pytest.raises(ConfigError, match="not a name for an agent"):
        read_agent(path)


def test_hostile_files_are_refused(path: Path) -> None:
    def refusal() -> str:
        with pytest.raises(ConfigError) as caught:
            read_agent(path)
        assert str(path) in caught.value.message
        path.rmdir() if path.is_dir() else path.unlink()
        return caught.value.message

    path.write_text("# " + "x" * 70_000)
    assert "larger than 64 KiB" in refusal()
    path.write_bytes(b'a = 1\ndescription = "\xff"\n')
    assert ":2: is not UTF-8" in refusal()
    path.mkdir()
    assert "not a regular file" in refusal()
    path.symlink_to(path)
    assert "cannot be read: Too many levels of symbolic links" in refusal()
    os.mkfifo(path)
    assert "not a regular file" in refusal()
    path.write_text("a = " + "[" * 10_000)
    assert str(path) in refusal()
    path.write_text("idle_seconds = " + "9" * 10_000)
    assert str(path) in refusal()
    path.write_text("idle_seconds = 0x" + "f" * 10_000)
    assert "a number of more than 64 bits" in refusal()


def test_one_broken_agent_harms_no_other(tmp_path: Path) -> None:
    (tmp_path / "good.toml").write_text('provider = "echo"')
    (tmp_path / "bad.toml").write_text("provider = 3")
    (tmp_path / "gone.toml").symlink_to(tmp_path / "nowhere")
    (tmp_path / "Draft-2.toml").write_text("not even toml")
    (tmp_path / "good.toml~").write_text("not even toml")

    found, misnamed = read_agents(tmp_path)

    assert list(found) == ["bad", "gone", "good"]
    assert found[AgentName("good")] == AgentConfig(name=AgentName("good"), provider="echo")
    assert isinstance(found[AgentName("bad")], ConfigError)
    assert isinstance(found[AgentName("gone")], ConfigError)
    assert ["Draft-2.toml" in str(problem) for problem in misnamed] == [True]


def test_instructions_stand_beside_the_file(path: Path) -> None:
    assert agents.read_instructions(path) == ""

    agents.write_instructions(path, "Be kind.\n")

    assert (path.parent / "berta.md").read_text() == "Be kind.\n"
    assert agents.read_instructions(path) == "Be kind.\n"
    with pytest.raises(Refused):
        agents.write_instructions(path, "x" * (limits.INSTRUCTIONS_BYTES + 1))
    with pytest.raises(Refused):
        agents.write_instructions(path, "\ud800")


COMMENTED = """\
# My gardener.
model = "old"  # the cheap one; see "prices" # 2
idle_seconds=60
description = 'with a # in it'   # and one after it

# What it sees:
[[mounts]]
source = "/srv/a"  # a
target = "/mnt/a"
"""


def test_a_change_keeps_comments_and_order(path: Path) -> None:
    path.write_text(COMMENTED)

    config = change_agent(path, {"model": "new", "description": "other", "memory_max": "2G"})

    assert (config.model, config.description, config.memory_max, config.idle_seconds) == (
        "new",
        "other",
        "2G",
        60,
    )
    assert path.read_text() == COMMENTED.replace('model = "old"', 'model = "new"').replace(
        "'with a # in it'", '"other"'
    ).replace("after it\n", 'after it\nmemory_max = "2G"\n')


def test_a_change_of_mounts_keeps_the_rest(path: Path) -> None:
    path.write_text(COMMENTED)
    mounts = (Mount(source="/b", target="/mnt/b"), Mount(source="/c", target="/mnt/c", read_only=False))

    assert change_agent(path, {"mounts": mounts}).mounts == mounts

    assert path.read_text().startswith(COMMENTED[: COMMENTED.index("[[mounts]]")])
    assert change_agent(path, {"mounts": ()}).mounts == ()


@pytest.mark.parametrize(
    "text",
    [
        'mounts = [\n  { source = "/a", target = "/mnt/a" }, # one\n]\nmodel = "m" # keep\n',
        'model = """\nold"""\n[[mounts]]\nsource="/a"\ntarget="/mnt/a"\n',
        '"model" = "old"',
        "\n\n# nothing but this",
        '[[mounts]]\nsource="/a"\ntarget="/mnt/a"',
        'description = """[[mounts]]"""\r\nmodel = "x"\r\n',
    ],
)
def test_a_change_is_right_in_any_spelling(path: Path, text: str) -> None:
    path.write_text(text, newline="")
    mounts = (Mount(source="/b", target="/mnt/b"),)
    try:
        before = read_agent(path)
    except ConfigError:
        before = None

    if before is None:  # a change must not hide what was wrong
        with pytest.raises(ConfigError):
            change_agent(path, {"model": "new"})
        return
    config = change_agent(path, {"model": "new", "mounts": mounts, "idle_seconds": 7})

    assert (config.model, config.mounts, config.idle_seconds) == ("new", mounts, 7)
    assert config.description == before.description
    assert ("# keep" in path.read_text()) == ("# keep" in text)


def test_a_change_that_is_wrong_leaves_the_file(path: Path) -> None:
    path.write_text(COMMENTED)

    for changes in ({"memory_max": "lots"}, {"idle_seconds": -1}, {"nonsense": "x"}):
        with pytest.raises(ConfigError):
            change_agent(path, changes)

    assert path.read_text() == COMMENTED
    assert [entry.name for entry in path.parent.iterdir()] == ["berta.toml"]


def test_a_symlink_of_a_dotfile_manager_stays(path: Path, tmp_path: Path) -> None:
    real = tmp_path / "dotfiles"
    real.write_text('model = "old"')
    path.symlink_to(real)

    change_agent(path, {"model": "new"})

    assert path.is_symlink()
    assert tomllib.loads(real.read_text()) == {"model": "new"}


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # it writes durably
@given(
    st.dictionaries(
        st.sampled_from(sorted(agents.KEYS)), st.text() | st.integers() | st.booleans() | st.none()
    )
)
def test_any_change_is_made_whole_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("agents") / "berta.toml"
    path.write_text(COMMENTED)

    try:
        config = change_agent(path, changes)
    except (ConfigError, Refused):
        assert path.read_text() == COMMENTED
    else:
        assert all(getattr(config, key) == value for key, value in changes.items())
        assert read_agent(path) == config


@given(st.text())
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        parse_agent(text, Path("agents/berta.toml"))
    except ConfigError as exc:
        assert exc.message.startswith("agents/berta.toml:")
