//! The broker's service: one trait, implemented by the broker of this process and by the stub of a remote one.
//!
//! Batches never enter a serde body. A produce carries them back to back in its attachment and its body lists, in the
//! same order, which partition each belongs to and how long it is; a fetch answers the same way:
//!
//! ```text
//!   body        [ topic-partition, bytes ] [ topic-partition, bytes ] ...
//!   attachment  | batch                   | batch                    | ...
//! ```
//!
//! Invariants
//! * Every answer rests on released entries only: what was answered survives what the topic's mode promises.
//! * A produce or an end is never resent by the transport; [`crate::Producer`] and [`crate::TransactionalProducer`]
//!   resend by sequence, so a repeat is dropped where it is sequenced.
//! * Requests of a (producer id, epoch) count only on the newest connection that used it; others get
//!   [`BrokerError::OldConnection`].
//! * A refusal of one partition does not refuse the others: their results stand beside it.
//!
//! Not here yet: group membership (a group is a name with offsets), and ends that keep the epoch for clients of the
//! older Kafka protocol: every end bumps it.

use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tidemill_rpc::{Attachment, Wire, service};

use crate::error::{BrokerError, PartitionError};

/// Topics, produce, fetch, offsets and transactions of one data directory.
#[service(name = "broker.v1")]
pub trait Broker: Send + Sync + 'static {
    /// Creates a topic; durable on return.
    async fn create_topic(&self, topic: NewTopic) -> Result<Topic, BrokerError>;

    /// Every topic, by name.
    #[rpc(idempotent, timeout = "10s")]
    async fn topics(&self) -> Result<Vec<Topic>, BrokerError>;

    /// Deletes a topic with everything in it, durably on return; its files go after the next checkpoints. Names its
    /// identity, so that asked again it does not delete a younger topic of the same name; one that is gone is no error.
    async fn delete_topic(&self, request: DeleteTopic) -> Result<(), BrokerError>;

    /// Changes a topic, durably on return. Asked again it changes nothing more.
    async fn alter_topic(&self, request: AlterTopic) -> Result<Topic, BrokerError>;

    /// One topic with the offsets of its partitions.
    #[rpc(idempotent, timeout = "10s")]
    async fn describe(&self, name: String) -> Result<TopicDescription, BrokerError>;

    /// Gives a producer its (producer id, epoch); with a transactional id it fences and aborts what that id has open.
    async fn init_producer(&self, request: InitProducer) -> Result<ProducerIdentity, BrokerError>;

    /// Appends batches of one producer, in the order of the request; answered when all of them are released or refused.
    async fn produce(&self, request: Produce, batches: Attachment) -> Result<Produced, BrokerError>;

    /// Reads from many partitions; waits up to [`Fetch::wait_ms_max`] until one of them has something.
    #[rpc(idempotent, timeout = "40s")]
    async fn fetch(&self, request: Fetch) -> Result<(Fetched, Attachment), BrokerError>;

    /// The earliest, latest or last stable position of many partitions, or that of a time.
    #[rpc(idempotent, timeout = "30s")]
    async fn list_offsets(&self, request: ListOffsets) -> Result<ListedOffsets, BrokerError>;

    /// Commits a group's positions, at once or as part of a producer's open transaction.
    async fn commit_offsets(&self, request: CommitOffsets) -> Result<(), BrokerError>;

    /// A group's committed positions.
    #[rpc(idempotent, timeout = "40s")]
    async fn fetch_offsets(&self, request: FetchOffsets) -> Result<FetchedOffsets, BrokerError>;

    /// Commits or aborts a producer's transaction. Asked again for the same epoch it tells the same outcome.
    async fn end_transaction(&self, request: EndTransaction) -> Result<Ended, BrokerError>;
}

/// A topic's identity. A name that is deleted and created again gets another one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Wire)]
pub struct TopicId(pub u128);

impl fmt::Debug for TopicId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for TopicId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// One partition of one topic.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Wire)]
pub struct TopicPartition {
    /// The topic.
    pub topic: TopicId,
    /// Its number, from 0.
    pub partition: u32,
}

impl fmt::Debug for TopicPartition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for TopicPartition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.topic, self.partition)
    }
}

/// A place in a partition: the leader epoch of the record before it, and the offset. It holds if that epoch is known
/// and the offset is at most the next epoch's start, so a log that lost its tail is noticed, never misread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Wire)]
pub struct Position {
    /// Leader epoch of the record before `offset`; 0 before the first record, [`Position::UNCHECKED`] if unknown.
    pub leader_epoch: i32,
    /// The next offset to read.
    pub offset: i64,
}

impl Position {
    /// Leader epoch of a bare offset: only the range is checked.
    pub const UNCHECKED: i32 = -1;
    /// The place before the first record a partition ever had.
    pub const START: Position = Position { leader_epoch: 0, offset: 0 };

    /// A bare offset, as a user names one; checked against the partition's range only.
    pub fn unchecked(offset: i64) -> Self {
        Position { leader_epoch: Self::UNCHECKED, offset }
    }
}

/// When an append is acked and becomes visible.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub enum Mode {
    /// Once synced: an ack survives a power cut.
    #[default]
    Durable,
    /// Once written; synced within the interval, or appends stall.
    Interval {
        /// Longest time in milliseconds that an acked append stays unsynced.
        ms: u32,
    },
    /// Once written; a power cut may lose an unsynced suffix.
    Os,
}

/// What becomes of old records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub enum Cleanup {
    /// Whole old segments go, by retention.
    #[default]
    Delete,
    /// The last record per key stays.
    Compact,
}

/// What creating a topic does where the name is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub enum IfExists {
    /// Refuses with [`BrokerError::TopicExists`].
    #[default]
    Refuse,
    /// Answers with the topic there is, whatever its settings; so this form may be asked again.
    Keep,
}

/// A topic to create.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub struct NewTopic {
    /// `[a-zA-Z0-9._-]{1,249}`, not `.` or `..`.
    pub name: String,
    /// How many partitions, at least 1.
    pub partitions: u32,
    /// Where a segment rolls; none takes the log's default.
    pub segment_bytes_max: Option<u64>,
    /// When appends are released.
    pub mode: Mode,
    /// What becomes of old records.
    pub cleanup: Cleanup,
    /// What happens where the name is taken.
    pub if_exists: IfExists,
}

impl NewTopic {
    /// A durable topic with the log's defaults; refused where the name is taken.
    pub fn new(name: impl Into<String>, partitions: u32) -> Self {
        NewTopic {
            name: name.into(),
            partitions,
            segment_bytes_max: None,
            mode: Mode::default(),
            cleanup: Cleanup::default(),
            if_exists: IfExists::default(),
        }
    }

    /// The same, answered with the existing topic where the name is taken.
    pub fn keep_existing(mut self) -> Self {
        self.if_exists = IfExists::Keep;
        self
    }
}

/// What deleting a topic does where somebody depends on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub enum IfUsed {
    /// Refuses with [`BrokerError::TopicInUse`] while a group has offsets in it or an open transaction touches it.
    #[default]
    Refuse,
    /// Its partitions leave the open transactions, its offsets leave the groups, all in one step.
    Delete,
}

/// A topic to delete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub struct DeleteTopic {
    /// Its identity.
    pub topic: TopicId,
    /// What happens where it is in use.
    pub if_used: IfUsed,
}

/// What to change about a topic; none keeps what is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub struct AlterTopic {
    /// Its identity.
    pub topic: TopicId,
    /// How many partitions: never fewer than there are. New ones begin empty, and keys hash to other partitions.
    pub partitions: Option<u32>,
    /// Where a segment rolls, for the batches that come.
    pub segment_bytes_max: Option<u64>,
    /// What becomes of old records.
    pub cleanup: Option<Cleanup>,
}

/// A topic as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub struct Topic {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub id: TopicId,
    /// How many partitions it has.
    pub partitions: u32,
    /// Where a segment rolls.
    pub segment_bytes_max: u64,
    /// When appends are released.
    pub mode: Mode,
    /// What becomes of old records.
    pub cleanup: Cleanup,
}

impl Topic {
    /// Partition `partition` of this topic.
    pub fn partition(&self, partition: u32) -> TopicPartition {
        TopicPartition { topic: self.id, partition }
    }
}

/// The offsets of one partition, of released State only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub struct PartitionOffsets {
    /// First kept.
    pub log_start: i64,
    /// First not yet released.
    pub high_watermark: i64,
    /// The smaller of the high watermark and the first offset of the oldest transaction whose end is not released.
    pub last_stable: i64,
    /// The position at the high watermark, to start reading at the end.
    pub end: Position,
}

/// A topic and the offsets of its partitions, by partition number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub struct TopicDescription {
    /// The topic.
    pub topic: Topic,
    /// One entry a partition.
    pub offsets: Vec<PartitionOffsets>,
}

/// Who produces: every request carries it, and only the current epoch of an id counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Wire)]
pub struct ProducerIdentity {
    /// Producer id.
    pub id: i64,
    /// Producer epoch.
    pub epoch: i16,
}

/// Asks for a producer's identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub struct InitProducer {
    /// None for a plain idempotent producer.
    pub transactional_id: Option<String>,
    /// An open transaction is aborted after this long.
    pub timeout_ms: u32,
    /// The identity this init follows: a plain producer that lost batches takes a new epoch by it, and an init whose
    /// answer was lost repeats with what it carried.
    pub carried: Option<ProducerIdentity>,
}

/// One batch of a produce.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub struct ProducePartition {
    /// Where it goes.
    pub partition: TopicPartition,
    /// How many bytes of the attachment it is.
    pub bytes: u32,
}

/// Batches of one producer. A batch whose attributes say transactional opens the producer's transaction, or joins it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub struct Produce {
    /// The identity written in every batch.
    pub producer: ProducerIdentity,
    /// One entry a batch, in the attachment's order; a partition may come more than once.
    pub batches: Vec<ProducePartition>,
}

/// What became of one batch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub enum ProduceOutcome {
    /// It is released.
    Appended {
        /// The offset of its first record.
        base_offset: i64,
        /// Where a reader goes on after it.
        next: Position,
        /// It had been appended before, by an earlier sending.
        duplicate: bool,
    },
    /// It moved nothing.
    Refused(PartitionError),
}

/// One outcome a batch, in the order of the request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub struct Produced {
    /// The outcomes.
    pub outcomes: Vec<ProduceOutcome>,
}

/// Which records a reader sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub enum Isolation {
    /// Up to the last stable offset, with the aborted ranges to leave out.
    #[default]
    ReadCommitted,
    /// Up to the high watermark.
    ReadUncommitted,
}

/// One partition of a fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub struct FetchPartition {
    /// Which partition.
    pub partition: TopicPartition,
    /// From where; it is checked, and refused with [`BrokerError::PositionDoesNotHold`].
    pub position: Position,
    /// At most this many bytes of it, but always one whole batch.
    pub bytes_max: u32,
}

/// Reads from many partitions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub struct Fetch {
    /// The partitions, served in this order until `bytes_max` is reached; rotate it to be fair.
    pub partitions: Vec<FetchPartition>,
    /// At most this many bytes in all, but always one whole batch.
    pub bytes_max: u32,
    /// How long to wait for the first byte; at most 30 s counts.
    pub wait_ms_max: u32,
    /// Which records are read.
    pub isolation: Isolation,
}

/// Records of an aborted transaction: the offsets `first..=last` that `producer_id` wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub struct AbortedRange {
    /// Who wrote them.
    pub producer_id: i64,
    /// The first offset of the transaction in this partition.
    pub first: i64,
    /// The offset of its abort marker (inclusive).
    pub last: i64,
}

/// What one partition gave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub struct FetchedPartition {
    /// Which partition.
    pub partition: TopicPartition,
    /// How many bytes of the attachment are its batches; they begin where the previous entry's end.
    pub bytes: u32,
    /// Where the next fetch continues; past the asked offset even where every record was left out.
    pub next: Position,
    /// The partition's offsets at that moment.
    pub offsets: PartitionOffsets,
    /// Read committed: the aborted transactions that touch these batches.
    pub aborted: Vec<AbortedRange>,
    /// Why nothing could be read; the other fields then hold the asked position and what is known.
    pub error: Option<PartitionError>,
}

/// One entry a partition, in the order of the request; its attachment is their batches back to back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub struct Fetched {
    /// The partitions.
    pub partitions: Vec<FetchedPartition>,
}

/// A named place in a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub enum At {
    /// The log start offset.
    Earliest,
    /// The high watermark.
    Latest,
    /// The last stable offset.
    Stable,
    /// The first record that is not older than this, in milliseconds since the epoch, among those below the high
    /// watermark; those of open and aborted transactions count, too.
    Time(i64),
}

/// Asks for positions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub struct ListOffsets {
    /// The partitions.
    pub partitions: Vec<TopicPartition>,
    /// Which place.
    pub at: At,
}

/// One position, or why there is none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub enum ListedOffset {
    /// The place asked for.
    Found(Position),
    /// Every record is older than the time asked for; the place of the high watermark.
    AllOlder(Position),
    /// Why not.
    Refused(PartitionError),
}

/// One entry a partition, in the order of the request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub struct ListedOffsets {
    /// The positions.
    pub offsets: Vec<ListedOffset>,
}

/// A position of a group in one partition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub struct GroupOffset {
    /// The partition.
    pub partition: TopicPartition,
    /// The next offset to read; refused if it does not hold.
    pub position: Position,
    /// The committer's own bytes, kept as they are.
    pub metadata: Bytes,
}

/// A transactional producer, as the requests name it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub struct TransactionalIdentity {
    /// Its transactional id.
    pub transactional_id: String,
    /// Its current identity.
    pub producer: ProducerIdentity,
}

/// Commits positions of a group: all of them or none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub struct CommitOffsets {
    /// The group.
    pub group: String,
    /// None commits at once; else they are pending until that producer's transaction ends, and open it if need be.
    pub transaction: Option<TransactionalIdentity>,
    /// The positions.
    pub offsets: Vec<GroupOffset>,
}

/// Whether an offset fetch waits for transactions that hold pending offsets of the group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub enum Stable {
    /// Waits until nothing is pending, at most this many milliseconds (30 s count), then
    /// [`BrokerError::OffsetsPending`].
    Wait(u32),
    /// Answers with what is committed and released now.
    #[default]
    Released,
}

/// Asks for a group's positions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub struct FetchOffsets {
    /// The group.
    pub group: String,
    /// Whether to wait for pending ones.
    pub stable: Stable,
}

/// Every position the group committed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub struct FetchedOffsets {
    /// By topic and partition.
    pub offsets: Vec<GroupOffset>,
}

/// How a transaction is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub enum End {
    /// Everything in it becomes visible.
    Commit,
    /// Nothing in it ever does.
    Abort,
}

/// How a transaction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub enum Outcome {
    /// Everything in it is visible.
    Committed,
    /// Nothing in it ever will be.
    Aborted,
}

/// Ends a transaction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub struct EndTransaction {
    /// Who ends it, with the identity the transaction was written under.
    pub who: TransactionalIdentity,
    /// How.
    pub end: End,
}

/// The end of a transaction, as it is told every time it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub struct Ended {
    /// What became of it.
    pub outcome: Outcome,
    /// The identity of the next transaction: another epoch, or another id after the last epoch.
    pub next: ProducerIdentity,
}
