#!/usr/bin/env bash
# Runs the service through every fault of tests/faults/, again and again, each as long as in life (a pause or a lost
# quorum is a minute), and prints a table of what came of it.
#
#   tests/faults.sh [--seed N] [--minutes M] [--server 2.9|2.15] [--mode singly|batches] [--only PART] [--jobs N]
#
# Each fault meets three cases: events sent one by one to Debian's nats-server and to a current one, and events of a
# single key sent in atomic batches, which only the current one takes. The cluster is always of current servers.
#
# --seed     where the seeds begin, one for each run; default: the time. A run is repeated with its own seed:
#            tests/faults.sh --seed N --server S --mode M --only FAULT
# --minutes  how long to go on; every case is run at least once. Default 30.
# --server   only cases with this nats-server.
# --mode     only cases of this mode.
# --only     faults whose name contains PART, once each unless --minutes says otherwise.
# --jobs     runs at a time. Default 1; a run needs a core for itself at times.
#
# Exit code 1 if a promise was broken; the log of each such run is kept, and its folder named. The program and the
# tests are built as cargo test builds them, with the failpoints.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. etc/servers.sh
. tests/servers.sh

seed=$(date +%s) minutes=30 servers="2.9 2.15" modes="singly batches" only= jobs=1
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
        --jobs,[1-9]) jobs=$2 ;;
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

# What there is to run, each a fault, a server and a mode.
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

logs=$(mktemp -d "${TMPDIR:-/tmp}/pg-outbox-faults-XXXXXX")
results=$logs/results
: > "$results"

# One run: its result is a line of fault, server, mode, verdict, recovered, committed, redelivered, admitted and limit,
# separated by blanks.
run() {
    local fault=$1 server=$2 mode=$3 seed=$4 log=$logs/$1-$4.log verdict=ok begun=$SECONDS line
    [ "$server" = 2.9 ] || export PG_OUTBOX_NATS_SERVER=$PG_OUTBOX_NATS_SERVER_CURRENT
    PG_OUTBOX_FAULTS=long PG_OUTBOX_FAULTS_SENDING=$mode PG_OUTBOX_FAULTS_SEED=$seed \
        "$program" --exact "faults::$fault" --nocapture > "$log" 2>&1 || verdict=BROKEN
    line=$(grep -m 1 '^verdict: ' "$log" || true)
    field() { grep -o " $1=[0-9.]*" <<< "$line" | cut -d= -f2 || true; }
    local recovered committed redelivered admitted limit
    recovered=$(field recovered) committed=$(field committed) redelivered=$(field redelivered)
    admitted=$(field admitted) limit=$(field limit)
    printf '%s %s %s %s %s %s %s %s %s\n' "$fault" "$server" "$mode" $verdict "${recovered:-0}" "${committed:-0}" \
        "${redelivered:-0}" "${admitted:-0}" "${limit:-0}" >> "$results"
    say "$fault, $server, $mode: $verdict after $((SECONDS - begun))s, seed $seed, recovered=${recovered:-?}s committed=${committed:-?}"
    if [ $verdict = ok ]; then
        rm "$log"
    else
        grep -m 3 -E 'broke a promise|waited .* in vain|panicked' "$log" | sed 's/^/    /' || true
        say "to repeat it: tests/faults.sh --seed $seed --server $server --mode $mode --only $fault; its log: $log"
    fi
}

debian=$(/usr/sbin/nats-server --version 2> /dev/null || nats-server --version)
say "$debian and $("$PG_OUTBOX_NATS_SERVER_CURRENT" --version), seed $seed, ${#cases[@]} cases, $minutes minutes, $(nproc) cores, $jobs at a time, logs in $logs"
end=$((SECONDS + minutes * 60)) first=$seed round=0
while [ $round -eq 0 ] || [ $SECONDS -lt $end ]; do
    for entry in "${cases[@]}"; do
        [ $round -eq 0 ] || [ $SECONDS -lt $end ] || break
        while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n || true; done
        # shellcheck disable=SC2086 # three words
        run $entry "$seed" &
        seed=$((seed + 1))
    done
    round=$((round + 1))
done
wait

echo
sort -k 1,1 -k 2,2r -k 3,3r -s "$results" | awk '
    {
        which = $1 " " $2 " " $3
        if (!(which in runs)) order[++cases] = which
        runs[which]++; committed[which] += $6; redelivered[which] += $7; admitted[which] += $8
        if ($9 > limit[which]) limit[which] = $9
        if ($4 != "ok") broken[which]++
        if ($5 > slowest[which]) slowest[which] = $5
    }
    END {
        print "| fault | server | mode | runs | verdict | events | recovered within | limit | redelivered | duplicates admitted by the design |"
        print "|---|---|---|---|---|---|---|---|---|---|"
        for (i = 1; i <= cases; i++) {
            c = order[i]; split(c, part, " "); name = part[1]; gsub(/_/, " ", name)
            verdict = broken[c] ? "**broken " broken[c] "**" : "kept"
            printf "| %s | %s | %s | %d | %s | %d | %.1f s | %d s | %d | %d |\n", name, part[2], part[3], runs[c], verdict, \
                committed[c], slowest[c], limit[c], redelivered[c], admitted[c]
        }
    }'
echo
broken=$(grep -c ' BROKEN ' "$results" || true)
say "$(wc -l < "$results") runs in $((SECONDS / 60)) minutes, seeds $first to $((seed - 1)), $(nproc) cores: $broken broke a promise"
[ "$broken" -eq 0 ] || exit 1
rm -rf "$logs"
