//! The workload: writers that insert events in concurrent transactions, and remember what they committed.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use postgres::{Client, NoTls};

use super::database::{WRITER, as_role};
use super::{Committed, History};

/// Longest time a writer goes on trying to reach a database that is gone.
const RECONNECT_LIMIT: Duration = Duration::from_secs(120);
/// Pause before a transaction that failed is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// What the writers do.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Threads, each with a connection of its own.
    pub writers: usize,
    /// Keys, chosen at random for each event.
    pub keys: usize,
    /// Events to commit, exactly (unless stopped earlier).
    pub events: usize,
    /// Events of one transaction at most.
    pub transaction_max: usize,
    /// Of a hundred transactions, how many are rolled back.
    pub rollback_percent: u8,
    /// Topic of all events.
    pub topic: String,
    /// Pause of a writer after each transaction.
    pub pause: Duration,
    /// Where the writers' random numbers begin; `None` for somewhere.
    pub seed: Option<u64>,
    /// Transactions that stay open for a while after their last insert.
    pub lingering: Option<Lingering>,
}

/// Transactions that stay open.
#[derive(Debug, Clone)]
pub struct Lingering {
    /// Of a hundred transactions, how many do.
    pub percent: u8,
    /// For how long, in milliseconds.
    pub ms: RangeInclusive<u64>,
    /// They are prepared meanwhile, for a two-phase commit.
    pub prepared: bool,
}

impl Default for Workload {
    fn default() -> Workload {
        Workload {
            writers: 8,
            keys: 300,
            events: 5_000,
            transaction_max: 5,
            rollback_percent: 10,
            topic: "order.placed".to_owned(),
            pause: Duration::ZERO,
            seed: None,
            lingering: None,
        }
    }
}

/// Runs the workload to its end.
pub fn writers(dsn: &str, workload: &Workload) -> History {
    let stop = AtomicBool::new(false);
    writers_until(dsn, workload, &stop)
}

/// Runs the workload to its end, or until `stop` is set. `dsn` is the owner's; events are written as an application.
///
/// A key's events are numbered under a lock of the key that is held until its transaction has ended. So two
/// transactions with a key in common never overlap, and the key's numbers, its seqs and its commits have one order.
/// Writers outlive every trouble of the database that passes: a transaction that failed, or whose COMMIT was not
/// answered, is looked up over a new connection and, if it is gone, written again.
pub fn writers_until(dsn: &str, workload: &Workload, stop: &AtomicBool) -> History {
    let keys: Vec<Mutex<u64>> = (0..workload.keys).map(|_| Mutex::new(0)).collect();
    let started = AtomicUsize::new(0);
    let writer_dsn = as_role(dsn, WRITER);
    let writer = Writer { dsn, writer: &writer_dsn, workload, stop, keys: &keys, started: &started };
    let mut history = History::default();
    std::thread::scope(|scope| {
        let start = |number: u64| {
            scope.spawn(move || {
                if let Some(seed) = writer.workload.seed {
                    fastrand::seed(seed.wrapping_add(number));
                }
                writer.run()
            })
        };
        let threads: Vec<_> = (0..workload.writers as u64).map(start).collect();
        for thread in threads {
            let part = thread.join().unwrap();
            history.committed.extend(part.committed);
            history.rolled_back.extend(part.rolled_back);
        }
    });
    history
}

#[derive(Clone, Copy)]
struct Writer<'a> {
    /// The owner's connection string.
    dsn: &'a str,
    /// That of a role with INSERT and nothing else.
    writer: &'a str,
    workload: &'a Workload,
    stop: &'a AtomicBool,
    keys: &'a [Mutex<u64>],
    /// Events of transactions that were begun in order to commit, by all writers.
    started: &'a AtomicUsize,
}

impl Writer<'_> {
    fn run(self) -> History {
        let mut history = History::default();
        let mut client = connect(self.writer);
        while !self.stop.load(Ordering::Relaxed) {
            let rollback = fastrand::u8(0..100) < self.workload.rollback_percent;
            let mut count = fastrand::usize(1..=self.workload.transaction_max);
            if !rollback {
                let before = self.started.fetch_add(count, Ordering::Relaxed);
                if before >= self.workload.events {
                    break;
                }
                count = count.min(self.workload.events - before);
            }
            self.transaction(&mut client, count, rollback, &mut history);
            std::thread::sleep(self.workload.pause);
        }
        history
    }

    /// One transaction, tried again from its beginning until it ends as it should.
    fn transaction(self, client: &mut Client, count: usize, rollback: bool, history: &mut History) {
        let mut chosen: Vec<usize> = (0..count).map(|_| fastrand::usize(0..self.keys.len())).collect();
        // Locks are taken in the order of the keys, so that no two writers wait for each other.
        chosen.sort_unstable();
        let mut locked = chosen.clone();
        locked.dedup();
        let mut counters: Vec<MutexGuard<'_, u64>> =
            locked.iter().map(|key| self.keys[*key].lock().unwrap()).collect();
        loop {
            let mut numbers: Vec<u64> = counters.iter().map(|counter| **counter).collect();
            let events: Vec<(String, u64)> = chosen
                .iter()
                .map(|key| {
                    let place = locked.binary_search(key).unwrap();
                    numbers[place] += 1;
                    (format!("k{key}"), numbers[place])
                })
                .collect();
            let attempt = self.attempt(client, &events, rollback);
            let written = match attempt.or_else(|written| self.look_up(client, written, rollback)) {
                Ok(written) => written,
                Err(gone) => {
                    history.rolled_back.extend(gone.into_iter().map(|event| event.id));
                    if self.stop.load(Ordering::Relaxed) {
                        return;
                    }
                    // A disk that is full, a table that is locked: not again at once.
                    std::thread::sleep(RETRY_PAUSE);
                    continue;
                }
            };
            if rollback {
                history.rolled_back.extend(written.into_iter().map(|event| event.id));
            } else {
                history.committed.extend(written);
                for (counter, number) in counters.iter_mut().zip(numbers) {
                    **counter = number;
                }
            }
            return;
        }
    }

    /// What was inserted; as an error if the end of the transaction is not known.
    fn attempt(
        self,
        client: &mut Client,
        events: &[(String, u64)],
        rollback: bool,
    ) -> Result<Vec<Committed>, Vec<Committed>> {
        let mut written = Vec::new();
        // RETURNING would take the right to read, so the id is made here.
        let insert = "INSERT INTO outboxes (id, topic, metadata, payload)
                      VALUES ($4::text::uuid, $1, jsonb_build_object('ordering-key', $2::text),
                              jsonb_build_object('key', $2::text, 'n', $3::int8))";
        let place = "SELECT currval('outboxes_seq_seq'), pg_current_xact_id()::text::int8";
        let end = |client: &mut Client, written: &mut Vec<Committed>| -> Result<(), postgres::Error> {
            client.batch_execute("BEGIN")?;
            for (key, n) in events {
                let number = i64::try_from(*n).unwrap();
                let id = uuid::Uuid::from_u128(fastrand::u128(..)).to_string();
                client.execute(insert, &[&self.workload.topic, key, &number, &id])?;
                let row = client.query_one(place, &[])?;
                let (seq, transaction) = (row.get(0), row.get(1));
                written.push(Committed { id, seq, transaction, key: key.clone(), n: *n });
            }
            self.end(client, &written[0].id, rollback)
        };
        match end(client, &mut written) {
            Ok(()) => Ok(written),
            Err(error) if passes(client, &error) => Err(written),
            Err(error) => panic!("writer: {error:?}"),
        }
    }

    /// Ends a transaction; `name` is its own where it is prepared.
    fn end(self, client: &mut Client, name: &str, rollback: bool) -> Result<(), postgres::Error> {
        let lingers = |lingering: &&Lingering| fastrand::u8(0..100) < lingering.percent;
        let lingering = self.workload.lingering.as_ref().filter(lingers);
        let prepared = lingering.is_some_and(|lingering| lingering.prepared);
        if prepared {
            client.batch_execute(&format!("PREPARE TRANSACTION '{name}'"))?;
        }
        if let Some(lingering) = lingering {
            std::thread::sleep(Duration::from_millis(fastrand::u64(lingering.ms.clone())));
        }
        if prepared {
            end_prepared(client, name, rollback)
        } else {
            client.batch_execute(if rollback { "ROLLBACK" } else { "COMMIT" })
        }
    }

    /// After a failure, over a new connection: `Ok` with what the transaction wrote if it has committed; `Err` with
    /// it if it is gone and must be tried again. One that is still prepared is ended as it should.
    fn look_up(
        self,
        client: &mut Client,
        written: Vec<Committed>,
        rollback: bool,
    ) -> Result<Vec<Committed>, Vec<Committed>> {
        loop {
            let mut owner = connect(self.dsn);
            *client = connect(self.writer);
            let name = written.first().map(|event| event.id.as_str()).unwrap_or_default();
            if let Ok(Some(_)) = owner.query_opt("SELECT FROM pg_prepared_xacts WHERE gid = $1", &[&name])
                && let Err(error) = end_prepared(&mut owner, name, rollback)
            {
                assert!(passes(&owner, &error), "writer: {error:?}");
                continue;
            }
            let ids: Vec<&str> = written.iter().map(|event| event.id.as_str()).collect();
            let query = "SELECT count(*) FROM outboxes WHERE id::text = ANY ($1)";
            match owner.query_one(query, &[&ids]) {
                Ok(row) => {
                    let there: i64 = row.get(0);
                    assert!(there == 0 || usize::try_from(there) == Ok(written.len()), "half a transaction");
                    return if there > 0 { Ok(written) } else { Err(written) };
                }
                Err(error) if passes(&owner, &error) => {}
                Err(error) => panic!("writer: {error:?}"),
            }
        }
    }
}

fn end_prepared(client: &mut Client, name: &str, rollback: bool) -> Result<(), postgres::Error> {
    client.batch_execute(&format!("{} PREPARED '{name}'", if rollback { "ROLLBACK" } else { "COMMIT" }))
}

/// True for what an application tries again: the server went away (class 57P0x: it is shutting down, crashed, or
/// starts up), is out of something (class 53), or somebody is in the way (a lock, a timeout).
fn passes(client: &Client, error: &postgres::Error) -> bool {
    let passing = ["57P0", "53", "55P03", "57014", "25006"];
    client.is_closed()
        || error.is_closed()
        || error.code().is_some_and(|code| passing.iter().any(|class| code.code().starts_with(class)))
}

fn connect(dsn: &str) -> Client {
    let deadline = Instant::now() + RECONNECT_LIMIT;
    loop {
        match Client::connect(dsn, NoTls) {
            Ok(client) => return client,
            Err(error) => assert!(Instant::now() < deadline, "writer: {error:?}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
