//! Lanes: what is known of the hash buckets of ordering keys that claims lock.
//!
//! Plain data and pure decisions about lanes: how many there are, and where a read of one may begin. No thread of its
//! own; the claimer's uses it, and workers and the store name its types. It names nothing but the standard library, and
//! never asks the database or the clock.

pub mod marks;
