//! The bench's own threads: sessions that load, write or claim beside each other, each for one part and not longer.

use std::thread::ScopedJoinHandle;

use anyhow::{Result, bail};

/// Waits for all of them. The first error is the result; a panic has printed its message already.
pub(super) fn join_all<T>(threads: Vec<ScopedJoinHandle<'_, Result<T>>>) -> Result<Vec<T>> {
    let join = |thread: ScopedJoinHandle<'_, Result<T>>| match thread.join() {
        Ok(result) => result,
        Err(_) => bail!("a thread of the bench panicked"),
    };
    threads.into_iter().map(join).collect()
}
