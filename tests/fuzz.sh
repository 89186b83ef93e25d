#!/usr/bin/env bash
# Sends rows of any kind through the built program to real servers, far more than a test run does: the properties of
# tests/hostile/properties.rs, and the fixed rows of tests/hostile/rows.rs.
#
#   tests/fuzz.sh [--cases N]
#
# --cases  how many cases, on each of two versions of nats-server; a case is up to 30 rows and takes some 0.5 s. Default 1000.
#
# Exit code 1 if a property does not hold: the smallest case that breaks it is printed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. etc/servers.sh
. tests/servers.sh

cases=1000
if [ $# -gt 0 ]; then
    [[ $# -eq 2 && $1 = --cases && $2 =~ ^[1-9][0-9]{0,8}$ ]] || die "usage: tests/fuzz.sh [--cases N]"
    cases=$2
fi

install_what_tests_need
PG_OUTBOX_FUZZ_CASES=$cases cargo test --locked --test integration -- hostile::properties hostile::rows --nocapture
