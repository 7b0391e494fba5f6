"""Where files live: the XDG directories of this user, and what we keep below them.

Nothing here touches the file system.
"""

from __future__ import annotations

import os
from pathlib import Path

from nanoclawd import limits
from nanoclawd.errors import ConfigError
from nanoclawd.ids import AgentName, ChannelName, SessionName

#: What is shipped beside the package: quadlets/, agent-image/. The same in a checkout and when installed.
SHARE = Path(__file__).resolve().parent.parent
INTERFACES = Path(__file__).resolve().parent / "interfaces"
SQL = Path(__file__).resolve().parent / "sql"
PRICES = Path(__file__).resolve().parent / "prices.toml"


def _xdg(variable: str, default: str) -> Path:
    value = os.environ.get(variable, "")
    # The XDG specification: a relative path must be ignored.
    return Path(value) if value.startswith("/") else Path.home() / default


def config_home() -> Path:
    return _xdg("XDG_CONFIG_HOME", ".config")


def config() -> Path:
    return config_home() / "nanoclaw"


def agents() -> Path:
    """The directory of NAME.toml and NAME.md files."""
    return config() / "agents"


def channels() -> Path:
    """The directory of the channels' NAME.toml files."""
    return config() / "channels"


def quadlets() -> Path:
    """The directory that Quadlet searches for this user."""
    return config_home() / "containers" / "systemd"


def credentials() -> Path:
    """Where systemd looks for a user's encrypted credentials (systemd-creds(1))."""
    return config_home() / "credstore.encrypted"


def data() -> Path:
    """What is installed for this user alone, beside us."""
    return _xdg("XDG_DATA_HOME", ".local/share") / "nanoclaw"


def state() -> Path:
    return _xdg("XDG_STATE_HOME", ".local/state") / "nanoclaw"


def files() -> Path:
    """Where the files of messages are, see filestore.py."""
    return state() / "files"


def agent_state(agent: AgentName) -> Path:
    return state() / "agents" / agent


def channel_state(channel: ChannelName) -> Path:
    """The directory that the channel's adapter alone writes."""
    return state() / "channels" / channel


def workspace(agent: AgentName) -> Path:
    return agent_state(agent) / "workspace"


def session_state(agent: AgentName, session: SessionName) -> Path:
    return agent_state(agent) / "sessions" / session


def runtime_home() -> Path:
    value = os.environ.get("XDG_RUNTIME_DIR", "")
    if not value.startswith("/"):
        raise ConfigError(
            "XDG_RUNTIME_DIR is not set",
            hint="log in through PAM (ssh, a console, machinectl shell), not by su or sudo",
        )
    return Path(value)


def runtime() -> Path:
    return runtime_home() / "nanoclaw"


def control_socket() -> Path:
    return _short(runtime() / "control" / "io.nanoclaw.Control")


def terminal_socket() -> Path:
    """The socket of the channel "terminal", which is nanoclawctl's."""
    return _short(runtime() / "channel" / "io.nanoclaw.Channel")


def channel_socket(channel: ChannelName) -> Path:
    """The socket of any other channel; its adapter sees this directory and no other of ours."""
    return _short(runtime() / "channels" / channel / "io.nanoclaw.Channel")


def gateway_socket() -> Path:
    return _short(runtime() / "gateway" / "io.nanoclaw.Gateway")


def podman_socket() -> Path:
    return runtime_home() / "podman" / "podman.sock"


def session_runtime(agent: AgentName, session: SessionName) -> Path:
    """The directory that one container sees, read-only, as /run/nanoclaw."""
    return runtime() / "agents" / agent / session


def _short(path: Path) -> Path:
    """Return `path` if a socket can have it."""
    if len(os.fsencode(path)) >= limits.SUN_PATH_MAX:
        raise ConfigError(
            f"the socket path '{path}' is longer than {limits.SUN_PATH_MAX - 1} bytes",
            hint="set XDG_RUNTIME_DIR to a shorter directory; it is normally /run/user/UID",
        )
    return path
