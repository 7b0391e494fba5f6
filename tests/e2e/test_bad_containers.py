"""Containers that do not come to work: the chat gets one honest line, and other agents notice nothing."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.machine import Machine
from tests.support.product import Product

BASE = "localhost/nanoclaw-agent:latest"
MISSING = "localhost/nanoclaw-missing:1"
# A process with pid 1 has no default action for SIGTERM.
SLEEPER = '["sh", "-c", "trap \'exit 0\' TERM; sleep infinity & wait"]'
OTHER_PROTOCOL = "RUN cd /opt/nanoclaw/lib/runner && rm -r __pycache__ && "
OTHER_PROTOCOL += "sed -i 's/^PROTOCOL = .*/PROTOCOL = 7/' $(grep -l '^PROTOCOL = ' *.py)"
#: Lines of a Containerfile after FROM, by the image's name.
IMAGES = {
    "localhost/nanoclaw-exits:1": 'ENTRYPOINT ["false"]',
    "localhost/nanoclaw-absent:1": 'ENTRYPOINT ["/no/such/program"]',
    "localhost/nanoclaw-leaves:1": 'ENTRYPOINT ["true"]',
    "localhost/nanoclaw-silent:1": f"ENTRYPOINT {SLEEPER}",
    "localhost/nanoclaw-other:1": f"USER root\n{OTHER_PROTOCOL}\nUSER 2000",
}
#: So that a test need not wait for a minute, or for four attempts of them.
HURRY = "[Service]\nTimeoutStartSec=5\nTimeoutStopSec=2\n"


@pytest.fixture
def images(machine: Machine) -> Iterator[None]:
    """Make the images; those that are there are kept until the machine goes."""
    for name, lines in IMAGES.items():
        build = ("podman", "build", "--quiet", "--network=none", "--pull=never", "--tag", name, "-")
        machine.run(*build, input=f"FROM {BASE}\n{lines}\n")
    yield
    machine.run("podman", "image", "rm", "--force", *IMAGES)


def ask(product: Product, agent: str) -> subprocess.CompletedProcess[str]:
    return product.ctl("send", agent, "hello", "--wait", check=False, timeout_s=90)


def test_an_agent_with_a_missing_image_is_not_added(product: Product) -> None:
    other = product.add("other")
    name = f"{other}x"

    refused = product.ctl("agent", "add", name, "--provider", "echo", "--image", MISSING, check=False)
    changed = product.ctl("agent", "set", other, "--image", MISSING, check=False)

    for answer in (refused, changed):
        assert (answer.returncode, answer.stdout, answer.stderr) == (
            5,
            "",
            f"error: there is no image '{MISSING}'\nhint: run: nanoclawctl image build --image {MISSING}\n",
        )
    assert product.ctl("agent", "show", name, check=False).returncode == 4
    assert product.send(other, "still there") == "still there"


def test_runners_that_do_not_come_to_work_end_in_one_line_each(
    product: Product, machine: Machine, images: None
) -> None:
    other = product.add("other")
    agents = {
        name: product.add(name, "--image", f"localhost/nanoclaw-{name}:1")
        for name in ("exits", "absent", "leaves", "silent")
    }
    agents["protocol"] = product.add("protocol", "--image", "localhost/nanoclaw-other:1")
    drop_in = product.ask("agent", "show", agents["silent"])["dropInDirectory"]
    product.write(f"{drop_in}/50-local.conf", HURRY)
    machine.systemctl("daemon-reload")

    machine.expect_journal("^nanoclaw-.*@terminal_[0-9]+.* <[34]> |^- <3> protocol-mismatch")
    sending = {name: product.send_later(agent, "hello") for name, agent in agents.items()}
    meanwhile = product.send(other, "still there")
    answers = {name: process.communicate(timeout=120)[0] for name, process in sending.items()}

    logs = {name: f"'nanoclawctl agent logs {agent}' shows more" for name, agent in agents.items()}
    assert answers == {
        name: f"Your message could not be answered: {reason}\n"
        for name, reason in {
            "exits": f"its runner exited at once with status 1; {logs['exits']}",
            "absent": f"podman could not start its container (status 127); {logs['absent']}",
            "leaves": f"its runner left without a word; {logs['leaves']}",
            "silent": f"its runner did not say hello in time; {logs['silent']}",
            "protocol": "its image 'localhost/nanoclaw-other:1' is of another version of NanoClaw; "
            "run: nanoclawctl image build --image localhost/nanoclaw-other:1",
        }.items()
    }
    assert {process.returncode for process in sending.values()} == {1}
    assert meanwhile == "still there"
    tries = {name: len(product.events("session-ended", agent=agent)) for name, agent in agents.items()}
    assert tries == {"exits": 4, "absent": 4, "leaves": 4, "silent": 4, "protocol": 1}


def test_without_podmans_socket_only_images_cannot_be_made(product: Product, machine: Machine) -> None:
    agent = product.add()
    machine.systemctl("stop", "podman.socket", "podman.service")
    try:
        build = product.ctl("image", "build", check=False)
        answer = product.send(agent, "still there")
        added = product.add("more")
    finally:
        machine.systemctl("start", "podman.socket")

    assert (build.returncode, build.stdout, build.stderr) == (
        3,
        "",
        "error: Podman does not answer at '/run/user/1000/podman/podman.sock': Connection refused\n"
        "hint: run: systemctl --user start podman.socket\n",
    )
    assert answer == "still there"
    assert product.send(added, "me too") == "me too"
    machine.expect_journal("<4> image-unchecked: .*, going on")


@pytest.mark.parametrize(
    ("options", "says", "hint"),
    [
        (
            ("--base-directory", "/nonexistent"),
            "error: /nonexistent/base.tar: cannot be read: No such file or directory\n",
            "hint: make it with agent-image/make-base\n",
        ),
        (
            ("--base", MISSING),
            r"error: the image was not built:\nSTEP 1/\d+: FROM localhost/nanoclaw-missing:1\n",
            "hint: agents go on with the image that they have; "
            "without a registry see agent-image/make-base\n",
        ),
    ],
    ids=["no base", "no registry"],
)
def test_a_build_that_fails_says_why_and_agents_go_on(
    product: Product, options: tuple[str, ...], says: str, hint: str
) -> None:
    agent = product.add()

    build = product.ctl("image", "build", *options, check=False)

    assert (build.returncode, build.stdout) == (1, "")
    assert re.search(says, build.stderr) and build.stderr.endswith(hint)
    assert product.send(agent, "still there") == "still there"


def test_a_reload_of_systemd_by_anybody_leaves_sessions_alone(product: Product, machine: Machine) -> None:
    agent = product.add()
    product.send(agent, "hello")
    pid = product.runner_pid(agent)

    machine.systemctl("daemon-reload")
    product.add("more")

    assert product.send(agent, "still there") == "still there"
    assert product.runner_pid(agent) == pid
    assert product.events("session-ended", agent=agent) == []
