"""What a person says about one account: the table [matrix] of the channel's file, and its credential."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = ("localhost", "127.0.0.1", "::1")


class SettingsError(Exception):
    """Somebody must edit the channel's file, or store its credential anew."""


class Devices(StrEnum):
    """Which devices of a room's members get the keys of what is sent there."""

    ALL = "all"  #: every one, as most clients do
    VERIFIED = "verified"  #: those that were verified, or are named by `trusted`


class Names(StrEnum):
    """When a message begins with the name of the agent that sent it."""

    AUTO = "auto"  #: where more than one agent has written
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """One account."""

    homeserver: str  #: base URL without the last slash
    user: str  #: "@claw:example.org", or the part before the colon
    token: bool = False  #: the credential is an access token and no password
    display_name: str = ""  #: "": as it is
    avatar: str = ""  #: mxc:// address; "": as it is
    avatars: dict[str, str] = field(default_factory=dict)  #: agent -> mxc:// address
    names: Names = Names.AUTO
    verifiers: frozenset[str] = frozenset()  #: accounts whose requests to verify are answered
    trusted: frozenset[str] = frozenset()  #: Ed25519 fingerprints of devices
    devices: Devices = Devices.ALL
    max_file_bytes: int = 32 * 1024 * 1024


def parse_settings(text: str, where: str) -> Settings:
    """Return what a channel's file says. Raises SettingsError, which names the setting."""
    try:
        table = tomllib.loads(text).get("matrix")
    except tomllib.TOMLDecodeError as exc:
        raise SettingsError(f"{where}: {exc}") from exc
    if not isinstance(table, dict):
        raise SettingsError(f"{where}: there is no table [matrix]; it needs homeserver= and user=")
    reader = _Reader(table, f"{where}: [matrix]")
    homeserver = reader.text("homeserver").rstrip("/")
    url = urlsplit(homeserver)
    if url.scheme not in ("http", "https") or not url.hostname:
        reader.refuse("homeserver", "must be a URL as https://matrix.example.org")
    if url.scheme == "http" and url.hostname not in LOOPBACK:
        reader.refuse("homeserver", "must begin with https://, unless it is on this machine")
    user = reader.text("user")
    if not user:
        reader.refuse("user", "must not be empty")
    login = reader.choice("login", ("password", "token"), "password")
    avatars = reader.table.pop("avatars", {})
    if not isinstance(avatars, dict) or not all(_is_mxc(value) for value in avatars.values()):
        reader.refuse("avatars", 'must be a table as {demo = "mxc://example.org/abc"}')
    avatar = reader.text("avatar", "")
    if avatar and not _is_mxc(avatar):
        reader.refuse("avatar", "must begin with mxc://")
    mebibytes = reader.table.pop("max_file_mib", 32)
    if type(mebibytes) is not int or not 0 <= mebibytes <= 1024:
        reader.refuse("max_file_mib", "must be a whole number from 0 to 1024")
    settings = Settings(
        homeserver=homeserver,
        user=user,
        token=login == "token",
        display_name=reader.text("display_name", ""),
        avatar=avatar,
        avatars=avatars,
        names=Names(reader.choice("names", tuple(Names), Names.AUTO)),
        verifiers=reader.texts("verifiers"),
        trusted=frozenset(text.replace(" ", "") for text in reader.texts("trusted")),
        devices=Devices(reader.choice("devices", tuple(Devices), Devices.ALL)),
        max_file_bytes=mebibytes * 1024 * 1024,
    )
    for name in reader.table:
        reader.refuse(name, "is no setting of this adapter")
    return settings


def read_settings() -> Settings:
    """Return the settings of the file that the router names. Raises SettingsError."""
    path = os.environ.get("NANOCLAW_CHANNEL_CONFIG", "")
    try:
        return parse_settings(Path(path).read_text(encoding="utf-8"), Path(path).name)
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsError(f"cannot read '{path}': {exc}") from exc


def read_credential() -> str:
    """Return password or token, without a last newline. Raises SettingsError."""
    path = Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nowhere")) / "login"
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsError("no password or token is stored for this channel") from exc


def _is_mxc(value: object) -> bool:
    return isinstance(value, str) and value.startswith("mxc://")


class _Reader:
    """Takes settings out of a table; what is left at the end is unknown."""

    def __init__(self, table: dict[str, Any], where: str) -> None:
        self.table = dict(table)
        self._where = where

    def refuse(self, name: str, reason: str) -> None:
        raise SettingsError(f"{self._where} {name}= {reason}")

    def text(self, name: str, default: str | None = None) -> str:
        value = self.table.pop(name, default)
        if not isinstance(value, str) or not value.isprintable():
            self.refuse(name, "must be a line of text")
        return str(value)

    def texts(self, name: str) -> frozenset[str]:
        value = self.table.pop(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.refuse(name, "must be a list of texts")
        return frozenset(value)

    def choice(self, name: str, choices: tuple[str, ...], default: str) -> str:
        value = self.text(name, default)
        if value not in choices:
            self.refuse(name, f"must be one of {', '.join(choices)}")
        return value
