"""The image commands."""

from __future__ import annotations

import os
from argparse import Namespace

from nanoclawd import limits
from nanoclawd.cli import control, output
from nanoclawd.cli.parser import UsageError
from nanoclawd.errors import Failed


def build(options: Namespace) -> None:
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
    if options.json:
        output.say_json({"imageId": image})
    else:
        output.say(image)
