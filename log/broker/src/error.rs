//! Why the broker refuses: one enum, cut by what the caller does next, with written numbers on the wire.

use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tidemill_rpc::{Code, ErrorBody, Fate, RpcError, Wire, WireError};

use crate::api::{Position, ProducerIdentity};

/// A request, or one partition of it, that was refused. Unless a variant says otherwise nothing moved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, WireError)]
pub enum BrokerError {
    // Retry: the same request may pass later.
    /// The broker has no room for it now.
    #[error("busy: {what}")]
    #[wire(code = 1)]
    Busy {
        /// Which bound was met.
        what: String,
    },
    /// A stable offset fetch waited for a transaction that did not end.
    #[error("offsets of group {group:?} are pending in a transaction that has not ended")]
    #[wire(code = 2)]
    OffsetsPending {
        /// The group.
        group: String,
    },
    // Correct the request.
    /// The request is not valid as it stands.
    #[error("invalid request: {what}")]
    #[wire(code = 10)]
    Invalid {
        /// What is wrong with it.
        what: String,
    },
    /// No such topic.
    #[error("there is no topic {topic:?}")]
    #[wire(code = 11)]
    UnknownTopic {
        /// Its name or identity.
        topic: String,
    },
    /// The topic has no such partition.
    #[error("topic {topic:?} has no partition {partition}")]
    #[wire(code = 12)]
    UnknownPartition {
        /// The topic's name or identity.
        topic: String,
        /// The partition asked for.
        partition: u32,
    },
    /// The name is taken.
    #[error("topic {topic:?} is already there")]
    #[wire(code = 13)]
    TopicExists {
        /// Its name.
        topic: String,
    },
    /// The position was never a place in this partition, or is not one any more.
    #[error("offset {} of leader epoch {} does not hold in {partition}", position.offset, position.leader_epoch)]
    #[wire(code = 14)]
    PositionDoesNotHold {
        /// The partition.
        partition: String,
        /// The position asked for.
        position: Position,
    },
    /// The offset is below the log start or beyond the high watermark.
    #[error("offset {offset} is outside {log_start}..={high_watermark} of {partition}")]
    #[wire(code = 15)]
    OutOfRange {
        /// The partition.
        partition: String,
        /// The offset asked for.
        offset: i64,
        /// First kept.
        log_start: i64,
        /// First not yet released.
        high_watermark: i64,
    },
    /// Somebody depends on the topic that is to be deleted.
    #[error("topic {topic:?} is in use{}", used_by(groups, transactions))]
    #[wire(code = 16)]
    TopicInUse {
        /// Its name.
        topic: String,
        /// Groups with offsets in it.
        groups: Vec<String>,
        /// Transactional ids whose open transaction touches it.
        transactions: Vec<String>,
    },

    // Resend from the first unacked batch, or take a new epoch.
    /// The batch's sequence is neither the next one nor one of the last five batches.
    #[error("sequence {found} in {partition}, expected {expected}")]
    #[wire(code = 20)]
    OutOfOrder {
        /// The partition.
        partition: String,
        /// The next sequence.
        expected: i32,
        /// The batch's.
        found: i32,
    },
    /// A newer connection has used this identity.
    #[error("producer {} epoch {} now sends on a newer connection", producer.id, producer.epoch)]
    #[wire(code = 21)]
    OldConnection {
        /// The identity.
        producer: ProducerIdentity,
    },

    // Stop: someone else took over.
    /// The epoch is not the current one.
    #[error("producer {} epoch {} is fenced: another instance took over, or its transaction timed out", producer.id, producer.epoch)]
    #[wire(code = 30)]
    Fenced {
        /// The identity.
        producer: ProducerIdentity,
    },
    /// The broker knows no such producer id; it expired, or never was.
    #[error("producer id {} is not known: it expired or was never given", producer.id)]
    #[wire(code = 31)]
    UnknownProducer {
        /// The identity.
        producer: ProducerIdentity,
    },

    // Report: something on disk is damaged or full.
    /// A partition's stored bytes are damaged; the others stay readable. Where opening the directory found it, the log is
    /// read-only.
    #[error("corruption: {what}")]
    #[wire(code = 40)]
    Corrupt {
        /// File, position, expected, found.
        what: String,
    },
    /// There is no room on the disk; nothing was appended.
    #[error("the disk is full: {what}")]
    #[wire(code = 41)]
    DiskFull {
        /// What was being reserved.
        what: String,
    },
    /// A write or sync failed: nothing is appended until the directory is opened again. What
    /// was not acked may or may not survive.
    #[error("the log has stopped: {what}")]
    #[wire(code = 42)]
    Stopped {
        /// The failure.
        what: String,
    },

    /// The owner of the directory does not answer, or one owner after another died; the request may have been done.
    #[error("{what}")]
    #[wire(code = 43)]
    Unavailable {
        /// Who, and what is known.
        what: String,
    },

    /// The transport failed; its fate says whether the request was executed.
    #[error(transparent)]
    #[wire(rpc)]
    Rpc(#[from] RpcError),
}

fn used_by(groups: &[String], transactions: &[String]) -> String {
    let mut text = String::new();
    if !groups.is_empty() {
        text += &format!(": offsets are committed in it by {}", groups.join(", "));
    }
    if !transactions.is_empty() {
        let begins = if groups.is_empty() { ":" } else { ";" };
        text += &format!("{begins} a transaction touches it that {} has open", transactions.join(", "));
    }
    text
}

/// What a caller does about a [`BrokerError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reaction {
    /// Send the same again, later.
    Retry,
    /// Change the request.
    Correct,
    /// Resend from the first unacked batch.
    Resend,
    /// Stop: this producer is not the current one.
    Stop,
    /// Tell an operator.
    Report,
    /// Ask again before deciding: the request may have been executed.
    Unknown,
}

impl BrokerError {
    /// Whether the connection died under the request, so that another one may bring the answer.
    pub fn is_dead_connection(&self) -> bool {
        // Cancelled: a drain ran out of time. A caller that cancels its own call does not see an error.
        let dead = |code| matches!(code, Code::Unavailable | Code::Draining | Code::Cancelled);
        matches!(self, BrokerError::Rpc(error) if dead(error.code))
    }

    /// What a caller does about it.
    pub fn reaction(&self) -> Reaction {
        use BrokerError::*;
        match self {
            Busy { .. } | OffsetsPending { .. } => Reaction::Retry,
            Invalid { .. }
            | UnknownTopic { .. }
            | UnknownPartition { .. }
            | TopicExists { .. }
            | TopicInUse { .. }
            | PositionDoesNotHold { .. }
            | OutOfRange { .. } => Reaction::Correct,
            OutOfOrder { .. } | OldConnection { .. } => Reaction::Resend,
            Fenced { .. } | UnknownProducer { .. } => Reaction::Stop,
            Unavailable { .. } | Corrupt { .. } | DiskFull { .. } | Stopped { .. } => Reaction::Report,
            Rpc(error) => match error.fate {
                Fate::NotSent | Fate::Rejected => Reaction::Retry,
                Fate::Executed => Reaction::Report,
                Fate::Unknown => Reaction::Unknown,
            },
        }
    }
}

/// A [`BrokerError`] of one partition, beside the results of others. It travels by its written number, so an older
/// reader that does not know it still reads its neighbours.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Wire)]
pub struct PartitionError {
    code: u32,
    fields: Bytes,
}

impl PartitionError {
    /// The error; a number this build does not know becomes [`BrokerError::Rpc`].
    pub fn into_error(self) -> BrokerError {
        let body = ErrorBody::from_parts(self.code, self.fields);
        BrokerError::decode(&body).unwrap_or_else(BrokerError::Rpc)
    }
}

impl From<BrokerError> for PartitionError {
    fn from(error: BrokerError) -> Self {
        let (code, fields) = error.encode().into_parts();
        PartitionError { code, fields }
    }
}

impl fmt::Debug for PartitionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.clone().into_error(), f)
    }
}

impl fmt::Display for PartitionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.clone().into_error(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_survives_the_way_beside_results() {
        let error = BrokerError::OutOfOrder { partition: "t-1".into(), expected: 5, found: 7 };
        assert_eq!(PartitionError::from(error.clone()).into_error(), error);
        let unknown = PartitionError { code: 9999, fields: Bytes::new() };
        assert!(matches!(unknown.into_error(), BrokerError::Rpc(e) if e.code == Code::UnknownError));
    }
}
