//! Places at which a test can have the process killed or stopped: the boundaries between the steps of a claim.
//!
//! The macro [`failpoint!`](crate::failpoint) names such a place. Without the cargo feature `failpoints`, which is
//! off in every build but that of the tests, it is nothing at all: no call, no branch, no string in the program. With
//! it, `PG_OUTBOX_FAILPOINT=claim.read:kill@3` sends SIGKILL to the process when it comes to `claim.read` for the
//! third time, on whatever thread that is, and `stop` in the place of `kill` sends SIGSTOP. Nothing is unwound or
//! flushed, as in a crash.
//!
//! The places, in the order of a claim: `claim.locked` (lanes locked, nothing read), `claim.read` (nothing
//! published), `publish.part` (an event of a batch handed over, others not), `publish.sent` (an event, or the last of
//! a batch, handed over, its ack not heard), `publish.acked` (an ack heard, others
//! perhaps on their way), `settle.begin` (every outcome known, nothing written), `settle.written` (written, not
//! committed), `settle.committed` (the lanes are free again).

/// Names a place; see [the module](mod@crate::failpoint).
#[macro_export]
macro_rules! failpoint {
    ($place:literal) => {
        #[cfg(feature = "failpoints")]
        $crate::failpoint::reached($place);
    };
}

/// Names the variable that says where and how the process ends.
#[cfg(feature = "failpoints")]
pub const VARIABLE: &str = "PG_OUTBOX_FAILPOINT";

/// The process has come to `place`. When the variable asks for it there and now, this does not return (or, after a
/// SIGSTOP, once somebody has sent SIGCONT).
#[cfg(feature = "failpoints")]
pub fn reached(place: &str) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU32, Ordering};

    use rustix::process::{Signal, getpid, kill_process};

    static ARMED: OnceLock<Option<Armed>> = OnceLock::new();
    static TIMES: AtomicU32 = AtomicU32::new(0);
    let armed = ARMED.get_or_init(|| std::env::var(VARIABLE).ok().as_deref().and_then(Armed::parse));
    let Some(armed) = armed else { return };
    if armed.place == place && TIMES.fetch_add(1, Ordering::Relaxed) + 1 == armed.time {
        let signal = if armed.stop { Signal::STOP } else { Signal::KILL };
        // Sent to ourselves it cannot fail, and a test that waits for it would say so.
        let _ = kill_process(getpid(), signal);
    }
}

/// What the variable says.
#[cfg(feature = "failpoints")]
#[derive(Debug, PartialEq, Eq)]
struct Armed {
    place: String,
    stop: bool,
    /// From 1.
    time: u32,
}

#[cfg(feature = "failpoints")]
impl Armed {
    fn parse(text: &str) -> Option<Armed> {
        let (place, rest) = text.split_once(':')?;
        let (action, time) = rest.split_once('@')?;
        let stop = match action {
            "kill" => false,
            "stop" => true,
            _ => return None,
        };
        Some(Armed { place: place.to_owned(), stop, time: time.parse().ok().filter(|&time| time > 0)? })
    }
}

#[cfg(all(test, feature = "failpoints"))]
mod tests {
    use super::*;

    #[test]
    fn the_variable_names_place_action_and_time() {
        let armed = |place: &str, stop, time| Some(Armed { place: place.to_owned(), stop, time });
        let cases = [
            ("claim.read:kill@3", armed("claim.read", false, 3)),
            ("publish.sent:stop@1", armed("publish.sent", true, 1)),
            ("claim.read", None),
            ("claim.read:kill", None),
            ("claim.read:kill@0", None),
            ("claim.read:abort@1", None),
        ];
        for (text, expected) in cases {
            assert_eq!(Armed::parse(text), expected, "{text}");
        }
    }
}
