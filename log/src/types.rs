//! What callers of the log name: topics, positions, producers, transactions, and the answers to requests.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;
use uuid::Uuid;

/// One partition of a topic. The uuid, unlike the name, is never used again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TopicPartition {
    /// The topic.
    pub topic: Uuid,
    /// The partition, counted from zero.
    pub partition: u32,
}

impl fmt::Display for TopicPartition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.topic, self.partition)
    }
}

impl fmt::Debug for TopicPartition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A place in a partition that survives a lost suffix: an offset, and the leader epoch of the record before it.
///
/// The log refuses a position whose epoch it does not know, or whose offset lies past the start of the next
/// epoch: the records that the caller saw there are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Position {
    /// Leader epoch of the batch before `offset`; [`Position::NO_RECORD`] before the first record,
    /// [`Position::UNCHECKED`] where the caller names a bare offset.
    pub leader_epoch: i32,
    /// The next offset to read.
    pub offset: i64,
}

impl Position {
    /// Leader epoch of a position that no record precedes.
    pub const NO_RECORD: i32 = 0;
    /// Leader epoch of a bare offset: only the range is checked.
    pub const UNCHECKED: i32 = -1;
    /// The start of a partition that never lost its first records.
    pub const START: Self = Self { leader_epoch: Self::NO_RECORD, offset: 0 };

    /// A bare offset, checked against the partition's range only.
    pub fn unchecked(offset: i64) -> Self {
        Self { leader_epoch: Self::UNCHECKED, offset }
    }
}

/// When an append is acknowledged and becomes visible.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// Once synced: nothing acked is lost, whatever happens.
    #[default]
    Durable,
    /// Once written; synced within this many milliseconds.
    Interval {
        /// Longest time in milliseconds that an acked append stays unsynced.
        ms: u32,
    },
    /// Once written; the operating system decides when it is synced.
    Os,
}

/// What becomes of a topic's old records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cleanup {
    /// Old segments go as a whole.
    #[default]
    Delete,
    /// The last record of each key is kept.
    Compact,
}

/// A topic to create.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewTopic {
    /// `[a-zA-Z0-9._-]{1,249}`, neither `.` nor `..`.
    pub name: String,
    /// How many partitions, 1 to [`NewTopic::PARTITIONS_MAX`].
    pub partitions: u32,
    /// A segment is closed before it outgrows this many bytes.
    pub segment_bytes_max: u64,
    /// What an ack means.
    pub mode: Mode,
    /// What becomes of old records.
    pub cleanup: Cleanup,
}

impl NewTopic {
    /// Most partitions of one topic.
    pub const PARTITIONS_MAX: u32 = 1024;
    /// Segment size of ordinary topics.
    pub const SEGMENT_BYTES: u64 = 256 << 20;
    /// Segment size of changelogs, which are replayed and compacted.
    pub const CHANGELOG_SEGMENT_BYTES: u64 = 16 << 20;

    /// A durable topic that keeps everything.
    pub fn new(name: impl Into<String>, partitions: u32) -> Self {
        Self {
            name: name.into(),
            partitions,
            segment_bytes_max: Self::SEGMENT_BYTES,
            mode: Mode::Durable,
            cleanup: Cleanup::Delete,
        }
    }

    /// A compacted topic with small segments.
    pub fn changelog(name: impl Into<String>, partitions: u32) -> Self {
        Self {
            segment_bytes_max: Self::CHANGELOG_SEGMENT_BYTES,
            cleanup: Cleanup::Compact,
            ..Self::new(name, partitions)
        }
    }
}

/// What is to change about a topic; none keeps what is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TopicChange {
    /// How many partitions: never fewer than there are. New ones begin empty, and keys hash to other partitions.
    pub partitions: Option<u32>,
    /// For the batches that come; a segment that is larger already takes no more of them.
    pub segment_bytes_max: Option<u64>,
    /// What becomes of old records.
    pub cleanup: Option<Cleanup>,
}

/// What deleting a topic does where somebody depends on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IfUsed {
    /// Refused while a group has offsets in it or an open transaction touches it.
    #[default]
    Refuse,
    /// Its partitions leave the open transactions, its offsets leave the groups, in the same entry.
    Delete,
}

/// A topic that exists.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicInfo {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// How many partitions.
    pub partitions: u32,
    /// A segment is closed before it outgrows this many bytes.
    pub segment_bytes_max: u64,
    /// What an ack means.
    pub mode: Mode,
    /// What becomes of old records.
    pub cleanup: Cleanup,
}

impl TopicInfo {
    /// The partitions in order.
    pub fn topic_partitions(&self) -> impl Iterator<Item = TopicPartition> + use<> {
        let topic = self.uuid;
        (0..self.partitions).map(move |partition| TopicPartition { topic, partition })
    }
}

/// A producer's identity and its fencing number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Producer {
    /// Producer id.
    pub id: i64,
    /// Producer epoch. Each transaction of our clients has its own.
    pub epoch: i16,
}

/// The connection a request came on. Requests of one (producer id, epoch) count only on the newest connection
/// that used it, so one delayed in a dead connection can not act after its resend was answered.
///
/// Numbers must grow with the age of connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Connection(pub u64);

impl Connection {
    /// A caller in the owner's own process whose calls can not be delayed.
    pub const LOCAL: Self = Self(0);
}

/// Asks for a producer id, or for the next epoch of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitProducer {
    /// Name under which transactions survive their client; `None` for a plain idempotent producer.
    pub transactional_id: Option<String>,
    /// The client lives in the owner's process: its open transaction is aborted when the directory opens again.
    pub local: bool,
    /// An open transaction older than this is aborted.
    pub timeout_ms: u32,
    /// The (producer id, epoch) that the client holds and wants replaced: anything but the current one, or a
    /// retry of the request that replaced it, is fenced.
    pub carried: Option<Producer>,
}

/// An append that is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appended {
    /// Offset of the batch's first record.
    pub base_offset: i64,
    /// Where a reader goes on after the batch.
    pub next: Position,
    /// The batch was there already: this is the answer to its first append.
    pub duplicate: bool,
}

/// A check made where an offset commit is sequenced, e.g. that its member still belongs to the group generation.
/// It runs under the sequencer's lock: it must be quick and must not call the log.
pub type Guard = Arc<dyn Fn() -> bool + Send + Sync>;

/// One partition's committed position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OffsetCommit {
    /// The partition that was read.
    pub partition: TopicPartition,
    /// Where to go on.
    pub position: Position,
    /// Kept with it and given back.
    pub metadata: Bytes,
}

/// Offsets that become committed together with a transaction.
#[derive(Clone)]
pub struct AddOffsets {
    /// The transaction's producer.
    pub producer: Producer,
    /// The consumer group.
    pub group: String,
    /// The positions.
    pub offsets: Vec<OffsetCommit>,
    /// See [`Guard`].
    pub guard: Option<Guard>,
    /// See [`Connection`].
    pub connection: Connection,
}

/// Offsets committed at once, outside a transaction.
#[derive(Clone)]
pub struct CommitOffsets {
    /// The consumer group.
    pub group: String,
    /// The positions.
    pub offsets: Vec<OffsetCommit>,
    /// See [`Guard`].
    pub guard: Option<Guard>,
}

/// What a group has committed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GroupOffsets {
    /// Committed positions, by partition.
    pub committed: Vec<OffsetCommit>,
    /// Partitions whose next position waits for the end of an open transaction. A reader that must not process
    /// twice waits until this is empty: see [`Released`](crate::Released).
    pub pending: Vec<TopicPartition>,
}

/// How a transaction ended, or shall end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Outcome {
    /// Its records and offsets count.
    Committed,
    /// They do not.
    Aborted,
}

/// Ends a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndTxn {
    /// The transaction's producer is looked up by this name, so that a retry finds its answer after an id changed.
    pub transactional_id: String,
    /// The producer as it was in the transaction.
    pub producer: Producer,
    /// How it shall end.
    pub outcome: Outcome,
    /// See [`Connection`].
    pub connection: Connection,
}

/// A transaction has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// How. A retry is told how the first request ended.
    pub outcome: Outcome,
    /// The producer of the next transaction: another epoch, or another id after the last epoch.
    pub next: Producer,
}

/// What a reader may see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Isolation {
    /// Everything acknowledged: up to the high watermark.
    ReadUncommitted,
    /// Up to the last stable offset; records in [`ReadBatches::aborted`] are to be skipped.
    ReadCommitted,
}

/// Records of one aborted transaction in one partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AbortedRange {
    /// Batches of this producer id are meant.
    pub producer_id: i64,
    /// First offset of the transaction.
    pub first: i64,
    /// Offset of its abort marker, included.
    pub last: i64,
}

/// Offsets of a partition, of released entries only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartitionOffsets {
    /// First kept offset.
    pub log_start: i64,
    /// First offset not yet released.
    pub high_watermark: i64,
    /// First offset that a read-committed reader may not see yet.
    pub last_stable: i64,
    /// The position at the high watermark, to start reading at the end.
    pub end: Position,
}

/// Stored batches, byte for byte, each verified.
#[derive(Clone, Debug)]
pub struct ReadBatches {
    /// Whole batches; empty where there is nothing more to see. The first may begin before the asked offset.
    pub batches: Bytes,
    /// Aborted transactions that touch the batches (read committed only).
    pub aborted: Vec<AbortedRange>,
    /// Where to go on.
    pub next: Position,
    /// The partition's offsets at that moment.
    pub offsets: PartitionOffsets,
}
