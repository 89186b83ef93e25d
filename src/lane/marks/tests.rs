//! A model of the server, its writers and one instance, whose steps come in any order.
//!
//! Beside the right rules it runs each shortcut that looks as good, and must see it leave an event behind a cursor.

use std::collections::VecDeque;

use super::*;

/// Ways of doing it wrong that the model must see fail, beside the right one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    Right,
    NoHorizon,
    WritersBeforeLastSeq,
    PresentHorizon,
    PastWhatWasLeftOut,
    PastWhatWasUntouched,
    PreparedIsGone,
    KeptAfterCrash,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Fresh,
    Retry,
    Published,
}

#[derive(Debug, Clone)]
struct Row {
    seq: i64,
    key: u8,
    state: State,
}

#[derive(Debug)]
struct Transaction {
    name: u64,
    prepared: bool,
    rows: Vec<Row>,
}

/// A claim between its parts: begun, read, settled, and the news of it on their way.
#[derive(Debug)]
enum Claim {
    Begun { basis: Basis, from: i64 },
    Read { basis: Basis, rows: Vec<Row>, read_to: i64, left_out: Option<i64> },
    Settled { basis: Basis, reach: i64 },
}

/// PostgreSQL, its writers and one instance with two lanes; every step is one atomic thing that one of them does.
struct World {
    rule: Rule,
    random: fastrand::Rng,
    cursors: Cursors,
    seq: i64,
    names: u64,
    open: Vec<Transaction>,
    rows: Vec<Row>,
    /// The first half of a reading.
    half_read: Option<(i64, BTreeSet<OpenWriter>)>,
    /// The claim or look that holds each lane; a lane may be looked at while it is not claimed.
    claims: [Option<Claim>; 2],
    late_news: VecDeque<(i32, Basis, i64)>,
    /// Settled without waiting for the disk: what a crash may undo.
    unsynced: Vec<i64>,
    moved: u64,
}

fn lane_of(key: u8) -> usize {
    usize::from(key % 2)
}

impl World {
    fn new(rule: Rule, seed: u64) -> World {
        World {
            rule,
            random: fastrand::Rng::with_seed(seed),
            cursors: Cursors::default(),
            seq: 0,
            names: 0,
            open: Vec::new(),
            rows: Vec::new(),
            half_read: None,
            claims: [None, None],
            late_news: VecDeque::new(),
            unsynced: Vec::new(),
            moved: 0,
        }
    }

    fn step(&mut self) {
        match self.random.u8(0..100) {
            0..25 => self.write(),
            25..40 => self.end_a_transaction(),
            40..60 => self.read_half_a_horizon(),
            60..95 => {
                let lane = self.random.usize(0..2);
                self.go_on(lane);
            }
            95..97 => self.others_work(),
            97 => self.tell_late_news(),
            98 => self.unsynced.clear(),
            _ => {
                if self.random.u8(0..5) == 0 {
                    self.crash();
                }
            }
        }
    }

    /// The lock comes with the transaction, before its first draw.
    fn write(&mut self) {
        if self.open.len() < 3 && self.random.bool() {
            self.names += 1;
            self.open.push(Transaction { name: self.names, prepared: false, rows: Vec::new() });
        } else if let Some(at) = self.some_transaction()
            && !self.open[at].prepared
        {
            self.seq += 1;
            let row = Row { seq: self.seq, key: self.random.u8(0..4), state: State::Fresh };
            self.open[at].rows.push(row);
        }
    }

    fn some_transaction(&mut self) -> Option<usize> {
        (!self.open.is_empty()).then(|| self.random.usize(0..self.open.len()))
    }

    fn end_a_transaction(&mut self) {
        let Some(at) = self.some_transaction() else { return };
        match self.random.u8(0..10) {
            0 => drop(self.open.remove(at)),
            1..4 if !self.open[at].prepared => {
                self.names += 1;
                self.open[at].name = self.names;
                self.open[at].prepared = true;
            }
            _ => {
                let transaction = self.open.remove(at);
                self.rows.extend(transaction.rows);
            }
        }
    }

    fn writers(&self) -> BTreeSet<OpenWriter> {
        self.open
            .iter()
            .filter(|transaction| self.rule != Rule::PreparedIsGone || !transaction.prepared)
            .map(|transaction| OpenWriter {
                name: transaction.name.to_string(),
                prepared: transaction.prepared,
            })
            .collect()
    }

    fn read_half_a_horizon(&mut self) {
        match self.half_read.take() {
            None => self.half_read = Some((self.seq, self.writers())),
            Some((last_seq, _)) if self.rule != Rule::WritersBeforeLastSeq => {
                self.cursors.observe(HorizonReading { last_seq, writers: self.writers() });
            }
            Some((_, writers)) => self.cursors.observe(HorizonReading { last_seq: self.seq, writers }),
        }
    }

    fn basis(&self) -> Basis {
        let basis = self.cursors.basis();
        if self.rule == Rule::NoHorizon { Basis { horizon: i64::MAX, ..basis } } else { basis }
    }

    fn is_held(&self, row: &Row) -> bool {
        self.rows
            .iter()
            .any(|other| other.state == State::Retry && other.key == row.key && other.seq < row.seq)
    }

    /// The next part of the lane's claim.
    fn go_on(&mut self, lane: usize) {
        self.claims[lane] = match self.claims[lane].take() {
            None => Some(Claim::Begun { basis: self.basis(), from: self.cursors.at[lane] }),
            Some(Claim::Begun { basis, from }) => Some(self.read(lane, basis, from)),
            Some(Claim::Read { basis, rows, read_to, left_out }) => self.settle(&rows).map(|untouched| {
                let untouched = untouched.filter(|_| self.rule != Rule::PastWhatWasUntouched);
                let left_out = left_out.filter(|_| self.rule != Rule::PastWhatWasLeftOut);
                Claim::Settled { basis, reach: reach(read_to, left_out, untouched) }
            }),
            Some(Claim::Settled { basis, reach }) => {
                self.tell(i32::try_from(lane).unwrap(), basis, reach);
                None
            }
        };
    }

    fn read(&mut self, lane: usize, basis: Basis, from: i64) -> Claim {
        let mut fresh: Vec<Row> = self
            .rows
            .iter()
            .filter(|row| lane_of(row.key) == lane && row.state == State::Fresh && row.seq > from)
            .cloned()
            .collect();
        fresh.sort_by_key(|row| row.seq);
        let mut rows: Vec<Row> = fresh.iter().filter(|row| !self.is_held(row)).cloned().collect();
        let limit = self.random.usize(1..4);
        let cut = rows.len() >= limit;
        rows.truncate(limit);
        let read_to = if cut { rows.last().map_or(BEGINNING, |row| row.seq) } else { i64::MAX };
        let left_out =
            fresh.iter().find(|row| rows.iter().all(|read| read.seq != row.seq)).map(|row| row.seq);
        Claim::Read { basis, rows, read_to, left_out: left_out.filter(|seq| *seq <= read_to) }
    }

    /// Settles what was read, each event in some way, and returns the first untouched one; `None` is a release.
    fn settle(&mut self, rows: &[Row]) -> Option<Option<i64>> {
        if self.random.u8(0..8) == 0 {
            return None;
        }
        let mut untouched = None;
        let mut stopped: BTreeSet<u8> = BTreeSet::new();
        for read in rows {
            let state = match self.random.u8(0..10) {
                _ if stopped.contains(&read.key) => State::Fresh,
                0 => State::Fresh,
                1 => State::Retry,
                _ => State::Published,
            };
            if state != State::Published {
                stopped.insert(read.key);
            }
            if state == State::Fresh {
                untouched = untouched.or(Some(read.seq));
            }
            let row = self.rows.iter_mut().find(|row| row.seq == read.seq).unwrap();
            row.state = state;
            self.unsynced.push(read.seq);
        }
        Some(untouched)
    }

    fn tell(&mut self, lane: i32, basis: Basis, reach: i64) {
        if self.random.u8(0..4) == 0 {
            self.late_news.push_back((lane, basis, reach));
            return;
        }
        self.advance(lane, basis, reach);
    }

    fn tell_late_news(&mut self) {
        if let Some((lane, basis, reach)) = self.late_news.pop_front() {
            self.advance(lane, basis, reach);
        }
    }

    fn advance(&mut self, lane: i32, basis: Basis, reach: i64) {
        let basis = if self.rule == Rule::PresentHorizon { self.cursors.basis() } else { basis };
        self.moved += u64::from(self.cursors.advance(basis, lane, reach));
    }

    /// Another instance, or an operator, in a lane that nobody has claimed.
    fn others_work(&mut self) {
        let claimed = |lane: usize| matches!(self.claims[lane], Some(Claim::Read { .. }));
        let free: Vec<usize> =
            (0..self.rows.len()).filter(|&at| !claimed(lane_of(self.rows[at].key))).collect();
        if free.is_empty() {
            return;
        }
        let at = free[self.random.usize(0..free.len())];
        if self.rows[at].state == State::Retry || !self.is_held(&self.rows[at].clone()) {
            self.rows[at].state = State::Published;
        }
    }

    /// The server forgets settles that were not on disk and open transactions that were not prepared; the
    /// standby that takes over may have a sequence that is behind.
    fn crash(&mut self) {
        for seq in std::mem::take(&mut self.unsynced) {
            self.rows.iter_mut().find(|row| row.seq == seq).unwrap().state = State::Fresh;
        }
        self.open.retain(|transaction| transaction.prepared);
        let prepared = self.open.iter().flat_map(|transaction| &transaction.rows);
        self.seq = self.rows.iter().chain(prepared).map(|row| row.seq).max().unwrap_or(0);
        self.half_read = None;
        for (lane, claim) in self.claims.iter_mut().enumerate() {
            // What was settled before the crash may be told after it.
            if let Some(Claim::Settled { basis, reach }) = claim.take() {
                self.late_news.push_back((i32::try_from(lane).unwrap(), basis, reach));
            }
        }
        if self.rule != Rule::KeptAfterCrash {
            self.cursors.clear();
        }
    }

    /// What a cursor means: nothing at or below it is fresh, or can still become so.
    fn holds(&self) -> bool {
        let appearing = self.open.iter().flat_map(|transaction| &transaction.rows);
        self.rows
            .iter()
            .chain(appearing)
            .filter(|row| row.state == State::Fresh)
            .all(|row| row.seq > self.cursors.at[lane_of(row.key)])
    }
}

/// Runs many worlds; returns how many went wrong, and how often a cursor moved.
fn run(rule: Rule, worlds: u64) -> (u64, u64) {
    let (mut wrong, mut moved) = (0, 0);
    for seed in 0..worlds {
        let mut world = World::new(rule, seed);
        for step in 0..400 {
            world.step();
            if !world.holds() {
                assert!(
                    rule != Rule::Right,
                    "seed {seed}, step {step}: {:?} {:?}",
                    world.rows,
                    world.cursors.at
                );
                wrong += 1;
                break;
            }
        }
        moved += world.moved;
    }
    (wrong, moved)
}

#[test]
fn no_interleaving_leaves_a_fresh_event_behind_a_cursor() {
    let (wrong, moved) = run(Rule::Right, 2_000);
    assert_eq!(wrong, 0);
    assert!(moved > 10_000, "cursors that never move prove nothing: {moved}");
}

#[test]
fn each_shortcut_leaves_one_behind() {
    for rule in [
        Rule::NoHorizon,
        Rule::WritersBeforeLastSeq,
        Rule::PresentHorizon,
        Rule::PastWhatWasLeftOut,
        Rule::PastWhatWasUntouched,
        Rule::PreparedIsGone,
        Rule::KeptAfterCrash,
    ] {
        let (wrong, _) = run(rule, 2_000);
        assert!(wrong > 0, "{rule:?} was expected to go wrong");
    }
}

#[test]
fn a_long_writer_holds_the_horizon_back_and_others_do_not() {
    let writer = |name: &str| OpenWriter { name: name.into(), prepared: false };
    let mut cursors = Cursors::default();
    cursors.observe(HorizonReading { last_seq: 10, writers: [writer("a"), writer("b")].into() });
    cursors.observe(HorizonReading { last_seq: 20, writers: [writer("b"), writer("c")].into() });
    assert_eq!(cursors.horizon, BEGINNING, "b may still commit an event at or below 10");
    cursors.observe(HorizonReading { last_seq: 30, writers: [writer("c")].into() });
    assert_eq!(cursors.horizon, 10);
    cursors.observe(HorizonReading { last_seq: 40, writers: [].into() });
    assert_eq!(cursors.horizon, 40);
}

#[test]
fn news_from_before_a_clear_moves_nothing() {
    let mut cursors = Cursors::default();
    cursors.observe(HorizonReading { last_seq: 10, writers: [].into() });
    let basis = cursors.basis();
    cursors.advance(basis, 3, 7);
    assert_eq!(cursors.positions()[3], 7);
    cursors.advance(basis, 3, 5);
    assert_eq!(cursors.positions()[3], 7, "a cursor never goes back by itself");
    cursors.rewind();
    cursors.advance(basis, 3, 9);
    assert_eq!(cursors.positions()[3], BEGINNING);
    cursors.advance(cursors.basis(), 3, i64::MAX);
    assert_eq!(cursors.positions()[3], 10, "a rewind keeps the horizon");
    cursors.observe(HorizonReading { last_seq: 4, writers: [].into() });
    assert_eq!(cursors.positions(), &by_lane(BEGINNING), "a sequence that went back");
}
