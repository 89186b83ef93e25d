//! The second statement of a claim: the events of the lanes that it has locked.
//!
//! A worker reads them ([`Locked::read`]), in the transaction that the claimer began, and what it gets is a [`Claim`]; how is
//! the `Reader`'s to know (`claim_reader.rs`). A claim that found nothing leaves no transaction open. Dropping the lanes gives
//! them back.

use super::StoreError;
use super::claim_reader::{Head, Large, Reader};
use super::claim_settle::Claim;
use super::transaction::Transaction;
use crate::failpoint;
use crate::lane::writers::ServerLife;

/// Lanes locked, in an open transaction; their events are still to be read. Dropping it gives them back.
pub struct Locked {
    pub(super) transaction: Transaction,
    /// Which lanes.
    pub lanes: Vec<i32>,
    /// The server that they are locked on.
    pub server: ServerLife,
    pub(super) reader: Reader,
}

impl Locked {
    /// Reads events of the lanes, about as many of each lane. A claim that found nothing holds no connection.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses; nothing stays locked.
    pub fn read(self, large: Large) -> Result<Claim, StoreError> {
        let Locked { mut transaction, mut reader, .. } = self;
        let mut events = Vec::new();
        if !reader.lanes.is_empty() {
            reader.begin_where_keys_are_free(&mut transaction)?;
            events = reader.read(&mut transaction, large)?;
            failpoint!("claim.read");
        }
        if events.is_empty() {
            transaction.roll_back()?;
        }
        Ok(Claim { transaction, reader, events })
    }

    /// The first event to claim of the only lane, by its place alone, and the transaction that has it locked.
    pub(super) fn head(self) -> Result<Option<(Head, Transaction)>, StoreError> {
        let Locked { mut transaction, mut reader, .. } = self;
        if reader.lanes.is_empty() {
            return Ok(None);
        }
        reader.begin_where_keys_are_free(&mut transaction)?;
        let events = reader.read(&mut transaction, Large::Alone)?;
        let head = events.first().map(|event| Head {
            id: event.id,
            seq: event.seq,
            created_at: event.created_at,
            attempts: i32::try_from(event.attempts).unwrap_or(i32::MAX),
        });
        Ok(head.map(|head| (head, transaction)))
    }

    /// Gives the lanes back.
    ///
    /// # Errors
    /// The connection was lost, which gives them back as well.
    pub fn release(mut self) -> Result<(), StoreError> {
        self.transaction.roll_back()
    }
}
