//! Faults of PostgreSQL: it stops, crashes, is full, locked, slow to answer, or another server from now on.

use std::time::{Duration, Instant};

use pg_outbox::lab::sandbox::{PostgresOptions, PostgresServer, Stop};
use rustix::process::{Pid, Signal, kill_process};

use super::super::harness::database::{start_postgres, start_postgres_with};
use super::super::harness::workload::Lingering;
use super::super::harness::{TestDb, database, wait_until};
use super::{Run, Stage};

/// What ours are called in `pg_stat_activity`.
const OURS: &str = "datname = current_database() AND application_name LIKE 'pg-outbox/%'";
const REPLICA_LIMIT: Duration = Duration::from_secs(120);

/// A fast stop and a start, several times.
pub fn stops(run: &mut Run) {
    restarts(run, Stop::Fast);
}

/// An immediate stop, as a crash, and a start with recovery, several times.
pub fn stops_at_once(run: &mut Run) {
    restarts(run, Stop::Immediate);
}

fn restarts(run: &mut Run, mode: Stop) {
    let mut postgres = start_postgres();
    let mut stage = Stage::new(TestDb::on(&postgres), run.stream());
    stage.start();
    run.under_load(&mut stage, |run, _| {
        for _ in 0..2 {
            postgres.stop(mode).unwrap();
            run.pause(run.pick(200..=1_500, 1_000..=20_000));
            postgres.start_again().unwrap();
            run.pause(300..=1_500);
        }
    });
}

/// SIGKILL of a backend of ours, at which the postmaster ends all others and recovers.
pub fn a_backend_crashes(run: &mut Run) {
    let postgres = start_postgres();
    let mut stage = Stage::new(TestDb::on(&postgres), run.stream());
    stage.start();
    run.under_load(&mut stage, |run, stage| {
        for _ in 0..run.pick(2, 6) {
            let pid = stage.db.number(&format!(
                "SELECT pid::int8 FROM pg_stat_activity WHERE {OURS} ORDER BY state = 'idle in transaction' DESC LIMIT 1"
            ));
            let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
            kill_process(pid, Signal::KILL).unwrap();
            run.pause(1_000..=2_500);
            run.wait_work(stage, "the service is at work again");
        }
    });
}

/// `pg_terminate_backend` on every connection of ours, again and again.
pub fn our_backends_are_terminated(run: &mut Run) {
    let mut stage = Stage::new(database(), run.stream());
    stage.start();
    run.under_load(&mut stage, |run, stage| {
        for _ in 0..run.pick(8, 60) {
            stage.db.execute(&format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {OURS}"));
            run.pause(50..=600);
        }
    });
}

/// Others take every connection that there is, those that we lose included.
pub fn is_out_of_connections(run: &mut Run) {
    let postgres = start_postgres_with(PostgresOptions {
        settings: vec!["max_connections=40".to_owned()],
        ..PostgresOptions::default()
    });
    let mut stage = Stage::new(TestDb::on(&postgres), run.stream());
    stage.start();
    run.under_load(&mut stage, |run, stage| {
        let until = Instant::now() + Duration::from_secs(run.pick(4, 40));
        let mut taken = vec![stage.db.client()];
        while Instant::now() < until {
            while let Some(client) = stage.db.try_client() {
                taken.push(client);
            }
            // Full. What we lose now is taken by the next turn of this loop, or by us again.
            let terminate = format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {OURS}");
            taken[0].batch_execute(&terminate).unwrap();
        }
        drop(taken);
        let log = stage.instances[0].log();
        assert!(log.contains("53300"), "there were connections to be had all the time\n{log}");
    });
}

/// The server dies; its replica, which is read-only for a while, is promoted. Commits of the writers wait for the
/// replica, as those of an application would that must not lose them; our settles do not.
pub fn a_replica_takes_over(run: &mut Run) {
    let mut primary = start_postgres();
    let mut db = TestDb::on(&primary);
    let options = PostgresOptions { fsync: false, ..PostgresOptions::default() };
    let replica =
        PostgresServer::start_replica(&primary, &options).unwrap_or_else(|error| panic!("{error:#}"));
    db.execute("ALTER SYSTEM SET synchronous_standby_names = '*'");
    db.execute("SELECT pg_reload_conf()");
    wait_until("the replica follows", REPLICA_LIMIT, &[&primary, &replica], || {
        db.number("SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'") == 1
    });
    let (first, second) = (format!("127.0.0.1:{}", primary.port()), format!("127.0.0.1:{}", replica.port()));
    db.dsn = db.dsn.replace(&first, &format!("{first},{second}")) + "?target_session_attrs=read-write";
    let mut stage = Stage::new(db, run.stream());
    stage.lingering = Some(Lingering { percent: 5, ms: run.pick(100..=1_000, 500..=5_000), prepared: false });
    stage.start();
    run.under_load(&mut stage, |run, stage| {
        primary.kill().unwrap();
        run.pause(run.pick(1_000..=3_000, 5_000..=30_000));
        let not_ready = "the instance is not ready with a read-only server";
        wait_until(not_ready, REPLICA_LIMIT, &[&primary, &replica, &*stage], || {
            stage.instances[0].get("/ready").0 == 503
        });
        replica.promote().unwrap();
    });
}

/// Some of the writers' transactions stay open while instances lose their connections, are killed and started.
pub fn writers_stay_open(run: &mut Run) {
    let mut stage = Stage::new(database(), run.stream());
    stage.lingering =
        Some(Lingering { percent: 10, ms: run.pick(200..=1_500, 500..=15_000), prepared: false });
    stage.start();
    stage.start();
    run.under_load(&mut stage, |run, stage| {
        for _ in 0..run.pick(3, 20) {
            stage.db.execute(&format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {OURS}"));
            run.pause(200..=1_500);
            stage.instances.remove(0);
            stage.start();
            run.pause(200..=1_500);
        }
    });
}

/// Some of the writers' transactions are prepared, and stay so while the server crashes and recovers. (The trigger may not
/// notify in them.)
pub fn transactions_are_prepared(run: &mut Run) {
    let settings = vec!["max_prepared_transactions=20".to_owned()];
    let mut postgres = start_postgres_with(PostgresOptions { settings, ..PostgresOptions::default() });
    let db = TestDb::on(&postgres);
    db.execute("ALTER TABLE outboxes DISABLE TRIGGER outboxes_notify");
    let mut stage = Stage::new(db, run.stream());
    stage.config = stage.config.clone().set("database.listen", false);
    stage.lingering =
        Some(Lingering { percent: 20, ms: run.pick(200..=1_500, 500..=15_000), prepared: true });
    stage.start();
    run.under_load(&mut stage, |run, stage| {
        for _ in 0..run.pick(2, 6) {
            postgres.stop(Stop::Immediate).unwrap();
            run.pause(run.pick(200..=1_500, 1_000..=10_000));
            postgres.start_again().unwrap();
            run.pause(300..=1_500);
            run.wait_work(stage, "the service is at work again");
        }
    });
}

/// Somebody holds the table for longer than a statement may take. In a quick run the statements are cancelled, which
/// is what the timeout of 30 s does.
pub fn statements_time_out(run: &mut Run) {
    let mut stage = Stage::new(database(), run.stream());
    stage.start();
    run.under_load(&mut stage, |run, stage| {
        let mut holder = stage.db.client();
        holder.batch_execute("BEGIN; LOCK TABLE outboxes IN ACCESS EXCLUSIVE MODE").unwrap();
        let until = Instant::now() + Duration::from_secs(run.pick(3, 40));
        while Instant::now() < until {
            run.pause(200..=500);
            if !run.long {
                let cancel = format!("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE {OURS}");
                holder.batch_execute(&cancel).unwrap();
            }
        }
        holder.batch_execute("ROLLBACK").unwrap();
        let log = stage.instances[0].log();
        assert!(log.contains("57014"), "no statement was cancelled\n{log}");
    });
}

/// Somebody builds an index (claims can be read, and not settled), then changes the table, and the lock timeout that
/// our role has for its usual work is short.
pub fn locks_time_out(run: &mut Run) {
    let mut stage = Stage::new(database(), run.stream());
    let dsn = format!("{}?options=-c%20lock_timeout%3D300", stage.db.dispatcher_dsn());
    stage.config = stage.config.clone().set("database.dsn", dsn);
    stage.start();
    run.under_load(&mut stage, |run, stage| {
        let mut holder = stage.db.client();
        for mode in ["SHARE", "ACCESS EXCLUSIVE"] {
            holder.batch_execute(&format!("BEGIN; LOCK TABLE outboxes IN {mode} MODE")).unwrap();
            run.pause(run.pick(1_500..=2_500, 10_000..=30_000));
            holder.batch_execute("ROLLBACK").unwrap();
            run.pause(500..=1_000);
        }
        let log = stage.instances[0].log();
        assert!(!log.contains("55P03"), "a lock timeout that is not ours ended something\n{log}");
    });
}
