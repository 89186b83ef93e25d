//! Faults of NATS: the server stops, stalls or forgets, the stream is gone or full, the cluster has no leader.

use std::thread;
use std::time::Duration;

use pg_outbox::lab::sandbox::{Stop, StoreState};
use serde_json::json;

use super::super::harness::proxy::Proxy;
use super::super::harness::{Cluster, TestStream, database, wait_until};
use super::{Run, Stage};

const LIMIT: Duration = Duration::from_secs(120);
/// A stream that gets no message for so long from a paused instance gets none any more.
const STILL: Duration = Duration::from_millis(300);

/// SIGTERM and a start with what was stored, several times.
pub fn stops(run: &mut Run) {
    restarts(run, Stop::Fast);
}

/// SIGKILL and a start with what was stored, several times.
pub fn is_killed(run: &mut Run) {
    restarts(run, Stop::Immediate);
}

fn restarts(run: &mut Run, mode: Stop) {
    let mut nats = run.start_nats();
    let mut stage = Stage::new(database(), run.stream_on(&nats));
    stage.start();
    run.under_load(&mut stage, |run, stage| {
        for _ in 0..2 {
            nats.stop(mode).unwrap();
            run.pause(run.pick(0..=1_500, 0..=30_000));
            nats.start_again(StoreState::Kept).unwrap();
            run.wait_work(stage, "it publishes again");
            run.pause(200..=800);
        }
    });
}

/// SIGSTOP: connections stay open, nothing answers.
pub fn stalls(run: &mut Run) {
    let nats = run.start_nats();
    let mut stage = Stage::new(database(), run.stream_on(&nats));
    stage.start();
    run.under_load(&mut stage, |run, _| {
        nats.pause().unwrap();
        run.pause(run.pick(3_000..=5_000, 60_000..=60_000));
        nats.resume().unwrap();
    });
}

/// The server is killed and finds nothing of what it had stored. What it had acknowledged until then is gone with
/// it, and no fault of ours: the judge reads it before. To know what that is, the connections are cut first.
pub fn starts_empty(run: &mut Run) {
    let mut nats = run.start_nats();
    let proxy = Proxy::to(nats.port());
    let mut stage = behind(&proxy, run.stream_on(&nats));
    run.under_load(&mut stage, |run, stage| {
        proxy.refuse();
        wait_quiet(&stage.stream);
        stage.end_life();
        nats.kill().unwrap();
        run.pause(run.pick(0..=1_500, 0..=30_000));
        nats.start_again(StoreState::Emptied).unwrap();
        proxy.admit();
        run.pause(500..=2_000);
        stage.stream.create(&run.settings(json!({})));
    });
}

/// The stream is deleted, is missing for a while, and is made anew.
pub fn the_stream_is_deleted(run: &mut Run) {
    let nats = run.start_nats();
    let proxy = Proxy::to(nats.port());
    let mut stage = behind(&proxy, run.stream_on(&nats));
    run.under_load(&mut stage, |run, stage| {
        proxy.refuse();
        wait_quiet(&stage.stream);
        stage.end_life();
        stage.stream.delete();
        proxy.admit();
        run.pause(run.pick(1_000..=3_000, 10_000..=60_000));
        let instance = &stage.instances[0];
        wait_until("it says what is missing", LIMIT, &[stage], || {
            instance.get("/ready").1.contains("is missing")
        });
        stage.stream.create(&run.settings(json!({})));
    });
}

/// A stage whose instance reaches NATS through the proxy.
fn behind(proxy: &Proxy, stream: TestStream) -> Stage {
    let mut stage = Stage::new(database(), stream);
    stage.config = stage.config.clone().set("nats.url", format!("nats://127.0.0.1:{}", proxy.port()));
    stage.start();
    stage
}

/// Waits until the stream has stored all that was on its way.
fn wait_quiet(stream: &TestStream) {
    let mut before = None;
    wait_until("nothing is on its way to the stream", LIMIT, &[stream], || {
        let now = Some(stream.count());
        let quiet = before == now;
        before = now;
        thread::sleep(Duration::from_millis(200));
        quiet
    });
}

/// A stream that refuses new messages rather than forget old ones.
pub fn the_stream_is_full(run: &mut Run) {
    let mut stage = Stage::new(database(), run.stream());
    stage.start();
    run.under_load(&mut stage, |run, stage| {
        for _ in 0..run.pick(1, 3) {
            // Nothing may be stored between the count and the limit: the server would make room by deleting.
            let instance = &stage.instances[0];
            instance.pause();
            let mut before = None;
            wait_until("nothing is under way", LIMIT, &[stage], || {
                thread::sleep(STILL);
                let now = stage.stream.count();
                before.replace(now) == Some(now)
            });
            let full = json!({"discard": "new", "max_msgs": stage.stream.count() + run.rng.u64(1..=200)});
            stage.stream.update(&full);
            instance.resume();
            wait_until("it says that there is no room", LIMIT, &[stage], || {
                instance.get("/ready").1.contains("maximum messages")
            });
            run.pause(run.pick(1_000..=3_000, 5_000..=40_000));
            stage.stream.update(&json!({"max_msgs": -1}));
            run.wait_work(stage, "it publishes again");
        }
    });
}

/// The server that leads the stream is killed, and the next one, and so on; each comes back.
pub fn the_leader_is_killed(run: &mut Run) {
    let mut cluster = Cluster::start();
    let mut stage = Stage::new(database(), cluster.stream(&run.settings(json!({}))));
    stage.start();
    run.under_load(&mut stage, |run, stage| {
        for _ in 0..run.pick(2, 6) {
            let mut leader = None;
            wait_until("the stream has a leader", LIMIT, &[stage], || {
                leader = cluster.leader(&stage.stream);
                leader.is_some()
            });
            let leader = leader.unwrap();
            cluster.kill(leader);
            run.wait_work(stage, "it publishes again");
            run.pause(0..=1_000);
            cluster.start_again(leader);
            cluster.wait_whole(&stage.stream);
        }
    });
}

/// Two of three servers are gone: the third one answers questions, and stores nothing.
pub fn the_quorum_is_lost(run: &mut Run) {
    let mut cluster = Cluster::start();
    let mut stage = Stage::new(database(), cluster.stream(&run.settings(json!({}))));
    stage.start();
    run.under_load(&mut stage, |run, stage| {
        // Often the one that leads the stream: it goes on to take what it cannot store, until it notices.
        let leader = cluster.leader(&stage.stream).filter(|_| run.rng.u8(..4) > 0);
        let left = leader.unwrap_or_else(|| run.rng.usize(..3));
        let killed = [(left + 1) % 3, (left + 2) % 3];
        for server in killed {
            cluster.kill(server);
        }
        run.pause(run.pick(5_000..=8_000, 60_000..=60_000));
        for server in killed {
            cluster.start_again(server);
        }
        cluster.wait_whole(&stage.stream);
    });
}
