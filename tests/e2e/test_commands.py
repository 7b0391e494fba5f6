"""Commands in a chat, with the installed product: what a person at the terminal gets."""

from __future__ import annotations

from tests.support.machine import Machine
from tests.support.product import Product


def test_commands_answer_while_the_agent_works_and_while_it_hangs(
    product: Product, machine: Machine
) -> None:
    agent = product.add()
    machine.expect_journal("turn-not-stopped")  # it hangs

    assert product.send(agent, "/status") == f"{agent}: idle"
    sending = product.send_later(agent, "/sleep 60")
    product.wait_state(agent, "working")
    machine.run("kill", "-STOP", str(product.runner_pid(agent)))
    assert product.send(agent, "/status") == f"{agent}: working"
    assert product.send(agent, "/stop") == f"'{agent}' is told to stop."
    assert sending.communicate(timeout=30)[0] == "Stopped.\n"
    assert "There is no command '/hlep'" in product.send(agent, "/hlep")
    assert product.send(agent, "//hlep") == "/hlep"
    assert "begins anew" in product.send(agent, "/clear")
    assert "/approve [ID]: " in product.send(agent, "/help")
    assert product.send(agent, "/compact") == "An echo has nothing to sum up."
