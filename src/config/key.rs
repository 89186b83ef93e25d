//! What a key of the configuration is: its value without being written, what else it may be, whether a reload takes it
//! over, and the environment variable that wins over the file.
//!
//! Plain data. Each section (`dispatcher.rs`, `database.rs`, `nats.rs`, `service.rs`) declares its keys with these, once;
//! reading, reloading and the checks of the texts all follow that declaration. A key's name is its field's, its meaning
//! the field's comment.

use super::values::ValueKind;

/// One key, declared: `key(100, count(1..=100_000)).live()`.
pub(super) struct Key<T> {
    pub(super) default: T,
    pub(super) kind: ValueKind<T>,
    pub(super) reload: Reload,
    /// Wins over the file unless it is empty.
    pub(super) variable: Option<&'static str>,
}

/// A key that is `default` unless it is written.
pub(super) fn key<T>(default: T, kind: ValueKind<T>) -> Key<T> {
    Key { default, kind, reload: Reload::NeedsRestart, variable: None }
}

/// A key that is nothing unless it is written.
pub(super) fn optional<T: 'static>(kind: ValueKind<T>) -> Key<Option<T>> {
    key(None, kind.map(Some))
}

impl<T> Key<T> {
    /// A reload takes it over.
    pub(super) fn live(self) -> Key<T> {
        Key { reload: Reload::Applies, ..self }
    }

    /// The environment variable `name` wins over the file.
    pub(super) fn variable(self, name: &'static str) -> Key<T> {
        Key { variable: Some(name), ..self }
    }
}

/// What a reload does with a new value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reload {
    /// Puts it in force.
    Applies,
    /// Says that it takes a restart.
    NeedsRestart,
}

/// What the texts about a key must agree with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyFacts {
    /// In full: `dispatcher.batch_size`.
    pub key: String,
    /// A range or a few words, as messages say them: `1 to 64`, `10ms to 1h`, `file, memory`. Empty for a key of which
    /// that takes a sentence.
    pub allowed: String,
    /// Whether a reload takes it over.
    pub reload: Reload,
}
