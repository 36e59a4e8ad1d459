//! The fold: one entry into State. Whatever does not fit is damage, since the live log plans before it sequences.

use super::place::Roll;
use super::{
    GroupOffset, LAST_BATCHES, LastBatch, LastEnd, Owner, ProducerState, Segment, SegmentId, State, Topic,
    Txn,
};
use crate::batch::advance_sequence;
use crate::entry::{Change, CommittedOffset, Entry, Facts, StoredBatch};
use crate::fault;
use crate::types::{AbortedRange, Outcome, Producer, TopicPartition};
use std::collections::BTreeMap;
use uuid::Uuid;

/// What an entry does to files.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Effects {
    /// One per batch of the entry, in its order.
    pub places: Vec<Place>,
    pub closed: Vec<Closed>,
    /// Files that State named before and does not name now.
    pub dropped: Vec<SegmentId>,
    pub dropped_topic: Option<(Uuid, u32)>,
}

/// Where a batch goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub segment: SegmentId,
    pub at: u64,
    pub ordinal: u32,
}

/// A segment that takes no more batches: its aborted ranges go into its `.txnindex`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Closed {
    pub segment: SegmentId,
    pub aborted: Vec<AbortedRange>,
}

/// An entry that State can not take.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected}, found {found}")]
pub(crate) struct ApplyError {
    pub expected: String,
    pub found: String,
}

fn wrong<T>(expected: impl Into<String>, found: impl Into<String>) -> Result<T, ApplyError> {
    Err(ApplyError { expected: expected.into(), found: found.into() })
}

impl State {
    /// Folds the next entry. After an error State is unspecified and must be dropped.
    pub(crate) fn apply(&mut self, entry: &Entry) -> Result<Effects, ApplyError> {
        self.n += 1;
        self.clock = self.clock.max(entry.clock);
        let mut effects = Effects::default();
        match &entry.change {
            Change::Open { incarnation, wall_ms } => {
                self.incarnation = *incarnation;
                self.opened = (*wall_ms, self.clock);
            }
            Change::CreateTopic { uuid, name, partitions, segment_bytes_max, mode, cleanup } => {
                let topic = Topic {
                    name: name.clone(),
                    segment_bytes_max: *segment_bytes_max,
                    mode: *mode,
                    cleanup: *cleanup,
                    partitions: vec![Default::default(); *partitions as usize],
                };
                if self.topic_named(name).is_some() || self.topics.insert(*uuid, topic).is_some() {
                    return wrong("a new topic", format!("topic {name} {uuid} again"));
                }
            }
            Change::DeleteTopic { uuid } => self.delete_topic(*uuid, &mut effects)?,
            Change::Init { transactional_id, local, timeout_ms, producer, replaces, carried } => {
                if let Some(id) = transactional_id {
                    self.finish(id, Outcome::Aborted, entry, &mut effects)?;
                    let (n, clock) = (self.n, self.clock);
                    let owner = self.owners.entry(id.clone()).or_insert_with(|| Owner {
                        producer: *producer,
                        local: false,
                        timeout_ms: 0,
                        txn: None,
                        last: None,
                        n,
                        clock,
                    });
                    (owner.local, owner.timeout_ms) = (*local, *timeout_ms);
                }
                self.give(transactional_id.as_deref(), *replaces, *producer, *carried);
            }
            Change::Append => self.append(entry, &mut effects)?,
            Change::AddOffsets { transactional_id, group, offsets } => {
                let (n, clock) = (self.n, self.clock);
                let Some(owner) = self.owners.get_mut(transactional_id) else {
                    return wrong("a known transactional id", transactional_id.as_str());
                };
                (owner.n, owner.clock) = (n, clock);
                let txn = owner.txn.get_or_insert_default();
                if fault::active("offsets-outside") {
                    put_offsets(self.groups.entry(group.clone()).or_default(), offsets);
                    return Ok(effects);
                }
                put_offsets(txn.offsets.entry(group.clone()).or_default(), offsets);
            }
            Change::CommitOffsets { group, offsets } => {
                put_offsets(self.groups.entry(group.clone()).or_default(), offsets);
            }
            Change::End { transactional_id, outcome, next } => {
                self.finish(transactional_id, *outcome, entry, &mut effects)?;
                let Some(owner) = self.owners.get_mut(transactional_id) else {
                    return wrong("a known transactional id", transactional_id.as_str());
                };
                let old = owner.producer;
                owner.last = Some(LastEnd { producer: old, outcome: *outcome, next: *next });
                self.give(Some(transactional_id), Some(old.id), *next, None);
            }
            Change::Expire { producers, transactional_ids } => {
                for id in transactional_ids {
                    if let Some(owner) = self.owners.remove(id) {
                        self.producers.remove(&owner.producer.id);
                    }
                }
                for id in producers {
                    self.producers.remove(id);
                }
            }
            Change::AlterTopic { uuid, partitions, segment_bytes_max, cleanup } => {
                let Some(topic) = self.topics.get_mut(uuid) else {
                    return wrong("a known topic", uuid.to_string());
                };
                let (now, then) = (*partitions as usize, topic.partitions.len());
                if now < then {
                    return wrong(format!("at least {then} partitions"), now.to_string());
                }
                topic.partitions.resize_with(now, Default::default);
                (topic.segment_bytes_max, topic.cleanup) = (*segment_bytes_max, *cleanup);
            }
        }
        Ok(effects)
    }

    /// Makes (id, epoch) current, for an owner or a plain producer; the id it replaces goes at once.
    fn give(
        &mut self,
        owner: Option<&str>,
        replaces: Option<i64>,
        producer: Producer,
        carried: Option<Producer>,
    ) {
        let (n, clock) = (self.n, self.clock);
        if let Some(old) = replaces.filter(|old| *old != producer.id && !fault::active("old-id-stays")) {
            self.producers.remove(&old);
        }
        self.next_producer = self.next_producer.max(producer.id + 1);
        let state = ProducerState {
            epoch: producer.epoch,
            transactional_id: owner.map(str::to_owned),
            carried,
            n,
            clock,
            sequences: BTreeMap::new(),
        };
        self.producers.insert(producer.id, state);
        if let Some(owner) = owner.and_then(|id| self.owners.get_mut(id)) {
            (owner.producer, owner.n, owner.clock) = (producer, n, clock);
        }
    }

    fn append(&mut self, entry: &Entry, effects: &mut Effects) -> Result<(), ApplyError> {
        let [(tp, batch)] = entry.batches.as_slice() else {
            return wrong("one batch", format!("{}", entry.batches.len()));
        };
        let facts = batch.facts();
        self.put(*tp, batch, facts, Roll::WhenFull, effects)?;
        if facts.producer.id < 0 {
            return Ok(());
        }
        let (n, clock) = (self.n, self.clock);
        let Some(producer) = self.producers.get_mut(&facts.producer.id) else {
            return wrong("a known producer", format!("{:?}", facts.producer));
        };
        if producer.epoch != facts.producer.epoch {
            return wrong(format!("producer epoch {}", producer.epoch), format!("{:?}", facts.producer));
        }
        producer.clock = clock;
        let seqs = producer.sequences.entry(*tp).or_default();
        seqs.next = advance_sequence(facts.sequence, facts.count);
        if seqs.last.len() == LAST_BATCHES {
            seqs.last.pop_front();
        }
        seqs.last.push_back(LastBatch {
            sequence: facts.sequence,
            count: facts.count,
            base_offset: facts.base_offset,
            leader_epoch: facts.leader_epoch,
            n,
        });
        if facts.transactional {
            let owner = producer.transactional_id.as_deref().and_then(|id| self.owners.get_mut(id));
            let Some(owner) = owner else {
                return wrong("a producer with a transactional id", format!("{:?}", facts.producer));
            };
            owner.clock = clock;
            let txn = owner.txn.get_or_insert_default();
            if !txn.partitions.contains_key(tp) {
                txn.partitions.insert(*tp, facts.base_offset);
                owner.n = n;
                let partition = self.partition_mut(*tp).expect("put found it");
                partition.open.insert(facts.base_offset, facts.producer.id);
            }
        }
        Ok(())
    }

    /// Appends one batch to its partition.
    fn put(
        &mut self,
        tp: TopicPartition,
        batch: &StoredBatch,
        facts: Facts,
        roll: Roll,
        effects: &mut Effects,
    ) -> Result<(), ApplyError> {
        let topic = self.topics.get_mut(&tp.topic);
        let Some((topic, place)) = topic.and_then(|t| t.place(tp, batch.len(), roll).map(|p| (t, p))) else {
            return wrong("a known partition", tp.to_string());
        };
        let p = &mut topic.partitions[tp.partition as usize];
        if facts.base_offset != p.log_end || facts.count < 1 {
            return wrong(
                format!("offset {}", p.log_end),
                format!("{} + {}", facts.base_offset, facts.count),
            );
        }
        if place.rolls {
            if let Some(last) = p.segments.last_mut() {
                let aborted = std::mem::take(&mut p.aborted);
                last.aborted = u32::try_from(aborted.len()).expect("one per batch at most");
                let segment = SegmentId { tp, base: last.base, revision: last.revision };
                effects.closed.push(Closed { segment, aborted });
            }
            p.segments.push(Segment {
                base: place.segment.base,
                revision: place.segment.revision,
                end: place.segment.base,
                bytes: 0,
                batches: 0,
                last_at: 0,
                aborted: 0,
            });
        }
        let s = p.segments.last_mut().expect("placed in it");
        s.last_at = s.bytes;
        s.bytes += batch.len();
        s.batches += 1;
        s.end = facts.next_offset();
        p.log_end = facts.next_offset();
        if p.epochs.last().is_none_or(|(epoch, _)| *epoch != facts.leader_epoch) {
            p.epochs.push((facts.leader_epoch, facts.base_offset));
        }
        effects.places.push(Place { segment: place.segment, at: place.at, ordinal: place.ordinal });
        Ok(())
    }

    /// Closes the owner's open transaction, if there is one, with the markers that the entry carries.
    fn finish(
        &mut self,
        transactional_id: &str,
        outcome: Outcome,
        entry: &Entry,
        effects: &mut Effects,
    ) -> Result<(), ApplyError> {
        let owner = self.owners.get_mut(transactional_id);
        let Some((txn, pid)) = owner.and_then(|o| o.txn.take().map(|txn| (txn, o.producer.id))) else {
            return if entry.batches.is_empty() { Ok(()) } else { wrong("an open transaction", "markers") };
        };
        let Txn { partitions, offsets } = txn;
        if !partitions.keys().eq(entry.batches.iter().map(|(tp, _)| tp)) {
            return wrong(format!("markers of {} partitions", partitions.len()), "other markers");
        }
        for ((tp, batch), first) in entry.batches.iter().zip(partitions.values()) {
            let facts = batch.facts();
            self.put(*tp, batch, facts, Roll::Never, effects)?;
            let p = self.partition_mut(*tp).expect("put found it");
            p.open.remove(first);
            if outcome == Outcome::Aborted {
                p.aborted.push(AbortedRange { producer_id: pid, first: *first, last: facts.base_offset });
            }
        }
        if outcome == Outcome::Committed {
            for (group, moved) in offsets {
                self.groups.entry(group).or_default().extend(moved);
            }
        }
        Ok(())
    }

    /// Takes a topic out of everything that names it, open transactions included.
    fn delete_topic(&mut self, uuid: Uuid, effects: &mut Effects) -> Result<(), ApplyError> {
        effects.dropped = self.segments().map(|(id, _)| id).filter(|id| id.tp.topic == uuid).collect();
        let Some(topic) = self.topics.remove(&uuid) else {
            return wrong("a known topic", uuid.to_string());
        };
        effects.dropped_topic = Some((uuid, u32::try_from(topic.partitions.len()).expect("bounded")));
        for owner in self.owners.values_mut() {
            if let Some(txn) = &mut owner.txn {
                txn.partitions.retain(|tp, _| tp.topic != uuid);
                for offsets in txn.offsets.values_mut() {
                    offsets.retain(|tp, _| tp.topic != uuid);
                }
            }
        }
        for producer in self.producers.values_mut() {
            producer.sequences.retain(|tp, _| tp.topic != uuid);
        }
        for offsets in self.groups.values_mut() {
            offsets.retain(|tp, _| tp.topic != uuid);
        }
        self.groups.retain(|_, offsets| !offsets.is_empty());
        Ok(())
    }
}

fn put_offsets(into: &mut BTreeMap<TopicPartition, GroupOffset>, offsets: &[CommittedOffset]) {
    for o in offsets {
        into.insert(o.partition, GroupOffset { position: o.position, metadata: o.metadata.clone() });
    }
}
