//! What a claim promises: whose events it gets, in which order, how many, and what a settle, a release, a kill
//! or a drop leaves behind. Each test has a database of its own and talks to it through the store, as the
//! service does; an event is put into its state with SQL, as an operator would see it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use pg_outbox::config::{Database, DsnParts, Secret};
use pg_outbox::event::{Event, Outcome};
use pg_outbox::lane::LANES;
use pg_outbox::lane::marks::Marks;
use pg_outbox::postgres::{
    Asked, CLAIM_PLANS, Claim, ClaimLimits, ClaimSettings, Large, Locked, Newest, Settled, Store, StoreError,
};
use postgres::Client;

use crate::harness::{TestDb, database, wait_until};

const LIMIT: Duration = Duration::from_secs(20);
/// The longest backoff of the stores here.
const BACKOFF_MAX: Duration = Duration::from_secs(300);

/// How a test configures the database at `dsn`.
pub fn settings_for(dsn: &str) -> Database {
    Database { max_connections: 8, max_idle: 4, ..Database::defaults(Secret::new(dsn), DsnParts::default()) }
}

fn store_with(db: &TestDb, edit: impl FnOnce(&mut ClaimSettings)) -> Store {
    let mut settings = ClaimSettings {
        synchronous_commit: false,
        idle_in_transaction_timeout: Duration::from_secs(60),
        ordered: true,
        block_on_dead: false,
        backoff_max: BACKOFF_MAX,
        max_claim_bytes: 16 * 1024 * 1024,
    };
    edit(&mut settings);
    Store::new(&settings_for(&db.dispatcher_dsn()), "test", settings).unwrap()
}

pub fn store(db: &TestDb) -> Store {
    store_with(db, |_| {})
}

/// Looks into all lanes, from `first_lane` on and round to it again, and claims from the beginning of those that have
/// something.
pub fn claim_from(store: &Store, first_lane: i32, max_lanes: i32, max_events: i32) -> Claim {
    try_claim(store, first_lane, max_lanes, max_events).unwrap()
}

fn try_claim(store: &Store, first_lane: i32, max_lanes: i32, max_events: i32) -> Result<Claim, StoreError> {
    try_lock(store, first_lane, max_lanes, max_events)?.read(Large::Alone)
}

fn try_lock(store: &Store, first_lane: i32, max_lanes: i32, max_events: i32) -> Result<Locked, StoreError> {
    let lanes: Vec<i32> = (first_lane..first_lane + LANES).map(|lane| lane % LANES).collect();
    // Marks that hide nothing.
    let marks = Marks::default();
    let mut opening = store.open()?;
    let looked = opening.look(&lanes, &marks)?;
    let due = if looked.any_in_retry { opening.due()? } else { Vec::new() };
    let is_due = |lane: i32| due.iter().any(|(of, due)| *of == lane && due.is_zero());
    let claimable = |(lane, claimable): &(i32, bool)| (*claimable || is_due(*lane)).then_some(*lane);
    let claimable: Vec<i32> = looked.lanes.iter().filter_map(claimable).collect();
    let limits = ClaimLimits { lanes: max_lanes, events: max_events, event_bytes: Some(usize::MAX) };
    opening.lock(&claimable, limits, &marks)
}

/// Settles events of a claim.
fn settle<'e>(
    claim: Claim,
    outcomes: impl IntoIterator<Item = (&'e Event, &'e Outcome)>,
) -> Result<Settled, StoreError> {
    let outcomes: Vec<_> = outcomes.into_iter().map(|(event, outcome)| (event.row(), outcome)).collect();
    let mut ends = claim.ends([]);
    claim.settle(outcomes.iter().map(|(row, outcome)| (row, *outcome)), &mut ends)
}

/// Whether a limit cut the claim short.
fn has_more(claim: &Claim) -> bool {
    claim.ends([]).iter().any(|end| end.more)
}

/// Claims whatever there is.
fn claim(store: &Store) -> Claim {
    claim_from(store, 0, LANES, 1_000)
}

/// The seqs that a claim gets, which is then released.
fn claimable(store: &Store) -> Vec<i64> {
    let mut claim = claim(store);
    let seqs = seqs(&claim.take_events());
    claim.release().unwrap();
    seqs
}

fn seqs(events: &[Event]) -> Vec<i64> {
    let mut seqs: Vec<i64> = events.iter().map(|event| event.seq).collect();
    seqs.sort_unstable();
    seqs
}

/// Settles all events of a claim as published.
fn publish(mut claim: Claim) -> Settled {
    let events = claim.take_events();
    settle(claim, events.iter().map(|event| (event, &Outcome::Published))).unwrap()
}

fn retry_in(db: &TestDb, seq: i64, interval: &str) {
    db.execute(&format!(
        "UPDATE outboxes SET attempts = 1, next_attempt_at = now() + interval '{interval}' WHERE seq = {seq}"
    ));
}

fn bury(db: &TestDb, seq: i64) {
    db.execute(&format!(
        "UPDATE outboxes SET attempts = 3, dead_at = now(), next_attempt_at = NULL WHERE seq = {seq}"
    ));
}

#[test]
fn an_event_settled_while_a_claim_begins_is_not_read_again() {
    let db = database();
    let store = store(&db);
    db.event("order.placed", "k", "{}");
    // Whoever looks at a lane waits at this gate after its statement's snapshot was taken, and before it
    // locks the row.
    db.execute(
        "ALTER TABLE outbox_lanes RENAME TO lanes;
         CREATE FUNCTION gate() RETURNS bool LANGUAGE plpgsql AS $$
         BEGIN
             PERFORM pg_advisory_lock_shared(42);
             PERFORM pg_advisory_unlock_shared(42);
             RETURN true;
         END $$;
         CREATE VIEW outbox_lanes AS SELECT * FROM lanes WHERE gate();
         GRANT SELECT, UPDATE ON outbox_lanes TO outbox_dispatcher;",
    );
    let mut gate = db.client();

    // The store's two statements: what was settled in between is not there.
    let first = claim(&store);
    gate.execute("SELECT pg_advisory_lock(42)", &[]).unwrap();
    let second = std::thread::scope(|scope| {
        let second = scope.spawn(|| claim(&store));
        wait_at_gate(&db);
        assert_eq!(publish(first).published, 1);
        gate.execute("SELECT pg_advisory_unlock(42)", &[]).unwrap();
        second.join().unwrap()
    });
    assert!(second.is_empty(), "an event that was published and settled was claimed again");
    drop(second);

    // The same as one statement, for comparison: it does claim the settled event. This is what the claim
    // must never become, and shows that the interleaving above is the one that matters.
    db.event("order.placed", "k", "{}");
    let first = claim(&store);
    gate.execute("SELECT pg_advisory_lock(42)", &[]).unwrap();
    let merged = "SELECT l.lane, e.seq
                    FROM outbox_lanes l
                   CROSS JOIN LATERAL (SELECT o.seq FROM outboxes o
                                        WHERE outbox_lane(o.topic, o.metadata) = l.lane
                                          AND o.published_at IS NULL AND o.dead_at IS NULL
                                        ORDER BY o.seq LIMIT 100) e
                     FOR UPDATE OF l SKIP LOCKED";
    let rows = std::thread::scope(|scope| {
        let merged = scope.spawn(|| db.client().query(merged, &[]).unwrap().len());
        wait_at_gate(&db);
        assert_eq!(publish(first).published, 1);
        gate.execute("SELECT pg_advisory_unlock(42)", &[]).unwrap();
        merged.join().unwrap()
    });
    assert_eq!(rows, 1, "one statement that locks and reads was expected to read the settled event");
}

fn wait_at_gate(db: &TestDb) {
    wait_until("somebody waits at the gate", LIMIT, &[db], || {
        db.number(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND objid = 42
                   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        ) == 1
    });
}

#[test]
fn claims_never_share_a_lane() {
    let db = database();
    let store = store(&db);
    db.events("order.placed", 500, 50);
    let mut claims: Vec<Claim> = (0..4).map(|turn| claim_from(&store, turn * 16, 16, 100)).collect();
    let lanes: Vec<i32> = claims.iter().flat_map(Claim::lanes).collect();
    let distinct: BTreeSet<i32> = lanes.iter().copied().collect();
    assert_eq!(lanes.len(), distinct.len(), "{lanes:?}");
    let events: Vec<Event> = claims.iter_mut().flat_map(Claim::take_events).collect();
    let ids: BTreeSet<_> = events.iter().map(|event| event.id).collect();
    assert_eq!(ids.len(), events.len());
    for event in &events {
        assert!(distinct.contains(&event.lane));
    }
}

#[test]
fn lanes_are_looked_for_from_the_first_one_on_and_round() {
    let db = database();
    let store = store(&db);
    db.events("order.placed", 2_000, 2_000);
    assert_eq!(claim_from(&store, 60, 6, 1_000).lanes(), [60, 61, 62, 63, 0, 1]);
    assert_eq!(claim_from(&store, 7, 1, 1_000).lanes(), [7]);
}

/// A store's marks as they are with nobody writing.
fn marks(store: &Store) -> Marks {
    let mut marks = Marks::default();
    marks.observe(&store.sample().unwrap().sample);
    marks
}

#[test]
fn a_look_says_which_lanes_have_something() {
    let db = database();
    let store = store(&db);
    let (a, _) = two_keys_of_one_lane(&db);
    let look = |marks: &Marks| {
        let looked = store.open().unwrap().look(&[7, 8], marks).unwrap();
        (looked.lanes, looked.any_in_retry)
    };
    assert_eq!(look(&Marks::default()), (vec![(7, false), (8, false)], false));
    let first = db.event("order.placed", &a, "{}");
    // The order is that of seq, whatever the partition.
    db.event("order.placed", &a, "{}");
    db.execute("UPDATE outboxes SET created_at = now() - interval '3 years' WHERE seq = 2");
    assert_eq!(look(&Marks::default()), (vec![(7, true), (8, false)], false));
    retry_in(&db, first, "1 minute");
    assert_eq!(look(&Marks::default()), (vec![(7, true), (8, false)], true));
    db.execute("UPDATE outboxes SET published_at = now(), next_attempt_at = NULL");
    assert_eq!(look(&Marks::default()), (vec![(7, false), (8, false)], false));
}

#[test]
fn a_look_gives_up_after_so_many_published_events() {
    let db = database();
    let store = store(&db);
    db.events("order.placed", 2_000, 1);
    db.execute("UPDATE outboxes SET published_at = now()");
    let lanes: Vec<i32> = (0..LANES).collect();
    let claimable = |marks: &Marks| {
        let looked = store.open().unwrap().look(&lanes, marks).unwrap();
        looked.lanes.iter().filter(|(_, claimable)| *claimable).count()
    };
    let mut marks = marks(&store);
    assert_eq!(claimable(&marks), 1, "a claim walks on from there");
    let limits = ClaimLimits { lanes: LANES, events: 1_000, event_bytes: Some(usize::MAX) };
    let claim = store.open().unwrap().lock(&lanes, limits, &marks).unwrap().read(Large::Refused).unwrap();
    assert!(claim.is_empty());
    for end in claim.ends([]) {
        marks.ended(&claim.basis(), &end);
    }
    assert_eq!(claimable(&marks), 0);
}

/// The lanes locked without a look, and whether there may be more; `None` if none was.
fn lock_newest(store: &Store, max_events: i32, marks: &Marks) -> Option<(Locked, bool)> {
    let lanes: Vec<i32> = (0..LANES).collect();
    let limits = ClaimLimits { lanes: LANES, events: max_events, event_bytes: Some(usize::MAX) };
    match store.open().unwrap().lock_newest(&lanes, limits, marks).unwrap() {
        Newest::Locked { locked, more } => Some((locked, more)),
        Newest::Nothing(_) => None,
    }
}

/// Marks of which all have risen to the last number drawn.
fn risen(store: &Store) -> Marks {
    let mut marks = marks(store);
    (0..LANES).for_each(|lane| marks.looked(lane));
    marks
}

#[test]
fn the_newest_events_are_claimed_without_a_look() {
    let db = database();
    let (one, other) = (store(&db), store(&db));
    let marks = risen(&one);
    assert!(lock_newest(&one, 100, &marks).is_none());
    let (a, b) = two_keys_of_one_lane(&db);
    for key in [&a, &b, &a] {
        db.event("order.placed", key, "{}");
    }
    let (locked, more) = lock_newest(&one, 100, &marks).unwrap();
    assert_eq!((&locked.lanes[..], more), (&[7][..], false), "a lane is locked once, whatever it has");
    assert!(lock_newest(&other, 100, &marks).is_none(), "somebody has it");
    let mut claim = locked.read(Large::Alone).unwrap();
    let events = claim.take_events();
    assert_eq!(seqs(&events), [1, 2, 3]);
    settle(claim, events.iter().map(|event| (event, &Outcome::Published))).unwrap();
    assert!(lock_newest(&one, 100, &marks).is_none(), "nothing is left");

    db.events("order.placed", 500, 500);
    let (locked, more) = lock_newest(&one, 100, &marks).unwrap();
    assert!(more && (1..=16).contains(&locked.lanes.len()), "{:?}", locked.lanes);
    drop(locked);
    let (second, _) = lock_newest(&other, 3, &marks).unwrap();
    assert!((1..=3).contains(&second.lanes.len()), "{:?}: each may have an event", second.lanes);
}

#[test]
fn far_from_the_last_number_the_newest_events_are_left_to_a_look() {
    let db = database();
    let store = store(&db);
    db.event("order.placed", "a", "{}");
    let near = marks(&store);
    assert!(lock_newest(&store, 100, &near).is_none(), "a lane without a mark could have a long past");
    let mut risen = risen(&store);
    db.event("order.placed", "a", "{}");
    assert!(lock_newest(&store, 100, &risen).is_some());
    db.execute("SELECT setval('outboxes_seq_seq', 100000)");
    risen.observe(&store.sample().unwrap().sample);
    assert!(lock_newest(&store, 100, &risen).is_none());
}

#[test]
fn an_event_is_read_as_it_was_written() {
    let db = database();
    let store = store(&db);
    db.execute(
        "INSERT INTO outboxes (created_at, topic, metadata, payload) VALUES
         ('2020-01-01 00:00:00.000001+00', 'a', '{\"ordering-key\": \"k\", \"n\": 1}', '{\"text\": \"ä \\u2028\"}'),
         ('infinity', 'b', NULL, 'null'), ('-infinity', 'c', '{}', '1.10')",
    );
    let mut claim = claim(&store);
    let events: BTreeMap<String, Event> =
        claim.take_events().into_iter().map(|event| (event.topic.clone(), event)).collect();
    assert_eq!(events["a"].created_at, 631_152_000_000_001);
    assert_eq!(events["a"].metadata.as_deref(), Some(r#"{"n": 1, "ordering-key": "k"}"#));
    assert_eq!(events["a"].payload, "{\"text\": \"ä \u{2028}\"}");
    assert_eq!(events["b"].created_at, i64::MAX);
    assert_eq!((events["b"].metadata.as_deref(), events["b"].payload.as_str()), (None, "null"));
    assert_eq!((events["c"].created_at, events["c"].payload.as_str()), (i64::MIN, "1.10"));
    assert_eq!((events["a"].attempts, events["a"].in_retry), (0, false));
    // What was read comes back exactly, or these rows would not be found.
    let outcomes = events.values().map(|event| (event, &Outcome::Published));
    assert_eq!(settle(claim, outcomes).unwrap(), Settled { published: 3, ..Settled::default() });
    assert_eq!(db.published(), 3);
}

#[test]
fn a_settle_writes_every_outcome_and_leaves_the_rest() {
    let db = database();
    let store = store(&db);
    for key in ["published", "retried", "dead", "untouched", "forgotten", "again"] {
        db.event("order.placed", key, "{}");
    }
    db.execute(
        "UPDATE outboxes SET attempts = 1, last_error = 'before', next_attempt_at = now() WHERE seq = 6",
    );
    let mut claim = claim(&store);
    let events = claim.take_events();
    let outcome = |key: &str| match key {
        "published" | "again" => Some(Outcome::Published),
        "retried" => Some(Outcome::Retry { attempts: 1, delay_ms: 60_000, error: "no\0 stream".into() }),
        "dead" => Some(Outcome::Dead { attempts: 3, error: "too large".into() }),
        "untouched" => Some(Outcome::Untouched),
        _ => None,
    };
    let key = |event: &Event| {
        let metadata: serde_json::Value = serde_json::from_str(event.metadata.as_ref().unwrap()).unwrap();
        metadata["ordering-key"].as_str().unwrap().to_owned()
    };
    let outcomes: Vec<_> =
        events.iter().filter_map(|event| outcome(&key(event)).map(|outcome| (event, outcome))).collect();
    let settled = settle(claim, outcomes.iter().map(|(event, outcome)| (*event, outcome))).unwrap();
    assert_eq!(settled, Settled { published: 2, retried: 1, dead: 1, missed: 0 });

    let mut client = db.client();
    let mut row = |key: &str| -> String {
        let sql = "SELECT concat_ws(' ', attempts, published_at IS NOT NULL, dead_at IS NOT NULL,
                          round(extract(epoch FROM next_attempt_at - now()) / 10) * 10, last_error)
                     FROM outboxes WHERE metadata->>'ordering-key' = $1";
        client.query_one(sql, &[&key]).unwrap().get(0)
    };
    assert_eq!(row("published"), "1 t f");
    assert_eq!(row("again"), "2 t f", "the error of the attempt before is gone");
    assert_eq!(row("retried"), "1 f f 60 no? stream");
    assert_eq!(row("dead"), "3 f t too large");
    assert_eq!(row("untouched"), "0 f f");
    assert_eq!(row("forgotten"), "0 f f");
}

#[test]
fn a_backoff_counts_from_the_settle_not_from_the_claim() {
    let db = database();
    let store = store(&db);
    db.event("order.placed", "k", "{}");
    let mut claim = claim(&store);
    let events = claim.take_events();
    let claimed = Instant::now();
    wait_until("two seconds pass", LIMIT, &[], || claimed.elapsed() > Duration::from_secs(2));
    let outcome = Outcome::Retry { attempts: 1, delay_ms: 1_500, error: "no".into() };
    settle(claim, [(&events[0], &outcome)]).unwrap();
    assert!(claim_is_empty(&store), "due before its backoff was over");
}

fn claim_is_empty(store: &Store) -> bool {
    claim(store).is_empty()
}

#[test]
fn a_settle_says_which_rows_were_no_longer_pending() {
    let db = database();
    let store = store(&db);
    for _ in 0..4 {
        db.event("order.placed", "k", "{}");
    }
    let mut claim = claim(&store);
    let events = claim.take_events();
    // Somebody who does not ask for the lane's lock.
    db.execute(
        "UPDATE outboxes SET published_at = '2020-01-01' WHERE seq = 1;
         UPDATE outboxes SET dead_at = '2020-01-01' WHERE seq = 2; DELETE FROM outboxes WHERE seq = 3",
    );
    let settled = settle(claim, events.iter().map(|event| (event, &Outcome::Published))).unwrap();
    assert_eq!(settled, Settled { published: 1, missed: 3, ..Settled::default() });
    assert_eq!(db.number("SELECT count(*) FROM outboxes WHERE published_at > now() - interval '1 day'"), 1);
    assert_eq!(db.dead(), 1);
}

#[test]
fn a_row_that_moved_between_read_and_settle_is_settled_where_it_is() {
    let db = database();
    let store = store(&db);
    db.events("order.placed", 10, 5);
    let mut claim = claim(&store);
    let events = claim.take_events();
    db.execute("UPDATE outboxes SET payload = '{\"corrected\": true}' WHERE seq IN (3, 4)");
    let settled = settle(claim, events.iter().map(|event| (event, &Outcome::Published))).unwrap();
    assert_eq!(settled, Settled { published: 10, ..Settled::default() });
    assert_eq!((db.pending(), db.number("SELECT sum(attempts) FROM outboxes")), (0, 10), "each once");
}

#[test]
fn a_row_that_went_to_another_partition_stays_pending_and_is_claimed_again() {
    let db = database();
    let store = store(&db);
    db.execute("SELECT create_monthly_partition('outboxes', (now() - interval '1 month')::date)");
    db.events("order.placed", 3, 3);
    let mut claim = claim(&store);
    let events = claim.take_events();
    db.execute("UPDATE outboxes SET created_at = created_at - interval '1 month' WHERE seq = 2");
    let settled = settle(claim, events.iter().map(|event| (event, &Outcome::Published))).unwrap();
    assert_eq!(settled, Settled { published: 2, missed: 1, ..Settled::default() });
    assert_eq!(claimable(&store), [2]);
    assert_eq!(publish(self::claim(&store)).published, 1);
}

/// It would give every row another place. A claim has read from the partition, so it waits for the claim.
#[test]
fn vacuum_full_comes_after_the_settle() {
    let db = database();
    let store = store(&db);
    db.events("order.placed", 10, 5);
    let mut claim = claim(&store);
    let events = claim.take_events();
    let partition = "(SELECT tableoid::regclass::text FROM outboxes LIMIT 1)";
    let partition: String = db.client().query_one(partition.trim_matches(['(', ')']), &[]).unwrap().get(0);
    let vacuum = format!("VACUUM FULL {partition}");
    let mut hasty = db.client();
    hasty.batch_execute("SET lock_timeout = '100ms'").unwrap();
    let refused = hasty.batch_execute(&vacuum).unwrap_err();
    assert_eq!(refused.code().unwrap().code(), "55P03", "{refused:?}");
    let settled = settle(claim, events.iter().map(|event| (event, &Outcome::Published))).unwrap();
    assert_eq!(settled.published, 10);
    db.events("order.placed", 10, 5);
    hasty.batch_execute(&vacuum).unwrap();
    assert_eq!(publish(self::claim(&store)).published, 10);
}

/// Claims from where these marks say, `events` of each read.
fn claim_by(store: &Store, marks: &Marks, events: i32) -> Claim {
    let lanes: Vec<i32> = (0..LANES).collect();
    let limits = ClaimLimits { lanes: LANES, events, event_bytes: Some(usize::MAX) };
    store.open().unwrap().lock(&lanes, limits, marks).unwrap().read(Large::Alone).unwrap()
}

#[test]
fn a_claim_reads_on_where_its_read_has_ended() {
    let db = database();
    let store = store(&db);
    for _ in 0..30 {
        db.event("order.placed", "k", "{}");
    }
    let mut claim = claim_by(&store, &marks(&store), 640);
    let mut events = claim.take_events();
    assert_eq!(events.len(), 10, "of a lane, its share");
    let next = claim.read_on().unwrap().unwrap();
    assert_eq!(seqs(&next), (11..=30).collect::<Vec<i64>>(), "all of the claim's share is this lane's now");
    events.extend(next);
    assert!(claim.read_on().unwrap().is_none(), "there is no more");
    assert_eq!(settle(claim, events.iter().map(|event| (event, &Outcome::Published))).unwrap().published, 30);
    assert!(claimable(&store).is_empty());
}

/// The first read has learnt nothing of its size: it is over its share of the claim's bytes when the claim reads on.
#[test]
fn what_is_cut_while_a_claim_reads_on_comes_first_in_the_next_one() {
    let db = database();
    let store = store_with(&db, |settings| settings.max_claim_bytes = 1 << 20);
    for n in 1..=100 {
        let filler: String =
            (0..if n == 15 { 500_000 } else { 100 }).map(|_| fastrand::alphanumeric()).collect();
        db.event("order.placed", "k", &serde_json::json!({ "filler": filler }).to_string());
    }
    let mut claim = claim_by(&store, &marks(&store), 64);
    let mut events = claim.take_events();
    assert_eq!(seqs(&events), [1], "of a lane, its share");
    let next = claim.read_on().unwrap().unwrap();
    assert_eq!(seqs(&next), (2..=14).collect::<Vec<i64>>());
    events.extend(next);
    let ends = claim.ends([]);
    let lane = ends.iter().find(|end| end.lane == events[0].lane).unwrap();
    assert_eq!((lane.reached, lane.more), (Some(14), true));
    assert_eq!(settle(claim, events.iter().map(|event| (event, &Outcome::Published))).unwrap().published, 14);
    assert_eq!(claimable(&store), [15, 16], "as many as may be as large");
}

#[test]
fn a_claim_does_not_read_on_where_order_could_be_lost() {
    let db = database();
    let store = store(&db);
    let before = marks(&store);
    for _ in 0..30 {
        db.event("order.placed", "k", "{}");
    }
    let reads_on = |marks: &Marks| {
        let mut claim = claim_by(&store, marks, 640);
        assert_eq!(claim.take_events().len(), 10);
        claim.read_on().unwrap().map(|events| events.len())
    };
    assert_eq!(
        reads_on(&before),
        None,
        "who has drawn a number since the sample may commit between the reads"
    );
    let mut writer = db.client();
    writer
        .batch_execute("BEGIN; INSERT INTO outboxes (topic, payload) VALUES ('order.placed', '{}')")
        .unwrap();
    assert_eq!(reads_on(&marks(&store)), None, "so may a writer that is not asked for yet");
    writer.batch_execute("ROLLBACK").unwrap();
    assert_eq!(reads_on(&marks(&store)), Some(20));
    retry_in(&db, 30, "1 minute");
    assert_eq!(reads_on(&marks(&store)), None, "something in the lane is in retry");
}

#[test]
fn a_released_and_a_dropped_claim_leave_everything_as_it_was() {
    let db = database();
    let store = store(&db);
    db.events("order.placed", 20, 5);
    claim(&store).release().unwrap();
    assert_eq!(claimable(&store).len(), 20);
    drop(claim(&store));
    assert_eq!(claimable(&store).len(), 20);
    assert_eq!(db.number("SELECT count(*) FROM outboxes WHERE attempts > 0"), 0);
    let state = store.pool_state();
    assert_eq!(state.connections, state.idle, "a connection is still out: {state:?}");
}

#[test]
fn an_empty_claim_holds_no_connection_and_no_lock() {
    let db = database();
    let store = store(&db);
    let empty = claim(&store);
    assert!(empty.is_empty() && !has_more(&empty));
    let state = store.pool_state();
    assert_eq!(state.connections, state.idle, "{state:?}");
    assert_eq!(settle(empty, []).unwrap(), Settled::default());
}

#[test]
fn a_retry_holds_back_its_own_key_and_no_other() {
    let db = database();
    let store = store(&db);
    let held = db.event("order.placed", "a", "{}");
    let later = db.event("order.placed", "a", "{}");
    let other = db.event("order.placed", "b", "{}");
    assert_eq!(claimable(&store), [held, later, other]);
    retry_in(&db, held, "1 minute");
    assert_eq!(claimable(&store), [other], "the key waits, the other one does not");
    retry_in(&db, held, "-1 second");
    assert_eq!(claimable(&store), [held, other], "a due retry goes ahead of its key, alone");
    db.execute(&format!(
        "UPDATE outboxes SET published_at = now(), next_attempt_at = NULL WHERE seq = {held}"
    ));
    assert_eq!(claimable(&store), [later, other]);
}

#[test]
fn a_retry_holds_back_other_keys_of_its_lane_neither() {
    let db = database();
    let store = store(&db);
    let (a, b) = two_keys_of_one_lane(&db);
    let held = db.event("order.placed", &a, "{}");
    db.event("order.placed", &a, "{}");
    let other = db.event("order.placed", &b, "{}");
    retry_in(&db, held, "1 minute");
    assert_eq!(claimable(&store), [other]);
}

fn two_keys_of_one_lane(db: &TestDb) -> (String, String) {
    let row = db
        .client()
        .query_one(
            "SELECT min(k), max(k) FROM (SELECT 'k' || n AS k FROM generate_series(1, 200) n) keys
              WHERE outbox_lane(k, NULL) = 7",
            &[],
        )
        .unwrap();
    let keys: (String, String) = (row.get(0), row.get(1));
    assert_ne!(keys.0, keys.1);
    keys
}

#[test]
fn a_lane_with_nothing_but_held_events_is_not_claimed() {
    let db = database();
    let store = store(&db);
    let held = db.event("order.placed", "a", "{}");
    for _ in 0..50 {
        db.event("order.placed", "a", "{}");
    }
    retry_in(&db, held, "1 minute");
    assert!(claim_is_empty(&store));
}

#[test]
fn several_retries_of_a_key_come_in_seq_order() {
    let db = database();
    let store = store(&db);
    let all: Vec<i64> = (0..5).map(|_| db.event("order.placed", "a", "{}")).collect();
    let fresh = db.event("order.placed", "a", "{}");
    // Revived together, as an operator does: all due, the latest one first by time.
    for (n, seq) in all.iter().enumerate() {
        retry_in(&db, *seq, &format!("-{} seconds", n + 1));
    }
    let mut claim = claim_from(&store, 0, LANES, 1_000);
    let order: Vec<i64> = claim.take_events().iter().map(|event| event.seq).collect();
    assert_eq!(order, all, "in seq order, without {fresh}");
    drop(claim);
    // A batch that cannot hold them all has the first ones.
    let mut claim = claim_from(&store, 0, LANES, 2);
    assert_eq!(seqs(&claim.take_events()), all[..2]);
    assert!(has_more(&claim));
    drop(claim);
    // One that is not due holds back what comes after it, due or not.
    retry_in(&db, all[2], "1 minute");
    assert_eq!(claimable(&store), all[..2]);
    // An event written before all of these that became visible late is held back by none.
    db.execute("UPDATE outboxes SET seq = 0 WHERE seq = 6");
    assert_eq!(claimable(&store), [&[0], &all[..2]].concat());
}

/// Time until the earliest retry of all is due.
fn next_due(store: &Store) -> Option<Duration> {
    store.open().unwrap().due().unwrap().into_iter().map(|(_, due)| due).min()
}

#[test]
fn a_retry_further_off_than_the_longest_backoff_is_due() {
    let db = database();
    let store = store(&db);
    let seq = db.event("order.placed", "a", "{}");
    retry_in(&db, seq, "299 seconds");
    assert!(claim_is_empty(&store));
    assert!(next_due(&store).unwrap() > Duration::from_secs(290));
    retry_in(&db, seq, "10 minutes");
    assert_eq!(claimable(&store), [seq]);
    assert_eq!(next_due(&store), Some(Duration::ZERO));
    db.execute("UPDATE outboxes SET next_attempt_at = 'infinity'");
    assert_eq!(claimable(&store), [seq]);
    assert_eq!(next_due(&store), Some(Duration::ZERO));
}

#[test]
fn next_due_is_the_earliest_retry_of_all() {
    let db = database();
    let store = store(&db);
    assert_eq!(next_due(&store), None);
    for (key, interval) in [("a", "100 seconds"), ("b", "40 seconds"), ("c", "200 seconds")] {
        let seq = db.event("order.placed", key, "{}");
        retry_in(&db, seq, interval);
    }
    let due = next_due(&store).unwrap();
    assert!((Duration::from_secs(35)..=Duration::from_secs(40)).contains(&due), "{due:?}");
    db.execute("UPDATE outboxes SET dead_at = now() WHERE seq = 2");
    assert!(next_due(&store).unwrap() > Duration::from_secs(90));
}

#[test]
fn an_open_claim_is_there_to_see_for_others() {
    let db = database();
    let (one, other) = (store(&db), store(&db));
    assert!(!other.claims_open().unwrap());
    db.event("order.placed", "a", "{}");
    let claim = claim_from(&one, 0, LANES, 10);
    assert!(claim_is_empty(&other), "the lane is locked");
    assert!(other.claims_open().unwrap(), "so it is worth looking again soon");
    drop(claim);
    assert!(!other.claims_open().unwrap());
}

#[test]
fn a_dead_letter_holds_its_key_only_where_it_should() {
    let db = database();
    let (goes_on, blocks) = (store(&db), store_with(&db, |settings| settings.block_on_dead = true));
    let unordered = store_with(&db, |settings| {
        settings.block_on_dead = true;
        settings.ordered = false;
    });
    let before = db.event("order.placed", "a", "{}");
    let dead = db.event("order.placed", "a", "{}");
    let after = db.event("order.placed", "a", "{}");
    let retried = db.event("order.placed", "a", "{}");
    let other = db.event("order.placed", "b", "{}");
    bury(&db, dead);
    retry_in(&db, retried, "-1 second");
    assert_eq!(claimable(&goes_on), [before, after, retried, other]);
    assert_eq!(claimable(&blocks), [before, other]);
    assert_eq!(claimable(&unordered), [before, after, retried, other]);
    // Revived: a retry, due at once, and its key waits for it alone.
    db.execute("UPDATE outboxes SET dead_at = NULL, next_attempt_at = now() WHERE dead_at IS NOT NULL");
    assert_eq!(claimable(&blocks), [before, dead, retried, other]);
}

#[test]
fn without_order_nothing_is_held_back() {
    let db = database();
    let store = store_with(&db, |settings| settings.ordered = false);
    let retried = db.event("order.placed", "a", "{}");
    let later = db.event("order.placed", "a", "{}");
    let due = db.event("order.placed", "a", "{}");
    retry_in(&db, retried, "1 minute");
    retry_in(&db, due, "-1 second");
    assert_eq!(claimable(&store), [later, due]);
}

#[test]
fn a_key_longer_than_an_index_entry_can_be_retried() {
    let db = database();
    let store = store(&db);
    // Random, or PostgreSQL would compress it.
    let key: String = (0..4_000).map(|_| fastrand::alphanumeric()).collect();
    let first = db.event("order.placed", &key, "{}");
    db.event("order.placed", &key, "{}");
    let mut claim = claim(&store);
    let events = claim.take_events();
    let outcome = Outcome::Retry { attempts: 1, delay_ms: 60_000, error: "no".into() };
    assert_eq!(settle(claim, [(&events[0], &outcome)]).unwrap().retried, 1);
    assert!(claim_is_empty(&store));
    bury(&db, first);
    assert_eq!(claimable(&store).len(), 1);
}

#[test]
fn lanes_share_a_claim_and_a_hot_one_may_have_all_of_it() {
    let db = database();
    let store = store(&db);
    db.events("order.placed", 1_000, 1);
    let mut claim = claim_from(&store, 0, LANES, 100);
    assert_eq!(claim.take_events().len(), 100, "one hot lane alone gets the full batch");
    assert!(has_more(&claim));
    drop(claim);

    db.events("order.shipped", 20_000, 400);
    let mut claim = claim_from(&store, 0, 10, 105);
    let mut of_lane = BTreeMap::new();
    for event in claim.take_events() {
        *of_lane.entry(event.lane).or_insert(0) += 1;
    }
    assert_eq!(of_lane.len(), 10);
    assert!(of_lane.values().all(|n| [10, 11].contains(n)), "{of_lane:?}");
    assert_eq!(of_lane.values().sum::<i32>(), 105);
    drop(claim);

    // Fewer events than lanes: no lane is locked for nothing.
    let mut claim = claim_from(&store, 0, LANES, 3);
    assert_eq!((claim.lanes().len(), claim.take_events().len()), (3, 3));
}

#[test]
fn a_claim_that_took_everything_says_so() {
    let db = database();
    let store = store(&db);
    db.events("order.placed", 30, 10);
    let mut claim = claim_from(&store, 0, LANES, 1_000);
    assert_eq!(claim.take_events().len(), 30);
    assert!(!has_more(&claim));
}

#[test]
fn a_claim_is_bounded_in_bytes() {
    let db = database();
    let bound = 1_000_000;
    let store = store_with(&db, |settings| settings.max_claim_bytes = bound);
    let mut random = String::new();
    let mut insert = db.client();
    let sql = "INSERT INTO outboxes (topic, metadata, payload)
               VALUES ('order.placed', jsonb_build_object('ordering-key', $1::text), to_jsonb($2::text))";
    for n in 0..60 {
        // Half of them cannot be compressed, half of them shrink to nothing.
        random.clear();
        random.extend((0..100_000).map(|_| if n % 2 == 0 { fastrand::alphanumeric() } else { 'x' }));
        insert.execute(sql, &[&format!("k{}", n % 3), &random]).unwrap();
    }
    let mut seen: BTreeMap<i64, Vec<i64>> = BTreeMap::new();
    let mut claims = 0;
    loop {
        let mut claim = claim_from(&store, claims, LANES, 1_000);
        let events = claim.take_events();
        if events.is_empty() {
            break;
        }
        let bytes: usize =
            events.iter().map(|event| event.payload.len() + event.metadata.as_ref().unwrap().len()).sum();
        assert!(bytes <= usize::try_from(bound).unwrap(), "{bytes} B in {} events", events.len());
        let left = db.pending() > i64::try_from(events.len()).unwrap();
        assert!(has_more(&claim) || !left, "{} events left, and the claim does not say so", db.pending());
        for event in &events {
            seen.entry(event.key_hash).or_default().push(event.seq);
        }
        settle(claim, events.iter().map(|event| (event, &Outcome::Published))).unwrap();
        claims += 1;
    }
    assert!((7..=40).contains(&claims), "{claims} claims for 6 MB");
    for (key, seqs) in seen {
        assert_eq!(seqs.len(), 20);
        assert!(seqs.is_sorted(), "{key} was cut in the middle: {seqs:?}");
    }
}

#[test]
fn an_event_larger_than_the_bound_comes_alone() {
    let db = database();
    let store = store_with(&db, |settings| settings.max_claim_bytes = 1_000);
    for _ in 0..2 {
        for key in ["a", "b", "c"] {
            db.event("order.placed", key, &format!("\"{}\"", "x".repeat(100_000)));
        }
    }
    for left in (0..6).rev() {
        let refused = try_lock(&store, 0, LANES, 1_000).unwrap().read(Large::Refused).unwrap();
        assert!(refused.is_empty());
        let lane = refused.too_large().unwrap();
        refused.release().unwrap();
        let mut claim = claim(&store);
        assert_eq!(claim.too_large(), None);
        let events = claim.take_events();
        assert_eq!((events.len(), events[0].lane), (1, lane));
        assert!(has_more(&claim) || left == 0);
        settle(claim, events.iter().map(|event| (event, &Outcome::Published))).unwrap();
        assert_eq!(db.pending(), left);
    }
}

#[test]
fn a_claim_whose_connection_is_killed_fails_and_frees_its_lanes() {
    let db = database();
    let store = store(&db);
    db.events("order.placed", 10, 3);
    let kill = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                 WHERE datname = current_database() AND state = 'idle in transaction'
                   AND application_name = 'pg-outbox/test'";

    let mut claim = claim(&store);
    let events = claim.take_events();
    assert_eq!(db.number(kill), 1);
    let error = settle(claim, events.iter().map(|event| (event, &Outcome::Published))).unwrap_err();
    assert!(error.is_outage(), "{error}");
    wait_until("the lanes are free again", LIMIT, &[&db], || !claim_is_empty(&store));
    assert_eq!(db.published(), 0);

    // Dropped and released ones: no panic, and nothing broken is pooled.
    let dropped = self::claim(&store);
    assert_eq!(db.number(kill), 1);
    drop(dropped);
    wait_until("the lanes are free again", LIMIT, &[&db], || !claim_is_empty(&store));
    let released = self::claim(&store);
    assert_eq!(db.number(kill), 1);
    assert!(released.release().unwrap_err().is_outage());
    wait_until("the lanes are free again", LIMIT, &[&db], || !claim_is_empty(&store));
    assert_eq!(publish(self::claim(&store)).published, 10);
}

#[test]
fn postgres_ends_a_claim_that_is_not_heard_of() {
    let db = database();
    let store = store_with(&db, |settings| settings.idle_in_transaction_timeout = Duration::from_millis(200));
    db.event("order.placed", "k", "{}");
    let mut lost = claim(&store);
    let events = lost.take_events();
    wait_until("another claim gets the lane", LIMIT, &[&db], || !claim_is_empty(&store));
    let error = settle(lost, [(&events[0], &Outcome::Published)]).unwrap_err();
    assert!(error.is_outage(), "{error}");
    assert_eq!(db.published(), 0);
}

#[test]
fn a_refused_settle_dooms_the_connection_and_frees_the_lanes() {
    let db = database();
    let store = store(&db);
    db.event("order.placed", "k", "{}");
    db.execute("ALTER TABLE outboxes ADD CONSTRAINT never CHECK (attempts < 1)");
    let mut claim = claim(&store);
    let events = claim.take_events();
    let error = settle(claim, [(&events[0], &Outcome::Published)]).unwrap_err();
    assert_eq!(error.sqlstate(), Some("23514"));
    assert!(!error.is_outage());
    assert!(error.to_string().starts_with("23514: new row for relation"), "{error}");
    assert!(!error.to_string().contains("Failing row"), "what a row holds is in no error: {error}");
    assert_eq!(store.pool_state().connections, 0, "a connection that has seen an error is closed");
    assert_eq!(claimable(&store).len(), 1);
}

#[test]
fn a_store_without_its_schema_or_server_fails_in_words() {
    let db = database();
    let store = store(&db);
    db.execute("ALTER TABLE outbox_lanes RENAME TO elsewhere");
    let error = try_claim(&store, 0, 1, 1).err().unwrap();
    assert_eq!(error.sqlstate(), Some("42P01"), "{error}");
    assert_eq!(store.pool_state().connections, 0);
    db.execute("ALTER TABLE elsewhere RENAME TO outbox_lanes");
    assert!(claim_is_empty(&store));

    let mut nowhere = settings_for("postgresql://user:hunter2@127.0.0.1:1/db");
    nowhere.connect_timeout = Duration::from_millis(300);
    let settings = ClaimSettings {
        synchronous_commit: true,
        idle_in_transaction_timeout: Duration::from_secs(1),
        ordered: true,
        block_on_dead: false,
        backoff_max: BACKOFF_MAX,
        max_claim_bytes: 1,
    };
    let store = Store::new(&nowhere, "test", settings).unwrap();
    let error = store.ping().unwrap_err();
    assert!(error.is_outage());
    let text = error.to_string();
    assert!(text.starts_with("no connection to postgres at 127.0.0.1:1 within 300ms: "), "{text}");
    assert!(text.contains("Connection refused") && !text.contains("hunter2"), "{text}");
}

#[test]
fn the_pool_keeps_no_more_idle_connections_than_it_may() {
    let db = database();
    let store = store(&db);
    let distinct_lanes =
        "INSERT INTO outboxes (topic, payload) SELECT 't' || n, '{}' FROM generate_series(1, 500) n";
    db.execute(distinct_lanes);
    let claims: Vec<Claim> = (0..8).map(|n| claim_from(&store, n * 8, 8, 8)).collect();
    assert_eq!(store.pool_state().connections, 8);
    assert!(store.ping().is_err(), "all eight are in use");
    drop(claims);
    assert_eq!((store.pool_state().connections, store.pool_state().idle), (4, 4));
}

#[test]
fn a_listener_hears_of_committed_events() {
    let db = database();
    let store = store(&db);
    let (mut listener, mut lock) = store.wake_up(None).unwrap();
    db.event("order.placed", "k", "{}");
    assert!(!listener.wait(Duration::from_millis(10)).unwrap(), "nobody sleeps");
    assert_eq!(lock.ask().unwrap(), Asked::Granted);
    db.events("order.placed", 10, 1);
    db.events("order.placed", 10, 1);
    assert!(listener.wait(LIMIT).unwrap());
    wait_until("all notifications are taken", LIMIT, &[&db], || {
        !listener.wait(Duration::from_millis(50)).unwrap()
    });
    db.number(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                WHERE datname = current_database() AND query = 'LISTEN outbox_events'",
    );
    let error = listener.wait(LIMIT).unwrap_err();
    assert!(error.is_outage(), "{error}");
    // One of its own DSN, as around a pooler.
    let (mut other, mut its_lock) = store.wake_up(Some(&Secret::new(db.dispatcher_dsn()))).unwrap();
    assert_eq!(its_lock.ask().unwrap(), Asked::Taken);
    db.event("order.placed", "k", "{}");
    assert!(other.wait(LIMIT).unwrap(), "one that sleeps is enough for all");
    lock.let_go().unwrap();
    assert_eq!(its_lock.ask().unwrap(), Asked::Granted);
}

#[test]
fn the_backlog_counts_what_waits() {
    let db = database();
    let store = store(&db);
    let empty = store.backlog(&[], 1_000).unwrap();
    assert_eq!((empty.pending, empty.retrying, empty.dead, empty.lag), (0, 0, 0, Duration::ZERO));
    db.events("order.placed", 10, 10);
    db.execute("UPDATE outboxes SET created_at = now() - interval '1 hour' WHERE seq = 3");
    db.execute("INSERT INTO outboxes (created_at, topic, payload) VALUES ('infinity', 'a', '{}'), ('-infinity', 'b', '{}')");
    retry_in(&db, 1, "1 minute");
    bury(&db, 2);
    db.execute("UPDATE outboxes SET published_at = now() WHERE seq = 4");
    let backlog = store.backlog(&[], 1_000).unwrap();
    assert_eq!((backlog.pending, backlog.retrying, backlog.dead), (10, 1, 1));
    let lag = backlog.lag.as_secs();
    assert!((3_600..3_700).contains(&lag), "{lag}");
    // The oldest may be one in retry.
    db.execute("UPDATE outboxes SET created_at = now() - interval '2 hours' WHERE seq = 1");
    assert!(store.backlog(&[], 1_000).unwrap().lag.as_secs() >= 7_200);
}

#[test]
fn every_statement_prepares_against_the_schema() {
    let db = database();
    let mut client = db.client();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/postgres");
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files: Vec<_> = files.filter(|path| path.extension().is_some_and(|end| end == "sql")).collect();
    assert!(files.len() >= 10);
    // These are parts of statements.
    Planned::prepare(&db);
    for file in &files {
        let text = std::fs::read_to_string(file).unwrap();
        if let Err(error) = client.prepare(&text) {
            panic!("{}: {error:?}", file.display());
        }
    }
}

/// A database with three partitions for events, whose statistics are those of the test.
fn three_months() -> TestDb {
    let db = database();
    db.execute(
        "SELECT create_monthly_partition('outboxes', (now() - n * interval '1 month')::date)
           FROM generate_series(1, 2) n;
         DO $$ DECLARE partition regclass; BEGIN
             FOR partition IN SELECT inhrelid FROM pg_inherits WHERE inhparent = 'outboxes'::regclass LOOP
                 EXECUTE format('ALTER TABLE %s SET (autovacuum_enabled = off)', partition);
             END LOOP;
         END $$",
    );
    db
}

/// The plans, in every state of the tables that could mislead the planner. What is asserted: which indexes the
/// searches use, that nothing scans or hashes a table, and how many pages a claim of 100 events reads.
#[test]
fn plans_hold_at_100_000_events_whatever_the_planner_knows() {
    let db = three_months();
    // This one plans while everything is empty and never analyzed, and keeps its plan.
    let mut early = Planned::prepare(&db);
    early.check("nothing there");
    db.execute(
        "INSERT INTO outboxes (created_at, topic, metadata, payload, next_attempt_at)
         SELECT now() - (n % 3) * interval '1 month', 'order.placed',
                jsonb_build_object('ordering-key', 'k' || n % 5000), jsonb_build_object('n', n),
                CASE WHEN n <= 300 THEN now() + (n - 150) * interval '1 second' END
           FROM generate_series(1, 100000) n",
    );
    early.check("100,000 pending, planned when empty");
    Planned::prepare(&db).check("100,000 pending, never analyzed");

    db.execute("ANALYZE outboxes");
    let mut full = Planned::prepare(&db);
    full.check("100,000 pending, analyzed");

    db.execute("UPDATE outboxes SET published_at = now(), next_attempt_at = NULL");
    for partition in 0..3 {
        let name =
            format!("(SELECT to_char(now() - interval '{partition} month', '\"outboxes_\"YYYY\"_\"MM'))");
        let name: String = db.client().query_one(&format!("SELECT {name}"), &[]).unwrap().get(0);
        db.execute(&format!("VACUUM {name}"));
    }
    full.from = 100_000;
    full.check("100,000 published, planned when pending");
    let mut late = Planned { from: 100_000, ..Planned::prepare(&db) };
    late.check("100,000 published, not analyzed since");
    db.execute("ANALYZE outboxes");
    let mut analyzed = Planned { from: 100_000, ..Planned::prepare(&db) };
    analyzed.check("100,000 published, analyzed");

    let empty = database();
    empty.execute("ANALYZE outboxes");
    empty.events("order.placed", 100_000, 5_000);
    Planned::prepare(&empty).check("100,000 pending, analyzed when empty");
}

/// The same with as many as an outbox of some months has: 5,000,000 published, and 0, 10 and 1,000,000 pending.
#[test]
#[ignore = "loads 6,000,000 events, which takes minutes"]
fn plans_hold_at_5_000_000_published_events() {
    const PUBLISHED: i64 = 5_000_000;
    let db = three_months();
    let insert = |events: i64, published_at: &str| {
        db.execute(&format!(
            "INSERT INTO outboxes (created_at, topic, metadata, payload, published_at)
             SELECT now() - (n % 3) * interval '1 month', 'order.placed',
                    jsonb_build_object('ordering-key', 'k' || n % 5000), jsonb_build_object('n', n), {published_at}
               FROM generate_series(1, {events}) n"
        ));
    };
    let prepare = || Planned { from: PUBLISHED, ..Planned::prepare(&db) };
    let mut early = prepare();
    insert(PUBLISHED, "now()");
    let mut published = prepare();
    for (more, pending) in [(0, "0"), (10, "10"), (1_000_000 - 10, "1,000,000")] {
        insert(more, "NULL");
        early.check(&format!("{pending} pending, planned when empty"));
        published.check(&format!("{pending} pending, planned when 5,000,000 were published, never analyzed"));
        prepare().check(&format!("{pending} pending, never analyzed"));
    }
    db.execute("ANALYZE outboxes");
    early.check("analyzed after it was planned when empty");
    let mut analyzed = prepare();
    analyzed.check("1,000,000 pending, analyzed");
    db.execute("UPDATE outboxes SET published_at = now() WHERE published_at IS NULL");
    analyzed.from = PUBLISHED + 1_000_000;
    analyzed.check("0 pending, analyzed with 1,000,000");
}

/// A session that has the claim's statements prepared.
struct Planned {
    client: Client,
    /// Where a read begins.
    from: i64,
}

impl Planned {
    fn prepare(db: &TestDb) -> Planned {
        let mut client = db.client();
        for (name, types, text) in [
            ("look", "int[], bigint[], int[], bigint", include_str!("../src/postgres/look.sql")),
            ("due", "bigint", include_str!("../src/postgres/due.sql")),
            ("lock_newest", "int[], bigint, int", include_str!("../src/postgres/lock_newest.sql")),
            ("lock_lanes", "int[], int", include_str!("../src/postgres/lock_lanes.sql")),
            (
                "read",
                "int[], bigint[], int, bigint, bigint, bigint, bigint[], bool, bool, bigint",
                include_str!("../src/postgres/read.sql"),
            ),
            (
                "read_retries",
                "int[], bigint, int, bigint, bigint, bigint, bool, bool, bool",
                include_str!("../src/postgres/read_retries.sql"),
            ),
            ("held_keys", "bigint[], bool", include_str!("../src/postgres/held_keys.sql")),
            (
                "settle_published",
                "tid[], timestamptz[], uuid[]",
                include_str!("../src/postgres/settle_published.sql"),
            ),
            ("settle_moved", "timestamptz[], uuid[]", include_str!("../src/postgres/settle_moved.sql")),
        ] {
            client.batch_execute(&format!("PREPARE {name} ({types}) AS {text}")).unwrap();
        }
        Planned { client, from: 0 }
    }

    fn check(&mut self, state: &str) {
        let lanes = "{5,6,7,8,9,10,11,12,13,14}";
        for mode in ["force_generic_plan", "force_custom_plan"] {
            let settings = CLAIM_PLANS.replace("force_generic_plan", mode);
            self.client.batch_execute(&format!("BEGIN; {settings}")).unwrap();
            // What is published is not walked over, as a claim begins behind it.
            let from = format!("array_fill({}::bigint, ARRAY[10])", self.from);
            self.check_one(
                state,
                mode,
                &format!("look ('{lanes}', {from}, array_fill(0, ARRAY[10]), 1000)"),
                1_500,
            );
            self.check_one(state, mode, "due (300000)", 2_500);
            self.check_one(state, mode, &format!("lock_newest ('{lanes}', {}, 16)", self.from), 1_500);
            self.check_one(state, mode, &format!("lock_lanes ('{lanes}', 13)"), 1_500);
            for block_on_dead in [false, true] {
                let read = format!(
                    "read ('{lanes}', {from}, 100, 1000, 1000000, 1000000, '{{1,2}}', {block_on_dead}, true, 10000)"
                );
                self.check_one(state, mode, &read, 2_500);
                let retries = format!(
                    "read_retries ('{lanes}', 1000, 100, 300000, 1000000, 1000000, true, {block_on_dead}, true)"
                );
                self.check_one(state, mode, &retries, 5_000);
                let sql =
                    "SELECT array_agg(outbox_key_hash('k' || n, NULL))::text FROM generate_series(1, 50) n";
                let keys: String = self.client.query_one(sql, &[]).unwrap().get(0);
                self.check_one(state, mode, &format!("held_keys ('{keys}', {block_on_dead})"), 2_500);
            }
            let (places, ids, created_at) = self.some_events(100);
            let settle = format!("settle_published ('{places}', '{created_at}', '{ids}')");
            self.check_one(state, mode, &settle, 2_000);
            self.check_one(state, mode, &format!("settle_moved ('{created_at}', '{ids}')"), 2_000);
            self.client.batch_execute("ROLLBACK").unwrap();
        }
    }

    /// The places, ids and created_ats of some events, as array texts.
    fn some_events(&mut self, events: i64) -> (String, String, String) {
        let sql = "SELECT coalesce(array_agg(ctid), '{}')::text, coalesce(array_agg(id), '{}')::text,
                          coalesce(array_agg(created_at), '{}')::text
                     FROM (SELECT ctid, * FROM outboxes LIMIT $1) AS any_of_them";
        let row = self.client.query_one(sql, &[&events]).unwrap();
        (row.get(0), row.get(1), row.get(2))
    }

    /// Runs a statement and looks at its plan and at the pages it read, planning not included.
    fn check_one(&mut self, state: &str, mode: &str, execute: &str, max_pages: u64) {
        let what = format!("{state}, {mode}: {execute:.60}");
        let explain = format!("EXPLAIN (ANALYZE, BUFFERS, COSTS OFF, TIMING OFF) EXECUTE {execute}");
        let rows = self.client.query(&explain, &[]).unwrap_or_else(|error| panic!("{what}: {error:?}"));
        let lines: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        let plan = lines.join("\n");

        let plan = plan.replace("Seq Scan on outboxes_seq_seq", "the sequence");
        for forbidden in ["Seq Scan", "Bitmap", "Hash Join", "Merge Join", "Memoize", "JIT"] {
            assert!(!plan.contains(forbidden), "{what}: {forbidden}\n{plan}");
        }
        // Every search begins at its lane, key or id. Those of `held` only ask whether there is any row at all,
        // and have no alias.
        for (n, line) in lines.iter().enumerate().filter(|(_, line)| line.contains(" Scan using outboxes_")) {
            let begins = lines.get(n + 1).is_some_and(|next| next.contains("Index Cond: ("));
            assert!(begins || line.contains("Index Only Scan"), "{what}: {line}\n{plan}");
        }
        let pages: u64 = lines.iter().find(|line| line.contains("Buffers: shared")).map_or(0, |line| {
            ["hit=", "read="]
                .iter()
                .filter_map(|kind| line.split_once(kind))
                .map(|(_, rest)| rest.split(' ').next().unwrap().parse::<u64>().unwrap())
                .sum()
        });
        assert!(pages <= max_pages, "{what}: {pages} pages\n{plan}");
    }
}
