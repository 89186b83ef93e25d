//! Patience: looking again for a moment before going to sleep.
//!
//! A key whose events go one by one waits for each ack, and the ack of a server nearby is there within some 150 µs (median;
//! 90 % within 210). In that time a thread that sleeps has hardly been woken: on a virtual machine a wake-up takes 30 to
//! 50 µs, and a message and its ack need two of them, the writer's and the worker's. So whoever waits looks again for
//! [`MOMENT`] first, and gives its processor to any other thread that wants it after each look. Measured with 20,000 events
//! of one key on two cores: 3.9 s without it, 3.0 with looks for 100 µs, 2.8 for 200 and no less for 400; our CPU 1.6, 2.2,
//! 2.4 s, and nats-server's, with 100 µs, 1.6 instead of 2.05 s.
//!
//! Where what is waited for takes longer, looking is in vain. So each time that it was, twice as many waits as before
//! are slept through at once, up to [`SLEEPS_MAX`]: then a wait costs 3 µs more on the average.

use std::thread;
use std::time::{Duration, Instant};

/// How long a wait looks before it sleeps.
const MOMENT: Duration = Duration::from_micros(200);
/// Waits that are slept through at once, at most, before one looks again.
const SLEEPS_MAX: u32 = 64;

/// What a thread has learnt from its last waits.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Patience {
    /// Waits still to be slept through.
    sleeps_left: u32,
    /// How many it were the last time.
    sleeps: u32,
}

impl Patience {
    /// Takes what `look` finds, if it finds something within a moment; else it is time to sleep.
    pub(super) fn look<T>(&mut self, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        if self.sleeps_left > 0 {
            self.sleeps_left -= 1;
            return None;
        }
        let until = Instant::now() + MOMENT;
        loop {
            if let Some(found) = look() {
                self.sleeps = 0;
                return Some(found);
            }
            if Instant::now() >= until {
                break;
            }
            thread::yield_now();
        }
        self.sleeps = (self.sleeps * 2).clamp(1, SLEEPS_MAX);
        self.sleeps_left = self.sleeps;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of so many waits in vain looked at all.
    fn looked(patience: &mut Patience, waits: u32) -> u32 {
        let look_in_vain = |patience: &mut Patience| {
            let mut looks = 0;
            let found = patience.look(|| {
                looks += 1;
                None::<()>
            });
            assert_eq!(found, None);
            u32::from(looks > 0)
        };
        (0..waits).map(|_| look_in_vain(patience)).sum()
    }

    #[test]
    fn what_comes_in_a_moment_is_taken() {
        let mut patience = Patience::default();
        for _ in 0..100 {
            let mut looks = 0;
            let found = patience.look(|| {
                looks += 1;
                (looks == 2).then_some(looks)
            });
            assert_eq!(found, Some(2));
        }
    }

    #[test]
    fn what_takes_longer_is_seldom_looked_for() {
        let mut patience = Patience::default();
        // It looks in the waits 1, 3, 6, 11, 20, 37, 70, 135, and then in every 65th.
        assert_eq!(looked(&mut patience, 135), 8);
        assert_eq!(looked(&mut patience, 650), 10);
        // Once it finds something, it has all its patience again.
        while patience.look(|| Some(())).is_none() {}
        assert_eq!(looked(&mut patience, 3), 2);
    }
}
