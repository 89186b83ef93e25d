//! Why PostgreSQL did not do something, and whether it is an outage.
//!
//! The one place where an error of the driver becomes text, and where SQLSTATEs are sorted: what says that the server
//! cannot serve anybody now is an outage, and everybody waits; the rest is its judgement of one statement.

use std::fmt;

/// not_null_violation, check_violation, with_check_option_violation: their detail is the row, payload and all.
const QUOTES_A_ROW: [&str; 3] = ["23502", "23514", "44000"];

/// Why PostgreSQL did not do something. Displays as `SQLSTATE: message (detail)` where it is the server's word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreError {
    pub(crate) text: String,
    pub(crate) sqlstate: Option<String>,
    pub(crate) outage: bool,
}

impl StoreError {
    /// The server's five-character code, if the server answered at all.
    pub fn sqlstate(&self) -> Option<&str> {
        self.sqlstate.as_deref()
    }

    /// True in an outage of PostgreSQL: there is no connection, or the server cannot serve anybody now (it
    /// ends, starts, is a standby, has no resources left). False when it judged the statement.
    pub fn is_outage(&self) -> bool {
        self.outage
    }

    /// True when PostgreSQL has what was asked for and cannot hand it over, now or ever: as text it is over 1 GB, or,
    /// from a database in SQL_ASCII, no UTF-8. (XX000 is any internal error; the text of one is never translated.)
    pub fn is_unreadable(&self) -> bool {
        match self.sqlstate() {
            Some("54000" | "22021" | "22P05") => true,
            Some("XX000") => self.text.contains("invalid memory alloc request size"),
            _ => false,
        }
    }

    /// The server ended the session, or it is lost without a word.
    pub(super) fn has_ended_the_session(&self) -> bool {
        self.outage
            && self.sqlstate.as_deref().is_none_or(|code| code.starts_with("57P") || code.starts_with("08"))
    }

    pub(super) fn outage(text: String) -> StoreError {
        StoreError { text, sqlstate: None, outage: true }
    }

    pub(super) fn refused(text: String) -> StoreError {
        StoreError { text, sqlstate: None, outage: false }
    }
}

/// The one place where an error of the driver becomes text: its own text is often just `db error`.
impl From<&postgres::Error> for StoreError {
    fn from(error: &postgres::Error) -> StoreError {
        let Some(db) = error.as_db_error() else {
            let mut text = error.to_string();
            let mut cause = std::error::Error::source(error);
            while let Some(inner) = cause {
                text = format!("{text}: {inner}");
                cause = inner.source();
            }
            return StoreError::outage(text);
        };
        let code = db.code().code();
        let detail = db.detail().filter(|_| !QUOTES_A_ROW.contains(&code));
        let detail = detail.map(|detail| format!(" ({detail})")).unwrap_or_default();
        // Classes 08: connection exceptions; 53: out of connections, memory or disk; 58: the disk failed. 57P:
        // the server ends, starts or kills the session; 25P03: idle_in_transaction_session_timeout did.
        // 25006 and 0A000: it is a standby, which answers our BEGIN ... READ WRITE with the latter.
        let outage =
            ["08", "53", "57P", "58", "25P03", "25006", "0A000"].iter().any(|class| code.starts_with(class));
        StoreError {
            text: format!("{code}: {}{detail}", db.message()),
            sqlstate: Some(code.to_owned()),
            outage,
        }
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for StoreError {}
