"""nanoclawctl selftest: an agent does not get out, and where it could, that is noticed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from runner.containment import suite
from tests.support.machine import Machine
from tests.support.product import Product

CAP_SYS_RESOURCE = 24  # man 7 capabilities
CTL = "/home/claw/.local/bin/nanoclawctl"
RUN_S = 120
#: A way out of the machine, a name server and ping, so that attempts at them tell something.
NETWORK = """
ip address add 198.51.100.7/24 dev lo; ip route add default dev lo src 198.51.100.7
ip -6 address add 2001:db8::7/64 dev lo
echo 0 2147483647 > /proc/sys/net/ipv4/ping_group_range
cp /etc/resolv.conf /etc/resolv.conf.saved 2> /dev/null || true
echo nameserver 127.0.0.1 > /etc/resolv.conf
"""
NO_NETWORK = """
ip address del 198.51.100.7/24 dev lo; ip -6 address del 2001:db8::7/64 dev lo; ip route del default || true
echo 1 0 > /proc/sys/net/ipv4/ping_group_range
mv /etc/resolv.conf.saved /etc/resolv.conf 2> /dev/null || rm /etc/resolv.conf
"""
NAME_SERVER = """
import socket, sys, threading
def answer():
    while True:
        question, who = sock.recvfrom(512)
        sock.sendto(question, who)
sock = socket.socket(type=socket.SOCK_DGRAM)
sock.bind(("127.0.0.1", 53))
threading.Thread(target=answer, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""
#: What a machine of a test may lack: parts of the kernel, and the controllers that bound memory.
MAY_LACK = {"alg", "kexec", "module", "memory-flood", "internet6"}

#: A person's drop-in that takes a protection away, and what must be noticed at least.
BROKEN = {
    "capabilities": (
        "AddCapability=CAP_NET_RAW CAP_NET_ADMIN CAP_SETUID CAP_DAC_OVERRIDE",
        {"capabilities", "raw-ip", "configure", "root", "private", "secret-files"},
    ),
    "seccomp": (
        "PodmanArgs=--security-opt=seccomp=unconfined",
        {
            "user-namespace",
            "clone-namespace",
            "clone3-namespace",
            "io_uring",
            "keyring",
            "userfaultfd",
            "linger",
        },
    ),
    "network": ("Network=\nNetwork=host", {"tcp", "udp", "abstract"}),
    "processes": ("PodmanArgs=--pid=host --ipc=host", {"processes", "other-processes", "shared-memory"}),
    "identity": ("User=1000", {"identity", "private", "same-uid"}),
    # Each row is one line's: they need no run each.
    "small ones": (
        "User=2005\nReadOnly=false\nNoNewPrivileges=false\nPodmanArgs=--security-opt=unmask=ALL",
        {"same-uid", "elsewhere", "setuid-program", "proc-hidden"},
    ),
    "limits": (
        "Ulimit=\nUlimit=nofile=10000:10000\nUlimit=nproc=4000:4000\nUlimit=core=1000000:1000000\n"
        "Tmpfs=\nTmpfs=/tmp:size=2g\n[Service]\nSyslogLevelPrefix=yes",
        {"fork-flood", "descriptor-flood", "core", "disk-flood", "log-forge"},
    ),
    "mounts": (
        "Volume=%h:%h\nVolume=%t/nanoclaw/agents:%t/nanoclaw/agents\nUser=1000",
        {
            "home",
            "other-files",
            "database",
            "credentials",
            "instructions",
            "timer",
            "other-host",
            "other-gateway",
        },
    ),
}
#: Lines of our own programs: the file, an expression of sed(1) that takes it away, what must be noticed.
BROKEN_CODE = (
    (
        "gateway/addresses.py",
        "s/if any(address in network for network in named):/if True:/",
        {"gw-rebinding", "gw-connect-rebinding"},
    ),
    ("policy.py", "s/not self.path or ask.path/True or ask.path/", {"gw-upload-path"}),
    ("gateway/exchange.py", "s/if self.up_bytes > rule.max_up_bytes/if False/", {"gw-upload-chunks"}),
    ("quadlet.py", "s/,noexec,Z/,Z/", {"run-session"}),
)
#: Everything that holds a process, gone at once.
NOTHING = """
Network=
Network=host
ReadOnly=false
User=0
Group=0
NoNewPrivileges=false
Ulimit=
Ulimit=nofile=10000:10000
Ulimit=nproc=4000:4000
Ulimit=core=1000000:1000000
Tmpfs=
Tmpfs=/tmp:size=2g
PodmanArgs=--privileged --pid=host --ipc=host --userns=host --cgroupns=host
PodmanArgs=--security-opt=seccomp=unconfined --security-opt=unmask=ALL
Volume=/run/user:/run/user
Volume=/run/systemd:/run/systemd
Volume=/run/dbus:/run/dbus
Volume=%h/.config:%h/.config
Volume=%h/.local/state:%h/.local/state
"""


#: A container of an ordinary user is not root's, whatever it may: these are tried as root, beside it.
ROOTS = {
    *(
        "raw-link",
        "device-node",
        "sysctl",
        "sysrq",
        "priority",
        "oom-score",
        "raise-limits",
        "handle",
        "bpf",
    ),
    *(
        "namespace",
        "swap",
        "kernel-log",
        "ptrace",
        "foreign-memory",
        "proc-root",
        "unlink-socket",
        "run-session",
    ),
    "secret-env",
}
#: Shown elsewhere, by one protection alone or in test_canary. The clock, and what Ctrl-Alt-Del does, belong
#: to whoever runs the tests. No test can make Podman leave descriptors open, or one mount of two.
ELSEWHERE = {
    *("configure", "raw-ip", "secret-files", "secret-memory", "clock", "reboot", "inherited", "links"),
    "real-time",
}
AS_ROOT = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from runner.containment import suite
pid = os.fork()
if pid == 0:
    os.execv("/bin/sleep", ["sleep", "60"])
parameters = {"absent": {}, "token": "t", "files": {}, "pid": pid, "words": {"pid": "sleep"}}
made = ["/workspace", "/session", "/run/nanoclaw"]
for path in made:
    os.mkdir(path)
os.close(os.open("/run/nanoclaw/host.sock", os.O_CREAT))
wanted = json.loads(sys.argv[2])
print(json.dumps([suite.run(probe, parameters) for probe in suite.PROBES if probe.name in wanted]))
os.kill(pid, 9)
os.waitpid(pid, 0)
for path in ("/session/program", "/tmp/disk"):
    os.path.lexists(path) and os.unlink(path)
for path in made:
    os.rmdir(path)
"""


@pytest.fixture(autouse=True)
def expected(machine: Machine) -> None:
    machine.expect_journal(
        "nanoclaw(-gateway)?.service <[34]> (malformed-call|message-dead|runner-|protocol)"
    )
    machine.expect_journal("nanoclaw-selftest(_other)?@.*.service <[034]> ")


@contextmanager
def networked(machine: Machine) -> Iterator[None]:
    machine.sh(NETWORK, user="root")
    try:
        pipe = subprocess.PIPE
        with machine.popen("python3", "-c", NAME_SERVER, user="root", stdin=pipe, stdout=pipe) as server:
            assert server.stdin is not None and server.stdout is not None
            with server.stdin:
                assert server.stdout.readline() == "ready\n"
                yield
    finally:
        machine.sh(NO_NETWORK, user="root")


def break_units(machine: Machine, product: Product, text: str) -> None:
    """A drop-in for all agents: its name is the beginning of all of theirs."""
    directory = f"{machine.home}/.config/containers/systemd/nanoclaw-.container.d"
    product.write(f"{directory}/50-broken.conf", f"[Container]\n{text}\n")


@contextmanager
def broken_code(machine: Machine, *changes: tuple[str, str]) -> Iterator[None]:
    """Router and gateway, as installed, without lines of theirs; a file and an expression of sed(1) each."""
    library = f"{machine.home}/.local/lib/nanoclaw"
    machine.run("cp", "--recursive", "--preserve", library, f"{library}.saved")
    for path, expression in changes:
        machine.run("sed", "--in-place", expression, f"{library}/nanoclawd/{path}")
        same = machine.run(
            "cmp", f"{library}/nanoclawd/{path}", f"{library}.saved/nanoclawd/{path}", check=False
        )
        assert same.returncode == 1, path
    try:
        machine.systemctl("restart", "nanoclaw.service", "nanoclaw-gateway.service")
        yield
    finally:
        machine.sh(f"rm -r {library} && mv {library}.saved {library}")
        machine.systemctl("restart", "nanoclaw.service", "nanoclaw-gateway.service")


def selftest(machine: Machine, *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Run it as a person; return its exit status and its rows by name."""
    done = machine.run(CTL, "selftest", *arguments, "--json", check=False, timeout_s=RUN_S)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    rows = {row["name"]: row for row in found["probes"]}
    results = [row["result"] for row in rows.values()]
    assert (found["held"], found["untried"]) == (results.count("held"), results.count("untried"))
    assert found["tried"] == len(rows) - found["untried"]
    return done.returncode, rows


def through(rows: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, row in rows.items() if row["result"] == "through"}


def leftovers(machine: Machine) -> str:
    """Return what is there of a selftest."""
    return machine.sh(
        f"for noun in agent deadletter; do {CTL} $noun list --json | grep -o selftest || true; done; "
        "podman ps --all --format '{{.Names}}' | grep selftest || true; cd; "
        "find .config .local/state/nanoclaw /run/user/1000/nanoclaw -name '*selftest*' ! -name selftest.lock"
    )


def test_nothing_gets_out_and_nothing_stays(machine: Machine, product: Product) -> None:
    with networked(machine):
        code, rows = selftest(machine)

    print(json.dumps(rows, indent=1))
    assert (code, through(rows)) == (0, set())
    untried = {name: row["detail"] for name, row in rows.items() if row["result"] == "untried"}
    assert untried.keys() <= MAY_LACK, untried
    assert all(untried.values())
    assert len(rows) - len(untried) >= 130
    layers = {row["by"] for row in rows.values() if row["result"] == "held"}
    assert layers == {
        *("namespace", "mount", "seccomp", "capability", "uid", "kernel", "limit", "podman"),
        *("gateway", "router", "systemd"),
    }
    assert leftovers(machine) == ""


@pytest.mark.parametrize("name", BROKEN)
def test_a_protection_that_is_gone_is_noticed(machine: Machine, product: Product, name: str) -> None:
    line, wanted = BROKEN[name]
    break_units(machine, product, line)

    code, rows = selftest(machine)

    assert code == 1
    assert wanted <= through(rows)


def test_lines_of_ours_that_are_gone_are_noticed(machine: Machine, product: Product) -> None:
    machine.expect_journal("nanoclaw(-gateway)?.service <4> records-")  # the router is away for a moment
    with broken_code(machine, *((path, expression) for path, expression, _ in BROKEN_CODE)):
        code, rows = selftest(machine)

    assert (code, through(rows)) == (1, set().union(*(wanted for *_, wanted in BROKEN_CODE)))


def test_an_agent_that_is_deaf_to_the_kill_switch_is_noticed(machine: Machine, product: Product) -> None:
    units = f"{machine.home}/.config/systemd/user/nanoclaw-.service.d"
    text = "[Service]\nKillSignal=SIGCONT\nSendSIGKILL=no\nTimeoutStopSec=1\nExecStopPost=\n"
    product.write(f"{units}/60-broken.conf", text)
    machine.expect_journal("nanoclaw-selftest")
    try:
        code, rows = selftest(machine)
    finally:
        machine.sh("podman ps --quiet --filter name=selftest | xargs --no-run-if-empty podman rm -f -t 0")

    assert (code, through(rows)) == (1, {"stop"})


def test_a_flood_of_lines_that_drowns_the_routers_is_noticed(machine: Machine, product: Product) -> None:
    place = "/etc/systemd/journald.conf.d/zz-burst.conf"
    text = "[Journal]\nRateLimitIntervalSec=30s\nRateLimitBurst=1000\n"
    machine.write(place, text, user="root")
    machine.run("systemctl", "restart", "systemd-journald", user="root")
    try:
        held = selftest(machine)[1]["log-flood"]
        break_units(machine, product, "[Service]\nSyslogLevel=info")
        lost = selftest(machine)[1]["log-flood"]
    finally:
        machine.run("rm", place, user="root")
        machine.run("systemctl", "restart", "systemd-journald", user="root")

    assert (held["result"], lost["result"]) == ("held", "through")


def test_without_any_protection_the_attempts_get_through(machine: Machine, product: Product) -> None:
    break_units(machine, product, NOTHING)
    with networked(machine):
        rows = selftest(machine)[1]

    got = through(rows)
    tried = {probe.name for probe in suite.PROBES if probe.by not in ("gateway", "router")}
    assert tried - got - ROOTS - ELSEWHERE - MAY_LACK == set()


def test_what_needs_roots_rights_gets_through_for_root(machine: Machine) -> None:
    shown = machine.run(
        *("python3", "-I", "-c", AS_ROOT, f"{machine.project}/agent-image", json.dumps(sorted(ROOTS))),
        user="root",
        env={"SECRET": f"NANOCLAWCANARY{0:032x}"},
    ).stdout

    results = {row["name"] for row in json.loads(shown) if row["result"] == "through"}
    # Whoever runs the tests may be a root without this one.
    status = machine.read("/proc/self/status", user="root")
    resource = re.search(r"^CapEff:\s+(\w+)$", status, re.MULTILINE)
    assert resource is not None
    lacking = set() if int(resource[1], 16) >> CAP_SYS_RESOURCE & 1 else {"raise-limits", "oom-score"}
    assert results >= ROOTS - lacking, shown


def test_an_agent_with_a_drop_in_of_its_own_is_tried_as_it_is(machine: Machine, product: Product) -> None:
    agent = product.add("", "--tasks-max", "99")
    directory = product.ask("agent", "show", agent)["dropInDirectory"]
    product.write(f"{directory}/50-local.conf", "[Container]\nAddCapability=CAP_SYS_PTRACE\n")
    machine.systemctl("daemon-reload")

    code, rows = selftest(machine, agent)
    others = selftest(machine)[1]

    assert code == 1 and "capabilities" in through(rows)
    assert re.fullmatch(r"EAGAIN at \d\d", rows["fork-flood"]["detail"]), rows["fork-flood"]
    assert through(others) == set()
    assert leftovers(machine) == ""
    machine.run("rm", "-r", directory)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_stays_when_it_is_interrupted(machine: Machine, product: Product, number: int) -> None:
    interrupt(machine, number)

    assert leftovers(machine) == ""


def test_what_a_killed_one_left_is_removed_by_the_next(machine: Machine, product: Product) -> None:
    interrupt(machine, signal.SIGKILL)
    assert "selftest" in leftovers(machine)

    code, rows = selftest(machine)

    assert (code, through(rows)) == (0, set())
    assert leftovers(machine) == ""


def interrupt(machine: Machine, number: int) -> None:
    """Start one, and send it a signal once the agent runs."""
    with machine.popen("bash", "-c", f"echo $$; exec {CTL} selftest", stdout=-1, stderr=-2) as running:
        assert running.stdout is not None
        pid = running.stdout.readline().strip()
        machine.wait_for(
            lambda: "nanoclaw-selftest-" in machine.sh("podman ps --format '{{.Names}}'"), within_s=60
        )
        machine.run("kill", f"-{number:d}", pid)
        running.communicate(timeout=RUN_S)


def test_an_agent_of_the_person_is_never_taken_for_it(machine: Machine, product: Product) -> None:
    product.ctl("agent", "add", "selftest", "--provider", "anthropic")

    done = product.ctl("selftest", check=False, timeout_s=RUN_S)

    assert done.returncode == 5 and "an agent of yours named 'selftest'" in done.stderr
    assert product.ask("agent", "show", "selftest")["configuration"]["provider"] == "anthropic"
    product.ctl("agent", "remove", "selftest", "--yes", "--purge")
