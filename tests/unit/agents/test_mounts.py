"""The allow-list of mounts: what is granted, what never is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoclawd.agents import Mount
from nanoclawd.errors import ConfigError
from nanoclawd.mounts import AllowedMount, BindMount, resolve_mounts


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a home directory with projects, and with what must stay private."""
    home = tmp_path / "home"
    for name in (
        "projects/site",
        ".ssh",
        ".config/gcloud",
        ".local/state/nanoclaw",
        "bin",
        "Documents/my notes",
    ):
        (home / name).mkdir(parents=True)
    (home / "projects/todo.txt").write_text("")
    (home / ".netrc").write_text("")
    for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    return home


def allow(path: Path | str, *, read_only: bool = True) -> AllowedMount:
    return AllowedMount(path=Path(path), read_only=read_only)


def mount(source: Path | str, target: str = "/mnt/x", *, read_only: bool = True) -> Mount:
    return Mount(source=str(source), target=target, read_only=read_only)


def refusal(mounts: list[Mount], allowed: list[AllowedMount]) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve_mounts(mounts, allowed)
    return str(caught.value)


def test_what_is_allowed_is_mounted(home: Path) -> None:
    wanted = [mount("~/projects/site"), mount(home / "projects/todo.txt", "/mnt/todo.txt")]

    assert resolve_mounts(wanted, [allow("~/projects")]) == (
        BindMount(source=home / "projects/site", target="/mnt/x", read_only=True),
        BindMount(source=home / "projects/todo.txt", target="/mnt/todo.txt", read_only=True),
    )


def test_an_empty_or_broken_allow_list_denies(home: Path) -> None:
    for allowed in ([], [allow(home / "missing")], [allow("projects")], [allow("~nobody-here/x")]):
        assert "is not allowed" in refusal([mount("~/projects")], allowed)


def test_writing_needs_an_entry_that_says_so(home: Path) -> None:
    wanted = [mount("~/projects/site", read_only=False)]

    assert "read-only" in refusal(wanted, [allow("~/projects")])
    assert not resolve_mounts(wanted, [allow("~/projects"), allow("~/projects/site", read_only=False)])[
        0
    ].read_only
    assert "read-only" in refusal(
        [mount("~/projects", read_only=False)],
        [allow("~/projects/site", read_only=False), allow("~/projects")],
    )


@pytest.mark.parametrize(
    "source",
    [
        *("~", "~/..", "/", "~/.ssh", "~/.ssh/..", "~/.config", "~/.config/gcloud", "~/.netrc", "~/.local"),
        *(
            "~/.local/state/nanoclaw",
            "~/bin",
            "~/projects/../.ssh",
            "/etc",
            "/etc/passwd",
            "/proc/self",
            "/run",
        ),
        *("/var", "/usr/bin", "/root", "/dev", "/dev/null", "/sys"),
    ],
)
def test_private_paths_are_refused_whatever_is_allowed(home: Path, source: str) -> None:
    (home / "anything").write_text("")

    refusal(
        [mount(source)],
        [allow("/", read_only=False), allow(home, read_only=False), allow(source, read_only=False)],
    )


def test_symlinks_are_followed_before_they_are_judged(home: Path) -> None:
    (home / "projects/keys").symlink_to(home / ".ssh")
    (home / "projects/loop").symlink_to("loop")
    (home / "projects/outside").symlink_to(home / "Documents")
    (home / "alias").symlink_to(home / "projects")

    assert ".ssh' is never shown" in refusal(
        [mount("~/projects/keys")], [allow("~/projects"), allow("~/.ssh")]
    )
    assert "no such file" in refusal([mount("~/projects/loop")], [allow("~/projects")])
    assert "is not allowed" in refusal([mount("~/projects/outside")], [allow("~/projects")])
    assert resolve_mounts([mount("~/alias/site")], [allow("~/alias")])[0].source == home / "projects/site"


def test_a_private_directory_that_lives_elsewhere_is_private_there(home: Path) -> None:
    (home / "vault/gnupg").mkdir(parents=True)
    (home / ".gnupg").symlink_to(home / "vault/gnupg")
    (home / "dotfiles/systemd").mkdir(parents=True)
    (home / ".config/systemd").symlink_to(home / "dotfiles/systemd")

    for source in ("~/vault/gnupg", "~/vault", "~/dotfiles"):
        assert "is never shown" in refusal([mount(source)], [allow(home)])


@pytest.mark.parametrize(
    "target",
    [
        *(
            "/",
            "/mnt",
            "/mnt/",
            "/workspace/x",
            "/etc",
            "/mnt/../etc",
            "/mnt/a/../../run",
            "mnt/a",
            "/mnt//a",
        ),
        *("/mnt/a:ro", "/mnt/a\n", "/mnt/ä", "/mnt/%i", "/mnt/.", "/run/nanoclaw", ""),
    ],
)
def test_targets_are_below_mnt_and_have_one_spelling(home: Path, target: str) -> None:
    assert "target" in refusal([mount("~/projects", target)], [allow("~/projects")])


def test_sources_that_podman_cannot_name_are_refused(home: Path) -> None:
    (home / "projects/a:b").mkdir()
    (home / "projects/a\nb").mkdir()
    os.mkfifo(home / "projects/fifo")

    for name in ("a:b", "a\nb"):
        assert "cannot mount" in refusal([mount(home / "projects" / name)], [allow("~/projects")])
    assert "neither a directory" in refusal([mount("~/projects/fifo")], [allow("~/projects")])


def test_mounts_must_not_hide_or_undermine_each_other(home: Path) -> None:
    allowed = [allow("~/projects", read_only=False)]

    assert "hide" in refusal([mount("~/projects", "/mnt/a"), mount("~/projects/site", "/mnt/a/b")], allowed)
    assert "agent may write" in refusal(
        [mount("~/projects", "/mnt/a", read_only=False), mount("~/projects/site", "/mnt/b")], allowed
    )


@given(source=st.text(), target=st.text())
def test_any_text_is_refused_without_an_allow_list(source: str, target: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", "/run/user/0")
        refusal([Mount(source=source, target=target)], [])
