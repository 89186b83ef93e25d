//! A full disk: PostgreSQL with a tablespace on a small one, and somebody else's table that fills it.
//!
//! The disk is a tmpfs in a mount namespace of the server's own, so nothing of it is to be seen outside, and it goes
//! with the server. The database of the outbox lives there; the write-ahead log does not, as a server without room
//! for that ends itself, which is another fault.

use std::time::Duration;

use pg_outbox::lab::sandbox::PostgresOptions;
use postgres::Client;

use super::super::harness::database::{as_postgres_user, start_postgres_with};
use super::super::harness::{TestDb, wait_until};
use super::{Run, Stage};

/// Where the small disk is, for the server alone: any folder that exists.
const MOUNT_POINT: &str = "/mnt";
const DISK_MIB: u32 = 64;
const LIMIT: Duration = Duration::from_secs(120);
/// SQLSTATE `disk_full`.
const DISK_FULL: &str = "53100";

/// Another table takes every page, for a while.
pub fn is_full(run: &mut Run) {
    let settings = vec!["autovacuum=off".to_owned()];
    let options = PostgresOptions { settings, launcher: on_a_small_disk(), ..PostgresOptions::default() };
    let postgres = start_postgres_with(options);
    let mut admin = postgres::Client::connect(&postgres.dsn("postgres"), postgres::NoTls).unwrap();
    admin.batch_execute(&format!("CREATE TABLESPACE small LOCATION '{MOUNT_POINT}'")).unwrap();
    let mut stage = Stage::new(TestDb::in_tablespace(&postgres, "small"), run.stream());
    stage.start();
    run.under_load(&mut stage, |run, stage| {
        let mut client = stage.db.client();
        client.batch_execute("CREATE TABLE ballast (bytes text)").unwrap();
        client.batch_execute("ALTER TABLE ballast ALTER COLUMN bytes SET STORAGE EXTERNAL").unwrap();
        // Nobody can write events to a full disk either: there must be some before, which nobody has claimed.
        let mut holder = stage.db.client();
        holder.batch_execute("BEGIN; SELECT FROM outbox_lanes FOR UPDATE").unwrap();
        wait_until("there is a backlog", LIMIT, &[stage], || stage.db.pending() > 1_000);
        for bytes in [1_000_000, 8_000, 1_000] {
            fill(&mut client, bytes);
        }
        holder.batch_execute("ROLLBACK").unwrap();
        let instance = &stage.instances[0];
        wait_until("a claim cannot be settled", LIMIT, &[instance], || {
            // Every page that somebody else frees meanwhile is taken again.
            fill(&mut client, 1_000);
            instance.log().contains(DISK_FULL)
        });
        run.pause(run.pick(2_000..=3_000, 10_000..=40_000));
        client.batch_execute("DROP TABLE ballast").unwrap();
    });
}

/// Inserts rows of this size until there is no room for one more.
fn fill(client: &mut Client, bytes: i32) {
    loop {
        match client.execute("INSERT INTO ballast SELECT repeat('x', $1)", &[&bytes]) {
            Ok(_) => {}
            Err(error) if error.code().is_some_and(|code| code.code() == DISK_FULL) => return,
            Err(error) => panic!("fill the disk: {error:?}"),
        }
    }
}

/// Runs the server in a mount namespace of its own with a tmpfs in it. Who is not root gets a user namespace too, in
/// which a tmpfs may be mounted.
fn on_a_small_disk() -> Vec<String> {
    let root = rustix::process::geteuid().is_root();
    let mut launcher: Vec<String> = vec!["unshare".to_owned(), "--mount".to_owned()];
    if !root {
        launcher.extend(["--user", "--map-current-user", "--keep-caps"].map(str::to_owned));
    }
    let owner = if root { ",uid=postgres,gid=postgres" } else { "" };
    let mount =
        format!("mount -t tmpfs -o size={DISK_MIB}m,mode=0700{owner} tmpfs {MOUNT_POINT} && exec \"$@\"");
    launcher.extend(["sh".to_owned(), "-c".to_owned(), mount, "small-disk".to_owned()]);
    launcher.extend(as_postgres_user());
    launcher
}
