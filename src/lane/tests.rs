//! The model of the claim's protocol: the real [`Marks`], with a small database, writers, samples and claims around them,
//! in all orders of their steps, or in many.
//!
//! - [`database`]: rows, the sequence, open and prepared transactions, what a crash may undo.
//! - [`instance`], [`claim`], [`world`]: what an instance keeps, and every step that somebody can do next.
//! - [`check`]: the promises. Nothing is lost, the order of a key is kept, `settled_to` passes nothing that is pending.
//! - [`search`]: all interleavings with a set of the states that were visited, and runs at random, from seeds.
//! - [`broken`]: the rules, each of which is left out in turn; without any of them some run breaks a promise.
//!
//! What it leaves out: time, sizes, and everything whose end is to be found by the sweep (numbers that were not drawn here)
//! or by a look at the sequence (`TRUNCATE ... RESTART IDENTITY`, where the shared marks are reset).

mod broken;
mod check;
mod claim;
mod database;
mod instance;
mod search;
mod world;

use std::sync::Arc;
use std::time::Instant;

use broken::Broken;
use database::Disk;
use search::{Failure, all, random, replay, shortest};
use world::{Scope, Settle, Step};

use super::marks::{BEGINNING, LaneEnd, LaneRow, Marks, Seen};
use super::writers::{OpenWriter, ServerLife, WriterSample as Sample};

/// Steps of a run at random.
const STEPS: usize = 400;

/// Two writers with a number each, and one instance.
const TWO_WRITERS: Scope = Scope {
    broken: Broken::Nothing,
    instances: 1,
    lanes: 1,
    keys: 1,
    slots: 2,
    transactions: 1,
    draws: 1,
    bounds: &[1, 9],
    reads_on: 0,
    looks: false,
    prepares: false,
    crashes: false,
    sweeps: false,
    dead_blocks: false,
};

/// One writer with two transactions, one after the other.
const ONE_WRITER_TWICE: Scope = Scope { slots: 1, transactions: 2, ..TWO_WRITERS };

/// A transaction with two numbers.
const TWO_NUMBERS: Scope = Scope { slots: 1, draws: 2, ..TWO_WRITERS };

/// Three writers and one instance, without faults.
const QUIET: Scope = Scope {
    keys: 2,
    slots: 3,
    transactions: u32::MAX,
    draws: 2,
    bounds: &[1, 2, 9],
    reads_on: 1,
    looks: true,
    ..TWO_WRITERS
};

/// Three writers, two instances, two lanes, and everything that can happen to them.
const WILD: Scope = Scope {
    instances: 2,
    lanes: 2,
    keys: 4,
    bounds: &[1, 2, 3, 9],
    prepares: true,
    crashes: true,
    sweeps: true,
    dead_blocks: true,
    ..QUIET
};

/// Two writers and one instance whose server crashes often.
const STORMY: Scope = Scope { keys: 2, slots: 2, looks: true, crashes: true, sweeps: true, ..QUIET };

/// The first of these seeds whose run breaks a promise, with the steps that it takes.
fn first_failure(scope: Scope, seeds: u64) -> Option<Failure> {
    (0..seeds).find_map(|seed| random(scope, seed, STEPS).err()).map(|failure| *failure)
}

#[test]
fn two_writers_and_an_instance_keep_the_promises_in_all_orders() {
    let scopes = [
        ("two writers", TWO_WRITERS),
        ("one writer, twice", ONE_WRITER_TWICE),
        ("one writer, two numbers", TWO_NUMBERS),
    ];
    for (name, scope) in scopes {
        let begin = Instant::now();
        match all(scope) {
            Ok(states) => println!("{name}: {states} states in {:.1?}", begin.elapsed()),
            Err(failure) => panic!("{name}:\n{failure}"),
        }
    }
}

#[test]
fn many_writers_and_instances_keep_the_promises_in_random_orders() {
    let dead_let_go = Scope { dead_blocks: false, ..WILD };
    for (name, scope, seeds) in [
        ("quiet", QUIET, 1_000),
        ("wild", WILD, 2_000),
        ("stormy", STORMY, 1_000),
        ("dead letters let their key go on", dead_let_go, 500),
    ] {
        let begin = Instant::now();
        if let Some(failure) = first_failure(scope, seeds) {
            panic!("{name}:\n{}", shortest(scope, failure));
        }
        println!("{name}: {seeds} runs of {STEPS} steps in {:.1?}", begin.elapsed());
    }
}

#[test]
fn without_any_of_the_rules_a_promise_is_broken() {
    const LOST: &str = "is lost";
    const OVERTAKES: &str = "overtakes";
    const PASSES: &str = "passes";
    let in_all_orders = [
        (Broken::Fall, LOST),
        (Broken::ReadAgain, OVERTAKES),
        (Broken::EndOfRead, LOST),
        (Broken::Unsettled, LOST),
        (Broken::LastValue, LOST),
        (Broken::Unasked, OVERTAKES),
        (Broken::FellMeanwhile, LOST),
        (Broken::AllFloors, PASSES),
        (Broken::LastValueFirst, PASSES),
        (Broken::FloorOfSampleBefore, PASSES),
        (Broken::WithoutXid, PASSES),
        (Broken::WholeSample, PASSES),
    ];
    let at_random = [
        (Broken::SampleTakenAlong, WILD),
        (Broken::Sweeps, WILD),
        (Broken::PreparedIsOld, WILD),
        (Broken::Life, WILD),
        (Broken::LifeOfClaim, WILD),
        (Broken::Remember, QUIET),
        (Broken::Free, WILD),
        (Broken::BelowLeftOut, QUIET),
        (Broken::LookAtOnce, WILD),
        (Broken::NewsFirst, WILD),
        (Broken::ReadOn, QUIET),
    ];
    let judge = |broken: Broken, failure: Option<Failure>| {
        let failure = failure.unwrap_or_else(|| panic!("without {broken:?} nothing breaks"));
        println!("without {broken:?}, after {} steps: {}", failure.steps.len(), failure.promise);
        failure.promise
    };
    for (broken, breaks) in in_all_orders {
        let promise = judge(broken, all(Scope { broken, ..TWO_WRITERS }).err().map(|failure| *failure));
        assert!(promise.contains(breaks), "without {broken:?}: {promise}");
    }
    for (broken, scope) in at_random {
        judge(broken, first_failure(Scope { broken, ..scope }, 3_000));
    }
}

#[test]
fn marks_that_are_kept_once_more_are_the_real_ones() {
    let broken = Broken::NothingButOwn;
    for scope in [QUIET, WILD] {
        assert!(first_failure(Scope { broken, ..scope }, 200).is_none());
    }
}

/// What costs no order and loses nothing, so that the runs above do not see it: an open writer holds `read_to` back while it
/// is young or without an id, and not longer.
#[test]
fn an_open_writer_holds_read_to_back_only_until_it_can_be_asked_for() {
    let mut marks = Marks::new(1);
    let sample = |last_value, xid: Option<u64>| {
        let writers = vec![OpenWriter { name: "3/7".into(), xid }];
        Sample { last_value, writers, ..Sample::default() }
    };
    marks.observe(&Sample { last_value: 5, ..Sample::default() });
    for (last_value, xid, read_to) in
        [(10, None, 5), (20, None, 5), (30, Some(700), 30), (40, Some(700), 40), (50, None, 50)]
    {
        marks.observe(&sample(last_value, xid));
        let basis = marks.basis();
        assert_eq!(basis.read_to(i64::MAX, 0), read_to, "{last_value}");
        assert_eq!(basis.settled_to(i64::MAX, 0), 5, "{last_value}");
    }
    let mut prepared = sample(60, Some(700));
    prepared.writers[0].name = "-1/700".into();
    marks.observe(&prepared);
    assert_eq!(marks.basis().read_to(i64::MAX, 0), 60, "by its new name, it is the same");
    assert_eq!(marks.basis().settled_to(i64::MAX, 0), 5);
    assert_eq!(
        marks.observe(&sample(59, None)),
        Seen::OtherLife,
        "the sequence was set back: all is forgotten"
    );
    assert_eq!(marks.basis().settled_to(i64::MAX, 3), 3);
}

/// A claim from before the first sample moves no mark of its own, but tells the shared one, where looks begin: after a crash that
/// one may have been lost with the settles.
#[test]
fn what_a_claim_told_before_the_first_sample_is_forgotten_with_its_server() {
    let mut marks = Marks::new(1);
    marks.belong_to(ServerLife::default());
    marks.claimed(0);
    let row = LaneRow { settled_to: 5, sweeps: 0 };
    let end = LaneEnd { lane: 0, row, reached: Some(i64::MAX), left_out: Arc::default(), more: false };
    marks.ended(&marks.basis(), &end);
    assert_eq!((marks.start(0).read_to, marks.look_from(0)), (BEGINNING, 5));
    let life = ServerLife { recovered: 1, ..ServerLife::default() };
    assert_eq!(marks.observe(&Sample { life, last_value: 9, writers: Vec::new() }), Seen::OtherLife);
    assert_eq!(marks.look_from(0), BEGINNING);
}

/// Found by the model. A look raises the mark of a lane that was never locked; an event below is set back to pending by hand;
/// the sweep finds it, which the first lock could not tell from what it was before.
#[test]
fn what_is_known_from_a_look_does_not_outlive_a_find_of_the_sweep() {
    let mut marks = Marks::new(1);
    marks.observe(&Sample { last_value: 9, ..Sample::default() });
    marks.looked(0);
    assert_eq!(marks.look_from(0), 9);
    let found = LaneRow { settled_to: 4, sweeps: 1 };
    assert_eq!(marks.start(0).from(found), 4, "the first claim begins at the find");
    // It is released.
    marks.claimed(0);
    let end = LaneEnd { lane: 0, row: found, reached: None, left_out: Arc::default(), more: false };
    marks.ended(&marks.basis(), &end);
    assert_eq!(marks.start(0).from(found), 4, "so does the next one");
}

/// A claim that reads on under its locks must not begin at the end of its first read: 1 was open then, and in no sample, or
/// in one only; and 3 came after it.
#[test]
fn a_claim_that_reads_on_begins_where_read_to_could_go() {
    let (instance, claim, disk) = (0, 0, Disk::Waits);
    let read = Step::Read { instance, claim, bound: 1, due: true };
    let insert = |slot, key| [Step::Begin { slot }, Step::Draw { slot }, Step::Insert { slot, key }];
    let commit = |slot| [Step::Commit { slot, disk }];
    let sample = [Step::Sample { instance }, Step::SampleRest { instance }, Step::Observe { instance }];
    let claims = [Step::Take { instance, lanes: 1 }, Step::Lock { instance, claim }, read];
    let reads_on = [Step::ReadOn { instance, claim }, read];
    let settle = [Step::Settle { instance, claim, how: Settle::ALL }];
    let steps: [&[Step]; 10] = [
        &sample,
        &insert(0, 0),
        &insert(1, 1),
        &commit(1),
        &claims,
        &commit(0),
        &insert(0, 0),
        &commit(0),
        &reads_on,
        &settle,
    ];
    let steps = steps.concat();
    let failure = replay(Scope { broken: Broken::ReadOn, ..QUIET }, &steps).unwrap_err();
    assert!(failure.promise.contains("3 overtakes"), "{failure}");
    if let Err(failure) = replay(QUIET, &steps) {
        panic!("{failure}");
    }
}
