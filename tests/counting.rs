//! What is asked of the outbox as a whole, and never by reading what is published: what keeps a partition, the backlog, the
//! topics. Each begins at the lanes' marks; each has a bound on what it touches, wherever the marks stand.

use std::time::{Duration, Instant};

use pg_outbox::postgres::{CLAIM_PLANS, ClaimSettings, Store};
use postgres::Client;

use crate::claim::settings_for;
use crate::harness::{TestDb, database};

/// Events of the large partition.
const ROWS: i64 = 200_000;
/// Pages that a question touches when the marks stand behind everything, in five partitions: a descent for each lane
/// and partition, and little more.
const FEW_PAGES: u64 = 2_000;
/// Entries of a lane that `outbox_partition_holds` looks at.
const HOLDS_ENTRIES: i64 = 500;

/// Has the marks of all lanes stand behind `seq`, an expression.
pub fn set_marks(db: &TestDb, seq: &str) {
    db.execute(&format!(
        "UPDATE outbox_lanes SET settled_to = {seq}, sequence_file = (SELECT file FROM outbox_sequence())"
    ));
}

const LAST: &str = "(SELECT last_value FROM outbox_sequence())";

/// A store of the dispatcher.
pub fn store(db: &TestDb) -> Store {
    let settings = ClaimSettings { max_claim_bytes: 1_000_000, ..ClaimSettings::default() };
    Store::new(&settings_for(&db.dispatcher_dsn()), "counting", settings).unwrap()
}

/// What keeps this month's partition.
fn holds(db: &TestDb) -> Option<String> {
    let mut client = db.client();
    client.query_one("SELECT outbox_partition_holds($1::text::name)", &[&this_month(db)]).unwrap().get(0)
}

fn this_month(db: &TestDb) -> String {
    let name = "SELECT to_char(now() AT TIME ZONE 'UTC', '\"outboxes_\"YYYY\"_\"MM')";
    db.client().query_one(name, &[]).unwrap().get(0)
}

#[test]
fn what_keeps_a_partition_is_right_in_every_state() {
    const PUBLISHED: &str = "published_at = now(), attempts = 1";
    const PENDING: &str = "attempts = 0";
    const RETRY: &str = "next_attempt_at = now() + interval '1 hour'";
    const DEAD: &str = "dead_at = now()";
    const DISCARDED: &str = "dead_at = now(), discarded_at = now()";
    // Pending and dead letters keep it wherever the marks stand, but for a pending one below its mark, which is the sweep's.
    let cases = [
        ("none", vec![], None, None),
        ("published", vec![PUBLISHED, PUBLISHED], None, None),
        ("pending", vec![PUBLISHED, PENDING], Some("pending"), None),
        ("in retry", vec![RETRY, PUBLISHED], Some("pending"), Some("pending")),
        ("dead", vec![PUBLISHED, DEAD], Some("dead"), Some("dead")),
        ("discarded", vec![DISCARDED, PUBLISHED], None, None),
        ("dead and discarded", vec![DISCARDED, DEAD], Some("dead"), Some("dead")),
        ("dead and pending", vec![DEAD, PENDING], Some("pending"), Some("dead")),
        ("dead and in retry", vec![DEAD, RETRY], Some("pending"), Some("pending")),
        // By hand, and not as documented.
        ("published in retry", vec!["published_at = now(), next_attempt_at = now()"], None, None),
        ("published and dead", vec!["published_at = now(), dead_at = now()"], None, None),
        ("dead in retry", vec!["dead_at = now(), next_attempt_at = now()"], Some("dead"), Some("dead")),
    ];
    let db = database();
    for (what, states, above, below) in cases {
        db.execute("TRUNCATE outboxes");
        for state in states {
            let seq = db.event("order.placed", what, "{}");
            db.execute(&format!("UPDATE outboxes SET {state} WHERE seq = {seq}"));
        }
        // Another month's events are no reason.
        db.execute(
            "INSERT INTO outboxes (created_at, topic, payload) VALUES ('2024-02-03', 'order.placed', '{}')",
        );
        let first = "(SELECT coalesce(min(seq), 1) - 1 FROM outboxes)";
        for (marks, expected) in [(LAST, below), (first, above), ("(-9223372036854775808)", above)] {
            set_marks(&db, marks);
            assert_eq!(holds(&db).as_deref(), expected, "{what}, marks at {marks}");
        }
        // Marks of another sequence, marks above all numbers, and no lanes at all.
        set_marks(&db, LAST);
        for change in [
            "UPDATE outbox_lanes SET sequence_file = sequence_file + 1",
            "UPDATE outbox_lanes SET settled_to = settled_to + 1, sequence_file = (SELECT file FROM outbox_sequence())",
            "DELETE FROM outbox_lanes",
        ] {
            db.execute(change);
            assert_eq!(holds(&db).as_deref(), above, "{what}, {change}");
        }
        assert_eq!(db.number("SELECT outbox_mend_lanes()"), 64);
    }
}

/// Pages that a statement touched, planning not included, and its plan.
fn explain(client: &mut Client, statement: &str) -> (u64, String) {
    let explain = format!("EXPLAIN (ANALYZE, BUFFERS, COSTS OFF, TIMING OFF) {statement}");
    let rows = client.query(&explain, &[]).unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    let lines: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    let pages = lines.iter().find(|line| line.contains("Buffers: shared")).map_or(0, |line| {
        let of = |kind: &str| {
            line.split_once(kind).and_then(|(_, rest)| rest.split(' ').next()?.parse::<u64>().ok())
        };
        of("hit=").unwrap_or(0) + of("read=").unwrap_or(0)
    });
    // A sequence has no index.
    (pages, lines.join("\n").replace("Seq Scan on outboxes_seq_seq", "the sequence"))
}

/// A session in which the questions are prepared as the program prepares them.
fn prepared(db: &TestDb) -> Client {
    let mut client = db.client();
    for (name, types, text) in [
        ("backlog", "bigint[], bigint", include_str!("../src/postgres/backlog.sql")),
        ("topics", "bigint", include_str!("../src/postgres/topics.sql")),
    ] {
        client.batch_execute(&format!("PREPARE {name} ({types}) AS {text}")).unwrap();
    }
    client
}

#[track_caller]
fn assert_indexes_alone(what: &str, plan: &str) {
    for forbidden in ["Seq Scan", "Bitmap", "Hash Join", "Merge Join", "Memoize", "JIT"] {
        assert!(!plan.contains(forbidden), "{what}: {forbidden}\n{plan}");
    }
}

#[test]
fn what_is_published_is_not_read() {
    let db = database();
    let month = this_month(&db);
    db.execute(&format!(
        "ALTER TABLE {month} SET (autovacuum_enabled = off);
         INSERT INTO outboxes (topic, metadata, payload, published_at, attempts)
         SELECT 'order.placed', jsonb_build_object('ordering-key', 'k' || n % 5000), '{{}}', now(), 1
           FROM generate_series(1, {ROWS}) AS n"
    ));
    let mut client = prepared(&db);
    for analyzed in [false, true] {
        if analyzed {
            db.execute("ANALYZE outboxes");
        }
        for (marks, is_read, pages) in [
            (LAST, true, FEW_PAGES),
            // Two pages an entry at the most, of as many entries of each lane as a question looks at.
            ("(-9223372036854775808)", false, FEW_PAGES + 2 * 64 * 2_000),
        ] {
            set_marks(&db, marks);
            for mode in ["force_generic_plan", "force_custom_plan"] {
                let settings = CLAIM_PLANS.replace("force_generic_plan", mode);
                client.batch_execute(&format!("BEGIN; {settings}")).unwrap();
                for question in ["backlog ('{}', 1000)", "topics (10)"] {
                    let (touched, plan) = explain(&mut client, &format!("EXECUTE {question}"));
                    let what = format!("{question}, marks at {marks}, {mode}, analyzed {analyzed}");
                    assert_indexes_alone(&what, &plan);
                    assert!(touched <= pages, "{what}: {touched} pages\n{plan}");
                    println!("{what}: {touched} pages");
                }
                client.batch_execute("COMMIT").unwrap();
            }
            // The function has the settings that it needs, whatever the session's are.
            let mut asking = db.client();
            asking.batch_execute("BEGIN").unwrap();
            let (touched, _) = explain(&mut asking, &format!("SELECT outbox_partition_holds('{month}')"));
            let holds_pages = if is_read { FEW_PAGES } else { FEW_PAGES + 2 * 64 * 500 };
            println!("holds, marks at {marks}: {touched} pages");
            assert!(touched <= holds_pages, "marks at {marks}: {touched} pages");
            let scans = "SELECT coalesce(sum(seq_scan), 0)::bigint FROM pg_stat_xact_user_tables WHERE relname LIKE 'outboxes%'";
            assert_eq!(asking.query_one(scans, &[]).unwrap().get::<_, i64>(0), 0, "marks at {marks}");
            asking.batch_execute("COMMIT").unwrap();
            // Nothing is compiled for it, which took half a second.
            let quickest = (0..5)
                .map(|_| {
                    let began = Instant::now();
                    holds(&db);
                    began.elapsed()
                })
                .min();
            assert!(!is_read || quickest < Some(Duration::from_millis(300)), "{quickest:?}");
            // With the marks far behind nobody knows, and so it stays.
            assert_eq!(holds(&db).as_deref(), if is_read { None } else { Some("unread") });
        }
    }
    // Nor does it go.
    let drop = format!("SELECT outbox_drop_partition('{month}', '1 day')");
    let answer = |db: &TestDb| db.client().query_one(&drop, &[]).unwrap().get::<_, String>(0);
    assert_eq!(answer(&db), "young");
    db.execute(&format!(
        "ALTER TABLE outboxes DETACH PARTITION {month}; UPDATE {month} SET created_at = '2024-02-03';
         ALTER TABLE outboxes ATTACH PARTITION {month} FOR VALUES FROM ('2024-02-01') TO ('2024-03-01')"
    ));
    assert_eq!(answer(&db), "unread");
    set_marks(&db, LAST);
    assert_eq!(answer(&db), "dropped");
}

#[test]
fn a_backlog_is_counted_where_it_is_small_and_estimated_beyond() {
    let db = database();
    let store = store(&db);
    // Below the bound of every lane: to the event.
    db.events("order.placed", 3_000, 700);
    db.execute(
        "UPDATE outboxes SET published_at = now() WHERE seq <= 1000;
         UPDATE outboxes SET next_attempt_at = now() WHERE seq BETWEEN 1001 AND 1010;
         UPDATE outboxes SET dead_at = now() WHERE seq BETWEEN 1011 AND 1015;
         UPDATE outboxes SET dead_at = now(), discarded_at = now() WHERE seq BETWEEN 1016 AND 1020;
         UPDATE outboxes SET created_at = now() - interval '90 seconds' WHERE seq = 2500",
    );
    let exact = store.backlog(&[], 1_000).unwrap();
    assert_eq!((exact.pending, exact.retrying, exact.dead), (1_990, 10, 5));
    assert!((85..120).contains(&exact.lag.as_secs()), "{exact:?}");
    // Where this instance knows more than all do. Retries and dead letters count wherever the marks stand.
    let own = store.backlog(&[2_000; 64], 1_000).unwrap();
    assert_eq!((own.pending, own.retrying, own.dead), (1_010, 10, 5));
    set_marks(&db, "2500");
    let shared = store.backlog(&[2_000; 64], 1_000).unwrap();
    assert_eq!((shared.pending, shared.retrying, shared.dead), (510, 10, 5));
    assert!(shared.lag < Duration::from_secs(85), "the old one is settled, says the mark: {shared:?}");

    // Beyond the bound, wherever what is pending stands: first to last, or behind all that is published.
    set_marks(&db, "(-9223372036854775808)");
    db.execute("TRUNCATE outboxes RESTART IDENTITY");
    db.events("order.placed", 40_000, 4_001);
    for (published, pending) in [(0, 40_000), (4_000, 36_000), (30_000, 10_000), (40_000, 0)] {
        db.execute(&format!(
            "UPDATE outboxes SET published_at = now() WHERE seq <= {published};
             UPDATE outboxes SET created_at = now() - interval '90 seconds' WHERE seq > {published}"
        ));
        let counted = store.backlog(&[], 50).unwrap();
        let off = (counted.pending - pending).abs();
        assert!(off <= pending / 10, "published={published}: {counted:?}");
        assert_eq!(counted.lag > Duration::from_secs(85), pending > 0, "published={published}: {counted:?}");
        // A lane has some 600.
        assert_eq!(store.backlog(&[], 2_000).unwrap().pending, pending, "published={published}");
    }
    // One key, and so one lane, that has nearly everything.
    db.execute("TRUNCATE outboxes RESTART IDENTITY");
    db.events("order.placed", 20_000, 1);
    db.events("order.placed", 100, 100);
    let counted = store.backlog(&[], 1_000).unwrap();
    assert!((counted.pending - 20_100).abs() <= 200, "{counted:?}");
}

#[test]
fn topics_are_those_that_wait_wherever_the_marks_stand() {
    let db = database();
    let store = store(&db);
    // A lane has more published events than are looked at, and then what waits.
    db.execute(
        "INSERT INTO outboxes (topic, metadata, payload, published_at)
         SELECT 'done', '{\"ordering-key\": \"k\"}', '{}', now() FROM generate_series(1, 3000)",
    );
    db.event("waits", "k", "{}");
    db.event("waits", "k", "{}");
    let seq = db.event("retried", "k", "{}");
    db.execute(&format!("UPDATE outboxes SET next_attempt_at = now() WHERE seq = {seq}"));
    let seq = db.event("dead", "k", "{}");
    db.execute(&format!("UPDATE outboxes SET dead_at = now() WHERE seq = {seq}"));
    for marks in ["(-9223372036854775808)", "2999", "3000"] {
        set_marks(&db, marks);
        let topics = store.topics(10).unwrap();
        let told: Vec<_> =
            topics.iter().map(|of| (of.topic.as_str(), of.pending, of.retrying, of.dead)).collect();
        assert_eq!(told, [("waits", 2, 0, 0), ("retried", 1, 1, 0), ("dead", 0, 0, 1)], "marks at {marks}");
    }
    assert_eq!(store.topics(1).unwrap().len(), 1);
    // Many: a sample of both ends.
    db.events("first", 2_000, 1);
    db.events("last", 2_000, 1);
    let told: Vec<_> = store.topics(3).unwrap().into_iter().map(|of| (of.topic, of.pending)).collect();
    assert_eq!(told[..2], [("first".into(), 1_000), ("last".into(), 1_000)], "{told:?}");
    assert_eq!(
        i64::from(
            include_str!("../schema/001_outbox.sql").contains(&format!("LIMIT {HOLDS_ENTRIES}) AS walk"))
        ),
        1
    );
}
