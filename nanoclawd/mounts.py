"""Which files of the person an agent may see: an allow-list, and what is never allowed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanoclawd import paths
from nanoclawd.agents import Mount
from nanoclawd.errors import ConfigError

# In the home everything whose name begins with a dot: credentials, histories, our own files, what shells and
# systemd run with the person's rights. These too:
PRIVATE_IN_HOME = ("bin", "snap")
#: In ~/.config; looked at one by one, since a dotfile manager may have made symlinks of them.
OFTEN_LINKED = ("aws", "containers", "environment.d", "gcloud", "gh", "git", "nanoclaw", "systemd")
#: Of the system: the kernel's, devices, configuration, other users', services' data.
PRIVATE = (
    *("/bin", "/boot", "/dev", "/etc", "/lib", "/proc", "/root", "/run", "/sbin", "/sys", "/tmp"),
    *("/usr", "/var"),
)
# What is left has one spelling, and survives podman's SOURCE:TARGET:OPTIONS.
TARGET = re.compile(r"/mnt(?:/[A-Za-z0-9_][A-Za-z0-9_. -]*)+", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class AllowedMount:
    """One row of `[mounts] allow` in nanoclaw.toml: agents may see this and what is below."""

    path: Path  #: absolute, or beginning with "~"
    read_only: bool = True  #: false: agents may also be allowed to write there


@dataclass(frozen=True, kw_only=True, slots=True)
class BindMount:
    """A mount that was checked and may stand in a unit."""

    source: Path  #: absolute; there was no symlink in it
    target: str  #: absolute, in the container
    read_only: bool


def resolve_mounts(mounts: Iterable[Mount], allowed: Sequence[AllowedMount]) -> tuple[BindMount, ...]:
    """Return what the agent's `mounts` stand for, in their order.

    Raises ConfigError naming the first mount that may not be, and why. Call it again before each start of a
    container: Podman follows the path again, and what is below a writable mount may be a symlink by then.
    """
    mounts = tuple(mounts)
    private = private_paths() if mounts else []
    # Refused, not skipped, when an entry is broken: less than the person believes is no harm, more would be.
    roots = [(root, entry.read_only) for entry in allowed if (root := _resolve(entry.path)) is not None]
    resolved: list[BindMount] = []
    for mount in mounts:
        bind = _resolve_mount(mount, roots, private)
        for other in resolved:
            _check_pair(bind, other)
        resolved.append(bind)
    return tuple(resolved)


def _resolve_mount(mount: Mount, roots: list[tuple[Path, bool]], private: list[Path]) -> BindMount:
    def refusal(reason: str, hint: str = "") -> ConfigError:
        return ConfigError(f"mount of '{mount.source}': {reason}", hint=hint)

    source = _resolve(Path(mount.source))
    if source is None:
        raise refusal("there is no such file or directory, or it is not an absolute path")
    if not (source.is_dir() or source.is_file()):
        raise refusal("is neither a directory nor a regular file")
    if ":" in str(source) or not str(source).isprintable():
        raise refusal("podman cannot mount a path with a colon or a control character")
    home = Path.home().resolve()
    if home.is_relative_to(source):
        raise refusal("is the whole home directory", "name a directory in it")
    for one in private:
        # Where homes lie below one of these (/var/home), the home is no part of it.
        by_home = home.is_relative_to(one) and source.is_relative_to(home)
        if one.is_relative_to(source) or (source.is_relative_to(one) and not by_home):
            raise refusal(f"'{one}' is never shown to agents", "move what the agent shall see")
    writable = [not read_only for root, read_only in roots if source.is_relative_to(root)]
    if not writable:
        hint = f'add {{ path = "{source}", read_only = true }} to [mounts] allow in nanoclaw.toml'
        raise refusal("is not allowed", hint)
    if not mount.read_only and not any(writable):
        raise refusal("is allowed read-only", "set read_only = true, or allow writing in nanoclaw.toml")
    # Not below /workspace: the agent writes there, and the host would follow what it made of the path.
    if not TARGET.fullmatch(mount.target) or ".." in mount.target.split("/"):
        raise refusal(f"the target '{mount.target}' is not below /mnt", "write /mnt/NAME")
    return BindMount(source=source, target=mount.target.rstrip(" "), read_only=mount.read_only)


def _check_pair(one: BindMount, other: BindMount) -> None:
    """Raise ConfigError if two mounts of one agent must not be together."""
    a, b = Path(one.target), Path(other.target)
    if a.is_relative_to(b) or b.is_relative_to(a):
        raise ConfigError(f"mounts to '{one.target}' and '{other.target}' hide each other")
    for inner, outer in ((one, other), (other, one)):
        # Through the outer one the agent could put a symlink in the inner one's place, for our next start.
        if not outer.read_only and outer.source in inner.source.parents:
            reason = f"lies in '{outer.source}', which the agent may write"
            raise ConfigError(f"mount of '{inner.source}': {reason}")


def private_paths() -> list[Path]:
    """Return what no agent may see, resolved: neither it, nor what is in it, nor what it is in."""
    home = Path.home()
    found = [home / name for name in PRIVATE_IN_HOME]
    found += [path for path in home.iterdir() if path.name.startswith(".")]
    found += [home / ".config" / name for name in OFTEN_LINKED]
    found += [paths.config(), paths.quadlets().parent, paths.config_home() / "systemd", paths.credentials()]
    found += [paths.state(), paths.runtime_home(), paths.SHARE, *map(Path, PRIVATE)]
    # Both spellings: ~/.ssh may itself be a symlink.
    return sorted({path for name in found for path in (name, Path(os.path.realpath(name)))})


def _resolve(path: Path) -> Path | None:
    """Return the absolute path without symlinks, or None if there is none."""
    try:
        path = path.expanduser()
        return path.resolve(strict=True) if path.is_absolute() else None
    except (OSError, RuntimeError, ValueError):  # missing; a loop; a NUL, or no such user's home
        return None
