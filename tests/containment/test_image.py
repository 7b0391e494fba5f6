"""Nothing in the image of agents hands out privileges, wherever it lies and whoever may look at it."""

from __future__ import annotations

import json

from tests.support.machine import Machine

#: Looks as the namespace's root, to whom no directory is closed, and not on what is mounted.
SCAN = """
import json, os, stat
found, count = [], 0
for top, directories, names in os.walk("/"):
    directories[:] = [name for name in directories if not os.path.ismount(os.path.join(top, name))]
    for path in (os.path.join(top, name) for name in names):
        mode = os.lstat(path).st_mode
        count += 1
        if stat.S_ISREG(mode) and mode & 0o6000 or stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            found.append(f"{path} {mode:o}")
        if "security.capability" in os.listxattr(path, follow_symlinks=False):
            found.append(f"{path} has file capabilities")
print(json.dumps([count, found]))
"""
OURS, WORSE = "localhost/nanoclaw-agent:latest", "localhost/worse:latest"
#: Ours, and one more program: the scan must find it.
BUILD = f"""
podman build --quiet --network none --tag {WORSE} - << 'END' > /dev/null
FROM {OURS}
USER 0
RUN cp /bin/true /usr/bin/worse && chmod 4755 /usr/bin/worse
END
"""


def scan(machine: Machine, image: str) -> tuple[int, list[str]]:
    run = ("podman", "run", "--rm", "--pull=never", "--network=none", "--user=0", "--entrypoint=python3")
    count, found = json.loads(machine.run(*run, image, "-c", SCAN, timeout_s=120).stdout)
    return count, found


def test_no_program_is_privileged(machine: Machine) -> None:
    count, found = scan(machine, OURS)

    assert count > 1000
    assert found == []


def test_one_that_is_would_be_found(machine: Machine) -> None:
    machine.sh(BUILD, timeout_s=120)
    try:
        _, found = scan(machine, WORSE)
    finally:
        machine.run("podman", "image", "rm", "--force", WORSE)

    assert found == ["/usr/bin/worse 104755"]
