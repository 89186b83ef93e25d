//! Dead letters for whoever decides about them: finding them, trying them again, discarding them.
//!
//! What changes events does it as a claim would: in a transaction that holds the lane's lock, so that no claim reads or
//! settles an event of these keys meanwhile, and with the state of each row asked for again under that lock. Whoever
//! comes second finds the row no dead letter any more, and it is not counted. One lane a transaction, so that nobody
//! waits for more than one lane, and nobody for somebody who waits. Every method blocks its caller.

use std::collections::HashMap;
use std::time::Duration;

use postgres::Row;
use uuid::Uuid;

use super::begin::begin_change;
use super::connection::Connection;
use super::query::Query;
use super::timestamptz::Timestamptz;
use super::{STATEMENT_TIMEOUT, Store, StoreError, read_all};

/// Longest wait for the claim that has a lane: longer than a claim sends, waits for acks, and probes.
const LANE_TIMEOUT: Duration = Duration::from_secs(25);
/// Events changed in one transaction at most.
pub const CHANGE_MAX: usize = 500;
/// Longest `discarded_by` and `discard_reason`, in characters; what is longer is cut.
const REMARK_MAX_CHARS: usize = 2_000;
/// `lock_not_available`.
const LOCK_NOT_AVAILABLE: &str = "55P03";
/// `insufficient_privilege`.
const INSUFFICIENT_PRIVILEGE: &str = "42501";

/// Which dead letters. What is `None` selects all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selection {
    /// These ids.
    pub ids: Option<Vec<Uuid>>,
    /// Topics, as a regular expression of PostgreSQL's.
    pub topic: Option<String>,
    /// This key.
    pub key: Option<String>,
    /// Died at or after: milliseconds since 1970, or from now if not above 0.
    pub since_ms: Option<i64>,
    /// Died before: as `since_ms`.
    pub until_ms: Option<i64>,
    /// A part of the reason, in any case of letters.
    pub error: Option<String>,
    /// At most so many, those with the lowest `seq`.
    pub limit: Option<i64>,
}

/// A dead letter, without its content.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Letter {
    /// Id of the event.
    #[serde(serialize_with = "as_text")]
    pub id: Uuid,
    /// Its place in the order.
    pub seq: i64,
    /// Its topic.
    pub topic: String,
    /// Its key.
    pub key: String,
    /// The lane of the key.
    pub lane: i32,
    /// Attempts that were made.
    pub attempts: i32,
    /// Why the last one failed.
    pub error: String,
    /// When it became one, in UTC.
    pub dead_at: String,
    /// Seconds since then; `None` for a time that is none.
    #[serde(skip)]
    pub dead_for: Option<f64>,
    /// Seconds since a row with the same id was published, if one was.
    #[serde(skip)]
    pub copy_published: Option<f64>,
    #[serde(skip)]
    created_at: Timestamptz,
}

/// Everything about an event. Times are in UTC.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Whole {
    /// Its id.
    pub id: String,
    /// Its place in the order.
    pub seq: i64,
    /// Its topic.
    pub topic: String,
    /// Its key.
    pub key: String,
    /// The lane of the key.
    pub lane: i32,
    /// `pending`, `in retry`, `published`, `dead` or `discarded`.
    pub state: String,
    /// When it was written.
    pub created_at: String,
    /// When it was published.
    pub published_at: Option<String>,
    /// Attempts that were judged.
    pub attempts: i32,
    /// Why the last one failed.
    pub last_error: Option<String>,
    /// In retry: when it is due.
    pub next_attempt_at: Option<String>,
    /// When it died.
    pub dead_at: Option<String>,
    /// When it was discarded.
    pub discarded_at: Option<String>,
    /// By whom.
    pub discarded_by: Option<String>,
    /// Why.
    pub discard_reason: Option<String>,
    /// `outboxes.metadata`.
    pub metadata: Option<Box<serde_json::value::RawValue>>,
    /// `outboxes.payload`.
    pub payload: Option<Box<serde_json::value::RawValue>>,
}

/// What is to become of dead letters.
#[derive(Debug, Clone, Copy)]
pub enum LetterChange<'a> {
    /// They are tried again, at once; those whose id is in here, under the one that it leads to.
    Retry(&'a HashMap<Uuid, Uuid>),
    /// They are discarded.
    Discard {
        /// Who does it.
        by: &'a str,
        /// Why.
        reason: &'a str,
    },
}

impl Store {
    /// The dead letters of a selection, by `seq`. Costs as much as there are dead letters.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn dead_letters(&self, selection: &Selection) -> Result<Vec<Letter>, StoreError> {
        let Selection { ids, topic, key, since_ms, until_ms, error, limit } = selection;
        let rows = self.read(
            STATEMENT_TIMEOUT,
            &DEAD_LETTERS,
            &[ids, topic, key, since_ms, until_ms, error, limit],
        )?;
        read_all(&rows, read_letter)
    }

    /// The events with these ids, whatever became of them. Several rows can have one id.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn events_by_id(&self, ids: &[Uuid]) -> Result<Vec<Whole>, StoreError> {
        let rows = self.read(STATEMENT_TIMEOUT, &EVENTS_BY_ID, &[&ids])?;
        read_all(&rows, read_whole)
    }

    /// Changes dead letters of one lane in one transaction, and wakes the dispatchers. Returns the `seq` of each that
    /// was changed; the others are no dead letters any more.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses, or a claim has had the lane for longer than claims take. Nothing was
    /// changed (a lost COMMIT may have happened all the same).
    pub fn change_dead(&self, letters: &[Letter], change: LetterChange) -> Result<Vec<i64>, StoreError> {
        let Some(lane) = letters.first().map(|letter| letter.lane) else { return Ok(Vec::new()) };
        let mut connection = self.connection()?;
        connection.begin(&begin_change(LANE_TIMEOUT, &self.shared.home))?;
        connection.query(&LOCK_LANE, &[&lane]).map_err(|error| match error.sqlstate() {
            Some(LOCK_NOT_AVAILABLE) => {
                let waited = LANE_TIMEOUT.as_secs();
                StoreError {
                    text: format!("lane {lane} was not free within {waited}s: try again ({error})"),
                    ..error
                }
            }
            _ => error,
        })?;
        let rows = apply(&mut connection, letters, change)?;
        if !rows.is_empty() {
            connection.query(&WAKE_DISPATCHERS, &[])?;
        }
        connection.batch("COMMIT")?;
        read_all(&rows, |row| row.try_get(0))
    }
}

fn apply(
    connection: &mut Connection,
    letters: &[Letter],
    change: LetterChange,
) -> Result<Vec<Row>, StoreError> {
    let ids: Vec<Uuid> = letters.iter().map(|letter| letter.id).collect();
    let created_at: Vec<Timestamptz> = letters.iter().map(|letter| letter.created_at).collect();
    match change {
        LetterChange::Retry(new_ids) if new_ids.is_empty() => {
            connection.query(&RETRY_DEAD, &[&ids, &created_at])
        }
        LetterChange::Retry(new_ids) => {
            let new_ids: Vec<Uuid> = ids.iter().map(|id| new_ids.get(id).copied().unwrap_or(*id)).collect();
            let retried = connection.query(&RETRY_DEAD_AFRESH, &[&ids, &created_at, &new_ids]);
            retried.map_err(|error| match error.sqlstate() {
                Some(INSUFFICIENT_PRIVILEGE) => {
                    let text = format!(
                        "a fresh id takes a role that may change ids, as outbox_operator may ({error})"
                    );
                    StoreError { text, ..error }
                }
                _ => error,
            })
        }
        LetterChange::Discard { by, reason } => connection.query(
            &DISCARD_DEAD,
            &[
                &ids,
                &created_at,
                &connection.storable(by, REMARK_MAX_CHARS),
                &connection.storable(reason, REMARK_MAX_CHARS),
            ],
        ),
    }
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "the shape that serde wants")]
fn as_text<S: serde::Serializer>(id: &Uuid, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(id)
}

fn read_letter(row: &Row) -> Result<Letter, postgres::Error> {
    Ok(Letter {
        id: row.try_get(0)?,
        created_at: row.try_get(1)?,
        seq: row.try_get(2)?,
        topic: row.try_get(3)?,
        key: row.try_get(4)?,
        lane: row.try_get(5)?,
        attempts: row.try_get(6)?,
        error: row.try_get(7)?,
        dead_at: row.try_get(8)?,
        dead_for: row.try_get(9)?,
        copy_published: row.try_get(10)?,
    })
}

fn read_whole(row: &Row) -> Result<Whole, postgres::Error> {
    // PostgreSQL checks its JSON: what cannot be read here is a column of another type.
    let json =
        |text: Option<String>| text.and_then(|text| serde_json::value::RawValue::from_string(text).ok());
    Ok(Whole {
        id: row.try_get(0)?,
        seq: row.try_get(1)?,
        topic: row.try_get(2)?,
        key: row.try_get(3)?,
        lane: row.try_get(4)?,
        state: row.try_get(5)?,
        created_at: row.try_get(6)?,
        published_at: row.try_get(7)?,
        attempts: row.try_get(8)?,
        last_error: row.try_get(9)?,
        next_attempt_at: row.try_get(10)?,
        dead_at: row.try_get(11)?,
        discarded_at: row.try_get(12)?,
        discarded_by: row.try_get(13)?,
        discard_reason: row.try_get(14)?,
        metadata: json(row.try_get(15)?),
        payload: json(row.try_get(16)?),
    })
}

const DEAD_LETTERS: Query = query!("dead_letters", UUID_ARRAY, TEXT, TEXT, INT8, INT8, TEXT, INT8);
const EVENTS_BY_ID: Query = query!("events_by_id", UUID_ARRAY);
const LOCK_LANE: Query = query!("lock_lane", INT4);
const RETRY_DEAD: Query = query!("retry_dead", UUID_ARRAY, TIMESTAMPTZ_ARRAY);
const RETRY_DEAD_AFRESH: Query = query!("retry_dead_afresh", UUID_ARRAY, TIMESTAMPTZ_ARRAY, UUID_ARRAY);
const DISCARD_DEAD: Query = query!("discard_dead", UUID_ARRAY, TIMESTAMPTZ_ARRAY, TEXT, TEXT);
const WAKE_DISPATCHERS: Query = query!("wake_dispatchers");
