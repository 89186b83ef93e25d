//! The world of the model: a database, writers and instances, and every step that one of them can do next.
//!
//! A step is atomic; between two of them anything else may happen, but for what the claimer's thread waits for. The steps of
//! claims are in `claim.rs`. Left out: what NATS does with events that a crash makes fresh again, as deduplication drops
//! those.

use super::broken::{Broken, Own};
use super::claim::Phase;
use super::database::{Database, Disk, Row, Sequence, State, Transaction};
use super::instance::Instance;
use crate::lane::writers::{OpenWriter, WriterSample as Sample};

/// What a run has in it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scope {
    pub(super) broken: Broken,
    pub(super) instances: usize,
    pub(super) lanes: usize,
    pub(super) keys: u8,
    /// Writers at a time, transactions of each, and numbers of a transaction.
    pub(super) slots: usize,
    pub(super) transactions: u32,
    pub(super) draws: usize,
    /// Index entries that a read walks at most.
    pub(super) bounds: &'static [usize],
    /// How often a claim reads on.
    pub(super) reads_on: usize,
    pub(super) looks: bool,
    pub(super) prepares: bool,
    pub(super) crashes: bool,
    pub(super) sweeps: bool,
    pub(super) dead_blocks: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Begin { slot: usize },
    Draw { slot: usize },
    GetXid { slot: usize },
    Insert { slot: usize, key: u8 },
    Commit { slot: usize, disk: Disk },
    Abort { slot: usize },
    Prepare { slot: usize },
    CommitPrepared { index: usize },
    AbortPrepared { index: usize },
    Sample { instance: usize },
    SampleRest { instance: usize },
    SampleFails { instance: usize },
    Observe { instance: usize },
    Take { instance: usize, lanes: usize },
    Lock { instance: usize, claim: usize },
    Read { instance: usize, claim: usize, bound: usize, due: bool },
    ReadOn { instance: usize, claim: usize },
    Settle { instance: usize, claim: usize, how: Settle },
    Release { instance: usize, claim: usize },
    News { instance: usize, claim: usize },
    Look { instance: usize, lane: usize },
    Sweep { instance: usize, lane: usize },
    SetBack { seq: i64 },
    Revive { seq: i64 },
    CrashInstance { instance: usize },
    CrashServer { lost: usize, fails_over: bool, sequence: Sequence },
}

/// How a claim ends that is committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Settle {
    /// So many of its events were sent.
    pub(super) sent: usize,
    /// By bit: those of them that failed, and will be tried again or are dead.
    pub(super) failed: u32,
    pub(super) failed_is: State,
    /// It writes `settled_to`.
    pub(super) marks: bool,
    /// There is room for keys that are left out.
    pub(super) room: bool,
    /// The answer to its commit arrives.
    pub(super) answered: bool,
}

#[derive(Debug, Clone)]
pub(super) struct World {
    pub(super) scope: Scope,
    pub(super) database: Database,
    /// By lane: the instance that has locked it.
    pub(super) locks: Vec<Option<usize>>,
    pub(super) instances: Vec<Instance>,
    /// What the last whole sample had, for the rule that a floor is of the sample before.
    last_writers: Vec<OpenWriter>,
}

impl std::hash::Hash for World {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        (&self.database, &self.locks, &self.instances, &self.last_writers).hash(state);
    }
}

impl World {
    pub(super) fn new(scope: Scope) -> World {
        World {
            scope,
            database: Database::new(scope.lanes, scope.slots, scope.crashes),
            locks: vec![None; scope.lanes],
            instances: vec![Instance::new(scope.lanes, Own::new(scope.broken)); scope.instances],
            last_writers: Vec::new(),
        }
    }

    pub(super) fn is_broken(&self, broken: Broken) -> bool {
        self.scope.broken == broken
    }

    /// Does a step that is possible, and checks what it may have broken: an error says which promise.
    pub(super) fn step(&mut self, step: Step) -> Result<(), String> {
        self.apply(step)?;
        self.check(step)
    }

    /// Checks no more than the order of what is published.
    pub(super) fn apply(&mut self, step: Step) -> Result<(), String> {
        match step {
            Step::Begin { slot } => self.database.begin(slot),
            Step::Draw { slot } => self.database.draw(slot),
            Step::GetXid { slot } => self.database.get_xid(slot),
            Step::Insert { slot, key } => self.database.insert(slot, key),
            Step::Commit { slot, disk } => self.database.commit(slot, disk),
            Step::Abort { slot } => self.database.abort(slot),
            Step::Prepare { slot } => self.database.prepare(slot),
            Step::CommitPrepared { index } => self.database.commit_prepared(index),
            Step::AbortPrepared { index } => self.database.abort_prepared(index),
            Step::Sample { instance } => self.sample(instance),
            Step::SampleRest { instance } => self.sample_rest(instance),
            Step::SampleFails { instance } => self.sample_fails(instance),
            Step::Observe { instance } => self.observe(instance),
            Step::Take { instance, lanes } => self.take(instance, lanes),
            Step::Lock { instance, claim } => self.lock(instance, claim),
            Step::Read { instance, claim, bound, due } => self.read(instance, claim, bound, due),
            Step::ReadOn { instance, claim } => self.read_on(instance, claim),
            Step::Settle { instance, claim, how } => self.settle(instance, claim, how)?,
            Step::Release { instance, claim } => self.release(instance, claim),
            Step::News { instance, claim } => self.news(instance, claim),
            Step::Look { instance, lane } => self.look(instance, lane),
            Step::Sweep { instance, lane } => self.sweep(instance, lane),
            Step::SetBack { seq } => self.set_back(seq),
            Step::Revive { seq } => self.revive(seq),
            Step::CrashInstance { instance } => self.crash_instance(instance),
            Step::CrashServer { lost, fails_over, sequence } => {
                self.crash_server(lost, fails_over, sequence);
            }
        }
        Ok(())
    }

    fn writers(&self) -> Vec<OpenWriter> {
        let mut writers: Vec<_> = self.database.open().map(Transaction::as_sampled).collect();
        writers.sort_by(|a, b| a.name.cmp(&b.name));
        writers
    }

    /// The first half of a sample: the server's life and L.
    fn sample(&mut self, instance: usize) {
        let mut half = Sample { life: self.database.life, ..Sample::default() };
        if self.is_broken(Broken::LastValueFirst) {
            half.writers = self.writers();
        } else {
            half.last_value = self.database.sequence();
        }
        self.instances[instance].half = Some(half);
    }

    /// The second: the writers.
    fn sample_rest(&mut self, instance: usize) {
        let Some(mut sample) = self.instances[instance].half.take() else { return };
        if self.is_broken(Broken::LastValueFirst) {
            sample.last_value = self.database.sequence();
        } else {
            sample.writers = self.writers();
        }
        self.instances[instance].sample = Some(sample);
    }

    fn sample_fails(&mut self, instance: usize) {
        let half = self.instances[instance].half.take();
        if self.is_broken(Broken::WholeSample) {
            self.instances[instance].sample = half;
        }
    }

    fn observe(&mut self, instance: usize) {
        let Some(sample) = self.instances[instance].sample.take() else { return };
        let (broken, before) = (self.scope.broken, std::mem::take(&mut self.last_writers));
        if broken == Broken::FloorOfSampleBefore {
            self.last_writers.clone_from(&sample.writers);
        }
        self.instances[instance].change(|memory| memory.observe(sample, broken, &before));
    }

    /// What every claim and look asks in its own transaction: whether the server is the one that the marks are of. If it is
    /// not, they are forgotten.
    pub(super) fn is_of_other_life(&mut self, instance: usize) -> bool {
        if self.is_broken(Broken::Life) || self.is_broken(Broken::LifeOfClaim) {
            return false;
        }
        let life = self.database.life;
        let is_other = self.instances[instance].memory().marks.is_other_life(life);
        self.instances[instance].change(|memory| {
            if is_other {
                memory.forget();
            }
            memory.marks.belong_to(life);
        });
        is_other
    }

    fn look(&mut self, instance: usize, lane: usize) {
        if self.is_of_other_life(instance) {
            return;
        }
        let from = self.instances[instance].memory().look_from(lane);
        let fresh = |row: &Row| row.state == State::Fresh && row.seq > from;
        let finds_nothing = !self.database.in_lane(lane).any(fresh);
        let late = self.is_broken(Broken::LookAtOnce);
        let here = &mut self.instances[instance];
        let before = here.looked.take();
        let told = if late { before } else { finds_nothing.then_some(lane) };
        if let Some(lane) = told {
            here.change(|memory| memory.looked(lane));
        } else if finds_nothing {
            here.looked = late.then_some(lane);
        }
    }

    /// The sweep of an instance has found a pending row of the lane below a mark, which nothing holds.
    fn sweep(&mut self, instance: usize, lane: usize) {
        let row = self.database.lanes()[lane];
        let mark = self.instances[instance].memory().look_from(lane).max(row.settled_to);
        let find = |row: &&Row| {
            let held = self.database.is_held(row.key, row.seq, self.scope.dead_blocks);
            row.state == State::Fresh && row.seq <= mark && !held
        };
        let Some(seq) = self.database.in_lane(lane).find(find).map(|row| row.seq) else { return };
        let row = self.database.lane(lane);
        row.settled_to = row.settled_to.min(seq - 1);
        row.sweeps += 1;
        self.database.committed(Disk::Later);
    }

    fn set_back(&mut self, seq: i64) {
        if let Some(row) = self.database.row(seq) {
            (row.state, row.by_hand) = (State::Fresh, true);
        }
        self.database.committed(Disk::Waits);
    }

    /// An operator revives a dead letter.
    pub(super) fn revive(&mut self, seq: i64) {
        if let Some(row) = self.database.row(seq) {
            row.state = State::Retry;
        }
        self.database.committed(Disk::Waits);
    }

    pub(super) fn crash_instance(&mut self, instance: usize) {
        for claim in (0..self.instances[instance].claims.len()).rev() {
            if !matches!(self.instances[instance].claims[claim].phase, Phase::Taken | Phase::Ended) {
                self.release(instance, claim);
            }
        }
        self.instances[instance] = Instance::new(self.scope.lanes, Own::new(self.scope.broken));
    }

    fn crash_server(&mut self, lost: usize, fails_over: bool, sequence: Sequence) {
        for instance in 0..self.instances.len() {
            self.instances[instance].half = None;
            // What was about to lock has no connection.
            self.instances[instance].claims.retain(|claim| claim.phase != Phase::Taken);
            for claim in 0..self.instances[instance].claims.len() {
                if self.instances[instance].claims[claim].phase != Phase::Ended {
                    self.release(instance, claim);
                }
            }
        }
        self.database.crash(lost, fails_over, sequence);
    }
}
