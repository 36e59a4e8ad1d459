//! Requests to entries: what each request would append to the journal, decided against the sequenced State.
//!
//! ```text
//!   request + State ──plan──▶ Rests { n, answer }      nothing to append: the answer of entry n
//!                             Entry { entry, answer }  append this, then answer
//!                             Refused { n, error }     nothing to append: refused because of entry n
//! ```
//!
//! A plan changes nothing but the connection pins, so a request whose entry does not fit the journal yet is simply
//! planned again later. The answer leaves when the entry it rests on is released: a retry of a request whose
//! entry might still be lost is not told that it succeeded.
//!
//! The rules are those of Kafka's idempotent and transactional producers (KIP-98, KIP-360, KIP-890), with an
//! epoch per transaction.

mod expire;
mod producer;
mod topic;
mod txn;

use crate::entry::{Change, Entry};
use crate::error::{Refusal, WriteError};
use crate::fault;
use crate::state::State;
use crate::types::{Connection, Producer, TopicPartition};
use std::collections::HashMap;

pub(crate) use expire::Expire;
pub(crate) use producer::{AppendBatch, checked};
pub(crate) use topic::{AlterTopic, CreateTopic, DeleteTopic, check as check_topic, check_alter};
pub(crate) use txn::{AbortUnasked, aborts_at_open};

/// The last producer epoch; the bump after it takes the next producer id.
pub(crate) const LAST_EPOCH: i16 = i16::MAX - 1;

/// What a request comes to.
#[derive(Debug)]
pub(crate) enum Plan<T> {
    Rests { n: u64, answer: T },
    Entry { entry: Entry, answer: T },
    Refused { n: u64, error: WriteError },
}

/// A request of any kind.
pub(crate) trait Request: Send {
    type Answer: Send + 'static;
    fn plan(&self, state: &State, with: &mut Context) -> Plan<Self::Answer>;
}

/// What plans need besides State.
#[derive(Debug)]
pub(crate) struct Context {
    /// The aging clock now.
    pub clock: i64,
    pub leader_epoch: i32,
    /// Most bytes of one entry.
    pub entry_bytes_max: u64,
    /// See [`LAST_EPOCH`]; smaller in tests.
    pub last_epoch: i16,
    pub wall_ms: i64,
    pub pins: Pins,
}

/// The newest connection that used each producer. Forgotten at a restart, when every connection is new.
#[derive(Debug, Default)]
pub(crate) struct Pins {
    by_id: HashMap<i64, (i16, Connection)>,
    /// Only a broken rule moves a sequence where a batch is refused.
    moved: HashMap<(Producer, TopicPartition), i32>,
}

impl Pins {
    /// False if a newer connection used this producer.
    fn pin(&mut self, producer: Producer, connection: Connection) -> bool {
        let pin = self.by_id.entry(producer.id).or_insert((producer.epoch, connection));
        if *pin > (producer.epoch, connection) {
            // The pin hides what the other two break.
            return ["not-pinned", "beyond-five-accepted", "retry-gives-current"]
                .into_iter()
                .any(fault::active);
        }
        *pin = (producer.epoch, connection);
        true
    }

    /// Drops pins of ids that State no longer has, once there are many.
    pub(crate) fn prune(&mut self, state: &State) {
        if self.by_id.len() > 2 * state.producers.len() + 64 {
            self.by_id.retain(|id, _| state.producers.contains_key(id));
        }
    }
}

impl<T> Plan<T> {
    /// Refused for a reason that no unreleased entry could take away.
    fn refused(why: impl Into<WriteError>) -> Self {
        Self::Refused { n: 0, error: why.into() }
    }
}

impl Context {
    fn entry(&self, change: Change) -> Entry {
        Entry { clock: self.clock, change, batches: Vec::new() }
    }

    /// Does a request of this producer on this connection count?
    fn current(
        &mut self,
        s: &State,
        producer: Producer,
        connection: Connection,
    ) -> Result<(), (u64, WriteError)> {
        let Some(known) = s.producers.get(&producer.id) else {
            return Err((0, Refusal::UnknownProducer(producer.id).into()));
        };
        if known.epoch != producer.epoch && !fault::active("no-epoch-check") {
            let current = Producer { id: producer.id, epoch: known.epoch };
            return Err((known.n, WriteError::Fenced { current: Some(current) }));
        }
        if !self.pins.pin(producer, connection) {
            return Err((0, Refusal::OldConnection.into()));
        }
        Ok(())
    }

    /// The (id, epoch) after this one.
    fn bump(&self, s: &State, producer: Producer) -> Producer {
        if producer.epoch < self.last_epoch {
            Producer { id: producer.id, epoch: producer.epoch + 1 }
        } else {
            Producer { id: s.next_producer, epoch: 0 }
        }
    }
}
