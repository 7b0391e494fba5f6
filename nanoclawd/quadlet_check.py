"""Units of agents before they are installed: what Quadlet's generator and systemd say of them."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nanoclawd import limits, paths, programs
from nanoclawd.errors import ConfigError, NanoclawError, Unavailable
from nanoclawd.files import failed
from nanoclawd.ids import AgentName

GENERATORS = (
    "/usr/lib/systemd/user-generators/podman-user-generator",
    "/usr/libexec/podman/quadlet",
    "/usr/lib/podman/quadlet",
)
# What the generator (pkg/systemd/quadlet in Podman) and systemd-analyze print.
CONVERTING = re.compile(r'converting "nanoclaw-([a-z0-9_]+)@\.container": (.*)')
LOADING = re.compile(r'error loading "([^"]+)", (.*)')
KEY = re.compile(r"'([A-Za-z]+)'")
GENERATED = re.compile(r"^---nanoclaw-([a-z0-9_]+)@\.service---$", re.MULTILINE)
VERIFIED = re.compile(r"^.*/nanoclaw-([a-z0-9_]+)@\.service:([0-9]+): (.*)$")
REFUSED = re.compile(r"^nanoclaw-([a-z0-9_]+)@[^:/]*\.service: (.*)$")


@dataclass(kw_only=True)
class _Check:
    """One check under way."""

    directory: Path  #: ours alone, removed at the end
    texts: dict[AgentName, str]  #: what is checked
    drop_ins: dict[AgentName, list[Path]]  #: the person's files, as they really are, in the order they apply
    staged: dict[Path, Path]  #: a drop-in directory in our directory, and the real one
    problems: dict[AgentName, NanoclawError] = field(default_factory=dict)

    def complain(self, agent: AgentName, where: str, reason: str) -> None:
        """Keep the first problem of an agent; what follows it is mostly its echo."""
        if agent in self.texts:
            self.problems.setdefault(agent, ConfigError(f"{where}: {reason}", hint="nothing was changed"))


async def check_units(texts: Mapping[AgentName, str]) -> dict[AgentName, NanoclawError]:
    """Return what is wrong with the agents' units, given as text, together with the person's drop-ins.

    The error names the drop-in's file and line where that is what breaks the unit. One run of each program,
    however many units. Raises Unavailable or Failed if nothing could be checked.
    """
    if not texts:
        return {}
    try:
        return await _check(dict(texts))
    except OSError as exc:  # the disk is full
        raise failed(Path(exc.filename or tempfile.gettempdir()), "cannot be written", exc) from None


async def _check(texts: dict[AgentName, str]) -> dict[AgentName, NanoclawError]:
    directory = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="nanoclaw-check-"))
    try:
        check = await asyncio.to_thread(_stage, directory, texts)
        generated = await _generate(check)
        await _verify(check, generated)
        return check.problems
    finally:
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)


def _stage(directory: Path, texts: dict[AgentName, str]) -> _Check:
    """Write the units into our directory, with a symlink to each drop-in directory that applies to them."""
    (directory / "quadlets" / "units").mkdir(parents=True)
    (directory / "systemd").mkdir()
    for agent, text in texts.items():
        (directory / "quadlets" / "units" / f"nanoclaw-{agent}@.container").write_text(
            text, encoding="utf-8"
        )
    shared = ["container.d", "nanoclaw-.container.d", "nanoclaw-@.container.d"]
    names = {f"nanoclaw-{agent}@.container.d": [agent] for agent in texts} | {
        name: list(texts) for name in shared
    }
    drop_ins: dict[AgentName, list[Path]] = defaultdict(list)
    staged: dict[Path, Path] = {}
    for number, real in enumerate(_drop_in_directories(names)):
        # Numbered, for the generator walks in this order, and of two files with one name takes the first.
        link = directory / "quadlets" / f"z{number:05}" / real.name
        link.parent.mkdir()
        link.symlink_to(real)
        staged[link] = real
        for agent in names[real.name]:
            drop_ins[agent] += sorted(real.glob("*.conf"))
    return _Check(directory=directory, texts=texts, drop_ins=drop_ins, staged=staged)


def _drop_in_directories(names: Mapping[str, object]) -> Iterable[Path]:
    """Return the directories with these names where Quadlet looks. Source: podman-systemd.unit(5)."""
    system = Path("/etc/containers/systemd/users")
    for top in (
        paths.runtime_home() / "containers/systemd",
        paths.quadlets(),
        system / str(os.getuid()),
        system,
    ):
        for parent, directories, _ in os.walk(top):
            directories.sort()
            yield from (Path(parent, name) for name in directories if name in names)


async def _generate(check: _Check) -> dict[AgentName, str]:
    """Run the generator; return the services that it makes, and note what it refuses."""
    generator = next((path for path in GENERATORS if os.access(path, os.X_OK)), None)
    if generator is None:
        raise Unavailable("Podman's Quadlet generator is not installed", hint="install podman 5.3 or newer")
    result = await programs.run(
        [generator, "--dryrun", "--user"], env={"QUADLET_UNIT_DIRS": str(check.directory / "quadlets")}
    )
    for line in result.stderr.splitlines():
        if match := CONVERTING.search(line):
            agent = AgentName(match[1])
            check.complain(agent, *_blame(check, agent, match[2]))
        elif match := LOADING.search(line):
            _complain_of_file(check, Path(match[1]), match[2])
    parts = GENERATED.split(result.stdout)
    services = {
        AgentName(name): text.strip("\n") + "\n" for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    for agent in check.texts.keys() - services.keys():
        check.complain(
            agent, f"agents/{agent}.toml", f"no unit can be made of it: {result.stderr.strip()[-400:]}"
        )
    return {agent: text for agent, text in services.items() if agent not in check.problems}


def _complain_of_file(check: _Check, path: Path, reason: str) -> None:
    """Note that a file is not even in Quadlet's syntax; `path` is the staged one."""
    real = check.staged.get(path.parent)
    line = re.search(r"line ([0-9]+)", reason)
    where = f"{(real or path.parent) / path.name}{':' + line[1] if line else ''}"
    for agent in check.texts:
        if path.name == f"nanoclaw-{agent}@.container" or (
            real and real / path.name in check.drop_ins[agent]
        ):
            check.complain(agent, where, reason)


def _blame(check: _Check, agent: AgentName, reason: str) -> tuple[str, str]:
    """Return the place that a refusal by the generator is about, and the reason without our staged path."""
    reason = re.sub(rf" in {re.escape(str(check.directory))}\S*", "", reason)
    words = [match[1] for match in KEY.finditer(reason)]
    for path in reversed(check.drop_ins[agent]):  # the last one wins
        for number, line in enumerate(_lines(path), 1):
            key, _, value = (part.strip() for part in line.partition("="))
            if key in words or (value and value in words):
                return f"{path}:{number}", reason
    if check.drop_ins[agent]:
        return ", ".join(map(str, check.drop_ins[agent])), f"the unit with this is refused: {reason}"
    return f"agents/{agent}.toml", f"the unit made of it is refused: {reason}"


async def _verify(check: _Check, services: Mapping[AgentName, str]) -> None:
    """Let systemd read the services that the generator made, and note what it does not like."""
    if not services:
        return
    files = await asyncio.to_thread(_write_services, check.directory / "systemd", services)
    # --man=no: else it runs man(1) for each unit.
    result = await programs.run(
        ["systemd-analyze", "--user", "--man=no", "--recursive-errors=no", "verify", *files],
        timeout_s=limits.PROGRAM_S,
    )
    # Its exit status says nothing: older versions return 0 for a key that they do not know.
    for line in result.stderr.splitlines():
        if match := VERIFIED.match(line):
            agent = AgentName(match[1])
            written = services[agent].splitlines()[int(match[2]) - 1].strip() if agent in services else ""
            check.complain(agent, _origin(check, agent, written), match[3])
        elif match := REFUSED.match(line):
            agent = AgentName(match[1])
            check.complain(agent, _origin(check, agent, ""), match[2])


def _write_services(directory: Path, services: Mapping[AgentName, str]) -> list[str]:
    files = []
    for agent, text in services.items():
        path = directory / f"nanoclaw-{agent}@.service"
        path.write_text(text, encoding="utf-8")
        files.append(str(path))
    return files


def _origin(check: _Check, agent: AgentName, written: str) -> str:
    """Return where a line of a generated service comes from."""
    for path in reversed(check.drop_ins[agent]):
        for number, line in enumerate(_lines(path), 1):
            if written and line.strip() == written:
                return f"{path}:{number}"
    if written in map(str.strip, check.texts[agent].splitlines()) or not check.drop_ins[agent]:
        return f"agents/{agent}.toml"
    return ", ".join(map(str, check.drop_ins[agent]))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
