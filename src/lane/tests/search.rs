//! How a run walks through the worlds of a scope: through all of them, or at random from a seed.

use std::collections::HashSet;
use std::hash::{Hash, Hasher};

use fastrand::Rng;

use super::broken::Broken;
use super::claim::{Claim, Phase};
use super::database::{Disk, Sequence, State};

use super::world::{Scope, Settle, Step, World};

/// More prepared transactions than that at a time show nothing new.
const PREPARED_MAX: usize = 2;

/// So many steps at random, and a copy comes to rest.
const REST_EVERY: usize = 100;
const NEWS: Step = Step::News { instance: 0, claim: 0 };

/// Steps that are possible, each with a weight for runs at random.
type Steps = Vec<(u32, Step)>;

impl World {
    /// Every step that can come next. At random, [`World::vary`] then chooses its details.
    fn steps(&self) -> Steps {
        let mut steps = Vec::new();
        (0..self.scope.slots).for_each(|slot| self.steps_of_writer(slot, &mut steps));
        for index in 0..self.database.prepared() {
            steps.extend([(2, Step::CommitPrepared { index }), (1, Step::AbortPrepared { index })]);
        }
        for instance in 0..self.instances.len() {
            self.steps_of_sample(instance, &mut steps);
            self.steps_of_claims(instance, &mut steps);
        }
        if self.scope.sweeps {
            self.steps_of_hand(&mut steps);
        }
        // Crashes are rare, or the marks would never have a past.
        steps.iter_mut().for_each(|(weight, _)| *weight *= 5);
        if self.scope.crashes {
            let server = Step::CrashServer { lost: 0, fails_over: false, sequence: Sequence::GoesOn };
            steps.push((1, server));
            steps.extend((0..self.instances.len()).map(|instance| (1, Step::CrashInstance { instance })));
        }
        steps
    }

    /// The steps of [`all`]: where nothing that comes between two of them could make a difference, they are one move. Reading
    /// L makes one only before a number is drawn; a settle follows its read at once, as it depends on nothing that changes;
    /// its news comes at once or after a sample was observed; a transaction begins with its first number. The instance is 0, and it has one claim at most.
    fn moves(&self) -> Vec<Vec<Step>> {
        let here = &self.instances[0];
        let mut moves = Vec::new();
        (0..self.scope.slots).for_each(|slot| self.moves_of_writer(slot, &mut moves));
        let mut samples = vec![vec![Step::SampleRest { instance: 0 }]];
        if here.half.is_none() {
            samples[0].insert(0, Step::Sample { instance: 0 });
            samples.push(vec![Step::Sample { instance: 0 }, Step::SampleFails { instance: 0 }]);
        }
        for mut sample in samples {
            sample.push(Step::Observe { instance: 0 });
            if here.claims.first().is_some_and(|claim| claim.phase == Phase::Ended) {
                moves.push([&sample[..], &[NEWS]].concat());
            }
            moves.push(sample);
        }
        match here.claims.first().map(|claim| claim.phase) {
            None => {
                let [instance, claim] = [0, 0];
                moves.push(vec![Step::Take { instance, lanes: 1 }, Step::Lock { instance, claim }]);
            }
            Some(Phase::Locked) => self.moves_of_claim(&mut moves),
            Some(_) => {}
        }
        moves
    }

    fn moves_of_writer(&self, slot: usize, moves: &mut Vec<Vec<Step>>) {
        let reads_last_value = self.instances[0].half.is_none();
        let mut steps = Vec::new();
        self.steps_of_writer(slot, &mut steps);
        for (_, step) in steps {
            match step {
                Step::Insert { .. } => {}
                Step::Commit { .. } => {
                    let unused = self.database.slots[slot].iter().flat_map(|open| &open.unused);
                    let inserts = unused.map(|_| Step::Insert { slot, key: 0 });
                    moves.push(inserts.chain([step]).collect());
                }
                Step::Begin { .. } | Step::Draw { .. } => {
                    let draw: Vec<_> = match step {
                        Step::Begin { .. } => vec![step, Step::Draw { slot }],
                        _ => vec![step],
                    };
                    if reads_last_value {
                        moves.push([&[Step::Sample { instance: 0 }], &draw[..]].concat());
                    }
                    moves.push(draw);
                }
                _ => moves.push(vec![step]),
            }
        }
    }

    fn moves_of_claim(&self, moves: &mut Vec<Vec<Step>>) {
        let [instance, claim] = [0, 0];
        moves.push(vec![Step::Release { instance, claim }, NEWS]);
        for &bound in self.scope.bounds {
            let read = Step::Read { instance, claim, bound, due: true };
            let mut then = self.clone();
            then.read(instance, claim, bound, true);
            let now = &then.instances[instance].claims[claim];
            if now.phase == Phase::Locked {
                moves.push(vec![read]);
                continue;
            }
            for how in settles(now) {
                let settle = Step::Settle { instance, claim, how };
                moves.extend([vec![read, settle], vec![read, settle, NEWS]]);
            }
        }
    }

    fn steps_of_writer(&self, slot: usize, steps: &mut Steps) {
        let Some(transaction) = &self.database.slots[slot] else {
            // Slots are alike: the first one that is free stands for all.
            let is_free = |&slot: &usize| {
                self.database.slots[slot].is_none() && self.database.begun(slot) < self.scope.transactions
            };
            if (0..self.scope.slots).find(is_free) == Some(slot) {
                steps.push((12, Step::Begin { slot }));
            }
            return;
        };
        if transaction.draws < self.scope.draws {
            steps.push((8, Step::Draw { slot }));
        }
        if transaction.xid.is_none() {
            steps.push((2, Step::GetXid { slot }));
        }
        if !transaction.unused.is_empty() {
            steps.push((12, Step::Insert { slot, key: 0 }));
        }
        steps.extend([(6, Step::Commit { slot, disk: Disk::Waits }), (1, Step::Abort { slot })]);
        if self.scope.crashes {
            steps.push((3, Step::Commit { slot, disk: Disk::Later }));
        }
        if self.scope.prepares && transaction.xid.is_some() && self.database.prepared() < PREPARED_MAX {
            steps.push((2, Step::Prepare { slot }));
        }
    }

    fn steps_of_sample(&self, instance: usize, steps: &mut Steps) {
        let here = &self.instances[instance];
        if here.half.is_some() {
            steps.extend([(10, Step::SampleRest { instance }), (1, Step::SampleFails { instance })]);
        } else if here.sample.is_none() {
            steps.push((8, Step::Sample { instance }));
        } else if !here.is_busy() {
            steps.push((8, Step::Observe { instance }));
        }
    }

    fn steps_of_claims(&self, instance: usize, steps: &mut Steps) {
        let here = &self.instances[instance];
        if !here.is_busy() {
            for lanes in 1..1 << self.scope.lanes {
                if (0..self.scope.lanes).all(|lane| lanes >> lane & 1 == 0 || !self.has_claim(instance, lane))
                {
                    steps.push((6, Step::Take { instance, lanes }));
                }
            }
            if self.scope.looks {
                steps.extend((0..self.scope.lanes).map(|lane| (2, Step::Look { instance, lane })));
            }
        }
        for (claim, now) in here.claims.iter().enumerate() {
            match now.phase {
                Phase::Taken => steps.push((12, Step::Lock { instance, claim })),
                Phase::Locked => {
                    for &bound in self.scope.bounds {
                        steps.push((10, Step::Read { instance, claim, bound, due: true }));
                    }
                }
                Phase::Read => {
                    for how in settles(now) {
                        steps.push((3, Step::Settle { instance, claim, how }));
                    }
                    if now.reads_on < self.scope.reads_on {
                        steps.push((6, Step::ReadOn { instance, claim }));
                    }
                }
                Phase::Ended => {
                    if !here.is_busy() {
                        steps.push((8, Step::News { instance, claim }));
                    }
                }
            }
            if matches!(now.phase, Phase::Locked | Phase::Read) {
                steps.push((2, Step::Release { instance, claim }));
            }
        }
    }

    /// The instance has not heard yet of the end of a claim of the lane.
    fn has_claim(&self, instance: usize, lane: usize) -> bool {
        let mut claims = self.instances[instance].claims.iter();
        let waits = !self.is_broken(Broken::NewsFirst);
        claims.any(|claim| (waits || claim.phase != Phase::Ended) && claim.has(lane))
    }

    fn steps_of_hand(&self, steps: &mut Steps) {
        for lane in (0..self.scope.lanes).filter(|lane| self.locks[*lane].is_none()) {
            for instance in 0..self.instances.len() {
                steps.push((2, Step::Sweep { instance, lane }));
            }
            let dead = self.database.in_lane(lane).filter(|row| row.state == State::Dead);
            steps.extend(dead.map(|row| (1, Step::Revive { seq: row.seq })));
        }
        let mut published = self.database.rows().iter().filter(|row| row.state == State::Published);
        if let Some(row) = published.next_back() {
            steps.push((1, Step::SetBack { seq: row.seq }));
        }
    }

    /// Chooses the details of a step.
    fn vary(&self, step: Step, rng: &mut Rng) -> Step {
        match step {
            Step::Insert { slot, .. } => Step::Insert { slot, key: rng.u8(..self.scope.keys) },
            Step::Read { instance, claim, bound, .. } => {
                Step::Read { instance, claim, bound, due: rng.bool() }
            }
            Step::Settle { instance, claim, how } => {
                let fails = rng.u8(..3) == 0;
                let how = Settle {
                    sent: if rng.bool() { usize::MAX } else { how.sent },
                    failed: if fails { rng.u32(..) } else { 0 },
                    failed_is: if rng.u8(..4) == 0 { State::Dead } else { State::Retry },
                    room: rng.u8(..5) > 0,
                    answered: rng.u8(..20) > 0,
                    ..how
                };
                Step::Settle { instance, claim, how }
            }
            Step::SetBack { seq } => {
                let rows = self.database.rows().iter().filter(|row| row.state == State::Published);
                let seqs: Vec<_> = rows.map(|row| row.seq).collect();
                Step::SetBack { seq: rng.choice(seqs).unwrap_or(seq) }
            }
            Step::CrashServer { .. } => {
                let sequence = if rng.bool() { Sequence::GoesOn } else { Sequence::GoesBack };
                Step::CrashServer { lost: rng.usize(..4), fails_over: rng.bool(), sequence }
            }
            step => step,
        }
    }
}

/// How a claim can be settled in which nothing fails.
fn settles(claim: &Claim) -> Vec<Settle> {
    let events = claim.parts.iter().map(|part| part.events.len()).sum();
    let all = (0..=events).map(|sent| Settle { sent, ..Settle::ALL });
    all.flat_map(|how| [how, Settle { marks: false, ..how }]).collect()
}

/// A run that broke a promise.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) promise: String,
    pub(super) steps: Vec<Step>,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.steps.iter().try_for_each(|step| writeln!(f, "  {step:?}"))?;
        write!(f, "{}", self.promise)
    }
}

/// All interleavings of a scope with one instance and one lane, depth first. Returns how many different states there are.
pub(super) fn all(scope: Scope) -> Result<usize, Box<Failure>> {
    let start = World::new(scope);
    let mut visited = HashSet::from([fingerprint(&start)]);
    // By state: the state before it, and the steps between them.
    let mut ways: Vec<(usize, Vec<Step>)> = vec![(0, Vec::new())];
    let mut open = vec![(start, 0)];
    while let Some((world, at)) = open.pop() {
        let fail = |promise, last: &[Step]| {
            let (mut steps, mut at) = (vec![last], at);
            while at > 0 {
                steps.push(&ways[at].1);
                at = ways[at].0;
            }
            Box::new(Failure { promise, steps: steps.into_iter().rev().flatten().copied().collect() })
        };
        if world.is_at_rest() {
            world.check_rest().map_err(|promise| fail(promise, &[]))?;
        }
        let mut found = Vec::new();
        for steps in world.moves() {
            let mut next = world.clone();
            for (number, step) in steps.iter().enumerate() {
                next.apply(*step).map_err(|promise| fail(promise, &steps[..=number]))?;
            }
            if visited.insert(fingerprint(&next)) {
                next.check_all().map_err(|promise| fail(promise, &steps))?;
                found.push((next, steps));
            }
        }
        for (next, steps) in found {
            ways.push((at, steps));
            open.push((next, ways.len() - 1));
        }
    }
    Ok(visited.len())
}

/// A run at random; it comes to rest now and then.
pub(super) fn random(scope: Scope, seed: u64, steps: usize) -> Result<(), Box<Failure>> {
    let mut rng = Rng::with_seed(seed);
    let mut world = World::new(scope);
    let mut done = Vec::new();
    for number in 1..=steps {
        let possible = world.steps();
        let weights: u32 = possible.iter().map(|(weight, _)| weight).sum();
        let mut choice = rng.u32(..weights);
        let mut chosen = possible.iter().skip_while(|(weight, _)| {
            let passes = choice >= *weight;
            choice = choice.saturating_sub(*weight);
            passes
        });
        let Some(&(_, step)) = chosen.next() else { break };
        let step = world.vary(step, &mut rng);
        done.push(step);
        let promise = world
            .step(step)
            .and_then(|()| if number % REST_EVERY == 0 { world.check_rest() } else { Ok(()) });
        if let Err(promise) = promise {
            return Err(Box::new(Failure { promise, steps: done }));
        }
    }
    Ok(())
}

/// Leaves out of a failure what it does not need.
pub(super) fn shortest(scope: Scope, mut failure: Failure) -> Failure {
    let mut tried = failure.steps.len();
    while tried > 0 {
        tried -= 1;
        let mut steps = failure.steps.clone();
        steps.remove(tried);
        if let Some(shorter) = replay(scope, &steps).err() {
            tried = tried.min(shorter.steps.len());
            failure = shorter;
        }
    }
    failure
}

/// Does these steps, but for those that are not possible, and comes to rest.
pub(super) fn replay(scope: Scope, steps: &[Step]) -> Result<(), Failure> {
    let mut world = World::new(scope);
    let mut done = Vec::new();
    for &step in steps {
        if world.steps().iter().all(|(_, possible)| possible.kind() != step.kind()) {
            continue;
        }
        done.push(step);
        world.step(step).map_err(|promise| Failure { promise, steps: done.clone() })?;
    }
    world.check_rest().map_err(|promise| Failure { promise, steps: done })
}

impl Step {
    /// Without the details that [`World::vary`] chooses.
    fn kind(self) -> Step {
        match self {
            Step::Insert { slot, .. } => Step::Insert { slot, key: 0 },
            Step::Read { instance, claim, .. } => Step::Read { instance, claim, bound: 0, due: true },
            Step::Settle { instance, claim, .. } => Step::Settle { instance, claim, how: Settle::ALL },
            Step::SetBack { .. } => Step::SetBack { seq: 0 },
            Step::CrashServer { .. } => {
                Step::CrashServer { lost: 0, fails_over: false, sequence: Sequence::GoesOn }
            }
            step => step,
        }
    }
}

impl World {
    fn is_at_rest(&self) -> bool {
        self.database.open().next().is_none() && self.instances.iter().all(|here| here.claims.is_empty())
    }
}

/// A hash of a state that stands for it.
pub(super) fn fingerprint(of: &impl Hash) -> u64 {
    let mut mixer = Mixer(0);
    of.hash(&mut mixer);
    mixer.finish()
}

/// Fast in a build without optimisation, and mixes well enough for some million states.
struct Mixer(u64);

impl Mixer {
    fn mix(&mut self, value: u64) {
        let product = u128::from(self.0 ^ value ^ 0x9e37_79b9_7f4a_7c15) * 0xd6e8_feb8_6659_fd93_u128;
        self.0 = (product as u64) ^ ((product >> 64) as u64);
    }
}

impl Hasher for Mixer {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.mix(u64::from_le_bytes(word));
        }
        self.mix(bytes.len() as u64);
    }

    fn write_u8(&mut self, value: u8) {
        self.mix(value.into());
    }

    fn write_u32(&mut self, value: u32) {
        self.mix(value.into());
    }

    fn write_u64(&mut self, value: u64) {
        self.mix(value);
    }

    fn write_i64(&mut self, value: i64) {
        self.mix(value as u64);
    }

    fn write_usize(&mut self, value: usize) {
        self.mix(value as u64);
    }

    fn write_isize(&mut self, value: isize) {
        self.mix(value as u64);
    }
}
