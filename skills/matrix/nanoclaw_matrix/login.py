"""Being logged in: one device, kept over restarts, with its token and keys."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from urllib.parse import quote

from nanoclaw_matrix.homeserver import Homeserver, LoggedOut, Refused, required_text
from nanoclaw_matrix.settings import Settings, read_credential
from nanoclaw_matrix.store import Store

DEVICE_NAME = "NanoClaw"


class LoginRefused(Exception):
    """Somebody must store another password or token."""


def known_account(settings: Settings, store: Store) -> str:
    """Return the account's id as it is known before logging in."""
    saved: dict[str, str] = json.loads(store.get("login") or "{}")
    return saved.get("user", settings.user)


async def log_in(settings: Settings, store: Store, directory: Path) -> Homeserver:
    """Return the account, with the device that it had before if there is one.

    Raises LoginRefused, SettingsError, and Away, in which case nothing has changed.
    """
    saved = json.loads(store.get("login") or "{}")
    if saved and (saved["homeserver"] != settings.homeserver or not (directory / "crypto.db").exists()):
        saved = {}  # the keys belong to the device: without them it is worth nothing, so another is made
        store.put("position", None)
        store.put("cross-signing", None)
    if not saved:
        (directory / "crypto.db").unlink(missing_ok=True)
    client = Homeserver(settings.homeserver, settings.user, directory)
    try:
        if saved:
            client.access_token = saved["token"]
            try:
                await client.fetch("GET", "/_matrix/client/v3/account/whoami")
            except LoggedOut:
                client.access_token = ""
        if not client.access_token:
            saved = await _new_token(client, settings, saved.get("device"))
            store.put("login", json.dumps(saved))
        client.restore_login(saved["user"], saved["device"], saved["token"])
        await _show_profile(client, settings)
    except BaseException:
        await client.close()
        raise
    return client


async def _new_token(client: Homeserver, settings: Settings, device: str | None) -> dict[str, str]:
    credential = read_credential()
    try:
        if settings.token:
            client.access_token = credential
            answer = await client.fetch("GET", "/_matrix/client/v3/account/whoami")
            answer["access_token"] = credential
            if device is not None and answer.get("device_id") != device:
                raise LoginRefused(
                    "the token is of another device; remove the channel's state to begin anew"
                )
        else:
            answer = await client.fetch(
                "POST",
                "/_matrix/client/v3/login",
                {
                    "type": "m.login.password",
                    "identifier": {"type": "m.id.user", "user": settings.user},
                    "password": credential,
                    # The same device again, if it had only been logged out: its keys are still good.
                    "device_id": device or f"NANOCLAW{secrets.token_hex(4).upper()}",
                    "initial_device_display_name": DEVICE_NAME,
                },
            )
    except Refused as exc:
        what = "token" if settings.token else "password"
        raise LoginRefused(f"the homeserver does not take the {what} of {settings.user}: {exc}") from exc
    finally:
        client.access_token = ""
    return {
        "homeserver": settings.homeserver,
        "user": required_text(answer, "user_id"),
        "device": required_text(answer, "device_id"),
        "token": required_text(answer, "access_token"),
    }


async def _show_profile(client: Homeserver, settings: Settings) -> None:
    """Show the name and the picture that a person has set for the account."""
    path = f"/_matrix/client/v3/profile/{quote(client.user_id, safe='')}"
    for name, value in (("displayname", settings.display_name), ("avatar_url", settings.avatar)):
        if value and (await client.fetch("GET", path)).get(name) != value:
            await client.fetch("PUT", f"{path}/{name}", {name: value})
