#!/bin/bash
# install.sh - installs NanoClaw for this user from this checkout, and lets the first agent answer.
#
#   ./install.sh [--yes] [--no-demo] [--no-image] [--base-directory DIR] [--channel KIND [--wheels DIR]]
#   ./install.sh --uninstall [--purge] [--yes]
#
#   --yes                 do not ask before packages are installed or data is deleted
#   --no-demo             do not add the agent "demo" and do not send it a message
#   --no-image            do not build the agent image
#   --base-directory DIR  build it without a registry, on what agent-image/make-base DIR made
#   --channel KIND        install an adapter of skills/ too, with its Python packages from PyPI, e.g. matrix
#   --wheels DIR          its packages, and pip, from this directory and not from PyPI
#   --uninstall           remove programs, units, generated units and image; keep configuration and data
#   --purge               ... and remove those too
#
# Twice is harmless: what is there is brought up to date. Where there is no systemd user manager (a container, a
# bare VM), root gets the same in the project's own nested machine, see tests/machine/machine.
#
# An API key in ANTHROPIC_API_KEY makes "demo" an agent that thinks; without one it answers with an echo.
set -euo pipefail
umask 022

HERE=$(dirname "$(realpath "$0")")
YES='' DEMO=1 IMAGE=1 BASE='' CHANNEL='' WHEELS='' UNINSTALL='' PURGE='' FRESH=''
ARGS=("$@")

say() { printf '%s\n' "$*"; }
step() { printf '\n==> %s\n' "$*"; }
die() {
  printf 'error: %s\n' "$1" >&2
  [ -z "${2:-}" ] || printf 'hint: %s\n' "$2" >&2
  exit 1
}
ask() { # QUESTION: true if yes
  [ -z "$YES" ] || return 0
  [ -t 0 ] || die "$1 - cannot ask without a terminal" "run it with --yes to agree"
  local answer
  read -r -p "$1 [y/N] " answer
  [[ $answer == [yY]* ]]
}

while [ $# -gt 0 ]; do
  case $1 in
    --yes | -y) YES=1 ;;
    --no-demo) DEMO= ;;
    --no-image) IMAGE= ;;
    --base-directory)
      [ $# -gt 1 ] || die "--base-directory needs a directory"
      BASE=$(realpath "$2") && shift
      ;;
    --channel)
      [ -x "$HERE/skills/${2:-}/adapter" ] || die "no adapter '${2:-}'" "there is: $(cd "$HERE/skills" && echo */)"
      CHANNEL=$2 && shift
      ;;
    --wheels)
      [ $# -gt 1 ] || die "--wheels needs a directory"
      WHEELS=$(realpath "$2") && shift
      ;;
    --uninstall) UNINSTALL=1 ;;
    --purge) PURGE=1 ;;
    --help | -h) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0" && exit 0 ;;
    *) die "unknown option '$1'" "'./install.sh --help' shows all" ;;
  esac
  shift
done
[ -z "$PURGE" ] || [ -n "$UNINSTALL" ] || die "--purge goes with --uninstall"

# --- where there is no user manager: the nested machine ---------------------------------------------

has_user_manager() { [ "$(id -u)" != 0 ] && systemctl --user show-environment > /dev/null 2>&1; }

in_machine() {
  local machine=$HERE/tests/machine/machine cache=${NANOCLAW_CACHE:-/var/cache/nanoclaw}
  [ "$(id -u)" = 0 ] || die "no systemd user manager runs for this user" \
    "log in through PAM (ssh, a console, machinectl shell), or run this as root to try it in a nested machine"
  [ ! -d /run/systemd/system ] || die "this is root, and NanoClaw is installed for an ordinary user" \
    "run it as that user"
  say "There is no systemd user manager here: everything happens in the project's own nested machine."
  if [ -n "$UNINSTALL" ]; then
    "$machine" status > /dev/null || { say "It is not running, and nothing of it stays."; exit 0; }
    "$machine" exec -C /srv/project -- ./install.sh "${ARGS[@]}" --yes
    "$machine" down
    exit 0
  fi
  [ -z "${ANTHROPIC_API_KEY:-}" ] || say "It has no network, so the API key is of no use in it: \"demo\" will echo."
  step "Base of the agent image (cached in $cache)"
  mkdir -p "$cache/agent-base"
  "$HERE/agent-image/make-base" "$cache/agent-base"
  step "Nested machine"
  "$machine" up --project "$HERE" --bind-ro "$cache/agent-base:/srv/base"
  "$machine" exec -C /srv/project -- ./install.sh "${ARGS[@]}" --yes --base-directory /srv/base
  say
  say "It goes on running. tests/machine/machine shell   is a shell in it, as the person"
  say "                    tests/machine/machine down    ends it; nothing of it stays"
  exit 0
}
has_user_manager || in_machine

# --- places -----------------------------------------------------------------------------------------

DATA=${XDG_DATA_HOME:-$HOME/.local/share}
CONFIG=${XDG_CONFIG_HOME:-$HOME/.config}
STATE=${XDG_STATE_HOME:-$HOME/.local/state}
BIN=$HOME/.local/bin
LIB=$HOME/.local/lib/nanoclaw
UNITS=$DATA/systemd/user
PYTHON=/usr/bin/python3 # the distribution's: its packages are the ones that we use
ENABLED=(nanoclaw.socket nanoclaw-channel.socket nanoclaw-gateway.socket nanoclaw.service)
completions() { # SHELL: where this user's completions for it lie
  case $1 in
    bash) echo "$DATA/bash-completion/completions/nanoclawctl" ;;
    zsh) echo "$DATA/zsh/site-functions/_nanoclawctl" ;;
    fish) echo "$DATA/fish/vendor_completions.d/nanoclawctl.fish" ;;
  esac
}

prune_images() { # former versions of our image that no container runs on
  podman image prune --force --filter label=io.nanoclaw.agent-image > /dev/null 2>&1 || true
}

man_pages() { # where this user's copies of our manual lie
  local page
  for page in "$HERE"/packaging/man/*.[1-8]; do
    [ ! -e "$page" ] || echo "$DATA/man/man${page##*.}/$(basename "$page")"
  done
}

uninstall() {
  local unit
  if [ -n "$PURGE" ] && ! ask "Delete configuration, credentials, workspaces and messages for ever?"; then PURGE=; fi
  step "Stopping and removing"
  for unit in "${ENABLED[@]}" nanoclaw-gateway.service; do
    systemctl --user disable --quiet --now "$unit" 2> /dev/null || true # the unit may be gone already
  done
  systemctl --user stop 'nanoclaw-*@*.service' nanoclaw-podman.service nanoclaw-agents.slice nanoclaw.slice 2> /dev/null || true
  systemctl --user clean --what=fdstore nanoclaw.service 2> /dev/null || true
  [ ! -e "$LIB/podman.socket" ] || systemctl --user disable --quiet --now podman.socket
  rm -rf "$LIB" "$CONFIG/containers/systemd/nanoclaw" "${XDG_RUNTIME_DIR:?}/nanoclaw"
  rm -f "$BIN"/{nanoclawd,nanoclaw-gateway,nanoclaw-adapter,nanoclawctl} "$UNITS"/nanoclaw{,-channel@,-gateway,-podman}.service \
    "$UNITS"/nanoclaw{,-channel,-gateway}.socket "$UNITS"/nanoclaw{,-agents}.slice
  rm -rf "$UNITS/nanoclaw-.service.d"
  local files=("$(completions bash)" "$(completions zsh)" "$(completions fish)") directory
  mapfile -t -O 3 files < <(man_pages)
  rm -f "${files[@]}"
  systemctl --user daemon-reload
  systemctl --user reset-failed 'nanoclaw*' 2> /dev/null || true
  podman image rm -f localhost/nanoclaw-agent:latest localhost/nanoclaw-base:latest > /dev/null 2>&1 || true
  prune_images
  for unit in "$HERE"/skills/*/adapter; do rm -rf "$DATA/nanoclaw/channels/$(basename "${unit%/adapter}")"; done
  if [ -n "$PURGE" ]; then
    # Files of agents belong to subordinate uids.
    podman unshare rm -rf "$STATE/nanoclaw"
    rm -rf "$CONFIG/nanoclaw" "$CONFIG"/credstore.encrypted/nanoclaw.*
    say "Removed, with all data."
  else
    say "Removed. Kept: $CONFIG/nanoclaw, $STATE/nanoclaw and the credentials ('--purge' deletes them)."
  fi
  # Directories in which nothing but ours was.
  for directory in "$BIN" "$(dirname "$LIB")" "$UNITS" "$DATA/nanoclaw/channels" "$CONFIG/containers/systemd" "$CONFIG/credstore.encrypted" "$STATE" \
    "$CONFIG"/systemd/user{/sockets.target.wants,/default.target.wants,}; do
    files+=("$directory/.")
  done
  for directory in "${files[@]%/*}"; do
    while [[ $directory == "$HOME"/* ]] && rmdir "$directory" 2> /dev/null; do directory=${directory%/*}; done
  done
}
if [ -n "$UNINSTALL" ]; then
  uninstall
  exit 0
fi

# --- what it needs ----------------------------------------------------------------------------------

missing_modules() { # the Python modules that are not there
  "$PYTHON" -I -c 'import importlib.util, sys
print(*[m for m in sys.argv[1:] if importlib.util.find_spec(m) is None])' jeepney podman systemd aiosqlite tomli_w h11
}

install_packages() {
  local module packages=() install
  command -v podman > /dev/null || packages+=(podman)
  for module in $(missing_modules); do packages+=("python3-${module/_/-}"); done
  if command -v apt-get > /dev/null; then
    command -v newuidmap > /dev/null || packages+=(uidmap)
    [ -e /usr/lib/systemd/user/dbus.socket ] || packages+=(dbus-user-session)
    if [ -n "$CHANNEL" ] && [ -z "$WHEELS" ] && ! "$PYTHON" -c 'import ensurepip' 2> /dev/null; then packages+=(python3-venv); fi
    install=(sudo apt-get install -y --no-install-recommends)
  elif command -v dnf > /dev/null; then
    install=(sudo dnf install -y)
  fi
  [ ${#packages[@]} != 0 ] || return 0
  [ -n "${install[*]:-}" ] || die "missing: ${packages[*]}" "install them with your package tool, then run this again"
  command -v sudo > /dev/null || die "missing: ${packages[*]}" "as root: ${install[*]:1} ${packages[*]}"
  ask "Install ${packages[*]} with '${install[*]}'?" || die "these packages are needed: ${packages[*]}"
  "${install[@]}" "${packages[@]}" || die "not installed: ${packages[*]}"
}

ensure_linger() {
  local name
  name=$(id -un)
  [ "$(loginctl show-user "$name" -P Linger 2> /dev/null)" != yes ] || return 0
  if ask "Let your services run while you are logged out (loginctl enable-linger)?"; then
    loginctl enable-linger || die "your services would end when you log out" "as root: loginctl enable-linger $name"
  fi
}

step "Checking what is needed"
[ -x "$PYTHON" ] || die "there is no $PYTHON" "install python3 (3.11 or newer)"
ensure_linger
install_packages
(cd "$HERE" && "$PYTHON" -m nanoclawd.cli.doctor --floor) || die "this machine lacks what is named above"

# --- programs and units -----------------------------------------------------------------------------

step "Installing programs and units for $(id -un)"
launcher() { # NAME MODULE
  printf '#!%s -sP\nimport sys\n\nsys.path.insert(0, "%s")\nfrom %s.__main__ import main\n\nsys.exit(main())\n' "$PYTHON" "$LIB" "$2" > "$BIN/$1.new"
  chmod 755 "$BIN/$1.new"
  mv "$BIN/$1.new" "$BIN/$1"
}
mkdir -p "$BIN" "$UNITS" "$(dirname "$LIB")" "$CONFIG/containers/systemd"
rm -rf "$LIB.new"
mkdir "$LIB.new"
(cd "$HERE" && cp -r nanoclawd quadlets agent-image "$LIB.new/")
find "$LIB.new" -name __pycache__ -prune -exec rm -rf {} +
# Noted, for an uninstallation to leave it as it was.
if [ -e "$LIB/podman.socket" ] || ! systemctl --user is-enabled --quiet podman.socket; then : > "$LIB.new/podman.socket"; fi
"$PYTHON" -m compileall -q -s "$LIB.new" -p "$LIB" "$LIB.new/nanoclawd"
[ -e "$LIB" ] || FRESH=1
rm -rf "$LIB" && mv "$LIB.new" "$LIB"
launcher nanoclawd nanoclawd
launcher nanoclaw-gateway nanoclawd.gateway
launcher nanoclaw-adapter nanoclawd.adapter
launcher nanoclawctl nanoclawd.cli
(cd "$HERE/units" && find . -type f -print) | while read -r unit; do
  mkdir -p "$UNITS/${unit%/*}"
  sed -e "s|@bindir@|$BIN|g" -e "s|@libdir@|$LIB|g" -e "s|@datadir@|$DATA|g" "$HERE/units/$unit" > "$UNITS/$unit"
done
for shell in bash zsh fish; do
  mkdir -p "$(dirname "$(completions $shell)")"
  "$BIN/nanoclawctl" completion $shell > "$(completions $shell)"
done
while read -r page; do
  install -D -m 644 "$HERE/packaging/man/$(basename "$page")" "$page"
done < <(man_pages)
systemctl --user daemon-reload
# An uninstallation stopped it, which the router would take for a person's stop of all agents.
[ -z "$FRESH" ] || systemctl --user start nanoclaw-agents.slice
systemctl --user enable --quiet --now podman.socket
systemctl --user enable --quiet "${ENABLED[@]}"
systemctl --user start nanoclaw.socket nanoclaw-channel.socket nanoclaw-gateway.socket
# A router or gateway of an earlier version makes room; agents go on and do not notice.
systemctl --user try-restart nanoclaw-gateway.service
systemctl --user try-restart 'nanoclaw-channel@*.service'
systemctl --user restart nanoclaw.service || die "nanoclaw.service does not start" "see 'journalctl --user -u nanoclaw'"
say "nanoclaw.service is $(systemctl --user is-active nanoclaw.service)"

# --- channel ----------------------------------------------------------------------------------------

install_channel() { # KIND: an adapter of skills/, with an environment of its own
  local kind=$1 new=$DATA/nanoclaw/channels/$1.new pip
  rm -rf "$new"
  mkdir -p "$new"
  (cd "$HERE/skills/$kind" && cp -r . "$new/")
  find "$new" -name __pycache__ -prune -exec rm -rf {} +
  if [ -n "$WHEELS" ]; then
    "$PYTHON" -m venv --without-pip "$new/venv"
    pip=$(find "$WHEELS" -name 'pip-*.whl' | head -n 1)
    [ -n "$pip" ] || die "there is no pip in $WHEELS"
    set -- --no-index --find-links "$WHEELS"
    PYTHONPATH=$pip "$new/venv/bin/python" -m pip install --quiet --no-deps --no-compile --requirement "$new/requirements.txt" "$@"
  else
    "$PYTHON" -m venv "$new/venv"
    "$new/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: --no-compile \
      --requirement "$new/requirements.txt"
  fi || die "the packages of channel '$kind' were not installed"
  "$PYTHON" -m compileall -q -s "$new" -p "${new%.new}" "$new" || true # some packages hold files for newer versions
  rm -rf "${new%.new}" && mv "$new" "${new%.new}"
  systemctl --user try-restart 'nanoclaw-channel@*.service'
}
if [ -n "$CHANNEL" ]; then
  step "The adapter of channels of the kind '$CHANNEL'"
  install_channel "$CHANNEL"
  say "Installed. Next: docs/$CHANNEL.md"
fi

# --- image and first agent --------------------------------------------------------------------------

if [ -n "$IMAGE" ]; then
  step "Building the agent image"
  "$BIN/nanoclawctl" image build ${BASE:+--base-directory "$BASE"} > /dev/null || die "the agent image was not built" \
    "without a registry: 'agent-image/make-base DIR', then this again with --base-directory DIR"
  prune_images
fi
if [ -n "$DEMO" ]; then
  step "The agent \"demo\""
  provider="echo"
  if [ -n "${ANTHROPIC_API_KEY:-}" ]; then
    printf %s "$ANTHROPIC_API_KEY" | "$BIN/nanoclawctl" secret set anthropic
    provider=anthropic
  fi
  "$BIN/nanoclawctl" agent show demo > /dev/null 2>&1 || "$BIN/nanoclawctl" agent add demo --provider "$provider"
  message="Hello from $(id -un)!"
  say "You:  $message"
  printf 'demo: '
  "$BIN/nanoclawctl" send demo "$message" --wait
fi

step "What to do next"
case :$PATH: in *:$BIN:*) ;; *) say "  export PATH=\"$BIN:\$PATH\"                 # your shell does not look there yet" ;; esac
cat << 'END'
  nanoclawctl chat demo                               # talk to it; Ctrl-D leaves
  nanoclawctl secret set anthropic                    # the API key: only the gateway ever sees it
  nanoclawctl agent add andy --provider anthropic     # an agent that thinks
  nanoclawctl status                                  # systemctl --user status 'nanoclaw*' shows it too
  nanoclawctl doctor                                  # if something does not work
  systemctl --user stop nanoclaw-agents.slice         # stops every agent, whatever else hangs
END
