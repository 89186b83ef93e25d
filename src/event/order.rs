//! Which event of a claim may be sent next, so that the events of a key reach the stream in order.
//!
//! At most one event of a key is in flight. When it is stored, the key's next event becomes ready; when it is
//! not, whatever the reason, the later events of its key stay behind and are left alone. Events of different
//! keys do not wait for each other. Without order (`ordering.enabled: false`) every event is its own key.
//!
//! Sending a key's events back to back would be faster and wrong: the server can lose one publish, in a change
//! of the stream's leader, and store another that was sent after it.

use std::collections::{HashMap, VecDeque};

use crate::event::Event;

/// The order of one claim's events. Events are named by their index in the claim.
#[derive(Debug)]
pub struct Order {
    ready: VecDeque<usize>,
    /// For each event, the next one of its key.
    successor: Vec<Option<usize>>,
}

impl Order {
    /// The order by key of `events`, which stand in the order of their keys.
    pub fn by_key<'a>(events: impl IntoIterator<Item = &'a Event>) -> Order {
        let mut order = Order { ready: VecDeque::new(), successor: Vec::new() };
        let mut last_of_key: HashMap<i64, usize> = HashMap::new();
        for (index, event) in events.into_iter().enumerate() {
            order.successor.push(None);
            match last_of_key.insert(event.key_hash, index) {
                Some(previous) => order.successor[previous] = Some(index),
                None => order.ready.push_back(index),
            }
        }
        order
    }

    /// No order at all: all `count` events are ready.
    pub fn none(count: usize) -> Order {
        Order { ready: (0..count).collect(), successor: vec![None; count] }
    }

    /// The next event that may be sent; `None` while every key waits for an answer or is done.
    pub fn next_ready(&mut self) -> Option<usize> {
        self.ready.pop_front()
    }

    /// Puts an event back that was taken but not sent.
    pub fn put_back(&mut self, index: usize) {
        self.ready.push_front(index);
    }

    /// The event is stored: the next one of its key is ready.
    pub fn stored(&mut self, index: usize) {
        if let Some(next) = self.successor[index] {
            self.ready.push_back(next);
        }
    }

    /// The event that follows `index` in its key, ready or not.
    pub fn successor(&self, index: usize) -> Option<usize> {
        self.successor[index]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(key: &str, seq: i64) -> Event {
        Event {
            place: crate::event::Place::default(),
            id: uuid::Uuid::nil(),
            seq,
            created_at: 0,
            topic: "t".into(),
            key_hash: key.bytes().fold(0, |hash, byte| hash * 256 + i64::from(byte)),
            lane: 0,
            metadata: None,
            payload: "{}".into(),
            attempts: 0,
            in_retry: false,
            unreadable: None,
        }
    }

    fn drain(order: &mut Order) -> Vec<usize> {
        std::iter::from_fn(|| order.next_ready()).collect()
    }

    #[test]
    fn one_event_of_a_key_is_ready_at_a_time() {
        let events = [event("a", 1), event("b", 2), event("a", 3), event("a", 4), event("c", 5)];
        let mut order = Order::by_key(&events);
        assert_eq!(drain(&mut order), [0, 1, 4]);
        order.stored(0);
        assert_eq!(drain(&mut order), [2]);
        order.stored(2);
        order.stored(1);
        assert_eq!(drain(&mut order), [3]);
        order.stored(3);
        assert!(drain(&mut order).is_empty());
    }

    #[test]
    fn a_failed_event_holds_its_key_and_no_other() {
        let events = [event("a", 1), event("a", 2), event("b", 3), event("b", 4)];
        let mut order = Order::by_key(&events);
        assert_eq!(drain(&mut order), [0, 2]);
        order.stored(2);
        assert_eq!(drain(&mut order), [3], "0 was never stored, so 1 stays behind");
    }

    #[test]
    fn without_order_everything_is_ready() {
        assert_eq!(drain(&mut Order::none(3)), [0, 1, 2]);
    }
}
