"""What a provider's tools have done in chats: files both ways, questions to people."""

from __future__ import annotations

import base64
import mimetypes
import os
import stat
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from .provider import Message, Stopped
from .turn import Chat, Outcome, clean

_CHUNK_BYTES = 512 * 1024  # io.nanoclaw.Agent
_UPLOADS = 5  # begun anew, since the router was restarted or the file has changed
_NAME_CHARS = 100

# One at a time of each: the router takes no more of a connection, and a person answers no more.
_uploading, _asking = threading.Lock(), threading.Lock()


def send_file(chat: Chat, key: str, path: Path, caption: str, destination: str | None = None) -> Outcome:
    """Send a file now. Raises Stopped, ValueError, OSError."""
    # The router follows no path: what is at the end of one is read here, as the agent itself could.
    with _uploading, open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        for _ in range(_UPLOADS):
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise ValueError(f"{path} is not a regular file")
            said = {
                "name": path.name,
                "mediaType": mimetypes.guess_type(path.name)[0] or "",
                "bytes": state.st_size,
                "caption": clean(caption),
                "destination": destination,
            }
            answer = chat.request("SendFile", key=key, **said)
            if answer["outcome"] is not None:
                outcome: Outcome = answer["outcome"]
                return outcome
            _upload(chat, key, file, state.st_size)
    raise ValueError(f"{path} changes while it is sent")


def _upload(chat: Chat, key: str, file: BinaryIO, size: int) -> None:
    """Hand over `size` bytes of a file, from where the router says."""
    offset, is_begun = 0, False
    while offset < size or not is_begun:
        file.seek(offset)
        data = file.read(min(_CHUNK_BYTES, size - offset))
        if not data and size > offset:  # it has become shorter
            return
        part = base64.b64encode(data).decode()
        offset, is_begun = chat.request("PutFile", key=key, offset=offset, data=part)["received"], True
        if chat.stopping.is_set():
            raise Stopped


def save_files(chat: Chat, message: Message, workspace: str) -> list[Path]:
    """Store the files of a message in the workspace, unless that is done; return where they are.

    Raises Stopped, ValueError, OSError.
    """
    saved: list[Path] = []
    for number, file in enumerate(message.get("files", [])):  # an older router knows of none
        directory = Path(workspace, "inbox", message["id"])
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / _safe_name(file["name"])
        if path in saved:
            path = directory / f"{number}-{path.name}"
        if not path.exists():
            _download(chat, file["id"], path)
        saved.append(path)
    return saved


def _download(chat: Chat, id: str, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.part")
    with open(temporary, "wb") as file:
        while data := base64.b64decode(chat.request("ReadFile", id=id, offset=file.tell())["data"]):
            file.write(data)
    temporary.rename(path)


def _safe_name(name: str) -> str:
    """Return a name that is no path and hides nothing, whatever the router lets through."""
    plain = "".join(c if c.isprintable() and c != "/" else "_" for c in name).lstrip(".")
    return plain[-_NAME_CHARS:] or "file"


def ask(
    chat: Chat, key: str, question: str, options: Sequence[str], timeout_s: int
) -> tuple[str, str] | None:
    """Ask people of the chat; return the answer and the account that gave it, None if nobody did in time.

    Raises Stopped, ValueError.
    """
    said = {"question": clean(question), "options": [clean(option) for option in options]}
    with _asking:
        while True:
            answer = chat.request_apart("AskPerson", key=key, timeoutSeconds=timeout_s, **said)
            if answer["state"] == "answered":
                return answer["answer"], answer["sender"]
            if answer["state"] == "expired":
                return None
