//! Between the service's types and the log's: the log knows no RPC, so the types that travel are the broker's own.

use tidemill_log as log;
use uuid::Uuid;

use crate::api::*;
use crate::error::BrokerError;

impl From<Uuid> for TopicId {
    fn from(uuid: Uuid) -> Self {
        TopicId(uuid.as_u128())
    }
}

impl From<TopicId> for Uuid {
    fn from(id: TopicId) -> Self {
        Uuid::from_u128(id.0)
    }
}

impl From<log::TopicPartition> for TopicPartition {
    fn from(from: log::TopicPartition) -> Self {
        TopicPartition { topic: from.topic.into(), partition: from.partition }
    }
}

impl From<TopicPartition> for log::TopicPartition {
    fn from(from: TopicPartition) -> Self {
        log::TopicPartition { topic: from.topic.into(), partition: from.partition }
    }
}

impl From<log::Position> for Position {
    fn from(from: log::Position) -> Self {
        Position { leader_epoch: from.leader_epoch, offset: from.offset }
    }
}

impl From<Position> for log::Position {
    fn from(from: Position) -> Self {
        log::Position { leader_epoch: from.leader_epoch, offset: from.offset }
    }
}

impl From<log::Mode> for Mode {
    fn from(from: log::Mode) -> Self {
        match from {
            log::Mode::Durable => Mode::Durable,
            log::Mode::Interval { ms } => Mode::Interval { ms },
            log::Mode::Os => Mode::Os,
        }
    }
}

impl From<Mode> for log::Mode {
    fn from(from: Mode) -> Self {
        match from {
            Mode::Durable => log::Mode::Durable,
            Mode::Interval { ms } => log::Mode::Interval { ms },
            Mode::Os => log::Mode::Os,
        }
    }
}

impl From<log::Cleanup> for Cleanup {
    fn from(from: log::Cleanup) -> Self {
        match from {
            log::Cleanup::Delete => Cleanup::Delete,
            log::Cleanup::Compact => Cleanup::Compact,
        }
    }
}

impl From<Cleanup> for log::Cleanup {
    fn from(from: Cleanup) -> Self {
        match from {
            Cleanup::Delete => log::Cleanup::Delete,
            Cleanup::Compact => log::Cleanup::Compact,
        }
    }
}

impl From<log::TopicInfo> for Topic {
    fn from(from: log::TopicInfo) -> Self {
        Topic {
            name: from.name,
            id: from.uuid.into(),
            partitions: from.partitions,
            segment_bytes_max: from.segment_bytes_max,
            mode: from.mode.into(),
            cleanup: from.cleanup.into(),
        }
    }
}

impl From<IfUsed> for log::IfUsed {
    fn from(from: IfUsed) -> Self {
        match from {
            IfUsed::Refuse => log::IfUsed::Refuse,
            IfUsed::Delete => log::IfUsed::Delete,
        }
    }
}

impl From<NewTopic> for log::NewTopic {
    fn from(from: NewTopic) -> Self {
        let segment_bytes_max = from.segment_bytes_max.unwrap_or(match from.cleanup {
            Cleanup::Delete => log::NewTopic::SEGMENT_BYTES,
            Cleanup::Compact => log::NewTopic::CHANGELOG_SEGMENT_BYTES,
        });
        log::NewTopic {
            name: from.name,
            partitions: from.partitions,
            segment_bytes_max,
            mode: from.mode.into(),
            cleanup: from.cleanup.into(),
        }
    }
}

impl From<log::Producer> for ProducerIdentity {
    fn from(from: log::Producer) -> Self {
        ProducerIdentity { id: from.id, epoch: from.epoch }
    }
}

impl From<ProducerIdentity> for log::Producer {
    fn from(from: ProducerIdentity) -> Self {
        log::Producer { id: from.id, epoch: from.epoch }
    }
}

impl From<log::PartitionOffsets> for PartitionOffsets {
    fn from(from: log::PartitionOffsets) -> Self {
        PartitionOffsets {
            log_start: from.log_start,
            high_watermark: from.high_watermark,
            last_stable: from.last_stable,
            end: from.end.into(),
        }
    }
}

impl From<log::AbortedRange> for AbortedRange {
    fn from(from: log::AbortedRange) -> Self {
        AbortedRange { producer_id: from.producer_id, first: from.first, last: from.last }
    }
}

impl From<Isolation> for log::Isolation {
    fn from(from: Isolation) -> Self {
        match from {
            Isolation::ReadCommitted => log::Isolation::ReadCommitted,
            Isolation::ReadUncommitted => log::Isolation::ReadUncommitted,
        }
    }
}

impl From<GroupOffset> for log::OffsetCommit {
    fn from(from: GroupOffset) -> Self {
        log::OffsetCommit {
            partition: from.partition.into(),
            position: from.position.into(),
            metadata: from.metadata,
        }
    }
}

impl From<log::OffsetCommit> for GroupOffset {
    fn from(from: log::OffsetCommit) -> Self {
        GroupOffset {
            partition: from.partition.into(),
            position: from.position.into(),
            metadata: from.metadata,
        }
    }
}

impl From<End> for log::Outcome {
    fn from(from: End) -> Self {
        match from {
            End::Commit => log::Outcome::Committed,
            End::Abort => log::Outcome::Aborted,
        }
    }
}

impl From<log::Ended> for Ended {
    fn from(from: log::Ended) -> Self {
        let outcome = match from.outcome {
            log::Outcome::Committed => Outcome::Committed,
            log::Outcome::Aborted => Outcome::Aborted,
        };
        Ended { outcome, next: from.next.into() }
    }
}

/// A write's refusal, told to the producer `who`.
pub(crate) fn refused(error: log::WriteError, who: Option<ProducerIdentity>) -> BrokerError {
    use log::{Refusal, WriteError};
    let producer = who.unwrap_or(ProducerIdentity { id: -1, epoch: -1 });
    match error {
        WriteError::Busy | WriteError::Deadline => BrokerError::Busy { what: error.to_string() },
        WriteError::DiskFull { file, needed } => {
            BrokerError::DiskFull { what: format!("{needed} bytes could not be reserved for {file}") }
        }
        WriteError::Fenced { .. } => BrokerError::Fenced { producer },
        WriteError::Damaged(_) => BrokerError::Corrupt { what: error.to_string() },
        WriteError::Stopped(_) => BrokerError::Stopped { what: error.to_string() },
        WriteError::Refused(refusal) => match refusal {
            Refusal::UnknownPartition(of) => unknown(of),
            Refusal::TopicExists(topic) => BrokerError::TopicExists { topic },
            Refusal::TopicInUse { topic, groups, transactions } => {
                BrokerError::TopicInUse { topic, groups, transactions }
            }
            Refusal::OutOfOrder { partition, expected, found, .. } => {
                BrokerError::OutOfOrder { partition: partition.to_string(), expected, found }
            }
            Refusal::UnknownProducer(_) | Refusal::UnknownTransactionalId(_) => {
                BrokerError::UnknownProducer { producer }
            }
            Refusal::OldConnection => BrokerError::OldConnection { producer },
            Refusal::PositionLost { partition, position } => BrokerError::PositionDoesNotHold {
                partition: partition.to_string(),
                position: position.into(),
            },
            Refusal::BadName(_)
            | Refusal::Invalid(_)
            | Refusal::BadBatch(_)
            | Refusal::TooLarge { .. }
            | Refusal::NotTransactional(_)
            | Refusal::OldGeneration => BrokerError::Invalid { what: refusal.to_string() },
        },
    }
}

/// Why nothing could be read.
pub(crate) fn unreadable(error: log::ReadError) -> BrokerError {
    use log::ReadError;
    match error {
        ReadError::UnknownPartition(of) => unknown(of),
        ReadError::OutOfRange { partition, offset, log_start, high_watermark } => {
            BrokerError::OutOfRange { partition: partition.to_string(), offset, log_start, high_watermark }
        }
        ReadError::PositionLost { partition, position } => {
            BrokerError::PositionDoesNotHold { partition: partition.to_string(), position: position.into() }
        }
        ReadError::Corrupt { .. } => BrokerError::Corrupt { what: error.to_string() },
        ReadError::Io { ref source, .. } => BrokerError::Stopped { what: format!("{error}: {source}") },
    }
}

fn unknown(of: log::TopicPartition) -> BrokerError {
    BrokerError::UnknownPartition { topic: of.topic.to_string(), partition: of.partition }
}
