//! Transactions: offsets in them, their end, and the aborts that nobody asked for.
//!
//! ```text
//!  none ──first batch or offsets──▶ open ──end──▶ none, next epoch
//!                                     │──init, timeout, open of the directory──▶ aborted, next epoch
//! ```

use super::{Context, Plan, Request};
use crate::batch::{Marker, control_batch};
use crate::entry::{Change, CommittedOffset, Entry, StoredBatch};
use crate::error::{Refusal, WriteError};
use crate::fault;
use crate::state::{Owner, State};
use crate::types::{AddOffsets, CommitOffsets, EndTxn, Ended, Mode, OffsetCommit, Outcome, TopicPartition};

/// About the bytes of one marker in an entry: 78 for the batch, the rest for its place.
pub(crate) const MARKER_BYTES: u64 = 128;
/// Most bytes of metadata with one offset.
const METADATA_BYTES_MAX: usize = 4096;
/// Most offsets that one transaction carries.
const OFFSETS_MAX: usize = 10_000;

/// The end must fit one entry, so a transaction is refused the partition that would make it too large.
pub(super) fn room_for_markers(
    owner: &Owner,
    tp: TopicPartition,
    bytes_max: u64,
) -> Result<(), (u64, WriteError)> {
    let Some(txn) = &owner.txn else { return Ok(()) };
    let bytes = (txn.partitions.len() as u64 + 2) * MARKER_BYTES;
    if bytes <= bytes_max || txn.partitions.contains_key(&tp) {
        return Ok(());
    }
    Err((
        0,
        Refusal::Invalid(format!("a transaction over more than {} partitions", txn.partitions.len())).into(),
    ))
}

/// The markers that end the owner's transaction, one per partition in it.
pub(super) fn markers(
    s: &State,
    owner: &Owner,
    outcome: Outcome,
    with: &Context,
) -> Vec<(TopicPartition, StoredBatch)> {
    let Some(txn) = &owner.txn else { return Vec::new() };
    let marker = match outcome {
        Outcome::Committed => Marker::Commit,
        Outcome::Aborted => Marker::Abort,
    };
    let bytes =
        control_batch(marker, owner.producer.id, owner.producer.epoch, with.wall_ms, with.leader_epoch);
    let place = |tp: &TopicPartition| {
        let end = s.partition(*tp).expect("transactions name partitions that exist").log_end;
        (*tp, StoredBatch::new(&bytes, end, with.leader_epoch))
    };
    txn.partitions.keys().map(place).collect()
}

/// Are these offsets what they say?
fn check_offsets(s: &State, offsets: &[OffsetCommit]) -> Result<Vec<CommittedOffset>, Refusal> {
    if offsets.len() > OFFSETS_MAX {
        return Err(Refusal::Invalid(format!("{} offsets at once", offsets.len())));
    }
    for o in offsets {
        let Some(partition) = s.partition(o.partition) else {
            return Err(Refusal::UnknownPartition(o.partition));
        };
        if !partition.holds(o.position) {
            return Err(Refusal::PositionLost { partition: o.partition, position: o.position });
        }
        if o.metadata.len() > METADATA_BYTES_MAX {
            return Err(Refusal::Invalid(format!("{} bytes of metadata", o.metadata.len())));
        }
    }
    Ok(offsets.iter().cloned().map(CommittedOffset::from).collect())
}

impl Request for AddOffsets {
    type Answer = ();

    fn plan(&self, s: &State, with: &mut Context) -> Plan<()> {
        if let Err((n, error)) = with.current(s, self.producer, self.connection) {
            return Plan::Refused { n, error };
        }
        let Some(id) = s.producers[&self.producer.id].transactional_id.clone() else {
            return Plan::refused(Refusal::NotTransactional(self.producer.id));
        };
        if self.guard.as_ref().is_some_and(|holds| !holds()) {
            return Plan::refused(Refusal::OldGeneration);
        }
        let offsets = match check_offsets(s, &self.offsets) {
            Ok(offsets) => offsets,
            Err(why) => return Plan::refused(why),
        };
        let change = Change::AddOffsets { transactional_id: id, group: self.group.clone(), offsets };
        Plan::Entry { entry: with.entry(change), answer: () }
    }
}

impl Request for CommitOffsets {
    type Answer = ();

    fn plan(&self, s: &State, with: &mut Context) -> Plan<()> {
        if self.guard.as_ref().is_some_and(|holds| !holds()) {
            return Plan::refused(Refusal::OldGeneration);
        }
        match check_offsets(s, &self.offsets) {
            Ok(offsets) => {
                let change = Change::CommitOffsets { group: self.group.clone(), offsets };
                Plan::Entry { entry: with.entry(change), answer: () }
            }
            Err(why) => Plan::refused(why),
        }
    }
}

impl Request for EndTxn {
    type Answer = Ended;

    fn plan(&self, s: &State, with: &mut Context) -> Plan<Ended> {
        let Some(owner) = s.owners.get(&self.transactional_id) else {
            return Plan::refused(Refusal::UnknownTransactionalId(self.transactional_id.clone()));
        };
        if owner.producer != self.producer {
            if fault::active("retried-end-blind") {
                let answer = Ended { outcome: self.outcome, next: owner.producer };
                return Plan::Rests { n: owner.n, answer };
            }
            return match owner.last {
                Some(last) if last.producer == self.producer => {
                    let next = if fault::active("retry-gives-current") { owner.producer } else { last.next };
                    Plan::Rests { n: owner.n, answer: Ended { outcome: last.outcome, next } }
                }
                _ => {
                    Plan::Refused { n: owner.n, error: WriteError::Fenced { current: Some(owner.producer) } }
                }
            };
        }
        if let Err((n, error)) = with.current(s, self.producer, self.connection) {
            return Plan::Refused { n, error };
        }
        let (mut entry, mut answer) = end(s, &self.transactional_id, owner, self.outcome, with);
        if let (Change::End { next, .. }, true) = (&mut entry.change, fault::active("epoch-kept")) {
            (*next, answer.next) = (owner.producer, owner.producer);
        }
        Plan::Entry { entry, answer }
    }
}

fn end(s: &State, id: &str, owner: &Owner, outcome: Outcome, with: &Context) -> (Entry, Ended) {
    let next = with.bump(s, owner.producer);
    let mut entry = with.entry(Change::End { transactional_id: id.to_owned(), outcome, next });
    entry.batches = markers(s, owner, outcome, with);
    (entry, Ended { outcome, next })
}

/// Aborts whatever is open: a timeout, or the open of the directory. Its producer is fenced by the bump.
#[derive(Debug)]
pub(crate) struct AbortUnasked {
    pub transactional_id: String,
}

impl Request for AbortUnasked {
    type Answer = ();

    fn plan(&self, s: &State, with: &mut Context) -> Plan<()> {
        match s.owners.get(&self.transactional_id) {
            Some(owner) if owner.txn.is_some() => {
                let (mut entry, _) = end(s, &self.transactional_id, owner, Outcome::Aborted, with);
                if let (Change::End { next, .. }, true) = (&mut entry.change, fault::active("no-epoch-bump"))
                {
                    *next = owner.producer;
                }
                Plan::Entry { entry, answer: () }
            }
            _ => Plan::Rests { n: s.n, answer: () },
        }
    }
}

/// Transactions that cannot go on after a crash: of producers that died with the owner's process, and those that
/// touch a topic whose acked batches may be gone.
pub(crate) fn aborts_at_open(s: &State) -> Vec<AbortUnasked> {
    let soft = |tp: &TopicPartition| s.topics.get(&tp.topic).is_none_or(|t| t.mode != Mode::Durable);
    let dead = |o: &Owner| o.txn.as_ref().is_some_and(|txn| o.local || txn.partitions.keys().any(soft));
    let ids = s.owners.iter().filter(|(_, o)| dead(o)).map(|(id, _)| id.clone());
    ids.map(|transactional_id| AbortUnasked { transactional_id }).collect()
}
