"""Images of agents: asked for, imported and built over Podman's REST socket.

Podman's own client library costs 20 MB and a third of a second, so it works in a short-lived child: this
module run as a program, `python -m nanoclawd.images exists|build …`, prints JSON lines. When it is ended,
so is the work.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import socket
import sys
import tarfile
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from nanoclawd import limits, paths, programs
from nanoclawd.agents import DEFAULT_IMAGE
from nanoclawd.errors import ConfigError, Failed, NanoclawError, NotFound, Unavailable

BASE_IMAGE = "localhost/nanoclaw-base:latest"  #: what a base directory's base.tar becomes
BASE_LABEL = "io.nanoclaw.base"  #: on that image: the SHA-256 of the tar
MAKE_BASE = "make it with agent-image/make-base"
LAST_LINES = 12  #: of a build that failed, in its error
LINE_CHARACTERS = 4096
CHUNK_BYTES = 1 << 20
ERRORS = {kind.code: kind for kind in (ConfigError, Failed, NotFound, Unavailable)}
Progress = Callable[[str], Awaitable[None]]


# --- the router's side ------------------------------------------------------------------------------


async def image_exists(reference: str) -> bool:
    """Say whether the image is in the person's storage. Raises Unavailable if Podman does not answer."""
    return bool(await _ask("exists", {"reference": reference}, timeout_s=limits.PODMAN_S))


async def require_image(reference: str) -> None:
    """Raise NotFound, with what to do, if there is no such image; Unavailable if Podman does not answer."""
    if not await image_exists(reference):
        raise NotFound(f"there is no image '{reference}'", hint=f"run: {build_command(reference)}")


def build_command(reference: str) -> str:
    return "nanoclawctl image build" + ("" if reference == DEFAULT_IMAGE else f" --image {reference}")


async def build_image(
    image: str = DEFAULT_IMAGE,
    *,
    base: str | None = None,
    base_directory: Path | None = None,
    progress: Progress | None = None,
) -> str:
    """Build agent-image/ as `image` and return its id; each line of output goes to `progress` as it comes.

    base: the image to build on, else what the Containerfile says. base_directory: made by
    agent-image/make-base; its base.tar is imported as the base, its wheelhouse/ stands in for the network.
    A cancel ends the build.

    Raises Failed with the last lines, ConfigError for a wrong directory, Unavailable if Podman is away.
    """
    request = {"image": image, "base": base, "directory": str(base_directory) if base_directory else None}
    return str(await _ask("build", request, timeout_s=limits.BUILD_S, progress=progress))


async def _ask(
    verb: str, request: dict[str, Any], *, timeout_s: float, progress: Progress | None = None
) -> Any:
    """Run the child for one request and return its result, or raise the error that it names."""
    command = [sys.executable, "-m", "nanoclawd.images", verb, json.dumps(request)]
    outcome: dict[str, Any] = {}
    try:
        async with (
            asyncio.timeout(timeout_s),
            programs.start(command, env={"PYTHONPATH": str(paths.SHARE)}) as child,
        ):
            assert child.stdout is not None and child.stderr is not None
            async for line in child.stdout:
                said = json.loads(line)
                if "line" not in said:
                    outcome = said
                elif progress is not None:
                    await progress(said["line"])
            # A traceback at most, so it fits into the pipe while we read the other one.
            trouble = (await child.stderr.read()).decode(errors="replace")
    except TimeoutError:
        raise Failed(f"Podman took longer than {timeout_s:g} s to {verb} an image") from None
    if "error" in outcome:
        raise ERRORS[outcome["error"]](outcome["message"], hint=outcome["hint"])
    if "result" not in outcome:
        raise Failed(f"the program that talks to Podman ended early: {trouble.strip()[-400:]}")
    return outcome["result"]


# --- the child's side -------------------------------------------------------------------------------


def main() -> None:
    """Answer one request: argv is a verb and its parameters as JSON."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        _say({"result": _answer(sys.argv[1], json.loads(sys.argv[2]))})
    except NanoclawError as exc:
        _say({"error": exc.code, "message": exc.message, "hint": exc.hint})


def _answer(verb: str, request: dict[str, Any]) -> object:
    path = paths.podman_socket()
    with socket.socket(socket.AF_UNIX) as probe:  # the client library would bury the reason
        try:
            probe.connect(str(path))
        except OSError as exc:
            hint = "run: systemctl --user start podman.socket"
            raise Unavailable(f"Podman does not answer at '{path}': {exc.strerror}", hint=hint) from None
    import requests
    from podman import PodmanClient, errors

    try:
        return VERBS[verb](PodmanClient(base_url=f"http+unix://{path}").api, **request)
    except errors.APIError as exc:
        raise Failed(f"Podman: {exc.explanation or exc}") from None
    except requests.exceptions.RequestException as exc:
        hint = "see: journalctl --user -u podman.service"
        raise Unavailable(f"Podman broke off: {exc}", hint=hint) from None


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def _ask_of_image(api: Any, image: str, what: str) -> Any:
    """Return Podman's response, or None if there is no such image."""
    response = api.get(f"/images/{image}/{what}")
    if response.status_code == 404:
        return None
    response.raise_for_status()
    return response


def _exists(api: Any, reference: str) -> bool:
    return _ask_of_image(api, reference, "exists") is not None


def _build(api: Any, image: str, base: str | None, directory: str | None) -> str:
    parameters = {"t": image, "dockerfile": "Containerfile", "layers": "true"}
    parameters |= {"rm": "true", "forcerm": "true"}
    wheelhouse = None
    if directory is not None:
        base = base or BASE_IMAGE
        _import_base(api, Path(directory) / "base.tar", base)
        wheelhouse = Path(directory) / "wheelhouse"
        if not wheelhouse.is_dir():
            raise ConfigError(f"{wheelhouse}: there is no such directory", hint=MAKE_BASE)
        parameters |= {"networkmode": "none", "pullpolicy": "never"}
    if base is not None:
        parameters["buildargs"] = json.dumps({"BASE": base})
    context = _context(paths.SHARE / "agent-image", wheelhouse)
    response = api.post("/build", params=parameters, data=context, stream=True)
    response.raise_for_status()
    last: deque[str] = deque(maxlen=LAST_LINES)
    for event in response.iter_lines(chunk_size=None):  # None: each as it comes
        said = json.loads(event)
        if "error" in said:
            last.append(str(said["error"]).strip())
            break
        for line in said.get("stream", "").splitlines():
            last.append(line)
            _say({"line": line[:LINE_CHARACTERS]})
    else:
        built = _ask_of_image(api, image, "json")
        # The last line of a build that worked is the id; an image of that name may also be from before.
        if last and built and built.json()["Id"].startswith(last[-1].removeprefix("sha256:") or "?"):
            return str(built.json()["Id"])
    raise Failed(
        "\n".join(["the image was not built:", *last]),
        hint="agents go on with the image that they have; without a registry see agent-image/make-base",
    )


def _import_base(api: Any, tar: Path, image: str) -> None:
    """Import a root file system as an image, unless that image was made of the same tar."""
    try:
        file = tar.open("rb")
    except OSError as exc:
        raise ConfigError(f"{tar}: cannot be read: {exc.strerror}", hint=MAKE_BASE) from None
    with file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        present = _ask_of_image(api, image, "json")
        if present and (present.json().get("Labels") or {}).get(BASE_LABEL) == digest:
            return
        _say({"line": f"Importing {tar} as {image}"})
        file.seek(0)
        parameters = {"reference": image, "changes": f"LABEL {BASE_LABEL}={digest}"}
        api.post("/images/import", params=parameters, data=_chunks(file)).raise_for_status()


def _context(directory: Path, wheelhouse: Path | None) -> Iterator[bytes]:
    """Yield the build's context as a tar while it is made: the wheelhouse is large."""
    reader, writer = os.pipe()

    def write() -> None:
        with open(writer, "wb") as file, tarfile.open(fileobj=file, mode="w|") as tar:
            tar.add(directory, arcname=".", filter=_context_member)
            if wheelhouse is not None:
                tar.add(wheelhouse, arcname="wheelhouse", filter=_context_member)

    # Daemon: if Podman stops reading, the program must end all the same.
    threading.Thread(target=write, name="context", daemon=True).start()
    with open(reader, "rb") as file:
        yield from _chunks(file)


def _context_member(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if "__pycache__" in member.name.split("/"):
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _chunks(file: IO[bytes]) -> Iterable[bytes]:
    return iter(partial(file.read, CHUNK_BYTES), b"")


VERBS: dict[str, Callable[..., object]] = {"exists": _exists, "build": _build}

if __name__ == "__main__":
    main()
