"""Text files that people and we write: read within bounds, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from nanoclawd.errors import ConfigError, Failed, NotFound

T = TypeVar("T")
NameT = TypeVar("NameT", bound=str)
CONFIG_BYTES = 64 << 10  #: one TOML file of a person


def read_text(path: Path, max_bytes: int = CONFIG_BYTES) -> str:
    """Return the text of a file. Raises as read_bytes() does; ConfigError, too, if it is not UTF-8."""
    data = read_bytes(path, max_bytes)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise ConfigError(f"{path}:{line}: is not UTF-8", hint="save the file as UTF-8") from None


def read_all(
    directory: Path, name_of: Callable[[Path], NameT], read: Callable[[Path], T]
) -> tuple[dict[NameT, T | ConfigError], list[ConfigError]]:
    """Return what each NAME.toml in `directory` says, or why one is broken; a broken one harms no other.

    Also what is wrong with files that have a name that none can have. Raises ConfigError if the directory
    cannot be read.
    """
    found: dict[NameT, T | ConfigError] = {}
    misnamed: list[ConfigError] = []
    try:
        # Not glob(), which takes what it may not read for empty: then all would be gone.
        files = sorted(os.listdir(directory))
    except FileNotFoundError:
        return {}, []
    except OSError as exc:
        hint = f"run: chmod u+rwx {directory}"
        raise ConfigError(f"{directory}: cannot be read: {exc.strerror}", hint=hint) from None
    for path in (directory / file for file in files if file.endswith(".toml") and not file.startswith(".")):
        try:
            name = name_of(path)
        except ConfigError as exc:
            misnamed.append(exc)
            continue
        try:
            found[name] = read(path)
        except NotFound:  # removed meanwhile, or a symlink to nowhere
            if path.is_symlink():
                hint = f"'namei {path}' shows where it leads"
                found[name] = ConfigError(f"{path}: is a symlink to nowhere", hint=hint)
        except ConfigError as exc:
            found[name] = exc
    return found, misnamed


def read_bytes(path: Path, max_bytes: int, *, flags: int = 0) -> bytes:
    """Return what a regular file of at most `max_bytes` holds; symlinks are followed unless `flags` forbids.

    Raises NotFound if there is none, ConfigError if it is not such a file, or too large.
    """
    try:
        # O_NONBLOCK: a FIFO in its place would otherwise block us until somebody writes into it.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags), "rb") as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            data = file.read(max_bytes + 1) if regular else b""
    except IsADirectoryError:
        regular = False
    except FileNotFoundError:
        raise NotFound(f"{path}: there is no such file") from None
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}", hint=_hint(path, exc)) from None
    if not regular:
        raise ConfigError(f"{path}: is not a regular file", hint="put a text file in its place")
    if len(data) > max_bytes:
        raise ConfigError(f"{path}: is larger than {max_bytes >> 10} KiB", hint="is it the right file?")
    return data


def write_text(path: Path, text: str, *, mode: int = 0o600) -> None:
    """Replace `path` (or what a symlink there points to) by `text`, as write_bytes() does."""
    try:
        path = path.resolve()  # a dotfile manager's symlink stays one
    except (OSError, RuntimeError) as exc:  # RuntimeError: a loop of symlinks, before Python 3.13
        raise failed(path, "cannot be written", exc) from None
    write_bytes(path, text.encode(), mode=mode)


def write_bytes(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace `path` by `data`, durable when this returns.

    At any moment, also after a power loss, there is either the old file or the new one. A directory that is
    missing is made.
    Raises Failed, and leaves the old file, if it cannot be written.
    """
    try:
        missing = [parent for parent in path.parents if not parent.exists()]
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for parent in missing:
            sync_directory(parent.parent)
        # In the same directory: rename(2) works neither across file systems nor across the bind mounts that
        # ReadWritePaths= makes. The name has no suffix that Quadlet or we would read.
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".new")
        try:
            with open(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(fd, mode)
                os.fsync(fd)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        sync_directory(path.parent)
    except OSError as exc:
        raise failed(path, "cannot be written", exc) from None


def remove_file(path: Path) -> None:
    """Remove a file, if it is there; durable when this returns. Raises Failed."""
    try:
        path.unlink()
        sync_directory(path.parent)
    except FileNotFoundError:
        pass
    except OSError as exc:
        hint = "remove it yourself, then 'nanoclawctl reload'"
        raise Failed(f"{path}: cannot be removed: {exc.strerror}", hint=hint) from None


def failed(path: Path, what: str, exc: OSError | RuntimeError) -> Failed:
    """Return the error that tells of `exc`; `what` is e.g. "cannot be made"."""
    return Failed(f"{path}: {what}: {getattr(exc, 'strerror', exc)}", hint=_hint(path, exc))


def _hint(path: Path, exc: OSError | RuntimeError) -> str:
    match getattr(exc, "errno", None):
        case errno.ENOSPC | errno.EDQUOT:
            return f"make room: 'df -h {path.parent}' shows how much there is"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"'namei -l {path}' shows whose it is and who may"
        case errno.ELOOP:
            return f"'namei {path}' shows where the symlinks lead"
    return ""


def sync_directory(path: Path) -> None:
    """Make names that were added, replaced or removed in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
