//! The log and the clock as the engine sees them: traits, with Kafka's semantics and no implementation.
//!
//! The engine's machines ([`crate::engine`]) do no input or output: they take events and return actions. What runs
//! them (the threads runtime, the test driver) carries those actions out through the traits of
//! this file. `tidemill-adapters` implements them over the broker; the test driver has one in memory.
//!
//! ```text
//!   Log ──▶ fence(identity) ─▶ Box<dyn Transactions>      one per process; fences every older one
//!      ├──▶ committed(group)    offsets, waiting until no fenced transaction is pending
//!      ├──▶ read(..)            read committed, returns at once
//!      └──▶ input(partitions)   ─▶ Box<dyn Input>         the same, waiting for data
//! ```
//!
//! Invariants an implementation keeps:
//!
//! * `read` and `input` serve committed records only, in offset order, and never past the last stable offset.
//! * `Transactions::end(End::Commit)` that answers [`Ended::Committed`] made everything sent since the last end
//!   durable and visible in one step, offsets included; [`Ended::Aborted`] means none of it ever becomes visible.
//!   [`Ended::Unknown`] means ask again: the same call is repeated until it knows.
//! * A call blocks at most for its own deadline. Calls are made from one dedicated thread, never from a task.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::record::{RecordBatch, RecordParts};

/// A topic's incarnation: a topic deleted and made again under the same name has another one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct TopicUuid(pub u128);

impl fmt::Debug for TopicUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// What identifies a topic: its name for people, its uuid for positions.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TopicId {
    /// The topic's name.
    pub name: Arc<str>,
    /// The topic's incarnation.
    pub uuid: TopicUuid,
}

/// A topic and the number of its partitions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicInfo {
    /// Name and incarnation.
    pub id: TopicId,
    /// Number of partitions, numbered from 0.
    pub partitions: u32,
}

/// How a topic drops old records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cleanup {
    /// By age or size.
    Delete,
    /// The newest record of each key is kept; an empty value is a delete.
    Compact,
}

/// A topic to be created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewTopic {
    /// Its name.
    pub name: String,
    /// Number of partitions.
    pub partitions: u32,
    /// How it drops old records.
    pub cleanup: Cleanup,
}

/// A place in a partition that survives a change of leaders: the next offset to read, and the leader epoch of the
/// batch before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Position {
    /// Leader epoch of the batch before `offset`.
    pub leader_epoch: i32,
    /// The next offset to read.
    pub offset: i64,
}

impl Position {
    /// The leader epoch of a bare offset: only its bounds are checked.
    pub const UNCHECKED: i32 = -1;

    /// Where a log that starts at `log_start` begins: what came before it, if anything did, is not known.
    pub fn beginning(log_start: i64) -> Self {
        Self { leader_epoch: if log_start == 0 { 0 } else { Self::UNCHECKED }, offset: log_start }
    }
}

/// The ends of a partition at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartitionEnds {
    /// First offset kept.
    pub log_start: i64,
    /// First offset not yet released to readers.
    pub high_watermark: i64,
    /// Everything below belongs to transactions whose end is released.
    pub last_stable: i64,
    /// Where a reader that has read everything stands.
    pub end: Position,
}

/// What a read of one partition returned.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// The partition's number.
    pub partition: u32,
    /// Decoded batches in offset order. Empty if there was nothing, or only control batches and aborted records.
    pub batches: Vec<RecordBatch>,
    /// Where to read on. Beyond the last record where control batches and aborted records follow it.
    pub next: Position,
    /// True if `next` has reached the *high watermark*: nothing is there, not even an open transaction's records.
    /// Only such a partition may turn idle.
    pub caught_up: bool,
}

/// An offset committed by the job's group, with the metadata the engine gave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommittedOffset {
    /// The topic.
    pub topic: TopicId,
    /// The partition.
    pub partition: u32,
    /// Where the next epoch starts to read.
    pub position: Position,
    /// The engine's own bytes: see [`crate::names::PartitionMark`].
    pub metadata: Vec<u8>,
}

/// An error of the log, cut by what the engine does about it.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// Another process runs the same job now. This one stops without touching anything else.
    #[error("fenced: another process now runs as `{identity}`")]
    Fenced {
        /// The transactional id both used.
        identity: String,
    },
    /// A topic that the job needs does not exist. `streamctl topic create` makes it.
    #[error("topic `{topic}` does not exist")]
    NoSuchTopic {
        /// The missing topic.
        topic: String,
    },
    /// A position was refused: the topic was made again, or the log lost what the position names.
    #[error("partition {partition} of `{topic}` no longer has offset {offset}")]
    PositionLost {
        /// The topic.
        topic: String,
        /// The partition.
        partition: u32,
        /// The offset that was asked for.
        offset: i64,
    },
    /// The log could not be reached within its deadline, or the connection was lost: the job returns to its last
    /// commit and tries again.
    #[error("the log is not reachable: {source}")]
    Unreachable {
        /// What the client saw.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The request was refused and would be refused again: the job stops with this error.
    #[error("the log refused: {source}")]
    Refused {
        /// What the log said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl LogError {
    /// A read came back with nothing although committed records lie before `end`. Taking that for the end would lose
    /// them, so it is a failure like that of a connection: asked again, and given up after a while.
    pub(crate) fn nothing_read(topic: &TopicId, partition: u32, offset: i64, end: i64) -> Self {
        let what = format!(
            "partition {partition} of `{}` gives nothing from offset {offset} on, though it has committed records up to {end}",
            topic.name
        );
        Self::Unreachable { source: what.into() }
    }
}

/// The log.
pub trait Log: Send + Sync + 'static {
    /// The topic's incarnation and partition count, if it exists.
    fn topic(&self, name: &str) -> Result<Option<TopicInfo>, LogError>;

    /// Makes a topic, durably. An existing one is returned as it is.
    fn create_topic(&self, new: &NewTopic) -> Result<TopicInfo, LogError>;

    /// The ends of one partition now.
    fn ends(&self, topic: &TopicId, partition: u32) -> Result<PartitionEnds, LogError>;

    /// Whether `position` still names a place of this incarnation's history: its leader epoch is known, and its
    /// offset is not beyond what that epoch wrote. Says nothing about the log start.
    fn holds(&self, topic: &TopicId, partition: u32, position: Position) -> Result<bool, LogError>;

    /// Committed records from `from` on, at least one batch if there is one, about `bytes_max` otherwise. Returns at once.
    fn read(
        &self,
        topic: &TopicId,
        partition: u32,
        from: Position,
        bytes_max: usize,
    ) -> Result<Fetched, LogError>;

    /// Opens a reader over partitions of one topic.
    fn input(&self, topic: &TopicId, partitions: &[(u32, Position)]) -> Result<Box<dyn Input>, LogError>;

    /// Becomes the only process that commits as `identity`: an older one is fenced and its open transaction aborted.
    fn fence(&self, identity: &str) -> Result<Box<dyn Transactions>, LogError>;

    /// The offsets committed by `group`, once no transaction that holds offsets of it is pending.
    fn committed(&self, group: &str) -> Result<Vec<CommittedOffset>, LogError>;
}

/// A reader that waits for data, over some partitions of one topic.
pub trait Input: Send {
    /// The next records of any partition that is not paused. Waits at most `wait` where there are none, and then
    /// returns one empty [`Fetched`] per partition that waited (`caught_up` is meaningful in it).
    fn poll(&mut self, wait: Duration, bytes_max: usize) -> Result<Vec<Fetched>, LogError>;

    /// Stops or continues fetching a partition; a paused one is not waited for. The engine pauses partitions whose
    /// event-time watermark runs ahead and those whose queue is full.
    fn pause(&mut self, partition: u32, fetching: Fetching);
}

/// Whether a partition is fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetching {
    /// It is fetched and waited for.
    On,
    /// It is left alone.
    Paused,
}

/// How a transaction is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Everything in it becomes visible, in one step.
    Commit,
    /// Nothing in it ever becomes visible.
    Abort,
}

/// What became of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It is committed and durable. The positions behind the last record sent to each of its changelog partitions
    /// (all partitions may be listed; the engine looks up those it needs).
    Committed(Vec<(TopicId, u32, Position)>),
    /// It was aborted, by a timeout for example.
    Aborted,
    /// No answer: ask again.
    Unknown,
}

/// An offset to commit within the transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OffsetCommit {
    /// The topic.
    pub topic: TopicId,
    /// The partition.
    pub partition: u32,
    /// Where the next epoch starts to read.
    pub position: Position,
    /// Kept with the offset.
    pub metadata: Vec<u8>,
}

/// The transactional producer of one process. The first call after an end opens a transaction.
pub trait Transactions: Send {
    /// Puts records into the open transaction. May return before they are acked; [`Self::end`] waits for them.
    fn send(
        &mut self,
        topic: &TopicId,
        partition: u32,
        records: &mut dyn Iterator<Item = RecordParts<'_>>,
    ) -> Result<(), LogError>;

    /// Appends records outside any transaction: they are visible at once, whatever becomes of the open transaction. May
    /// return before they are acked; [`Self::end`] waits for them before it commits, and fails where one was refused.
    fn send_outside(
        &mut self,
        topic: &TopicId,
        partition: u32,
        records: &mut dyn Iterator<Item = RecordParts<'_>>,
    ) -> Result<(), LogError>;

    /// Nothing more is to be sent just now: what waits for company may leave. Called often; does not wait.
    fn nudge(&mut self) -> Result<(), LogError> {
        Ok(())
    }

    /// Puts offsets of `group` into the open transaction.
    fn offsets(&mut self, group: &str, offsets: &[OffsetCommit]) -> Result<(), LogError>;

    /// Waits for every ack, of records outside too, and ends the transaction. After [`Ended::Unknown`] the same call is repeated.
    fn end(&mut self, how: End) -> Result<Ended, LogError>;
}
