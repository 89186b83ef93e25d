//! The keys of one section of the file, so that the sections read as tables: key, default, what is allowed.
//!
//! On the thread that loads the configuration. It decides nothing: `reading.rs` finds the values and gathers the
//! problems, and `secrets.rs` reads the values that stand elsewhere.

use std::path::PathBuf;

use super::faults::Faults;
use super::reading::{ConfigReading, Section};
use super::secrets;
use super::yaml::Node;

/// The keys of one section, so that the lists above read as tables: key, default, what is allowed.
pub(super) struct Keys<'r, 'e, 'n> {
    pub(super) reading: &'r mut ConfigReading<'e>,
    pub(super) section: &'r Section<'n>,
}

impl Keys<'_, '_, '_> {
    pub(super) fn of<T, E: Into<Faults>>(
        &mut self,
        name: &str,
        default: T,
        parse: impl FnOnce(&Node) -> Result<T, E>,
    ) -> T {
        self.reading.value(self.section, name, default, parse)
    }

    /// The same for a value that may stand elsewhere: in a file, or among systemd's credentials.
    pub(super) fn secret<T, E: Into<Faults>>(
        &mut self,
        name: &str,
        default: T,
        parse: impl FnOnce(&Node) -> Result<T, E>,
    ) -> T {
        let credentials = self.reading.credentials();
        self.of(name, default, |node| secrets::read(node, &credentials, parse))
    }

    /// The same for a file's path, which may be that of a credential.
    pub(super) fn path(
        &mut self,
        name: &str,
        parse: impl FnOnce(&Node) -> Result<Option<PathBuf>, String>,
    ) -> Option<PathBuf> {
        let credentials = self.reading.credentials();
        self.of(name, None, |node| secrets::path(node, &credentials, parse))
    }
}
