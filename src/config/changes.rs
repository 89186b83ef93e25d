//! What differs between the configuration that is running and one read anew.
//!
//! Pure, on the main thread, for a reload. Whether a key can change while running is said where it is declared; here it
//! is done: one that can is taken over, of another only the name is kept.

use super::key::Reload;

/// What a reload found, as names of keys in the order in which the sections declare them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Changed, and in force from the next claim on.
    pub applied: Vec<&'static str>,
    /// Changed in the file; the running service keeps the value it started with until it is restarted.
    pub need_restart: Vec<&'static str>,
}

impl Changes {
    /// Notes under `name` whether `new` differs from `old`, and takes it over if a reload may.
    pub(super) fn compare<T: PartialEq + Clone>(
        &mut self,
        name: &'static str,
        reload: Reload,
        old: &mut T,
        new: &T,
    ) {
        if old == new {
            return;
        }
        match reload {
            Reload::Applies => {
                *old = new.clone();
                self.applied.push(name);
            }
            Reload::NeedsRestart => self.need_restart.push(name),
        }
    }
}
