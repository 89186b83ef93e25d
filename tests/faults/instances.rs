//! Faults of an instance: killed between any two steps of a claim, paused, started and stopped.

use std::ops::RangeInclusive;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use serde_json::json;

use super::super::harness::{TestStream, database, wait_until};
use super::{Run, Sending, Stage};

const EXIT_LIMIT: Duration = Duration::from_secs(120);
const SIGKILL: i32 = 9;
/// Where an instance is paused: each leaves something of another kind open.
const PAUSES: [&str; 4] = ["publish.sent", "publish.acked", "settle.begin", "settle.written"];

/// SIGKILL when something has been handed over, and no answer to it has been heard: an event, a batch, or a part of
/// a batch.
pub fn killed_while_publishing(run: &mut Run) {
    match run.sending {
        Sending::Singly => killed_at_one_of(run, &[("publish.sent", 1..=400)]),
        Sending::Batches => killed_at_one_of(run, &[("publish.part", 1..=400), ("publish.sent", 1..=15)]),
    }
}

/// SIGKILL when an answer has been heard, and others are perhaps on their way.
pub fn killed_after_acks(run: &mut Run) {
    let times = match run.sending {
        Sending::Singly => 1..=400,
        Sending::Batches => 1..=15,
    };
    killed_at(run, "publish.acked", times);
}

/// SIGKILL at the failpoint `place`, when a claim of the instance comes there for the n-th time, `times` of them.
pub fn killed_at(run: &mut Run, place: &'static str, times: RangeInclusive<u32>) {
    killed_at_one_of(run, &[(place, times)]);
}

/// The same at several places in turn.
fn killed_at_one_of(run: &mut Run, places: &[(&'static str, RangeInclusive<u32>)]) {
    let mut stage = Stage::new(database(), run.stream());
    stage.start();
    run.under_load(&mut stage, |run, stage| {
        for round in 0..run.pick(2, 10) {
            let (place, times) = &places[round % places.len()];
            let failpoint = format!("{place}:kill@{}", run.rng.u32(times.clone()));
            give_way(run, stage);
            let mut victim = stage.start_with_failpoint(&format!("victim-{round}"), &failpoint);
            let status = victim.wait_exit(EXIT_LIMIT);
            assert_eq!(status.signal(), Some(SIGKILL), "{failpoint}: {status}");
            take_over(stage);
        }
    });
}

/// Kills the others where there is a single key: one of them would have its lane nearly always, and it must be the
/// victim that comes to its failpoint.
fn give_way(run: &Run, stage: &mut Stage) {
    if run.sending == Sending::Batches {
        stage.instances.clear();
    }
}

/// Starts an instance where none is left but a victim.
fn take_over(stage: &mut Stage) {
    if stage.instances.is_empty() {
        stage.start();
    }
}

/// Up to three instances, one of them always there, the others started, stopped and killed.
pub fn come_and_go(run: &mut Run) {
    let mut stage = Stage::new(database(), run.stream());
    stage.start();
    run.under_load(&mut stage, |run, stage| {
        let until = Instant::now() + Duration::from_secs(run.pick(8, 60));
        while Instant::now() < until {
            if stage.instances.len() == 1 || (stage.instances.len() < 3 && run.rng.bool()) {
                stage.start();
            } else {
                let chosen = run.rng.usize(..stage.instances.len());
                let mut instance = stage.instances.swap_remove(chosen);
                if run.rng.bool() {
                    instance.kill();
                } else {
                    instance.term();
                    let status = instance.wait_exit(EXIT_LIMIT);
                    assert!(status.success(), "{status}\n{}", instance.log());
                }
            }
            run.pause(100..=1_200);
        }
    });
}

/// The lanes are taken over while what the paused instance sent is still known to the stream.
pub fn paused_within_the_window(run: &mut Run) {
    let stream = run.stream();
    paused(run, stream, super::WINDOW, 500);
}

/// They are taken over when the stream has forgotten it: it is stored again, by the one or by the other.
pub fn paused_beyond_the_window(run: &mut Run) {
    let window = Duration::from_secs(1);
    let stream = run.stream_with(json!({"duplicate_window": 1_000_000_000_u64}));
    paused(run, stream, window, 2_500);
}

/// SIGSTOP in the middle of a claim, and SIGCONT after others have taken over.
///
/// In a long run that is a minute, and the database frees the lanes by `idle_in_transaction_session_timeout`. In a
/// quick one its backends are terminated `free_after_ms` after the pause began, which is what that timeout does.
fn paused(run: &mut Run, stream: TestStream, window: Duration, free_after_ms: u64) {
    let mut stage = Stage::new(database(), stream);
    stage.window = window;
    stage.start();
    run.under_load(&mut stage, |run, stage| {
        let first = run.rng.usize(..PAUSES.len());
        for round in 0..2 {
            let place = PAUSES[(first + round) % PAUSES.len()];
            let name = format!("paused-{round}");
            let times = if run.sending == Sending::Batches { 1..=15 } else { 5..=40 };
            let failpoint = format!("{place}:stop@{}", run.rng.u32(times));
            give_way(run, stage);
            let mut victim = stage.start_with_failpoint(&name, &failpoint);
            wait_until("the instance is paused", EXIT_LIMIT, &[&victim, stage], || victim.is_paused());
            take_over(stage);
            if run.long {
                run.pause(60_000..=60_000);
            } else {
                run.pause(free_after_ms..=free_after_ms);
                stage.db.execute(&format!(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                      WHERE datname = current_database() AND application_name = 'pg-outbox/{name}'"
                ));
                run.pause(500..=1_500);
            }
            victim.resume();
            victim.wait_listening();
            stage.instances.push(victim);
            run.pause(500..=1_000);
        }
    });
}
