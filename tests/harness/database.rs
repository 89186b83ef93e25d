//! A database of one's own, with the schema in it.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use pg_outbox::lab::sandbox::{PostgresOptions, PostgresServer};
use postgres::{Client, NoTls};

use super::{Evidence, Row, RowState, Table, unique};

/// The database that new ones are copied from.
const TEMPLATE: &str = "outbox_template";
/// A claim that is open for so long, with nothing to publish, is left behind.
const CLAIM_LIMIT: Duration = Duration::from_secs(5);
/// The login roles of every server: one for each of the roles of the schema, with the password of the owner.
pub const WRITER: &str = "application";
pub const DISPATCHER: &str = "dispatcher";
pub const OPERATOR: &str = "operator";
/// Rows that the evidence of a database shows.
const EVIDENCE_ROWS: usize = 20;

/// The PostgreSQL that all tests share. It is never stopped or paused.
pub fn shared_postgres() -> &'static PostgresServer {
    static POSTGRES: OnceLock<PostgresServer> = OnceLock::new();
    POSTGRES.get_or_init(|| {
        let postgres = start_postgres();
        postgres.create_database(TEMPLATE).unwrap();
        migrate(&postgres, TEMPLATE);
        postgres
    })
}

/// A private PostgreSQL, for tests that stop or pause it. Without fsync: they crash processes, not the machine.
pub fn start_postgres() -> PostgresServer {
    start_postgres_with(PostgresOptions::default())
}

/// The same, with more to it.
pub fn start_postgres_with(options: PostgresOptions) -> PostgresServer {
    let options = PostgresOptions { fsync: false, ..options };
    PostgresServer::start(&options).unwrap_or_else(|error| panic!("{error:#}"))
}

/// The end of a launcher (see [`PostgresOptions`]) that was root, which PostgreSQL must not be.
pub fn as_postgres_user() -> Vec<String> {
    let change = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"];
    let change = if rustix::process::geteuid().is_root() { &change[..] } else { &[] };
    change.iter().map(|word| (*word).to_owned()).collect()
}

/// A database of one's own on the shared server.
pub fn database() -> TestDb {
    let name = unique("test_");
    let postgres = shared_postgres();
    let mut admin = Client::connect(&postgres.dsn("postgres"), NoTls).unwrap();
    admin.batch_execute(&format!("CREATE DATABASE {name} TEMPLATE {TEMPLATE}")).unwrap();
    TestDb { dsn: postgres.dsn(&name), name }
}

/// A database with the schema in it.
pub struct TestDb {
    /// Connection string of the owner, a superuser, as a URL.
    pub dsn: String,
    /// Name of the database.
    pub name: String,
}

impl TestDb {
    /// Makes a database on a private server.
    pub fn on(postgres: &PostgresServer) -> TestDb {
        let db = TestDb::without_schema(postgres);
        migrate(postgres, &db.name);
        db
    }

    /// The same, with everything of it in this tablespace.
    pub fn in_tablespace(postgres: &PostgresServer, tablespace: &str) -> TestDb {
        let name = unique("test_");
        let mut admin = Client::connect(&postgres.dsn("postgres"), NoTls).unwrap();
        admin.batch_execute(&format!("CREATE DATABASE {name} TABLESPACE {tablespace}")).unwrap();
        migrate(postgres, &name);
        TestDb { dsn: postgres.dsn(&name), name }
    }

    /// The same, in this encoding.
    pub fn in_encoding(postgres: &PostgresServer, encoding: &str) -> TestDb {
        let name = unique("test_");
        let mut admin = Client::connect(&postgres.dsn("postgres"), NoTls).unwrap();
        let create = format!("CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0");
        admin.batch_execute(&create).unwrap();
        migrate(postgres, &name);
        TestDb { dsn: postgres.dsn(&name), name }
    }

    /// Makes a database on any server, without the schema.
    pub fn without_schema(postgres: &PostgresServer) -> TestDb {
        let name = unique("test_");
        postgres.create_database(&name).unwrap();
        TestDb { dsn: postgres.dsn(&name), name }
    }

    /// Connection string of the role that the daemon is: a dispatcher, and nothing else.
    pub fn dispatcher_dsn(&self) -> String {
        as_role(&self.dsn, DISPATCHER)
    }

    /// Connection string of an operator.
    pub fn operator_dsn(&self) -> String {
        as_role(&self.dsn, OPERATOR)
    }

    /// A new connection, as the owner.
    pub fn client(&self) -> Client {
        Client::connect(&self.dsn, NoTls)
            .unwrap_or_else(|error| panic!("connect to {}: {error:?}", self.name))
    }

    /// A new connection, if there is one to be had now.
    pub fn try_client(&self) -> Option<Client> {
        Client::connect(&self.dsn, NoTls).ok()
    }

    /// Runs statements.
    pub fn execute(&self, sql: &str) {
        self.client().batch_execute(sql).unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    /// The one number that a query answers.
    pub fn number(&self, query: &str) -> i64 {
        let row = self.client().query_one(query, &[]).unwrap_or_else(|error| panic!("{query}: {error:?}"));
        row.get(0)
    }

    /// Inserts one event and returns its seq. Its payload is JSON text.
    pub fn event(&self, topic: &str, key: &str, payload: &str) -> i64 {
        let metadata = serde_json::json!({"ordering-key": key}).to_string();
        self.event_with(topic, &metadata, payload)
    }

    /// Inserts one event with this metadata (JSON text) and returns its seq.
    pub fn event_with(&self, topic: &str, metadata: &str, payload: &str) -> i64 {
        let insert = "INSERT INTO outboxes (topic, metadata, payload)
                      VALUES ($1, $2::text::jsonb, $3::text::jsonb) RETURNING seq";
        let row = self.client().query_one(insert, &[&topic, &metadata, &payload]).unwrap();
        row.get(0)
    }

    /// Inserts `count` events of one topic over `keys` keys (`k0`, `k1`, ...), with one statement.
    pub fn events(&self, topic: &str, count: i64, keys: i64) {
        let insert = "INSERT INTO outboxes (topic, metadata, payload)
                      SELECT $1, jsonb_build_object('ordering-key', 'k' || n % $3::int8), jsonb_build_object('n', n)
                      FROM generate_series(1, $2::int8) n";
        self.client().execute(insert, &[&topic, &count, &keys]).unwrap();
    }

    /// All rows, and what is still claimed: a lane that stays locked, a claim that stays open. A daemon that runs
    /// looks for events all the time, so what is there only for a moment does not count.
    pub fn table(&self) -> Table {
        let mut client = self.client();
        let deadline = Instant::now() + CLAIM_LIMIT;
        let mut left_claimed = left_claimed(&mut client);
        while !left_claimed.is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(50));
            let still = self::left_claimed(&mut client);
            left_claimed.retain(|claimed| still.contains(claimed));
        }
        let query = "SELECT id::text, published_at IS NOT NULL, dead_at IS NOT NULL, attempts, last_error FROM outboxes";
        let rows = client.query(query, &[]).unwrap();
        let row = |row: postgres::Row| {
            let state = match (row.get(1), row.get(2)) {
                (false, false) => RowState::Pending,
                (true, false) => RowState::Published,
                (_, true) => RowState::Dead,
            };
            (row.get(0), Row { state, attempts: row.get(3), last_error: row.get(4) })
        };
        Table { rows: rows.into_iter().map(row).collect(), left_claimed }
    }

    /// How many events wait: neither published nor dead.
    pub fn pending(&self) -> i64 {
        self.number("SELECT count(*) FROM outboxes WHERE published_at IS NULL AND dead_at IS NULL")
    }

    /// How many events are published.
    pub fn published(&self) -> i64 {
        self.number("SELECT count(*) FROM outboxes WHERE published_at IS NOT NULL")
    }

    /// How many events are dead letters.
    pub fn dead(&self) -> i64 {
        self.number("SELECT count(*) FROM outboxes WHERE dead_at IS NOT NULL")
    }
}

impl Evidence for TestDb {
    fn evidence(&self) -> String {
        let Ok(mut client) = Client::connect(&self.dsn, NoTls) else {
            return format!("--- database {}: no connection", self.name);
        };
        let counts = client
            .query_one(
                "SELECT count(*) FILTER (WHERE published_at IS NULL AND dead_at IS NULL),
                        count(*) FILTER (WHERE published_at IS NOT NULL), count(*) FILTER (WHERE dead_at IS NOT NULL)
                 FROM outboxes",
                &[],
            )
            .unwrap();
        let (pending, published, dead): (i64, i64, i64) = (counts.get(0), counts.get(1), counts.get(2));
        let mut text =
            format!("--- outboxes of {}: pending={pending} published={published} dead={dead}", self.name);
        let rows = client
            .query(
                "SELECT seq || ' ' || topic || ' attempts=' || attempts
                        || coalesce(' next_attempt_at=' || next_attempt_at, '')
                        || coalesce(' dead_at=' || dead_at, '') || coalesce(' last_error=' || last_error, '')
                 FROM outboxes WHERE published_at IS NULL ORDER BY seq LIMIT $1::int8",
                &[&i64::try_from(EVIDENCE_ROWS).unwrap()],
            )
            .unwrap();
        for row in rows {
            let line: String = row.get(0);
            write!(text, "\n  {line}").unwrap();
        }
        text
    }
}

/// Lanes that are locked and claims that are open now, each in words that stay the same for the same claim.
fn left_claimed(client: &mut Client) -> Vec<String> {
    let locked = "SELECT 'lane ' || lane || ' is locked' FROM outbox_lanes
                   WHERE lane NOT IN (SELECT lane FROM outbox_lanes FOR UPDATE SKIP LOCKED)";
    let open = "SELECT 'claim of ' || application_name || ' open since ' || xact_start FROM pg_stat_activity
                 WHERE datname = current_database() AND application_name LIKE 'pg-outbox/%'
                   AND state LIKE 'idle in transaction%'";
    [locked, open].iter().flat_map(|query| client.query(*query, &[]).unwrap()).map(|row| row.get(0)).collect()
}

/// The same connection string (the owner's, as a URL) for another role; the password is the same.
pub fn as_role(dsn: &str, role: &str) -> String {
    let rest =
        dsn.strip_prefix("postgresql://postgres:").unwrap_or_else(|| panic!("not the owner's: {role}"));
    format!("postgresql://{role}:{rest}")
}

/// Grants the roles of schema/roles.sql what they need on an outbox that was made by other means than [`migrate`].
pub fn grant_roles(postgres: &PostgresServer, database: &str) {
    apply(postgres, database, &Path::new(env!("CARGO_MANIFEST_DIR")).join("schema/roles.sql"));
}

fn apply(postgres: &PostgresServer, database: &str, file: &Path) {
    let output = postgres.psql(database).arg("-f").arg(file).output().unwrap();
    assert!(output.status.success(), "{}: {}", file.display(), String::from_utf8_lossy(&output.stderr));
}

/// Applies the files of schema/ in their order, as an operator does with psql, and makes the login roles.
pub fn migrate(postgres: &PostgresServer, database: &str) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("schema");
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "sql"))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{}: no .sql files", folder.display());
    for file in files {
        apply(postgres, database, &file);
    }
    let password = postgres.dsn(database).split([':', '@']).nth(2).unwrap().to_owned();
    let logins: String = [(WRITER, "writer"), (DISPATCHER, "dispatcher"), (OPERATOR, "operator")]
        .map(|(login, role)| {
            format!(
                "DO $$ BEGIN CREATE ROLE {login} LOGIN PASSWORD '{password}' IN ROLE outbox_{role};
                 EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END $$;"
            )
        })
        .concat();
    let output = postgres.psql(database).args(["-c", &logins]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
