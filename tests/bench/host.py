"""What the benchmarks ask of systemd, Podman and /proc."""

from __future__ import annotations

import asyncio
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

from nanoclawd import paths

IMAGE = "localhost/nanoclaw-agent:latest"
COMMAND_S = 180.0
ROUTER = "nanoclaw.service"
GATEWAY = "nanoclaw-gateway.service"


async def run(*command: str, input: bytes | None = None) -> str:
    """Run a command and return its stdout. Raises RuntimeError with what it said."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL if input is None else asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(COMMAND_S):
            stdout, stderr = await process.communicate(input)
    except BaseException:
        process.kill()
        await process.wait()
        raise
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit status {process.returncode}\n{stderr.decode()}")
    return stdout.decode()


async def timed(*command: str) -> float:
    """Run a command and return how long it took, in ms."""
    began = time.monotonic()
    await run(*command)
    return (time.monotonic() - began) * 1000


async def systemctl(*arguments: str) -> str:
    return await run("systemctl", "--user", *arguments)


async def main_pid(unit: str) -> int:
    """Return the pid of the unit's main process. Raises RuntimeError if it does not run."""
    pid = int(await systemctl("show", "--property=MainPID", "--value", unit))
    if not pid:
        raise RuntimeError(f"{unit} does not run")
    return pid


async def runner_pid(agent: str, session: str) -> int:
    """Return the pid of the runner in a session's container."""
    name = f"nanoclaw-{agent}-{session}"
    return int(await run("podman", "inspect", "--format", "{{.State.Pid}}", name))


async def restart_router() -> float:
    """Restart the router and return the ms from its exec to its READY=1."""
    await systemctl("restart", ROUTER)
    names = ("ExecMainStartTimestampMonotonic", "ActiveEnterTimestampMonotonic")
    shown = await systemctl("show", f"--property={','.join(names)}", ROUTER)
    values = dict(line.split("=", 1) for line in shown.splitlines())
    return (int(values[names[1]]) - int(values[names[0]])) / 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """What a process has in memory, in MB (10^6 bytes)."""

    rss: float  #: all of it
    pss: float  #: what it shares counted in part


def read_memory(pid: int) -> Memory:
    """Source: man 5 proc_pid_smaps."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, amount, *_ = line.split()
        fields[name] = int(amount) * 1024 / 1e6
    return Memory(rss=fields["Rss:"], pss=fields["Pss:"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What all threads of a process have done since it began."""

    cpu_s: float
    wakeups: int  #: voluntary context switches: it waited for something, and that came


def read_work(pid: int) -> Work:
    """CPU time from schedstat, in ns: utime and stime of an idle process are often 0 of 10 ms."""
    cpu_ns = wakeups = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        cpu_ns += int((task / "schedstat").read_text().split()[0])
        for line in (task / "status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches:"):
                wakeups += int(line.split()[1])
    return Work(cpu_s=cpu_ns / 1e9, wakeups=wakeups)


def measure_fsync(samples: int = 50) -> list[float]:
    """Return what one small durable write costs where the database is, in ms."""
    path = paths.state() / "bench-fsync"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        taken = []
        for _ in range(samples):
            began = time.monotonic()
            os.write(fd, bytes(4096))
            os.fsync(fd)
            taken.append((time.monotonic() - began) * 1000)
        return taken
    finally:
        os.close(fd)
        path.unlink()


async def describe() -> list[str]:
    """Return lines on what was measured on."""
    systemd = (await run("systemctl", "--version")).split("\n", 1)[0]
    podman = (await run("podman", "--version")).strip()
    disk = (await run("df", "--output=fstype", str(paths.state()))).split()[-1]
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return [
        f"{systemd}, {podman}, Python {platform.python_version()}, Linux {os.uname().release}",
        f"{len(os.sched_getaffinity(0))} cores, load before {load}; database on {disk}",
    ]
