//! Producers: who they are, and which of their batches are new.

use super::{Context, Plan, Request, txn};
use crate::entry::{Change, Entry, Facts, StoredBatch};
use crate::error::{Refusal, WriteError};
use crate::fault;
use crate::state::State;
use crate::types::{Appended, Connection, InitProducer, Position, Producer, TopicPartition};
use bytes::Bytes;

/// A checked batch for one partition.
#[derive(Debug)]
pub(crate) struct AppendBatch {
    pub to: TopicPartition,
    pub batch: Bytes,
    pub connection: Connection,
}

/// Are these bytes one whole batch that a producer may send? Done on the caller's thread, before the sequencer.
pub(crate) fn checked(batch: &Bytes) -> Result<(), Refusal> {
    match crate::batch::verify_produced(batch) {
        Ok(_) => Ok(()),
        Err(e) => Err(Refusal::BadBatch(e.to_string())),
    }
}

impl Request for AppendBatch {
    type Answer = Appended;

    fn plan(&self, s: &State, with: &mut Context) -> Plan<Appended> {
        let facts = Facts::of(&self.batch);
        let Some(partition) = s.partition(self.to) else {
            return Plan::refused(Refusal::UnknownPartition(self.to));
        };
        if facts.producer.id >= 0 {
            match self.check_producer(s, with, &facts) {
                Ok(None) => {}
                Ok(Some(duplicate)) => return duplicate,
                Err((n, error)) => return Plan::Refused { n, error },
            }
        } else if facts.transactional {
            return Plan::refused(Refusal::NotTransactional(facts.producer.id));
        }
        let batch = StoredBatch::new(&self.batch, partition.log_end, with.leader_epoch);
        let next = Position { leader_epoch: with.leader_epoch, offset: batch.facts().next_offset() };
        Plan::Entry {
            answer: Appended { base_offset: partition.log_end, next, duplicate: false },
            entry: Entry { clock: with.clock, change: Change::Append, batches: vec![(self.to, batch)] },
        }
    }
}

impl AppendBatch {
    /// Is the batch the next one of a producer that may append here? `Some` is the answer to a repeat.
    fn check_producer(
        &self,
        s: &State,
        with: &mut Context,
        facts: &Facts,
    ) -> Result<Option<Plan<Appended>>, (u64, WriteError)> {
        with.current(s, facts.producer, self.connection)?;
        let producer = &s.producers[&facts.producer.id];
        let mut expected = 0;
        if let Some(seqs) = producer.sequences.get(&self.to) {
            let repeat =
                |b: &&crate::state::LastBatch| (b.sequence, b.count) == (facts.sequence, facts.count);
            if let Some(b) = seqs.last.iter().find(repeat) {
                let n = if fault::active("duplicate-unreleased") { 0 } else { b.n };
                let answer = Appended { base_offset: b.base_offset, next: b.next(), duplicate: true };
                return Ok(Some(Plan::Rests { n, answer }));
            }
            expected = seqs.next;
        }
        if facts.transactional != producer.transactional_id.is_some() {
            return Err((0, Refusal::NotTransactional(facts.producer.id).into()));
        }
        if fault::active("sequence-on-reject") {
            expected = with.pins.moved.get(&(facts.producer, self.to)).map_or(expected, |s| expected.max(*s));
            if facts.sequence > expected {
                with.pins.moved.insert((facts.producer, self.to), facts.sequence + facts.count);
            }
        }
        let behind = expected.wrapping_sub(facts.sequence) > 0;
        if facts.sequence != expected && !(behind && fault::active("beyond-five-accepted")) {
            let refusal = Refusal::OutOfOrder {
                partition: self.to,
                producer: facts.producer,
                expected,
                found: facts.sequence,
            };
            return Err((0, refusal.into()));
        }
        if let Some(owner) = producer.transactional_id.as_deref().and_then(|id| s.owners.get(id)) {
            txn::room_for_markers(owner, self.to, with.entry_bytes_max)?;
        }
        Ok(None)
    }
}

impl Request for InitProducer {
    type Answer = Producer;

    fn plan(&self, s: &State, with: &mut Context) -> Plan<Producer> {
        match &self.transactional_id {
            Some(id) => self.plan_owner(id, s, with),
            None => self.plan_plain(s, with),
        }
    }
}

impl InitProducer {
    fn entry(&self, with: &Context, producer: Producer, replaces: Option<i64>) -> Entry {
        with.entry(Change::Init {
            transactional_id: self.transactional_id.clone(),
            local: self.local,
            timeout_ms: self.timeout_ms,
            producer,
            replaces,
            carried: self.carried,
        })
    }

    fn plan_owner(&self, id: &str, s: &State, with: &mut Context) -> Plan<Producer> {
        if id.is_empty() || id.len() > 1024 {
            return Plan::refused(Refusal::Invalid(format!("a transactional id of {} bytes", id.len())));
        }
        let Some(owner) = s.owners.get(id) else {
            if self.carried.is_some() {
                return Plan::refused(WriteError::Fenced { current: None });
            }
            let first = Producer { id: s.next_producer, epoch: 0 };
            return Plan::Entry { entry: self.entry(with, first, None), answer: first };
        };
        if let Some(carried) = self.carried.filter(|c| *c != owner.producer) {
            return retry(carried, owner.producer, s, owner.n);
        }
        let next = with.bump(s, owner.producer);
        let mut entry = self.entry(with, next, Some(owner.producer.id));
        entry.batches = txn::markers(s, owner, crate::types::Outcome::Aborted, with);
        Plan::Entry { entry, answer: next }
    }

    fn plan_plain(&self, s: &State, with: &mut Context) -> Plan<Producer> {
        let Some(carried) = self.carried else {
            let first = Producer { id: s.next_producer, epoch: 0 };
            return Plan::Entry { entry: self.entry(with, first, None), answer: first };
        };
        let known = s.producers.get(&carried.id).filter(|p| p.transactional_id.is_none());
        match known {
            Some(p) if p.epoch == carried.epoch => {
                let next = with.bump(s, carried);
                Plan::Entry { entry: self.entry(with, next, Some(carried.id)), answer: next }
            }
            Some(p) => retry(carried, Producer { id: carried.id, epoch: p.epoch }, s, p.n),
            // The id may have been replaced at its last epoch: then its successor carries it. Rare, so a search will do.
            None => match s.producers.iter().find(|(_, p)| p.carried == Some(carried)) {
                Some((id, p)) => Plan::Rests { n: p.n, answer: Producer { id: *id, epoch: p.epoch } },
                None => Plan::refused(WriteError::Fenced { current: None }),
            },
        }
    }
}

/// A carried pair that is not current: a retry of the init that replaced it, or fenced.
fn retry(carried: Producer, current: Producer, s: &State, n: u64) -> Plan<Producer> {
    let last_carried = s.producers.get(&current.id).and_then(|p| p.carried);
    if last_carried == Some(carried) {
        Plan::Rests { n, answer: current }
    } else {
        Plan::Refused { n, error: WriteError::Fenced { current: Some(current) } }
    }
}
