#!/bin/bash
# limits.sh - in tests/machine/uml: installs the product and prints what selftest says where controllers are there.
set -euo pipefail
cd /srv/project
./install.sh --yes --no-demo --no-image > /tmp/install 2>&1 || { cat /tmp/install && exit 1; }
cd
.local/bin/nanoclawctl selftest --json
