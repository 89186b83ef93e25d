//! Faults of the network between us and either server; the writers have one of their own.

use std::time::Duration;

use serde_json::json;

use super::super::harness::database::shared_postgres;
use super::super::harness::proxy::{Flow, Proxy, Way};
use super::super::harness::{TestStream, database};
use super::{Run, Stage};

/// What the ways of the network are set to while the fault lasts.
type Ways = &'static [(Way, Flow)];

const SLOW: Ways = &[
    (Way::ToServer, Flow::Slow(Duration::from_millis(20))),
    (Way::ToClient, Flow::Slow(Duration::from_millis(20))),
];
const CUT: Ways = &[(Way::ToServer, Flow::Cut), (Way::ToClient, Flow::Cut)];
const NOT_HEARD: Ways = &[(Way::ToServer, Flow::Cut)];
const DEAF: Ways = &[(Way::ToClient, Flow::Cut)];

/// Every chunk to and from PostgreSQL takes 20 ms.
pub fn slow_to_postgres(run: &mut Run) {
    to_postgres(run, SLOW);
}

/// Nothing reaches PostgreSQL, and nothing comes back.
pub fn postgres_cut(run: &mut Run) {
    to_postgres(run, CUT);
}

/// Nothing reaches PostgreSQL.
pub fn postgres_does_not_hear(run: &mut Run) {
    to_postgres(run, NOT_HEARD);
}

/// PostgreSQL does what we say, and its answers do not come.
pub fn we_do_not_hear_postgres(run: &mut Run) {
    to_postgres(run, DEAF);
}

/// Every connection to PostgreSQL breaks, again and again.
pub fn postgres_breaks(run: &mut Run) {
    let (proxy, mut stage) = postgres_behind_a_proxy(run);
    run.under_load(&mut stage, |run, _| breaks(run, &proxy));
}

fn to_postgres(run: &mut Run, ways: Ways) {
    let (proxy, mut stage) = postgres_behind_a_proxy(run);
    run.under_load(&mut stage, |run, _| lasts(run, &proxy, ways));
}

fn postgres_behind_a_proxy(run: &Run) -> (Proxy, Stage) {
    let postgres = shared_postgres();
    let proxy = Proxy::to(postgres.port());
    let mut stage = Stage::new(database(), run.stream());
    let dsn =
        stage.db.dispatcher_dsn().replace(&format!(":{}/", postgres.port()), &format!(":{}/", proxy.port()));
    assert_ne!(dsn, stage.db.dispatcher_dsn());
    stage.config = stage.config.clone().set("database.dsn", dsn);
    stage.start();
    (proxy, stage)
}

/// Every chunk to and from NATS takes 20 ms.
pub fn slow_to_nats(run: &mut Run) {
    to_nats(run, SLOW);
}

/// Nothing reaches NATS, and nothing comes back.
pub fn nats_cut(run: &mut Run) {
    to_nats(run, CUT);
}

/// Nothing reaches NATS.
pub fn nats_does_not_hear(run: &mut Run) {
    to_nats(run, NOT_HEARD);
}

/// NATS stores what we send, and its acks do not come.
pub fn we_do_not_hear_nats(run: &mut Run) {
    to_nats(run, DEAF);
}

/// NATS stores what we send, its acks do not come, and when we send it again, it has forgotten.
pub fn acks_beyond_the_window(run: &mut Run) {
    let stream = run.stream_with(json!({"duplicate_window": 1_000_000_000_u64}));
    let (proxy, mut stage) = nats_behind_a_proxy(run, stream);
    stage.window = Duration::from_secs(1);
    run.under_load(&mut stage, |run, _| lasts(run, &proxy, DEAF));
    assert!(stage.admitted > 0, "the pause must have been too long for the window");
}

/// Every connection to NATS breaks, again and again.
pub fn nats_breaks(run: &mut Run) {
    let (proxy, mut stage) = nats_behind_a_proxy(run, run.stream());
    run.under_load(&mut stage, |run, _| breaks(run, &proxy));
}

fn to_nats(run: &mut Run, ways: Ways) {
    let (proxy, mut stage) = nats_behind_a_proxy(run, run.stream());
    run.under_load(&mut stage, |run, _| lasts(run, &proxy, ways));
}

fn nats_behind_a_proxy(run: &Run, stream: TestStream) -> (Proxy, Stage) {
    let proxy = Proxy::to(run.nats().port());
    let mut stage = Stage::new(database(), stream);
    stage.config = stage
        .config
        .clone()
        .set("nats.url", format!("nats://127.0.0.1:{}", proxy.port()))
        // Silence is noticed after this, and believed after as long again: within the shortest fault.
        .set("nats.ack_timeout", "1s");
    stage.start();
    (proxy, stage)
}

/// The network is so for a while, and then free again: once with all that it held back, once without.
fn lasts(run: &mut Run, proxy: &Proxy, ways: Ways) {
    for held_back_is_lost in [false, true] {
        for &(way, flow) in ways {
            proxy.set(way, flow);
        }
        run.pause(run.pick(3_000..=4_500, 10_000..=60_000));
        if held_back_is_lost {
            proxy.reset();
        }
        proxy.set_both(Flow::Free);
        run.pause(500..=1_000);
    }
}

fn breaks(run: &mut Run, proxy: &Proxy) {
    for _ in 0..run.pick(4, 20) {
        proxy.reset();
        run.pause(100..=1_500);
    }
}
