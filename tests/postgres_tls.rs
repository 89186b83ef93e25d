//! TLS to PostgreSQL: what each `sslmode` accepts, client certificates, channel binding, several servers, and the
//! warning about a password in clear.
//!
//! A private server has a certificate for `localhost` from a CA of the test, and a pg_hba.conf in which the role says
//! how it may come. What a connection really was, the server tells (`pg_stat_ssl`).

use std::os::unix::fs::PermissionsExt;
use std::process::Output;
use std::time::Duration;

use pg_outbox::config::Database;
use pg_outbox::lab::sandbox::{PostgresOptions, PostgresServer};
use pg_outbox::postgres::{ClaimSettings, Listener, SleepLock, Store};

use crate::claim::settings_for;
use crate::harness::certificates::{Authority, Issued};
use crate::harness::daemon::pg_outbox;
use crate::harness::database::{shared_postgres, start_postgres_with};
use crate::harness::{Config, Daemon, TestDb, database, secrets, stream, unique, wait_until};

const LIMIT: Duration = Duration::from_secs(30);
/// The password of every role here.
const PASSWORD: &str = "pa55word of the roles";

const HBA: &str = "
hostssl   all scram         all scram-sha-256
hostssl   all certified     all scram-sha-256 clientcert=verify-ca
hostssl   all tls_only      all password
hostnossl all clear_only    all password
hostssl   all by_certificate all cert
host      replication postgres all password
host      all anyone,postgres all password
";

/// A server with this certificate that knows `clients`, and a database with the schema.
struct Server {
    postgres: PostgresServer,
    db: TestDb,
}

fn server(issued: &Issued, clients: &Authority) -> Server {
    let folder = tempfile::Builder::new().prefix("pg-outbox-hba-").tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let hba = folder.path().join("pg_hba.conf");
    std::fs::write(&hba, HBA).unwrap();
    let mut settings = issued.postgres_settings();
    settings.push(format!("ssl_ca_file={}", clients.file().display()));
    settings.push(format!("hba_file={}", hba.display()));
    let postgres = start_postgres_with(PostgresOptions { settings, ..PostgresOptions::default() });
    let db = TestDb::on(&postgres);
    for role in ["anyone", "scram", "certified", "tls_only", "clear_only", "by_certificate"] {
        db.execute(&format!("CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}' IN ROLE outbox_dispatcher"));
    }
    secrets::plant(PASSWORD);
    Server { postgres, db }
}

impl Server {
    fn dsn(&self, role: &str, host: &str, words: &str) -> String {
        let (port, name) = (self.postgres.port(), &self.db.name);
        format!("host={host} port={port} dbname={name} user={role} password='{PASSWORD}' {words}")
    }
}

/// The two sessions of a wake-up, made at once and outside of any pool, or why not.
fn connect(settings: &Database, instance: &str) -> Result<(Listener, SleepLock), String> {
    let store =
        Store::new(settings, instance, ClaimSettings::default()).map_err(|error| error.to_string())?;
    store.wake_up(None).map_err(|error| error.to_string())
}

#[derive(Debug, PartialEq, Eq)]
enum Came {
    Clear,
    Tls,
    /// It did not; the error has this in it.
    Not(&'static str),
}

/// How a connection with `dsn` comes to `db`'s server.
#[track_caller]
fn assert_comes(db: &TestDb, dsn: &str, expected: &Came) {
    let instance = unique("tls-");
    let connected = connect(&settings_for(dsn), &instance);
    let name = format!("pg-outbox/{instance}");
    let query =
        "SELECT count(*) FILTER (WHERE ssl), count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)
                  WHERE application_name = $1";
    let row = db.client().query_one(query, &[&name]).unwrap();
    match (connected, expected) {
        (Ok(_), Came::Clear) => assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (0, 2), "{dsn}"),
        (Ok(_), Came::Tls) => assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (2, 2), "{dsn}"),
        (Err(error), Came::Not(part)) => {
            assert!(error.contains(part), "{dsn}: no {part:?} in: {error}");
            secrets::assert_none_in("the error", &error);
        }
        (Ok(_), Came::Not(_)) => panic!("{dsn} connected"),
        (Err(error), _) => panic!("{dsn}: {error}"),
    }
}

#[test]
fn each_sslmode_comes_as_it_says_or_not_at_all() {
    let (ours, other) = (Authority::new(), Authority::new());
    let server = server(&ours.issue(&["localhost"]), &ours);
    let (right, wrong) =
        (format!("sslrootcert={}", ours.file().display()), format!("sslrootcert={}", other.file().display()));
    let unknown = || Came::Not("UnknownIssuer");
    let not_for_host = || Came::Not("not valid for name");
    // The host is the certificate's, or another name of the same machine.
    for host in ["localhost", "127.0.0.1"] {
        let named = host == "localhost";
        let cases = [
            ("disable", "", Came::Clear),
            ("allow", "", Came::Clear),
            ("prefer", "", Came::Tls),
            ("require", "", Came::Tls),
            ("verify-ca", "", Came::Not("sslrootcert")),
            ("verify-full", "", Came::Not("sslrootcert")),
            ("prefer", &right, Came::Tls),
            ("require", &right, Came::Tls),
            ("verify-ca", &right, Came::Tls),
            ("verify-full", &right, if named { Came::Tls } else { not_for_host() }),
            ("disable", &wrong, Came::Clear),
            // No promise, as libpq's.
            ("prefer", &wrong, Came::Clear),
            ("require", &wrong, unknown()),
            ("verify-ca", &wrong, unknown()),
            ("verify-full", &wrong, unknown()),
            ("verify-full", "sslrootcert=system", unknown()),
        ];
        for (mode, root, expected) in cases {
            let dsn = server.dsn("anyone", host, &format!("sslmode={mode} {root}"));
            assert_comes(&server.db, &dsn, &expected);
        }
    }
}

#[test]
fn allow_and_prefer_try_the_other_way_and_the_others_do_not() {
    let ours = Authority::new();
    let server = server(&ours.issue(&["localhost"]), &ours);
    let denied = || Came::Not("28000: no pg_hba.conf entry");
    let cases = [
        ("tls_only", "disable", denied()),
        ("tls_only", "allow", Came::Tls),
        ("tls_only", "prefer", Came::Tls),
        ("tls_only", "require", Came::Tls),
        ("clear_only", "disable", Came::Clear),
        ("clear_only", "allow", Came::Clear),
        ("clear_only", "prefer", Came::Clear),
        ("clear_only", "require", denied()),
    ];
    for (role, mode, expected) in cases {
        assert_comes(&server.db, &server.dsn(role, "localhost", &format!("sslmode={mode}")), &expected);
    }
    // A wrong password is wrong either way, and is not tried twice.
    let before = server.postgres.log().matches("password authentication failed").count();
    let dsn = server.dsn("anyone", "localhost", "sslmode=prefer").replace(PASSWORD, "not the password");
    assert_comes(&server.db, &dsn, &Came::Not("28P01"));
    assert_eq!(server.postgres.log().matches("password authentication failed").count(), before + 1);
}

#[test]
fn a_server_without_tls_is_taken_by_those_modes_that_do_not_want_it() {
    let db = database();
    let dsn = |mode: &str| format!("{}?sslmode={mode}", db.dsn);
    for mode in ["disable", "allow", "prefer"] {
        assert_comes(&db, &dsn(mode), &Came::Clear);
    }
    assert_comes(&db, &dsn("require"), &Came::Not("server does not support TLS"));
    assert_comes(&db, &dsn("verify-full&sslrootcert=system"), &Came::Not("server does not support TLS"));
}

#[test]
fn an_expired_certificate_is_refused_where_certificates_count() {
    let ours = Authority::new();
    let server = server(&ours.issue_expired(&["localhost"]), &ours);
    let root = format!("sslrootcert={}", ours.file().display());
    for mode in ["require", "verify-ca", "verify-full"] {
        let dsn = server.dsn("anyone", "localhost", &format!("sslmode={mode} {root}"));
        assert_comes(&server.db, &dsn, &Came::Not("certificate expired"));
    }
    assert_comes(&server.db, &server.dsn("anyone", "localhost", "sslmode=require"), &Came::Tls);
}

#[test]
fn a_client_certificate_is_shown_to_a_server_that_wants_one() {
    let (ours, other) = (Authority::new(), Authority::new());
    let server = server(&ours.issue(&["localhost"]), &ours);
    let root = ours.file();
    let dsn = |role: &str, own: Option<&Issued>| {
        let own =
            own.map(|own| format!("sslcert={} sslkey={}", own.certificate.display(), own.key.display()));
        let words = format!("sslmode=verify-full sslrootcert={} {}", root.display(), own.unwrap_or_default());
        server.dsn(role, "localhost", &words)
    };
    let certificate = ours.issue(&["by_certificate"]);
    assert_comes(&server.db, &dsn("certified", Some(&certificate)), &Came::Tls);
    assert_comes(&server.db, &dsn("by_certificate", Some(&certificate)), &Came::Tls);
    assert_comes(&server.db, &dsn("certified", None), &Came::Not("valid client certificate"));
    let strange = other.issue(&["by_certificate"]);
    assert_comes(&server.db, &dsn("certified", Some(&strange)), &Came::Not("received fatal alert"));
    // A key that others can read, and one that belongs to another certificate.
    let key = std::fs::Permissions::from_mode(0o644);
    std::fs::set_permissions(&strange.key, key).unwrap();
    assert_comes(
        &server.db,
        &dsn("certified", Some(&strange)),
        &Came::Not("mode 0644 lets others have the key"),
    );
    let mixed = Issued { certificate: certificate.certificate.clone(), key: ours.issue(&["x"]).key };
    assert_comes(&server.db, &dsn("certified", Some(&mixed)), &Came::Not("cannot be used together"));
}

#[test]
fn scram_is_bound_to_the_channel_where_the_server_offers_it() {
    let ours = Authority::new();
    let server = server(&ours.issue(&["localhost"]), &ours);
    let dsn = |words: &str| server.dsn("scram", "localhost", words);
    assert_comes(&server.db, &dsn("sslmode=require channel_binding=require"), &Came::Tls);
    assert_comes(&server.db, &dsn("sslmode=require channel_binding=disable"), &Came::Tls);
    // Without SCRAM there is nothing to bind, and without TLS nothing to bind it to.
    let no_scram = server.dsn("tls_only", "localhost", "sslmode=require channel_binding=require");
    assert_comes(&server.db, &no_scram, &Came::Not("authentication error"));
    let clear = server.dsn("anyone", "localhost", "sslmode=disable channel_binding=require");
    assert_comes(&server.db, &clear, &Came::Not("authentication error"));
}

#[test]
fn of_several_servers_the_one_that_takes_writes_is_used() {
    let primary = start_postgres_with(PostgresOptions::default());
    let db = TestDb::on(&primary);
    let standby = PostgresServer::start_replica(
        &primary,
        &PostgresOptions { fsync: false, ..PostgresOptions::default() },
    )
    .unwrap();
    let credentials = db.dsn.split_once("://").unwrap().1.rsplit_once('@').unwrap().0;
    let dead = pg_outbox::lab::sandbox::free_port().unwrap();
    let dsn = |words: &str| {
        let (standby, primary, name) = (standby.port(), primary.port(), &db.name);
        format!(
            "postgresql://{credentials}@127.0.0.1:{dead},127.0.0.1:{standby},127.0.0.1:{primary}/{name}{words}"
        )
    };
    for words in [
        "",
        "?target_session_attrs=primary",
        "?target_session_attrs=read-write",
        "?load_balance_hosts=random",
    ] {
        assert_comes(&db, &dsn(words), &Came::Clear);
    }
    let settings = settings_for(&dsn("?target_session_attrs=any"));
    let store = Store::new(&settings, "any", ClaimSettings::default()).unwrap();
    assert!(store.open().is_err(), "the standby came first, and takes no claims");
    let only_standby = dsn("").replace(&format!(",127.0.0.1:{}/", primary.port()), "/");
    assert_comes(&db, &only_standby, &Came::Not("it is a standby"));
}

/// What a command of the program says with this config.
fn run(config: &Config, arguments: &[&str]) -> Output {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), config.yaml()).unwrap();
    pg_outbox().args(arguments).arg("--config").arg(file.path()).output().unwrap()
}

#[test]
fn daemon_and_commands_do_all_they_do_over_verified_tls() {
    let ours = Authority::new();
    let server = server(&ours.issue(&["localhost"]), &ours);
    let folder = tempfile::tempdir().unwrap();
    let password = folder.path().join("password");
    std::fs::write(&password, format!("{PASSWORD}\n")).unwrap();
    let own = ours.issue(&["certified"]);
    let stream = stream();
    let (port, name) = (server.postgres.port(), &server.db.name);
    // Everything secret stands beside the connection string.
    let config = Config::new(&server.db, &stream)
        .set("database.dsn", format!("postgresql://localhost:{port}/{name}?sslmode=verify-full"))
        .set("database.user", "certified")
        .set("database.password", format!("file:{}", password.display()))
        .set("database.sslrootcert", ours.file().to_str().unwrap())
        .set("database.sslcert", own.certificate.to_str().unwrap())
        .set("database.sslkey", own.key.to_str().unwrap());
    for arguments in [&["migrate"][..], &["check"], &["status"]] {
        let output = run(&config, arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    }
    let daemon = Daemon::start(&config);
    daemon.wait_ready();
    server.db.events("order.placed", 200, 7);
    wait_until("all are published", LIMIT, &[&daemon, &server.db, &stream], || server.db.published() == 200);
    assert_eq!(stream.count(), 200);
    let clear = "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)
                  WHERE application_name LIKE 'pg-outbox/%' AND NOT ssl";
    assert_eq!(server.db.number(clear), 0);
    let listening = "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)
                      WHERE ssl AND query = 'LISTEN outbox_events'";
    wait_until("it listens over TLS", LIMIT, &[&daemon], || server.db.number(listening) == 1);
    assert_eq!(daemon.log_lines("without TLS"), [""; 0]);
}

#[test]
fn a_password_in_clear_is_worth_one_warning_off_this_machine() {
    let (db, stream) = (database(), stream());
    // A name that is none of those known for this machine, and leads to it all the same.
    let dsn = db.dispatcher_dsn();
    let away = dsn.replace("@127.0.0.1:", "@127.1:");
    assert_ne!(away, dsn);
    for (dsn, warnings) in [(&away, 1), (&dsn, 0)] {
        let daemon = Daemon::start(&Config::new(&db, &stream).set("database.dsn", dsn.as_str()));
        daemon.wait_ready();
        db.events("order.placed", 20, 5);
        wait_until("all are published", LIMIT, &[&daemon, &db], || db.pending() == 0);
        let lines = daemon.log_lines("the password crosses the network without TLS");
        assert_eq!(lines.len(), warnings, "{lines:?}");
        let address = format!("postgres=127.1:{}", shared_postgres().port());
        assert!(lines.iter().all(|line| line.contains("WARN") && line.contains(&address)), "{lines:?}");
    }
}

#[test]
fn a_certificate_file_that_is_missing_ends_a_start_with_its_name() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream).set("database.sslrootcert", "/nowhere/ca.pem");
    let output = run(&config, &["run"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("/nowhere/ca.pem: cannot be read"), "{said}");
}
