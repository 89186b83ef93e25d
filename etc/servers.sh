# Installs the servers that the demo and the tests start for themselves. Sourced by etc/demo.sh and tests/run.sh.
#
# Only what is missing is installed, from Debian's packages, and it is said before it is done. What comes with the
# packages and would start by itself (a database cluster, the nats-server service) is prevented or switched off,
# but only if the package came from here: a server that was there before is left alone.

say() { printf '%s: %s\n' "$(basename "$0")" "$*"; }

die() {
    say "$*" >&2
    exit 1
}

# Runs a command as root: as it is, or with sudo.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo > /dev/null; then
        sudo "$@"
    else
        die "this needs root, and there is no sudo; run as root: $*"
    fi
}

# Installs Debian packages; with fresh package lists if the present ones do not do.
install_packages() {
    command -v apt-get > /dev/null || die "no apt-get here; install it by hand: $*"
    say "installing from Debian's packages: $*"
    local install=(env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@")
    if ! as_root "${install[@]}"; then
        say "once more, with fresh package lists"
        as_root apt-get update -q
        as_root "${install[@]}" || die "that failed: apt-get install $*"
    fi
}

# The places in which the sandbox looks; see src/lab/sandbox.rs.
have_postgres() {
    [ -n "${PG_OUTBOX_POSTGRES_BIN:-}" ] || compgen -G '/usr/lib/postgresql/*/bin/initdb' > /dev/null \
        || command -v initdb > /dev/null
}

have_nats_server() {
    [ -n "${PG_OUTBOX_NATS_SERVER:-}" ] || command -v nats-server > /dev/null || [ -x /usr/sbin/nats-server ]
}

install_postgres() {
    local settings=/etc/postgresql-common/createcluster.conf
    if [ ! -e "$settings" ]; then
        install_packages postgresql-common
        say "setting create_main_cluster = false in $settings: no database of the system is wanted"
        as_root sed -i 's/^#\?create_main_cluster *=.*/create_main_cluster = false/' "$settings"
    fi
    install_packages postgresql
}

install_nats_server() {
    install_packages nats-server
    if [ -d /run/systemd/system ]; then
        say "switching off the service nats-server, which came with the package"
        as_root systemctl disable --now nats-server.service
    fi
}

install_missing_servers() {
    have_postgres || install_postgres
    have_nats_server || install_nats_server
}

need_cargo() {
    command -v cargo > /dev/null || die "cargo not found: install Rust first, see https://rustup.rs"
}
