"""What an agent may spend: the real SDK in its container, a real gateway and router, restarts of both."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.e2e.test_anthropic import SETTINGS, Api, curl, set_key
from tests.support.machine import Machine
from tests.support.product import CHANNEL, Json, Product, unique_prefix

MODEL = "claude-sonnet-5-5"
PRICES = f'[prices."{MODEL}*"]\ninput = 2\noutput = 10\ncache_write = 2.5\ncache_read = 0.1\n'
#: 30 cents each.
USED = {"input_tokens": 100_000, "output_tokens": 10_000}
PLAIN = json.dumps({"model": MODEL, "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]})
#: With the real SDK, as an agent's own program would: which error, and how often it asked.
SDK = """
import json, sys
sys.path.insert(0, "/opt/nanoclaw/lib")
import anthropic, httpx2
class Counting(httpx2.HTTPTransport):
    asked = 0
    def handle_request(self, request):
        self.asked += 1
        return super().handle_request(request)
transport = Counting(uds="/run/nanoclaw/gateway.sock")
http = httpx2.Client(transport=transport, trust_env=False)
client = anthropic.Anthropic(base_url="http://gateway/anthropic", api_key="x", http_client=http)
try:
    client.messages.create(model="MODEL", max_tokens=9, messages=[{"role": "user", "content": "hi"}])
    error = {}
except anthropic.APIStatusError as exc:
    error = {"status": exc.status_code, **exc.body["error"]}
print(json.dumps({"asked": transport.asked, **error}))
""".replace("MODEL", MODEL)


@pytest.fixture(scope="module")
def configured(_installed: Machine) -> Iterator[Product]:
    """The product with the endpoint on loopback, a key, and prices."""
    product = Product(_installed, unique_prefix())
    product.write(f"{_installed.home}/.config/nanoclaw/nanoclaw.toml", SETTINGS + PRICES)
    set_key(product)
    _installed.systemctl("reload", "nanoclaw")
    yield product
    product.ctl("secret", "remove", "anthropic", "--yes")
    product.close()


@pytest.fixture
def api(configured: Product, machine: Machine) -> Iterator[Api]:
    api = Api(machine)
    yield api
    api.stop()


@pytest.fixture
def agent(configured: Product, product: Product) -> str:
    return product.add("", "--model", MODEL, provider="anthropic")


def limit(product: Product, agent: str, budget: str) -> None:
    """Write the budget into the agent's file, and reload."""
    file = product.ask("agent", "show", agent)["file"]
    text = product.machine.read(file).partition("[budget]")[0]
    product.machine.write(file, f"{text}\n[budget]\n{budget}\n")
    product.ctl("reload")


def usage(product: Product, agent: str, by: str = "agent") -> list[Json]:
    rows: list[Json] = product.ask("usage", "--by", by, "--agent", agent)["usage"]
    return rows


def wait_calls(product: Product, agent: str, calls: int) -> Json:
    """Return the agent's usage once the router has heard of so many calls."""
    product.machine.wait_for(lambda: sum(row["calls"] for row in usage(product, agent)) >= calls)
    (row,) = usage(product, agent)
    return row


def refused(product: Product, agent: str) -> str:
    """Send a message that is not answered; return what the chat is told, which is one line."""
    failed = product.ctl("send", agent, "hello", "--wait", "--timeout", "60", check=False)
    (line,) = failed.stdout.splitlines()
    assert failed.returncode == 1
    return line


def stops(product: Product, agent: str) -> list[Json]:
    """Return the rows of the audit trail about refusals for want of a budget."""
    rows = product.ask("audit", "list", agent, "--kind", "request")["rows"]
    return [row for row in rows if row["detail"].get("reason") == "budget-money_per_day"]


def test_usage_is_what_the_api_handed_out(product: Product, machine: Machine, agent: str, api: Api) -> None:
    more = {"cache_creation_input_tokens": 700, "cache_read_input_tokens": 11_000}
    used = [{"input_tokens": 1234, "output_tokens": 56, **more}, {"input_tokens": 777, "output_tokens": 31}]
    api.start(
        {"tool_use": [{"name": "bash", "input": {"command": "true"}}], "usage": used[0]},
        {"text": "done", "usage": used[1]},  # these two are streamed, as the provider does
        {"text": "plain", "usage": USED},
        {"status": 529},
    )
    machine.expect_journal("nanoclaw-gateway")

    assert product.send(agent, "do it") == "done"
    assert curl(product, agent, "/anthropic/v1/messages", "--json", PLAIN).startswith("HTTP/1.1 200")
    assert curl(product, agent, "/anthropic/v1/messages", "--json", PLAIN).startswith("HTTP/1.1 529")

    row = wait_calls(product, agent, 3)
    given = [*used, USED]
    assert (row["calls"], row["estimated"], row["unpriced"]) == (3, 0, 0)
    assert row["input"] == sum(each["input_tokens"] for each in given)
    assert row["output"] == sum(each["output_tokens"] for each in given)
    assert (row["cacheWrite"], row["cacheRead"]) == (700, 11_000)
    first = 1234 * 2 + 56 * 10 + 700 * 2.5 + 11_000 * 0.1
    assert row["microdollars"] == first + (777 * 2 + 31 * 10) + 300_000
    shown = product.ctl("usage", "--by", "session", "--agent", agent, "--since", "1d").stdout
    assert product.session(agent)["session"] in shown and "102011" in shown and "$0.307742" in shown
    lines = product.events("request", agent=agent)
    assert [line.get("NANOCLAWD_OUTPUT_TOKENS") for line in lines] == ["56", "31", "10000", "0"]


def test_a_budget_stops_with_one_line_survives_restarts_and_is_raised(
    product: Product, machine: Machine, agent: str, api: Api
) -> None:
    api.start(*[{"text": f"answer {n}", "usage": USED} for n in range(5)])
    machine.expect_journal(r"message-dead: |gateway-away: |nanoclaw-gateway")
    limit(product, agent, "money_per_day = 0.50")
    assert [product.send(agent, "hello") for _ in range(2)] == ["answer 0", "answer 1"]
    wait_calls(product, agent, 2)

    line = refused(product, agent)

    words = f"Your message could not be answered: The budget of '{agent}' is used up: $0.60 of $0.50 spent"
    assert line.startswith(words) and "--money-per-day" in line and "00:00" in line
    (stop,) = [each for each in product.status()["budgetStops"] if each["agent"] == agent]
    assert stop["limit"] == "money_per_day" and "$0.60 of $0.50" in product.ctl("status").stdout
    assert product.python_inside(agent, SDK) == {
        "asked": 1,  # the SDK does not try again
        "status": 402,
        "type": "budget_error",
        "message": line.partition(": ")[2].removesuffix(" (quota)"),
    }

    # Neither restart is a way round, nor both; the second by kill -9.
    machine.systemctl("restart", "nanoclaw-gateway")
    assert refused(product, agent).startswith(words)
    machine.systemctl("restart", "nanoclaw")
    assert refused(product, agent).startswith(words)
    machine.systemctl("kill", "--signal=KILL", "nanoclaw-gateway")
    machine.wait_for(lambda: product.state("nanoclaw-gateway.service") == "active")
    assert refused(product, agent).startswith(words)
    assert len(api.requests()) == 2
    runner = product.runner_pid(agent)

    product.ctl("budget", "set", agent, "--money-per-day", "0.61")
    assert product.send(agent, "hello") == "answer 2"

    assert product.runner_pid(agent) == runner
    noted = product.ask("audit", "list", agent, "--kind", "control")["rows"][-1]
    assert noted["event"] == "SetBudget" and "610000" in json.dumps(noted["detail"])
    row = wait_calls(product, agent, 3)
    assert (row["calls"], row["microdollars"], row["microdollarsLeft"]) == (3, 900_000, 0)
    assert refused(product, agent).partition("$")[2].startswith("0.90 of $0.61")
    # A row for each gateway's stop, however many were refused. The last is like the one before, and so in
    # a sum with it, which is told after a minute.
    machine.wait_for(lambda: len(stops(product, agent)) == 3)


def test_who_is_cut_off_in_mid_stream_has_spent_it(
    product: Product, machine: Machine, agent: str, api: Api
) -> None:
    api.start({"text": "this will never end", "hold_after": 4, "usage": USED}, {"text": "again"})
    sending = product.send_later(agent, "tell me a long story")
    machine.wait_for(lambda: len(api.requests()) == 1)
    product.wait_state(agent, "working")
    place = json.dumps({"chat": agent, "thread": ""})

    machine.run("varlinkctl", "call", CHANNEL, "io.nanoclaw.Channel.StopTurn", place)
    sending.communicate(timeout=30)

    row = wait_calls(product, agent, 1)
    assert (row["calls"], row["estimated"], row["input"]) == (1, 1, 100_000)
    assert 1 <= row["output"] <= 32_000
