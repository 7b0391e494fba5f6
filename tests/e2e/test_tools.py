"""What agents do beyond answering, end to end: the real SDK in its container, a Messages API on loopback."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.test_anthropic import SETTINGS, Api, set_key, user_text
from tests.support.machine import Machine
from tests.support.product import Json, Product, unique_prefix


@pytest.fixture(scope="module")
def configured(_installed: Machine) -> Iterator[Product]:
    product = Product(_installed, unique_prefix())
    product.write(f"{_installed.home}/.config/nanoclaw/nanoclaw.toml", SETTINGS)
    set_key(product)
    _installed.systemctl("reload", "nanoclaw")
    yield product
    product.ctl("secret", "remove", "anthropic", "--yes")
    product.close()


@pytest.fixture(scope="module")
def agent(configured: Product) -> str:
    """An agent for all tests: its container takes seconds to load the SDK."""
    return configured.add(provider="anthropic")


@pytest.fixture
def api(configured: Product, machine: Machine) -> Iterator[Api]:
    api = Api(machine)
    yield api
    api.stop()


def use(tool: str, **input: object) -> Json:
    return {"tool_use": [{"name": tool, "input": input}]}


def replies(product: Product, agent: str, *words: str) -> list[str]:
    """Send a message, and return what came for it."""
    found = product.ask("send", agent, *words, "--wait", "--timeout", "60")["replies"]
    return [reply["text"] for reply in found]


def test_files_come_and_go(product: Product, machine: Machine, agent: str, api: Api) -> None:
    content = "".join(f"line {number}\n" for number in range(100_000))
    product.write(f"{machine.home}/data.txt", content)
    api.start(
        use("bash", command="sha256sum inbox/*/data.txt && cp inbox/*/data.txt 'out put.txt'"),
        use("send_file", path="out put.txt", caption="as it was"),
        {"text": "done"},
    )

    sent, done = replies(product, agent, "look", "--file", f"{machine.home}/data.txt")

    assert done == "done"
    assert sent.startswith("as it was\n[file: out put.txt, 1088 kB: ")
    assert machine.read(sent.rpartition(": ")[2].rstrip("]")) == content
    first, second, _ = api.requests()
    assert "/data.txt (1088890 bytes)</file>" in user_text(first)
    digest = machine.run("sha256sum", f"{machine.home}/data.txt").stdout.split()[0]
    assert digest in user_text(second)


def test_question_is_answered_by_a_message_also_across_a_restart(
    product: Product, machine: Machine, agent: str, api: Api
) -> None:
    api.start(use("ask_person", question="Which?", options=["Tea", "Coffee"]), {"text": "you have chosen"})
    id = product.ctl("send", agent, "choose").stdout.strip()

    def asked() -> bool:
        return any(d["text"].startswith("Which?") for d in product.ask("message", "show", id)["deliveries"])

    machine.wait_for(asked)
    machine.systemctl("restart", "nanoclaw")

    said = replies(product, agent, "2")

    assert said[-1] == "you have chosen"
    assert "answered: Coffee" in user_text(api.requests()[1])
    listed = product.ask("message", "list", agent)["messages"]
    assert [message["text"] for message in listed].count("2") == 0


def test_what_was_said_is_edited(product: Product, agent: str, api: Api) -> None:
    api.start({"text": "one"})
    (said,) = product.ask("send", agent, "say", "--wait")["replies"]
    api.stop()
    api.start(use("edit_message", delivery=said["key"], text="two"), {"text": "done"})

    assert replies(product, agent, "edit it") == ["(edited) two", "done"]


def test_agent_is_created_when_somebody_has_allowed_it_and_answers(
    product: Product, machine: Machine, agent: str, api: Api
) -> None:
    new = f"{agent}new"
    what = {"name": new, "description": "helps", "instructions": "Be kind."}
    api.start(
        use("create_agent", **what),
        {"text": "asked for it"},
        use("message_agent", agent=new, text="hello there"),
        {"text": "asked it"},
        {"text": "I am new"},  # its container has to start: it is not faster than the answer before
        {"text": "so it says"},
    )
    product.ctl("guard", "set", agent, "message_agent", "allow")
    assert replies(product, agent, "create it")[-1] == "asked for it"
    (approval,) = product.ask("approval", "list", agent)["approvals"]
    assert new not in product.ctl("agent", "list").stdout

    product.ctl("approval", "allow", approval["id"])
    product._added.append(new)

    config = product.ask("agent", "show", new)["configuration"]
    assert (config["provider"], config["description"], config["mounts"]) == ("anthropic", "helps", [])
    machine.wait_for(lambda: len(api.requests()) >= 6)
    _, _, told, _, asked, answered = [user_text(request) for request in api.requests()]
    assert f"Approval {approval['id']}" in told
    assert f'from=\\"agent:{agent}\\"' in asked and "hello there" in asked
    assert f'from=\\"agent:{new}\\"' in answered and "I am new" in answered
    machine.wait_for(lambda: not product.ask("message", "list", agent, "--state", "leased")["messages"])
