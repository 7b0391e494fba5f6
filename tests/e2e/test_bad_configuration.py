"""Files of a person that are wrong: each is named with what to do, and harms nothing but its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.machine import Machine
from tests.support.product import Product, unique_prefix

#: What is wrong with agents/NAME.toml: how it is made ($f is the file), what is said of it, what to do.
FILES = {
    "syntax": (
        "echo 'provider = ' > $f",
        ":1: is not TOML: Invalid value",
        "the format is TOML: key = value",
    ),
    "unfinished": (
        'printf \'provider = "echo"\\nmodel = "x\' > $f',
        ":2: is not TOML: Unterminated string",
        "the format is TOML: key = value",
    ),
    "key": (
        'printf \'provider = "echo"\\nmodell = "x"\\n\' > $f',
        ":2: there is no key 'modell'",
        "did you mean 'model'?",
    ),
    "value": (
        "echo 'memory_max = \"12 GB\"' > $f",
        ":1: memory_max is not a size: '12 GB'",
        'write "512M" or "2G", or remove the line for the default',
    ),
    "type": (
        "echo 'tasks_max = \"many\"' > $f",
        ":1: tasks_max must be a whole number: 'many'",
        "write it without quotes",
    ),
    "latin1": ("printf 'description = \"\\xfcber\"\\n' > $f", ":1: is not UTF-8", "save the file as UTF-8"),
    "directory": ("mkdir $f", ": is not a regular file", "put a text file in its place"),
    "fifo": ("mkfifo $f", ": is not a regular file", "put a text file in its place"),
    "loop": (
        "ln -s $(basename $f) $f",
        ": cannot be read: Too many levels of symbolic links",
        "'namei FILE' shows where the symlinks lead",
    ),
    "nowhere": ("ln -s /nowhere $f", ": is a symlink to nowhere", "'namei FILE' shows where it leads"),
    "huge": ("truncate -s 100M $f", ": is larger than 64 KiB", "is it the right file?"),
    "locked": (
        "echo 'provider = \"echo\"' > $f && chmod 000 $f",
        ": cannot be read: Permission denied",
        "'namei -l FILE' shows whose it is and who may",
    ),
    "mount": (
        'printf \'provider = "echo"\\n[[mounts]]\\nsource = "/etc"\\ntarget = "/mnt/etc"\\n\' > $f',
        "mount of '/etc': '/etc' is never shown to agents",
        "move what the agent shall see",
    ),
}


@pytest.fixture
def prefix(product: Product, machine: Machine) -> Iterator[str]:
    """The beginning of names of agents whose files the test writes; they are gone afterwards."""
    prefix = unique_prefix()
    yield prefix
    machine.sh(f"rm -rf ~/.config/nanoclaw/agents/{prefix}* ~/.config/nanoclaw/nanoclaw.toml")
    machine.systemctl("reload-or-restart", "nanoclaw.service")


def path_of(product: Product, name: str) -> str:
    return f"{product.home}/.config/nanoclaw/agents/{name}.toml"


def test_each_broken_file_is_named_with_what_to_do_and_stops_its_agent_alone(
    product: Product, machine: Machine, prefix: str
) -> None:
    other = product.add("other")
    names = {case: f"{prefix}{case}" for case in FILES}
    machine.sh("\n".join(f"f={path_of(product, names[case])}; {make}" for case, (make, *_) in FILES.items()))

    reloaded = product.ctl("reload", check=False)
    agents = {agent["name"]: agent["runtime"] for agent in product.ask("agent", "list")["agents"]}

    assert (reloaded.returncode, reloaded.stdout) == (1, "")
    assert f"{len(FILES)} problems remain" in reloaded.stderr
    for case, (_, reason, hint) in FILES.items():
        file = path_of(product, names[case])
        what = f"{reason} ({hint.replace('FILE', file)})"
        problem = what if case == "mount" else file + what
        assert (case, agents[names[case]]["problem"]) == (case, problem)
        assert (case, agents[names[case]]["state"]) == (case, "broken")
        assert f"warning: {problem}\n" in reloaded.stderr
        assert any(
            problem in entry["MESSAGE"] for entry in product.events("agent-broken", agent=names[case])
        )
    assert product.send(other, "still there") == "still there"
    machine.expect_journal("<3> agent-broken")


def test_who_writes_to_a_broken_agent_reads_why_at_once(
    product: Product, machine: Machine, prefix: str
) -> None:
    name = f"{prefix}broken"
    file = path_of(product, name)
    machine.write(file, "provider = \n")
    machine.systemctl("reload", "nanoclaw.service")

    for command in (
        ("send", name, "hello", "--wait"),
        ("agent", "start", name),
        ("agent", "set", name, "--model=x"),
    ):
        refused = product.ctl(*command, check=False)
        assert (refused.returncode, refused.stdout, refused.stderr) == (
            1,
            "",
            f"error: {file}:1: is not TOML: Invalid value\nhint: the format is TOML: key = value\n",
        )
    status = machine.unit("nanoclaw.service", "StatusText")["StatusText"]
    machine.write(file, 'provider = "echo"\n')
    machine.systemctl("reload", "nanoclaw.service")

    assert "1 broken" in status
    assert product.send(name, "repaired") == "repaired"
    product.ctl("agent", "remove", name, "--yes", "--purge")
    machine.expect_journal("<3> agent-broken")


@pytest.mark.parametrize("name", ["Berta", "berta-2", "2berta", "b" * 33, "../berta", "bert\u00e4", ""])
def test_a_name_that_no_agent_can_have_is_refused(product: Product, name: str) -> None:
    refused = product.ctl("agent", "add", "--", name, check=False)

    assert (refused.returncode, refused.stdout, refused.stderr) == (
        5,
        "",
        f"error: '{name}' is not a name for an agent\n"
        "hint: use 1 to 32 of a-z, 0-9 and _, beginning with a letter\n",
    )


def test_a_name_that_is_taken_is_refused_and_the_agent_stays_as_it_is(product: Product) -> None:
    agent = product.add()
    before = product.ask("agent", "show", agent)

    refused = product.ctl("agent", "add", agent, "--provider", "anthropic", check=False)

    assert (refused.returncode, refused.stdout, refused.stderr) == (
        5,
        "",
        f"error: there is an agent named '{agent}'\nhint: 'nanoclawctl agent set {agent}' changes it\n",
    )
    assert product.ask("agent", "show", agent) == before


def test_a_file_whose_name_no_agent_can_have_is_told_and_ignored(
    product: Product, machine: Machine, prefix: str
) -> None:
    file = path_of(product, f"{prefix}-Copy")
    machine.write(file, 'provider = "echo"\n')

    reloaded = product.ctl("reload", check=False)

    assert reloaded.returncode == 1
    assert (
        f"warning: {file}: '{prefix}-Copy' is not a name for an agent "
        "(use 1 to 32 of a-z, 0-9 and _, beginning with a letter)\n"
    ) in reloaded.stderr
    machine.expect_journal("<4> agent-misnamed: .* ignoring it")


def test_a_broken_agent_that_is_a_directory_cannot_be_removed_and_says_so(
    product: Product, machine: Machine, prefix: str
) -> None:
    file = path_of(product, f"{prefix}dir")
    machine.sh(f"mkdir {file}")
    machine.systemctl("reload", "nanoclaw.service")
    pid = product.status()["pid"]

    refused = product.ctl("agent", "remove", f"{prefix}dir", "--yes", check=False)

    assert (refused.returncode, refused.stderr) == (
        1,
        f"error: {file}: cannot be removed: Is a directory\n"
        "hint: remove it yourself, then 'nanoclawctl reload'\n",
    )
    assert product.status()["pid"] == pid
    machine.expect_journal("<3> agent-broken")


def test_an_unreadable_directory_of_agents_is_told_and_no_agent_is_lost(
    product: Product, machine: Machine
) -> None:
    agent = product.add()
    product.send(agent, "hello")
    directory = f"{product.home}/.config/nanoclaw/agents"
    machine.run("chmod", "0", directory)

    reloaded = product.ctl("reload", check=False)
    answer = product.send(agent, "still there")
    machine.run("chmod", "700", directory)

    assert (reloaded.returncode, reloaded.stderr) == (
        1,
        f"error: {directory}: cannot be read: Permission denied\nhint: run: chmod u+rwx {directory}\n",
    )
    assert answer == "still there"
    product.ctl("reload")
    assert product.send(agent, "and after") == "and after"


@pytest.mark.parametrize(
    ("make", "what", "hint"),
    [
        ("printf '\\xfc' > $f", ":1: is not UTF-8", "save the file as UTF-8"),
        ("truncate -s 1M $f", ": is larger than 256 KiB", "is it the right file?"),
    ],
    ids=["latin1", "huge"],
)
def test_instructions_that_cannot_be_read_are_told_in_the_chat(
    product: Product, machine: Machine, make: str, what: str, hint: str
) -> None:
    agent, other = product.add(), product.add("other")
    file = path_of(product, agent).replace(".toml", ".md")
    machine.sh(f"f={file}; {make}")

    answer = product.ctl("send", agent, "hello", "--wait", check=False)

    assert (answer.returncode, answer.stdout) == (
        1,
        f"Your message could not be answered: {file}{what}; {hint}\n",
    )
    assert product.send(other, "still there") == "still there"
    machine.expect_journal("<3> message-dead")


def test_a_file_that_is_gone_takes_its_agent_along_at_the_next_reload(
    product: Product, machine: Machine
) -> None:
    agent, other = product.add(), product.add("other")
    product.send(agent, "hello")
    machine.run("rm", path_of(product, agent))

    before = product.send(agent, "it still runs")
    unit = product.session(agent)["unit"]
    product.ctl("reload")
    after = product.ctl("send", agent, "hello", "--wait", check=False)

    assert before == "it still runs"
    assert product.state(unit) == "inactive"
    assert (after.returncode, after.stderr.splitlines()[0]) == (4, f"error: no agent named '{agent}'")
    assert product.send(other, "still there") == "still there"
    # A runner that is stopped says so, and may be too late for systemd.
    machine.expect_journal("<4> agent-gone: .* giving up its work|reception is disabled")


@pytest.mark.parametrize("damage", ["echo garbage >", "rm", "truncate -s 100"], ids=str.split)
def test_a_unit_that_somebody_damaged_is_written_again(
    product: Product, machine: Machine, damage: str
) -> None:
    agent = product.add()
    unit = product.ask("agent", "show", agent)["unitFile"]
    text = machine.read(unit)
    machine.sh(f"{damage} {unit}; systemctl --user daemon-reload")

    assert product.send(agent, "hello") == "hello"
    assert machine.read(unit) == text
    machine.expect_journal("podman-user-generator failed")  # said by systemd of the damaged one


def test_a_drop_in_that_systemd_refuses_is_named_and_the_change_undone(
    product: Product, machine: Machine
) -> None:
    agent, other = product.add(), product.add("other")
    drop_in = f"{product.ask('agent', 'show', agent)['dropInDirectory']}/50-local.conf"
    product.write(drop_in, "[Service]\nMemoryMaxx=1G\n")
    before = product.ask("agent", "show", agent)["configuration"]

    refused = product.ctl("agent", "set", agent, "--memory-max", "2G", check=False)

    assert refused.returncode == 1
    assert f"error: {drop_in}:2: Unknown key 'MemoryMaxx' in section [Service]" in refused.stderr
    assert "hint: nothing was changed\n" in refused.stderr
    assert product.ask("agent", "show", agent)["configuration"] == before
    assert product.send(other, "still there") == "still there"


def test_broken_settings_at_a_reload_are_told_and_the_old_ones_stay(
    product: Product, machine: Machine, prefix: str
) -> None:
    agent = product.add()
    file = f"{product.home}/.config/nanoclaw/nanoclaw.toml"
    machine.write(file, "max_sesions = 3\n")

    reloaded = product.ctl("reload", check=False)
    machine.systemctl("reload", "nanoclaw.service")

    assert (reloaded.returncode, reloaded.stderr) == (
        1,
        f"error: {file}:1: there is no key 'max_sesions'\nhint: did you mean 'max_sessions'?\n",
    )
    assert machine.unit("nanoclaw.service", "ActiveState", "StatusText") == {
        "ActiveState": "active",
        "StatusText": f"reload failed, going on as before: {file}:1: there is no key 'max_sesions'"
        " (did you mean 'max_sessions'?)",
    }
    assert product.send(agent, "still there") == "still there"
    machine.expect_journal("<3> reload-failed: .*, going on as before|gateway.*max_sesions")


@pytest.mark.parametrize(
    ("make", "what", "hint"),
    [
        ("echo 'max_sesions = 3' > $f", ":1: there is no key 'max_sesions'", "did you mean 'max_sessions'?"),
        ("mkfifo $f", ": is not a regular file", "put a text file in its place"),
        ("truncate -s 100M $f", ": is larger than 64 KiB", "is it the right file?"),
    ],
    ids=["key", "fifo", "huge"],
)
def test_broken_settings_at_the_start_end_the_router_once_and_callers_read_why(
    product: Product, machine: Machine, prefix: str, make: str, what: str, hint: str
) -> None:
    agent = product.add()
    product.send(agent, "hello")
    file = f"{product.home}/.config/nanoclaw/nanoclaw.toml"
    machine.sh(f"f={file}; {make}")

    restarted = machine.systemctl("restart", "nanoclaw.service", check=False)
    unit = machine.unit("nanoclaw.service", "ActiveState", "ExecMainStatus", "NRestarts", "StatusText")
    asked = [
        product.ctl(*command, check=False, timeout_s=10)
        for command in (("status",), ("send", agent, "hello", "--wait"), ("agent", "list", "--json"))
    ]
    machine.wait_for(lambda: product.state("nanoclaw.service") == "failed", what="it is left alone")
    starts = [e for e in machine.journal("nanoclaw.service") if "Starting nanoclaw.service" in e["MESSAGE"]]
    machine.run("rm", file)

    assert restarted.returncode == 1
    assert unit == {
        "ActiveState": "failed",
        "ExecMainStatus": "78",
        "NRestarts": "0",
        "StatusText": f"{file}{what} ({hint})",
    }
    for answer in asked[:2]:
        assert (answer.returncode, answer.stdout, answer.stderr) == (
            3,
            "",
            f"error: the router cannot start: {file}{what}\nhint: {hint}\n",
        )
    assert asked[2].returncode == 3 and '"unavailable"' in asked[2].stderr
    assert len(starts) <= 1 + 2 * len(asked), "each who asks starts it once, or twice for two sockets"
    assert product.send(agent, "repaired") == "repaired"
    machine.expect_journal("nanoclaw.service <[34]> |nanoclaw-gateway.service <[34]> ")
