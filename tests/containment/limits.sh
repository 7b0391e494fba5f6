#!/bin/bash
# limits.sh - for tests/machine/uml: installs the product, and prints a line of JSON each for: selftest; how many
# processes an agent gets by TasksMax= alone; which share of a CPU by CPUQuota=; what became of the user manager when
# an agent had taken more memory than it may.
set -euo pipefail
ctl() { .local/bin/nanoclawctl "$@"; }

cd /srv/project
./install.sh --yes --no-demo --no-image > /tmp/install 2>&1 || { cat /tmp/install && exit 1; }
cd
ctl selftest --json

mkdir -p .config/containers/systemd/nanoclaw-limited@.container.d
printf '[Container]\nUlimit=nproc=2000:2000\n' > .config/containers/systemd/nanoclaw-limited@.container.d/50-local.conf
ctl agent add limited --provider echo --tasks-max 64 --cpu-quota 30% 2> /dev/null
ctl send limited hello --wait > /dev/null
container=$(podman ps --format '{{.Names}}' | grep limited)
podman exec "$container" python3 -c '
import os, signal
children = []
try:
    while len(children) < 500:
        if (pid := os.fork()) == 0:
            signal.pause()
        children.append(pid)
except OSError as exc:
    print("{\"processes\": %d, \"error\": \"%s\"}" % (len(children), exc.strerror))
finally:
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
'
podman exec "$container" python3 -c '
import time
began = time.monotonic()
while time.monotonic() - began < 4:
    pass
print("{\"cpu\": %.3f}" % (time.process_time() / (time.monotonic() - began)))
'

ctl agent add hog --provider echo 2> /dev/null
ctl send hog hello --wait > /dev/null
container=$(podman ps --format '{{.Names}}' | grep hog)
podman exec "$container" python3 -c '
taken = []
while True:
    taken.append(bytearray(1 << 20))
' > /dev/null 2>&1 || true
while systemctl --user is-active --quiet 'nanoclaw-hog@*.service'; do sleep 0.1; done
printf '{"router": "%s"}\n' "$(systemctl --user is-active nanoclaw.service)"
