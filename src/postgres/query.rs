//! A statement of `postgres/*.sql` as the program knows it: its name, its text and the types of its parameters.
//!
//! The macro `query!` makes one of a file, when the program is built. The types are said rather than asked of the server,
//! so that a statement can be run in one round trip, prepared or not. Plain data; nothing is sent from here.

use postgres::types::{ToSql, Type};

/// A statement of `postgres/*.sql`, prepared once a connection where connections are sessions.
pub(super) struct Query {
    pub(super) name: &'static str,
    pub(super) text: &'static str,
    /// Of `$1`, `$2`, ...
    pub(super) types: &'static [Type],
}

/// The parameters of a statement, each with its type.
pub(super) fn typed<'p>(
    query: &Query,
    params: &[&'p (dyn ToSql + Sync)],
) -> Vec<(&'p (dyn ToSql + Sync), Type)> {
    params.iter().copied().zip(query.types.iter().cloned()).collect()
}
