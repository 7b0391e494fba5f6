"""The image commands."""

from __future__ import annotations

import os
from argparse import Namespace

from nanoclawd import limits
from nanoclawd.cli import control, output
from nanoclawd.cli.doctor import ask
from nanoclawd.cli.parser import UsageError
from nanoclawd.errors import Failed

WARM_S = 600.0


def image_build(options: Namespace) -> None:
    """Build the agent image: the progress is talk, the id of the image is the result."""
    if options.base and options.base_directory:
        raise UsageError("--base and --base-directory exclude each other")
    directory = options.base_directory
    parameters = {
        "image": options.image,
        "base": options.base,
        # The router runs elsewhere: it needs the whole path.
        "baseDirectory": os.path.abspath(directory) if directory else None,
    }
    image = None
    # A step may be silent for long, e.g. while it compiles.
    for reply in control.stream("BuildImage", parameters, timeout_s=limits.BUILD_S):
        if reply.get("line"):
            output.talk(reply["line"].rstrip("\n"))
        image = reply.get("imageId") or image
    if image is None:
        raise Failed("the build ended without an image", hint="see 'journalctl --user -u nanoclaw'")
    _warm(image)
    if options.json:
        return output.say_json({"imageId": image})
    output.say(image)


def _warm(image: str) -> None:
    """Let Podman map the layers to a user namespace like the agents', else the first answer waits for it."""
    output.talk("Preparing it for the agents' user namespace")
    options = ["--rm", "--pull=never", "--network=none", "--userns=keep-id", "--entrypoint", "/bin/true"]
    code, out = ask("podman", "run", *options, image, timeout_s=WARM_S)
    if code != 0:
        output.talk(f"warning: that failed, so that the first answer will take longer: {out or code}")
