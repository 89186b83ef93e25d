#!/usr/bin/env bash
# Runs the service through every fault of tests/faults/, again and again, each as long as in life (a pause or a lost
# quorum is a minute), and prints a table of what came of it.
#
#   tests/faults.sh [--seed N] [--minutes M] [--server 2.9|2.15] [--only PART]
#
# --seed     where the seeds begin, one for each run; default: the time. A run is repeated with its own seed:
#            tests/faults.sh --seed N --only FAULT
# --minutes  how long to go on; every fault is run at least once. Default 30.
# --server   the nats-server: Debian's (default) or a current one. The cluster is always of the current one.
# --only     faults whose name contains PART, once each unless --minutes says otherwise.
#
# Exit code 1 if a promise was broken; the log of each such run is kept, and its folder named. The program and the
# tests are built as cargo test builds them, with the failpoints.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. etc/servers.sh
. tests/servers.sh

seed=$(date +%s) minutes=30 server=2.9 only=
usage() { die "usage: tests/faults.sh [--seed N] [--minutes M] [--server 2.9|2.15] [--only PART]"; }
whole() { [[ $1 =~ ^[0-9]{1,18}$ ]] || usage; }
minutes_given=
while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || usage
    case $1 in
        --seed) whole "$2" && seed=$2 ;;
        --minutes) whole "$2" && minutes=$2 minutes_given=yes ;;
        --server) server=$2 ;;
        --only) only=$2 ;;
        *) usage ;;
    esac
    shift 2
done
[ -z "$only" ] || [ -n "$minutes_given" ] || minutes=0

install_what_tests_need
case $server in
    2.9) ;;
    2.15) export PG_OUTBOX_NATS_SERVER=$PG_OUTBOX_NATS_SERVER_CURRENT ;;
    *) usage ;;
esac

say "building"
program=$(cargo test --locked --test integration --no-run --message-format json-render-diagnostics \
    | python3 -c 'import json, sys
for line in sys.stdin:
    built = json.loads(line)
    if built.get("target", {}).get("name") == "integration" and built.get("executable"):
        print(built["executable"])')
mapfile -t faults < <("$program" --list faults:: | sed -n 's/^faults::\([a-z0-9_]*\): test$/\1/p' | grep -F -- "$only")
[ "${#faults[@]}" -gt 0 ] || die "no fault has $only in its name"

logs=$(mktemp -d "${TMPDIR:-/tmp}/pg-outbox-faults-XXXXXX")
results=$logs/results
: > "$results"

# One run: its result is a line of fault, verdict, recovered, committed, redelivered, admitted, limit, separated by blanks.
run() {
    local fault=$1 log=$logs/$1-$2.log verdict=ok begun=$SECONDS line
    PG_OUTBOX_FAULTS=long PG_OUTBOX_FAULTS_SEED=$2 "$program" --exact "faults::$fault" --nocapture > "$log" 2>&1 \
        || verdict=BROKEN
    line=$(grep -m 1 '^verdict: ' "$log" || true)
    field() { grep -o " $1=[0-9.]*" <<< "$line" | cut -d= -f2 || true; }
    printf '%s %s %s %s %s %s %s\n' "$fault" $verdict "$(field recovered || true)" "$(field committed)" "$(field redelivered)" \
        "$(field admitted)" "$(field limit)" | awk '{ while (NF < 7) $(NF + 1) = 0; print }' >> "$results"
    say "$fault: $verdict after $((SECONDS - begun))s, seed $2${line:+,$(grep -o ' recovered=[^ ]* committed=[^ ]*' <<< "$line")}"
    if [ $verdict = ok ]; then
        rm "$log"
    else
        grep -m 3 -E 'broke a promise|waited .* in vain|panicked' "$log" | sed 's/^/    /' || true
        say "to repeat it: tests/faults.sh --server $server --seed $2 --only $fault; its log: $log"
    fi
}

say "$("${PG_OUTBOX_NATS_SERVER:-nats-server}" --version 2> /dev/null || /usr/sbin/nats-server --version), seed $seed, ${#faults[@]} faults, $minutes minutes, $(nproc) cores, logs in $logs"
end=$((SECONDS + minutes * 60)) first=$seed round=0
while [ $round -eq 0 ] || [ $SECONDS -lt $end ]; do
    for fault in "${faults[@]}"; do
        [ $round -eq 0 ] || [ $SECONDS -lt $end ] || break
        run "$fault" "$seed"
        seed=$((seed + 1))
    done
    round=$((round + 1))
done

echo
awk '
    {
        if (!($1 in runs)) order[++faults] = $1
        runs[$1]++; committed[$1] += $4; redelivered[$1] += $5; admitted[$1] += $6; limit[$1] = $7
        if ($2 != "ok") broken[$1]++
        if ($3 > slowest[$1]) slowest[$1] = $3
    }
    END {
        print "| fault | runs | verdict | events | sent again, dropped | stored again, admitted | slowest recovery | limit |"
        print "|---|---|---|---|---|---|---|---|"
        for (i = 1; i <= faults; i++) {
            f = order[i]; name = f; gsub(/_/, " ", name)
            verdict = broken[f] ? "**broken " broken[f] "**" : "kept"
            printf "| %s | %d | %s | %d | %d | %d | %.1f s | %d s |\n", name, runs[f], verdict, committed[f], redelivered[f], \
                admitted[f], slowest[f], limit[f]
        }
    }' "$results"
echo
broken=$(grep -c ' BROKEN ' "$results" || true)
say "$(wc -l < "$results") runs in $((SECONDS / 60)) minutes, seeds $first to $((seed - 1)), nats-server $server: $broken broke a promise"
[ "$broken" -eq 0 ] || exit 1
rm -rf "$logs"
