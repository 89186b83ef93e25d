//! The roles of schema/roles.sql: what each may, what it may not, and that running the file again puts that right.
//!
//! That the grants suffice is shown by all the other tests: their daemons connect as a dispatcher, their workload
//! writes as a writer.

use std::path::Path;
use std::process::Command;

use postgres::{Client, NoTls};

use super::harness::database::{DISPATCHER, OPERATOR, WRITER, as_role, shared_postgres};
use super::harness::{TestDb, database, unique};

const DENIED: &str = "42501";

/// Runs the file; what it says, or why it failed.
fn run_roles(command: &mut Command) -> Result<String, String> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("schema/roles.sql");
    let output = command.arg("-f").arg(file).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    if output.status.success() { Ok(said) } else { Err(said) }
}

fn client(db: &TestDb, role: &str) -> Client {
    Client::connect(&as_role(&db.dsn, role), NoTls).unwrap()
}

/// Asserts that each statement is denied, for want of a privilege.
#[track_caller]
fn assert_denied(client: &mut Client, statements: &[&str]) {
    for statement in statements {
        let error = client.batch_execute(statement).expect_err(statement);
        assert_eq!(
            error.as_db_error().map(|error| error.code().code()),
            Some(DENIED),
            "{statement}: {error:?}"
        );
    }
}

/// What no role of ours may do to the outbox, nor to any other table.
const DENIED_TO_ALL: [&str; 12] = [
    "SELECT FROM business",
    "INSERT INTO business VALUES (1)",
    "UPDATE outboxes SET topic = 'x'",
    "UPDATE outboxes SET metadata = NULL",
    "UPDATE outboxes SET payload = '{}'",
    "UPDATE outboxes SET created_at = now()",
    "DELETE FROM outboxes",
    "TRUNCATE outboxes",
    "DELETE FROM outbox_lanes",
    "INSERT INTO outbox_lanes VALUES (1)",
    "UPDATE outbox_schema SET version = 2",
    "SELECT FROM outboxes_default",
];

/// What an operator alone may do: send a dead letter under a fresh message id.
const FRESH_ID: &str = "UPDATE outboxes SET id = gen_random_uuid()";

#[test]
fn a_writer_inserts_and_nothing_else() {
    let db = database();
    db.execute("CREATE TABLE business (id int)");
    let mut writer = client(&db, WRITER);
    writer
        .batch_execute(
            "INSERT INTO outboxes (topic, metadata, payload) VALUES ('a', '{\"ordering-key\": \"k\"}', '{}')",
        )
        .unwrap();
    assert_eq!(db.pending(), 1);
    assert_denied(&mut writer, &DENIED_TO_ALL);
    assert_denied(&mut writer, &[FRESH_ID]);
    assert_denied(
        &mut writer,
        &[
            "SELECT FROM outboxes",
            "INSERT INTO outboxes (topic, payload) VALUES ('a', '{}') RETURNING seq",
            "UPDATE outboxes SET attempts = 1",
            "SELECT FROM outbox_lanes",
            "SELECT setval('outboxes_seq_seq', 1)",
            "SELECT outbox_create_partition('2020-01-01')",
            "SELECT outbox_drop_partition('outboxes_default', '30 days')",
        ],
    );
}

#[test]
fn a_dispatcher_and_an_operator_change_what_became_of_an_event_and_nothing_else() {
    let db = database();
    db.execute("CREATE TABLE business (id int)");
    db.event("a", "k", "{}");
    for role in [DISPATCHER, OPERATOR] {
        let mut client = client(&db, role);
        assert_denied(&mut client, &DENIED_TO_ALL);
        assert_denied(
            &mut client,
            &[
                "INSERT INTO outboxes (topic, payload) VALUES ('a', '{}')",
                "UPDATE outboxes SET seq = 1",
                "ALTER TABLE outboxes ADD COLUMN x int",
                "DROP TABLE outboxes_default",
                "CREATE SCHEMA mine",
            ],
        );
        client.batch_execute("UPDATE outboxes SET attempts = 1, last_error = 'x'").unwrap();
        client.batch_execute("SELECT outbox_create_partition('2020-01-01')").unwrap();
    }
    assert_denied(&mut client(&db, DISPATCHER), &[FRESH_ID]);
    client(&db, OPERATOR).batch_execute(FRESH_ID).unwrap();
    // An operator sees what others do; a dispatcher sees itself.
    let _other = db.client();
    let seen = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'postgres' AND query = '<insufficient privilege>'
                   AND datname = current_database()";
    let hidden = |role| client(&db, role).query_one(seen, &[]).unwrap().get::<_, i64>(0);
    assert!(hidden(OPERATOR) == 0 && hidden(DISPATCHER) > 0);
}

#[test]
fn again_puts_the_grants_right_and_leaves_others_alone() {
    let db = database();
    db.execute(
        "CREATE TABLE business (id int);
         GRANT SELECT ON business TO outbox_operator;
         GRANT DELETE, UPDATE (payload) ON outboxes TO outbox_dispatcher;
         REVOKE INSERT ON outboxes FROM outbox_writer",
    );
    let mut dispatcher = client(&db, DISPATCHER);
    dispatcher.batch_execute("UPDATE outboxes SET payload = '{}'; DELETE FROM outboxes").unwrap();
    for _ in 0..2 {
        run_roles(&mut shared_postgres().psql(&db.name)).unwrap();
    }
    assert_denied(&mut dispatcher, &["UPDATE outboxes SET payload = '{}'", "DELETE FROM outboxes"]);
    client(&db, WRITER).batch_execute("INSERT INTO outboxes (topic, payload) VALUES ('a', '{}')").unwrap();
    client(&db, OPERATOR).batch_execute("SELECT FROM business").unwrap();
}

#[test]
fn a_schema_in_which_anybody_may_create_is_warned_of() {
    let db = database();
    let warning = "REVOKE CREATE ON SCHEMA public FROM PUBLIC";
    let said = || run_roles(&mut shared_postgres().psql(&db.name)).unwrap();
    assert!(!said().contains(warning));
    db.execute("GRANT CREATE ON SCHEMA public TO PUBLIC");
    assert!(said().contains(warning));
}

/// The functions that run as their owner, called for what is no partition of the outbox.
#[test]
fn a_dispatcher_reaches_no_other_table_through_the_functions_of_the_owner() {
    let db = database();
    db.execute("CREATE TABLE business (id int); CREATE TABLE \"a; DROP TABLE business\" (id int)");
    let mut dispatcher = client(&db, DISPATCHER);
    dispatcher.batch_execute("CREATE TEMPORARY TABLE outboxes_2020_01 (id int)").unwrap();
    for name in [
        "business",
        "a; DROP TABLE business",
        "public.business",
        "outboxes",
        "outbox_lanes",
        "outboxes_2020_01",
    ] {
        for call in ["outbox_drop_partition($1, '1 day')", "outbox_clean_partition($1, 0, '1 day')"] {
            let error = dispatcher.query(&format!("SELECT {call}"), &[&name]).expect_err(call);
            assert_eq!(
                error.code().map(postgres::error::SqlState::code),
                Some("42P01"),
                "{call} {name}: {error:?}"
            );
        }
    }
    assert_eq!(db.number("SELECT count(*) FROM business"), 0);
}

#[test]
fn each_outbox_can_have_roles_of_its_own() {
    let db = TestDb::without_schema(shared_postgres());
    let prefix = unique("shop-");
    let settings = |schema: &str| format!("-c pg_outbox.role_prefix={prefix} -c search_path=\"{schema}\"");
    let error = run_roles(shared_postgres().psql(&db.name).env("PGOPTIONS", settings("public"))).unwrap_err();
    assert!(error.contains("schema public has no outbox") && error.contains("001_outbox.sql"), "{error}");
    db.execute("CREATE SCHEMA \"the Shop\"");
    let schema = Path::new(env!("CARGO_MANIFEST_DIR")).join("schema/001_outbox.sql");
    let in_schema = |file: &Path| {
        // PGOPTIONS takes a blank with a backslash.
        let options = settings("the\\ Shop");
        let output =
            shared_postgres().psql(&db.name).env("PGOPTIONS", options).arg("-f").arg(file).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    in_schema(&schema);
    in_schema(&schema.with_file_name("roles.sql"));
    let mut client = db.client();
    client
        .batch_execute(&format!(
            "SET ROLE \"{prefix}_writer\"; INSERT INTO \"the Shop\".outboxes (topic, payload) VALUES ('a', '{{}}');
             RESET ROLE; SET ROLE \"{prefix}_dispatcher\"; UPDATE \"the Shop\".outboxes SET attempts = 1;
             RESET ROLE; SET ROLE outbox_dispatcher"
        ))
        .unwrap();
    assert_denied(&mut client, &["SELECT FROM \"the Shop\".outboxes"]);
    client
        .batch_execute(&format!(
            "RESET ROLE; DROP OWNED BY \"{prefix}_writer\", \"{prefix}_dispatcher\", \"{prefix}_operator\";
             DROP ROLE \"{prefix}_writer\", \"{prefix}_dispatcher\", \"{prefix}_operator\""
        ))
        .unwrap();
}

#[test]
fn what_runs_with_the_owners_rights_chooses_its_search_path_and_is_not_everybodys() {
    let db = database();
    let definers = "SELECT count(*) FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND prosecdef";
    assert!(db.number(definers) >= 6);
    let open = "SELECT count(*) FROM pg_proc
                 WHERE pronamespace = 'public'::regnamespace AND prosecdef
                   AND (coalesce(array_to_string(proconfig, ' '), '') !~ 'search_path=pg_catalog, public, pg_temp'
                        OR has_function_privilege('outbox_writer', oid, 'EXECUTE'))";
    assert_eq!(db.number(open), 0);
}
