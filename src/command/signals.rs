//! Signals, as a command hears of them: the daemon through a channel, whatever works in small steps through a flag.
//!
//! The channel is filled by a thread of its own, named `signals`; the flag is set by the signal's handler itself, without
//! a thread. Neither ends anything by itself but for the second signal to a command with a flag, which ends the process
//! at once. SIGHUP is the daemon's alone: to the others it does what it always did.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use crossbeam_channel::{Receiver, bounded};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Exit code of a program that a second signal has ended.
pub const CUT_SHORT: u8 = 130;
/// Signals that may wait to be read.
const SIGNALS_MAX: usize = 8;

/// SIGTERM, SIGINT and SIGHUP as a channel.
///
/// # Errors
/// The handlers or the thread cannot be set up.
pub fn channel() -> Result<Receiver<i32>> {
    let mut source = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    let (send, signals) = bounded(SIGNALS_MAX);
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in source.forever() {
            let _ = send.try_send(signal);
        }
    })?;
    Ok(signals)
}

/// Set by the first SIGINT or SIGTERM. The second one ends the process at once.
///
/// # Errors
/// The handlers cannot be set up.
pub fn stop_flag() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, i32::from(CUT_SHORT), stop.clone())
            .and_then(|_| signal_hook::flag::register(signal, stop.clone()))
            .context("listen to signals")?;
    }
    Ok(stop)
}
