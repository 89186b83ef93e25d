#!/usr/bin/env bash
# Runs the service through every fault of tests/faults/, again and again, each as long as in life (a pause or a lost
# quorum is a minute), and prints what came of it: run by run, then by server and mode, then as one table in Markdown.
#
#   tests/faults.sh [--seed N] [--minutes M] [--server 2.9|2.15] [--mode singly|batches] [--only PART] [--jobs N]
#
# Each fault meets three cases: events sent one by one to Debian's nats-server and to a current one, and events of a
# single key sent in atomic batches, which only the current one takes. The cluster is always of current servers.
#
# --seed     where the seeds begin, one for each run; default: the time. A run is repeated with its own seed:
#            tests/faults.sh --seed N --server S --mode M --only FAULT
# --minutes  how long to begin runs, as many as end in time. Default 30. Once through all cases of a server takes some
#            40 minutes a mode, divided by the jobs; what was not reached is named.
# --server   only cases with this nats-server.
# --mode     only cases of this mode.
# --only     faults whose name contains PART, once each unless --minutes says otherwise.
# --jobs     runs at a time; most of them wait most of the time. Default: two for each core.
#
# Exit code 1 if a promise was broken: the log of each such run is kept, and its folder named. Exit code 2 if none was,
# and there was no time for some case. The program and the tests are built as cargo test builds them, with the
# failpoints.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. etc/servers.sh
. tests/servers.sh

seed=$(date +%s) minutes=30 servers="2.9 2.15" modes="singly batches" only= jobs=$(($(nproc) * 2))
usage() {
    die "usage: tests/faults.sh [--seed N] [--minutes M] [--server 2.9|2.15] [--mode singly|batches] [--only PART] [--jobs N]"
}
whole() { [[ $1 =~ ^[0-9]{1,18}$ ]] || usage; }
minutes_given=
while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || usage
    case $1,$2 in
        --seed,*) whole "$2" && seed=$2 ;;
        --minutes,*) whole "$2" && minutes=$2 minutes_given=yes ;;
        --server,2.9 | --server,2.15) servers=$2 ;;
        --mode,singly | --mode,batches) modes=$2 ;;
        --only,*) only=$2 ;;
        --jobs,[1-9] | --jobs,[1-9][0-9]) jobs=$2 ;;
        *) usage ;;
    esac
    shift 2
done
[ -z "$only" ] || [ -n "$minutes_given" ] || minutes=0

install_what_tests_need
say "building"
program=$(cargo test --locked --test integration --no-run --message-format json-render-diagnostics \
    | python3 -c 'import json, sys
for line in sys.stdin:
    built = json.loads(line)
    if built.get("target", {}).get("name") == "integration" and built.get("executable"):
        print(built["executable"])')
mapfile -t faults < <("$program" --list faults:: | sed -n 's/^faults::\([a-z0-9_]*\): test$/\1/p' | grep -F -- "$only")
[ "${#faults[@]}" -gt 0 ] || die "no fault has $only in its name"

# What there is to run, each a fault, a server and a mode; in an order of the seed's, as runs of one fault are alike, and
# would all want the processor, or wait, at the same time.
cases=()
for fault in "${faults[@]}"; do
    for server in $servers; do
        for mode in $modes; do
            [ "$server,$mode" != 2.9,batches ] || continue
            [[ $server,$fault != 2.9,the_cluster_* ]] || continue
            cases+=("$fault $server $mode")
        done
    done
done
[ "${#cases[@]}" -gt 0 ] || die "nothing to run: nats-server $servers has no atomic batches, or is no cluster"
mapfile -t cases < <(printf '%s\n' "${cases[@]}" | shuf --random-source=<(yes "$seed"))

logs=$(mktemp -d "${TMPDIR:-/tmp}/pg-outbox-faults-XXXXXX")
results=$logs/results
: > "$results"

# Longest time of a run, several times what the longest one takes: one that hangs is broken.
run_limit=900

# One run: its result is a line of fault, server, mode, seconds, verdict, recovered, limit, committed, redelivered and
# admitted, separated by blanks.
run() {
    local fault=$1 server=$2 mode=$3 seed=$4 log=$logs/$1-$4.log verdict=kept begun=$SECONDS line
    [ "$server" = 2.9 ] || export PG_OUTBOX_NATS_SERVER=$PG_OUTBOX_NATS_SERVER_CURRENT
    PG_OUTBOX_FAULTS=long PG_OUTBOX_FAULTS_SENDING=$mode PG_OUTBOX_FAULTS_SEED=$seed \
        timeout $run_limit "$program" --exact "faults::$fault" --nocapture > "$log" 2>&1 || verdict=broken
    line=$(grep -m 1 '^verdict: ' "$log" || true)
    field() { grep -o " $1=[0-9.]*" <<< "$line" | cut -d= -f2 | grep . || echo 0; }
    local took=$((SECONDS - begun)) recovered
    recovered=$(field recovered)
    echo "$fault $server $mode $took $verdict $recovered $(field limit) $(field committed) $(field redelivered)" \
        "$(field admitted)" >> "$results"
    say "$fault, $server, $mode: $verdict after ${took}s, seed $seed, recovered=${recovered}s committed=$(field committed)"
    if [ $verdict = kept ]; then
        rm "$log"
    else
        grep -m 3 -E 'broke a promise|waited .* in vain|panicked' "$log" | sed 's/^/    /' || true
        say "to repeat it: tests/faults.sh --seed $seed --server $server --mode $mode --only $fault; its log: $log"
    fi
}

# True if a run of this case fits into what is left of the time, by what the last one took.
fits() {
    [ "$minutes" -ne 0 ] || return 0
    local took
    took=$(grep "^$1 " "$results" | tail -n 1 | cut -d' ' -f4 || true)
    [ $((SECONDS + ${took:-0})) -lt $end ]
}

debian=$(/usr/sbin/nats-server --version 2> /dev/null || nats-server --version)
versions="${debian#*: v} and $NATS_CURRENT"
memory=$(awk '/^MemTotal:/ { printf "%.0f GiB", $2 / 1048576 }' /proc/meminfo)
say "nats-server $versions, seed $seed, ${#cases[@]} cases, $minutes minutes, $(nproc) cores, $memory, $jobs at a time, logs in $logs"
begun=$SECONDS end=$((SECONDS + minutes * 60)) first=$seed more=yes
while [ -n "$more" ]; do
    more=
    for entry in "${cases[@]}"; do
        while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n || true; done
        fits "$entry" || continue
        [ "$minutes" -eq 0 ] || more=yes
        # shellcheck disable=SC2086 # three words
        run $entry "$seed" &
        seed=$((seed + 1))
    done
done
wait

printf '%s\n' "${cases[@]}" > "$logs/cases"
echo
code=0
python3 tests/faults.py "$logs/cases" "$results" \
    "Seeds $first to $((seed - 1)), $(((SECONDS - begun + 30) / 60)) minutes, $jobs runs at a time on $(nproc) cores and $memory, nats-server $versions:" || code=$?
[ $code -eq 1 ] || rm -rf "$logs"
exit $code
