"""Files both ways: in pieces, within a limit, through files without a name."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import mimetypes
import os
import re
import secrets
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from Crypto.Cipher import AES

from nanoclaw_matrix.homeserver import CHUNK_BYTES, TRANSFER_S, Homeserver, Refused
from nanoclaw_matrix.inbound import Attachment, Malformed, clean_name

MXC = re.compile(r"mxc://([^/?#\s]{1,255})/([A-Za-z0-9_-]{1,255})")
Json = dict[str, Any]


class TooLarge(Exception):
    """A file is larger than this channel takes."""


async def download(client: Homeserver, attachment: Attachment, directory: Path, max_bytes: int) -> int:
    """Return a descriptor of the file, decrypted, to be read only; the caller closes it.

    It has no name in `directory`, so nothing is left of it. Raises TooLarge, Malformed, Away, Refused.
    """
    found = MXC.fullmatch(attachment.url)
    if found is None:
        raise Malformed("url: must be mxc://")
    if attachment.size > max_bytes:
        raise TooLarge
    cipher = None if attachment.key is None else _Decryption(attachment.key)
    path = f"/_matrix/client/v1/media/download/{quote(found[1], safe='')}/{found[2]}"
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        size = 0
        async with client.exchange("GET", path, timeout_s=TRANSFER_S) as answer:
            async for piece in answer.content.iter_chunked(CHUNK_BYTES):
                size += len(piece)
                if size > max_bytes:
                    raise TooLarge
                file.write(piece if cipher is None else cipher.decrypt(piece))
        if cipher is not None:
            cipher.check()
        file.flush()
        return os.open(file.name, os.O_RDONLY | os.O_CLOEXEC)


async def upload(client: Homeserver, fd: int, file: Json, *, encrypted: bool, max_bytes: int) -> Json:
    """Send the file behind `fd` to the homeserver; returns what an event says of it.

    file: a File of io.nanoclaw.Channel. Raises TooLarge, Away, Refused.
    """
    size = os.fstat(fd).st_size
    if size > max_bytes:
        raise TooLarge
    name = clean_name(str(file["name"]))
    media_type = str(file["mediaType"]) or mimetypes.guess_type(name)[0] or "application/octet-stream"
    cipher = _Encryption() if encrypted else None
    # Of an encrypted file the homeserver learns neither name nor kind.
    path = "/_matrix/media/v3/upload" + ("" if encrypted else f"?filename={quote(name, safe='')}")
    headers = {
        "Content-Type": "application/octet-stream" if encrypted else media_type,
        "Content-Length": str(size),
    }
    async with client.exchange(
        "POST", path, _pieces(fd, size, cipher), timeout_s=TRANSFER_S, headers=headers
    ) as answer:
        body = await answer.json()
    url = body.get("content_uri") if isinstance(body, Mapping) else None
    if not isinstance(url, str) or MXC.fullmatch(url) is None:
        raise Refused(200, "", "its answer to the upload has no mxc:// address")
    kind = media_type.split("/")[0]
    content: Json = {
        "msgtype": f"m.{kind}" if kind in ("image", "audio", "video") else "m.file",
        "body": name,
        "filename": name,
        "info": {"mimetype": media_type, "size": size},
    }
    if cipher is None:
        content["url"] = url
    else:
        content["file"] = {"url": url, **cipher.describe()}
    return content


async def _pieces(fd: int, size: int, cipher: _Encryption | None) -> AsyncIterator[bytes]:
    offset = 0
    while offset < size:
        piece = await asyncio.to_thread(os.pread, fd, min(CHUNK_BYTES, size - offset), offset)
        if not piece:
            raise OSError("the file became shorter")
        offset += len(piece)
        yield piece if cipher is None else cipher.encrypt(piece)


class _Encryption:
    """AES-CTR with a key of its own, and the hash of what came out.

    Specification: "Sending encrypted attachments".
    """

    def __init__(self) -> None:
        self._key, self._prefix = secrets.token_bytes(32), secrets.token_bytes(8)
        self._cipher = AES.new(self._key, AES.MODE_CTR, nonce=self._prefix)
        self._hash = hashlib.sha256()

    def encrypt(self, piece: bytes) -> bytes:
        done = self._cipher.encrypt(piece)
        self._hash.update(done)
        return done

    def describe(self) -> Json:
        """Return what a client needs to decrypt it."""
        key = {
            "kty": "oct",
            "alg": "A256CTR",
            "ext": True,
            "key_ops": ["encrypt", "decrypt"],
            "k": base64.urlsafe_b64encode(self._key).decode().rstrip("="),
        }
        return {
            "v": "v2",
            "key": key,
            "iv": _base64(self._prefix + bytes(8)),
            "hashes": {"sha256": _base64(self._hash.digest())},
        }


class _Decryption:
    def __init__(self, described: Mapping[str, Any]) -> None:
        try:
            key = base64.urlsafe_b64decode(described["key"]["k"] + "===")
            iv = base64.b64decode(described["iv"] + "===")
            self._expected = base64.b64decode(described["hashes"]["sha256"] + "===")
            counter = int.from_bytes(iv[8:16])
            self._cipher = AES.new(key, AES.MODE_CTR, nonce=iv[:8], initial_value=counter)
        except (KeyError, TypeError, ValueError) as exc:
            raise Malformed("file: has no key that can be used") from exc
        self._hash = hashlib.sha256()

    def decrypt(self, piece: bytes) -> bytes:
        self._hash.update(piece)
        return self._cipher.decrypt(piece)

    def check(self) -> None:
        """Raise Malformed if what came is not what was sent."""
        if self._hash.digest() != self._expected:
            raise Malformed("file: is not what its sender encrypted")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode().rstrip("=")
