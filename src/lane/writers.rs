//! Which transactions may still commit events below what was read: the open writers, told by their lock on the sequence.
//!
//! `nextval` locks the sequence of `outboxes.seq` before it draws, once a transaction, and the transaction keeps the lock to
//! its end, through `ROLLBACK TO`, `PREPARE TRANSACTION` and a restart of the server. Claims and reads never take it. So the
//! holders of that lock are all who can still commit an event with a number that is drawn already.
//!
//! A [`WriterSample`] is read in a fixed order: first the server's life, then L, the sequence's last value, then the holders. A
//! writer that the sample before did not have drew all its numbers above *that* sample's L, which is its **floor**. (The L of
//! the same sample would be wrong: the writer may have drawn before it was read.) Nothing is known of when the writers of the first
//! sample began, nor of a prepared transaction that appears after a recovery: their floor is the mark that all instances share.
//!
//! A writer that only one sample has is *young*. Most are over before the next one, so nobody asks for them one by one.
//!
//! Plain data and pure decisions; [`Marks`](super::marks::Marks) owns the writers, on the claimer's thread.

use std::collections::BTreeMap;

/// One life of a server and of the sequence: another one may have forgotten what was settled in this one, as settles need
/// not have been on disk when the server crashed, nor have reached the standby that took over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct ServerLife {
    /// When the server was started; microseconds since 2000-01-01 UTC.
    pub started: i64,
    /// When its background writer's statistics began: also at every recovery from a crash of one of its processes.
    pub recovered: i64,
    /// The sequence's file: `TRUNCATE ... RESTART IDENTITY` and `ALTER SEQUENCE ... RESTART` give it another one.
    pub sequence_file: i64,
}

/// What an instance has seen of the writers at one moment. A sample that failed half way is none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct WriterSample {
    /// Where and when it was taken.
    pub life: ServerLife,
    /// L, the last value drawn, read before the writers.
    pub last_value: i64,
    /// Who holds the lock on the sequence, read after L.
    pub writers: Vec<OpenWriter>,
}

/// A transaction that has drawn a number and is open.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct OpenWriter {
    /// Its virtual transaction, which no other has while the server lives; `-1/` and a number once it is prepared.
    pub name: String,
    /// Its transaction id (of the whole, not of a savepoint), once it has one.
    pub xid: Option<u64>,
}

impl OpenWriter {
    fn is_prepared(&self) -> bool {
        self.name.starts_with("-1/")
    }
}

/// All numbers of a writer are above its floor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Floor {
    /// Nothing better is known than the lane's shared mark.
    SettledTo,
    /// A `seq`.
    At(i64),
}

impl Floor {
    /// The floor in a lane whose shared mark is `settled_to`.
    pub fn of(self, settled_to: i64) -> i64 {
        match self {
            Floor::SettledTo => settled_to,
            Floor::At(seq) => seq,
        }
    }
}

/// The lowest of several floors.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Lowest {
    settled_to: bool,
    at: Option<i64>,
}

impl Lowest {
    /// Counts this floor in.
    pub fn add(&mut self, floor: Floor) {
        match floor {
            Floor::SettledTo => self.settled_to = true,
            Floor::At(seq) => self.at = Some(self.at.map_or(seq, |at| at.min(seq))),
        }
    }

    /// The lowest floor in a lane whose shared mark is `settled_to`; `i64::MAX` where there is no writer.
    pub fn of(self, settled_to: i64) -> i64 {
        let at = self.at.unwrap_or(i64::MAX);
        if self.settled_to { at.min(settled_to) } else { at }
    }
}

/// What is known of an open writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Known {
    floor: Floor,
    xid: Option<u64>,
    young: bool,
}

/// The open writers, as the samples of one life of the server have shown them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct OpenWriters {
    known: BTreeMap<String, Known>,
    /// L of the last sample.
    last_value: Option<i64>,
}

impl OpenWriters {
    /// Takes in the next sample of the same life, and returns the floors of the writers that are over.
    pub fn observe(&mut self, sample: &WriterSample) -> Vec<Floor> {
        let mut before = std::mem::take(&mut self.known);
        for writer in &sample.writers {
            let known = match before.remove(&writer.name) {
                Some(known) => Known { young: false, xid: writer.xid.or(known.xid), ..known },
                None => self.newly_seen(writer, &mut before, &sample.writers),
            };
            self.known.insert(writer.name.clone(), known);
        }
        self.last_value = Some(sample.last_value);
        before.into_values().map(|known| known.floor).collect()
    }

    /// A writer by a name that the last sample did not have.
    fn newly_seen(
        &self,
        writer: &OpenWriter,
        before: &mut BTreeMap<String, Known>,
        now: &[OpenWriter],
    ) -> Known {
        let OpenWriter { xid, .. } = *writer;
        if writer.is_prepared() {
            // PREPARE TRANSACTION gives a transaction another name, and it keeps its id.
            let renamed = |(name, known): (&String, &Known)| {
                let gone = now.iter().all(|other| other.name != *name);
                (gone && xid.is_some() && known.xid == xid).then(|| name.clone())
            };
            let former = before.iter().find_map(renamed);
            if let Some(known) = former.and_then(|name| before.remove(&name)) {
                return Known { young: false, ..known };
            }
            return Known { floor: Floor::SettledTo, xid, young: true };
        }
        Known { floor: self.last_value.map_or(Floor::SettledTo, Floor::At), xid, young: true }
    }

    /// L of the last sample; `None` before the first.
    pub fn last_value(&self) -> Option<i64> {
        self.last_value
    }

    /// The lowest floor of all of them.
    pub fn lowest(&self) -> Lowest {
        lowest(self.known.values())
    }

    /// The lowest floor of those for whose end a read does not ask: the young ones, and those without an id.
    pub fn lowest_unasked(&self) -> Lowest {
        lowest(self.known.values().filter(|known| known.is_unasked()))
    }

    /// Those for whose end a read asks, at its own snapshot: id and floor.
    pub fn asked(&self) -> Vec<(u64, Floor)> {
        let asked = self.known.values().filter(|known| !known.is_unasked());
        asked.filter_map(|known| known.xid.map(|xid| (xid, known.floor))).collect()
    }
}

impl Known {
    fn is_unasked(&self) -> bool {
        self.young || self.xid.is_none()
    }
}

fn lowest<'k>(known: impl Iterator<Item = &'k Known>) -> Lowest {
    let mut lowest = Lowest::default();
    known.for_each(|known| lowest.add(known.floor));
    lowest
}
