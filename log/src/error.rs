//! Errors, cut by what the caller does next: try again, correct the request, stop, report damage.

use crate::types::{Position, Producer, TopicPartition};
use std::io;
use std::sync::Arc;
use thiserror::Error;

/// Bytes that are not what was written. Nothing was changed because of it.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{file} is damaged at byte {position}: expected {expected}, found {found}")]
pub struct Corruption {
    /// Path inside the data directory.
    pub file: String,
    /// Byte position in it.
    pub position: u64,
    /// What should be there.
    pub expected: String,
    /// What is there.
    pub found: String,
}

/// Why a directory did not open.
#[derive(Debug, Error)]
pub enum OpenError {
    /// There is no log here and the configuration does not allow to create one.
    #[error("no data directory here (`format` is missing)")]
    Missing,
    /// Written by a newer version.
    #[error("the directory has layout {found}; this program knows layouts up to {known}")]
    NewerLayout {
        /// Layout version found.
        found: u32,
        /// Newest version known.
        known: u32,
    },
    /// Not even the last checkpoint can be read, so nothing can be served.
    #[error("{0}")]
    Corrupt(Corruption),
    /// The operating system failed.
    #[error("{doing}")]
    Io {
        /// What was being done.
        doing: String,
        /// Its answer.
        source: io::Error,
    },
}

/// Why a request that changes the log was not done.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum WriteError {
    /// Too much is queued. Try again later; nothing happened.
    #[error("too many requests are queued")]
    Busy,
    /// The wait ended first. The request goes on and may still be done.
    #[error("no answer within the deadline; the request may still be done")]
    Deadline,
    /// No space left. Nothing happened; make room and try again.
    #[error(
        "the disk is full: {needed} bytes could not be reserved for {file}; free some space and try again"
    )]
    DiskFull {
        /// Path inside the data directory.
        file: String,
        /// Bytes that were asked for.
        needed: u64,
    },
    /// The request is wrong; the same request will be refused again.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Somebody else took over: stop.
    #[error("fenced: the current producer is {current:?}")]
    Fenced {
        /// The current producer, where there is one.
        current: Option<Producer>,
    },
    /// The directory was opened read-only because it is damaged.
    #[error("the directory is read-only: {0}; `streamctl log dump FILE` shows what of the file is whole")]
    Damaged(Corruption),
    /// The log is closed, or an earlier write or sync failed. What was asked may or may not have happened:
    /// only opening the directory again tells.
    #[error("the log stopped: {0}; open the directory again")]
    Stopped(Arc<str>),
}

/// Why a request is wrong.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Refusal {
    /// No such topic or partition.
    #[error("there is no partition {0}")]
    UnknownPartition(TopicPartition),
    /// The name is taken.
    #[error("topic {0} exists")]
    TopicExists(String),
    /// Somebody depends on the topic that is to be deleted.
    #[error("topic {topic} is in use: offsets of groups {groups:?}, open transactions of {transactions:?}")]
    TopicInUse {
        /// Its name.
        topic: String,
        /// Groups with offsets in it.
        groups: Vec<String>,
        /// Transactional ids whose open transaction touches it.
        transactions: Vec<String>,
    },
    /// Names are `[a-zA-Z0-9._-]{1,249}`, neither `.` nor `..`.
    #[error("{0:?} is not a name of 1 to 249 letters, digits, dots, underscores and hyphens")]
    BadName(String),
    /// A number out of its range, or something this version does not do.
    #[error("{0}")]
    Invalid(String),
    /// The batch's bytes are not a batch.
    #[error("bad batch: {0}")]
    BadBatch(String),
    /// The batch is larger than one entry may be.
    #[error("{bytes} bytes are more than the {bytes_max} that one entry may hold")]
    TooLarge {
        /// Its size.
        bytes: u64,
        /// The limit.
        bytes_max: u64,
    },
    /// Not the next sequence number of this producer on this partition, and not one of the last five batches.
    #[error("sequence {found} of producer {producer:?} on {partition}: expected {expected}")]
    OutOfOrder {
        /// The partition.
        partition: TopicPartition,
        /// The producer.
        producer: Producer,
        /// The next sequence.
        expected: i32,
        /// The batch's.
        found: i32,
    },
    /// This producer id is not known (any more): ask for a new one.
    #[error("producer id {0} is not known")]
    UnknownProducer(i64),
    /// This transactional id is not known.
    #[error("transactional id {0:?} is not known")]
    UnknownTransactionalId(String),
    /// Transactional batches need a producer with a transactional id, and the other way round.
    #[error("producer id {0}: a batch is transactional exactly if its producer has a transactional id")]
    NotTransactional(i64),
    /// The same producer and epoch were used on a newer connection since.
    #[error("a newer connection uses this producer")]
    OldConnection,
    /// The group's member or generation is not current.
    #[error("the member does not belong to the current generation of its group")]
    OldGeneration,
    /// The position names records that are gone, or never were.
    #[error("{partition}: {position:?} does not hold")]
    PositionLost {
        /// The partition.
        partition: TopicPartition,
        /// The position.
        position: Position,
    },
}

/// Why nothing could be read.
#[derive(Debug, Error)]
pub enum ReadError {
    /// No such topic or partition.
    #[error("there is no partition {0}")]
    UnknownPartition(TopicPartition),
    /// The offset is below the first kept or above the high watermark.
    #[error("{partition}: offset {offset} is outside {log_start}..={high_watermark}")]
    OutOfRange {
        /// The partition.
        partition: TopicPartition,
        /// The asked offset.
        offset: i64,
        /// First kept offset.
        log_start: i64,
        /// First offset not yet released.
        high_watermark: i64,
    },
    /// The records before this position are not those the caller saw.
    #[error("{partition}: {position:?} does not hold")]
    PositionLost {
        /// The partition.
        partition: TopicPartition,
        /// The position.
        position: Position,
    },
    /// Stored bytes are damaged. This partition fails here; others go on.
    #[error("{partition}: {corruption}; `streamctl log dump FILE` shows what of it is whole")]
    Corrupt {
        /// The partition.
        partition: TopicPartition,
        /// Where and how.
        corruption: Corruption,
    },
    /// The operating system failed.
    #[error("reading {file}")]
    Io {
        /// Path inside the data directory.
        file: String,
        /// Its answer.
        source: io::Error,
    },
}
