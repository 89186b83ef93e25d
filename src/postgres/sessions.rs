//! Whether a connection is a session: always the same server process at its other end, and that for nobody else.
//!
//! Through a pooler in transaction mode it is not. Whatever a transaction leaves in its session (a prepared
//! statement, a setting, LISTEN, an advisory lock) is then met by whoever gets that server process next, and missed
//! by us. Claims leave nothing behind but prepared statements, and those only once [`Store::probe_sessions`] has
//! shown that connections are sessions. Should that turn out wrong later (a pooler can change its mode while it
//! runs), the first transaction in another process sees it, and statements are no longer prepared.
//!
//! Without prepared statements PostgreSQL parses and plans anew, some 6 ms for a claim. They cost no more round
//! trips: the unnamed statement is parsed and executed in one.

use std::sync::atomic::{AtomicBool, Ordering};

use postgres::{Client, SimpleQueryMessage};

use super::{Store, StoreError};
use crate::config::PreparedStatements;

/// Which of two connections is asked, by turns that no way of giving out server processes in order can fit.
const TURNS: [usize; 10] = [0, 1, 1, 0, 0, 1, 0, 1, 1, 0];
/// `invalid_sql_statement_name`: a statement that we prepared is not there.
const STATEMENT_MISSING: &str = "26000";
/// `duplicate_prepared_statement`: one of that name is there, and we did not prepare it.
const STATEMENT_OF_ANOTHER: &str = "42P05";

/// What connections are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sessions {
    /// Each is a session of its own.
    Own,
    /// They share sessions, as behind a transaction pooler.
    Shared,
}

/// Whether statements are prepared.
#[derive(Debug)]
pub(super) struct Preparing {
    wanted: PreparedStatements,
    now: AtomicBool,
}

impl Preparing {
    pub(super) fn new(wanted: PreparedStatements) -> Preparing {
        Preparing { wanted, now: AtomicBool::new(wanted == PreparedStatements::Always) }
    }

    pub(super) fn is_on(&self) -> bool {
        self.now.load(Ordering::Relaxed)
    }

    /// Takes in what the self-test has found.
    fn found(&self, sessions: Sessions) {
        if self.wanted == PreparedStatements::Auto {
            self.now.store(sessions == Sessions::Own, Ordering::Relaxed);
        }
    }

    /// A connection that was served by process `before` is served by `now`.
    pub(super) fn moved(&self, before: i32, now: i32) -> Result<(), StoreError> {
        if before == now || !self.is_on() || self.wanted == PreparedStatements::Always {
            return Ok(());
        }
        self.found(Sessions::Shared);
        Err(StoreError::outage(
            "the session changed between two transactions, as behind a transaction pooler: statements are not prepared \
             from now on"
                .into(),
        ))
    }

    /// Takes in an error: it may be that what was prepared is not where it should be. Returns it, in better words.
    pub(super) fn failed(&self, error: StoreError) -> StoreError {
        if !matches!(error.sqlstate(), Some(STATEMENT_MISSING | STATEMENT_OF_ANOTHER)) {
            return error;
        }
        self.found(Sessions::Shared);
        let meaning = match self.wanted {
            PreparedStatements::Always => {
                "database.prepared_statements is always, and a pooler does not keep them"
            }
            _ => "a transaction pooler? Statements are not prepared from now on",
        };
        StoreError { text: format!("{error}; {meaning}"), outage: true, ..error }
    }
}

impl Store {
    /// For a line that says that sessions are shared: what that means for statements.
    pub fn in_shared_sessions(&self) -> &'static str {
        if self.shared.preparing.is_on() {
            "statements are prepared all the same"
        } else {
            "statements are not prepared"
        }
    }

    /// Finds out whether connections are sessions, and from then on prepares statements if they are (and nothing else
    /// is configured).
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn probe_sessions(&self) -> Result<Sessions, StoreError> {
        let (mut one, mut other) = (self.connection()?, self.connection()?);
        let mut pids = [0; TURNS.len()];
        for (pid, turn) in pids.iter_mut().zip(TURNS) {
            let connection = if turn == 0 { &mut one } else { &mut other };
            *pid = connection.attempt(|pooled| backend_pid(&mut pooled.client))?;
        }
        let sessions = judge(pids);
        self.shared.preparing.found(sessions);
        Ok(sessions)
    }
}

/// Whether these two connections are sessions. Nothing is prepared or set on either.
pub(super) fn probe(one: &mut Client, other: &mut Client) -> Result<Sessions, postgres::Error> {
    let mut pids = [0; TURNS.len()];
    for (pid, turn) in pids.iter_mut().zip(TURNS) {
        *pid = backend_pid(if turn == 0 { one } else { other })?;
    }
    Ok(judge(pids))
}

/// The last column of the last row: where statements of ours say which process runs them.
pub(super) fn last_number(messages: &[SimpleQueryMessage]) -> Option<i32> {
    from_the_end(messages, 1)?.parse().ok()
}

/// The `column`-th last column of the last row, from 1.
pub(super) fn from_the_end(messages: &[SimpleQueryMessage], column: usize) -> Option<&str> {
    messages.iter().rev().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(row.len().checked_sub(column)?),
        _ => None,
    })
}

/// In the simple protocol, which prepares nothing.
fn backend_pid(client: &mut Client) -> Result<i32, postgres::Error> {
    Ok(last_number(&client.simple_query("SELECT pg_backend_pid()")?).unwrap_or_default())
}

/// Whether the answers, in their turns, came from one process for each connection.
fn judge(pids: [i32; TURNS.len()]) -> Sessions {
    let [first, second, ..] = pids;
    let as_sessions =
        TURNS.iter().zip(pids).all(|(&turn, pid)| pid == if turn == 0 { first } else { second });
    if as_sessions && first != second { Sessions::Own } else { Sessions::Shared }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a self-test sees when the answer of each turn comes from the process that `give` names.
    fn seen(give: impl Fn(usize) -> i32) -> Sessions {
        judge(std::array::from_fn(give))
    }

    #[test]
    fn a_transaction_pooler_is_no_pair_of_sessions() {
        assert_eq!(seen(|turn| 100 + i32::try_from(TURNS[turn]).unwrap()), Sessions::Own);
        assert_eq!(seen(|_| 100), Sessions::Shared, "one that comes back goes out first");
        for processes in 2..20 {
            for first in 0..processes {
                let round = |turn| i32::try_from((first + turn) % processes).unwrap();
                assert_eq!(seen(round), Sessions::Shared, "{processes} processes take turns");
            }
        }
        for changed in 0..TURNS.len() {
            let once = |turn| if turn == changed { 1 } else { 100 + i32::try_from(TURNS[turn]).unwrap() };
            assert_eq!(seen(once), Sessions::Shared, "turn {changed} is served by another process");
        }
    }

    #[test]
    fn statements_are_prepared_where_that_is_wanted_and_works() {
        use PreparedStatements::{Always, Auto, Never};
        // Wanted; at the start; once sessions are found; once they are found to be shared; after a move to another
        // process; after an error.
        for (wanted, expected) in [
            (Auto, [false, true, false, false, false]),
            (Always, [true, true, true, true, true]),
            (Never, [false, false, false, false, false]),
        ] {
            let preparing = || Preparing::new(wanted);
            let after = |what: &dyn Fn(&Preparing)| {
                let preparing = preparing();
                preparing.found(Sessions::Own);
                what(&preparing);
                preparing.is_on()
            };
            let missing = || StoreError {
                text: "26000: prepared statement \"s1\" does not exist".into(),
                sqlstate: Some("26000".into()),
                outage: false,
            };
            let seen = [
                preparing().is_on(),
                after(&|_| {}),
                after(&|preparing| preparing.found(Sessions::Shared)),
                after(&|preparing| assert_eq!(preparing.moved(1, 2).is_err(), wanted == Auto)),
                after(&|preparing| assert!(preparing.failed(missing()).is_outage())),
            ];
            assert_eq!(seen, expected, "{wanted:?}");
            assert!(after(&|preparing| assert_eq!(preparing.moved(1, 1), Ok(()))) == (wanted != Never));
        }
    }
}
