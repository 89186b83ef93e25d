//! The threads of the service: how each is started, how an early end is noticed, and how all are told to stop.
//!
//! Every thread of the service is started by [`Threads::spawn`] and by nothing else. It runs until it is told to stop,
//! which it hears as the end of a channel. A thread that ends before that, by error or by panic, is a failure of the
//! service: its name and cause come to [`Threads::failed`]. A [`Running`] one tells whether it has ended, and waits
//! for that until a deadline. Nothing here kills a thread, and nothing waits for one without a deadline.

use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

/// Starts threads, and hears when one of them fails.
pub(super) struct Threads {
    /// Dropped to stop them.
    stop: Sender<Infallible>,
    stopped: Receiver<Infallible>,
    /// Set before they are told to stop: from then on an end is no failure.
    stopping: Arc<AtomicBool>,
    fail: Sender<anyhow::Error>,
    failed: Receiver<anyhow::Error>,
}

/// A thread that was started.
pub(super) struct Running {
    /// Disconnected once what it runs has ended.
    ended: Receiver<Infallible>,
}

impl Threads {
    pub(super) fn new() -> Threads {
        let (stop, stopped) = bounded(0);
        // The first failure ends the service; later ones have nowhere to go.
        let (fail, failed) = bounded(1);
        Threads { stop, stopped, stopping: Arc::default(), fail, failed }
    }

    /// The one way in which a thread of the service is started. `run` is given what fires when it is to stop.
    ///
    /// # Errors
    /// The system starts no more threads.
    pub(super) fn spawn(
        &self,
        name: &str,
        run: impl FnOnce(&Receiver<Infallible>) -> Result<()> + Send + 'static,
    ) -> Result<Running> {
        let (alive, ended) = bounded::<Infallible>(0);
        let (stopped, stopping, fail) = (self.stopped.clone(), self.stopping.clone(), self.fail.clone());
        let thread_name = name.to_owned();
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let cause = match catch_unwind(AssertUnwindSafe(|| run(&stopped))) {
                    Ok(Ok(())) => anyhow!("it returned"),
                    Ok(Err(error)) => error,
                    Err(panic) => anyhow!("it panicked: {}", panic_text(panic.as_ref())),
                };
                if !stopping.load(Ordering::Relaxed) {
                    let _ = fail.try_send(cause.context(format!("thread {thread_name} ended early")));
                }
                drop(alive);
            })
            .with_context(|| format!("start thread {name}"))?;
        Ok(Running { ended })
    }

    /// Receives when a thread has ended before it was told to: its name and cause.
    pub(super) fn failed(&self) -> &Receiver<anyhow::Error> {
        &self.failed
    }

    /// Tells all of them to stop, and returns at once.
    pub(super) fn stop(self) {
        self.stopping.store(true, Ordering::Relaxed);
        drop(self.stop);
    }
}

impl Running {
    /// Waits until what it runs has ended, until `deadline` at most; returns whether it has.
    ///
    /// It is not joined: `JoinHandle::join` knows no deadline, and `is_finished` still says no while a thread that has
    /// nothing left to do is on its way out.
    pub(super) fn ends_by(&self, deadline: Instant) -> bool {
        self.ended.recv_deadline(deadline) == Err(RecvTimeoutError::Disconnected)
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::time::Duration;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(20);

    /// Makes the thread that has it in `WAY_OUT` take its time after its work is done.
    struct Dawdles(Receiver<Infallible>);

    impl Drop for Dawdles {
        fn drop(&mut self) {
            let _ = self.0.recv();
        }
    }

    thread_local! {
        static WAY_OUT: RefCell<Option<Dawdles>> = const { RefCell::new(None) };
    }

    #[test]
    fn a_thread_on_its_way_out_has_ended_and_one_that_works_has_not() {
        let threads = Threads::new();
        let (hold, held) = bounded(0);
        let dawdles = Dawdles(held.clone());
        let on_its_way = threads.spawn("worker-0", move |_| {
            WAY_OUT.with(|way_out| *way_out.borrow_mut() = Some(dawdles));
            Ok(())
        });
        let working = threads.spawn("worker-1", move |_| {
            let _ = held.recv();
            Ok(())
        });
        let (on_its_way, working) = (on_its_way.unwrap(), working.unwrap());
        assert!(on_its_way.ends_by(Instant::now() + LONG));
        assert!(!working.ends_by(Instant::now() + SHORT));
        drop(hold);
        assert!(working.ends_by(Instant::now() + LONG));
    }

    #[test]
    fn the_first_early_end_is_a_failure_with_its_name_and_cause() {
        type Run = fn(&Receiver<Infallible>) -> Result<()>;
        let cases: [(Run, &str); 4] = [
            (|_| Ok(()), "thread x ended early: it returned"),
            (|_| Err(anyhow!("broken")), "thread x ended early: broken"),
            (|_| panic!("at the {}", "disco"), "thread x ended early: it panicked: at the disco"),
            (|_| std::panic::panic_any(7), "thread x ended early: it panicked: no message"),
        ];
        for (run, expected) in cases {
            let threads = Threads::new();
            threads.spawn("x", run).unwrap();
            let failure = threads.failed().recv_timeout(LONG).unwrap();
            assert_eq!(format!("{failure:#}"), expected);
        }
    }

    #[test]
    fn an_end_after_the_stop_is_no_failure() {
        let threads = Threads::new();
        let failed = threads.failed().clone();
        let thread = threads.spawn("x", |stop| {
            let _ = stop.recv();
            Err(anyhow!("it was told to"))
        });
        threads.stop();
        assert!(thread.unwrap().ends_by(Instant::now() + LONG));
        assert!(failed.try_recv().is_err());
    }
}
