//! The texts that begin a transaction, with the settings that it runs under.
//!
//! Every transaction says itself what it needs of the server, and for its own time only: behind a transaction pooler a
//! session keeps nothing, and what a role or a database has set for its usual work must not end a claim. Beginning and
//! setting is one message, so it costs one round trip. Texts alone; `Connection::begin` sends them.

use std::time::Duration;

use super::claim_settings::ClaimSettings;
use super::home::Home;
use super::{STATEMENT_TIMEOUT, milliseconds};

/// The plans of a claim are part of the design. Each of its searches has exactly one index that fits; these
/// keep the planner from preferring a scan or a hash where the tables looked empty when it planned. A plan
/// is made once a connection, and neither compiled nor made anew for each set of parameters. One statement, as
/// each costs its share in every claim.
pub const CLAIM_PLANS: &str = "SELECT set_config('plan_cache_mode', 'force_generic_plan', true), \
     set_config('enable_seqscan', 'off', true), set_config('enable_bitmapscan', 'off', true), \
     set_config('enable_hashjoin', 'off', true), set_config('enable_mergejoin', 'off', true), \
     set_config('enable_memoize', 'off', true), set_config('jit', 'off', true)";

/// For a `SELECT`: our transactions have limits of their own, and none that a role or a server sets for its usual
/// work. (Before PostgreSQL 17 there is no transaction_timeout to set.)
pub(super) const NO_OTHER_LIMITS: &str = "set_config('lock_timeout', '0', true), \
     CASE WHEN current_setting('transaction_timeout', true) IS NOT NULL \
          THEN set_config('transaction_timeout', '0', true) END";

/// The last columns of a SELECT that begins a transaction: see `Connection::begin`.
pub(super) const SERVED_BY: &str = "current_setting('server_encoding'), pg_backend_pid()";

/// Begins the transaction of a claim.
pub(super) fn begin_claim(settings: &ClaimSettings, home: &Home) -> String {
    // `on` would take from a server that is set to wait for its replicas.
    let commit =
        if settings.synchronous_commit { "" } else { ", set_config('synchronous_commit', 'off', true)" };
    format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; \
         {CLAIM_PLANS}, set_config('idle_in_transaction_session_timeout', '{}', true), \
         set_config('statement_timeout', '{}', true){commit}, {NO_OTHER_LIMITS}, {}{SERVED_BY}",
        milliseconds(settings.idle_in_transaction_timeout),
        milliseconds(STATEMENT_TIMEOUT),
        home.of_transaction(),
    )
}

/// Begins a transaction that changes events or lanes beside the claims, and waits for a lock for so long at most. What it
/// changed is on disk when it has ended.
pub(super) fn begin_change(lock_timeout: Duration, home: &Home) -> String {
    format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; \
         {CLAIM_PLANS}, set_config('statement_timeout', '{}', true), {NO_OTHER_LIMITS}, \
         set_config('lock_timeout', '{}', true), {}{SERVED_BY}",
        milliseconds(STATEMENT_TIMEOUT),
        milliseconds(lock_timeout),
        home.of_transaction(),
    )
}

/// Begins a transaction for reading.
pub(super) fn begin_reading(timeout: Duration, home: &Home) -> String {
    format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; \
         {CLAIM_PLANS}, set_config('statement_timeout', '{}', true), {NO_OTHER_LIMITS}, {}{SERVED_BY}",
        milliseconds(timeout),
        home.of_transaction(),
    )
}
