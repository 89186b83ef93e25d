//! NATS servers that lie, say nonsense or break off. A real one takes over from each on the same port, and everything
//! committed is then in the stream once and in order.

use std::thread;
use std::time::{Duration, Instant};

use super::super::delivery::wait_drained;
use super::super::harness::stream::shared_nats;
use super::super::harness::{Config, Daemon, TestDb, TestStream, database, stream, wait_until};
use super::assert_stored_once_and_in_order;
use super::liar::{Liar, Lie};

const LIMIT: Duration = Duration::from_secs(90);
/// From the end of a lie until events are published again, without anybody's help.
const RECOVERED: Duration = Duration::from_secs(40);
/// Operations of a connection: it is greeted, subscribed and looked after within the first 25 or so.
const OPERATIONS: usize = 36;
/// Lines of log for one lie at most, told to a few connections.
const LINES_MAX: usize = 80;
const KEYS: i64 = 20;

fn many(text: &str, times: usize) -> Vec<u8> {
    text.repeat(times).into_bytes()
}

/// Made with the inbox of a first slot and the number of its subscription.
type Said = fn(&str, u64) -> Vec<u8>;

/// What a server that was fine until then says in the middle of a claim.
const SAID: &[(&str, Said)] = &[
    ("an unknown operation, again and again", |_, _| many("WHAT IS THIS\r\n", 100_000)),
    ("bytes", |_, _| (0..300_000).map(|_| fastrand::u8(..)).collect()),
    ("no UTF-8", |_, _| b"\xff\xfe\xfd\r\n".to_vec()),
    ("empty lines", |_, _| many("\r\n", 100_000)),
    ("a line without an end", |_, _| many("x", 1 << 20)),
    ("a known operation without an end", |_, _| many("MSG xxxx ", 1 << 17)),
    ("an error, again and again", |_, _| many("-ERR 'you are strange'\r\n", 50_000)),
    ("errors of every kind", |_, _| {
        (0..20_000).flat_map(|n| format!("-ERR 'strange for reason {n}'\r\n").into_bytes()).collect()
    }),
    ("denials that we did not ask for", |_, _| {
        many("-ERR 'Permissions Violation for Publish to \"somebody.else\"'\r\n", 50_000)
    }),
    ("an error that is no error", |_, _| {
        b"-ERR\r\n-ERR '\r\n-ERR Permissions Violation for Publish to\r\n".to_vec()
    }),
    ("the password that it was told", |_, _| many(&format!("-ERR 'not with {PASSWORD}'\r\n"), 3)),
    ("the end of everything", |_, _| {
        b"-ERR 'Stale Connection'\r\n-ERR 'Authorization Violation'\r\n".to_vec()
    }),
    ("servers that are not there", |_, _| {
        let said = |n: usize| {
            let urls: Vec<String> =
                (0..100).map(|m| format!("\"127.0.0.1:{}\"", 1 + (n * 100 + m) % 900)).collect();
            format!(
                "INFO {{\"max_payload\":1048576,\"headers\":true,\"connect_urls\":[{}]}}\r\n",
                urls.join(",")
            )
        };
        (0..1_000).flat_map(|n| said(n).into_bytes()).collect()
    }),
    ("a server that has no name", |_, _| {
        b"INFO {\"headers\":true,\"connect_urls\":[\"::::\",\"\",\"\\u0000\"]}\r\n".to_vec()
    }),
    ("a broken description of itself", |_, _| b"INFO {\"server_id\":\r\n".to_vec()),
    ("that it takes nothing", |_, _| b"INFO {\"headers\":false,\"max_payload\":0}\r\n".to_vec()),
    ("pings", |_, _| many("PING\r\n", 50_000)),
    ("pongs", |_, _| many("PONG\r\n", 100_000)),
    ("a message without its parts", |_, _| b"MSG\r\n".to_vec()),
    ("a message with a length that is none", |inbox, sid| {
        format!("MSG {inbox}.0.p1 {sid} -5\r\n").into_bytes()
    }),
    ("a message that does not come", |inbox, sid| {
        format!("MSG {inbox}.0.p1 {sid} 5000000\r\nxx").into_bytes()
    }),
    ("headers longer than their message", |inbox, sid| {
        format!("HMSG {inbox}.0.p1 {sid} 900 5\r\nNATS/1.0\r\n\r\n").into_bytes()
    }),
    ("headers that are none", |inbox, sid| {
        format!("HMSG {inbox}.0.p1 {sid} 9 9\r\n\0\0\0\u{ff}:::\0\r\n").into_bytes()
    }),
    ("messages for nobody", |_, _| many("MSG a.b.c 999 2\r\nxx\r\n", 100_000)),
    ("acknowledgements of what was never sent", |inbox, sid| {
        let said = |n: u64| {
            let ack = format!("{{\"stream\":\"X\",\"seq\":{n}}}");
            format!("MSG {inbox}.0.p{} {sid} {}\r\n{ack}\r\n", 1_000_000 + n, ack.len())
        };
        (1..20_000).flat_map(|n| said(n).into_bytes()).collect()
    }),
    ("answers to what was never asked", |inbox, sid| {
        ["e99999", "s99999", "p", "x1", "p-1", "p99999999999999999999", "", "s1.2.3"]
            .iter()
            .flat_map(|token| format!("MSG {inbox}.0.{token} {sid} 2\r\n{{}}\r\n").into_bytes())
            .collect()
    }),
    ("answers that are none", |inbox, sid| {
        ["", "{", "null", "[]", "{\"stream\":5}", "{\"error\":5}", "{\"error\":{}}", "\0", "{\"seq\":-1}"]
            .iter()
            .flat_map(|body| format!("MSG {inbox}.0.p0 {sid} {}\r\n{body}\r\n", body.len()).into_bytes())
            .collect()
    }),
    ("more messages than an inbox holds", |inbox, sid| {
        many(&format!("MSG {inbox}.0.z {sid} 0\r\n\r\n"), 200_000)
    }),
];

/// What comes in the place of a greeting.
const GREETINGS: &[(&str, &str, usize)] = &[
    ("nothing", "", 1),
    ("another protocol", "HTTP/1.1 400 Bad Request\r\n\r\n", 1),
    ("a part of it", "INFO {\"server_id\":\"x\"", 1),
    ("one without an end", "INFO {\"x\":\"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", 10_000),
    ("an empty one", "INFO {}\r\n", 1),
    ("one that is no JSON", "INFO {{{{\r\n", 1),
    ("an error", "-ERR 'Authorization Violation'\r\n", 1),
    ("two", "INFO {\"headers\":true,\"max_payload\":100}\r\n", 2),
    ("messages", "INFO {\"headers\":true,\"max_payload\":100}\r\nMSG a 1 1\r\nx\r\n", 1),
];

/// Acknowledgements of another kind than ours: none of them settles an event.
const ACKNOWLEDGED: &[(&str, &str)] = &[
    ("by another stream", "{\"stream\":\"ANOTHER\",\"seq\":1}"),
    ("by another stream, as a duplicate", "{\"stream\":\"ANOTHER\",\"seq\":1,\"duplicate\":true}"),
    ("by no stream", "{\"seq\":1}"),
    ("with nonsense", "yes"),
    ("with an error without a code", "{\"error\":{}}"),
    ("with an outage", "{\"error\":{\"code\":503,\"err_code\":10008,\"description\":\"unavailable\"}}"),
];

/// What the liar is told to let us in, and repeats.
const PASSWORD: &str = "planted-for-the-liar";

struct Stage {
    db: TestDb,
    stream: TestStream,
    liar: Liar,
    daemon: Daemon,
}

impl Stage {
    fn new() -> Stage {
        let (db, stream, liar) = (database(), stream(), Liar::to(shared_nats().port()));
        let config = Config::new(&db, &stream)
            .set("nats.url", liar.url())
            .set("nats.user", "outbox")
            .set("nats.password", PASSWORD)
            .set("nats.ack_timeout", "1s")
            .set("nats.connect_timeout", "1s")
            .set("dispatcher.max_attempts", 1_000)
            .set("dispatcher.backoff_initial", "100ms")
            .set("dispatcher.backoff_max", "1s")
            .set("logging.level", "info");
        let daemon = Daemon::start(&config);
        daemon.wait_ready();
        Stage { db, stream, liar, daemon }
    }

    /// Lies to new connections while there are events, until this has been told; then it is the truth again.
    fn lie(&self, what: &str, lie: Lie, times: usize) {
        let (before, lines) = (self.liar.told(), self.daemon.log().lines().count());
        self.liar.tell(lie);
        self.liar.reset();
        let begun = Instant::now();
        wait_until(what, LIMIT, &[&self.daemon, &self.db], || {
            // There is always something to publish, also when the last lie let it pass.
            if self.db.pending() == 0 {
                self.db.events("t", 20, KEYS);
            }
            self.liar.told() >= before + times
        });
        assert_eq!(self.daemon.get("/health").0, 200, "{what}");
        self.liar.tell(Lie::Truth);
        let truth = Instant::now();
        self.db.events("t", 20, KEYS);
        wait_until(&format!("it publishes again after {what}"), RECOVERED, &[&self.daemon, &self.db], || {
            self.db.pending() == 0
        });
        let lines = self.daemon.log().lines().count() - lines;
        println!(
            "{what}: told within {:.1?}, over {:.1?} later, {lines} lines",
            truth - begun,
            truth.elapsed()
        );
        assert!(lines <= LINES_MAX, "{what}: {lines} lines of log\n{}", self.daemon.log());
    }

    /// Everything is in the stream once and in order.
    fn judge(mut self) {
        wait_drained(&self.db, &self.stream, &[&self.daemon], LIMIT);
        assert_stored_once_and_in_order(&self.db, &self.stream);
        assert!(self.daemon.running());
    }
}

#[test]
fn whatever_a_server_says_in_the_middle_of_a_claim_passes() {
    thread::scope(|scope| {
        for part in SAID.chunks(SAID.len().div_ceil(3)) {
            scope.spawn(move || {
                let stage = Stage::new();
                for (what, say) in part {
                    stage.lie(what, Lie::Say(*say), 1);
                }
                stage.judge();
            });
        }
    });
}

#[test]
fn whatever_comes_in_the_place_of_a_greeting_passes() {
    let stage = Stage::new();
    for (what, greeting, times) in GREETINGS {
        stage.lie(what, Lie::Greeting(many(greeting, *times)), 2);
    }
    stage.judge();
}

#[test]
fn an_acknowledgement_of_another_kind_settles_nothing() {
    let stage = Stage::new();
    for (what, answer) in ACKNOWLEDGED {
        let published = stage.db.published();
        stage.liar.tell(Lie::Acknowledge(answer));
        stage.liar.reset();
        let before = stage.liar.told();
        stage.db.events("t", 10, 10);
        wait_until(what, LIMIT, &[&stage.daemon, &stage.db], || stage.liar.told() >= before + 20);
        // Nothing was on its way when the lying began.
        assert_eq!(stage.db.published(), published, "{what}");
        stage.liar.tell(Lie::Truth);
        stage.liar.reset();
        wait_until("the truth settles them", RECOVERED, &[&stage.daemon, &stage.db], || {
            stage.db.pending() == 0
        });
    }
    stage.judge();
}

#[test]
fn a_server_that_breaks_off_at_any_point_costs_a_connection() {
    thread::scope(|scope| {
        // Each operation twice: before it, and in its middle.
        for (half, begin) in [(false, 1), (false, 2), (true, 1), (true, 2)] {
            scope.spawn(move || {
                let stage = Stage::new();
                stage.liar.begin_cutting_at(begin);
                stage.liar.tell(Lie::Cut { half, step: 2 });
                stage.liar.reset();
                wait_until("every point was cut at", 2 * LIMIT, &[&stage.daemon, &stage.db], || {
                    if stage.db.pending() == 0 {
                        stage.db.events("t", 20, KEYS);
                    }
                    stage.liar.cut_at() > OPERATIONS
                });
                stage.liar.tell(Lie::Truth);
                stage.judge();
            });
        }
    });
}
