//! State: the fold of the journal, and the one `apply` that makes it, live and in replay.
//!
//! ```text
//!   State(n) ──apply(entry n+1)──▶ State(n+1)  +  Effects (where its batches lie, what closed, what went)
//! ```
//!
//! The live log folds every entry twice: into the *sequenced* State, against which requests are planned, when the
//! entry gets its number; and into the *released* State, from which readers are answered, once it is as durable
//! as its mode says. A checkpoint is a copy of the released one.
//!
//! Invariants:
//!
//! * `apply` reads nothing but State and the entry: no clock, no files, no randomness.
//! * Offsets of a partition have no gaps; an entry that would make one is refused as corruption.
//! * `Partition::open` holds exactly the first offsets of the partition in open transactions.
//! * A producer id is in `producers` exactly if it is current: a replaced one goes in the entry that replaces it.

mod apply;
mod place;

use crate::fault;
use crate::types::{
    AbortedRange, Cleanup, Mode, Outcome, PartitionOffsets, Position, Producer, TopicInfo, TopicPartition,
};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use uuid::Uuid;

pub(crate) use apply::{Closed, Effects};
pub(crate) use place::SegmentId;

/// Batches per producer and partition whose repeats are recognised.
pub(crate) const LAST_BATCHES: usize = 5;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    /// Entries folded.
    pub n: u64,
    /// The aging clock, in milliseconds: everything that expires does so by it.
    pub clock: i64,
    /// The number of times the directory was opened, as far as entries tell.
    pub incarnation: u32,
    /// Wall time and aging clock at the last open.
    pub opened: (i64, i64),
    pub next_producer: i64,
    pub topics: BTreeMap<Uuid, Topic>,
    pub owners: BTreeMap<String, Owner>,
    pub producers: BTreeMap<i64, ProducerState>,
    pub groups: BTreeMap<String, BTreeMap<TopicPartition, GroupOffset>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Topic {
    pub name: String,
    pub segment_bytes_max: u64,
    pub mode: Mode,
    pub cleanup: Cleanup,
    pub partitions: Vec<Partition>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Partition {
    pub log_start: i64,
    pub log_end: i64,
    pub segments: Vec<Segment>,
    /// Leader epochs that wrote here, each with its first offset.
    pub epochs: Vec<(i32, i64)>,
    /// First offsets of open transactions, with their producer id.
    pub open: BTreeMap<i64, i64>,
    /// Aborted ranges whose marker lies in the last segment; those of closed segments are in their `.txnindex`.
    pub aborted: Vec<AbortedRange>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Segment {
    pub base: i64,
    pub revision: u32,
    /// The offset after its last record.
    pub end: i64,
    pub bytes: u64,
    pub batches: u32,
    /// Where its last batch begins.
    pub last_at: u64,
    /// Entries of its `.txnindex`, once closed.
    pub aborted: u32,
}

/// What is kept per transactional id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Owner {
    pub producer: Producer,
    pub local: bool,
    pub timeout_ms: u32,
    pub txn: Option<Txn>,
    pub last: Option<LastEnd>,
    /// The last entry that changed this owner: answers drawn from it rest on that entry.
    pub n: u64,
    pub clock: i64,
}

/// An open transaction.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Txn {
    /// First offset per partition.
    pub partitions: BTreeMap<TopicPartition, i64>,
    pub offsets: BTreeMap<String, BTreeMap<TopicPartition, GroupOffset>>,
}

/// How the last transaction ended: a retried end is answered with exactly this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LastEnd {
    pub producer: Producer,
    pub outcome: Outcome,
    pub next: Producer,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProducerState {
    pub epoch: i16,
    pub transactional_id: Option<String>,
    /// What the init that gave this (id, epoch) carried: its retry is answered alike.
    pub carried: Option<Producer>,
    /// See [`Owner::n`].
    pub n: u64,
    pub clock: i64,
    pub sequences: BTreeMap<TopicPartition, Sequences>,
}

/// A producer's place in one partition.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Sequences {
    pub next: i32,
    pub last: VecDeque<LastBatch>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LastBatch {
    pub sequence: i32,
    pub count: i32,
    pub base_offset: i64,
    pub leader_epoch: i32,
    pub n: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct GroupOffset {
    pub position: Position,
    pub metadata: Bytes,
}

impl State {
    pub(crate) fn partition(&self, tp: TopicPartition) -> Option<&Partition> {
        self.topics.get(&tp.topic)?.partitions.get(tp.partition as usize)
    }

    pub(crate) fn partition_mut(&mut self, tp: TopicPartition) -> Option<&mut Partition> {
        self.topics.get_mut(&tp.topic)?.partitions.get_mut(tp.partition as usize)
    }

    pub(crate) fn topic_named(&self, name: &str) -> Option<(Uuid, &Topic)> {
        self.topics.iter().find(|(_, t)| t.name == name).map(|(uuid, t)| (*uuid, t))
    }

    /// Every file of records that State names.
    pub(crate) fn segments(&self) -> impl Iterator<Item = (SegmentId, &Segment)> {
        self.partitions().flat_map(|(tp, p)| {
            p.segments.iter().map(move |s| (SegmentId { tp, base: s.base, revision: s.revision }, s))
        })
    }

    pub(crate) fn partitions(&self) -> impl Iterator<Item = (TopicPartition, &Partition)> {
        self.topics.iter().flat_map(|(&topic, t)| {
            t.partitions.iter().zip(0..).map(move |(p, partition)| (TopicPartition { topic, partition }, p))
        })
    }
}

impl Topic {
    pub(crate) fn info(&self, uuid: Uuid) -> TopicInfo {
        TopicInfo {
            name: self.name.clone(),
            uuid,
            partitions: u32::try_from(self.partitions.len()).expect("bounded when created"),
            segment_bytes_max: self.segment_bytes_max,
            mode: self.mode,
            cleanup: self.cleanup,
        }
    }
}

impl Partition {
    /// Leader epoch of the record before `offset`.
    pub(crate) fn epoch_before(&self, offset: i64) -> i32 {
        let before = self.epochs.iter().rev().find(|(_, start)| *start < offset);
        before.map_or(Position::NO_RECORD, |(epoch, _)| *epoch)
    }

    /// Are the records before this position those that whoever stored it saw?
    pub(crate) fn holds(&self, position: Position) -> bool {
        let after = match position.leader_epoch {
            Position::UNCHECKED => return (self.log_start..=self.log_end).contains(&position.offset),
            Position::NO_RECORD => 0,
            epoch => match self.epochs.iter().position(|(e, _)| *e == epoch) {
                Some(i) => i + 1,
                None => return false,
            },
        };
        let end = self.epochs.get(after).map_or(self.log_end, |(_, start)| *start);
        (0..=end).contains(&position.offset)
    }

    /// The first offset that a read-committed reader of this State may not see.
    pub(crate) fn last_stable(&self) -> i64 {
        match self.open.keys().next() {
            Some(first) => first + i64::from(fault::active("lso-off-by-one")),
            None => self.log_end,
        }
    }

    pub(crate) fn offsets(&self) -> PartitionOffsets {
        PartitionOffsets {
            log_start: self.log_start,
            high_watermark: self.log_end,
            last_stable: self.last_stable(),
            end: Position { leader_epoch: self.epoch_before(self.log_end), offset: self.log_end },
        }
    }
}

impl LastBatch {
    pub(crate) fn next(&self) -> Position {
        Position { leader_epoch: self.leader_epoch, offset: self.base_offset + i64::from(self.count) }
    }
}
