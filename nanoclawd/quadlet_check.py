"""Units of agents before they are installed: what Quadlet's generator and systemd say of them."""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
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
VERIFIED = re.compile(
    r"^(?:.*/nanoclaw-([a-z0-9_]+)@\.service:([0-9]+)|nanoclaw-([a-z0-9_]+)@[^:/]*\.service): (.*)$"
)
SHARED_DROP_INS = ("container.d", "nanoclaw-.container.d", "nanoclaw-@.container.d")


async def check_units(texts: Mapping[AgentName, str]) -> dict[AgentName, NanoclawError]:
    """Return what is wrong with the agents' units, given as text, together with the person's drop-ins.

    The error names the drop-in's file and line where that is what breaks the unit. One run of each program,
    however many units. Raises Unavailable or Failed if nothing could be checked.
    """
    if not texts:
        return {}
    try:
        with tempfile.TemporaryDirectory(prefix="nanoclaw-check-", ignore_cleanup_errors=True) as directory:
            check = _Check(Path(directory), texts)
            await asyncio.to_thread(check.stage)
            if services := await check.generate():
                await check.verify(services)
            return check.problems
    except OSError as exc:  # the disk is full
        raise failed(Path(exc.filename or tempfile.gettempdir()), "cannot be written", exc) from None


class _Check:
    """One check under way."""

    def __init__(self, directory: Path, texts: Mapping[AgentName, str]) -> None:
        self.directory = directory  #: ours alone
        self.texts = texts
        self.drop_ins: dict[AgentName, list[Path]] = defaultdict(list)  #: real files, as they apply
        self.staged: dict[Path, Path] = {}  #: a drop-in directory in our directory, and the real one
        self.problems: dict[AgentName, NanoclawError] = {}

    def stage(self) -> None:
        """Write the units into our directory, a symlink to each drop-in directory that applies."""
        (self.directory / "quadlets/units").mkdir(parents=True)
        (self.directory / "systemd").mkdir()
        for agent, text in self.texts.items():
            _unit(self.directory / "quadlets/units", agent, "container").write_text(text, encoding="utf-8")
        names = {f"nanoclaw-{agent}@.container.d": [agent] for agent in self.texts}
        names |= {name: list(self.texts) for name in SHARED_DROP_INS}
        for number, real in enumerate(_drop_in_directories(names)):
            # Numbered: the generator walks in this order, and of two files with one name takes the first.
            link = self.directory / "quadlets" / f"z{number:05}" / real.name
            link.parent.mkdir()
            link.symlink_to(real)
            self.staged[link] = real
            for agent in names[real.name]:
                self.drop_ins[agent] += sorted(real.glob("*.conf"))

    async def generate(self) -> dict[AgentName, str]:
        """Run the generator; return the services that it makes, and note what it refuses."""
        generator = next((path for path in GENERATORS if os.access(path, os.X_OK)), None)
        if generator is None:
            raise Unavailable("Podman's Quadlet generator is missing", hint="install podman 5.3 or newer")
        result = await programs.run(
            [generator, "--dryrun", "--user"], env={"QUADLET_UNIT_DIRS": str(self.directory / "quadlets")}
        )
        for line in result.stderr.splitlines():
            if match := CONVERTING.search(line):
                self.note_refusal(AgentName(match[1]), match[2])
            elif match := LOADING.search(line):
                self.note_syntax(Path(match[1]), match[2])
        parts = GENERATED.split(result.stdout)
        services = dict(zip(map(AgentName, parts[1::2]), parts[2::2], strict=True))
        for agent in self.texts.keys() - services.keys():
            self.note(agent, "", f"no unit can be made of it: {result.stderr.strip()[-400:]}")
        return {
            agent: text.strip("\n") + "\n" for agent, text in services.items() if agent not in self.problems
        }

    async def verify(self, services: Mapping[AgentName, str]) -> None:
        """Let systemd read the services that the generator made, and note what it does not like."""
        await asyncio.to_thread(self.write_services, services)
        files = [str(_unit(self.directory / "systemd", agent, "service")) for agent in services]
        # --man=no: else it runs man(1) for each unit.
        result = await programs.run(
            ["systemd-analyze", "--user", "--man=no", "--recursive-errors=no", "verify", *files],
            timeout_s=limits.PROGRAM_S,
        )
        # Its exit status says nothing: older versions return 0 for a key that they do not know.
        for line in result.stderr.splitlines():
            if match := VERIFIED.match(line):
                agent = AgentName(match[1] or match[3])
                self.note_dislike(agent, match[4], services.get(agent, ""), int(match[2] or 0))

    def write_services(self, services: Mapping[AgentName, str]) -> None:
        for agent, text in services.items():
            _unit(self.directory / "systemd", agent, "service").write_text(text, encoding="utf-8")

    # --- whose fault is it? --------------------------------------------------------------------------

    def note(self, agent: AgentName, where: str, reason: str) -> None:
        """Keep the first problem of an agent; what follows it is mostly its echo."""
        if agent in self.texts:
            where = where or f"agents/{agent}.toml"
            self.problems.setdefault(agent, ConfigError(f"{where}: {reason}", hint="nothing was changed"))

    def note_syntax(self, path: Path, reason: str) -> None:
        """Note that a file is not even in Quadlet's syntax; `path` is the staged one."""
        file = self.staged.get(path.parent, path.parent) / path.name
        line = re.search(r"line ([0-9]+)", reason)
        for agent in self.texts:
            if path.name == f"nanoclaw-{agent}@.container" or file in self.drop_ins[agent]:
                self.note(agent, f"{file}:{line[1]}" if line else str(file), reason)

    def note_refusal(self, agent: AgentName, reason: str) -> None:
        """Note that the generator refuses a unit; the reason may quote a key or a value."""
        reason = re.sub(rf" in {re.escape(str(self.directory))}\S*", "", reason)
        words = [match[1] for match in KEY.finditer(reason)]

        def is_quoted(line: str) -> bool:
            key, _, value = (part.strip() for part in line.partition("="))
            return key in words or (value != "" and value in words)

        if where := self.find(agent, is_quoted):
            self.note(agent, where, reason)
        else:
            self.note(agent, self.suspects(agent), f"with this the unit is refused: {reason}")

    def note_dislike(self, agent: AgentName, reason: str, service: str, number: int) -> None:
        """Note what systemd says of a generated service, of its line `number` unless that is 0."""
        written = service.splitlines()[number - 1].strip() if service and number else ""
        where = self.find(agent, lambda line: line == written) if written else ""
        if not where and written not in map(str.strip, self.texts.get(agent, "").splitlines()):
            where = self.suspects(agent)
        self.note(agent, where, reason)

    def find(self, agent: AgentName, is_it: Callable[[str], bool]) -> str:
        """Return file and line of the last such line in the drop-ins, or nothing."""
        for path in reversed(self.drop_ins[agent]):  # the last one wins
            try:
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            except OSError:
                continue
            for number, line in enumerate(lines, 1):
                if is_it(line.strip()):
                    return f"{path}:{number}"
        return ""

    def suspects(self, agent: AgentName) -> str:
        return ", ".join(map(str, self.drop_ins[agent]))


def _unit(directory: Path, agent: AgentName, kind: str) -> Path:
    return directory / f"nanoclaw-{agent}@.{kind}"


def _drop_in_directories(names: Mapping[str, object]) -> Iterator[Path]:
    """Yield the directories with these names where Quadlet looks. Source: podman-systemd.unit(5)."""
    system = Path("/etc/containers/systemd/users")
    mine = (paths.runtime_home() / "containers/systemd", paths.quadlets())
    for top in (*mine, system / str(os.getuid()), system):
        for parent, directories, _ in os.walk(top):
            directories.sort()
            yield from (Path(parent, name) for name in directories if name in names)
