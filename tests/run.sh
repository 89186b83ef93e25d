#!/usr/bin/env bash
# Everything that must hold before a change is done: format, lints, all tests. Installs what is missing.
#
#   tests/run.sh [arguments of cargo test]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. etc/servers.sh
. tests/servers.sh

# systemd-analyze judges the units, groff the manual pages; a package is installed by root, or by who seems to be.
install_missing_tools() {
    command -v systemd-analyze > /dev/null || install_packages systemd
    command -v groff > /dev/null || install_packages groff-base
    command -v python3 > /dev/null || install_packages python3
    command -v strip > /dev/null || install_packages binutils
    [ "$(id -u)" -eq 0 ] || command -v fakeroot > /dev/null || install_packages fakeroot
}

install_what_tests_need
install_missing_tools
say "cargo fmt"
cargo fmt --check
say "cargo clippy"
cargo clippy --locked --all-targets -- -D warnings
say "cargo test"
cargo test --locked "$@"
