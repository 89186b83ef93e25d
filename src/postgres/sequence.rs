//! What can be wrong with the sequence behind `outboxes.seq`, which reads rely on, and what mends it.
//!
//! Where a read begins rests on the last number drawn, and on the lock that drawing takes (`lane/writers.rs`). With another
//! kind of sequence nothing is lost: reads would begin far below, or events be found late, by the sweep alone. So it is said
//! at the start of the daemon and by `check`, rather than borne. An adoption mends what a statement mends that changes no
//! number, and refuses the rest in words. Plain data; whoever has a session asks `sequence_faults.sql`.

use postgres::Row;

use super::StoreError;
use super::query::Query;

pub(super) const SEQUENCE_FAULTS: Query = query!("sequence_faults");

/// One thing that is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SequenceFault {
    /// What.
    pub(super) kind: FaultKind,
    /// The sequence, quoted where it must be; where `seq` has none of its own, the one that it draws from, if any.
    pub(super) sequence: Option<String>,
}

/// What can be wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FaultKind {
    /// `seq` has no sequence of its own.
    Missing,
    /// It has one, and draws from another one or from none.
    Elsewhere,
    /// It counts down.
    Falling,
    /// Sessions draw numbers in advance.
    Cached,
    /// It begins again at its end.
    Cycling,
}

impl SequenceFault {
    /// A row of `sequence_faults.sql`.
    pub(super) fn read(row: &Row) -> Result<SequenceFault, StoreError> {
        let sql = |error: postgres::Error| StoreError::from(&error);
        let name: String = row.try_get(0).map_err(sql)?;
        let kind = match name.as_str() {
            "missing" => FaultKind::Missing,
            "elsewhere" => FaultKind::Elsewhere,
            "falling" => FaultKind::Falling,
            "cached" => FaultKind::Cached,
            "cycling" => FaultKind::Cycling,
            other => return Err(StoreError::refused(format!("sequence_faults answered {other:?}"))),
        };
        Ok(SequenceFault { kind, sequence: row.try_get(1).map_err(sql)? })
    }

    /// What is wrong, and what to do where no statement of ours mends it.
    pub(super) fn problem(&self) -> String {
        let sequence = self.sequence.as_deref().unwrap_or("outboxes_seq_seq");
        match (self.kind, &self.sequence) {
            (FaultKind::Missing, Some(_)) => format!(
                "seq draws from sequence {sequence}, which is not its own: ALTER SEQUENCE {sequence} OWNED BY outboxes.seq"
            ),
            (FaultKind::Missing, None) => format!(
                "seq has no sequence of its own: CREATE SEQUENCE {sequence} OWNED BY outboxes.seq, set it to the highest seq, \
                 and make it the default"
            ),
            (FaultKind::Elsewhere, _) => format!(
                "seq does not draw from its own sequence {sequence}: set it to the highest seq, and make nextval('{sequence}') \
                 the default"
            ),
            (FaultKind::Falling, _) => format!(
                "sequence {sequence} counts down, and events are published in the order of rising seq: ALTER SEQUENCE \
                 {sequence} INCREMENT 1, and set it to the highest seq"
            ),
            (FaultKind::Cached, _) => {
                format!(
                    "sequence {sequence} has a CACHE: sessions draw numbers in advance, and events appear out of order"
                )
            }
            (FaultKind::Cycling, _) => {
                format!(
                    "sequence {sequence} has CYCLE: at its end numbers would begin anew, and pass those before them"
                )
            }
        }
    }

    /// What an adoption does about it: the step in words, and the statement. `None`: it refuses.
    pub(super) fn mending(&self) -> Option<(String, String)> {
        let sequence = self.sequence.as_deref()?;
        match self.kind {
            FaultKind::Cached => Some((
                format!("have sequence {sequence} give out numbers one by one"),
                format!("ALTER SEQUENCE {sequence} CACHE 1"),
            )),
            FaultKind::Cycling => Some((
                format!("have sequence {sequence} end at its end"),
                format!("ALTER SEQUENCE {sequence} NO CYCLE"),
            )),
            FaultKind::Missing | FaultKind::Elsewhere | FaultKind::Falling => None,
        }
    }
}
