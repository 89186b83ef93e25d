#!/usr/bin/env bash
# Everything that must hold before a change is done: format, lints, all tests. Installs what is missing.
#
#   tests/run.sh                                  also what depends on PostgreSQL, on a current PostgreSQL
#   tests/run.sh --current-postgres               everything, on the current PostgreSQL instead of Debian's
#   tests/run.sh [arguments of cargo test]        what these select
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
if [ "${1:-}" = --current-postgres ]; then
    shift
    fetch_current_postgres
    let_postgres_reach_it
    export PG_OUTBOX_POSTGRES_BIN=$POSTGRES_CURRENT_BIN
elif [ $# -eq 0 ]; then
    fetch_current_postgres
fi
say "cargo fmt"
cargo fmt --check
say "cargo clippy"
cargo clippy --locked --all-targets -- -D warnings
say "cargo test"
cargo test --locked "$@"
if [ $# -eq 0 ] && [ -z "${PG_OUTBOX_POSTGRES_BIN:-}" ]; then
    say "cargo test, what depends on PostgreSQL, on PostgreSQL $POSTGRES_CURRENT"
    let_postgres_reach_it
    PG_OUTBOX_POSTGRES_BIN=$POSTGRES_CURRENT_BIN cargo test --locked --test integration -- \
        schema:: claim:: delivery:: wakeup:: partitions:: pooler:: settings:: home:: roles:: dead:: replay:: status:: \
        rejections:: postgres_tls:: hostile::postgres:: hostile::rows::rows_of_every_kind
fi
