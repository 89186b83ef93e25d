//! Lanes: the hash buckets of ordering keys, which claims lock.
//!
//! It owns how many lanes there are, how many keys of them a claim wants, where a read of one may begin, and which writers may still add to it: plain data and
//! pure decisions. It has no thread of its own: the claimer's uses it, and the worker threads and `postgres/` name its
//! types. It names nothing but the standard library. It never asks the database or the clock, and never blocks.

pub mod marks;
pub mod progress;
#[cfg(test)]
mod tests;
pub mod writers;

/// Lanes there are: rows of `outbox_lanes`, values of `outbox_lane()`. A power of two that a byte holds. The schema and
/// `missing_rows.sql` say the same number, and a test of `postgres/outbox.rs` that they do.
pub const LANES: i32 = 64;

/// Keys that a claim should have events of, as one event of each is in flight at a time: so many keep NATS busy.
pub const ENOUGH_KEYS: usize = 40;

/// A value for each lane.
pub type ByLane<T> = [T; LANES as usize];

/// The same value for each lane.
pub const fn by_lane<T: Copy>(value: T) -> ByLane<T> {
    [value; LANES as usize]
}
