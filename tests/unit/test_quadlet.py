"""What the unit of an agent says, and when it has to be written anew."""

from __future__ import annotations

import asyncio
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from nanoclawd import paths, quadlet, quadlet_check
from nanoclawd.agents import AgentConfig
from nanoclawd.errors import ConfigError, NanoclawError, Refused
from nanoclawd.ids import AgentName
from nanoclawd.mounts import BindMount
from nanoclawd.quadlet import UnitSpec, container_uid, quote_argument, render, selinux_level
from nanoclawd.version import VERSION

BERTA = UnitSpec(config=AgentConfig(name=AgentName("berta")), index=3)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path


@pytest.fixture
def no_check(monkeypatch: pytest.MonkeyPatch) -> dict[AgentName, NanoclawError]:
    """Return the problems that the check will find; the real programs are in tests/e2e/test_quadlet.py."""
    problems: dict[AgentName, NanoclawError] = {}

    async def check_units(texts: dict[AgentName, str]) -> dict[AgentName, NanoclawError]:
        return {agent: problem for agent, problem in problems.items() if agent in texts}

    monkeypatch.setattr(quadlet_check, "check_units", check_units)
    return problems


def install(*specs: UnitSpec) -> dict[AgentName, NanoclawError | None]:
    return asyncio.run(quadlet.install_units(specs))


def test_no_agent_has_the_persons_uid_or_anothers() -> None:
    for person in (1000, 2000, 2005, 3000, 1_000_000):
        uids = [container_uid(index, person) for index in range(2000)]

        assert person not in uids
        assert len(set(uids)) == 2000
        assert min(uids) >= 2000


def test_each_agent_has_an_selinux_level_of_its_own() -> None:
    levels = [selinux_level(index) for index in range(4000)]

    assert levels[:2] == ["s0:c0,c512", "s0:c1,c512"]
    assert len(set(levels)) == 4000
    for level in levels:
        first, second = (int(part.removeprefix("c")) for part in level.removeprefix("s0:").split(","))
        assert 0 <= first < second < 1024


def test_the_unit_says_what_is_configured(home: Path) -> None:
    config = replace(
        BERTA.config, image="localhost/berta:2", memory_max="512M", tasks_max=99, cpu_quota="50%"
    )
    mounts = (
        BindMount(source=Path("/srv/a"), target="/mnt/a", read_only=True),
        BindMount(source=Path("/srv/b b"), target="/mnt/b", read_only=False),
    )

    lines = render(replace(BERTA, config=config, mounts=mounts)).splitlines()

    assert (
        lines[0]
        == f"# Generated from agents/berta.toml by nanoclaw {VERSION}; edits are lost. Put yours into"
    )
    for line in (
        *(
            "MemoryMax=512M",
            "TasksMax=99",
            "CPUQuota=50%",
            "User=2003",
            f"Group={os.getgid()}",
            "Network=none",
        ),
        f"Volume={home}/state/nanoclaw/agents/berta/workspace:/workspace:rw,nosuid,nodev,Z",
        f"Volume={home}/state/nanoclaw/agents/berta/sessions/%i:/session:rw,nosuid,nodev,noexec,Z",
        "Ulimit=nproc=99:99",
        f"Volume={home}/run/nanoclaw/agents/berta/%i:/run/nanoclaw:ro,nosuid,nodev,noexec,z",
        "Volume=/srv/a:/mnt/a:ro,nosuid,nodev,z",
        'PodmanArgs="--volume=/srv/b b:/mnt/b:rw,nosuid,nodev,z"',
    ):
        assert line in lines
    assert lines[-1] == "Image=localhost/berta:2"


@pytest.mark.parametrize(
    ("runtime", "line"),
    [
        ("krun", "GlobalArgs=--runtime=krun"),
        (
            "runsc",
            "GlobalArgs=--runtime=runsc --runtime-flag=host-uds=open --runtime-flag=ignore-cgroups "
            "--runtime-flag=network=none",
        ),
    ],
)
def test_another_runtime_is_passed_on_to_podman(home: Path, runtime: str, line: str) -> None:
    lines = render(replace(BERTA, config=replace(BERTA.config, runtime=runtime))).splitlines()

    assert lines[-2] == line
    assert "GlobalArgs" not in render(BERTA)


def test_selinux_separates_agents_and_is_never_turned_off(home: Path) -> None:
    level = selinux_level(BERTA.index)
    units = [render(spec) for spec in (BERTA, replace(BERTA, index=BERTA.index + 1))]

    assert f"\nSecurityLabelLevel={level}\n" in units[0] and level not in units[1]
    for text in units:
        options = re.findall(r"^Volume=.*:([a-zA-Z,]+)$", text, re.MULTILINE)
        assert options and all({"z", "Z"} & set(option.split(",")) for option in options), options
        assert not re.search("label=|SecurityLabel(?!Level)", text)


def test_a_unit_cut_off_anywhere_has_no_image(home: Path) -> None:
    text = render(BERTA)

    assert text.count("\nImage=") == 1
    assert text.endswith(f"\nImage={BERTA.config.image}\n")


def test_a_home_with_odd_characters_is_quoted_or_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/home/a b%$")
    assert 'PodmanArgs="--volume=/home/a b%%$$/nanoclaw/agents/berta/sessions/%i:/session:' in render(BERTA)

    monkeypatch.setenv("XDG_STATE_HOME", "/home/a:b")
    with pytest.raises(Refused, match="colon"):
        render(BERTA)


def test_quoting_refuses_what_ends_a_line() -> None:
    assert quote_argument('a "b" \\ $C %d') == '"a \\"b\\" \\\\ $$C %%d"'
    for text in ("a\nb", "a\0b", "a\u2028b", "a\udc80b"):
        with pytest.raises(Refused):
            quote_argument(text)


def test_a_unit_is_stale_when_missing_changed_damaged_or_moved(
    home: Path, no_check: dict[AgentName, NanoclawError]
) -> None:
    other = UnitSpec(config=AgentConfig(name=AgentName("anna")), index=4)
    assert quadlet.stale_units([BERTA, other]) == [BERTA, other]

    assert install(BERTA, other) == {"berta": None, "anna": None}

    path = quadlet.unit_file(AgentName("berta"), 3)
    assert path.stat().st_mode & 0o777 == 0o644
    assert quadlet.stale_units([BERTA, other]) == []
    bigger = replace(BERTA, config=replace(BERTA.config, memory_max="3G"))
    for changed in (bigger, replace(BERTA, index=5)):
        assert quadlet.stale_units([changed, other]) == [changed]
    for damage in (b"", b"[Container]\n", b"\xff\xfe", path.read_bytes() + b"Network=host\n"):
        path.write_bytes(damage)
        assert quadlet.stale_units([BERTA, other]) == [BERTA]


def test_every_unit_of_another_version_is_stale(
    home: Path, no_check: dict[AgentName, NanoclawError], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(BERTA)

    monkeypatch.setattr(quadlet, "VERSION", "another")

    assert quadlet.stale_units([BERTA]) == [BERTA]


def test_a_moved_unit_leaves_nothing_at_its_old_place(
    home: Path, no_check: dict[AgentName, NanoclawError]
) -> None:
    install(BERTA)
    moved = replace(BERTA, index=12)

    install(moved)

    assert quadlet.installed_units() == [("berta", quadlet.unit_file(AgentName("berta"), 12))]
    assert quadlet.stale_units([moved]) == []


def test_a_broken_agent_keeps_its_old_unit_and_harms_no_other(
    home: Path, no_check: dict[AgentName, NanoclawError]
) -> None:
    install(BERTA)
    before = quadlet.unit_file(AgentName("berta"), 3).read_bytes()
    no_check[AgentName("berta")] = ConfigError("no")
    anna = UnitSpec(config=AgentConfig(name=AgentName("anna")), index=4)

    results = install(replace(BERTA, config=replace(BERTA.config, memory_max="3G")), anna)

    assert str(results[AgentName("berta")]) == "no"
    assert results[AgentName("anna")] is None
    assert quadlet.unit_file(AgentName("berta"), 3).read_bytes() == before
    assert quadlet.unit_file(AgentName("anna"), 4).exists()


def test_an_unwritable_place_fails_for_that_agent_alone(
    home: Path, no_check: dict[AgentName, NanoclawError]
) -> None:
    blocked = quadlet.unit_file(AgentName("berta"), 3).parent
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where a directory should be")
    anna = UnitSpec(config=AgentConfig(name=AgentName("anna")), index=4)

    results = install(BERTA, anna)

    assert "cannot be written" in str(results[AgentName("berta")])
    assert results[AgentName("anna")] is None


def test_removing_takes_the_unit_and_leaves_the_persons_drop_ins(
    home: Path, no_check: dict[AgentName, NanoclawError]
) -> None:
    install(BERTA)
    drop_in = quadlet.drop_in_directory(AgentName("berta")) / "50-local.conf"
    drop_in.parent.mkdir()
    drop_in.write_text("[Container]\n")

    assert quadlet.remove_units([AgentName("berta")]) == [quadlet.unit_file(AgentName("berta"), 3)]

    assert quadlet.installed_units() == []
    assert quadlet.remove_units([AgentName("berta")]) == []
    assert drop_in.exists()
    assert not list((paths.quadlets() / "nanoclaw").glob("*/.*"))
