"""Credentials at rest: write, read, list, remove.

Since systemd 256 a credential is a blob, encrypted by systemd for this user on this machine, in
credstore.encrypted/nanoclaw.NAME; systemd-creds(1) reads and makes the same files. We ask systemd's
credential service ourselves, because LoadCredentialEncrypted= of user units fails before systemd 258. Below
256 it is a file of mode 0600, and `Entry.encrypted` says so.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import ctypes
import os
import resource
import stat
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoclawd import paths
from nanoclawd.client import Client
from nanoclawd.errors import ConfigError, Failed, NotFound, Refused, Unavailable
from nanoclawd.files import read_bytes, remove_file, write_bytes
from nanoclawd.ids import CREDENTIAL_NAME, CredentialName
from nanoclawd.wire import VarlinkError

SERVICE = Path("/run/systemd/io.systemd.Credentials")  #: there since systemd 256
SERVICE_S = 30.0  #: one question to it; the first one may wait for the machine's key to be made
SECRET_BYTES = 16 << 10
BLOB_BYTES = 128 << 10
PR_SET_DUMPABLE = 4  # linux/prctl.h
PREFIX = "nanoclaw."
SINCE = 256  #: the first version of systemd that encrypts for users
UNENCRYPTED = f"stored without encryption, which needs systemd {SINCE}"


class Secret:
    """A credential's value, which shows itself to nobody but the caller of reveal()."""

    __slots__ = ("_value", "name")

    def __init__(self, name: CredentialName, value: bytes) -> None:
        self.name = name
        self._value = value

    def reveal(self) -> bytes:
        """Return the value. Whoever calls this keeps it out of logs, errors and files."""
        return self._value

    def __repr__(self) -> str:
        return f"Secret({self.name!r}, ****)"

    def __reduce__(self) -> Any:
        raise TypeError("a secret is not for copying or pickling")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One stored credential, without its value."""

    name: CredentialName
    path: Path
    encrypted: bool  #: False: readable to whoever reads this user's files
    modified_at: float  #: seconds since 1970


def never_dump_core() -> None:
    """Have this process, which is to hold secrets, dump no core; what /proc shows of it becomes root's.

    The limit alone is not enough: the kernel ignores it where cores go to a program. See prctl(2). Who owns
    the user namespace of a process may trace it nevertheless, and that is this user.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise Failed(f"this program cannot be kept from dumping core: {os.strerror(ctypes.get_errno())}")


def encrypted_path(name: CredentialName) -> Path:
    return paths.credentials() / f"{PREFIX}{name}"


def _places(name: CredentialName) -> tuple[Path, Path]:
    """Return where it is encrypted, and where it is if it cannot be."""
    return encrypted_path(name), paths.config() / "credentials" / name


def write(name: CredentialName, value: bytes) -> Entry:
    """Store `value` in place of an older one; on return it is on disk.

    Raises Refused, Failed, ConfigError, Unavailable.
    """
    if not 0 < len(value) <= SECRET_BYTES:
        message = f"the value of '{name}' has {len(value)} bytes"
        raise Refused(message, hint=f"a credential has 1 to {SECRET_BYTES}")
    data, (encrypted, plain) = value, _places(name)
    if SERVICE.is_socket():
        blob = _ask("Encrypt", name, {"data": base64.b64encode(value).decode()}, "blob")
        data = "\n".join(textwrap.wrap(blob, 79)).encode() + b"\n"  # in lines, as systemd-creds writes it
        target, other = encrypted, plain
    else:
        target, other = plain, encrypted
    write_bytes(target, data)
    remove_file(other)
    return _entry(name, target)


def read(name: CredentialName) -> Secret:
    """Return the value. Blocks for some 30 ms. Raises NotFound, ConfigError, Unavailable."""
    encrypted, plain = _places(name)
    if (blob := _read_file(name, encrypted)) is not None:
        return Secret(name, _decrypt(name, blob))
    if (value := _read_file(name, plain)) is None:
        raise NotFound(f"there is no credential '{name}'", hint=_set_hint(name))
    found = plain.lstat()
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        message = f"the credential '{plain}' is open to other users, so that it is not used"
        raise ConfigError(message, hint=f"chmod 600 '{plain}'")
    return Secret(name, value)


def stamp(name: CredentialName) -> tuple[int, ...] | None:
    """Return what changes whenever the stored value is written, or None if there is none. Does not wait."""
    for path in _places(name):
        with contextlib.suppress(OSError):
            found = path.stat()
            return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return None


def list_entries() -> list[Entry]:
    """Return all that is stored, by name. Files with names that we would not write are none of ours."""
    found: dict[str, Entry] = {}
    for directory, prefix in ((paths.config() / "credentials", ""), (paths.credentials(), PREFIX)):
        try:
            files = list(directory.iterdir())
        except FileNotFoundError:
            continue
        except OSError as exc:
            raise Failed(f"cannot list '{directory}': {exc.strerror}") from exc
        for path in files:
            name = path.name.removeprefix(prefix)
            if path.name.startswith(prefix) and CREDENTIAL_NAME.fullmatch(name):
                found[name] = _entry(CredentialName(name), path)
    return [found[name] for name in sorted(found)]


def remove(name: CredentialName) -> None:
    """Delete it. Raises NotFound, Failed."""
    found = [path for path in _places(name) if os.path.lexists(path)]
    for path in found:
        remove_file(path)
    if not found:
        raise NotFound(f"there is no credential '{name}'", hint="'nanoclawctl secret list' shows all")


def _entry(name: CredentialName, path: Path) -> Entry:
    encrypted = path == encrypted_path(name)
    return Entry(name=name, path=path, encrypted=encrypted, modified_at=path.stat().st_mtime)


def _decrypt(name: CredentialName, data: bytes) -> bytes:
    try:
        blob = "".join(data.decode("ascii").split())
        return base64.b64decode(_ask("Decrypt", name, {"blob": blob}, "data"), validate=True)
    except (UnicodeDecodeError, binascii.Error) as exc:
        message = f"the credential '{encrypted_path(name)}' is no encrypted credential"
        raise ConfigError(message, hint=_set_hint(name)) from exc


def _ask(method: str, name: CredentialName, parameters: dict[str, str], wanted: str) -> str:
    """Let systemd en- or decrypt for this user, and return one field of its answer."""
    # The name is part of what is authenticated: a blob renamed to another credential does not decrypt.
    asked = {"name": f"{PREFIX}{name}", "scope": "user", **parameters}
    try:
        with Client(SERVICE, timeout_s=SERVICE_S) as client:
            answer = client.call(f"io.systemd.Credentials.{method}", asked).get(wanted)
    except Unavailable as exc:
        message = f"systemd's credential service does not answer: {exc.message}"
        raise Unavailable(message, hint="see 'systemctl status systemd-creds.socket'") from exc
    except VarlinkError as exc:
        message = f"systemd cannot {method.lower()} the credential '{name}': {exc.name}"
        if not exc.name.startswith("io.systemd.Credentials."):  # nothing about this credential: it may pass
            raise Unavailable(message) from exc
        hint = f"it opens only for this user, on this machine, under this name; {_set_hint(name)}"
        raise ConfigError(message, hint=hint) from exc
    if not isinstance(answer, str):
        raise Unavailable(f"systemd's credential service answered without {wanted}")
    return answer


def _set_hint(name: CredentialName) -> str:
    return f"run 'nanoclawctl secret set {name}'"


def _read_file(name: CredentialName, path: Path) -> bytes | None:
    """Return what a file holds, None if there is none. Raises ConfigError."""
    try:
        return read_bytes(path, BLOB_BYTES, flags=os.O_NOFOLLOW)
    except NotFound:
        return None
    except ConfigError as exc:
        raise ConfigError(f"the credential {exc.message}", hint=_set_hint(name)) from None
