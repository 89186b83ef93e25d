#!/usr/bin/env bash
# Shows pg-outbox at work on private servers: installs what is missing, builds, and runs `pg-outbox demo`.
#
#   etc/demo.sh [--events N] [--keep]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. etc/servers.sh

need_cargo
install_missing_servers
say "building pg-outbox (the first time takes a minute or two)"
cargo build --release --locked --bin pg-outbox
exec "${CARGO_TARGET_DIR:-target}/release/pg-outbox" demo "$@"
