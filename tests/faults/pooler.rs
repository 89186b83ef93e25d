//! Faults behind a PgBouncer: of an instance, of the pooler, and of the PostgreSQL behind it.

use pg_outbox::lab::sandbox::Stop;

use super::super::harness::database::start_postgres;
use super::super::harness::{Mode, Pooler, TestDb};
use super::{Run, Stage};

/// Connections to the server: enough for the claims of two instances, and in session mode for all that they keep.
const CONNECTIONS: usize = 40;

/// Two instances; one is killed and replaced, the pooler is killed and started, and PostgreSQL stops and starts.
pub fn everything(run: &mut Run, mode: Mode) {
    let mut postgres = start_postgres();
    let mut pooler = Pooler::to(&postgres, mode, CONNECTIONS);
    let mut stage = Stage::new(TestDb::on(&postgres), run.stream());
    stage.config = stage.config.set("database.dsn", pooler.dsn(&stage.db));
    stage.start();
    stage.start();
    run.under_load(&mut stage, |run, stage| {
        for _ in 0..run.pick(1, 5) {
            let mut victim = stage.instances.swap_remove(0);
            victim.kill();
            stage.start();
            run.wait_work(stage, "one instance is at work");
            pooler.stop();
            run.pause(run.pick(200..=1_500, 1_000..=20_000));
            pooler.start_again();
            run.wait_work(stage, "the pooler is back");
            postgres.stop(Stop::Fast).unwrap();
            run.pause(run.pick(200..=1_500, 1_000..=20_000));
            postgres.start_again().unwrap();
            run.wait_work(stage, "the server is back");
        }
    });
    for instance in &stage.instances {
        let log = instance.log();
        let shared = log.contains("connections share sessions");
        assert_eq!(shared, mode == Mode::Transaction, "{log}");
    }
}
