//! Adopting a table: looks at it, and does the steps of `adoption.rs` over a session of its own.
//!
//! Blocks its caller for as long as it takes, and says what it does meanwhile. An advisory lock keeps a second adoption
//! waiting; it is asked for again and again rather than waited for, as a waiting statement has a snapshot, which the
//! building of an index waits for. That lock and the timeouts belong to the session, so a pooler in transaction mode is
//! refused. Nothing here is undone when something fails: the next run goes on from what it finds.

use std::thread;
use std::time::{Duration, Instant};

use postgres::Client;

use super::former;
use super::home::Home;
use super::migrate::{MIGRATIONS, schema_version};
use super::query::{Query, typed};
use super::sequence::{SEQUENCE_FAULTS, SequenceFault};
use super::target::Target;
use super::{Sessions, Store, StoreError, connect, first, read_all, sessions};
use crate::config::Database;
use crate::postgres::adoption::{
    self, AdoptionStep, Column, FoundPartition, FoundTable, Kind, PartIndex, Schema, StepPace, Violated,
};

const ADOPT_TABLE: Query = query!("adopt_table");
const ADOPT_COLUMNS: Query = query!("adopt_columns");
const ADOPT_NAMES: Query = query!("adopt_names");
const ADOPT_PARTITIONS: Query = query!("adopt_partitions");
const ADOPT_ORDER: Query = query!("adopt_order");
const ADOPT_DAEMONS: Query = query!("adopt_daemons");
const ADOPT_PROGRESS: Query = query!("adopt_progress", INT4);

/// Key of the lock that one adoption has.
const ADOPTION_LOCK: i64 = 8_247_343_699_905_503_588;
/// Longest that a request for a lock stands in the way of writers.
const LOCK_TIMEOUT: Duration = Duration::from_millis(100);
/// Requests for a lock before giving up, and the pause between them, in milliseconds: about two minutes in all.
const LOCK_TRIES: u32 = 300;
const LOCK_PAUSE_MS: std::ops::Range<u64> = 150..450;
/// After so many it is said.
const LOCK_TRIES_SAID: u32 = 20;
/// Looking whether writers keep the checks is worth this much and no more.
const CHECK_TIMEOUT: Duration = Duration::from_secs(20);
/// Rounds of looking and doing, as partitions can be made meanwhile.
const ROUNDS: u32 = 10;
/// Time between two lines about the building of one index.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// What the two phases of the schema's file do.
const PREPARE: &str = "add the functions that the indexes need";
const FINISH: &str = "add the lanes, the wake-up trigger and the functions; record the version";
/// `lock_not_available`, `deadlock_detected`.
const IN_THE_WAY: [&str; 2] = ["55P03", "40P01"];

/// Whether to do it or to say what would be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adopting {
    /// Do it.
    Real,
    /// Only say it, with the statements.
    Dry,
}

impl Store {
    /// Makes an outbox of the table `outboxes` that is there, without keeping its writers waiting, and says so line by
    /// line. `order` as for [`Store::migrate`]. Returns how many steps there were (to be done or done).
    ///
    /// # Errors
    /// The table cannot be adopted (the text says why, and what to do); PostgreSQL is out of reach or refuses; a lock
    /// was not free for two minutes. What is done stays, and the next run goes on from there.
    pub fn adopt(
        database: &Database,
        order: Option<&str>,
        adopting: Adopting,
        say: &mut dyn FnMut(&str),
    ) -> Result<usize, StoreError> {
        let target = Target::new(&database.dsn, &database.parts, "migrate", database.connect_timeout)?;
        let (mut client, mut watcher) = (connect(&target)?, connect(&target)?);
        if sessions::probe(&mut client, &mut watcher).map_err(sql)? == Sessions::Shared {
            return Err(StoreError::refused(
                "connections share sessions, as behind a transaction pooler; adopting takes a connection to PostgreSQL itself"
                    .into(),
            ));
        }
        let home = Home::new(database.schema.as_deref());
        home.of_session(&mut client).map_err(sql)?;
        client.batch_execute("SET lock_timeout = 0; SET statement_timeout = 0").map_err(sql)?;
        let text = MIGRATIONS[0].1;
        let order = order.unwrap_or_default().replace('\'', "''");
        let adoption = Adoption { client, watcher, schema: Schema::read(text), text, order, say, done: 0 };
        match adopting {
            Adopting::Dry => adoption.plan(),
            Adopting::Real => adoption.run(),
        }
    }
}

struct Adoption<'a> {
    client: Client,
    /// Looks at what the other one does.
    watcher: Client,
    schema: Schema,
    text: &'static str,
    order: String,
    say: &'a mut dyn FnMut(&str),
    /// Steps.
    done: usize,
}

impl Adoption<'_> {
    /// Says what would be done.
    fn plan(mut self) -> Result<usize, StoreError> {
        let found = self.look_and_judge()?;
        if let Some(problem) = self.daemons(&found)? {
            (self.say)(&format!("note: {problem}"));
        }
        let mut steps: Vec<AdoptionStep> = former::retiring(&found).into_iter().collect();
        let found = former::retired(found);
        if !found.is_complete() {
            steps.push(self.file("prepare", PREPARE));
        }
        steps.extend(adoption::steps(&found, &self.schema));
        if !found.is_complete() {
            steps.extend(adoption::renames(&found));
            steps.push(self.file("finish", FINISH));
        }
        for step in &steps {
            (self.say)(&step.what);
            // The schema's file is long, and known.
            if !step.sql.contains(self.text) {
                (self.say)(&format!("    {};", step.sql));
            }
        }
        Ok(steps.len())
    }

    /// Does it.
    fn run(mut self) -> Result<usize, StoreError> {
        self.lock()?;
        let found = self.look_and_judge()?;
        self.refuse_daemons(&found)?;
        if let Some(retire) = former::retiring(&found) {
            self.step(&retire)?;
        }
        if !found.is_complete() {
            let prepare = self.file("prepare", PREPARE);
            self.step(&prepare)?;
        }
        for _ in 0..ROUNDS {
            let found = self.look()?;
            let steps = adoption::steps(&found, &self.schema);
            for step in &steps {
                self.step(step)?;
            }
            if !steps.is_empty() {
                continue;
            }
            if !found.is_complete() {
                for step in adoption::renames(&found) {
                    self.step(&step)?;
                }
                self.refuse_daemons(&found)?;
                let finish = self.file("finish", FINISH);
                self.step(&finish)?;
            }
            return Ok(self.done);
        }
        Err(StoreError::refused("partitions are made faster than they are adopted; run it again".into()))
    }

    /// Why the former shape cannot be left now; `None` where it can, or is not there.
    fn daemons(&mut self, found: &FoundTable) -> Result<Option<String>, StoreError> {
        if !former::was_at_work(found) {
            return Ok(None);
        }
        let rows = ask(&mut self.client, &ADOPT_DAEMONS)?;
        let instances: Vec<(String, i64)> = read_all(&rows, |row| Ok((row.try_get(0)?, row.try_get(1)?)))?;
        Ok(former::still_at_work(&instances))
    }

    fn refuse_daemons(&mut self, found: &FoundTable) -> Result<(), StoreError> {
        self.daemons(found)?.map_or(Ok(()), |problem| Err(StoreError::refused(problem)))
    }

    /// The schema's file, in one of its two phases.
    fn file(&self, phase: &str, what: &str) -> AdoptionStep {
        AdoptionStep {
            what: what.to_owned(),
            sql: format!(
                "SET LOCAL pg_outbox.adopt = '{phase}'; SET LOCAL pg_outbox.\"order\" = '{}'; {}",
                self.order, self.text
            ),
            how: StepPace::Instantly,
        }
    }

    /// Waits until no other adoption runs. One whose client was killed ends with its statement.
    fn lock(&mut self) -> Result<(), StoreError> {
        let lock = format!("SELECT pg_try_advisory_lock({ADOPTION_LOCK})");
        let mut waits = false;
        while !self.client.query_typed_one(&lock, &[]).map_err(sql)?.get::<_, bool>(0) {
            if !waits {
                (self.say)(
                    "another adoption runs (or the last statement of an interrupted one): waiting for its end",
                );
            }
            waits = true;
            thread::sleep(LOOK_EVERY * 10);
        }
        Ok(())
    }

    fn look_and_judge(&mut self) -> Result<FoundTable, StoreError> {
        let found = self.look()?;
        let refusals = adoption::refusals(&found, &self.order);
        if !refusals.is_empty() {
            return Err(StoreError::refused(format!(
                "this table cannot be adopted: {}",
                refusals.join("; ")
            )));
        }
        for remark in adoption::remarks(&found, &self.schema) {
            (self.say)(&format!("note: {remark}"));
        }
        Ok(found)
    }

    fn look(&mut self) -> Result<FoundTable, StoreError> {
        let client = &mut self.client;
        let rows = ask(client, &ADOPT_TABLE)?;
        let (kind, has_default_partition, default_name_is_taken, lanes_by_md5, is_ordered) =
            first(&rows, |row| {
                let kind: Option<String> = row.try_get(0)?;
                let key: Option<String> = row.try_get(1)?;
                let kind = match (kind.as_deref(), key) {
                    (None, _) => Kind::Missing,
                    (Some("p"), Some(key)) => Kind::Partitioned(key),
                    (Some("r"), _) => Kind::Plain,
                    _ => Kind::Other,
                };
                Ok((kind, row.try_get(2)?, row.try_get(3)?, row.try_get(4)?, row.try_get(5)?))
            })?;
        let order =
            if is_ordered { Some(first(&ask(client, &ADOPT_ORDER)?, |row| row.try_get(0))?) } else { None };
        let columns = read_all(&ask(client, &ADOPT_COLUMNS)?, |row| {
            Ok(Column {
                name: row.try_get(0)?,
                type_name: row.try_get(1)?,
                not_null: row.try_get(2)?,
                has_default: row.try_get(3)?,
            })
        })?;
        let names: Vec<(String, String)> =
            read_all(&ask(client, &ADOPT_NAMES)?, |row| Ok((row.try_get(0)?, row.try_get(1)?)))?;
        let named = |wanted: &str| {
            names.iter().filter(|(kind, _)| kind == wanted).map(|(_, name)| name.clone()).collect::<Vec<_>>()
        };
        let mut found = FoundTable {
            kind,
            version: schema_version(client, &Home::default())?,
            lanes_by_md5,
            order,
            columns,
            primary_key: named("key"),
            sequence_faults: ask(client, &SEQUENCE_FAULTS)?
                .iter()
                .map(SequenceFault::read)
                .collect::<Result<_, _>>()?,
            checks: named("check"),
            has_default_partition,
            default_name_is_taken,
            indexes: named("index"),
            partitions: partitions(client)?,
            functions: named("function"),
            violated: Vec::new(),
            touched: named("touched"),
        };
        former::forget_its_indexes(&mut found);
        if adoption::refusals(&found, &self.order).is_empty() {
            found.violated = self.violated(&found)?;
        }
        Ok(found)
    }

    /// Looks whether writers keep the checks that are not there yet.
    fn violated(&mut self, found: &FoundTable) -> Result<Vec<Violated>, StoreError> {
        let mut violated = Vec::new();
        for (check, condition) in self.schema.checks().iter().filter(|(name, _)| !found.checks.contains(name))
        {
            let timeout = CHECK_TIMEOUT.as_millis();
            let query = format!(
                "SET LOCAL statement_timeout = {timeout};
                 SELECT count(*), min(seq) FROM outboxes
                  WHERE created_at > now() - interval '7 days' AND NOT coalesce({condition}, true)"
            );
            let messages = match self.client.simple_query(&query) {
                Ok(messages) => messages,
                Err(error) if error.code().is_some_and(|code| code.code() == "57014") => {
                    (self.say)(&format!(
                        "note: whether writers keep check {check} is not known: looking took more than {CHECK_TIMEOUT:?}"
                    ));
                    continue;
                }
                Err(error) => return Err(sql(error)),
            };
            let row = messages.iter().find_map(|message| match message {
                postgres::SimpleQueryMessage::Row(row) => {
                    Some((row.get(0)?.parse::<i64>().ok()?, row.get(1)?.parse::<i64>().ok()?))
                }
                _ => None,
            });
            violated.extend(row.map(|(rows, seq)| Violated { check: check.clone(), rows, seq }));
        }
        Ok(violated)
    }

    fn step(&mut self, step: &AdoptionStep) -> Result<(), StoreError> {
        (self.say)(&step.what);
        let began = Instant::now();
        match step.how {
            StepPace::Instantly => self.instantly(&step.sql),
            StepPace::Beside => self.beside(&step.sql),
        }
        .map_err(|error| StoreError { text: format!("{}: {error}", step.what), ..error })?;
        self.done += 1;
        if began.elapsed() > Duration::from_secs(1) {
            (self.say)(&format!("    took {:.1}s", began.elapsed().as_secs_f64()));
        }
        Ok(())
    }

    /// In a transaction, with locks that are asked for during a moment at a time.
    fn instantly(&mut self, statement: &str) -> Result<(), StoreError> {
        let text = format!("SET LOCAL lock_timeout = {}; {statement}", LOCK_TIMEOUT.as_millis());
        for try_number in 1.. {
            let error = match self.client.batch_execute(&text) {
                Ok(()) => return Ok(()),
                Err(error) => sql(error),
            };
            // A file that has begun a transaction has not ended it.
            if self.client.batch_execute("ROLLBACK").is_err() {
                return Err(error);
            }
            let in_the_way = error.sqlstate().is_some_and(|code| IN_THE_WAY.contains(&code));
            if !in_the_way || try_number >= LOCK_TRIES {
                return Err(error);
            }
            if try_number % LOCK_TRIES_SAID == 0 {
                (self.say)(
                    "    waiting: a transaction that uses the table stays open; writers go on meanwhile",
                );
            }
            thread::sleep(Duration::from_millis(fastrand::u64(LOCK_PAUSE_MS)));
        }
        Ok(())
    }

    /// Outside of a transaction; says how far it is.
    fn beside(&mut self, statement: &str) -> Result<(), StoreError> {
        let pid: i32 = self.client.query_typed_one("SELECT pg_backend_pid()", &[]).map_err(sql)?.get(0);
        let Adoption { client, watcher, say, .. } = self;
        thread::scope(|scope| {
            let work = scope.spawn(|| client.batch_execute(statement));
            let mut next = Instant::now() + PROGRESS_EVERY;
            while !work.is_finished() {
                if Instant::now() >= next {
                    next += PROGRESS_EVERY;
                    // Not knowing it is no reason to stop.
                    if let Some(progress) = progress(watcher, pid) {
                        say(&format!("    {progress}"));
                    }
                }
                thread::sleep(LOOK_EVERY);
            }
            work.join().map_or_else(
                |_| Err(StoreError::refused("the thread of the statement panicked".into())),
                |result| result.map_err(sql),
            )
        })
    }
}

fn progress(client: &mut Client, pid: i32) -> Option<String> {
    let rows = client.query_typed(ADOPT_PROGRESS.text, &typed(&ADOPT_PROGRESS, &[&pid])).ok()?;
    let row = rows.first()?;
    let phase: String = row.try_get(0).ok()?;
    let percent: Option<i32> = row.try_get(1).ok()?;
    Some(percent.map_or(phase.clone(), |percent| format!("{phase}: {percent}%")))
}

fn partitions(client: &mut Client) -> Result<Vec<FoundPartition>, StoreError> {
    let rows = ask(client, &ADOPT_PARTITIONS)?;
    let read = read_all(&rows, |row| {
        let name: Option<String> = row.try_get(5)?;
        let (valid, part_of) = (row.try_get(6)?, row.try_get(7)?);
        let partition = FoundPartition {
            schema: row.try_get(0)?,
            name: row.try_get(1)?,
            is_table: row.try_get(2)?,
            size: row.try_get(3)?,
            fillfactor_is_set: row.try_get(4)?,
            indexes: Vec::new(),
        };
        Ok((partition, name.map(|name| PartIndex { name, valid, part_of })))
    })?;
    let mut partitions: Vec<FoundPartition> = Vec::new();
    for (partition, index) in read {
        let is_last =
            |last: &FoundPartition| (&last.schema, &last.name) == (&partition.schema, &partition.name);
        if !partitions.last().is_some_and(is_last) {
            partitions.push(partition);
        }
        if let Some(last) = partitions.last_mut() {
            last.indexes.extend(index);
        }
    }
    Ok(partitions)
}

fn ask(client: &mut Client, query: &Query) -> Result<Vec<postgres::Row>, StoreError> {
    client.query_typed(query.text, &[]).map_err(sql)
}

#[allow(clippy::needless_pass_by_value, reason = "the shape that map_err wants")]
fn sql(error: postgres::Error) -> StoreError {
    StoreError::from(&error)
}
