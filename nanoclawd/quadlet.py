"""The Quadlet unit of each agent: rendered from its configuration, checked, put where systemd finds it.

No D-Bus here: whoever installs or removes units reloads systemd once, afterwards.
"""

from __future__ import annotations

import asyncio
import functools
import getpass
import os
import re
import resource
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from nanoclawd import paths, quadlet_check
from nanoclawd.agents import AgentConfig
from nanoclawd.errors import ConfigError, Failed, NanoclawError, Refused
from nanoclawd.files import remove_file, write_text
from nanoclawd.ids import AgentName, parse_agent_name
from nanoclawd.mounts import BindMount
from nanoclawd.version import VERSION

TEMPLATE = paths.SHARE / "quadlets" / "agent.container.in"
SECCOMP = paths.SHARE / "quadlets" / "seccomp.json"
PLAIN = re.compile(r"[A-Za-z0-9_@+=./-]+", re.ASCII)  #: means itself wherever it stands in a unit
FIRST_UID = 2000  #: in the container, of the agent with index 0
UNKNOWN_UID = -1
#: What a unit says more for each runtime. gVisor must be told to open sockets of the host, to leave cgroups
#: to systemd (it stays in the unit's), and to have no network, which it otherwise looks for by itself.
RUNTIMES = {
    "": "",
    "krun": "\nGlobalArgs=--runtime=krun",
    "runsc": "\nGlobalArgs=--runtime=runsc"
    + "".join(f" --runtime-flag={flag}" for flag in ("host-uds=open", "ignore-cgroups", "network=none")),
}
# A file that is not in Quadlet's syntax makes the generator drop its whole directory, so not all in one. But
# it looks for each unit's drop-ins in each directory: a reload with 1,000 agents takes 17 s if each has its
# own, 0.7 s with 16, 0.5 s with 8.
DIRECTORIES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitSpec:
    """All that makes one agent's unit."""

    config: AgentConfig
    index: int  #: 0-based, of this agent alone and for ever: becomes its uid and its SELinux level
    mounts: tuple[BindMount, ...] = ()  #: config.mounts after resolve_mounts(), and those of skills

    @property
    def agent(self) -> AgentName:
        return self.config.name


# --- names and ids ----------------------------------------------------------------------------------


def unit_file(agent: AgentName, index: int) -> Path:
    """Return where the agent's unit is."""
    return paths.quadlets() / "nanoclaw" / f"{index % DIRECTORIES:x}" / f"nanoclaw-{agent}@.container"


def drop_in_directory(agent: AgentName) -> Path:
    """Return where a person extends the agent's unit; never touched by us."""
    return paths.quadlets() / f"nanoclaw-{agent}@.container.d"


def container_uid(index: int, person: int) -> int:
    """Return the agent's uid in its container; never the person's, which is the same inside as outside."""
    uid = FIRST_UID + index
    return uid + 1 if FIRST_UID <= person <= uid else uid


def host_uid(index: int) -> int:
    """Return the host's uid of the agent, or UNKNOWN_UID if /etc/subuid does not tell.

    UserNS=keep-id maps the person's own uid onto itself, and the first subordinate uids onto the others in
    order: podman-run(1), subuid(5).
    """
    person = os.getuid()
    uid = container_uid(index, person)
    offset = uid if uid < person else uid - 1
    try:
        text = Path("/etc/subuid").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return UNKNOWN_UID
    mine = rf"^(?:{re.escape(getpass.getuser())}|{person}):([0-9]+):([0-9]+)$"
    for start, count in re.findall(mine, text, re.MULTILINE):
        if offset < int(count):
            return int(start) + offset
        offset -= int(count)
    return UNKNOWN_UID


def selinux_level(index: int) -> str:
    """Return the agent's MCS level: two of 1024 categories, another pair for each of 262,144 agents."""
    return f"s0:c{index % 512},c{512 + index // 512 % 512}"


# --- text -------------------------------------------------------------------------------------------


def render(spec: UnitSpec) -> str:
    """Return the text of the agent's unit. Raises Refused if a path in it cannot stand there."""
    agent, config = spec.agent, spec.config
    limits = [f"MemoryMax={config.memory_max}", f"TasksMax={config.tasks_max}"]
    if config.cpu_quota:
        limits.append(f"CPUQuota={config.cpu_quota}")
    # Absolute paths, not %S or %t: ours are made by us, and systemd's own idea of XDG_STATE_HOME may differ.
    volumes = [
        _volume(paths.workspace(agent), "", "/workspace", "rw,nosuid,nodev,Z"),
        _volume(paths.agent_state(agent) / "sessions", "/%i", "/session", "rw,nosuid,nodev,noexec,Z"),
        _volume(paths.runtime() / "agents" / agent, "/%i", "/run/nanoclaw", "ro,nosuid,nodev,noexec,z"),
    ]
    for mount in spec.mounts:
        access = "ro" if mount.read_only else "rw"
        volumes.append(_volume(mount.source, "", mount.target, f"{access},nosuid,nodev,z"))
    return _template().substitute(
        agent=agent,
        version=VERSION,
        top="nanoclaw/",
        limits="\n".join(limits),
        runtime=RUNTIMES[config.runtime],
        processes=min(config.tasks_max, _most_processes()),
        uid=container_uid(spec.index, os.getuid()),
        gid=os.getgid(),
        selinux_level=selinux_level(spec.index),
        seccomp=quote_argument(f"--security-opt=seccomp={SECCOMP}"),
        volumes="\n".join(volumes),
        image=config.image,
    )


def _most_processes() -> int:
    """Return what the person may have: nobody can raise a limit for a container."""
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard


@functools.cache
def _template() -> Template:
    return Template(TEMPLATE.read_text(encoding="utf-8"))


def _volume(source: Path, instance: str, target: str, options: str) -> str:
    """Return the line that mounts `source` and what `instance`, in systemd's syntax, adds to it."""
    if ":" in str(source):
        raise Refused(f"podman cannot mount '{source}': there is a colon in it")
    rest = f"{instance}:{target}:{options}"
    if PLAIN.fullmatch(f"{source}{target}"):
        return f"Volume={source}{rest}"
    # Quadlet takes a Volume='s source over into RequiresMountsFor= as it is, where a space would split it.
    argument = quote_argument(f"--volume={source}").removesuffix('"')
    return f'PodmanArgs={argument}{rest}"'


def quote_argument(text: str) -> str:
    """Return `text` as one word of a command line in a unit, e.g. for PodmanArgs=.

    Quadlet takes the quotes off and puts its own on, systemd takes those off, expands %x and $NAME, and the
    program gets `text`. Sources: systemd.syntax(7), "Quoting"; systemd.service(5), "Command Lines";
    systemd.unit(5), "Specifiers". Raises Refused for control characters, which no path of ours needs.
    """
    if not text.isprintable():
        raise Refused(f"a control character cannot stand in a unit: {text[:80]!r}")
    for special, escaped in ("\\", "\\\\"), ('"', '\\"'), ("$", "$$"), ("%", "%%"):
        text = text.replace(special, escaped)
    return f'"{text}"'


# --- files ------------------------------------------------------------------------------------------


def stale_units(specs: Iterable[UnitSpec]) -> list[UnitSpec]:
    """Return those whose unit is missing or not what we would write now: older, changed, damaged, moved."""
    files: dict[AgentName, list[Path]] = defaultdict(list)
    for agent, path in installed_units():
        files[agent].append(path)
    return [spec for spec in specs if not _is_current(spec, files[spec.agent])]


def _is_current(spec: UnitSpec, files: list[Path]) -> bool:
    path = unit_file(spec.agent, spec.index)
    try:
        return files == [path] and path.read_bytes() == render(spec).encode()
    except (OSError, Refused):  # install_units() will tell
        return False


def installed_units() -> list[tuple[AgentName, Path]]:
    """Return the agent and the file of each unit of ours; an agent whose index changed may have two."""
    found = []
    for path in (paths.quadlets() / "nanoclaw").glob("*/nanoclaw-*@.container"):
        try:
            found.append((parse_agent_name(path.name[len("nanoclaw-") : -len("@.container")]), path))
        except Refused:
            continue
    return sorted(found)


async def install_units(specs: Sequence[UnitSpec]) -> dict[AgentName, NanoclawError | None]:
    """Check the units of `specs` together and put those that pass in place; then reload systemd once.

    Returns for each agent None or what is wrong with it; a broken one keeps its old unit and harms no other.
    Raises Unavailable or Failed if nothing could be checked at all.
    """
    problems: dict[AgentName, NanoclawError] = {}
    texts: dict[AgentName, str] = {}
    for spec in specs:
        try:
            texts[spec.agent] = render(spec)
        except Refused as exc:
            file = f"{paths.agents() / spec.agent}.toml"
            problems[spec.agent] = ConfigError(f"{file}: {exc.message}", hint=exc.hint)
    problems |= await quadlet_check.check_units(texts)
    good = [spec for spec in specs if spec.agent not in problems]
    # In a thread: each file is written durably, and a thousand of them take seconds.
    problems |= await asyncio.to_thread(_write_units, good, texts)
    return {spec.agent: problems.get(spec.agent) for spec in specs}


def _write_units(
    specs: Iterable[UnitSpec], texts: Mapping[AgentName, str]
) -> dict[AgentName, NanoclawError]:
    """Write the units; return what went wrong."""
    problems: dict[AgentName, NanoclawError] = {}
    for spec in specs:
        path = unit_file(spec.agent, spec.index)
        try:
            write_text(path, texts[spec.agent], mode=0o644)
            # With another index it was elsewhere, and of two files with one name Quadlet takes the first.
            for other in path.parent.parent.glob(f"*/{path.name}"):
                if other != path:
                    remove_file(other)
        except Failed as exc:
            problems[spec.agent] = exc
    return problems


def remove_units(agents: Iterable[AgentName]) -> list[Path]:
    """Remove the units of `agents` and return what was removed; afterwards reload systemd once."""
    unwanted = set(agents)
    removed = [path for agent, path in installed_units() if agent in unwanted]
    for path in removed:
        remove_file(path)
    return removed
