//! How the lanes of a claim were read, and how far each is known to be settled at its end.
//!
//! A claim reads of each lane as much as its limits give it, so it knows of each where its read ended and what it passed
//! over ([`LaneRead`]). Together with what became of the events that says up to where the lane has no fresh event once
//! the claim is settled ([`LaneEnd`]), which moves the lane's cursor (see `lane/marks.rs`). Plain data, made by whichever
//! thread reads or settles the claim; it never asks the database.

use crate::lane::marks;

/// What a claim's outcomes mean for one of its lanes, once they are settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneEnd {
    /// The lane.
    pub lane: i32,
    /// No fresh event is left in the lane up to here, of those that had appeared when it was read.
    pub reach: i64,
    /// The lane may have more to claim at once, as a limit of this claim cut it short or an event stays untouched.
    pub more: bool,
}

impl LaneEnd {
    /// For lanes of which nothing was found out.
    pub fn unmoved(lanes: &[i32]) -> Vec<LaneEnd> {
        lanes.iter().map(|&lane| LaneEnd { lane, reach: marks::BEGINNING, more: false }).collect()
    }
}

/// How a lane was read.
#[derive(Debug, Clone, Copy)]
pub(super) struct LaneRead {
    pub(super) lane: i32,
    /// The last fresh event read; `i64::MAX` when the read came to the end of the lane.
    pub(super) read_to: i64,
    /// The first fresh event passed over on the way there.
    pub(super) left_out: Option<i64>,
}

impl LaneRead {
    /// A limit cut the read of this lane short.
    pub(super) fn is_cut(&self) -> bool {
        self.read_to != i64::MAX
    }
}
